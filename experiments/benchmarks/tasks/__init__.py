"""The parts of `nested bench continual`: streams of tasks, methods, who learns them, pages."""
