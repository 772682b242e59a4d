"""Levels: which parameters move, on which clock, by which flow.

A `match` level owns live parameters, a `copy` level shadows them. `assign` gives every trainable
parameter exactly one owner and says what is wrong when it cannot: a parameter that silently never
learns is the worst mistake a schedule can hold.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from torch import Tensor
from torch.optim import Optimizer

from timescales.clock import Every

Rule = Callable[[Iterable[Tensor]], Optimizer]
"""Makes the optimizer of some tensors: `rules.adamw(lr=3e-4)`, `partial(torch.optim.SGD, lr=1)`."""


@dataclass(frozen=True)
class Weighted:
    """Per-weight rates `z / (1 + z)` where `z` is `times` the weights of the level `by`.

    Under SGD the step of the penalty `times / (2 lr) by (w - to)**2`, taken implicitly: no strength
    makes it unstable, and for small z it is the penalty's own step.
    """

    by: str
    times: float

    def __post_init__(self) -> None:
        if not self.times >= 0.0:
            raise ValueError(f"Weighted.times = {self.times!r}: 0 or more")

    def __str__(self) -> str:
        return f"z/(1+z), z = {self.times:g} {self.by}"


Rate = float | str | Callable[[int], float] | Weighted
"""A number, the name of per-weight tensors handed in at the tick, a schedule of the number of
updates the level has made before this one, or what another level's weights make of it."""

SQUARES: Final = "squares"
"""Source: the mean square of the gradients since the level's last update, over its own mean."""

RESERVED: Final = ("params", "init", "zero", SQUARES)


class Rest(Enum):
    """The type of `REST`: every parameter that no other level claims."""

    REST = "rest"


REST: Final = Rest.REST


@dataclass(frozen=True)
class Descend:
    """Flow: `rule` steps on the gradients gathered since the level's last update."""

    rule: Rule
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"Descend.reduce = {self.reduce!r}: 'mean' or 'sum'")

    def __str__(self) -> str:
        return f"descend {describe(self.rule)} on the {self.reduce}"


@dataclass(frozen=True)
class Pull:
    """Flow: toward `source` at `rate`, or `outer` steps on the pseudo-gradient `self - source`."""

    source: str
    rate: Rate = 1.0
    outer: Rule | None = None

    def __post_init__(self) -> None:
        if self.outer is not None and self.rate != 1.0:
            raise ValueError(
                f"Pull({self.source!r}): rate {describe(self.rate)} has no effect beside outer; "
                "set the learning rate of outer instead"
            )

    def __str__(self) -> str:
        source = "squared gradients" if self.source == SQUARES else self.source
        if self.outer is not None:
            return f"pull to {source} by {describe(self.outer)}"
        return f"pull to {source} at {describe(self.rate)}"


@dataclass(frozen=True)
class Relax:
    """Decay toward a level, "init" or "zero", decoupled from the flow's rule.

    Equal to a penalty in the loss under SGD; under Adam it is the penalty's decoupled form. `noise`
    is the standard deviation of what is added at each update.
    """

    to: str
    rate: Rate
    noise: float = 0.0

    def __str__(self) -> str:
        noise = f" with noise {self.noise:g}" if self.noise else ""
        return f"relax to {self.to} at {describe(self.rate)}{noise}"


@dataclass(frozen=True)
class Reset:
    """Event: become a copy of a level, "init" or "params", on its own clock, after all flows.

    `clear_rule` also forgets the state of the level's optimizer.
    """

    to: str
    every: Every
    clear_rule: bool = False

    def __str__(self) -> str:
        return f"reset to {self.to} {self.every}"


@dataclass(frozen=True)
class Level:
    """A row of the schedule: `match` owns or `copy` shadows the parameters a regex finds.

    The list of levels runs from fastest to slowest. Without a flow a level only relaxes and resets.
    A copy begins as the parameters are, or with `start="zero"` at zero.
    """

    name: str
    match: str | Rest | None = None
    copy: str | None = None
    every: Every = field(default_factory=Every)
    flow: Descend | Pull | None = None
    relax: Sequence[Relax] = ()
    reset: Sequence[Reset] = ()
    start: Literal["params", "zero"] = "params"

    def __post_init__(self) -> None:
        if self.start not in ("params", "zero") or (self.start == "zero" and self.copy is None):
            raise ValueError(
                f"level {self.name!r}: start={self.start!r}; 'params', or 'zero' of a copy"
            )
        if not self.name or "/" in self.name or self.name in RESERVED:
            raise ValueError(
                f"a level cannot be called {self.name!r}: {RESERVED} and '/' are taken"
            )
        if (self.match is None) == (self.copy is None):
            raise ValueError(f"level {self.name!r} needs either match= or copy=, and not both")
        if self.copy is not None and isinstance(self.flow, Descend):
            raise ValueError(
                f"level {self.name!r} is a copy and gathers no gradient: use Pull, or match="
            )

    @property
    def pattern(self) -> str:
        """The regex of the level, or "the rest"."""
        if self.copy is not None:
            return self.copy
        return self.match if isinstance(self.match, str) else "the rest"


