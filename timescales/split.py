"""Splitting parameters into k parts by name, for schedules that run across modules.

By depth: contiguous shares of near equal size, from the output end to the input end. By block: the
layers inside each module take turns. The result is a regex, so that a schedule stays plain text.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

Sizes = Mapping[str, int] | list[str] | tuple[str, ...]
"""Parameters in the order of the model: number of elements by name, or names that count alike."""

ORDER = ("actor", "critic", "reward", "continues", "decoder", "dynamics", "encoder")
"""Modules of an agent from the output (fast) end to the input (slow) end."""


def part(names: Sizes, by: str, part: int, of: int) -> str:
    """A regex of exactly those names that fall into `part` (from 0, the fastest) of `of`."""
    if not isinstance(names, Mapping):
        names = dict.fromkeys(names, 1)
    if not 0 <= part < of:
        raise ValueError(f"part {part} of {of}: parts are counted from 0 to {of - 1}")
    match by:
        case "depth":
            chosen = by_depth(names, of)[part]
        case "block":
            chosen = by_block(names, of)[part]
        case _:
            raise ValueError(f"by={by!r}: 'depth' or 'block'")
    if not chosen:
        raise ValueError(f"by={by}: {len(names)} parameters do not fill {of} parts; use a lower k")
    return f"^(?:{'|'.join(re.escape(name) for name in chosen)})$"


def by_depth(sizes: Mapping[str, int], of: int) -> list[list[str]]:
    """Names in `of` contiguous shares of near equal numbers of elements, whole layers each."""
    layers = _layers(sizes)
    weights = [sum(sizes[name] for name in layer) for layer in layers]
    bounds = [0, *balanced(weights, of), len(layers)]
    return [
        [name for layer in layers[start:stop] for name in layer] for start, stop in pairwise(bounds)
    ]


def by_block(sizes: Mapping[str, int], of: int) -> list[list[str]]:
    """Names in `of` parts: layer i of each module, from its output end, goes to part i mod of."""
    parts: list[list[str]] = [[] for _ in range(of)]
    seen: dict[str, int] = {}
    for layer in _layers(sizes):
        module = _module(layer[0])
        turn = seen[module] = seen.get(module, -1) + 1
        parts[turn % of].extend(layer)
    return parts


def balanced(weights: Sequence[int], of: int) -> list[int]:
    """Where to cut a row of weights into `of` non-empty runs, with the least sum of squared sums.

    Dynamic programming over the runs; ValueError where there are fewer weights than runs.
    """
    count = len(weights)
    if count < of:
        raise ValueError(f"{count} layers do not fill {of} parts; use a lower k")
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    best = {0: (0, [0])}  # end of the runs so far -> (cost, ends of all runs)
    for run in range(1, of + 1):
        best = {
            end: min(
                (cost + (total[end] - total[start]) ** 2, [*ends, end])
                for start, (cost, ends) in best.items()
                if start < end
            )
            for end in range(run, count - (of - run) + 1)
        }
    return best[count][1][1:-1]


def _layers(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names by layer, from the output end: modules in ORDER, later layers of a module first."""
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(_layer(name), []).append(name)
    last_first = list(reversed(layers.values()))
    return sorted(last_first, key=lambda layer: _rank(_module(layer[0])))


def _module(name: str) -> str:
    """The part of an agent that a parameter belongs to, else its first name."""
    words = name.split(".")
    return next((word for word in words[:-1] if word in ORDER), words[0])


def _layer(name: str) -> str:
    """What moves together: a weight with its bias, but each tensor that a module holds itself."""
    parent = name.rpartition(".")[0]
    return name if parent.rpartition(".")[2] in ("", *ORDER) else parent


def _rank(module: str) -> int:
    return ORDER.index(module) if module in ORDER else len(ORDER)
