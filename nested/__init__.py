"""Things that learn while they run: state in, state out, users axis first."""

from nested import fast
from nested.adapt import Adapter, AdapterState, Window, adapt
from nested.deep import TTTMLP, DeepMemory, DeepState, NeuralMemory, TTTLinear
from nested.memory import DeltaMemory, GatedDeltaMemory, HebbMemory, LinearMemory, LinearState
from nested.users import Users

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
    "Users",
    "Window",
    "adapt",
    "fast",
]
