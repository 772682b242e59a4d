"""Things that learn while they run: state in, state out, users axis first."""

from nested import fast
from nested.memory import DeltaMemory, GatedDeltaMemory, HebbMemory, LinearState

__all__ = ["DeltaMemory", "GatedDeltaMemory", "HebbMemory", "LinearState", "fast"]
