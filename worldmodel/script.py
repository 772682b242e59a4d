"""Functions of tensors that TorchScript interprets: Python's share of a small step is a quarter.

Nothing is compiled to machine code and nothing is specialised to shapes: reading a function takes
some milliseconds, once, and each of its operations then costs a microsecond less than from Python.
The function itself is the twin, and serves other devices, compilers, torch.func, and versions of
Python or torch that have no TorchScript.
"""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from worldmodel.nets import half, on_cpu

LARGE = 1 << 19  # elements of a tensor
Function = TypeVar("Function", bound=Callable[..., Any])


def scripted(function: Function) -> Function:
    """The function in TorchScript from its first call on, where its tensors are small and on a CPU.

    Large ones gain nothing, and TorchScript lets go of them later.
    """
    found: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        small = max(x.numel() for x in tensors) < LARGE
        fit = small and on_cpu(tensors[0]) and not half(tensors[0])
        if not fit or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return function(*args)
        if not found:
            found.append(read(function))
        return found[0](*args)

    return call  # pyright: ignore


def read(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in TorchScript; itself, where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, NotImplementedError, RuntimeError):
            return function
