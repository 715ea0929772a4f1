"""`kedge label`: what people say of a run's responses, joined to its trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.trace.labels import Joined

SHOWN = 20  # rows that label nothing


def join(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Labels: CSV, JSONL or Parquet.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call them; the file's name if absent.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME[=AS]",
            help="Take only this column, under another name if given; repeatable.",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of labels of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Join a file of labels to the responses of a run, and say which rows found none."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:  # noqa: ARG001 (the shape execute wants)
        from kedge.trace.labels import match, refuse_taken, require_name, store
        from kedge.trace.reader import read_run

        run = read_run(folder)
        called = require_name(re.sub(r"[^\w-]+", "-", file.name.partition(".")[0]) if name is None else name)
        if not replace:
            refuse_taken(run, called)
        found = match(_rows(file), run, _columns(column))
        if not found.places:
            nothing = Problem(str(file), f"none of its {found.rows:,} rows labels a response; nothing is kept")
            raise InputError([*found.left[:SHOWN], nothing])
        kept = store(run, called, found, file)
        return _said(found, called, kept) | {"lines": _lines(found, called, kept)}

    execute(work, as_json=as_json)


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | Problem]]:
    from kedge.data.files import read_rows

    for number, row in read_rows(file):
        yield f"{file}:{number}", row


def _columns(given: list[str] | None) -> dict[str, str] | None:
    """Columns to take and their new names."""
    if not given:
        return None
    columns = {}
    for one in given:
        name, _, new = one.partition("=")
        columns[name] = new or name
    if len(set(columns.values())) < len(given):
        raise InputError(Problem("--column", "names something twice", "give every column its own name"))
    return columns


def _said(found: Joined, name: str, kept: Path) -> dict[str, Any]:
    return {
        "name": name,
        "rows": found.rows,
        "responses": len(found.places),
        "columns": list(found.columns),
        "left_out": [vars(problem) for problem in found.left],
        "repeated": found.repeated,
        "columns_left_out": dict(found.dropped),
        "matched_by": dict(found.ways),
        "file": str(kept),
    }


def _lines(found: Joined, name: str, kept: Path) -> list[str]:
    ways = ", ".join(f"{count:,} by {way}" for way, count in found.ways.items())
    lines = [
        f"{sum(found.ways.values()):,} of {found.rows:,} rows label {len(found.places):,} responses ({ways})",
        f"labels: {', '.join(found.columns)}",
    ]
    if found.repeated:
        lines.append(f"{found.repeated:,} rows say again what an earlier row said")
    lines += [f"column {column} is left out: it {why}" for column, why in found.dropped.items()]
    if found.left:
        lines.append(f"{len(found.left):,} rows label nothing:")
        lines += [f"  {problem}" for problem in found.left[:SHOWN]]
        if len(found.left) > SHOWN:
            lines.append(f"  and {len(found.left) - SHOWN:,} more; --json lists all")
    named = name if len(found.columns) == 1 else f"{name}.{next(iter(found.columns))}"
    return [*lines, f"kept in {kept}", f"next: kedge ledger {kept.parent.parent} --by label:{named}"]
