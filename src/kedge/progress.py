"""What the user sees while a run goes on, and how it is stopped.

Everything is written to stderr, so stdout holds only results. On a terminal a live line shows step, figures and the
time left; elsewhere a plain line appears every few seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from kedge.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


class Interrupt:
    """A request to stop, polled between steps. The first signal asks; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, where: str) -> None:
        """Raise `Interrupted` if a stop was requested; `where` names the stage and step that was reached."""
        if self.requested:
            raise Interrupted(where)

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Turn SIGINT and SIGTERM into requests inside the block; only the main thread can do so."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the shape signal wants)
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through sys.stderr: the signal may have arrived in the middle of a write to it.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")


class Progress:
    """Where stages report to.

    `quiet` shows nothing at all. `stream` defaults to stderr; `live` to whether that is a terminal. Without a live
    line, one plain line appears at most every `every` seconds, and always for the first and the last step of a stage.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, live: bool | None = None, every: float = 5.0
    ) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty() if live is None else live
        self.every = every
        self._console: Console | None = None

    def note(self, text: str) -> None:
        """One line that stays: what begins, what was found, what to know."""
        if self.quiet:
            return
        if self.live:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    @contextmanager
    def stage(self, name: str, total: int, *, start: int = 0) -> Iterator[Stage]:
        """Report the steps `start` to `total - 1` of the stage `name`; stages follow one another, they do not nest."""
        stage = Stage(self, name, total, start)
        if self.quiet or not self.live:
            yield stage
            return
        with _bar(self.console) as bar:
            stage.show_on(bar)
            yield stage

    @property
    def console(self) -> Console:
        """The terminal; made on first use because importing rich takes time."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self.stream, force_terminal=True)
        return self._console


class Stage:
    """One stage under way; made by `Progress.stage`."""

    def __init__(self, progress: Progress, name: str, total: int, start: int) -> None:
        self.progress, self.name, self.total, self.start = progress, name, total, start
        self._began = time.monotonic()
        self._shown: float | None = None
        self._bar: Bar | None = None

    def show_on(self, bar: Bar) -> None:
        """Report to a live line instead of plain ones."""
        self._bar = bar
        self._task = bar.add_task(self.name, total=self.total, completed=self.start, figures="", eta="")

    def advance(self, step: int, **figures: float) -> None:
        """Step number `step` (from 0) is done; `figures` are shown beside it, in the order given."""
        if self.progress.quiet:
            return
        now = time.monotonic()
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        left = (now - self._began) / max(1, step + 1 - self.start) * max(0, self.total - step - 1)
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, figures=text, eta=_clock(left))
        elif self._shown is None or step + 1 >= self.total or now - self._shown >= self.progress.every:
            self._shown = now
            ending = f"{_clock(now - self._began)} taken" if step + 1 >= self.total else f"{_clock(left)} left"
            line = f"{self.name:<10} {step + 1:>{len(str(self.total))}}/{self.total}  {text}".rstrip()
            self.progress.note(f"{line}  {ending}")


def _bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("{task.fields[eta]}", markup=False, style="dim"),
        console=console,
        refresh_per_second=4,
    )


def _short(value: float) -> str:
    """A figure in few characters: 0.0123, 1.23, 45.6, 789."""
    if value != value or abs(value) == float("inf") or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    """Seconds as 0:07, 3:20 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
