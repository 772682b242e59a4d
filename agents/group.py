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
    """G agents that act and learn together; rows and carries of all are joined along the batch.

    Their weights stand together from then on, and an agent's are a part of them: it may be loaded,
    saved and stepped as ever, but not moved, nor be in two groups.
    """

    def __init__(self, agents: Sequence[Dreamer]):
        shapes = [{name: p.shape for name, p in agent.named_parameters()} for agent in agents]
        if not agents or any(shape != shapes[0] for shape in shapes):
            raise ValueError("a group needs agents, all of one shape")
        if any(p.ndim > 3 for p in agents[0].parameters()):
            raise ValueError("a group is for vectors: convolutions gain nothing by it")
        self.agents = list(agents)
        each = [{**dict(agent.named_parameters()), **_state(agent)} for agent in agents]
        self._weights = {name: side_by_side([own[name] for own in each]) for name in each[0]}

    def __len__(self) -> int:
        return len(self.agents)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and state of all agents, (G, ...) each; gradients go to the agents' own.

        Raises RuntimeError if an agent's are elsewhere by now.
        """
        name, ours = next(iter(self._weights.items()))
        for agent, part in zip(self.agents, ours.detach(), strict=True):
            if agent.get_parameter(name).data_ptr() != part.data_ptr():
                raise RuntimeError("an agent was moved, or is in another group: make this one anew")
        return self._weights

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
        together = fast_state.bind(self.agents[0], self.weights(), learn)
        return together(batch, carry, slow, generators)

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


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """All parts as one, (G, ...): they are views of it from now on, and its gradients theirs."""
    whole = torch.stack([part.detach() for part in parts])
    for part, place in zip(parts, whole, strict=True):
        part.data = place

    def hand_out(whole: Tensor) -> None:
        assert whole.grad is not None
        for part, grad in zip(parts, whole.grad, strict=True):
            part.grad = grad if part.grad is None else part.grad.add_(grad)
        whole.grad = None

    if parts[0].requires_grad:
        whole.requires_grad_().register_post_accumulate_grad_hook(hand_out)
    return whole


def _state(agent: Dreamer) -> dict[str, Tensor]:
    scale = agent.return_scale
    return {SCALE + name: scale.get_buffer(name) for name in scale.state_dict()}
