"""Commands on files of judgments: check and convert."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.data.check import Survey, Tally
    from kedge.data.convert import Conversion

WATCHED = 20_000_000  # bytes; smaller files are read before anyone wonders
EVERY = 1000

Judged = Annotated[
    Path, typer.Argument(metavar="FILE", help="JSONL, Parquet, CSV, or a folder of datasets.", show_default=False)
]


def check(
    file: Judged,
    max_shown: Annotated[int, typer.Option("--max-shown", min=0, help="Problems to print row by row.")] = 20,
    rejects: Annotated[
        Path | None, typer.Option("--rejects", metavar="OUT", help="Write every rejected row's problem as JSONL.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Read every row of a file of judgments; say what it holds and which rows cannot be used, and why."""
    sound = False

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        nonlocal sound
        from kedge.data.check import survey

        with _watched("check", file, progress, interrupt) as step, _rejects(rejects) as reject:
            seen = survey(file, show=max_shown, reject=reject, step=step)
        sound = seen.sound
        return _summary(seen) | {"rejects": rejects, "lines": _told(seen, rejects)}

    execute(work, as_json=as_json)
    return 0 if sound else InputError.exit_code


def convert(
    file: Judged,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl, .parquet or .csv.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="trl|canonical", help="The columns to write.")] = "trl",
    as_kind: Annotated[
        str | None, typer.Option("--as", metavar="pairs", help="Make pairs of rankings, ratings or verdicts.")
    ] = None,
    max_rejected: Annotated[
        float, typer.Option("--max-rejected", min=0, max=1, help="Share of malformed rows to leave out.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Write the judgments of a file in the columns of TRL, or as the canonical table."""
    from kedge.data.convert import TARGETS

    if to not in TARGETS:
        raise InputError(Problem(f"--to {to}", "is not known", f"use {' or '.join(TARGETS)}"))
    if as_kind not in (None, "pairs"):
        raise InputError(Problem(f"--as {as_kind}", "is not known", "use pairs, or leave it away"))

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.data.check import survey
        from kedge.data.convert import convert
        from kedge.data.files import refuse_taken

        refuse_taken(out)
        with _watched("check", file, progress, interrupt) as step:
            seen = survey(file, show=5, step=step)
        done = convert(
            seen,
            out,
            to=to,
            pairs=as_kind == "pairs",
            max_rejected=max_rejected,
            watch=lambda name: _watched(name, file, progress, interrupt),
        )
        counts = {"rows": seen.rows, "rejected": seen.rejected, "written": done.written}
        left = {"left_out": done.left_out, "unsaid": done.unsaid}
        return {"out": out, **counts, **left, "lines": _converted(seen, done, out)}

    execute(work, as_json=as_json)


@contextmanager
def _watched(name: str, file: Path, progress: Progress, interrupt: Interrupt) -> Iterator[Callable[[int], None] | None]:
    """What to call with each line number: it shows progress if the file is large, and stops where that is asked."""
    from kedge.data.files import lines_at_most

    held = [file] if file.is_file() else file.rglob("*")
    large = sum(part.stat().st_size for part in held if part.is_file()) > WATCHED
    total = lines_at_most(file) if large else 0
    with ExitStack() as stack:
        stage = stack.enter_context(progress.stage(name, total)) if total else None

        def step(number: int) -> None:
            if interrupt.requested:
                raise Interrupted(f"{file}:{number}", "nothing is written; run the same command again")
            if stage is not None and number % EVERY == 0:
                stage.advance(number - 1)

        yield step
        if stage is not None:
            stage.advance(total - 1)


@contextmanager
def _rejects(path: Path | None) -> Iterator[Callable[[Problem], None] | None]:
    """What to call with each problem; it is written as one line of `path`, which is new."""
    if path is None:
        yield None
        return
    from kedge.data.files import new_file

    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def reject(problem: Problem) -> None:
            file.write(json.dumps(vars(problem)) + "\n")

        yield reject


def _summary(seen: Survey) -> dict[str, Any]:
    """The survey as JSON holds it."""
    counts = {"file": seen.path, "rows": seen.rows, "usable": seen.usable, "rejected": seen.rejected}
    tallies = {name: _tallies(getattr(seen, name)) for name in ("kinds", "forms", "reasons")}
    return counts | tallies | {"holds": dict(seen.holds), "problems": [vars(problem) for problem in seen.problems]}


def _tallies(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {name: {"rows": tally.rows, "first": tally.first} for name, tally in tallies.items()}


def _told(seen: Survey, rejects: Path | None) -> list[str]:
    """The survey for people."""
    from kedge.data.validate import share_to_allow

    lines = [f"{seen.path}: {seen.rows} rows, {seen.usable} usable, {seen.rejected} rejected"]
    lines += [f"{name}: {_counted(getattr(seen, name))}" for name in ("kinds", "forms") if getattr(seen, name)]
    if seen.holds:
        lines.append("holds: " + ", ".join(f"{name} {rows}" for name, rows in seen.holds.most_common()))
    if len(seen.kinds) > 1:
        lines.append("a file holds one kind: split it")
    if seen.rejected:
        lines.append("rejected, by reason:")
        ranked = sorted(seen.reasons.items(), key=lambda entry: -entry[1].rows)
        lines += [f"  {tally.rows:>7}  {reason} (first at {tally.first})" for reason, tally in ranked]
        lines += [str(problem) for problem in seen.problems]
        more = seen.rejected - len(seen.problems)
        lines += [f"and {more} more: see --max-shown and --rejects"] if more else []
        if seen.usable:
            share = share_to_allow(seen.rejected, seen.rows)
            lines.append(f"to use the others: data.max_rejected = {share} in a recipe, convert --max-rejected {share}")
    return [*lines, *([f"problems: {rejects}"] if rejects else [])]


def _counted(tallies: dict[str, Tally]) -> str:
    if len(tallies) == 1:
        return next(f"{name} {tally.rows}" for name, tally in tallies.items())
    return ", ".join(f"{name} {tally.rows} (first at {tally.first})" for name, tally in tallies.items())


def _converted(seen: Survey, done: Conversion, out: Path) -> list[str]:
    lines = [f"{out}: {done.written} rows written, of {seen.usable} usable in {seen.path}"]
    if seen.rejected:
        lines.append(f"left out, {seen.rejected} rows: malformed (kedge data check says why)")
    lines += [f"left out, {rows} rows: {reason}" for reason, rows in done.left_out.items() if rows]
    unsaid = [(name, rows) for name, rows in done.unsaid.items() if rows]
    return lines + [f"not written, {name} of {rows} rows: TRL reads no such column" for name, rows in unsaid]
