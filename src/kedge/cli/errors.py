"""What a user is told when something goes wrong, and the exit code."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from kedge import __version__
from kedge.errors import InputError, KedgeError, Problem
from kedge.trace.run_dir import NotARun

EXTRAS = {
    "audit": ("scipy", "krippendorff"),
    "train": ("torch", "transformers", "tokenizers", "safetensors", "httpx"),
    "hub": ("datasets", "peft"),
    "label": ("fastapi", "sqlalchemy", "uvicorn", "python_multipart"),
    "postgres": ("psycopg",),
}
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


def explained(error: Exception, arguments: Sequence[str]) -> tuple[Sequence[Problem], int]:
    """What to tell the user about `error`, and the exit code."""
    if isinstance(error, NotARun):
        return [_to_import(error)], error.exit_code
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
    # What an unforeseen error says may be a text of the run: it goes to a file that the user can look at first.
    kind = f"{type(error).__name__} in {_place(error)}"
    remedy = f"please report it, without texts of yours, with the traceback in {_saved_traceback(error, arguments)}"
    return [Problem("kedge", f"this is a bug in Kedge ({kind})", remedy)], 1


def _place(error: Exception) -> str:
    """The last line of Kedge's own that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "kedge" in Path(frame.filename).parts] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"


def _to_import(error: NotARun) -> Problem:
    """Where another trainer's files are taken for a run, what makes a run of them."""
    from kedge.importers.recognise import recognised

    found = recognised(error.path) if error.path.exists() else ()
    if not found:
        return error.problems[0]
    what = f"not a Kedge run, but {' or '.join(one.title for one in found)}"
    return Problem(str(error.path), what, f"run `kedge import {error.path} --out RUN`, then give RUN")


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
