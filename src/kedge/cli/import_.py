"""`kedge import`: the rollouts that another trainer left on disk, as a run that every command reads."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.importers import Answers, Format, Intake, Question
    from kedge.trace.foreign import Conventions, Rows

SOON = 1.0  # seconds without a word
LARGE = 20_000_000  # bytes; less is read before anyone wonders
TEXT = ("full", "hashed", "none")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder of rollouts.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="A new folder.", show_default=False)],
    format_: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="The format, where it is not recognised.")
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            "--answer", metavar="KEY=VALUE", help="What the files cannot tell; repeatable.", show_default=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Take the stated default of every open question.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="A Hugging Face folder, to count tokens of text.")
    ] = None,
    text: Annotated[str, typer.Option("--text", metavar="full|hashed|none", help="What to keep of the text.")] = "full",
    as_json: Json = False,
) -> None:
    """Write the rollouts that another trainer left on disk as a run, which every other command reads."""
    from kedge.importers.answers import complete, given
    from kedge.importers.recognise import format_of

    if text not in TEXT:
        raise InputError(Problem(f"--text {text}", "is not known", f"use {', '.join(TEXT)}"))
    _refuse_taken(out)
    known = format_of(path, format_)
    answers = complete(
        known,
        given(answer or [], known),
        known.told(path),
        _ask if _at_a_terminal() and not as_json else None,
        defaults=yes,
    )
    tokens = _Tokens(tokenizer) if tokenizer is not None else None

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.importers import Intake

        conventions = known.conventions(path, answers)
        if known.text_only(path):
            conventions = replace(conventions, positions="tokens" if tokens else "words")
        with _watched(progress, interrupt) as watch:
            intake = Intake(tokenise=tokens.encode if tokens else None, watch=watch)
            rows = (tokens.with_text(step) if tokens else step for step in known.read(path, answers, intake))
            if _size(path) > LARGE:
                progress.note(f"reading {path} as {known.title}")
            written = _write(_counted(rows, path, intake), out, conventions, text, interrupt)
        if not written:
            raise InputError(_nothing(path, intake))
        return _told(path, out, known, conventions, answers, intake, written)

    execute(work, as_json=as_json)


def _write(steps: Iterator[Rows], out: Path, conventions: Conventions, text: Any, interrupt: Interrupt) -> int:
    """Write the run beside its place and put it there when it is whole; returns the rows written.

    Nothing is left behind where reading fails or is stopped.
    """
    from kedge.trace.recorder import Recorder

    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    written = 0
    try:
        with Recorder(place, conventions, name=out.name, text=text, settings=_settings(conventions)) as recorder:
            for rows in steps:
                if interrupt.requested:
                    raise Interrupted("kedge import", "nothing is written; run the same command again")
                recorder.step(rows)
                written += len(rows.response_mask)
        if written:
            place.chmod(0o755)  # a temporary folder is its owner's alone
            place.replace(out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return written


def _counted(steps: Iterator[Rows], path: Path, intake: Intake) -> Iterator[Rows]:
    """The steps; of a single large file, how many of its rows are read is shown."""
    from kedge.data.files import lines_at_most

    total = lines_at_most(path) if path.is_file() and _size(path) > LARGE else 0
    for rows in steps:
        yield rows
        if total and intake.watch is not None:
            intake.watch(min(intake.rows, total), total)


def _size(path: Path) -> int:
    """Bytes at a path."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(one.stat().st_size for one in files if one.is_file())


def _settings(conventions: Conventions) -> dict[str, Any]:
    """What is known of the settings, in the shape of a recipe."""
    beta = conventions.beta
    return {"policy": {"kl": {"beta": beta}}} if beta == beta else {}


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(Problem(f"--out {out}", "is already there, and nothing is overwritten", "choose another name"))


def _nothing(path: Path, intake: Intake) -> Problem:
    reasons = "; ".join(f"{reason} (first at {left.first})" for reason, left in intake.left_out.items())
    return Problem(str(path), f"no row of {intake.rows} can be used", reasons or "the files are empty")


