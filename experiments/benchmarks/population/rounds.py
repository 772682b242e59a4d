"""What a run with users has come to, round by round: Z, adaptation, retention, consolidation.

A round of learning ends in a checkpoint. Held-out users then play from fast weights as new users
have them (Z, nothing written), and as they are after n interactions, their own or somebody else's.
Consolidation is measured with all other slow weights frozen: users of a cluster that nobody has met
visit, every slow update takes the mean of what they learned into the start, and other users of that
cluster play from it. Scores are returns over the cap.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import Dreamer
from experiments.benchmarks.population.play import Play, displaced, returns, somebody_else, visit
from experiments.build import build_timescales
from experiments.config import Config
from experiments.envs.population import SPLITS, Population
from experiments.envs.userpop import CAP, traits
from experiments.evaluate import load_run
from experiments.record.metrics import read
from experiments.visits import SOURCE, starts
from nested import Visits
from worldmodel.rssm import MemoryUse

Arrays = dict[str, np.ndarray]
OLD, NEW = 800_000, 900_000  # the first ids of users who come in the first round, and of held-out


class Size(NamedTuple):
    """How much is measured."""

    rounds: int  # of learning
    users: int  # in each measurement
    marks: tuple[int, ...]  # interactions, from 0
    clusters: int  # that consolidation meets, one after another
    updates: int  # of the start, in each
    visitors: int  # between two of them
    interactions: int  # of each visitor


def measure(path: Path, size: Size, seed: int) -> Arrays:
    """Everything about one run: names -> arrays whose last axis is often users (U)."""
    config, agent = load_run(path)
    moments = [config.frames * i // size.rounds for i in range(size.rounds + 1)]
    if config.model.memory.kind == "none":
        rounds = [without(*load_run(path, step), size, seed) for step in moments]
        return stacked(rounds) | surprises(path, moments)
    stored: Any = None
    rounds = list[Arrays]()
    for i, step in enumerate(moments):
        config, agent = load_run(path, step)
        stored = visit(config, agent, old(size), size.marks, seed).states if i == 1 else stored
        rounds.append(learned(config, agent, size, seed, stored and stored[size.marks[-1]]))
    found = stacked(rounds) | surprises(path, moments)
    cohorts = [consolidated(config, agent, size, seed, i) for i in range(size.clusters)]
    return found | {f"cohort/{name}": x for name, x in stacked(cohorts).items()}


def new(size: Size) -> np.ndarray:
    """Held-out users of clusters seen in training."""
    return np.arange(NEW, NEW + size.users)


def old(size: Size) -> np.ndarray:
    """Users who come in the first round, and never again."""
    return np.arange(OLD, OLD + size.users)


def alike(seed: int, size: Size) -> np.ndarray:
    """Whether `new` users (U,) move by actions of the same sign as whoever they are swapped with.

    In the population of a seed, which is the one that its cells have.
    """
    negative = traits(Population(seed=seed).contexts(new(size))).force < 0
    return negative == np.roll(negative, 1)


def without(config: Config, agent: Dreamer, size: Size, seed: int) -> Arrays:
    """An agent that has no fast weights."""
    plays = [Play(users, None, "off") for users in (new(size), old(size))]
    zero, back = returns(config, agent, plays, seed) / cap(config)
    return {"zero": zero, "old/without": back}


def learned(config: Config, agent: Dreamer, size: Size, seed: int, stored: Any) -> Arrays:
    """One round: `stored` are the fast weights of the old users after the first one."""
    users, marks = new(size), size.marks
    found = visit(config, agent, users, marks, seed)
    others = {n: somebody_else(state) for n, state in found.states.items()}
    read: MemoryUse = "read"
    own = [Play(users, found.states[n], read) for n in marks]
    swapped = [Play(users, others[n], read) for n in marks]
    ends = [found.states[0], found.states[marks[-1]], others[marks[-1]]]
    back = [Play(users, state, "write") for state in ends]
    past = [Play(old(size), state, read) for state in (None, stored)]
    scores = returns(config, agent, [*own, *swapped, *back, *past], seed + 1) / cap(config)
    m = len(marks)
    named = ("fresh", "back/own", "back/other", "old/without", "old/with")
    rest = dict(zip(named, scores[2 * m :], strict=True))
    head = {"zero": scores[0], "own": scores[:m], "other": scores[m : 2 * m]}
    return head | rest | {"surprise/memory": found.surprise[: marks[-1]]}


def consolidated(config: Config, agent: Dreamer, size: Size, seed: int, which: int) -> Arrays:
    """Slow updates by visitors of one unknown cluster; `stray`: by visitors of known ones."""
    here = cohort(config, which, size.users + size.updates * size.visitors)
    users, visitors = here[: size.users], here[size.users :]
    known = np.arange(NEW + size.users, NEW + len(here))
    start = {name: w[0].clone() for name, w in starts(agent.initial(1).fast).items()}
    past = visit(config, agent, old(size), size.marks, seed).states[size.marks[-1]]
    found: Arrays = {}
    for name, teachers in (("own", visitors), ("stray", known)):
        zero, moved = [scores(config, agent, users, seed, past)], list[float]()
        areas = [curve(config, agent, users, size, seed)]
        timescales = build_timescales(config, agent)
        live = timescales.weights("params")
        slow = {key: live[key] for key in start}
        for group in np.split(teachers, size.updates):
            taught = visit(config, agent, group, (0, size.interactions), seed).states
            delta = displaced(agent, taught[size.interactions], slow)
            visits = Visits.none(slow).add(delta)
            timescales.tick("session", len(group), {SOURCE: visits.source(slow)})
            moved.append(norm(visits.total) / float(visits.weight))
            zero.append(scores(config, agent, users, seed, past))
        areas.append(curve(config, agent, users, size, seed))
        each = zip(("zero", "fresh", "old/without", "old/with"), np.stack(zero, 1), strict=True)
        found |= {f"{name}/{key}": x for key, x in each}
        found |= {f"{name}/curve": np.stack(areas), f"{name}/moved": np.array(moved)}
        restore(slow, start)
    return found


def scores(config: Config, agent: Dreamer, users: np.ndarray, seed: int, past: Any) -> np.ndarray:
    """Of users as new ones, reading and writing; of old users without and with their weights."""
    before = np.arange(OLD, OLD + len(users))
    plays = [
        Play(users, None, "read"),
        Play(users, None, "write"),
        Play(before, None, "read"),
        Play(before, past, "read"),
    ]
    return returns(config, agent, plays, seed + 1) / cap(config)


def curve(config: Config, agent: Dreamer, users: np.ndarray, size: Size, seed: int) -> np.ndarray:
    """Scores (marks, U) after so many interactions."""
    states = visit(config, agent, users, size.marks, seed).states
    plays = [Play(users, states[n], "read") for n in size.marks]
    return returns(config, agent, plays, seed + 1) / cap(config)


def cohort(config: Config, which: int, count: int) -> np.ndarray:
    """Ids (count,) of users of one of the clusters that training never saw."""
    population = Population(seed=config.env.kwargs.get("population", 0))
    ids = np.asarray(SPLITS["clusters"])
    clusters = population.cluster(ids)
    return ids[clusters == population.clusters - 1 - which % population.held][:count]


@torch.no_grad()
def restore(slow: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """Put the start back."""
    for name, value in start.items():
        slow[name].copy_(value)


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean length."""
    return float(sum(x.square().sum() for x in tree.values())) ** 0.5


def surprises(path: Path, moments: Sequence[int]) -> Arrays:
    """The world model's surprise in training, by round: its KL, and its error of observations."""
    rows = [row for row in read(path / "metrics.jsonl") if "loss/dyn" in row.metrics]
    found: Arrays = {}
    for name in ("dyn", "state"):
        values = [
            np.mean([r.metrics[f"loss/{name}"] for r in rows if low < r.step <= high])
            for low, high in pairwise(moments)
        ]
        found[f"surprise/{name}"] = np.array(values)
    return found


def cap(config: Config) -> float:
    """The highest return of an episode: a step is worth 1."""
    return float(config.env.time_limit or CAP)


def stacked(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of all parts, the parts first."""
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
