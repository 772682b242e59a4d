"""Metrics of continual learning, each with its convention in its name.

`scores` is R, (..., N+1, N): row i holds the score on each of N tasks after training on task i,
row 0 is the untrained agent; leading axes, such as seeds, pass through. Reference implementations
disagree (docstrings say who does what), so nothing here is clipped, dropped where it is zero, or
divided by the learner's own score unless the name says so. Sources: Continual World (2105.10919),
CORA (2110.10067), COOM (NeurIPS 2023), Continual-Dreamer (2211.15944), GEM (1706.08840).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

LEAST = 1e-2  # least denominator of a forward transfer

Norm = Literal["ref", "kessler", "none"]
NORMS: tuple[Norm, ...] = ("ref", "kessler", "none")


# ---- of R --------------------------------------------------------------------------------------
def ap_final(scores: np.ndarray) -> np.ndarray:
    """AP_final: mean over all tasks after the last one (P of Continual World)."""
    return _checked(scores)[..., -1, :].mean(-1)


def ap_any(scores: np.ndarray) -> np.ndarray:
    """AP_any: mean over time of the mean over the tasks seen so far (P of COOM, anytime).

    A score of exactly 0 counts as 0; COOM's script leaves it out of the mean.
    """
    trained = _checked(scores)[..., 1:, :]
    tasks = trained.shape[-1]
    seen = np.tril(np.ones((tasks, tasks)))
    return ((trained * seen).sum(-1) / np.arange(1, tasks + 1)).mean(-1)


def ala(scores: np.ndarray) -> np.ndarray:
    """ALA: mean score on each task just after it was learned; plasticity, seen in the score."""
    return _own(scores).mean(-1)


def forgetting(scores: np.ndarray, over: Literal["N-1", "N"] = "N-1") -> np.ndarray:
    """F: mean fall of a task's score from its own end to the very end.

    `over="N-1"` leaves the last task out, which cannot be forgotten yet (COOM, Avalanche);
    `over="N"` counts it with its fall of zero (Continual World, Continual-Dreamer).
    """
    if over not in ("N-1", "N"):
        raise ValueError(f"forgetting: over={over!r} is no denominator; use 'N-1' or 'N'")
    fall = (_own(scores) - np.asarray(scores)[..., -1, :])[..., :-1]
    if over == "N-1" and not fall.shape[-1]:
        raise ValueError("forgetting over N-1 tasks: one task alone has no forgetting")
    return fall.sum(-1) / (fall.shape[-1] + (over == "N"))


def forgetting_max(scores: np.ndarray) -> np.ndarray:
    """F_max: fall from the best score after any task before the last (Chaudhry et al. 1801.10112).

    The untrained agent's row is not among those that the best is taken of.
    """
    trained = _checked(scores, least=2)[..., 1:, :-1]
    return (trained[..., :-1, :].max(-2) - trained[..., -1, :]).mean(-1)


def bwt(scores: np.ndarray) -> np.ndarray:
    """BWT: backward transfer, -F over N-1 tasks (GEM)."""
    return -forgetting(scores)


def forgetting_isolated(scores: np.ndarray) -> np.ndarray:
    """F_iso (..., N, N): entry i, j is what training on task i took from task j, learned before.

    CORA's isolated forgetting, in units of the score; NaN where i <= j.
    """
    change = -np.diff(_checked(scores), axis=-2)
    return np.where(np.tri(change.shape[-1], k=-1, dtype=bool), change, np.nan)


def transfer_isolated(scores: np.ndarray) -> np.ndarray:
    """Z_iso (..., N, N): entry i, j is what training on task i gave to task j, not yet learned.

    CORA's zero-shot forward transfer; NaN where i >= j.
    """
    change = np.diff(_checked(scores), axis=-2)
    return np.where(np.tri(change.shape[-1], k=-1, dtype=bool).T, change, np.nan)


def fwt_zs(scores: np.ndarray) -> np.ndarray:
    """FWT_zs: mean gain on a task, over the untrained agent, before training on it (zero-shot)."""
    scores = _checked(scores, least=2)
    before = np.diagonal(scores[..., :-1, :], axis1=-2, axis2=-1)
    return (before - scores[..., 0, :])[..., 1:].mean(-1)


def of_scores(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric that R alone gives, by name, (...,) each; F needs two tasks.

    None of R (..., 1, 0): a stream without tasks.
    """
    if not np.shape(scores)[-1]:
        return {}
    several = _checked(scores).shape[-1] > 1
    return {name: metric(scores) for name, metric in OF_SCORES.items() if several or name in OF_ONE}