class _Tokens:
    """A tokenizer of a local folder: text to ids, and back."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if not file.is_file():
            what = "there is no tokenizer.json in it" if folder.is_dir() else "there is no such folder"
            raise InputError(Problem(f"--tokenizer {folder}", what, "give the Hugging Face folder of the policy"))
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            what = f"cannot be read: {str(error).splitlines()[0]}"
            raise InputError(Problem(str(file), what, "take it from the policy's folder again")) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added at its ends."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def with_text(self, rows: Rows) -> Rows:
        """The rows, with texts decoded where they hold token ids alone."""
        import numpy as np

        changes: dict[str, Any] = {}
        if rows.responses is None and rows.response_ids is not None:
            mask = np.asarray(rows.response_mask, bool)
            through = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
            changes["responses"] = self._decoded(rows.response_ids, through)
        if rows.prompts is None and rows.prompt_ids is not None:
            mask = np.ones_like(rows.prompt_ids, bool) if rows.prompt_mask is None else rows.prompt_mask
            changes["prompts"] = self._decoded(rows.prompt_ids, mask)
        return replace(rows, **changes) if changes else rows

    def _decoded(self, ids: Any, mask: Any) -> list[str]:
        return [self._tokenizer.decode(row[keep].tolist()) for row, keep in zip(ids, mask.astype(bool), strict=True)]


@contextmanager
def _watched(progress: Progress, interrupt: Interrupt) -> Iterator[Callable[[int, int], None]]:
    """What to call with the files read: it stops where that is asked, and shows progress if it takes a while."""
    began = time.monotonic()
    with ExitStack() as stack:
        stage: Any = None

        def step(done: int, total: int) -> None:
            nonlocal stage
            if interrupt.requested:
                raise Interrupted("kedge import", "nothing is written; run the same command again")
            if stage is None and time.monotonic() - began > SOON:
                stage = stack.enter_context(progress.stage("import", total, start=done - 1))
            if stage is not None:
                stage.advance(done - 1)

        yield step


# What is asked


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _ask(question: Question) -> str:
    """The answer typed at the terminal; asked again until it can be used."""
    from kedge.importers.answers import fault

    typer.echo(f"\n{question.text}\n  It matters: {question.why}.", err=True)
    for name, meaning in question.choices.items():
        typer.echo(f"  {name:<24} {meaning}", err=True)
    while True:
        value = str(typer.prompt(question.key, default=question.default, err=True)).strip()
        wrong = fault(question, value)
        if wrong is None:
            return value
        typer.echo(f"{value!r} {wrong[0]}: {wrong[1]}", err=True)


# What is said


def _told(
    path: Path,
    out: Path,
    known: Format,
    conventions: Conventions,
    answers: Answers,
    intake: Intake,
    written: int,
) -> dict[str, Any]:
    """The result for people and as JSON; the run is read back, which checks every digest."""
    from kedge.diagnose.checks import possible
    from kedge.diagnose.diagnosis import read_view
    from kedge.diagnose.needs import SOURCES
    from kedge.report.import_text import stated, table_lines
    from kedge.trace.reader import read_run

    run = read_run(out)
    view, _ = read_view(out, frozenset({"prompt_mix"}))  # the one check that looks for prompts
    table = possible(view)
    present = [name for name in SOURCES if name not in view.absent | view.lacks]
    meant = stated(conventions)
    steps = run.steps()
    lines = [
        f"{out}: {written} rows in {len(steps)} steps ({steps[0]} to {steps[-1]}), from {path}",
        f"format: {known.title} ({known.name})",
        *(f"{name}: {value}" for name, value in meant.items()),
        f"answers: {', '.join(f'{key}={value}' for key, value in answers.items()) or 'none were needed'}",
        f"rows read: {intake.rows}",
        *(f"left out, {one.rows} rows: {reason} (first at {one.first})" for reason, one in intake.left_out.items()),
        *(f"note: {note}" for note in intake.notes),
        *table_lines([SOURCES[name] for name in present], table),
        f"next: kedge diagnose {out}",
    ]
    return {
        "out": out,
        "format": known.name,
        "conventions": meant,
        "answers": dict(answers),
        "rows": intake.rows,
        "written": written,
        "steps": list(steps),
        "left_out": {reason: vars(one) for reason, one in intake.left_out.items()},
        "notes": intake.notes,
        "present": present,
        "checks": [{"name": one.name, "possible": not lacking, "lacks": list(lacking)} for one, lacking in table],
        "lines": lines,
    }
