"""Published methods as schedules: each function returns a list of levels, fastest first.

Every one of them equals its textbook loop (tests/timescales/test_methods.py). What a paper calls a
penalty is a decoupled decay here: the same thing under SGD, not under Adam.
"""

from collections.abc import Callable, Sequence

from timescales import rules
from timescales.clock import Every
from timescales.level import (
    REST,
    SQUARES,
    Descend,
    Level,
    Pull,
    Rate,
    Relax,
    Reset,
    Rule,
    Weighted,
)
from timescales.split import Sizes, part

ALL = "."  # as a `copy`: every parameter


def names(k: int) -> list[str]:
    """Names of k levels: fast, mid, slow; one is "all", more than three number the middle."""
    if k == 1:
        return ["all"]
    middle = ["mid"] if k == 3 else [f"mid{i}" for i in range(1, k - 1)]
    return ["fast", *middle, "slow"]


def plain(rule: Rule) -> list[Level]:
    """One level: every parameter, every update; a plain torch loop, bit for bit."""
    return [Level("all", match=REST, flow=Descend(rule))]


def geometric(
    groups: Sequence[str] | int,
    rule: Callable[..., Rule] = rules.adamw,
    lr: float = 3e-4,
    base: int = 4,
    lr_power: float = 0.5,
    parameters: Sizes = (),
    by: str = "depth",
) -> list[Level]:
    """Periods 1, base, base**2 ...; a level of period n learns with `lr * n**lr_power`.

    `groups` are regexes from fastest to slowest, or k: then `parameters` (names, or sizes by name)
    are split `by` depth or block. `rule` is a factory such as `rules.adamw` that takes lr.
    """
    if isinstance(groups, int):
        groups = [part(parameters, by, i, groups) for i in range(groups)]
    return [
        Level(
            name,
            match=group,
            every=Every(base**i),
            flow=Descend(rule(lr=lr * (base**i) ** lr_power)),
        )
        for i, (name, group) in enumerate(zip(names(len(groups)), groups, strict=True))
    ]


def cms(
    groups: Sequence[str], rule: Rule, periods: Sequence[int] = (1, 4, 16), reduce: str = "sum"
) -> list[Level]:
    """Continuum memory system: given periods, gradients summed over a window as printed.

    Under SGD on the sum a slow level travels as far for each sample as a fast one; "mean" makes it
    slower (Behrouz et al. 2025, arXiv 2512.24695).
    """
    return [
        Level(
            name,
            match=group,
            every=Every(n),
            flow=Descend(rule, "sum" if reduce == "sum" else "mean"),
        )
        for name, group, n in zip(names(len(groups)), groups, periods, strict=True)
    ]


def lookahead(rule: Rule, n: int = 5, rate: float = 0.5) -> list[Level]:
    """k steps forward, one step back (Zhang et al. 2019, arXiv 1907.08610)."""
    every = Every(n)
    return [
        Level("fast", match=REST, flow=Descend(rule), reset=(Reset("slow", every),)),
        Level("slow", copy=ALL, every=every, flow=Pull("params", rate)),
    ]


def diloco(rule: Rule, n: int = 50, outer: Rule | None = None) -> list[Level]:
    """Nesterov on what n inner steps did (Douillard et al. 2023, arXiv 2311.08105); one worker.

    With one worker this is SNOO (arXiv 2510.15830); more are handed in as a source.
    """
    every = Every(n)
    outer = outer if outer is not None else rules.sgd(lr=0.7, momentum=0.9, nesterov=True)
    return [
        Level("inner", match=REST, flow=Descend(rule), reset=(Reset("outer", every),)),
        Level("outer", copy=ALL, every=every, flow=Pull("params", outer=outer)),
    ]


def cls_er(
    rule: Rule, plastic_p: float = 0.9, stable_p: float = 0.7, rate: float = 1e-3
) -> list[Level]:
    """Two weight averages updated by chance (Arani et al. 2022, arXiv 2201.12604).

    Their consistency loss reads `timescales.weights("stable")`. The rate starts at 1/2 and falls to
    `rate`, as the authors warm it up, by the level's own updates.
    """

    def warm(updates: int) -> float:
        return max(1.0 / (updates + 2), rate)

    return [
        Level("work", match=REST, flow=Descend(rule)),
        Level("plastic", copy=ALL, every=Every(p=plastic_p), flow=Pull("params", warm)),
        Level("stable", copy=ALL, every=Every(p=stable_p), flow=Pull("params", warm)),
    ]


