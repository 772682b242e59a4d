"""Things that learn while they run: state in, state out, users axis first."""

from nested import adapt, fast
from nested.adapt import Adapter, AdapterState
from nested.deep import TTTMLP, DeepMemory, DeepState, NeuralMemory, TTTLinear
from nested.memory import DeltaMemory, GatedDeltaMemory, HebbMemory, LinearMemory, LinearState

__all__ = [
    "TTTMLP",
    "Adapter",
    "AdapterState",
    "DeepMemory",
    "DeepState",
    "DeltaMemory",
    "GatedDeltaMemory",
    "HebbMemory",
    "LinearMemory",
    "LinearState",
    "NeuralMemory",
    "TTTLinear",
    "adapt",
    "fast",
]
