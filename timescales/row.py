"""One level at work: its tensors, its optimizer, its window of gathered gradients, its counts.

A window lives in `.grad`, where autograd adds in place; using it up sets `.grad` to None, so slow
levels cost no accumulator and no copy. The mean over the window is folded into a fused optimizer
step through `grad_scale`, which equals dividing first, bit for bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from timescales.foreach import (
    Tensors,
    addcmul_,
    difference,
    div_,
    gradients,
    norm,
    over_mean,
    zero_,
)
from timescales.level import SQUARES, Descend, Level, Pull, Rule


class Row:
    """A level with its tensors, keyed by the names of the live parameters.

    `weights` are the live parameters of a match level and the copies of a copy level.
    """

    def __init__(self, level: Level, live: Mapping[str, Tensor]) -> None:
        self.level = level
        self.names = list(live)
        owned = [t if level.copy is None else t.detach().clone() for t in live.values()]
        self.weights = owned
        if level.start == "zero":
            zero_(self.weights)
        self._squared = list(live.values()) if reads_squares(level) else []
        self.squares = [torch.zeros_like(t) for t in self._squared]
        self.keeps_init = any(part.to == "init" for part in (*level.relax, *level.reset))
        self.init = [t.detach().clone() for t in owned] if self.keeps_init else []
        rule = _rule(level)
        self.optimizer = rule(owned) if rule is not None else None
        self.updates = 0
        self.skipped = 0
        self.gathered = 0  # backwards since the last update
        self.armed = False  # whether the next update is measured
        self.measured: dict[str, Tensor] = {}
        self._scales: dict[int, Tensor] = {}

    def drop_gradients(self) -> None:
        """Let autograd start the next window."""
        for weight in self.weights:
            weight.grad = None

    def gather_squares(self) -> None:
        """Add up the squares of the gradients that stand in the live parameters."""
        pairs = zip(self.squares, self._squared, strict=True)
        found = [(total, w.grad) for total, w in pairs if w.grad is not None]
        if found:
            totals, grads = (list(column) for column in zip(*found, strict=True))
            addcmul_(totals, grads, grads)

    def take_squares(self) -> Tensors:
        """What was gathered, over its mean, so that a window's scale says nothing; begins anew."""
        found = over_mean(self.squares)
        zero_(self.squares)
        return found

    def has_window(self) -> bool:
        """Whether a backward has reached any of the weights since the last update."""
        return self.gathered > 0 and any(w.grad is not None for w in self.weights)

    def step(self, divisor: int) -> None:
        """The optimizer's step on `.grad / divisor`."""
        optimizer = self.optimizer
        if optimizer is None:
            raise RuntimeError(f"level {self.level.name!r} has no rule to step")
        if optimizer.defaults.get("fused"):
            # The hook that torch.amp.GradScaler uses: the kernel divides as it reads.
            optimizer.grad_scale = self._scale(divisor)  # pyright: ignore[reportAttributeAccessIssue]
        elif divisor > 1:
            div_(gradients(self.weights), divisor)
        optimizer.step()

    def step_pseudo_gradient(self, origin: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
        """An outer step on `origin - source`; returns that gradient's norm."""
        pseudo = difference(origin, source)
        for weight, gradient in zip(self.weights, pseudo, strict=True):
            weight.grad = gradient
        self.step(1)
        self.drop_gradients()
        return norm(pseudo)

    def clear_rule(self) -> None:
        """Forget the optimizer's state, as if it had made no step."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def _scale(self, divisor: int) -> Tensor | None:
        if divisor == 1:
            return None
        if divisor not in self._scales:
            device = self.weights[0].device
            self._scales = {divisor: torch.full((), float(divisor), device=device)}
        return self._scales[divisor]

    def state_dict(self) -> dict[str, Any]:
        """Counts, window, copies and optimizer state; tensors are references, not copies."""
        named = list(zip(self.names, self.weights, strict=True))
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "gathered": self.gathered,
            "armed": self.armed,
            "measured": dict(self.measured),
            "window": {name: w.grad for name, w in named if w.grad is not None},
            "copy": dict(named) if self.level.copy is not None else {},
            "init": dict(zip(self.names, self.init, strict=True)) if self.keeps_init else {},
            "squares": dict(zip(self.names, self.squares, strict=True)) if self.squares else {},
            "rule": self._rule_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state`; its tensors are copied."""
        self.updates = int(state["updates"])
        self.skipped = int(state["skipped"])
        self.gathered = int(state["gathered"])
        self.armed = bool(state["armed"])
        self.measured = {key: t.clone() for key, t in state.get("measured", {}).items()}
        window: Mapping[str, Tensor] = state.get("window", {})
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.grad = _like(weight, window[name]) if name in window else None
        if self.level.copy is not None:
            self._load_into(self.weights, state.get("copy", {}), "copy")
        if self.keeps_init:
            self._load_into(self.init, state.get("init", {}), "init")
        if self.squares:
            self._load_into(self.squares, state.get("squares", {}), "squared gradients")
        if self.optimizer is not None:
            _load_rule_state(self.optimizer, self._names_by_id(), state.get("rule", {}))

    def _rule_state(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        return _rule_state(self.optimizer, self._names_by_id())

    def _names_by_id(self) -> dict[int, str]:
        return {id(w): name for w, name in zip(self.weights, self.names, strict=True)}

    def _load_into(self, into: list[Tensor], saved: Mapping[str, Tensor], what: str) -> None:
        if missing := [name for name in self.names if name not in saved]:
            raise ValueError(f"level {self.level.name!r}: the saved {what} lacks {missing[:12]}")
        for name, tensor in zip(self.names, into, strict=True):
            tensor.copy_(saved[name])


def reads_squares(level: Level) -> bool:
    """Whether the level follows squared gradients."""
    return isinstance(level.flow, Pull) and level.flow.source == SQUARES


def _rule(level: Level) -> Rule | None:
    match level.flow:
        case Descend(rule=rule):
            return rule
        case Pull(outer=outer):
            return outer
        case None:
            return None


def _like(weight: Tensor, saved: Tensor) -> Tensor:
    """A copy of `saved` laid out in memory as `weight`, which fused kernels rely on."""
    return torch.empty_like(weight, dtype=saved.dtype, requires_grad=False).copy_(saved)


def _rule_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """State by parameter name and hyperparameters by group; names are by the tensor's id."""
    state: dict[str, Any] = {names[id(w)]: dict(entry) for w, entry in optimizer.state.items()}
    groups: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        scalars = int | float | str | bool | Tensor | None
        groups[str(number)] = {
            key: value for key, value in group.items() if isinstance(value, scalars)
        }
    return {"state": state, "groups": groups}


def _load_rule_state(
    optimizer: Optimizer, names: Mapping[int, str], saved: Mapping[str, Any]
) -> None:
    packed = optimizer.state_dict()
    entries: Mapping[str, Mapping[str, Any]] = saved.get("state", {})
    state: dict[int, Any] = {}
    for number, group in enumerate(packed["param_groups"]):
        group.update(saved.get("groups", {}).get(str(number), {}))
        for weight, index in zip(
            optimizer.param_groups[number]["params"], group["params"], strict=True
        ):
            if (name := names[id(weight)]) in entries:
                state[index] = {k: _own(weight, v) for k, v in entries[name].items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _own(weight: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _like(weight, value) if value.shape == weight.shape else value.clone()
