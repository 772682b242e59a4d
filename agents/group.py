"""Many small agents as one: G agents of one shape share every operation, and nothing else.

Where an agent is small, the cost of an update is the number of operations and not their size. A
group stacks the weights of its agents along a new first axis and runs one agent's code on the rows
of all of them, those of the first agent first (worldmodel/nets.py). Each agent keeps its own
parameters, gradients and timescales, and draws from a generator of its own, so it learns what it
would have learned alone, to rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.dreamer import Dreamer, Outcome
from nested import fast as fast_state
from worldmodel import Batch, Carry
from worldmodel.rssm import MemoryUse

Generators = tuple[torch.Generator, ...]
SCALE = "return_scale."  # the only state of an agent that is not a parameter


class Group:
    """G agents that act and learn together; rows and carries of all are joined along the batch."""

    def __init__(self, agents: Sequence[Dreamer]):
        shapes = [{name: p.shape for name, p in agent.named_parameters()} for agent in agents]
        if not agents or any(shape != shapes[0] for shape in shapes):
            raise ValueError("a group needs agents, all of one shape")
        if any(p.ndim > 3 for p in agents[0].parameters()):
            raise ValueError("a group is for vectors: convolutions gain nothing by it")
        self.agents = list(agents)

    def __len__(self) -> int:
        return len(self.agents)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and state of all agents, (G, ...) each; gradients go to the agents' own."""
        columns: dict[str, list[Tensor]] = {}
        for agent in self.agents:
            for name, value in [*agent.named_parameters(), *_state(agent).items()]:
                columns.setdefault(name, []).append(value)
        return {name: torch.stack(column) for name, column in columns.items()}

    @torch.no_grad()
    def act(
        self, carry: Carry, row: Batch, generators: Generators, use: MemoryUse = "write"
    ) -> tuple[Tensor, Carry]:
        """As `Dreamer.act`, for the rows of all agents."""
        act = fast_state.bind(self.agents[0], self.weights(), Dreamer.act)
        return act(carry, row, generators, use)

    def losses(
        self,
        batch: Batch,
        carry: Carry,
        slow_critics: Sequence[Mapping[str, Tensor]],
        generators: Generators,
    ) -> tuple[Tensor, Outcome]:
        """The sum of all agents' total losses, and the outcome; its metrics are (G,) each.

        Every loss keeps its rows, those of one agent together.
        """
        slow = {name: torch.stack([s[name] for s in slow_critics]) for name in slow_critics[0]}
        weights = self.weights()
        total, outcome = fast_state.bind(self.agents[0], weights, learn)(
            batch, carry, slow, generators
        )
        with torch.no_grad():
            for g, agent in enumerate(self.agents):
                for name, value in _state(agent).items():
                    value.copy_(weights[name][g])
        return total, outcome

    def split(self, outcome: Outcome) -> list[Outcome]:
        """The outcome of each agent, without gradients."""
        losses = {key: value.detach().chunk(len(self)) for key, value in outcome.losses.items()}
        carries = split_rows(outcome.carry, len(self))
        return [
            Outcome(
                {key: value[g] for key, value in losses.items()},
                carries[g],
                {key: value[g] for key, value in outcome.metrics.items()},
            )
            for g in range(len(self))
        ]


def learn(agent: Dreamer, *args: Any) -> tuple[Tensor, Outcome]:
    """The total loss and the outcome of `Dreamer.losses`."""
    outcome = agent.losses(*args)
    return agent.total(outcome.losses), outcome


def join_rows(trees: Sequence[Any]) -> Any:
    """Trees of tensors (B, ...) as one (G * B, ...)."""
    return fast_state.tree_map(lambda *rows: torch.cat(rows), *trees)


def split_rows(tree: Any, groups: int) -> list[Any]:
    """The inverse of `join_rows`."""

    def part(g: int) -> Any:
        return fast_state.tree_map(lambda x: x.chunk(groups)[g], tree)

    return [part(g) for g in range(groups)]


def _state(agent: Dreamer) -> dict[str, Tensor]:
    return {SCALE + name: value for name, value in agent.return_scale.state_dict().items()}