def describe(value: object) -> str:
    """A short text of a rule or rate, for tables and errors."""
    if isinstance(value, functools.partial):
        settings = ", ".join(f"{key}={item}" for key, item in value.keywords.items())
        return f"{describe(value.func)}({settings})"
    if isinstance(value, float):
        return f"{value:g}"
    return value.__name__ if isinstance(value, type) else str(value)


def assign(levels: Sequence[Level], named: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of the parameters of each level, in the order of `named`.

    Raises ValueError, with the lists, for a trainable parameter that no level or more than one
    level claims, and for a level that gets none.
    """
    names = [level.name for level in levels]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"levels of the same name: {repeated}")
    trainable = [name for name, tensor in named.items() if tensor.requires_grad]
    claims = {level.name: _claims(level, named, trainable) for level in levels}
    owners = [level.name for level in levels if level.copy is None]
    rests = [level.name for level in levels if level.match is REST]
    if len(rests) > 1:
        raise ValueError(f"levels {rests} all match REST: one level takes the rest")
    claimed = {name for owner in owners for name in claims[owner]}
    for rest in rests:
        claims[rest] = [name for name in trainable if name not in claimed]
    _check_owned(levels, claims, owners, trainable)
    return claims


def _claims(level: Level, named: Mapping[str, Tensor], trainable: list[str]) -> list[str]:
    if level.match is REST:
        return []
    try:
        pattern = re.compile(level.pattern)
    except re.error as error:
        raise ValueError(f"level {level.name!r} ({level.pattern!r}): {error}") from None
    return [name for name in (named if level.copy else trainable) if pattern.search(name)]


def _check_owned(
    levels: Sequence[Level],
    claims: Mapping[str, list[str]],
    owners: Sequence[str],
    trainable: Sequence[str],
) -> None:
    problems: list[str] = []
    by_parameter: dict[str, list[str]] = {name: [] for name in trainable}
    for owner in owners:
        for name in claims[owner]:
            by_parameter[name].append(owner)
    if unowned := [name for name, by in by_parameter.items() if not by]:
        problems.append(f"no level owns {_listed(unowned)}; add them to a level or match=REST")
    twice = [f"{name} (by {', '.join(by)})" for name, by in by_parameter.items() if len(by) > 1]
    if twice:
        problems.append(f"claimed twice: {_listed(twice)}")
    for level in levels:
        if not claims[level.name]:
            problems.append(
                f"level {level.name!r} ({level.pattern!r}) matches no parameter"
                f"{_near(level.pattern, trainable)}"
            )
    if problems:
        raise ValueError("levels and parameters do not fit:\n  " + "\n  ".join(problems))


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: " + ", ".join(names[:most]) + more


def _near(pattern: str, names: Sequence[str]) -> str:
    """A suggestion: the modules and parameters whose names look like the pattern."""
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 8)}
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$.*()")
    close = difflib.get_close_matches(plain, sorted(parts), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {_listed(sorted({name.split('.')[0] for name in names}))}"


def handed_in(level: Level, known: Iterable[str]) -> list[str]:
    """What a level expects at its ticks: sources and rates that are no level of the schedule."""
    flow = [level.flow.source, level.flow.rate] if isinstance(level.flow, Pull) else []
    reads = [*flow, *(x for r in level.relax for x in (r.to, r.rate)), *(r.to for r in level.reset)]
    names = {name for name in reads if isinstance(name, str)}
    return sorted(names - {*RESERVED, *known})


def describe_level(
    level: Level, tensors: Mapping[str, Tensor], total: int, known: Iterable[str]
) -> dict[str, Any]:
    """One row of the level table: JSON values only."""
    count = sum(tensor.numel() for tensor in tensors.values())
    return {
        "name": level.name,
        "kind": "match" if level.copy is None else "copy",
        "pattern": level.pattern,
        "tensors": len(tensors),
        "parameters": count,
        "share": count / max(1, total),
        "n": level.every.n,
        "unit": level.every.unit,
        "phase": level.every.phase,
        "p": level.every.p,
        "every": str(level.every),
        "flow": str(level.flow) if level.flow is not None else "none",
        "relax": [str(relax) for relax in level.relax],
        "reset": [str(reset) for reset in level.reset],
        "handed_in": handed_in(level, known),
    }
