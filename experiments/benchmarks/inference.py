"""Does inference learn? `nested bench inference`: inner gradient steps in a hidden new context.

A world model is trained in one context of CartPoleShift and then frozen. In episodes of this and
of other contexts, each slot takes one gradient step after every observation on the world model's
own prediction loss: squared error (symlog) of the next observation decoded from the prior, plus
the KL from posterior to prior. The same weights without steps see the same rows and the same noise.
Episodes are acted by a hand-written balancer that knows the context: only prediction is tested.
The inner learning rate is chosen on seeds that are not reported. `swapped` is the control: slots
that use what a slot of another context has learned must not gain. In the trained context there is
something to gain too: training leaves the KL alone below its free nats, and this loss does not.
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

from agents import Dreamer
from experiments.benchmarks.statistics import Interval, paired_bootstrap
from experiments.build import build_agent
from experiments.config import Config, load_config
from experiments.driver import Arrays, replayed_batch
from experiments.envs.cartpole import CONTEXTS, CartPoleShiftEnvs
from nested import fast
from nested.adapt import Adapter
from worldmodel import Batch, WorldModel
from worldmodel.heads import kl, race

TRAINED = "normal"
NOISE = 0.25  # share of random actions in the measured episodes
RATES = (0.01, 0.03, 0.1, 0.3)
TUNING = 1000  # the first seed of those that choose the learning rate
MATCH = r"^world\.(decoder|dynamics\.prior_net)\."
CLIP = 1.0  # of a slot's gradient, in L2 norm
QUARTERS = 4
PARTS = ("prediction", "observation", "kl")  # the first is the sum of the others
ARMS = ("frozen", "adapted", "swapped")
LABELS = {
    "frozen": "frozen weights",
    "adapted": "a step after every observation",
    "swapped": "control: what a slot of another context has learned",
}


class Size(NamedTuple):
    """How much: slots a context, steps an episode, updates of the world model's training."""

    slots: int = 8
    steps: int = 200
    updates: int = 800
    batch: int = 16
    length: int = 16


class Rows(NamedTuple):
    """What one step of prediction needs, for N slots over T steps."""

    deter: Tensor  # (N, T, D) the state after the action, before the observation
    posterior: Tensor  # (N, T, S, C) what the observation then told
    noise: Tensor  # (N, T, S, C) of the draw from the prior
    obs: dict[str, Tensor]  # (N, T, ...)


# ---- data and world model ----------------------------------------------------------------------
def balance(
    obs: np.ndarray, sign: np.ndarray, noise: np.ndarray | float, rng: np.random.Generator
) -> np.ndarray:
    """Encoded actions (N, 2) that keep the pole up: obs (N, 4), sign (N,) of the hidden context."""
    position, velocity, angle, spin = obs.T
    lean = angle + 0.3 * spin + 0.05 * position + 0.1 * velocity
    right = np.where(rng.random(len(obs)) < noise, rng.random(len(obs)) < 0.5, lean * sign > 0)
    return np.stack([~right, right], 1).astype(np.float32)


def record(contexts: Sequence[str], steps: int, noise: np.ndarray | float, seed: int) -> Arrays:
    """Columns (N, steps, ...) of a slot for each name in `contexts`."""
    envs = CartPoleShiftEnvs(len(contexts), seed)
    sign = np.array([CONTEXTS[name].sign for name in contexts])
    rng = np.random.default_rng([seed, 1])
    rows = [envs.reset(contexts)]
    for _ in range(steps - 1):
        rows.append(envs.step(balance(rows[-1].obs["state"], sign, noise, rng)))
    columns = {f"obs.{key}": np.stack([row.obs[key] for row in rows], 1) for key in rows[0].obs}
    names = Batch._fields[1:]
    return columns | {name: np.stack([getattr(row, name) for row in rows], 1) for name in names}


def configured(seed: int, overrides: Sequence[str] = ()) -> Config:
    """The default preset without its memory, in the one context that is trained."""
    fixed = [f"seed={seed}", f"env.contexts=[{TRAINED}]", "model.memory.kind=none", "device=cpu"]
    return load_config("default", [*fixed, *overrides])


