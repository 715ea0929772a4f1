"""Doing a command's work and printing what came of it: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from kedge.errors import Interrupted
from kedge.progress import Interrupt, Progress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout.")]


def execute(work: Callable[[Progress, Interrupt], dict[str, Any]], *, as_json: bool) -> None:
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
        typer.echo(json.dumps(plain(result), allow_nan=False))
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


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, numbers of any library as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
