"""The engine: the only place that moves a shared parameter.

`Timescales.tick` follows every backward and every event. Levels that are due flow from fastest to
slowest, each reading the others as they are at that moment; resets come last. Nothing here waits
for the device, except `metrics()` and Bernoulli clocks whose generator lives there.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timescales.clock import Counters, Every
from timescales.foreach import (
    Tensors,
    approach,
    average,
    copy_,
    difference,
    gradients,
    norm,
    share,
    zero_,
)
from timescales.level import (
    SQUARES,
    Descend,
    Level,
    Pull,
    Rate,
    Relax,
    Weighted,
    assign,
    describe_level,
)
from timescales.row import Row

Sources = Mapping[str, tuple[Mapping[str, Tensor], Tensor | None]]
"""Per-user tensors by source name: (parameter name -> (N, ...), weights (N,) or None)."""

Rates = Mapping[str, Mapping[str, Tensor]]
"""Per-weight rates by rate name: parameter name -> tensor shaped as the parameter."""


class _Given(NamedTuple):
    """What came with a tick."""

    sources: Sources
    rates: Rates


class Timescales:
    """Parameters that learn on clocks of their own.

    `levels` run from fastest to slowest and own every trainable parameter exactly once (ValueError
    with the lists otherwise). `generator` feeds Bernoulli clocks and noise. After `backward()`:
    `tick("update")`; after events: `tick("episode")`, `tick("session", sources={...})`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        levels: Sequence[Level],
        generator: torch.Generator | None = None,
    ) -> None:
        self._live = dict(named_parameters)
        self.levels = tuple(levels)
        owned = assign(self.levels, self._live)
        self._generator = generator
        self._counters = Counters()
        self._rows = {
            level.name: Row(level, {name: self._live[name] for name in owned[level.name]})
            for level in self.levels
        }
        for level in self.levels:
            self._check(level)

    def tick(
        self,
        unit: str,
        n: int = 1,
        sources: Sources | None = None,
        rates: Rates | None = None,
        measure: bool = False,
    ) -> list[str]:
        """Count `n` more of `unit` and move what is due; returns the names of levels that moved.

        `n` of "update" means that many backwards since the last tick. `measure` has each level
        measure its next update for `metrics()`, whenever that comes.
        """
        span = self._counters.advance(unit, n)
        given = _Given(sources or {}, rates or {})
        rows = self._rows.values()
        with torch.no_grad():
            for row in rows:
                row.gathered += n if unit == "update" else 0
                row.armed = row.armed or measure
                if row.squares and unit == "update":
                    row.gather_squares()
            moved = {row.level.name for row in rows if self._flow_if_due(row, unit, span, given)}
            for row in rows:
                if self._reset_if_due(row, unit, span, given):
                    moved.add(row.level.name)
        return [name for name in self._rows if name in moved]

    def weights(self, name: str) -> dict[str, Tensor]:
        """Weights of a level by parameter name, or the live ones ("params"); not copied."""
        if name == "params":
            return dict(self._live)
        row = self._row(name)
        return dict(zip(row.names, row.weights, strict=True))

    def metrics(self) -> dict[str, float]:
        """Counts of each level, and the norms of its last measured update; waits for the device."""
        found: dict[str, float] = {}
        for name, row in self._rows.items():
            found[f"levels/{name}/updates"] = float(row.updates)
            found[f"levels/{name}/skipped"] = float(row.skipped)
            for key, value in row.measured.items():
                found[f"levels/{name}/{key}"] = float(value)
        return found

    def table(self) -> list[dict[str, Any]]:
        """The level table, a row for each level: JSON values only."""
        total = sum(t.numel() for t in self._live.values() if t.requires_grad)
        return [
            describe_level(row.level, self.weights(name), total, self._rows)
            for name, row in self._rows.items()
        ]

    def timeline(self, length: int, unit: str = "update") -> dict[str, list[int]]:
        """The counts of `unit` in 1..length at which each level would move by its flow."""
        return timeline(self.levels, length, unit, _twin(self._generator))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the live parameters: nested dicts of tensors and JSON scalars.

        Tensors are references, as in torch: write them out, or copy them, before going on.
        """
        state: dict[str, Any] = {
            "counters": self._counters.state_dict(),
            "levels": {name: row.state_dict() for name, row in self._rows.items()},
        }
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, bit for bit, in the middle of a window too."""
        saved: Mapping[str, Any] = state["levels"]
        if set(saved) != set(self._rows):
            raise ValueError(
                f"the saved levels are {sorted(saved)}, the schedule has {sorted(self._rows)}"
            )
        with torch.no_grad():
            for name, row in self._rows.items():
                row.load_state_dict(saved[name])
        self._counters.load_state_dict(state.get("counters", {}))
        if self._generator is not None and "generator" in state:
            self._generator.set_state(state["generator"])

    # ------------------------------------------------------------------ one level

    def _flow_if_due(self, row: Row, unit: str, span: tuple[int, int], given: _Given) -> bool:
        flow, due = row.level.flow, fires(row.level.every, unit, span, self._generator)
        descends = isinstance(flow, Descend)
        if due and descends and not row.has_window():
            row.skipped += 1
            row.gathered = 0
            return False
        if due:
            self._update(row, given)
        if row.level.copy is None and (due or not descends):
            row.drop_gradients()  # used up, or of use to no flow
        return due

    def _update(self, row: Row, given: _Given) -> None:
        measured = row.armed
        before = [w.clone() for w in row.weights] if measured else []
        gradient = self._flow(row, given, measured)
        if measured:
            self._measure(row, before, gradient)
        row.updates += 1
        row.gathered = 0

    def _flow(self, row: Row, given: _Given, measured: bool) -> Tensor | None:
        """One update of the level; returns the norm of its gradient where that was asked for."""
        level, flow, gradient = row.level, row.level.flow, None
        outer = isinstance(flow, Pull) and flow.outer is not None
        source = self._read(row, flow.source, given) if isinstance(flow, Pull) else None
        origin = [w.clone() for w in row.weights] if outer and level.relax else row.weights
        terms = [self._term(row, relax, given) for relax in level.relax]
        if isinstance(flow, Pull) and not outer:
            terms.append((source, self._rate(row, flow.rate, given)))
        if terms:
            approach(row.weights, terms)
        self._add_noise(row)
        if isinstance(flow, Descend):
            divisor = row.gathered if flow.reduce == "mean" else 1
            if measured:
                gradient = norm(gradients(row.weights)) / divisor
            row.step(divisor)
        elif outer and source is not None:
            gradient = row.step_pseudo_gradient(origin, source)
        return gradient

    def _measure(self, row: Row, before: Tensors, gradient: Tensor | None) -> None:
        moved = norm(difference(row.weights, before))
        samples = max(1, row.gathered)
        row.measured = {"update_norm": moved, "displacement_per_sample": moved / samples}
        if gradient is not None:
            row.measured["grad_norm"] = gradient
        row.armed = False

    def _reset_if_due(self, row: Row, unit: str, span: tuple[int, int], given: _Given) -> bool:
        due = [
            reset for reset in row.level.reset if fires(reset.every, unit, span, self._generator)
        ]
        for reset in due:
            targets = self._read(row, reset.to, given)
            if targets is None:
                zero_(row.weights)
            else:
                copy_(row.weights, targets)
            if reset.clear_rule:
                row.clear_rule()
        return bool(due)

    def _term(
        self, row: Row, relax: Relax, given: _Given
    ) -> tuple[Tensors | None, float | Tensors]:
        return self._read(row, relax.to, given), self._rate(row, relax.rate, given)

    def _add_noise(self, row: Row) -> None:
        for scale in (relax.noise for relax in row.level.relax if relax.noise):
            for w in row.weights:
                g = self._generator
                device = g.device if g is not None else w.device
                noise = torch.randn(w.shape, generator=g, device=device, dtype=w.dtype)
                w.add_(noise.to(w.device), alpha=scale)

    def _read(self, row: Row, name: str, given: _Given) -> Tensors | None:
        """The tensors called `name`, in the order of the level's own; None for zero."""
        if name == "zero":
            return None
        if name == "init":
            return row.init
        if name == SQUARES:
            return row.take_squares()
        if name in given.sources:
            stacked, weights = given.sources[name]
            return [average(t, weights) for t in _pick(stacked, row, f"source {name!r}")]
        if name != "params" and name not in self._rows:
            raise ValueError(
                f"level {row.level.name!r} reads {name!r}, which is neither a level nor handed in "
                f"at this tick (sources={{{name!r}: ...}}){_near(name, self._rows)}"
            )
        return _pick(self.weights(name), row, f"level {name!r}")

    def _rate(self, row: Row, rate: Rate, given: _Given) -> float | Tensors:
        if isinstance(rate, Weighted):
            return share(_pick(self.weights(rate.by), row, f"level {rate.by!r}"), rate.times)
        if isinstance(rate, str):
            if rate not in given.rates:
                raise ValueError(
                    f"level {row.level.name!r} takes its rate from {rate!r}, which was not handed "
                    f"in at this tick (rates={{{rate!r}: ...}})"
                )
            return _pick(given.rates[rate], row, f"rate {rate!r}")
        return rate(row.updates) if callable(rate) else rate

    # ------------------------------------------------------------------ checks

    def _row(self, name: str) -> Row:
        if name not in self._rows:
            raise ValueError(f"no level {name!r}; there are {list(self._rows)}")
        return self._rows[name]

    def _check(self, level: Level) -> None:
        """Refuse what can be known to fail: reading oneself, or what another level lacks."""
        flow = [level.flow.source] if isinstance(level.flow, Pull) else []
        names = [*flow, *(r.to for r in level.relax), *(r.to for r in level.reset)]
        itself = {level.name} if level.copy is not None else {level.name, "params"}
        for name in names:
            if name in itself:
                raise ValueError(f"level {level.name!r} moves toward {name!r}, which is itself")
            if name in self._rows:
                _pick(self.weights(name), self._rows[level.name], f"level {name!r}")
        for rate in (r.rate for r in level.relax):
            if isinstance(rate, Weighted):
                _pick(self.weights(rate.by), self._rows[level.name], f"level {rate.by!r}")
        if SQUARES in names:
            self._check_squares(level)
        clocks = [level.every, *(reset.every for reset in level.reset)]
        draws = any(every.p < 1.0 for every in clocks) or any(r.noise for r in level.relax)
        if draws and self._generator is None:
            raise ValueError(
                f"level {level.name!r} draws random numbers: give Timescales a generator"
            )

    def _check_squares(self, level: Level) -> None:
        """A copy may follow the squares of gradients that owners use up at every update."""
        if level.copy is None or level.every.unit != "update":
            raise ValueError(
                f"level {level.name!r} follows squared gradients: only a copy can, by updates"
            )
        for other in self.levels:
            slow = other.copy is None and other.every != Every()
            if slow and set(self._rows[other.name].names) & set(self._rows[level.name].names):
                raise ValueError(
                    f"level {level.name!r} follows squared gradients of {other.name!r}, which "
                    f"gathers them and moves {other.every}: it must move every update"
                )


