"""Things that learn while they run: state in, state out, users axis first."""

from nested import fast, held
from nested.adapt import Adapter, AdapterState, Window, adapt
from nested.cms import ChainState, ContinuumMemory
from nested.consolidate import Moves, Visits
from nested.deep import TTTMLP, DeepMemory, DeepState, NeuralMemory, TTTLinear
from nested.held import Held
from nested.hope import HopeBlock, HopeState, SelfModifyingMemory, SelfState
from nested.memory import DeltaMemory, GatedDeltaMemory, HebbMemory, LinearMemory, LinearState
from nested.rls import RLSMemory, RLSState
from nested.users import Users

__all__ = [
    "TTTMLP",
    "Adapter",
    "AdapterState",
    "ChainState",
    "ContinuumMemory",
    "DeepMemory",
    "DeepState",
    "DeltaMemory",
    "GatedDeltaMemory",
    "HebbMemory",
    "Held",
    "HopeBlock",
    "HopeState",
    "LinearMemory",
    "LinearState",
    "Moves",
    "NeuralMemory",
    "RLSMemory",
    "RLSState",
    "SelfModifyingMemory",
    "SelfState",
    "TTTLinear",
    "Users",
    "Visits",
    "Window",
    "adapt",
    "fast",
    "held",
]
