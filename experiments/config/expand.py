"""From a kind of `timescales:` to named levels, fastest first.

Each function takes the validated kind and gives a mapping name -> level as plain values, the same
that a user would write under `kind: levels`.
"""

from collections.abc import Callable
from typing import Any

from . import levels as kinds
from .errors import ConfigError
from .levels import REST, Levels, TimescalesConfig
from .tree import Tree, merge, unknown_level

# Parts of the agent from fastest to slowest: what acts, what it is told, what it sees.
_PARTS = (r"actor|critic", r"world\.(reward|continues)", r"world\.decoder", r"world\.dynamics",
          r"world\.encoder")  # fmt: skip
_ANCHORED = r"^(world|actor)\."  # what EWC protects: values are of the present policy
# How k levels share those five parts.
_FOLDS = {2: (2, 3), 3: (2, 2, 1), 4: (2, 1, 1, 1), 5: (1, 1, 1, 1, 1)}


def names(k: int) -> list[str]:
    """fast, mid, slow; one level is `all`, more than three number the middle."""
    if k == 1:
        return ["all"]
    middle = ["mid"] if k == 3 else [f"mid{i}" for i in range(1, k - 1)]
    return ["fast", *middle, "slow"]


def matches(k: int, by: str) -> list[Any]:
    """What each of k levels owns, fastest first."""
    if k == 1:
        return [REST]
    if by != "module":
        return [{"by": by, "part": i, "of": k} for i in range(k)]
    if k not in _FOLDS:
        raise ConfigError(
            "timescales.k", k, "an agent splits by module into 5 levels at most",
            "use k <= 5, or timescales.by=depth or timescales.by=block",
        )  # fmt: skip
    parts, found = list(_PARTS), []
    for size in _FOLDS[k]:
        taken, parts = parts[:size], parts[size:]
        found.append(f"^({'|'.join(taken)})\\.")
    return found


def _descend(rule: Tree, reduce: str = "mean") -> Tree:
    return {"kind": "descend", "rule": rule, "reduce": reduce}


def _pull(source: str, rate: float = 1.0, outer: Tree | None = None) -> Tree:
    return {"kind": "pull", "source": source, "rate": rate, "outer": outer}


def _rule(kind: Any) -> Tree:
    return kind.rule.model_dump(mode="json")


def _plain(kind: kinds.Plain) -> Tree:
    return {"all": {"match": REST, "flow": _descend(_rule(kind))}}


def _split(periods: list[int], by: str, flows: list[Tree]) -> Tree:
    k = len(periods)
    return {
        name: {"match": match, "every": {"n": n}, "flow": flow}
        for name, match, n, flow in zip(names(k), matches(k, by), periods, flows, strict=True)
    }


def _geometric(kind: kinds.Geometric) -> Tree:
    periods = [kind.base**i for i in range(kind.k)]
    rule = _rule(kind)
    flows = [_descend({**rule, "lr": rule["lr"] * n**kind.lr_power}) for n in periods]
    return _split(periods, kind.by, flows)


def _cms(kind: kinds.Cms) -> Tree:
    flows = [_descend(_rule(kind), kind.reduce) for _ in kind.periods]
    return _split(list(kind.periods), kind.by, flows)


def _lookahead(kind: kinds.Lookahead) -> Tree:
    every = {"n": kind.n}
    reset = [{"to": "slow", "every": every}]
    return {
        "fast": {"match": REST, "flow": _descend(_rule(kind)), "reset": reset},
        "slow": {"copy": ".", "every": every, "flow": _pull("params", kind.rate)},
    }


def _diloco(kind: kinds.DiLoCo) -> Tree:
    every = {"n": kind.n}
    outer = _pull("params", outer=kind.outer.model_dump(mode="json"))
    reset = [{"to": "outer", "every": every}]
    return {
        "inner": {"match": REST, "flow": _descend(_rule(kind)), "reset": reset},
        "outer": {"copy": ".", "every": every, "flow": outer},
    }


