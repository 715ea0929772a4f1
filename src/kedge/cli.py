"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Results go to stdout, everything else to stderr. Exit codes are those of `kedge.errors`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge import __version__
from kedge.errors import InputError, Interrupted, KedgeError, Problem
from kedge.progress import Interrupt, Progress

STAGES = ("sft", "reward", "policy", "evaluate")
# Any of these in a folder says that a run of Kedge began there.
MARKS = ("manifest.json", "recipe.toml", "recipe.json", "drift")
EXTRAS = {"train": ("torch", "transformers", "tokenizers", "safetensors"), "hub": ("datasets", "peft")}
OS_REMEDIES = {
    errno.ENOSPC: "free some space, then go on with --resume",
    errno.EDQUOT: "free some of your quota, then go on with --resume",
    errno.EACCES: "change its permissions or choose another folder",
    errno.EPERM: "change its permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EEXIST: "choose a path whose parents are folders",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as a TOML file.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; runs/NAME of the recipe if absent.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as policy.kl.beta=0.1; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout.")]


@app.callback(invoke_without_command=True)
def kedge(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Reinforcement learning from human feedback that shows what moved the policy."""
    if version:
        typer.echo(f"kedge {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of both runs.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder of the two runs.")] = Path("runs/demo"),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Two short runs on the built-in support desk: one that drifts, and its correction."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge import pipeline

        _open_folder(out, resume=resume)
        return pipeline.demo(out, seed=seed, resume=resume, progress=progress, interrupt=interrupt)

    _execute(work, as_json=as_json)


@app.command()
def run(
    recipe: RecipeFile, out: Out = None, settings: Settings = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Run every stage of a recipe and write its report."""
    _run_stages(recipe, STAGES, out, settings, resume=resume, as_json=as_json)


@app.command()
def sft(
    recipe: RecipeFile, out: Out = None, settings: Settings = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Only supervised fine-tuning on the demonstrations."""
    _run_stages(recipe, ("sft",), out, settings, resume=resume, as_json=as_json)


@app.command()
def reward(
    recipe: RecipeFile, out: Out = None, settings: Settings = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Only the reward model; with --resume, from the supervised policy already in the folder."""
    _run_stages(recipe, ("reward",), out, settings, resume=resume, as_json=as_json)


@app.command()
def policy(
    recipe: RecipeFile, out: Out = None, settings: Settings = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Only PPO and its evaluation; with --resume, from the models already in the folder."""
    _run_stages(recipe, ("policy", "evaluate"), out, settings, resume=resume, as_json=as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file; RUN/report.html if absent.")
    ] = None,
) -> None:
    """Write the report of a run again, from its trace alone."""
    if not _holds_run(folder):
        raise InputError(Problem(str(folder), "there is no run of Kedge here", "give the folder that a run wrote"))
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--out {out}", "is not the name of an HTML file", "end it in .html"))
    from kedge.report.html import write_report

    typer.echo(str(write_report(folder, out)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code; raises nothing."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    problems: Sequence[Problem]
    try:
        status = app(args=arguments, prog_name="kedge", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # Whoever read our output has stopped, as in `kedge --help | head`; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        problems, code = _explained(error, arguments)
        if os.environ.get("KEDGE_DEBUG"):
            traceback.print_exc()
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if "--json" in arguments:
        typer.echo(json.dumps({"error": [vars(problem) for problem in problems], "exit_code": code}))
    return code


def _run_stages(
    path: Path, stages: tuple[str, ...], out: Path | None, settings: list[str] | None, *, resume: bool, as_json: bool
) -> None:
    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge import recipe

        loaded = recipe.load(path, settings or ())
        if missing := recipe.missing_files(loaded, str(path)):
            raise InputError(missing)
        from kedge import pipeline

        folder = Path("runs") / loaded.name if out is None else out
        _open_folder(folder, resume=resume)
        text = path.read_text(encoding="utf-8-sig")
        result = pipeline.run(
            loaded, folder, recipe_text=text, stages=stages, resume=resume, progress=progress, interrupt=interrupt
        )
        return result | ({"lines": pipeline.lines(loaded.name, result)} if "proxy" in result else {})

    _execute(work, as_json=as_json)


def _execute(work: Callable[[Progress, Interrupt], dict[str, Any]], *, as_json: bool) -> None:
    """Do the work with progress on stderr, then print its result on stdout."""
    progress = Progress(quiet=as_json and not sys.stderr.isatty())
    # Libraries print now and then; stdout is for the result alone.
    try:
        with redirect_stdout(sys.stderr), Interrupt().listening() as interrupt:
            result = dict(work(progress, interrupt))
    except KeyboardInterrupt:
        raise Interrupted("kedge") from None
    lines = result.pop("lines", None)
    if as_json:
        typer.echo(json.dumps(_plain(result), allow_nan=False))
        return
    for line in lines or [f"{name}: {_shown(value)}" for name, value in result.items() if name != "report"]:
        typer.echo(line)
    if result.get("report"):
        typer.echo(f"report: {result['report']}")


def _shown(value: Any) -> str:
    """A figure, or one at the reference, at its best and at the end, for people."""
    if isinstance(value, (list, tuple)):
        return " -> ".join(map(_shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _open_folder(out: Path, *, resume: bool) -> None:
    """Make the folder of a run; refuse to write into what is already there, unless it is a run to go on with."""
    if out.exists() and not out.is_dir():
        raise InputError(Problem(str(out), "is a file, not a folder", "choose another --out"))
    if out.is_dir() and any(not entry.name.endswith(".tmp") for entry in out.iterdir()):
        if not resume:
            remedy = "choose another --out, or go on with the run in it with --resume"
            raise InputError(Problem(str(out), "is not empty, and nothing is overwritten", remedy))
        if not _holds_run(out):
            raise InputError(Problem(str(out), "holds files but no run of Kedge to resume", "choose another --out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made: {(error.strerror or str(error)).lower()}"
        raise InputError(Problem(str(out), what, OS_REMEDIES.get(error.errno or 0, "choose another --out"))) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(Problem(str(out), "cannot be written", "change its permissions or choose another --out"))


def _holds_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, numbers of any library as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _explained(error: Exception, arguments: Sequence[str]) -> tuple[Sequence[Problem], int]:
    """What to tell the user about `error`, and the exit code."""
    if isinstance(error, KedgeError):
        return getattr(error, "problems", (Problem("training", str(error)),)), error.exit_code
    if isinstance(error, typer.BadParameter.__bases__):  # every usage error, wherever typer keeps its class
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "kedge"
        what = " ".join(str(error.format_message()).split()).rstrip(".")  # type: ignore[attr-defined]
        return [Problem(command, what, f"see {command} --help")], InputError.exit_code
    problem = _missing_package(error) or _refused_by_system(error) or _out_of_memory(error)
    if problem is not None:
        return [problem], InputError.exit_code
    kind = f"{type(error).__name__}: {error}".splitlines()[0]
    remedy = f"please report it with the traceback in {_saved_traceback(error, arguments)}"
    return [Problem("kedge", f"this is a bug in Kedge ({kind})", remedy)], 1


def _missing_package(error: Exception) -> Problem | None:
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").split(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None:
        return None
    return Problem(package, "is not installed, and this command needs it", f"pip install 'kedge[{extra}]'")


def _refused_by_system(error: Exception) -> Problem | None:
    number = error.errno if isinstance(error, OSError) else None
    if "No space left on device" in str(error) or "os error 28" in str(error):  # libraries in Rust raise their own type
        number = errno.ENOSPC
    if number not in OS_REMEDIES:
        return None
    where = getattr(error, "filename", None) or "writing the run"
    return Problem(str(where), os.strerror(number).lower(), OS_REMEDIES[number])


def _out_of_memory(error: Exception) -> Problem | None:
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        remedy = "lower policy.microbatch, or the batch sizes of sft and reward, then go on with --resume"
        return Problem("memory", "there is not enough", remedy)
    return None


def _saved_traceback(error: Exception, arguments: Sequence[str]) -> str:
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", prefix="kedge-error-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(f"kedge {__version__}, Python {sys.version.split()[0]}, {' '.join(arguments)}\n{text}")
    return file.name


if __name__ == "__main__":
    sys.exit(main())
