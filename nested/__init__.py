"""Things that learn while they run: state in, state out, users axis first."""

from nested import adapt, fast
from nested.adapt import Adapter, AdapterState
from nested.memory import DeltaMemory, GatedDeltaMemory, HebbMemory, LinearMemory, LinearState

__all__ = [
    "Adapter",
    "AdapterState",
    "DeltaMemory",
    "GatedDeltaMemory",
    "HebbMemory",
    "LinearMemory",
    "LinearState",
    "adapt",
    "fast",
]
