"""Consolidation: what thousands of visits teach the slow weights, as levels on the `session` clock.

One slow update takes in the visits of a round. Each method is a schedule: the mean of what users
learned (FedAvg, Reptile), an outer optimizer on it, replay of their interactions, distillation of
their adapted answers. All see the same users; none starts from what it should find. The optimum is
hierarchical ridge regression on every interaction so far.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.population.learners import linear
from experiments.benchmarks.population.linear import (
    LinearUsers,
    Prior,
    Session,
    excess,
    response,
)
from nested.adapt import Adapter
from nested.consolidate import Moves, Visits
from timescales import REST, Descend, Every, Level, Pull, Timescales, presets, rules

BURN = 5  # rounds before the average over rounds begins
RATE = 4 / 3  # before it: users shrink what they learn, by a little over a quarter
UNIT = "session"
OPTIMUM = "optimum"
CERTAIN = "certainty"  # the rates that are handed in at the tick
MEASURES = (  # of slow weights: squared distance from the population's mean, excess losses
    "error",
    "zero-shot",
    "after 1",
    "after 10",
    "worst decile",  # of users, zero-shot
)
KEEPS = ("taken out", "kept", "cleared")  # what happens to what was consolidated


class Size(NamedTuple):
    """How much: rounds of consolidation, users a round, users a batch, interactions a user."""

    rounds: int = 100
    users: int = 10_000
    batch: int = 10_000
    steps: int = 10


def mean_since(updates: int) -> float:
    """The rate of a plain mean over the level's updates, begun after the first few."""
    return 1.0 / max(1, updates - BURN + 1)


class Method(NamedTuple):
    """A way to consolidate: its levels, and what they learn from."""

    levels: list[Level]
    lesson: Literal["weights", "certain weights", "interactions", "answers"] = "weights"


def methods(every: Every) -> dict[str, Method]:
    """All that are compared, with slow levels on a clock of visits.

    An average over rounds is Polyak and Ruppert's: of users' weights it reaches the error of the
    optimum whatever the rate of the pull, as long as that is stable. By certainty, the rate of each
    weight makes up for how far short of the truth users stay: hierarchical ridge, one weight each.
    """
    mean, pull = presets.fedavg(every=every), presets.reptile(every=every, rate=RATE)
    average = Level("average", copy=".", every=every, flow=Pull("params", mean_since))
    descend = Level("server", match=REST, every=every, flow=Descend(rules.sgd(lr=1.0)))
    nesterov, adam = rules.sgd(0.5, 0.5, nesterov=True), rules.adamw(lr=0.1, betas=(0.5, 0.99))
    return {
        "mean": Method(mean),
        "mean, averaged": Method([*pull, average]),
        "mean, by certainty": Method(presets.reptile(every=every, rate=CERTAIN), "certain weights"),
        "reptile": Method(presets.reptile(every=every, rate=0.3)),
        "nesterov": Method(presets.fedavg(every=every, outer=nesterov)),
        "adam": Method(presets.fedavg(every=every, outer=adam)),
        "replay": Method([descend], "interactions"),
        "replay, averaged": Method([descend, average], "interactions"),
        "distil": Method([descend], "answers"),
    }


class Learned(NamedTuple):
    """A batch of visits: the interactions, and what the users know after them."""

    session: Session
    delta: Tensor  # (B, D) displacement from the slow weights
    certainty: Tensor  # (B, D) share of the way to the truth that was learned, of each weight


class Server:
    """Slow weights that one method consolidates into, from a start at zero."""

    def __init__(self, name: str, method: Method, dim: int):
        self.name, self.lesson = name, method.lesson
        self.slow = linear(torch.zeros(dim, dtype=torch.float64))
        self.timescales = Timescales(self.slow.named_parameters(), method.levels)
        self.visits = self.certainty = Visits.none(self.params)
        self.updates = 0

    @property
    def params(self) -> dict[str, Tensor]:
        """The slow weights by name."""
        return self.timescales.weights("params")

    @property
    def live(self) -> Tensor:
        """The slow weights (D,)."""
        return self.params["weight"].detach()[0]

    @property
    def weights(self) -> Tensor:
        """What new users start from (D,): the average over rounds where there is one."""
        levels = [level.name for level in self.timescales.levels]
        name = "average" if "average" in levels else "params"
        return self.timescales.weights(name)["weight"].detach()[0]

    def take(self, learned: Learned) -> bool:
        """One batch of visits; whether the slow weights moved."""
        num = len(learned.delta)
        if self.lesson in ("interactions", "answers"):
            self._loss(learned).backward()
            self.timescales.tick("update")
            return bool(self.timescales.tick(UNIT, num))
        self.visits = self.visits.add({"weight": learned.delta[:, None]})
        self.certainty = self.certainty.add({"weight": learned.certainty[:, None]})
        sources = {"user": self.visits.source(self.params)}
        moved = bool(self.timescales.tick(UNIT, num, sources=sources, rates=self._rates()))
        if moved:
            self.visits = self.certainty = Visits.none(self.params)
            self.updates += 1
        return moved

    def _rates(self) -> dict[str, dict[str, Tensor]]:
        """Of each weight: a mean over rounds, of displacements as if users had learned all."""
        certainty, _ = self.certainty.source({"weight": torch.zeros_like(self.params["weight"])})
        rate = 1.0 / max(1, self.updates - 1)
        return {CERTAIN: {name: rate / x[0] for name, x in certainty.items()}}

    def _loss(self, learned: Learned) -> Tensor:
        """Half the mean squared error on the users' interactions, or on their adapted answers."""
        xs, ys = learned.session.xs, learned.session.ys
        if self.lesson == "answers":
            adapted = self.params["weight"].detach() + learned.delta
            ys = (xs @ adapted[:, :, None]).squeeze(2)
        return 0.5 * (self.slow(xs).squeeze(2) - ys).square().mean()


