"""The command line: exit codes, one-line errors, JSON last on stdout, nothing overwritten, a quick start."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import kedge
from kedge import cli
from kedge.errors import DivergenceError, InputError, Interrupted, Problem

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "pyarrow",
    "scipy",
    "numpy",
    "jinja2",
    "datasets",
    "peft",
    "safetensors",
    "tokenizers",
)


class Stub:
    """Stands in for `kedge.pipeline`: remembers how it was called, returns or raises what it is told to."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []
        self.result: dict[str, Any] = {"score": 1.5, "report": Path("r.html")}
        self.act: Any = lambda call: None

    def run(self, recipe: Any, out: Path, **named: Any) -> dict[str, Any]:
        return self._called(SimpleNamespace(recipe=recipe, out=out, **named))

    def demo(self, out: Path, **named: Any) -> dict[str, Any]:
        return self._called(SimpleNamespace(out=out, **named))

    def _called(self, call: SimpleNamespace) -> dict[str, Any]:
        self.calls.append(call)
        self.act(call)
        return self.result


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(kedge, "pipeline", stub, raising=False)
    monkeypatch.setitem(sys.modules, "kedge.pipeline", stub)
    return stub


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n')
    return path


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The error lines on stderr, which hold no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = text.splitlines()
    assert all(line.startswith("error: ") for line in lines), text
    return lines


# Calls


def test_run_calls_every_stage(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(recipe), "--set", "policy.steps=3", "--set", "seed=7"]) == 0
    (call,) = pipeline.calls
    assert (call.recipe.policy.steps, call.recipe.seed) == (3, 7)
    assert call.out == Path("runs/mine")
    assert call.out.is_dir()
    assert call.stages == ("sft", "reward", "policy", "evaluate")
    assert call.recipe_text == 'name = "mine"\n'
    assert call.resume is False
    assert capsys.readouterr().out == "score: 1.500\nreport: r.html\n"


@pytest.mark.parametrize(
    ("command", "stages"), [("sft", ("sft",)), ("reward", ("reward",)), ("policy", ("policy", "evaluate"))]
)
def test_a_stage_alone(pipeline: Stub, recipe: Path, command: str, stages: tuple[str, ...]) -> None:
    assert cli.main([command, str(recipe), "--out", "elsewhere"]) == 0
    assert pipeline.calls[0].stages == stages
    assert pipeline.calls[0].out == Path("elsewhere")


def test_the_stages_are_those_of_the_pipeline() -> None:
    from kedge import pipeline

    assert pipeline.STAGES == cli.runs.STAGES


