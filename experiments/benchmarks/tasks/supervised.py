"""A learner of supervised streams: S seeds of one method in one program.

Parameters are stacked, seeds first, and layers are batched products, so 20 seeds cost little more
than one, and the project's own levels move them: a seed is only a leading axis. Seeds never mix:
losses are summed over them, rules work elementwise, and each draws its own random numbers, so seed
i of S equals seed i alone. What a method adds to gradient descent comes in as hooks (baselines.py).
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments import plasticity
from experiments.benchmarks.tasks.streams import Rows, Stream
from experiments.benchmarks.timing.flops import moved_bytes
from timescales import Level, Timescales

Params = dict[str, Tensor]
BINS = 20  # of the online score within a task


class Settings(NamedTuple):
    """What all methods share, and the one or two numbers that each has of its own."""

    rule: str = "sgd"
    lr: float = 0.1
    hidden: tuple[int, ...] = (100, 100, 100, 100)
    batch: int = 16
    evaluations: int = 5  # of the current task while it is trained, besides the one before
    ewc: float = 10.0  # strength; the penalty is ewc / 2 F (w - w*)^2
    ewc_rows: int = 200  # rows that a task's Fisher is measured on
    gamma: float = 0.95  # what is kept of the older tasks' Fisher
    l2_init: float = 1e-2  # strength; the penalty is l2_init / 2 |w - w0|^2
    shrink: float = 0.8
    perturb: float = 0.2
    redo_every: int = 50  # updates
    tau: float = plasticity.DORMANT
    replacement: float = 1e-3  # units a step, of those old enough
    maturity: int = 100  # updates
    average: float = 0.02  # rate of weight averages
    return_every: int = 50  # updates from one return of the hare to the next
    memory: int = 200  # rows in the reservoir
    consistency: float = 0.1


@dataclass(frozen=True)
class Hooks:
    """What a method does besides descending; each is called at its place in `Learner`."""

    begun: Callable[[int], None] = lambda task: None
    extend: Callable[[Rows], Rows] = lambda rows: rows
    penalty: Callable[[Rows, Tensor], Tensor | None] = lambda rows, outputs: None
    rates: Callable[[], Mapping[str, Params] | None] = lambda: None
    updated: Callable[[list[Tensor]], None] = lambda hidden: None
    ended: Callable[[int], None] = lambda task: None


@dataclass(frozen=True)
class Method:
    """A way of learning: a schedule of levels, and what it adds to it."""

    line: str
    levels: Callable[[Mapping[str, int], Settings], list[Level]]
    hooks: Callable[["Learner"], Hooks] = lambda learner: Hooks()
    acts: str = "params"  # the level whose weights are evaluated
    oracle: bool = False  # sees the task's label
    boundaries: bool = False  # is told when a task begins


# ---- networks ----------------------------------------------------------------------------------
def widths(stream: Stream, settings: Settings) -> tuple[int, ...]:
    """Inputs, hidden units and outputs of the network for a stream."""
    return (stream.inputs, *settings.hidden, stream.outputs)


def initial(
    sizes: Sequence[int], seeds: Sequence[int], number: int, dtype: torch.dtype = torch.float32
) -> Params:
    """The `number`-th fresh weights of each seed, (S, in, out) and (S, out), by name.

    Uniform with the variance that keeps ReLU layers alike (He et al. 2015), LeCun's for the last.
    """
    draws = [np.random.default_rng([zlib.crc32(b"weights"), seed, number]) for seed in seeds]
    params: Params = {}
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        bound = ((3.0 if i == len(sizes) - 2 else 6.0) / inputs) ** 0.5
        weight = np.stack([draw.uniform(-bound, bound, (inputs, outputs)) for draw in draws])
        params[f"layers.{i}.weight"] = torch.from_numpy(weight).to(dtype)
        params[f"layers.{i}.bias"] = torch.zeros(len(seeds), outputs, dtype=dtype)
    return params


def layers(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer."""
    count = len(params) // 2
    return [(params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]) for i in range(count)]


