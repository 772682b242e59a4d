"""The command `nested data`: record episodes of a policy, or convert those of others."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

PAUSE = 10.0  # seconds between lines of progress

EXAMPLES = """nested data record data/minigrid-empty --policy expert --noise 0.3 --frames 20000
  nested data convert clips/ data/clips --size 64 --fps 10      clips/a.mp4, clips/a.jsonl, ...
  nested data convert contractor/ data/vpt --size 128           VPT's recordings of Minecraft
  nested data convert youtube/ data/seen --like data/vpt        videos alone: unknown actions
  nested data convert episodes/ data/mine --choices 6           episodes/0.npz, 1.npz, ...
  nested data convert D4RL/pen/human-v2 data/pen                a Minari data set"""
VIDEOS = """a .jsonl beside a video has a line for each frame: what was done there, and what came of
it, as {"action": 3, "reward": 0, "terminal": false} or {"action": [0.5, -1]} in [-1, 1], or a tick
of VPT's contractors; a video alone is an episode of unknown actions"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What follows `nested data`."""
    parser.add_argument("verb", choices=("record", "convert"), help="what to do")
    parser.add_argument("paths", nargs="+", metavar="[SOURCE] DEST | field=value",
        help="record: DEST and fields of env; convert: SOURCE (a folder of videos or of .npz "
        "files, or the id of a Minari data set) and DEST",
    )  # fmt: skip
    record = parser.add_argument_group("record")
    record.add_argument(
        "--policy", default="expert", help="random, expert (MiniGrid) or RUN (default expert)"
    )
    record.add_argument("--noise", type=float, default=0.3, help="random share (default 0.3)")
    record.add_argument("--frames", type=_count, default=20_000, help="at least (default 20000)")
    convert = parser.add_argument_group("convert")
    convert.add_argument("--size", type=_size, metavar="N|HxW|keep",
        help="of images, by area (default 64; those of .npz files stay as they are)",
    )  # fmt: skip
    convert.add_argument("--choices", type=_count, default=0, metavar="N",
        help="how many actions there are (default: as the recordings show)",
    )  # fmt: skip
    convert.add_argument("--like", type=Path, metavar="DATA", help="actions as in that data set")
    convert.add_argument("--skip-broken", action="store_true", help="leave out what is broken")
    _video_arguments(parser.add_argument_group("convert, of videos", VIDEOS))


def _video_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--every", type=_count, default=1, metavar="N", help="one frame of N")
    group.add_argument("--fps", type=_rate, default=0.0, metavar="F", help="F frames a second")
    group.add_argument("--truncate", action="store_true",
        help="as many frames as a video and its .jsonl both have",
    )  # fmt: skip
    group.add_argument("--drop-null", action="store_true",
        help="VPT: without the frames at which nothing was done",
    )  # fmt: skip


def run(args: argparse.Namespace, run_of: Callable[[str], Path]) -> int:
    """Do it; `run_of` finds the folder of a run. Raises ConfigError."""
    from experiments.config import ConfigError

    overrides = [word for word in args.paths if "=" in word]
    paths = [word for word in args.paths if word not in overrides]
    if len(paths) != (1 if args.verb == "record" else 2):
        way_out = "record DEST, or convert SOURCE DEST"
        raise ConfigError("paths", " ".join(paths), f"{args.verb} takes other paths", way_out)
    if args.verb == "convert":
        _convert(args, paths[0], Path(paths[1]))
    else:
        _record(args, Path(paths[0]), overrides, run_of)
    return 0


def _record(
    args: argparse.Namespace, path: Path, overrides: list[str], run_of: Callable[[str], Path]
) -> None:
    from experiments.config.dreamer4 import load_dreamer4
    from experiments.data.convert import record_policy

    config = load_dreamer4(None, overrides)
    policy = args.policy if args.policy in ("random", "expert") else str(run_of(args.policy))
    made = record_policy(path, policy, config.env, args.frames, args.noise, config.seed)
    print(f"data    {made}")


def _convert(args: argparse.Namespace, source: str, path: Path) -> None:
    from experiments.config import ConfigError
    from experiments.data.clips import Clips
    from experiments.data.convert import convert
    from experiments.data.source import Options

    if args.every != 1 and args.fps:
        raise ConfigError("--every", args.every, "and --fps say the same thing", "give one of them")
    options = Options(**{name: vars(args)[name] for name in Options._fields})
    episodes, rows, shown = 0, 0, time.monotonic()

    def done(count: int) -> None:
        nonlocal episodes, rows, shown
        episodes, rows = episodes + 1, rows + count
        if time.monotonic() - shown > PAUSE:
            shown = time.monotonic()
            print(f"{episodes:>8} episodes  {rows} rows", file=sys.stderr, flush=True)

    convert(source, path, options, lambda why: print(f"left out: {why}", file=sys.stderr), done)
    clips = Clips.open(path)
    unknown = sum(not episode.labelled for episode in clips.episodes)
    noted = f", {unknown} of them of unknown actions" if unknown else ""
    print(f"data    {path}\nholds   episodes {len(clips.episodes)}{noted}; rows {clips.frames}")


# ---- words to values ---------------------------------------------------------------------------
def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is no count: give 1 or more")
    return int(word)


def _rate(word: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", word) or not float(word):
        raise argparse.ArgumentTypeError(f"{word} is no rate: give a number above 0, as 10")
    return float(word)


def _size(word: str) -> tuple[int, int]:
    if word == "keep":
        return 0, 0
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", word)
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(size):
        raise argparse.ArgumentTypeError(f"{word} is no size: give 64, 360x640 or keep")
    return size
