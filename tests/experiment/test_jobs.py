"""Jobs in processes: order, what is done, what goes wrong, and stopping."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from kedge.errors import DivergenceError, InputError, Interrupted, Problem
from kedge.experiment.jobs import Job, carry_out
from kedge.progress import Interrupt, Progress


def write(path: Path, interrupt: Interrupt) -> None:
    with (path.parent / "log").open("a") as file:
        file.write(f"{path.name}\n")
    print("not on stdout")


def meet(own: Path, other: Path, interrupt: Interrupt) -> None:
    """Ends only if the other one is under way at the same time."""
    own.touch()
    wait_for(other)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def refuse(interrupt: Interrupt) -> None:
    raise InputError([Problem("here", "this", "that"), Problem("there", "more")])


def diverge(interrupt: Interrupt) -> None:
    raise DivergenceError("not a number")


def err(interrupt: Interrupt) -> None:
    raise KeyError("a bug")


def die(interrupt: Interrupt) -> None:
    os._exit(7)


def go_on(folder: Path, interrupt: Interrupt) -> None:
    """A run: it never ends by itself, and keeps what it has when it is stopped."""
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in a terminal reaches every process; only the first one acts
    (folder / f"began-{os.getpid()}").touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if interrupt.requested:
            (folder / f"kept-{os.getpid()}").touch()
        interrupt.check("step 3")
        time.sleep(0.01)


def carried(jobs: list[Job], folder: Path, workers: int = 2, interrupt: Interrupt | None = None) -> None:
    carry_out(jobs, folder / "done", workers=workers, progress=Progress(quiet=True), interrupt=interrupt or Interrupt())


def done(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "done").iterdir()}


def test_a_job_waits_for_what_it_needs_and_is_done_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = [
        Job("last", partial(write, tmp_path / "last"), ("first", "second")),
        Job("first", partial(write, tmp_path / "first")),
        Job("second", partial(write, tmp_path / "second"), ("first",)),
    ]
    carried(jobs, tmp_path)
    carried(jobs, tmp_path)
    assert (tmp_path / "log").read_text().split() == ["first", "second", "last"]
    assert done(tmp_path) == {"first", "second", "last"}
    assert capfd.readouterr().out == ""


def test_two_at_a_time(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    carried([Job("one", partial(meet, one, other)), Job("other", partial(meet, other, one))], tmp_path)
    assert done(tmp_path) == {"one", "other"}


def test_what_the_user_got_wrong_is_told_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError) as told:
        carried([Job("bad", refuse)], tmp_path)
    assert [str(problem) for problem in told.value.problems] == ["here: this -> that", "there: more"]


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (diverge, DivergenceError, "bad: not a number"),
        (err, RuntimeError, "KeyError: 'a bug'"),
        (die, RuntimeError, "bad ended with exit code 7"),
    ],
)
def test_a_job_that_fails_stops_the_others(tmp_path: Path, work: object, error: type, said: str) -> None:
    jobs = [Job("other", partial(go_on, tmp_path)), Job("bad", work), Job("never", partial(write, tmp_path / "never"))]  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(error, match=said):
        carried(jobs, tmp_path)
    assert time.monotonic() - began < 40
    assert done(tmp_path) == set() and not (tmp_path / "log").exists()


def test_a_stop_lets_jobs_keep_what_they_have(tmp_path: Path) -> None:
    interrupt = Interrupt()

    def stop() -> None:
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.01)
        interrupt.requested = True

    threading.Thread(target=stop, daemon=True).start()
    jobs = [Job(name, partial(go_on, tmp_path)) for name in ("one", "other", "never")]
    with pytest.raises(Interrupted, match="0 of 3 jobs"):
        carried(jobs, tmp_path, interrupt=interrupt)
    assert len(list(tmp_path.glob("kept-*"))) == len(list(tmp_path.glob("began-*"))) == 2
    assert done(tmp_path) == set()