def train_world(agent: Dreamer, seed: int, size: Size) -> WorldModel:
    """Train the world model alone, with AdamW, on windows of balanced and of random steps."""
    slots = 64
    data = record([TRAINED] * slots, 400, np.linspace(0.1, 1.0, slots), seed)
    world, rng = agent.world, np.random.default_rng([seed, 2])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(world.parameters(), lr=1e-3, fused=True)
    for _ in range(size.updates):
        slot = rng.integers(0, slots, (size.batch, 1))
        step = rng.integers(0, 400 - size.length, (size.batch, 1)) + np.arange(size.length)
        window = {name: x[slot, step] for name, x in data.items()}
        batch = replayed_batch(window, torch.device("cpu"))
        posterior, _ = world.observe(batch, world.initial(size.batch), generator)
        losses = world.losses(batch, posterior)
        torch.stack([x.mean() * agent.scales[k] for k, x in losses.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return world


def world_of(seed: int, size: Size, overrides: Sequence[str], folder: Path) -> WorldModel:
    """The seed's world model: from `folder` if it is there, else trained and put there."""
    from safetensors.torch import load_file, save_file

    envs = CartPoleShiftEnvs(1)
    config = configured(seed, overrides)
    agent = build_agent(config, envs.obs_spec, envs.action_spec)
    stem = "-".join([f"world-s{seed}-u{size.updates}x{size.batch}x{size.length}", *overrides])
    path = folder / f"{stem.replace('/', '_')}.safetensors"
    if path.exists():
        agent.world.load_state_dict(load_file(path))
        return agent.world
    world = train_world(agent, seed, size)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(world.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # whole or not at all
    return world


# ---- one step of prediction, and of learning from it -------------------------------------------
class Next(nn.Module):
    """The next observation from the prior. One slot, no leading axes; `vmap` adds them."""

    def __init__(self, world: WorldModel):
        super().__init__()
        self.world = world

    def forward(self, row: Rows) -> Tensor:
        """The losses named in PARTS (3,) of predicting a row."""
        prior = self.world.dynamics.prior(row.deter[None])
        draw = hot(prior, row.noise[None]) + prior - prior.detach()
        obs = {key: value[None] for key, value in row.obs.items()}
        errors = self.world.decoder.errors(row.deter[None], draw, obs)
        error, divergence = torch.stack([*errors.values()]).sum(0), kl(row.posterior[None], prior)
        return torch.cat([error + divergence, error, divergence])


def hot(probs: Tensor, noise: Tensor) -> Tensor:
    """One-hot draw (..., C), as `worldmodel.heads.sample` makes it, in a form that vmap takes."""
    index = (probs.detach() * noise).argmax(-1, keepdim=True)
    return (torch.arange(probs.shape[-1], device=probs.device) == index).to(probs.dtype)


def adapter_of(world: WorldModel, rate: float, match: str = MATCH) -> Adapter:
    """Inner gradient steps on the prediction loss of the parameters that match."""
    module = Next(world)

    def loss(params: dict[str, Tensor], row: Rows) -> Tensor:
        return fast.bind(module, params)(row)[0]

    return Adapter(module, match, loss, lr=rate, clip=CLIP)


@torch.no_grad()
def filtered(world: WorldModel, columns: Arrays, seed: int) -> Rows:
    """The rows of episodes as the frozen world model filters them: shared by all arms."""
    batch = replayed_batch(columns, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    posterior, _ = world.observe(batch, world.initial(len(batch.first)), generator)
    noise = race(posterior.probs.shape, generator)
    return Rows(posterior.deter, posterior.probs, noise, batch.obs)


@torch.no_grad()
def play(adapter: Adapter, rows: Rows, first: Tensor, shift: int) -> dict[str, np.ndarray]:
    """Losses {arm: (N, T, PARTS)} of each row before the step that learns from it.

    A slot's weights go back at the start of an episode. `swapped`: slot n predicts with what slot
    n - shift has learned.
    """
    num, steps = first.shape
    start = state = adapter.initial(num)
    losses: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for t in range(steps):
        row = fast.tree_map(lambda x, t=t: x[:, t], rows)
        state = fast.reset(state, start, first[:, t])
        swapped = fast.tree_map(lambda x: x.roll(shift, 0), state)
        for arm, learned in zip(ARMS, (start, state, swapped), strict=True):
            losses[arm].append(adapter.bind(learned)(row))
        state, _ = adapter(state, row)
    return {arm: torch.stack(values, 1).numpy() for arm, values in losses.items()}


def curves(world: WorldModel, rate: float, seed: int, size: Size) -> dict[str, np.ndarray]:
    """Mean losses {arm: (contexts, steps, PARTS)} of one seed, by step of the episode."""
    contexts = [name for name in CONTEXTS for _ in range(size.slots)]
    columns = record(contexts, size.steps, NOISE, seed + 500)
    rows = filtered(world, columns, seed)
    losses = play(adapter_of(world, rate), rows, torch.from_numpy(columns["first"]), size.slots)
    inside = np.cumsum(columns["first"], 1) == 1  # the first episode of each slot
    shape = (len(CONTEXTS), size.slots, size.steps)
    weight = inside.reshape(*shape, 1)
    return {
        arm: (values.reshape(*shape, -1) * weight).sum(1) / np.maximum(weight.sum(1), 1)
        for arm, values in losses.items()
    }


# ---- the experiment ----------------------------------------------------------------------------
def choose_rate(worlds: Mapping[int, WorldModel], size: Size) -> tuple[float, dict[str, float]]:
    """The rate with the least adapted/frozen loss in changed contexts, and all that were tried."""
    changed = [i for i, name in enumerate(CONTEXTS) if name != TRAINED]
    ratios: dict[float, float] = {}
    for rate in RATES:
        found = [curves(world, rate, seed, size) for seed, world in worlds.items()]
        means = {arm: np.stack([x[arm][changed, :, 0].mean(1) for x in found]) for arm in ARMS}
        ratios[rate] = float((means["adapted"] / means["frozen"]).mean())
    best = min(ratios, key=lambda rate: ratios[rate])
    return best, {f"{rate:g}": ratio for rate, ratio in ratios.items()}


def summary(found: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
    """By context and part: means of each quarter of the episode, and frozen - arm with intervals.

    `found` is {arm: (seeds, contexts, steps, PARTS)}; an interval is over seeds.
    """
    result: dict[str, Any] = {}
    for c, name in enumerate(CONTEXTS):
        result[name] = {}
        for p, part in enumerate(PARTS):
            by_arm = {arm: values[:, c, :, p] for arm, values in found.items()}
            whole = {arm: values.mean(1) for arm, values in by_arm.items()}
            last = {arm: quarters(values)[:, -1] for arm, values in by_arm.items()}
            row: dict[str, Any] = {arm: quarters(x).mean(0).tolist() for arm, x in by_arm.items()}
            for arm in ARMS[1:]:
                row[f"frozen - {arm}"] = {
                    "episode": paired_bootstrap(whole["frozen"], whole[arm], rng)._asdict(),
                    "last quarter": paired_bootstrap(last["frozen"], last[arm], rng)._asdict(),
                    "by seed": (whole["frozen"] - whole[arm]).tolist(),
                }
            result[name][part] = row
    return result


def quarters(values: np.ndarray) -> np.ndarray:
    """Means (n, 4) over the quarters of the episode, (n, steps)."""
    return np.stack([part.mean(1) for part in np.array_split(values, QUARTERS, axis=1)], 1)


# ---- telling -----------------------------------------------------------------------------------
def table(result: Mapping[str, Any]) -> str:
    """The result as text; of the control only the whole loss."""
    rate, tuning = f"{result['rate']:g}", result["tuning seeds"]
    lines = [
        f"{len(result['seeds'])} seeds, {result['size']['slots']} slots a context, trained in "
        f"{TRAINED}; prediction = observation + kl",
        f"inner learning rate {rate}, " + (f"chosen on seeds {tuning}" if tuning else "as given"),
        f"{'context':9}{'loss':12}{'weights':9}{'mean of each quarter of the episode':39}"
        "frozen minus these (95 %)    in the last quarter",
    ]
    for name, parts in result["contexts"].items():
        for part, row in parts.items():
            for arm in ARMS if part == PARTS[0] else ARMS[:2]:
                means = "".join(f"{value:9.4f}" for value in row[arm])
                shown = gain(row.get(f"frozen - {arm}"))
                lines.append(f"{name:9}{part:12}{arm:9}{means}{shown}".rstrip())
    return "\n".join(lines)


def gain(row: Mapping[str, Any] | None) -> str:
    """Two intervals; nothing for the frozen weights themselves."""
    ends = [Interval(**row[key]) for key in ("episode", "last quarter")] if row else []
    return "".join(f"  {x.value:8.4f} [{x.low:7.4f}, {x.high:7.4f}]" for x in ends)


def draw(found: Mapping[str, np.ndarray], path: Path, rate: float) -> None:
    """Loss against the step in the episode, one panel a context; bands are 95 % over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from experiments.record.curves import FAINT, PALETTE, STYLE

    colours = dict(zip(ARMS, (PALETTE[0], PALETTE[1], FAINT), strict=True))
    rng = np.random.default_rng(0)
    seeds, _, steps, _ = found["frozen"].shape
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 4.4), layout="constrained")
        figure.suptitle(
            f"Prediction of the next observation within an episode, with inner gradient steps "
            f"of rate {rate:g}; {seeds} seeds, bands 95 %"
        )
        for c, (name, axes) in enumerate(zip(CONTEXTS, figure.subplots(1, 4), strict=True)):
            for arm, colour in colours.items():
                values = smooth(found[arm][:, c, :, 0])
                draws = values[rng.integers(0, seeds, (500, seeds))].mean(1)
                low, high = np.quantile(draws, [0.025, 0.975], axis=0)
                axes.plot(values.mean(0), color=colour, linewidth=1.8, label=LABELS[arm])
                axes.fill_between(np.arange(steps), low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set_yscale("log")
            axes.set_title(f"{name} (trained)" if name == TRAINED else name)
            axes.set_xlabel("step of the episode")
            axes.grid(axis="y")
            axes.set_ylabel("observation error + KL (nats)" if c == 0 else "")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=110, facecolor="white")


def smooth(values: np.ndarray, reach: int = 5) -> np.ndarray:
    """Means (n, steps) over the last `reach` steps."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), 1)
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(ends - reach, 0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)


def run(
    seeds: Sequence[int], size: Size, folder: Path, rate: float | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Choose the rate unless it is given, measure each seed; the result and its curves."""
    tuning = [] if rate is not None else [TUNING, TUNING + 1]
    tried: dict[str, float] = {}
    if rate is None:
        worlds = {seed: world_of(seed, size, overrides, folder) for seed in tuning}
        rate, tried = choose_rate(worlds, size)
        print(f"inner learning rate {rate:g}; adapted / frozen loss of all: {tried}")
    found = []
    for seed in seeds:
        begun = time.perf_counter()
        found.append(curves(world_of(seed, size, overrides, folder), rate, seed, size))
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    stacked = {arm: np.stack([x[arm] for x in found]) for arm in ARMS}
    result = {
        "seeds": list(seeds),
        "size": size._asdict(),
        "rate": rate,
        "rates tried": tried,
        "tuning seeds": tuning,
        "adapts": MATCH,
        "contexts": summary(stacked, np.random.default_rng(0)),
    }
    return result, stacked


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and write inference.json and inference.png into --out."""
    parser = argparse.ArgumentParser(
        prog="nested bench inference",
        description=__doc__,
        epilog="example:\n  nested bench inference --seeds 10 --out runs/inference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=10, help="reported seeds (default 10)")
    parser.add_argument("--updates", type=int, default=Size().updates, help="of the world model")
    parser.add_argument("--steps", type=int, default=Size().steps, help="of an episode")
    parser.add_argument("--slots", type=int, default=Size().slots, help="a context")
    parser.add_argument("--rate", type=float, help="inner learning rate, instead of choosing it")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"), help="folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the default preset")
    asked = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    size = Size(asked.slots, asked.steps, asked.updates)
    result, found = run(range(asked.seeds), size, asked.out, asked.rate, asked.overrides)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "inference.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, asked.out / "inference.png", result["rate"])
    print(json.dumps(result) if asked.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
