"""Things that learn while they run: state in, state out, users axis first."""

from nested import fast
from nested.memory import DeltaMemory, GatedDeltaMemory, LinearState

__all__ = ["DeltaMemory", "GatedDeltaMemory", "LinearState", "fast"]
