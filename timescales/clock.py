"""Clocks: when something is due, counted in named units.

`Every` is a pure description, `Counters` holds the counts, `Ratio` tells how many updates are owed
for the frames that came in. All three are exact: a remainder carries over, so a period holds over
any way of cutting time into ticks and over any number of restarts. Nothing is due at count 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Every:
    """Due each time the counter of `unit` passes `phase` plus a multiple of `n`.

    With `p` < 1 a due clock fires with that probability: one draw a tick of its unit.
    """

    n: int = 1
    unit: str = "update"
    phase: int = 0
    p: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 1 or self.n != int(self.n):
            raise ValueError(f"Every.n = {self.n!r}: a period is a whole number, 1 or more")
        if not self.unit:
            raise ValueError("Every.unit is empty: name what is counted, for example 'update'")
        if self.phase != int(self.phase):
            raise ValueError(f"Every.phase = {self.phase!r}: a phase is a whole number")
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"Every.p = {self.p!r}: a probability in (0, 1]")

    def due(self, before: int, after: int) -> bool:
        """Whether a count that went from `before` to `after` passed a due point (chance aside)."""
        return (after - self.phase) // self.n > (before - self.phase) // self.n

    def __str__(self) -> str:
        phase = f" phase {self.phase}" if self.phase else ""
        chance = f" p {self.p:g}" if self.p < 1.0 else ""
        period = self.unit if self.n == 1 else f"{self.n} {self.unit}s"
        return f"every {period}{phase}{chance}"


class Counters:
    """How often each unit has been counted."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __getitem__(self, unit: str) -> int:
        """Count of `unit`; 0 when it was never counted."""
        return self._counts.get(unit, 0)

    def advance(self, unit: str, n: int = 1) -> tuple[int, int]:
        """Count `n` more of `unit`; returns the count before and after."""
        if n < 0 or n != int(n):
            raise ValueError(f"cannot advance {unit!r} by {n!r}: a whole number, 0 or more")
        before = self[unit]
        self._counts[unit] = before + int(n)
        return before, self._counts[unit]

    def state_dict(self) -> dict[str, int]:
        """Counts by unit."""
        return dict(self._counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over the counts of `state`."""
        self._counts = {unit: int(count) for unit, count in state.items()}


class Ratio:
    """How many updates are owed for the frames that came in: `rate` for each, exactly.

    The rate is `updates / frames`; 0.3 is three tenths, not the nearest binary fraction, so after
    n frames exactly floor(0.3 n) updates have been handed out.
    """

    def __init__(self, updates: float, frames: float = 1) -> None:
        if updates < 0 or frames <= 0:
            raise ValueError(f"Ratio({updates!r}, {frames!r}): updates >= 0 for frames > 0")
        rate = Fraction(updates) / Fraction(frames)
        self.rate = rate.limit_denominator(10**9)
        self._count = 0
        self._issued = 0

    def owed(self, n: int = 1) -> int:
        """Updates to make now that `n` more frames came in."""
        self._count += int(n)
        owed = int(self.rate * self._count) - self._issued
        self._issued += owed
        return owed

    def state_dict(self) -> dict[str, Any]:
        """Frames counted and updates handed out."""
        return {"count": self._count, "issued": self._issued}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._count, self._issued = int(state["count"]), int(state["issued"])