def normalise(raw: np.ndarray, rand: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """(raw - rand) / (ref - rand), by task: 0 a random agent, 1 a fresh one with the same budget.

    Neither end is clipped: below random is negative. Continual-Dreamer's script sets it to 0.
    """
    span = np.asarray(ref, np.float64) - rand
    if (np.abs(span) < LEAST).any():
        raise ValueError(
            f"normalise: reference {ref} and random {rand} differ by less than {LEAST} "
            "somewhere; such a task tells nothing: train the reference longer or leave it out"
        )
    return (raw - rand) / span


# ---- of curves ---------------------------------------------------------------------------------
def auc(times: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under (..., T) scores on an evaluation grid (T,), by trapezoids, over its length.

    In units of the score: a constant score is its own area.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2 or (np.diff(times) <= 0).any():
        raise ValueError(f"auc: times {times} is no rising grid of two points or more")
    scores = np.asarray(scores, np.float64)
    middles = (scores[..., 1:] + scores[..., :-1]) / 2
    return (middles * np.diff(times)).sum(-1) / (times[-1] - times[0])


def end_value(scores: np.ndarray, last: int = 3) -> np.ndarray:
    """Mean of the last evaluations (..., T) of a task; one alone where evaluation has no noise."""
    if not 1 <= last <= np.shape(scores)[-1]:
        raise ValueError(f"end_value: {last} of {np.shape(scores)[-1]} evaluations")
    return np.asarray(scores)[..., -last:].mean(-1)


class Transfer(NamedTuple):
    """Forward transfer: the mean over tasks, each task's, and whose denominator was raised."""

    value: np.ndarray  # (...,)
    by_task: np.ndarray  # (..., N)
    clipped: np.ndarray  # (..., N) bool: the denominator was below LEAST and was set to it


def forward_transfer(own: np.ndarray, ref: np.ndarray, norm: Norm) -> Transfer:
    """How much faster tasks are learned than by fresh agents, from areas under curves (..., N).

    "ref": (own - ref) / (1 - ref), Continual World and COOM. "kessler": the same over (1 - own),
    as Continual-Dreamer's script has it; explodes where the learner is perfect. "none": own - ref.
    The best score is taken to be 1.
    """
    own, ref = np.asarray(own, np.float64), np.asarray(ref, np.float64)
    match norm:
        case "ref":
            room = 1.0 - ref
        case "kessler":
            room = 1.0 - own
        case "none":
            room = np.ones_like(ref)
        case _:
            raise ValueError(f"forward_transfer: norm={norm!r}; use 'ref', 'kessler' or 'none'")
    room = np.broadcast_to(room, np.broadcast_shapes(own.shape, ref.shape))
    by_task = (own - ref) / np.maximum(room, LEAST)
    return Transfer(by_task.mean(-1), by_task, room < LEAST)


# ---- of streams without tasks, and of adaptation -----------------------------------------------
def online_return(rewards: np.ndarray) -> np.ndarray:
    """Mean reward over every step ever taken, (..., T); the one metric that needs no tasks.

    Of a supervised stream: the mean score of each batch before it is learned from.
    """
    return np.asarray(rewards, np.float64).mean(-1)


def dynamic_regret(
    rewards: np.ndarray, best: np.ndarray, lengths: np.ndarray | float = 1.0
) -> np.ndarray:
    """Regret (..., T) after each step: sum of `best - reward`.

    `best` is the mean reward of the best agent in the context of each step, known or a fresh
    reference: an array that broadcasts to the rewards. Where a step stands for a stretch, as a
    phase does, `lengths` says how long each is.
    """
    return np.cumsum((np.asarray(best, np.float64) - rewards) * lengths, axis=-1)


def savings(first: np.ndarray, again: np.ndarray) -> np.ndarray:
    """How much more area a task has when it comes back than when it was new, (...,) each.

    Areas as of `auc`, equal lengths. Ebbinghaus' savings: what is left where a score shows nothing.
    """
    return np.asarray(again, np.float64) - first


def time_to(times: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
    """Time from the first of (T,) to the first of (..., T) scores at `least` or above.

    Where none is, the whole length: a lower bound, as whoever reports it should say.
    """
    times, reached = np.asarray(times, np.float64), np.asarray(scores) >= least
    return np.where(reached.any(-1), times[reached.argmax(-1)], times[-1]) - times[0]


def adapt_area(scores: np.ndarray, n: int) -> np.ndarray:
    """Mean of the first n scores (..., T) in a new context."""
    if not 1 <= n <= np.shape(scores)[-1]:
        raise ValueError(f"adapt_area: n={n} of {np.shape(scores)[-1]} scores")
    return np.asarray(scores, np.float64)[..., :n].mean(-1)


def adaptation(
    frozen: np.ndarray, fast: np.ndarray, full: np.ndarray, n: int
) -> dict[str, np.ndarray]:
    """Areas in a new context of an agent that does not learn, whose fast weights do, that does all.

    "fast - frozen" is what inference alone learns, "full - fast" what the slow updates add.
    """
    areas = {"frozen": frozen, "fast": fast, "full": full}
    found = {name: adapt_area(scores, n) for name, scores in areas.items()}
    gains = {
        "fast - frozen": found["fast"] - found["frozen"],
        "full - fast": found["full"] - found["fast"],
    }
    return found | gains


def consolidation_gain(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Gain in zero-shot score of *new* users (..., U) from a consolidation, mean over users."""
    return _gain(before, after)


def retention(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Change of the score of *old* users (..., U) over a consolidation; negative: forgotten."""
    return _gain(before, after)


def amortised(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Change of `adapt_area` over a consolidation (..., U): how much faster users now adapt."""
    return _gain(before, after)


# ---- parts -------------------------------------------------------------------------------------
def _gain(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (np.asarray(after, np.float64) - before).mean(-1)


def _own(scores: np.ndarray) -> np.ndarray:
    """R[j, j] (..., N): each task's score just after it was learned."""
    return np.diagonal(_checked(scores)[..., 1:, :], axis1=-2, axis2=-1)


def _checked(scores: np.ndarray, least: int = 1) -> np.ndarray:
    """R itself, refused where its shape or an entry cannot be meant."""
    scores = np.asarray(scores)
    if scores.ndim < 2 or scores.shape[-2] != scores.shape[-1] + 1:
        raise ValueError(
            f"R has shape {scores.shape}; (..., N+1, N) is needed, row 0 is the untrained agent"
        )
    if scores.shape[-1] < least:
        raise ValueError(f"R has {scores.shape[-1]} task; this metric needs {least} or more")
    if not np.isfinite(scores).all():
        raise ValueError("R holds entries that are not finite: every task is evaluated every time")
    return scores


OF_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "AP_final": ap_final,
    "AP_any": ap_any,
    "ALA": ala,
    "F": forgetting,
    "F_over_N": lambda scores: forgetting(scores, "N"),
    "F_max": forgetting_max,
    "BWT": bwt,
    "F_iso": lambda scores: np.nanmean(forgetting_isolated(scores), (-2, -1)),
    "FWT_zs": fwt_zs,
}
OF_ONE = ("AP_final", "AP_any", "ALA", "F_over_N")
