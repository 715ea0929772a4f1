"""Command lines in processes of their own, stopped where a test wants them to stop, and runs compared.

A fork server that has imported the libraries once starts each process in a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

os.environ.setdefault("OMP_NUM_THREADS", "1")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "kedge.cli",
        "kedge.pipeline",
        "kedge.report.html",
        "pyarrow.parquet",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)

RECIPE = """
name = "tiny"
threads = 1

[desk]
demonstrations = 200

[desk.annotators]
length = 0.13

[model]
hidden = 16
layers = 1
heads = 2
context = 80

[sft]
steps = 11
batch_size = 16
warmup = 2

[pairs]
prompts = 60
checkpoints = 2

[reward]
epochs = 1
batch_size = 16

[policy]
steps = 5
prompts_per_step = 8
max_new_tokens = 12
missing_eos_penalty = 0.5

[policy.kl]
mode = "adaptive"
target = 0.1
horizon = 40

[evaluate]
prompts = 16
every = 2

[trace]
probes = 8
probes_every = 2

[checkpoint]
every = 2
"""


@dataclass(frozen=True)
class Stop:
    """Send `signal` to the process when it is about to make its `count`-th change to the disk below `folder`.

    Only changes to paths that hold `within` count. Opening a file for writing, making, renaming and removing count.
    """

    folder: Path
    within: str
    count: int = 1
    signal: int = signal.SIGKILL


@dataclass
class Command:
    """A command line under way."""

    process: BaseProcess
    out: Path
    err: Path

    def wait(self, timeout: float = 120) -> int:
        """The exit code; minus the signal's number for a process that one ended."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running\n{self.stderr}"
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()


def start(folder: Path, *arguments: str | Path, stop: Stop | None = None, prepare: Any = None) -> Command:
    """Start `kedge ARGUMENTS` in `folder`; `prepare`, a function of a test module, is called first."""
    number = len(list(folder.glob("*.stdout")))
    out, err = folder / f"{number}.stdout", folder / f"{number}.stderr"
    out.touch()
    err.touch()
    texts = [str(argument) for argument in arguments]
    process = _SERVER.Process(target=_execute, args=(texts, folder, out, err, stop, prepare))
    process.start()
    return Command(process, out, err)


def kedge(folder: Path, *arguments: str | Path, stop: Stop | None = None, prepare: Any = None) -> Command:
    """Carry out `kedge ARGUMENTS` to its end."""
    command = start(folder, *arguments, stop=stop, prepare=prepare)
    command.wait()
    return command


def ran(folder: Path, *arguments: str | Path, prepare: Any = None) -> Command:
    """Carry out a command that must succeed."""
    command = kedge(folder, *arguments, prepare=prepare)
    assert command.wait() == 0, command.stderr
    return command


def shrink() -> None:
    """Fewer texts in the built-in desk than any recipe can ask for; the tests need no more."""
    import kedge.desk.world as world
    import kedge.pipeline.tasks as tasks

    tasks.DESK_PROMPTS, world.HELD_OUT = 64, 16


def _execute(arguments: list[str], folder: Path, out: Path, err: Path, stop: Stop | None, prepare: Any) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    shrink()
    if prepare is not None:
        prepare()
    if stop is not None:
        _install(stop)
    from kedge import cli

    code = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def changes(stop: Stop, act: Callable[[int], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that calls `act(n)` before the n-th change that `stop` counts."""
    seen = 0
    below = str(stop.folder)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode = details[0], details[1]
            if not isinstance(mode, str) or not set(mode) & set("wax+"):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = details[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if path.startswith(below) and stop.within in path:
            seen += 1
            act(seen)

    return hook


def _install(stop: Stop) -> None:
    def act(number: int) -> None:
        if number == stop.count:
            os.kill(os.getpid(), stop.signal)

    sys.addaudithook(changes(stop, act))


def count_changes(folder: Path) -> None:
    """Write the number of changes below `folder` to `changes.txt` in the working directory; for `prepare`."""
    record = Path("changes.txt").absolute()
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(changes(Stop(folder, ""), lambda number: os.pwrite(descriptor, str(number).encode(), 0) and None))


def wait_for(condition: Callable[[], bool], command: Command, timeout: float = 60) -> None:
    """Poll until `condition` holds or the command ends."""
    deadline = time.monotonic() + timeout
    while not condition() and command.process.is_alive():
        assert time.monotonic() < deadline, command.stderr
        time.sleep(0.002)


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last one that is being written is left out."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def stage_lines(run: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one stage."""
    return [line for line in lines(run / "metrics.jsonl") if line["stage"] == stage]


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


@dataclass(frozen=True)
class Contents:
    """What two equal runs have in common."""

    files: dict[str, bytes]
    tables: dict[str, Any]
    timed: list[tuple[str, int]]
    manifest: dict[str, Any]
    names: set[str]


def contents(run: Path) -> Contents:
    """All of a run but what tells the time or who stopped it."""
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    names = {str(path.relative_to(run)) for path in paths}
    timed = {"timings.jsonl", "events.jsonl", "report.html", "manifest.json"}
    whole = [name for name in sorted(names - timed) if not name.endswith(".parquet")]
    return Contents(
        files={name: (run / name).read_bytes() for name in whole},
        tables={name: parquet.read_table(run / name) for name in sorted(names) if name.endswith(".parquet")},
        timed=[(line["stage"], line["step"]) for line in lines(run / "timings.jsonl")],
        manifest=manifest(run),
        names=names - {"events.jsonl"},
    )


def assert_same(run: Path, expected: Path) -> None:
    """Two runs left the same files with the same bytes, and traces of the same contents."""
    one, other = contents(run), contents(expected)
    assert one.names == other.names
    for name, content in one.files.items():
        assert content == other.files[name], name
    for name, table in one.tables.items():
        assert table.equals(other.tables[name], check_metadata=True), name
    assert one.timed == other.timed
    assert one.manifest == other.manifest
