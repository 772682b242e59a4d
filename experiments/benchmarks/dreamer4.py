"""How fast is Dreamer 4 here? `nested bench dreamer4 [--json]`: its two steps, and one frame.

Whole updates of the tokenizer and of the dynamics (losses with both half steps, backward, tick), a
frame sampled in four steps and written to the cache after a short and after a long past, and a
frame decoded. At the reference size public implementations were measured too; one that is
installed in another python takes turns with ours. Time is the processor's (the wall's on a GPU).
FLOPs are counted; `limit` is how many times longer a thing takes than its matrix products would at
the peak that the machine reaches in the same rounds.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks.speed import cell, median, tell
from experiments.benchmarks.statistics import bootstrap
from experiments.benchmarks.timing.flops import operations
from experiments.benchmarks.timing.worker import Worker, WorkerError
from experiments.benchmarks.timing.workload import seconds
from experiments.config import ConfigError
from timescales import Timescales, presets, rules
from worldmodel import ShortcutDynamics, Tokenizer, Trunk
from worldmodel.scale import weighted
from worldmodel.shortcut import Clip, normal

PEER = Path(__file__).parent / "timing" / "peers" / "lucidrains.py"
TARGETS = {"tokenizer": 1.2, "dynamics": 0.4, "frame": 0.1}  # seconds on one thread of a CPU
Row = dict[str, Any]
Run = Callable[[], object]


class Size(NamedTuple):
    """What is measured.

    contexts: frames before the one that is timed; product: rows of the matrices of the peak.
    """

    side: int = 64
    batch: int = 4
    frames: int = 8
    patch: int = 8
    latents: int = 32
    channels: int = 16
    tokenizer: Trunk = Trunk(192, 4, 4, 4, every=4, context=96)
    dynamics: Trunk = Trunk(240, 6, 4, 2, every=4, context=96)
    spatial: int = 16
    registers: int = 4
    actions: int = 6
    k_max: int = 64
    steps: int = 4
    contexts: tuple[int, ...] = (8, 96)
    product: int = 1024


# fmt: off
SIZES = {
    "reference": Size(),
    "tiny": Size(
        side=16, batch=2, frames=3, patch=8, latents=4, channels=4,
        tokenizer=Trunk(16, 2, 2, 2, 2, 4), dynamics=Trunk(16, 2, 2, 1, 2, 4), spatial=2,
        registers=1, actions=3, k_max=4, steps=2, contexts=(2, 5), product=64,
    ),
}
# fmt: on


class Subject:
    """Both models on random data; `runs` are what is timed, by name."""

    def __init__(self, size: Size, device: torch.device):
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.generator = torch.Generator(device).manual_seed(0)
        image, latents = (size.side, size.side, 3), (size.latents, size.channels)
        trunk = size.tokenizer
        self.tokenizer = Tokenizer(image, size.patch, *latents, trunk, trunk).to(device)
        self.dynamics = ShortcutDynamics(
            size.actions, latents, size.dynamics, size.spatial, registers=size.registers,
            k_max=size.k_max,
        ).to(device)  # fmt: skip
        shape = (size.batch, size.frames, *image)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
        self.levels = {
            name: Timescales(model.named_parameters(), presets.plain(rules.adamw(lr=1e-4)))
            for name, model in (("tokenizer", self.tokenizer), ("dynamics", self.dynamics))
        }
        self.clip = self.random_clip(size.batch, size.frames)
        self.runs: dict[str, Run] = {
            "tokenizer": self.update_tokenizer,
            "dynamics": self.update_dynamics,
            **{f"frame after {n}": self.frame_after(n) for n in size.contexts},
            "decode": self.decode(),
        }

    def random_clip(self, batch: int, frames: int, begins: bool = True) -> Clip:
        """Latents and actions of noise."""
        size, like = self.size, self.dynamics.places
        latents = like.new_empty(batch, frames, size.latents, size.channels)
        action = like.new_empty(batch, frames, size.actions)
        first = torch.zeros(batch, frames, dtype=torch.bool, device=self.device)
        first[:, 0] = begins
        latents, action = (normal(x, self.generator) for x in (latents, action))
        return Clip(latents.tanh(), action, first, torch.ones_like(first), first.long() * 0)

    def update_tokenizer(self) -> None:
        """Losses, backward, tick."""
        losses = self.tokenizer.losses(self.images, self.clip.first, self.generator)
        self._learn("tokenizer", losses, self.tokenizer.scales)

    def update_dynamics(self) -> None:
        """Flow and shortcut losses, backward, tick."""
        losses, _ = self.dynamics.losses(self.clip, self.generator)
        self._learn("dynamics", losses, {"dynamics": 1.0})

    def frame_after(self, past: int) -> Run:
        """Samples a frame for one row after so many, and writes it; the past stays as it is."""
        start = self.dynamics.initial(1)
        _, context = self.dynamics.observe(self.random_clip(1, past), start, self.generator)
        clip = self.random_clip(1, 1, begins=False)

        def frame() -> None:
            latents = self.dynamics.generate(clip, context, self.size.steps, self.generator)
            self.dynamics.observe(clip._replace(latents=latents), context, self.generator)

        return frame

    def decode(self) -> Run:
        """Latents of one frame to an image, after some others."""
        clip = self.random_clip(1, self.size.contexts[0])
        with torch.no_grad():
            _, context = self.tokenizer.decode_next(clip.latents, self.tokenizer.decoder.initial(1))
        latents = self.random_clip(1, 1).latents
        return torch.no_grad()(lambda: self.tokenizer.decode_next(latents, context))

    def params(self, name: str) -> int:
        """Parameters of what runs under this name."""
        model: nn.Module = self.dynamics
        if name in ("tokenizer", "decode"):
            model = self.tokenizer
        return sum(p.numel() for p in model.parameters())

    def _learn(self, name: str, losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        weighted(losses, scales).backward()
        self.levels[name].tick("update")


# ---- measuring ---------------------------------------------------------------------------------
def timed(run: Run, steps: int, device: torch.device) -> list[float]:
    """Seconds of each of so many runs: of the processor, or of the wall on a GPU."""
    wall, cpu = seconds(run, steps, device)
    return cpu if device.type == "cpu" else wall


class Product:
    """A square matrix product; the peak is counted on the clock that the models are timed by."""

    def __init__(self, device: torch.device, n: int):
        self.device, self.n = device, n
        self.a, self.b = torch.ones(n, n, device=device), torch.eye(n, device=device)

    def gflops(self) -> float:
        """The best of ten."""
        run = lambda: torch.mm(self.a, self.b)  # noqa: E731
        return 2 * self.n**3 / min(timed(run, 10, self.device)) / 1e9


def row_of(name: str, who: str, values: np.ndarray, found: Row, peak: float) -> Row:
    """values (rounds, steps) in seconds -> a row."""
    interval = bootstrap(median(values), np.random.default_rng(0), median)
    row: Row = {"what": name, "who": who, **found}
    row |= {"seconds": interval.value, "seconds_95": [interval.low, interval.high]}
    row["limit"] = interval.value * peak / found["gflop"] if found.get("gflop") else None
    return row


def ratio_of(name: str, peer: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """How many times longer the peer takes, paired by round."""
    ratios = median(theirs) / median(ours)
    found = bootstrap(ratios, np.random.default_rng(0), median)
    return {"what": f"ratio {name}", "who": peer, "ratio": found.value,
            "ratio_95": [found.low, found.high]}  # fmt: skip


def measure(
    size: Size, rounds: int, steps: int, device: torch.device, peers: Sequence[Worker]
) -> list[Row]:
    """Everything in turn, round by round; one round before the first is thrown away."""
    subject, product = Subject(size, device), Product(device, size.product)
    names, ours, peaks = list(subject.runs), [], []
    theirs: list[list[list[list[float]]]] = [[] for _ in peers]
    for _ in range(rounds + 1):
        peaks.append(product.gflops())
        ours.append([timed(subject.runs[name], steps, device) for name in names])
        for peer, kept in zip(peers, theirs, strict=True):
            answers = [peer.ask(name.replace(" ", "_"), steps) for name in names]
            kept.append([answer["seconds"] for answer in answers])
    targets = TARGETS if size == SIZES["reference"] and device.type == "cpu" else {}
    times, peak = np.array(ours[1:]).swapaxes(0, 1), max(peaks)
    rows: list[Row] = []
    for i, name in enumerate(names):
        found: Row = {"params": subject.params(name), "target": targets.get(name.split()[0])}
        found["gflop"] = operations(subject.runs[name]) / 1e9
        rows.append(row_of(name, "nested", times[i], found, peak))
        for peer, kept in zip(peers, theirs, strict=True):
            said, values = peer.hello(), [answers[i] for answers in kept[1:]]
            if values and values[0]:
                found = {"params": said["params"].get(name.split()[0])}
                rows.append(row_of(name, said["who"], np.array(values), found, peak))
                rows.append(ratio_of(name, said["who"], times[i], np.array(values)))
    shared = {"matmul_gflops": peak, "threads": torch.get_num_threads(), "rounds": rounds}
    return [{**row, **shared, "device": device.type} for row in rows]


def ready(stack: ExitStack, pythons: Sequence[str], size: Size, threads: int) -> list[Worker]:
    """Peers that start, until the stack closes; one that does not is told and left out."""
    found: list[Worker] = []
    for python in pythons:
        words = json.dumps({**size._asdict(), "threads": threads})
        command = [python, "-I", str(PEER), words]
        worker = stack.enter_context(Worker(f"peer {python}", command, threads))
        try:
            worker.hello()
            found.append(worker)
        except WorkerError as error:
            tell(f"left out: {error}")
    return found


# ---- showing -----------------------------------------------------------------------------------
COLUMNS = ("what", "who", "params", "gflop", "seconds", "seconds_95", "target", "limit")
COLUMNS += ("ratio", "ratio_95")


def show(rows: Sequence[Row]) -> None:
    """One table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("what", "who") else "right")
    for row in rows:
        table.add_row(*("" if row.get(c) is None else cell(row[c]) for c in COLUMNS))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def arguments() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="nested bench dreamer4",
        description=__doc__,
        epilog="example:\n  nested bench dreamer4 --peer-python venv/bin/python --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="reference", choices=SIZES)
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--rounds", type=int, default=7, help="rounds in which all take turns (default 7)")
    add("--steps", type=int, default=1, help="runs of each in a round (default 1)")
    add("--peer-python", action="append", default=[], metavar="PYTHON",
        help="a python that has lucidrains' dreamer4; may be repeated")  # fmt: skip
    add("--json", action="store_true", help="one JSON object a line instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    words = arguments().parse_args(argv)
    for name in ("threads", "rounds", "steps"):
        if getattr(words, name) < 1:
            raise ConfigError(f"--{name}", getattr(words, name), "is too few", "give 1 or more")
    torch.set_num_threads(words.threads)
    size, device = SIZES[words.size], torch.device(words.device)
    with ExitStack() as stack:
        peers = ready(stack, words.peer_python, size, words.threads)
        rows = measure(size, words.rounds, words.steps, device, peers)
    if words.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
