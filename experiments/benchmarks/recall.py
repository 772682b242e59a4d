"""Does a memory remember? `nested bench recall`: pairs that are new in every episode.

Each row of an episode brings a key and its value, and asks for the value of a key of an earlier
row. Keys are random vectors, values random symbols: nothing can be known before the episode, so
slow weights alone stay at chance. A model is a memory and nothing else: what it answers to a row
are the logits of the symbols. Its slow weights are trained over episodes; then, on held-out ones,
the same weights answer from the fast weights that the episode has written (`adapted`), from those
that it began with (`frozen`), and from those of another episode (`swapped`, the control, which must
not gain). Memories come by kind, from the configuration that gives a Dreamer its memory. All seeds
run in one program; the episodes of a seed are the same for every kind.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from experiments.benchmarks.names import names_in
from experiments.benchmarks.statistics import Interval, bootstrap, paired_bootstrap, shown
from experiments.build import MEMORIES, make_memory
from experiments.config import ConfigError, load_config
from nested import fast

ARMS = ("frozen", "adapted", "swapped")
CURVE = (4, 8, 16, 32, 64)  # pairs stored
HELD_OUT = 1_000_003  # added to the seed of the episodes that are measured


class Size(NamedTuple):
    """How much: widths, episodes and updates.

    Training goes from a quarter of `pairs` in an episode to all of them, at equal rows an update:
    few pairs leave a memory that makes its own keys less to confuse until it has learned to.
    """

    keys: int = 32
    symbols: int = 16
    dim: int = 32
    hidden: int = 32
    pairs: int = 16
    batch: int = 8  # episodes of `pairs` pairs; more of shorter ones
    updates: int = 400
    rate: float = 5e-3
    episodes: int = 64  # held out, a seed
    curve: tuple[int, ...] = CURVE


TIERS = {
    "smoke": Size(8, 4, 8, 8, pairs=4, batch=4, updates=10, episodes=8, curve=(2, 4, 8)),
    "full": Size(),
}


class Episodes(NamedTuple):
    """Rows of B episodes over T steps; row t may ask for any of t pairs, so row 0 for none."""

    rows: Tensor  # (B, T, 2 keys + symbols): key, value, the key that is asked for
    answer: Tensor  # (B, T) int64, the symbol that is asked for


def episodes(size: Size, batch: int, pairs: int, generator: torch.Generator) -> Episodes:
    """Episodes of `pairs` + 1 rows. Entries of a row have mean square one."""
    steps = pairs + 1
    keys = F.normalize(torch.randn(batch, steps, size.keys, generator=generator), dim=-1)
    keys = keys * size.keys**0.5
    symbols = torch.randint(size.symbols, (batch, steps), generator=generator)
    asked = (torch.rand(batch, steps, generator=generator) * torch.arange(steps)).long()
    values = F.one_hot(symbols, size.symbols) * size.symbols**0.5
    asked_keys = keys.gather(1, asked[..., None].expand_as(keys))
    return Episodes(torch.cat([keys, values, asked_keys], -1), symbols.gather(1, asked))


# ---- a model, and all seeds of it in one ------------------------------------------------------
class Stream(nn.Module):
    """A memory on a stream: what it answers to each row, in one go."""

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory: Any = memory

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (B, T, symbols) of rows (B, T, ...)."""
        resets = torch.zeros(rows.shape[:2], dtype=torch.bool)
        return self.memory.scan(rows, self.memory.initial(len(rows)), resets)[0]


class Arms(nn.Module):
    """A memory on a stream, step by step, and what it would answer from other fast weights."""

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory: Any = memory

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (ARMS, B, T, symbols); episode b swaps with episode b - 1."""
        memory, answers = self.memory, []
        start = state = memory.initial(len(rows))
        for x in rows.unbind(1):
            adapted, state = memory(x, state)
            swapped = fast.tree_map(lambda part: part.roll(1, 0), state)
            frozen, other = (memory.read(x, used) for used in (start, swapped))
            answers.append(torch.stack([frozen, adapted, other]))
        return torch.stack(answers, 2)


def make(kind: str, size: Size, seed: int, overrides: Sequence[str] = ()) -> nn.Module:
    """A memory that reads rows and answers with logits. Raises ConfigError."""
    words = [f"model.memory.kind={kind}", f"model.memory.dim={size.dim}"]
    if kind in HIDDEN:
        words.append(f"model.memory.hidden={size.hidden}")
    config = load_config("default", [*words, *overrides])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        memory = make_memory(config.model.memory, 2 * size.keys + size.symbols, size.symbols)
    assert memory is not None
    return memory


HIDDEN = ("neural", "ttt_mlp", "continuum", "hope")  # kinds with a width inside


class Seeds:
    """One memory a seed, all in the same operations: weights have the seeds as their first axis."""

    def __init__(self, memories: Sequence[nn.Module]):
        self.stream, self.arms = Stream(memories[0]), Arms(memories[0])
        columns = zip(*(memory.named_parameters() for memory in memories), strict=True)
        self.weights = {
            f"memory.{column[0][0]}": torch.stack([p.detach() for _, p in column]).requires_grad_()
            for column in columns
        }

    def __call__(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`model` with the weights of each seed on rows (seeds, B, T, ...)."""

        def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            return functional_call(model, weights, (rows,))

        return vmap(one)(self.weights, rows)