class Scores:
    """What slow weights are worth to users held out, and how far they are from the optimum."""

    def __init__(self, users: LinearUsers, prior: Prior, session: Session):
        self.goal, self.theta = users.prior().centre, session.theta
        stats = (session.stats(n) for n in (1, 10))
        self.after = [response(s, prior.cov, prior.noise) for s in stats]

    def __call__(self, slow: Tensor) -> list[float]:
        """The values named in MEASURES of slow weights (D,)."""
        zero = excess(slow, self.theta)
        worst = zero.sort().values[-max(1, len(zero) // 10) :]
        adapted = [excess(slow + fast.moved(slow), self.theta).mean() for fast in self.after]
        return [float(x) for x in (excess(slow, self.goal), zero.mean(), *adapted, worst.mean())]


def consolidate(
    users: LinearUsers,
    prior: Prior,
    size: Size,
    held_out: Session,
    draw: torch.Generator,
    named: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """MEASURES (rounds + 1, 5) of the slow weights by method, all or those named; and the optimum.

    `prior` (one Gaussian) gives the covariance and noise that fast weights and optimum assume.
    Every user visits once; the optimum sees all interactions so far.
    """
    score, goal = Scores(users, prior, held_out), torch.zeros_like(prior.centre)
    rows = methods(Every(size.users, UNIT))
    servers = [Server(name, rows[name], len(goal)) for name in named or rows]
    weighted, precision = torch.zeros_like(goal), torch.zeros_like(prior.cov)
    found = {name: [score(goal)] for name in (*(s.name for s in servers), OPTIMUM)}
    for first in range(0, size.rounds * size.users, size.batch):
        session = users.session(np.arange(first, first + size.batch), size.steps, draw)
        fast = response(session.stats(), prior.cov, prior.noise)
        more = fast.equations(prior.cov)
        weighted, precision = weighted + more[0], precision + more[1]
        for server in servers:
            learned = Learned(session, fast.moved(server.live), fast.pull.diagonal(dim1=1, dim2=2))
            if server.take(learned):
                found[server.name].append(score(server.weights))
        if (first + size.batch) % size.users == 0:
            found[OPTIMUM].append(score(torch.linalg.solve(precision, weighted)))
    return {name: np.array(values) for name, values in found.items()}


class Returning:
    """Users who come every round, with what they know, and the slow weights that they teach."""

    def __init__(self, prior: Prior, num: int, keep: str):
        self.prior, self.keep = prior, keep
        self.server = Server("mean", methods(Every(num, UNIT))["mean"], len(prior.cov))
        # holds displacements and rebases them; what users learn is exact, by least squares
        share = 1.0 if keep == "kept" else 0.0
        self.adapter = Adapter(self.server.slow, ".", lambda params, row: row, lr=1.0, keep=share)
        self.moves = Moves(self.server.params)
        self.state = self.adapter.initial(num)
        self.start = torch.linalg.inv(prior.cov).expand(num, -1, -1)
        self.precision = self.start

    @property
    def weights(self) -> Tensor:
        """Each user's weights (B, D)."""
        return self.adapter.weights(self.state)["weight"].detach()[:, 0]

    def visit(self, session: Session) -> None:
        """Everyone learns from a session, by recursive least squares; the slow weights follow."""
        stats, variance = session.stats(), self.prior.noise.square()
        self.precision = self.precision + stats.gram / variance
        wrong = (stats.moment - (stats.gram @ self.weights[:, :, None]).squeeze(2)) / variance
        learned = torch.linalg.solve(self.precision, wrong)
        delta = self.state.delta["weight"] + learned[:, None]
        self.server.take(Learned(session, delta[:, 0], torch.ones_like(learned)))
        generation = torch.full((len(delta),), self.moves.generation)
        self.moves.advance(self.server.params)
        state = self.state._replace(delta={"weight": delta})
        self.state = self.adapter.rebase(state, self.moves.since(generation))
        if self.keep == "cleared":
            self.state, self.precision = self.adapter.initial(len(delta)), self.start


def returning(
    users: LinearUsers, prior: Prior, size: Size, draw: torch.Generator
) -> dict[str, np.ndarray]:
    """Mean excess loss (rounds,) of users at the start of each visit after the first.

    What was consolidated is taken out of their displacements, or kept and so counts twice, or the
    displacements are cleared.
    """
    ids = np.arange(size.batch)
    groups = [Returning(prior, size.batch, keep) for keep in KEEPS]
    found: dict[str, list[float]] = {keep: [] for keep in KEEPS}
    for _ in range(size.rounds):
        session = users.session(ids, size.steps, draw)
        for group in groups:
            group.visit(session)
            found[group.keep].append(float(excess(group.weights, session.theta).mean()))
    return {keep: np.array(values) for keep, values in found.items()}
