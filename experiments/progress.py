"""Live progress: a line or a table that moves in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PAUSE = 10.0  # seconds between plain lines


class Long(Protocol):
    """What takes a while: a configuration that knows how much there is to do."""

    @property
    def frames(self) -> int: ...


class Watch(Protocol):
    """Sees a run go on; `Progress` is one."""

    def show(self, frame: int, metrics: Mapping[str, float]) -> None:
        """What was just reported, or evaluated."""
        ...


class Progress:
    """Shows frames (or other units) done, the newest evaluation and the speed."""

    def __init__(self, run: Path, config: Long, unit: str = "frames"):
        self._console = Console(stderr=True)
        columns = (BarColumn(24), MofNCompleteColumn(), TextColumn(unit + "  {task.fields[text]}"))
        self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task("train", total=config.frames, text="")
        self._live = self._console.is_terminal
        self._total, self._shown, self._unit = config.frames, 0.0, unit
        self._parts: dict[str, str] = {}
        print(f"run {run}", file=sys.stderr)

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def tell(self, name: str, text: str) -> None:
        """Show this beside the numbers from now on, in the place of what `name` showed."""
        self._parts[name] = text

    def show(self, frame: int, metrics: Mapping[str, float]) -> None:
        """Take in new metrics; a plain line at most every ten seconds."""
        for name, value in metrics.items():
            if name.startswith("eval/") and name.endswith("/return"):
                self._parts[name] = f"{name.split('/')[1]} {brief(value)}"
        if "time/updates_per_s" in metrics:
            self._parts["speed"] = f"{metrics['time/updates_per_s']:.0f} updates/s"
        text = "  ".join(self._parts.values())
        if self._live:
            self._bar.update(self._task, completed=min(frame, self._total), text=text)
        elif time.monotonic() - self._shown > PAUSE:
            self._shown = time.monotonic()
            print(f"{frame:>8}/{self._total} {self._unit}  {text}", file=sys.stderr, flush=True)


class Screen:
    """Something that is drawn again and again; `plain` where there is no terminal for it."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.plain = not console.is_terminal
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> Self:
        if not self.plain:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def draw(self, renderable: RenderableType) -> None:
        """In the place of what was drawn before."""
        self._live.update(renderable, refresh=True)


def brief(value: float) -> str:
    """A number in about four digits: 1,203.1 or 0.955."""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