def train(seeds: Seeds, size: Size, names: Sequence[int]) -> np.ndarray:
    """AdamW on the answers; the loss (seeds, updates) in nats."""
    optimizer = torch.optim.AdamW(seeds.weights.values(), size.rate, weight_decay=0.0, fused=True)
    generators = [torch.Generator().manual_seed(seed) for seed in names]
    history: list[Tensor] = []
    for update in range(size.updates):
        parts = 4 if update < 0.4 * size.updates else 2 if update < 0.6 * size.updates else 1
        rows, answer = drawn(size, size.batch * parts, size.pairs // parts, generators)
        loss = wrong(seeds(seeds.stream, rows), answer)[:, :, 1:].mean((1, 2))
        loss.sum().backward()
        for group in optimizer.param_groups:
            left = (size.updates - update) / (0.25 * size.updates)
            group["lr"] = size.rate * min(1.0, (update + 1) / 20, left)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.detach())
    return torch.stack(history, 1).numpy()


@torch.no_grad()
def measure(seeds: Seeds, size: Size, names: Sequence[int]) -> dict[str, np.ndarray]:
    """On held-out episodes, by row: accuracy and nats, (ARMS, seeds, rows) each."""
    generators = [torch.Generator().manual_seed(HELD_OUT + seed) for seed in names]
    rows, answer = drawn(size, size.episodes, max(size.curve), generators)
    logits = seeds(seeds.arms, rows).transpose(0, 1)  # (ARMS, seeds, B, T, symbols)
    right = (logits.argmax(-1) == answer).float()
    nats = torch.stack([wrong(arm, answer) for arm in logits])
    return {"accuracy": right.mean(2).numpy(), "nats": nats.mean(2).numpy()}


def drawn(size: Size, batch: int, pairs: int, generators: Sequence[torch.Generator]) -> Episodes:
    """Episodes of every seed, each from its own generator: (seeds, B, T, ...)."""
    return fast.stack([episodes(size, batch, pairs, generator) for generator in generators])


