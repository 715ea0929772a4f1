"""Progress lines and stopping."""

from __future__ import annotations

import io
import os
import re
import signal
import threading

import pytest

from kedge.errors import Interrupted
from kedge.progress import Interrupt, Progress


def reported(steps: int, *, start: int = 0, every: float = 0.0, live: bool = False, quiet: bool = False) -> str:
    stream = io.StringIO()
    progress = Progress(stream=stream, live=live, quiet=quiet, every=every)
    with progress.stage("policy", steps, start=start) as stage:
        for step in range(start, steps):
            stage.advance(step, score=0.1234 * step, kl=12.34, length=234.5)
    progress.note("done [with] it")
    return stream.getvalue()


def test_plain_lines_hold_step_figures_and_time_left() -> None:
    first, *_, last, note = reported(3).splitlines()
    assert re.fullmatch(r"policy +1/3  score 0\.00  kl 12\.3  length 23[45]  0:00 left", first)
    assert re.fullmatch(r"policy +3/3  score 0\.25  kl 12\.3  length 23[45]  0:00 taken", last)
    assert note == "done [with] it"


def test_lines_are_few_where_steps_are_fast() -> None:
    lines = reported(1000, every=60).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/1000", "1000/1000"]


def test_a_resumed_stage_counts_on() -> None:
    assert [line.split()[1] for line in reported(5, start=3).splitlines()[:-1]] == ["4/5", "5/5"]


def test_time_left_counts_only_the_steps_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kedge.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream=stream, live=False).stage("policy", 100, start=90) as stage:
        now[0] += 40
        stage.advance(90)
    assert "91/100" in stream.getvalue()
    assert "6:00 left" in stream.getvalue()  # nine steps of 40 s


def test_a_terminal_shows_the_figures_and_keeps_notes() -> None:
    shown = reported(3, live=True)
    assert "kl 12.3" in shown
    assert "3/3" in shown
    assert "done [with] it" in shown


def test_quiet_says_nothing() -> None:
    assert reported(3, quiet=True) == ""
    assert reported(3, quiet=True, live=True) == ""


def test_figures_that_are_not_numbers_do_not_break_it() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, live=False).stage("policy", 1) as stage:
        stage.advance(0, score=float("nan"), kl=float("inf"), length=0.00123)
    assert "score nan  kl inf  length 0.0012" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    interrupt = Interrupt()
    interrupt.check("policy step 0")
    before = signal.getsignal(number)
    with interrupt.listening():
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(Interrupted, match=r"policy step 3: stopped on request -> .*--resume"):
            interrupt.check("policy step 3")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            threading.Event().wait(1)
    assert signal.getsignal(number) is before
    assert "once more stops at once" in capfd.readouterr().err