def _cls_er(kind: kinds.ClsEr) -> Tree:
    pull = _pull("params", kind.rate)
    return {
        "work": {"match": REST, "flow": _descend(_rule(kind))},
        "plastic": {"copy": ".", "every": {"p": kind.plastic_p}, "flow": pull},
        "stable": {"copy": ".", "every": {"p": kind.stable_p}, "flow": pull},
    }


def _hare_tortoise(kind: kinds.HareTortoise) -> Tree:
    reset = [{"to": "tortoise", "every": {"n": kind.n}}]
    return {
        "hare": {"match": REST, "flow": _descend(_rule(kind)), "reset": reset},
        "tortoise": {"copy": ".", "flow": _pull("params", kind.rate)},
    }


def _benna_fusi(kind: kinds.BennaFusi) -> Tree:
    """Beaker i (from 0) has size 2**i and pipe 2**-i: rates fall by 4 from one to the next."""
    found: Tree = {}
    for i in range(kind.depth):
        level: Tree = {"relax": []}
        if i + 1 < kind.depth:
            level["relax"] = [{"to": f"u{i + 2}", "rate": kind.rate * 4.0**-i}]
        if i == 0:
            level |= {"match": REST, "flow": _descend(_rule(kind))}
        else:
            source = "params" if i == 1 else f"u{i}"
            level |= {"copy": ".", "flow": _pull(source, kind.rate * 2.0 ** (1 - 2 * i))}
        found[f"u{i + 1}"] = level
    return found


def _l2_init(kind: kinds.L2Init) -> Tree:
    relax = [{"to": "init", "rate": kind.rate}]
    return {"all": {"match": REST, "flow": _descend(_rule(kind)), "relax": relax}}


def _ewc(kind: kinds.Ewc) -> Tree:
    """As `timescales.presets.online_ewc`."""
    rule, every, shadow = _rule(kind), {"n": kind.n}, {"copy": _ANCHORED}
    rate = {"by": "fisher", "times": rule["lr"] * kind.weight / (1 - kind.decay)}
    relax = [{"to": "anchor", "rate": rate}]
    pull = _pull("squares", 1 - kind.decay)
    return {
        "anchored": {"match": _ANCHORED, "flow": _descend(rule), "relax": relax},
        "critic": {"match": REST, "flow": _descend(rule)},
        "fisher": {**shadow, "every": every, "flow": pull, "start": "zero"},
        "anchor": {**shadow, "every": every, "flow": _pull("params")},
    }


def _levels(kind: Levels) -> Tree:
    """The levels as given, with the shared rule put into those that descend without one."""
    found = {k: level.model_dump(mode="json", by_alias=True) for k, level in kind.levels.items()}
    flows = [level["flow"] for level in found.values() if level["flow"]]
    bare = [flow for flow in flows if flow["kind"] == "descend" and not flow["rule"]]
    if kind.rule is not None and not bare:
        raise ConfigError(
            "timescales.rule",
            kind.rule.model_dump(mode="json"),
            "every level names its own rule; none takes this",
            f"set timescales.levels.{next(iter(found))}.flow.rule instead",
        )
    for flow in bare:
        flow["rule"] = (kind.rule or kinds.AdamW()).model_dump(mode="json")
    return found


_EXPAND: dict[str, Callable[[Any], Tree]] = {
    "plain": _plain,
    "geometric": _geometric,
    "levels": _levels,
    "cms": _cms,
    "lookahead": _lookahead,
    "diloco": _diloco,
    "cls_er": _cls_er,
    "hare_tortoise": _hare_tortoise,
    "benna_fusi": _benna_fusi,
    "l2_init": _l2_init,
    "ewc": _ewc,
}


def expand(timescales: TimescalesConfig) -> Tree:
    """`{kind: levels, levels: {...}}` as plain values, with the kind's own `levels` changes in."""
    found = _EXPAND[timescales.kind](timescales)
    for name, change in {} if isinstance(timescales, Levels) else timescales.levels.items():
        if name not in found:
            raise unknown_level(("timescales", "levels", name), change, found)
        found[name] = merge(found[name], change)
    return {"kind": "levels", "rule": None, "levels": found}
