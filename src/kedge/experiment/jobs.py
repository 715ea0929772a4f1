"""Jobs in processes of their own, some at a time: what is done is left alone, what is stopped goes on later."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kedge.errors import DivergenceError, InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress, Stage

# Processes fork from one that has imported the libraries and used no thread, which is quicker than starting anew.
_SERVER = multiprocessing.get_context("forkserver")
_LIBRARIES = ["kedge.pipeline", "transformers.models.llama.modeling_llama"]
_PATIENCE = 0.2  # seconds between two looks at whether to stop

Work = Callable[[Interrupt], None]
"""What a job does, so that doing it again after a stop goes on or begins anew; it must be picklable."""


@dataclass(frozen=True)
class Job:
    """One piece of an experiment; it waits for the jobs it `needs`."""

    name: str
    work: Work
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Running:
    job: Job
    process: BaseProcess
    word: Connection  # what the process says before it ends
    began: float


def carry_out(jobs: Sequence[Job], marks: Path, *, workers: int, progress: Progress, interrupt: Interrupt) -> None:
    """Every job once, `workers` at a time, in order as far as their needs allow; a file in `marks` says it is done.

    A stop is passed on to the processes, which go on to their next checkpoint, and raises `Interrupted`. An error in a
    job stops the others and is raised here: `InputError` and `DivergenceError` as they are, others as `RuntimeError`
    with the job's traceback.
    """
    marks.mkdir(parents=True, exist_ok=True)
    _SERVER.set_forkserver_preload(_LIBRARIES)
    done = {job.name for job in jobs if _mark(marks, job.name).exists()}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[Any, _Running] = {}  # by what tells that the process has ended
    with progress.stage("jobs", len(jobs), start=len(done)) as stage:
        try:
            while waiting or running:
                interrupt.check(f"{len(done)} of {len(jobs)} jobs")
                for job in _ready(waiting, done)[: workers - len(running)]:
                    waiting.remove(job)
                    started = _start(job, marks)
                    running[started.process.sentinel] = started
                for sentinel in wait(list(running), timeout=_PATIENCE):
                    _finish(running.pop(sentinel), progress, done, stage)
        except Interrupted:
            _stop(list(running.values()), kill=False)
            raise
        except BaseException:
            _stop(list(running.values()), kill=True)
            raise


def _ready(waiting: Sequence[Job], done: set[str]) -> list[Job]:
    return [job for job in waiting if set(job.needs) <= done]


def _start(job: Job, marks: Path) -> _Running:
    receiver, sender = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_child, args=(job, marks, sender), name=job.name, daemon=True)
    process.start()
    sender.close()
    return _Running(job, process, receiver, time.monotonic())


def _child(job: Job, marks: Path, sender: Connection) -> None:
    interrupt = Interrupt()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent tells its processes to stop
    signal.signal(signal.SIGTERM, lambda *_: setattr(interrupt, "requested", True))
    sys.stdout = sys.stderr  # stdout is for the command's result
    try:
        job.work(interrupt)
        _mark(marks, job.name).touch()
    except Interrupted as error:
        sender.send(("stopped", error.problems[0].where))
    except InputError as error:
        sender.send(("input", [(one.where, one.what, one.remedy) for one in error.problems]))
    except DivergenceError as error:
        sender.send(("diverged", str(error)))
    except BaseException:
        sender.send(("bug", traceback.format_exc()))


def _finish(ended: _Running, progress: Progress, done: set[str], stage: Stage) -> None:
    name = ended.job.name
    ended.process.join()
    match _said(ended.word):
        case ("stopped", where):
            raise Interrupted(f"{name}: {where}")
        case ("input", problems):
            raise InputError([Problem(*problem) for problem in problems])
        case ("diverged", text):
            raise DivergenceError(f"{name}: {text}")
        case ("bug", text):
            raise RuntimeError(f"the job {name} failed:\n{text}")
    if ended.process.exitcode != 0:
        raise RuntimeError(f"the process of the job {name} ended with exit code {ended.process.exitcode}")
    done.add(name)
    progress.note(f"{name}: done in {time.monotonic() - ended.began:.0f} s")
    stage.advance(len(done) - 1)


def _said(word: Connection) -> Any:
    try:
        return word.recv()
    except EOFError:  # it ended without a word, as all that goes well does
        return None


def _stop(running: Sequence[_Running], *, kill: bool) -> None:
    for one in running:
        one.process.kill() if kill else one.process.terminate()
    for one in running:
        one.process.join()


def _mark(marks: Path, name: str) -> Path:
    return marks / f"{name}.done"
