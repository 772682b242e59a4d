"""Fast state: trees of tensors with the users (batch) axis first.

A tree is a tensor, a tuple or NamedTuple of trees, or a dict of trees; `()` is the state of a
thing that keeps none. Every operation gives a new tree and leaves its arguments as they were.
A row never reads another row, so one user's NaN stays with that user.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

Tree: TypeAlias = Any  # Tensor | tuple[Tree, ...] | dict[str, Tree]: NamedTuples defeat the types


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """`function` of the tensors that sit at the same place of each tree."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Tree]", tree)
        for other in others:
            _same(list(items), list(other))
        return {k: tree_map(function, v, *(o[k] for o in others)) for k, v in items.items()}
    if isinstance(tree, tuple):
        parts = cast("tuple[Tree, ...]", tree)
        for other in others:
            _same(type(parts).__name__, type(other).__name__)
            _same(len(parts), len(other))
        mapped = [tree_map(function, *rows) for rows in zip(parts, *others, strict=True)]
        kind = type(parts)
        return tuple(mapped) if kind is tuple else kind(*mapped)
    raise TypeError(f"a fast state holds tensors, tuples and dicts, not {type(tree).__name__}")


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def where(mask: Tensor, a: Tree, b: Tree) -> Tree:
    """Rows of `a` where `mask` (B,) is set and of `b` elsewhere, bit for bit."""

    def select(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype != y.dtype:
            raise TypeError(f"where: a leaf is {x.dtype} in one tree and {y.dtype} in the other")
        return torch.where(mask.reshape(-1, *(1,) * (y.dim() - 1)), x, y)

    return tree_map(select, a, b)


def reset(state: Tree, initial: Tree, mask: Tensor) -> Tree:
    """`state` with the rows of `mask` (B,) back at `initial`."""
    return where(mask, initial, state)


def stack(states: Sequence[Tree]) -> Tree:
    """Single users' states, without a users axis, as one state of all of them."""
    if not states:
        raise ValueError("stack: no states were given")
    return tree_map(lambda *rows: torch.stack(rows), *states)


def split(state: Tree) -> list[Tree]:
    """The users of a state one by one, without the users axis: the inverse of `stack`."""
    tensors = leaves(state)
    if not tensors:
        raise ValueError("split: a state without tensors does not say how many users it has")

    def user(i: int) -> Tree:
        def row(x: Tensor) -> Tensor:
            return x[i]

        return tree_map(row, state)

    return [user(i) for i in range(len(tensors[0]))]


def gather(state: Tree, index: Tensor) -> Tree:
    """The users named by `index` (n,), in that order; a user may come more than once."""

    def rows(x: Tensor) -> Tensor:
        return x.index_select(0, index)

    return tree_map(rows, state)


def detach(state: Tree) -> Tree:
    """The same values, cut from the graph."""
    return tree_map(Tensor.detach, state)


def bind(
    module: nn.Module, params: Mapping[str, Tensor], method: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`module` as a function that runs with `params` in place of those of its own it names.

    method: what to call with the module and the arguments; by default the module itself.
    """
    held = module if method is None else Method(module, method)
    named = dict(params) if method is None else {f"module.{k}": v for k, v in params.items()}

    def bound(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(held, named, args, kwargs)

    return bound


class Method(nn.Module):
    """A function of a module as a module, for those that replace the weights of modules."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.module, *args, **kwargs)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias; both may have one axis more in front, groups:
    then the rows of x are as many equal parts in order, and each meets a weight of its own."""
    if weight.ndim == 2:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.mT)
    return (y if bias is None else y.add_(bias.unsqueeze(1))).view(*x.shape[:-1], -1)


def heal(state: Tree, initial: Tree) -> tuple[Tree, Tensor]:
    """Users with a value that is not finite go back to `initial`; says how many (0-d, int64)."""
    tensors = leaves(state)
    if not tensors:
        return state, torch.zeros((), dtype=torch.int64)
    broken = torch.stack([~x.isfinite().reshape(len(x), -1).all(1) for x in tensors]).any(0)
    return reset(state, initial, broken), broken.sum()


def _same(one: object, other: object) -> None:
    if one != other:
        raise ValueError(f"fast states differ in structure: {one} and {other}")
