"""What k levels cost: `python -m experiments.benchmarks.levels [--json]`.

One update of about 12 M parameters in 64 tensors, gradients given as autograd leaves them: placed
in `.grad` where it is None, added in place where a window is open. Every round runs every method on
the same cycle of updates, in turn, so that the machine's mood falls on all alike; a result is the
median over rounds of time / plain fused AdamW, with an interval by resampling the rounds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timescales import Descend, Every, Level, Rule, Timescales, rules

CYCLE = 16  # updates in a round: the longest period
TARGETS = {"k=1": 1.02, "k=3": 0.85, "k=5": 0.90}
PERIODS = {"k=1": (1,), "k=3": (1, 4, 16), "k=5": (1, 2, 4, 8, 16)}


def parameters() -> dict[str, Tensor]:
    """64 tensors of 11.9 M elements: 32 matrices of 432 x 860 and their biases."""
    made: dict[str, Tensor] = {}
    for i in range(32):
        made[f"layer{i}.weight"] = torch.nn.Parameter(torch.randn(432, 860) * 0.03)
        made[f"layer{i}.bias"] = torch.nn.Parameter(torch.zeros(432))
    return made


def schedule(periods: tuple[int, ...], rule: Rule) -> list[Level]:
    """Levels of equal size: layer i belongs to level i mod k."""
    k = len(periods)
    owned = ["|".join(str(i) for i in range(32) if i % k == level) for level in range(k)]
    return [
        Level(f"level{i}", match=rf"^layer({owned[i]})\.", every=Every(n), flow=Descend(rule))
        for i, n in enumerate(periods)
    ]


class Method:
    """Parameters with a function that updates them; `run` is the clock's time of one cycle."""

    def __init__(self, made: Mapping[str, Tensor], update: Callable[[], object]) -> None:
        self._params = list(made.values())
        self._update = update

    def run(self, gradients: list[Tensor]) -> float:
        """Seconds that the updates of one cycle take; handing gradients over is not counted.

        A window that is open has its gradients added in place, which is the price of being slow:
        that is counted.
        """
        seconds = 0.0
        for _ in range(CYCLE):
            fresh = [(p, g) for p, g in zip(self._params, gradients, strict=True) if p.grad is None]
            for p, g in fresh:
                p.grad = g.clone()  # a backward's own output: every method gets it alike
            taken = {id(p) for p, _ in fresh}
            pairs = zip(self._params, gradients, strict=True)
            open_windows = [(p.grad, g) for p, g in pairs if id(p) not in taken]
            start = time.perf_counter()
            for window, gradient in open_windows:
                if window is not None:
                    window.add_(gradient)
            self._update()
            seconds += time.perf_counter() - start
        return seconds


def plain() -> Method:
    """One `torch.optim.AdamW(fused=True)` on everything: the reference."""
    made = parameters()
    optimizer = torch.optim.AdamW(made.values(), lr=1e-4, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Method(made, update)


def levels(periods: tuple[int, ...], rule: Rule) -> Method:
    """The engine with levels of equal size."""
    made = parameters()
    timescales = Timescales(made.items(), schedule(periods, rule))
    return Method(made, lambda: timescales.tick("update"))


def methods() -> dict[str, Method]:
    """Everything that is timed, the reference first."""
    found = {"plain": plain()}
    found |= {name: levels(periods, rules.adamw(lr=1e-4)) for name, periods in PERIODS.items()}
    found |= {
        f"laprop {name}": levels(PERIODS[name], rules.laprop(lr=1e-4)) for name in ("k=1", "k=3")
    }
    return found


def interval(ratios: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the median, by resampling rounds."""
    draws = rng.choice(ratios, size=(2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def measure(rounds: int) -> dict[str, Any]:
    """Paired times of all methods, round-robin after one round to warm up."""
    timed = methods()
    gradients = [torch.randn_like(p) * 1e-3 for p in parameters().values()]
    seconds = np.array(
        [[method.run(gradients) for method in timed.values()] for _ in range(rounds + 1)]
    )[1:]
    ratios = seconds / seconds[:, :1]
    rng = np.random.default_rng(0)
    rows = {
        name: {
            "ms_per_update": float(np.median(seconds[:, i])) / CYCLE * 1e3,
            "ratio": float(np.median(ratios[:, i])),
            "interval": interval(ratios[:, i], rng),
            "target": TARGETS.get(name),
        }
        for i, name in enumerate(timed)
    }
    return {"parameters": sum(g.numel() for g in gradients), "rounds": rounds, "methods": rows}


def text(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters in 64 tensors, {result['rounds']} rounds",
        f"{'':12}{'ms/update':>10}{'ratio':>8}   95 % interval   target",
    ]
    for name, row in result["methods"].items():
        low, high = row["interval"]
        target = "" if row["target"] is None else f"<= {row['target']:.2f}"
        lines.append(
            f"{name:12}{row['ms_per_update']:10.2f}{row['ratio']:8.3f}   {low:.3f} .. {high:.3f}"
            f"   {target}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    result = measure(asked.rounds)
    print(json.dumps(result, indent=2) if asked.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
