"""From what many users learned to one slow update, and back: what a user keeps of it.

Users visit in batches; a slow level on the `session` clock moves once in thousands of visits.
`Visits` is the running mean of their displacements, which `Pull` takes as its source (FedAvg,
1602.05629; Reptile, 1803.02999). A displacement stored before the slow weights moved still counts
from where they stood: `Moves` knows how far they went since, which `Adapter.rebase` takes out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested.adapt import Params


class Visits(NamedTuple):
    """What users learned since the slow weights last moved; its size is that of one user."""

    total: Params  # weighted sum of displacements, (*shape)
    weight: Tensor  # () sum of weights

    @staticmethod
    def none(slow: Mapping[str, Tensor]) -> "Visits":
        """No visits yet."""
        zeros = {name: torch.zeros_like(p, requires_grad=False) for name, p in slow.items()}
        return Visits(zeros, torch.zeros((), dtype=torch.float64))

    def add(self, delta: Mapping[str, Tensor], weight: Tensor | None = None) -> "Visits":
        """With the displacements (B, *shape) of B visits, of one weight or weighted by (B,)."""
        some = next(iter(delta.values()))
        by = some.new_ones(len(some)) if weight is None else weight.to(some)
        total = {
            name: kept + (by.to(delta[name]) @ delta[name].detach().flatten(1)).view_as(kept)
            for name, kept in self.total.items()
        }
        return Visits(total, self.weight + by.sum().to(self.weight))

    def source(self, slow: Mapping[str, Tensor]) -> tuple[Params, None]:
        """Mean weights over the visits, (1, *shape), as `Timescales.tick(sources=...)` takes them.

        Raises ValueError when there were none.
        """
        if not self.weight > 0:
            raise ValueError("visits: nobody has visited since the slow weights last moved")
        return {
            name: (slow[name].detach() + x / self.weight.to(x)).unsqueeze(0)
            for name, x in self.total.items()
        }, None


class Moves:
    """Where the slow weights stood at each generation, the newest `keep` of them.

    For a pool of users, which counts generations and calls `rebase` for stored states:
    `Users(..., rebase=lambda state, old: adapter.rebase(state, moves.since(old)))`. Who stayed away
    for more than `keep` generations is rebased from the oldest that is known.
    """

    def __init__(self, slow: Mapping[str, Tensor], keep: int = 64):
        if keep < 1:
            raise ValueError(f"moves: keep={keep} generations; at least 1 is needed")
        self.keep, self.generation = keep, 0
        self._stood = {name: p.detach().clone().unsqueeze(0) for name, p in slow.items()}

    def advance(self, slow: Mapping[str, Tensor]) -> int:
        """The slow weights have moved to `slow`: the number of their new generation."""
        self.generation += 1
        self._stood = {
            name: torch.cat(
                [x[-self.keep + 1 :] if self.keep > 1 else x[:0], slow[name].detach()[None]]
            )
            for name, x in self._stood.items()
        }
        return self.generation

    def since(self, generation: Tensor) -> Params:
        """How far the slow weights have moved since these generations (n,): (n, *shape)."""
        some = next(iter(self._stood.values()))
        place = (generation.to(some.device) - self.generation + len(some) - 1).clamp_min(0)
        return {name: x[-1] - x[place] for name, x in self._stood.items()}

    def state_dict(self) -> dict[str, Any]:
        """The generation, and where the slow weights stood."""
        return {"generation": self.generation, "stood": dict(self._stood)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        stood: Mapping[str, Tensor] = state["stood"]
        if sorted(stood) != sorted(self._stood):
            raise ValueError(f"moves of {sorted(self._stood)}, but given {sorted(stood)}")
        self.generation = int(state["generation"])
        self._stood = {name: stood[name].clone() for name in self._stood}