def fires(
    every: Every, unit: str, span: tuple[int, int], generator: torch.Generator | None
) -> bool:
    """Whether the clock fires at a tick of `unit`; a Bernoulli clock draws once a tick."""
    if every.unit != unit:
        return False
    if every.p < 1.0 and generator is not None:
        draw = torch.rand((), generator=generator, device=generator.device)
        return bool(draw < every.p) and every.due(*span)
    return every.due(*span)


def timeline(
    levels: Sequence[Level],
    length: int,
    unit: str = "update",
    generator: torch.Generator | None = None,
) -> dict[str, list[int]]:
    """The counts of `unit` in 1..length at which each level would move by its flow.

    A Bernoulli clock shows one possible course; one draw a tick from `generator`.
    """
    moves: dict[str, list[int]] = {level.name: [] for level in levels}
    for count in range(1, length + 1):
        for level in levels:
            if fires(level.every, unit, (count - 1, count), generator):
                moves[level.name].append(count)
    return moves


def _twin(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is None:
        return None
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _pick(named: Mapping[str, Tensor], row: Row, what: str) -> Tensors:
    if missing := [name for name in row.names if name not in named]:
        raise ValueError(
            f"{what} lacks {len(missing)} parameters of level {row.level.name!r}: {missing[:12]}"
        )
    return [named[name] for name in row.names]


def _near(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