def forward(params: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (S, B, C) for x (S, B, D), and the units of each hidden layer (S, B, H)."""
    *inner, (weight, bias) = layers(params)
    hidden = []
    for inner_weight, inner_bias in inner:
        x = torch.baddbmm(inner_bias[:, None], x, inner_weight).relu()
        hidden.append(x)
    return torch.baddbmm(bias[:, None], x, weight), hidden


def losses(outputs: Tensor, rows: Rows) -> Tensor:
    """Cross-entropy or squared error of each row (S, B)."""
    if rows.y.is_floating_point():
        return (outputs[..., 0] - rows.y).square()
    flat = F.cross_entropy(outputs.flatten(0, 1), rows.y.flatten(), reduction="none")
    return flat.view(rows.y.shape)


def score(outputs: Tensor, rows: Rows, spread: Tensor) -> Tensor:
    """Share of rows that are right, or 1 - error / spread (S,): 0 knows only the mean, 1 all."""
    if rows.y.is_floating_point():
        return 1.0 - losses(outputs, rows).mean(-1) / spread
    return (outputs.argmax(-1) == rows.y).to(outputs.dtype).mean(-1)


# ---- learning ----------------------------------------------------------------------------------
class Learner:
    """S agents of one method; `begin`, `step` for every batch, `end`, task after task."""

    def __init__(self, stream: Stream, method: Method, settings: Settings) -> None:
        self.stream, self.method, self.settings = stream, method, settings
        self.sizes = widths(stream, settings)
        self.dtype = stream.spread.dtype
        self.params = {name: w.requires_grad_() for name, w in self.fresh(0).items()}
        levels = method.levels({name: w.numel() for name, w in self.params.items()}, settings)
        clocks = torch.Generator().manual_seed(0)  # Bernoulli clocks tick alike for all seeds
        self.timescales = Timescales(self.params.items(), levels, clocks)
        self.hooks = method.hooks(self)

    def fresh(self, number: int) -> Params:
        """Fresh weights of every seed: number 0 are those that training began with."""
        return initial(self.sizes, self.stream.seeds, number, self.dtype)

    def begin(self, task: int) -> None:
        """A task begins; of use only to methods that are told."""
        self.hooks.begun(task)

    def step(self, rows: Rows) -> Tensor:
        """One update on a batch; its score (S,) before it was learned from."""
        seen = self.hooks.extend(rows)
        outputs, hidden = forward(self.params, seen.x)
        loss = losses(outputs, seen).mean(-1)
        penalty = self.hooks.penalty(seen, outputs)
        (loss if penalty is None else loss + penalty).sum().backward()
        self.timescales.tick("update", rates=self.hooks.rates())
        self.hooks.updated([h.detach() for h in hidden])
        return score(outputs.detach()[:, : rows.y.shape[1]], rows, self.stream.spread)

    def end(self, task: int) -> None:
        """A task has ended; of use only to methods that are told."""
        self.hooks.ended(task)
        self.timescales.tick("task")

    def renew(self, weights: Params, clear: Params | None = None) -> None:
        """Put `weights` in place, and forget the rule's moments where `clear` is True."""
        stacked = {name: w[None] for name, w in weights.items()}  # a source of one user
        self.timescales.tick("renew", sources={"renewed": (stacked, None)})
        for level in self.timescales.state_dict()["levels"].values() if clear else ():
            for name, moments in level["rule"].get("state", {}).items():
                for moment in moments.values():
                    if clear and torch.is_tensor(moment) and moment.shape == clear[name].shape:
                        moment.masked_fill_(clear[name], 0.0)

    @torch.no_grad()
    def evaluate(self, task: int) -> Tensor:
        """Score (S,) on the test rows of a task; touches nothing that training reads."""
        rows = self.stream.test(task)
        outputs, _ = forward(self.timescales.weights(self.method.acts), rows.x)
        return score(outputs, rows, self.stream.spread)

    @torch.no_grad()
    def symptoms(self, task: int) -> dict[str, Tensor]:
        """Signs of lost plasticity (S,), on the test rows of a task and the live weights."""
        _, hidden = forward(self.params, self.stream.test(task).x)
        dormant = torch.stack([plasticity.dormant(h, self.settings.tau) for h in hidden])
        return {
            "dormant": dormant.mean(0),
            "erank": plasticity.erank(hidden[-1]),
            "srank": plasticity.srank(hidden[-1]),
            "weight_norm": plasticity.weight_norm(self.params),
        }


class Learned(NamedTuple):
    """What a run over a stream gave; S seeds, N tasks."""

    scores: np.ndarray  # R (S, N+1, N)
    curves: np.ndarray  # (S, N, E+1) of the current task while it is trained
    times: np.ndarray  # (E+1,) updates at which those were taken
    online: np.ndarray  # (S, N, bins) score of batches before they are learned from
    symptoms: dict[str, np.ndarray]  # (S, N) at the end of each task
    seconds: float  # of a core, learning; evaluation is not counted
    levels: dict[str, dict[str, Any]]  # what each level costs


def learn(
    stream: Stream,
    method: Method,
    settings: Settings,
    tell: Callable[[float], None] = lambda share: None,
) -> Learned:
    """Train on task after task; after each, evaluate all. `tell` hears the share that is done.

    Evaluation sees whole test sets and has no noise: the last one is a task's end value.
    """
    learner = Learner(stream, method, settings)
    tasks, updates = range(stream.tasks), stream.samples // settings.batch
    times = np.linspace(0, updates, settings.evaluations + 1).round().astype(int)
    scores, curves, online = [row(learner)], [], []
    symptoms: list[dict[str, Tensor]] = []
    seconds = 0.0
    for task in tasks:
        seconds -= time.process_time()
        learner.begin(task)
        seconds += time.process_time()
        curve, found = [learner.evaluate(task)], []
        for update in range(updates):
            rows = stream.rows(task, update * settings.batch, (update + 1) * settings.batch)
            seconds -= time.process_time()
            found.append(learner.step(rows))
            seconds += time.process_time()
            if update + 1 in times:
                curve.append(learner.evaluate(task))
                tell((task + (update + 1) / updates) / stream.tasks)
        seconds -= time.process_time()
        learner.end(task)
        seconds += time.process_time()
        online.append(binned(torch.stack(found, -1)))
        curves.append(torch.stack(curve, -1))
        symptoms.append(learner.symptoms(task))
        scores.append(row(learner))
    return Learned(
        torch.stack(scores, 1).double().numpy(),
        torch.stack(curves, 1).double().numpy(),
        times,
        torch.stack(online, 1).double().numpy(),
        {name: torch.stack([s[name] for s in symptoms], 1).numpy() for name in symptoms[0]},
        seconds,
        level_costs(learner),
    )


def row(learner: Learner) -> Tensor:
    """Scores (S, N) on all tasks."""
    return torch.stack([learner.evaluate(task) for task in range(learner.stream.tasks)], 1)


def binned(values: Tensor) -> Tensor:
    """Means (S, bins) of (S, T) over stretches of near equal length."""
    return torch.stack(
        [part.mean(-1) for part in values.tensor_split(min(BINS, values.shape[-1]), -1)], -1
    )


# ---- cost --------------------------------------------------------------------------------------
def flops(stream: Stream, method: Method, settings: Settings) -> float:
    """Operations in matrix products for each row of the stream and seed, counted by torch.

    Of one update with all that the method adds, and of what it does at a task's end, shared among
    the task's rows.
    """
    learner = Learner(stream, method, settings)
    rows = [stream.rows(0, i * settings.batch, (i + 1) * settings.batch) for i in range(2)]
    learner.begin(0)
    learner.step(rows[0])  # a memory is empty at first
    with FlopCounterMode(display=False) as update:
        learner.step(rows[1])
    with FlopCounterMode(display=False) as end:
        learner.end(0)
    a_row = update.get_total_flops() / settings.batch + end.get_total_flops() / stream.samples
    return a_row / len(stream.seeds)


def level_costs(learner: Learner) -> dict[str, dict[str, Any]]:
    """By owning level: its parameters, when it moves, and its operations for each row of a seed.

    A layer costs 2 operations a weight forward, 2 for its own gradient and, unless it is the first,
    2 for its input's. All levels take part in every backward: a slow level saves updates, and so
    bytes, no products.
    """
    seeds = len(learner.stream.seeds)
    rows = seeds * learner.settings.batch
    found: dict[str, dict[str, Any]] = {}
    for level in learner.timescales.levels:
        if level.copy is not None:
            continue
        owned = learner.timescales.weights(level.name)
        products = {n: w.numel() // seeds for n, w in owned.items() if n.endswith("weight")}
        found[level.name] = {
            "parameters": sum(w.numel() for w in owned.values()) // seeds,
            "n": level.every.n,
            "every": str(level.every),
            "flops": sum(c * (4 if n == "layers.0.weight" else 6) for n, c in products.items()),
            "bytes": moved_bytes(learner.timescales, level.name) / rows,
        }
    return found