def wrong(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy (...) of logits (..., symbols) in nats."""
    losses = F.cross_entropy(logits.flatten(0, -2), answer.flatten(), reduction="none")
    return losses.view(answer.shape)


# ---- the experiment ----------------------------------------------------------------------------
def window(values: np.ndarray, pairs: int) -> np.ndarray:
    """Mean (...) over the rows (..., rows) that could ask for about `pairs` pairs: 3/4 to all."""
    return values[..., 3 * pairs // 4 + 1 : pairs + 1].mean(-1)


def summary(found: Mapping[str, np.ndarray], size: Size, rng: np.random.Generator) -> dict:
    """Arms and differences with intervals over seeds, at each number of pairs stored."""
    result: dict[str, Any] = {}
    for name, values in found.items():
        rows: dict[str, Any] = {}
        for pairs in size.curve:
            arms = dict(zip(ARMS, window(values, pairs), strict=True))
            row: dict[str, Any] = {arm: bootstrap(x, rng)._asdict() for arm, x in arms.items()}
            for arm in ARMS[1:]:
                gain = paired_bootstrap(arms[arm], arms["frozen"], rng)
                row[f"{arm} - frozen"] = gain._asdict()
            row["by seed"] = {arm: x.tolist() for arm, x in arms.items()}
            rows[str(pairs)] = row
        result[name] = rows
    return result


def run(
    kinds: Sequence[str], names: Sequence[int], size: Size, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Train and measure every kind; the result and the values by row."""
    made = {kind: [make(kind, size, seed, overrides) for seed in names] for kind in kinds}
    result: dict[str, Any] = {"seeds": list(names), "size": size._asdict(), "kinds": {}}
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, memories in made.items():
        begun = time.perf_counter()
        seeds = Seeds(memories)
        losses = train(seeds, size, names)
        found[kind] = measure(seeds, size, names)
        seconds = time.perf_counter() - begun
        last = losses[:, -max(size.updates // 10, 1) :].mean()
        print(f"{kind}: {seconds:.0f} s, loss {last:.3f} nats", file=sys.stderr, flush=True)
        row = summary(found[kind], size, np.random.default_rng(0))
        parameters = sum(p.numel() for p in memories[0].parameters())
        result["kinds"][kind] = {"parameters": parameters, "seconds": seconds, **row}
    return result, found


# ---- telling -----------------------------------------------------------------------------------
def table(result: Mapping[str, Any]) -> str:
    """The result as text: a line a kind."""
    size = Size(**result["size"])
    head = "".join(f"{pairs:7d}" for pairs in size.curve)
    lines = [
        f"{len(result['seeds'])} seeds, {size.symbols} symbols (chance {1 / size.symbols:.3f}), "
        f"trained with up to {size.pairs} pairs",
        f"{'':12}{'accuracy at so many pairs stored':{len(head)}}"
        f"   at {size.pairs}: adapted - frozen (95 %)   swapped - frozen",
        f"{'memory':12}{head}",
    ]
    for kind, row in result["kinds"].items():
        means = (row["accuracy"][str(pairs)]["adapted"]["value"] for pairs in size.curve)
        at = row["accuracy"][str(size.pairs)]
        gains = (shown(at[f"{arm} - frozen"]) for arm in ARMS[1:])
        lines.append(f"{kind:12}" + "".join(f"{x:7.3f}" for x in means) + "   " + "   ".join(gains))
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy against pairs stored; beside it, what own fast weights and the control gain."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_capacity(left, result)
        draw_gains(right, result)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")


def draw_capacity(axes: Any, result: Mapping[str, Any]) -> None:
    """A line a kind, named at its right end."""
    from experiments.record.curves import FAINT, PALETTE, Line, label_ends

    size, lines = Size(**result["size"]), []
    colours = [*PALETTE, "#A0522D", "#4B0082"]
    for (kind, row), colour in zip(result["kinds"].items(), colours, strict=False):
        points = [row["accuracy"][str(pairs)]["adapted"] for pairs in size.curve]
        value, low, high = ([point[key] for point in points] for key in Interval._fields)
        axes.fill_between(size.curve, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(size.curve, value, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        lines.append(Line(kind, size.curve, value, colour))
    axes.set_xscale("log", base=2)
    axes.set_xticks(size.curve, [str(pairs) for pairs in size.curve])
    axes.set_ylim(0, 1.02)
    axes.axhline(1 / size.symbols, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(size.pairs, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    label_ends(axes, lines)
    axes.set_title(f"Recall, {len(result['seeds'])} seeds; dotted: the longest episode in training")
    axes.set_xlabel("pairs stored")
    axes.set_ylabel("accuracy (dashes: chance)")
    axes.grid(axis="y")


def draw_gains(axes: Any, result: Mapping[str, Any]) -> None:
    """Adapted and swapped minus frozen, with intervals, a row a kind."""
    from experiments.record.curves import FAINT, PALETTE

    size, kinds = Size(**result["size"]), list(result["kinds"])
    marks = {"adapted": (PALETTE[0], "own fast weights"), "swapped": (FAINT, "another episode's")}
    for arm, (colour, label) in marks.items():
        rows = [result["kinds"][kind]["accuracy"][str(size.pairs)] for kind in kinds]
        found = [Interval(**row[f"{arm} - frozen"]) for row in rows]
        value, low, high = (np.array(part) for part in zip(*found, strict=True))
        places = np.arange(len(kinds))
        reach = (value - low, high - value)
        axes.errorbar(value, places, xerr=reach, fmt="o", color=colour, label=label, capsize=3)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_xlabel("gain in accuracy over frozen weights")
    axes.set_title(f"{size.pairs} pairs stored; bars 95 %")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(axis="x")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, draw, print."""
    parser = argparse.ArgumentParser(
        prog="nested bench recall",
        description=__doc__,
        epilog="example:\n  nested bench recall --seeds 10 --out runs/recall.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kinds", default=",".join(MEMORIES), help="with commas (default all)")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--tier", choices=TIERS, default="full", help="how much (default full)")
    parser.add_argument("--out", type=Path, help="write the picture there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args(argv)
    kinds = names_in(asked.kinds, MEMORIES, "--kinds", "memory")
    if asked.seeds < 1:
        raise ConfigError("--seeds", asked.seeds, "nothing to train", "give 1 or more")
    torch.set_num_threads(1)
    result, _ = run(kinds, range(asked.seeds), TIERS[asked.tier])
    if asked.out:
        draw(result, asked.out)
    print(json.dumps(result) if asked.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