def test_demo_prints_its_lines_and_the_report(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.result = {"drift": {}, "lines": ["one", "two"], "report": "d/report.html"}
    assert cli.main(["demo", "--seed", "3", "--out", "d"]) == 0
    assert pipeline.calls[0].seed == 3
    assert pipeline.calls[0].out == Path("d")
    assert capsys.readouterr().out == "one\ntwo\nreport: d/report.html\n"


def test_json_is_one_object_and_all_that_stdout_holds(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy = pytest.importorskip("numpy")
    pipeline.result = {
        "drift": {"gold": [numpy.float32(0.5), float("nan")], "kl": (1, 2.5)}, "run_dir": Path("d"), "lines": ["one"],
    }  # fmt: skip
    pipeline.act = lambda call: (print("a library says something"), call.progress.note("a note"))
    assert cli.main(["demo", "--out", "d", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"drift": {"gold": [0.5, None], "kl": [1, 2.5]}, "run_dir": "d"}
    assert captured.out.count("\n") == 1
    assert captured.err == "a library says something\n", "progress is quiet where no terminal shows it"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kedge {kedge.__version__}\n"
    for arguments in ([], ["--help"], ["-h"], ["run", "--help"]):
        assert cli.main(arguments) == 0
        assert "Usage: kedge" in capsys.readouterr().out


# Folders


def test_a_folder_with_something_in_it_is_left_alone(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("d").mkdir()
    Path("d/notes.txt").write_text("mine")
    for arguments in (["run", str(recipe)], ["demo"]):
        assert cli.main([*arguments, "--out", "d"]) == 2
        assert "nothing is overwritten" in errors(capsys)[0]
        assert cli.main([*arguments, "--out", "d", "--resume"]) == 2
        assert "no run of Kedge" in errors(capsys)[0]
    assert pipeline.calls == []
    assert [path.name for path in Path("d").iterdir()] == ["notes.txt"]


def test_resume_goes_on_with_a_run_and_begins_where_there_is_none(pipeline: Stub, recipe: Path) -> None:
    assert cli.main(["run", str(recipe), "--out", "new", "--resume"]) == 0
    Path("new/manifest.json").touch()
    assert cli.main(["run", str(recipe), "--out", "new", "--resume"]) == 0
    assert [call.resume for call in pipeline.calls] == [True, True]


def test_a_file_is_no_folder(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").touch()
    assert cli.main(["demo", "--out", "d"]) == 2
    assert errors(capsys) == ["error: d: is a file, not a folder -> choose another --out"]
    assert cli.main(["demo", "--out", "d/below"]) == 2
    assert "not a directory" in errors(capsys)[0]


def test_a_folder_that_cannot_be_written(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.access("/proc/version", os.F_OK):  # nobody can make a folder there, root included
        assert cli.main(["demo", "--out", "/proc/kedge"]) == 2
        capsys.readouterr()
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    assert cli.main(["demo", "--out", "d"]) == 2
    assert "cannot be written" in errors(capsys)[0]
    assert pipeline.calls == []


def test_a_bad_recipe_makes_no_folder(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(recipe), "--set", "policy.stpes=1", "--set", "seed=-1"]) == 2
    assert len(errors(capsys)) == 2
    assert not Path("runs").exists()


def test_files_that_a_recipe_names_are_looked_for_first(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text('world = "files"\n[data]\npreferences = "p.csv"\ndemonstrations = "d.csv"\n')
    assert cli.main(["run", str(recipe)]) == 2
    assert len(errors(capsys)) == 2
    assert pipeline.calls == []


# What goes wrong


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError(Problem("d.csv:3", "no prompt", "add one")), 2, "error: d.csv:3: no prompt -> add one"),
        (DivergenceError("loss is nan"), 3, "error: training: loss is nan"),
        (Interrupted("policy step 3"), 130, "error: policy step 3: stopped on request -> run the same command with"),
        (KeyboardInterrupt(), 130, "error: kedge: stopped on request -> run the same command with --resume"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "error: x/y: no space left on device -> free"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: permission denied -> change"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: writing the run: no space"),
        (MemoryError(), 2, "error: memory: there is not enough -> lower policy.microbatch"),
        (ModuleNotFoundError("no", name="torch.nn"), 2, "error: torch: is not installed"),
        (ModuleNotFoundError("no", name="datasets"), 2, "error: datasets: is not installed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_expected_failure_is_one_line(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def fail(call: object) -> None:
        raise error

    pipeline.act = fail
    assert cli.main(["demo", "--out", "a"]) == code
    (shown,) = errors(capsys)
    assert shown.startswith(line)
    assert cli.main(["demo", "--out", "b", "--json"]) == code
    (told,) = capsys.readouterr().out.splitlines()
    assert json.loads(told)["exit_code"] == code
    (problem,) = json.loads(told)["error"]
    assert shown == f"error: {Problem(**problem)}"


def test_a_bug_says_so_and_keeps_the_traceback(
    pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(recipe.parent))
    pipeline.act = lambda call: {}["absent"]
    assert cli.main(["demo", "--out", "a"]) == 1
    (line,) = errors(capsys)
    log = re.search(r"bug in Kedge \(KeyError in \w+\.py:\d+\).* (\S+\.log)$", line)
    assert log is not None and "absent" not in line, "what an error says may be a text of the run"
    assert "Traceback" in Path(log[1]).read_text() and "'absent'" in Path(log[1]).read_text()
    monkeypatch.setenv("KEDGE_DEBUG", "1")
    assert cli.main(["demo", "--out", "b"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["run"], ["--bogus"], ["demo", "--seed", "x"], ["demo", "--seed", "-1"], ["demo", "extra"], ["sft"]],
)
def test_wrong_usage_is_one_line(pipeline: Stub, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    (line,) = errors(capsys)
    assert "--help" in line
    assert cli.main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 2
    assert pipeline.calls == []


def test_ctrl_c_lets_the_step_finish(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = []

    def interrupted(call: SimpleNamespace) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        finished.append(True)
        call.interrupt.check("policy step 3")

    pipeline.act = interrupted
    assert cli.main(["demo", "--out", "a"]) == 130
    assert finished == [True]
    assert "policy step 3" in errors(capsys)[0]


def test_a_second_ctrl_c_stops_at_once(pipeline: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stubborn(call: SimpleNamespace) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one did not stop it")

    pipeline.act = stubborn
    assert cli.main(["demo", "--out", "a"]) == 130
    assert len(errors(capsys)) == 1


@pytest.mark.parametrize("arguments", [["report", "absent"], ["report", "."], ["report", "run", "--out", "data.csv"]])
def test_report_refuses(recipe: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/manifest.json").touch()
    recipe.unlink()
    assert cli.main(arguments) == 2
    assert len(errors(capsys)) == 1


# A process of its own


def spawned(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys\n{code}\nfrom kedge.cli import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kedge.cli", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported, "the list of imports was not understood"
    assert imported.isdisjoint(HEAVY)


def test_help_is_quick() -> None:
    """Processor time, the best of three: what else runs on the machine hardly counts."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kedge.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_without_pytorch_training_says_what_to_install(recipe: Path) -> None:
    done = spawned("run", str(recipe), code="sys.modules['torch'] = None")
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: torch: is not installed, and this command needs it -> pip install 'kedge[train]'\n"


def test_a_reader_that_stops_is_no_error() -> None:
    command = f"{sys.executable} -m kedge.cli --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# Documentation


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = dict(_commands(typer.main.get_command(cli.app)))
    documented = {tuple(row) for row in re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", text, flags=re.MULTILINE)}
    pairs = {(option, name) for option, names in documented for name in re.findall(r"`([\w ]+)`", names)}
    expected = {
        (option, name)
        for name, command in commands.items()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert pairs == expected
    listed = re.findall(r"^\| `kedge ([a-z ]+?)(?: [A-Z ]+)?(?: --[^`]+)?`", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(commands)


def _commands(group: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by what is typed; `train` of a reward model is what `kedge reward` does by itself."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{start}{name} ")
        else:
            yield f"{start}{name}".removesuffix(" train"), command
