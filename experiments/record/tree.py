"""A training state as JSON and named tensors, and back, bit for bit.

A state is nested dicts, lists and tuples of torch tensors, numpy arrays and scalars, and exact
Python scalars. Leaves that JSON cannot hold exactly become marks, `{"$": kind, ...}`; tensors go
beside it, each in storage of its own, since safetensors refuses shared ones. A tensor object that
appears twice is stored once. NamedTuples come back as tuples; tensors come back on the CPU.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARK = "$"
PLAIN = (bool, int, str, type(None))


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A JSON value for `state` and its tensors by name. TypeError names what has no exact form."""
    encoder = _Encoder()
    return encoder.value(state, "state"), encoder.tensors


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that `encode` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {key: decode(item, tensors) for key, item in value.items()}
    return _decode_mark(value[MARK], value["of"], tensors)


def to_tensor(array: np.ndarray, path: str) -> Tensor:
    """A tensor that holds the bits of a numpy array. TypeError where torch lacks the dtype."""
    try:
        whole = array.flags.c_contiguous and array.flags.writeable
        return torch.from_numpy(array if whole else array.copy())
    except TypeError as error:
        raise TypeError(f"{path}: numpy dtype {array.dtype} cannot be stored: {error}") from error


class _Encoder:
    """Walks a state; `tensors` collects the arrays under readable, unique names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._storages: set[int] = set()

    def value(self, value: Any, path: str) -> Any:
        if type(value) in PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else _mark("float", str(value))
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, list | tuple):
            items = [self.value(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else _mark("tuple", items)
        return self._array(value, path)

    def _dict(self, value: dict[Any, Any], path: str) -> Any:
        if all(type(key) is str for key in value) and MARK not in value:
            return {key: self.value(item, f"{path}.{key}") for key, item in value.items()}
        # JSON has string keys only; optimizers number their parameters.
        pairs = [[self.value(k, path), self.value(v, f"{path}.{k}")] for k, v in value.items()]
        return _mark("dict", pairs)

    def _array(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self._names[id(value)] = self._store(value.detach(), path)
            return _mark("tensor", self._names[id(value)])
        if isinstance(value, np.ndarray):
            return _mark("array", self._store(to_tensor(value, path), path))
        if isinstance(value, np.generic):
            return _mark("scalar", self._store(to_tensor(np.array(value), path), path))
        raise TypeError(f"{path}: a {type(value).__name__} has no exact form in a checkpoint")

    def _store(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided:
            raise TypeError(f"{path}: a {tensor.layout} tensor cannot be stored; make it dense")
        tensor = tensor.cpu()
        storage = tensor.untyped_storage()
        owned = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if not owned or storage.data_ptr() in self._storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._storages.add(tensor.untyped_storage().data_ptr())
        name = path
        while name in self.tensors:  # "a.b" and a -> b read alike
            name += "'"
        self.tensors[name] = tensor
        return name


def _mark(kind: str, of: Any) -> dict[str, Any]:
    return {MARK: kind, "of": of}


def _decode_mark(kind: str, of: Any, tensors: dict[str, Tensor]) -> Any:
    match kind:
        case "float":
            return float(of)
        case "tuple":
            return tuple(decode(item, tensors) for item in of)
        case "dict":
            return {decode(key, tensors): decode(item, tensors) for key, item in of}
        case "tensor":
            return tensors[of]
        case "array":
            return tensors[of].numpy()
        case "scalar":
            return tensors[of].numpy()[()]
        case _:
            raise ValueError(f"unknown mark {kind!r} in a checkpoint's state")