def hare_tortoise(rule: Rule, n: int = 1000, rate: float = 1e-3) -> list[Level]:
    """A slow average to which the fast weights return every n updates (arXiv 2406.02596)."""
    return [
        Level("hare", match=REST, flow=Descend(rule), reset=(Reset("tortoise", Every(n)),)),
        Level("tortoise", copy=ALL, flow=Pull("params", rate)),
    ]


def benna_fusi(rule: Rule, depth: int = 3, rate: float = 0.1) -> list[Level]:
    """A chain of beakers: beaker k holds 2**(k-1) and leaks to the next at `rate * 2**(1-k)`.

    `C_k du_k = g_(k-1) (u_(k-1) - u_k) + g_k (u_(k+1) - u_k)` (Benna & Fusi 2016; as in Kaplanis et
    al. 2018), each beaker reading the faster ones as they have just become. The first beaker is the
    weights.
    """
    levels: list[Level] = []
    for k in range(1, depth + 1):
        capacity, pipe = 2.0 ** (k - 1), rate * 2.0 ** (1 - k)
        relax = (Relax(f"u{k + 1}", pipe / capacity),) if k < depth else ()
        if k == 1:
            levels.append(Level("u1", match=REST, flow=Descend(rule), relax=relax))
        else:
            source = "params" if k == 2 else f"u{k - 1}"
            flow = Pull(source, 2.0 * pipe / capacity)  # the pipe before is twice as wide
            levels.append(Level(f"u{k}", copy=ALL, flow=flow, relax=relax))
    return levels


def l2_init(rule: Rule, rate: Rate = 1e-4) -> list[Level]:
    """Decay toward the initial weights (Kumar et al. 2023, arXiv 2308.11958).

    Equal to the penalty `lam / 2 |w - w0|^2` under SGD with `rate = lr * lam`.
    """
    return [Level("all", match=REST, flow=Descend(rule), relax=(Relax("init", rate),))]


def ewc(rule: Rule, fisher: str = "fisher") -> list[Level]:
    """Decay toward the weights at the end of the last task, by importance (arXiv 1612.00796).

    Hand the rates in: `tick("update", rates={"fisher": {name: tensor}})`, zeros during the first
    task, and `tick("task")` at a task's end. Equal to the penalty `lam / 2 F (w - w*)^2` under SGD
    with rates `lr * lam * F`.
    """
    return [
        Level("all", match=REST, flow=Descend(rule), relax=(Relax("anchor", fisher),)),
        Level("anchor", copy=ALL, every=Every(unit="task"), flow=Pull("params")),
    ]


def online_ewc(
    rule: Rule, strength: float, n: int = 500, decay: float = 0.95, anchored: str = ALL
) -> list[Level]:
    """Online EWC where no one tells when a task ends: every n updates count as one.

    A window's end is the next one's anchor, and `fisher' = decay fisher + F` with F the window's
    mean squared gradients over their own mean (Schwarz et al. 2018, arXiv 1805.06370, section 4,
    after Kirkpatrick et al. 2017). Under SGD of rate lr the parameters that match `anchored` take
    the step of `lam / 2 fisher (w - anchor)^2`, with `strength = lr lam`, as `Weighted` says.

    Other than published: squared are the gradients of whole batches along the window, not those of
    single examples at its end; windows stand for tasks; and the penalty's step is implicit and
    decoupled from the rule. The level `fisher` holds `1 - decay` times the sum above, as a running
    mean.
    """
    by = Weighted("fisher", strength / (1.0 - decay))
    free = [] if anchored == ALL else [Level("free", match=REST, flow=Descend(rule))]
    every = Every(n)
    return [
        Level("anchored", match=anchored, flow=Descend(rule), relax=(Relax("anchor", by),)),
        *free,
        Level("fisher", copy=anchored, every=every, flow=Pull(SQUARES, 1 - decay), start="zero"),
        Level("anchor", copy=anchored, every=every, flow=Pull("params")),
    ]


def fedavg(
    source: str = "user", every: Every | None = None, outer: Rule | None = None
) -> list[Level]:
    """The weights become the mean of what users learned, or an outer rule steps toward it.

    Hand it in: `tick("session", sources={"user": ({name: (N, ...)}, samples (N,))})` (McMahan et
    al. 2017, arXiv 1602.05629; with `outer`, Reddi et al. 2021, arXiv 2003.00295).
    """
    clock = every if every is not None else Every(unit="session")
    return [Level("server", match=REST, every=clock, flow=Pull(source, outer=outer))]


def reptile(source: str = "user", every: Every | None = None, rate: Rate = 0.1) -> list[Level]:
    """The weights move part of the way to the mean of adapted ones (arXiv 1803.02999)."""
    clock = every if every is not None else Every(unit="task")
    return [Level("meta", match=REST, every=clock, flow=Pull(source, rate))]
