"""`kedge verify`: does every optimiser reach, on this machine, what theory says it must?"""

from __future__ import annotations

import difflib
import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.experiment.verify.checks import Check, Row

WIDTH = 150  # characters of the table, at most
TITLES = {"optimiser": "Optimisers", "estimator": "KL in the reward or in the loss", "control": "Known to be wrong"}


def verify(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this row; may be repeated.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every optimiser on a task small enough to know the answer, and compare; about a minute."""
    passed = False

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        nonlocal passed
        import torch

        from kedge.experiment.verify.checks import CHECKS, verify

        chosen = _chosen(CHECKS, only or [])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
        rows: list[Row] = []
        try:
            with progress.stage("verify", len(chosen)) as stage:
                for row in verify(chosen):
                    rows.append(row)
                    stage.advance(len(rows) - 1, tv=row.tv)
                    if interrupt.requested:
                        raise Interrupted(f"after {row.name}", "run it again")
        finally:
            torch.set_num_threads(threads)
        passed = all(row.ok for row in rows)
        return {"rows": [asdict(row) for row in rows], "ok": passed, "lines": _shown(rows)}

    execute(work, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


def _chosen(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    """The checks of these names, or all; raises `InputError` where a name is of none."""
    known = [check.name for check in checks]
    unknown = [name for name in names if name not in known]
    if unknown:
        near = [difflib.get_close_matches(name, known, n=1) for name in unknown]
        remedies = [f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}" for close in near]
        what = "no row has this name"
        raise InputError([Problem(f"--only {n}", what, remedy) for n, remedy in zip(unknown, remedies, strict=True)])
    return [check for check in checks if not names or check.name in names]


def _shown(rows: Sequence[Row]) -> list[str]:
    """A table for each kind of row, and the result in a sentence."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    on_terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    console = Console(file=out, force_terminal=on_terminal, width=width)
    for kind, title in TITLES.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("row", no_wrap=True)
        table.add_column("what it is")
        table.add_column("must end at")
        for heading in ("TV", "objective gap", "KL", "KL gap"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for row in of_kind:
            figures = [f"{row.tv:.4f}", f"{row.objective_gap:.5f}", f"{row.kl:.3f}", f"{row.kl_gap:.3f}"]
            mark = Text("ok", "green") if row.ok else Text("FAIL", "bold red")
            texts = (row.name, row.what, row.expected)
            table.add_row(*map(Text, texts), *figures, mark)
        console.print(table)
    failed = [row.name for row in rows if not row.ok]
    console.print(
        "TV: total variation from the optimum. Objective gap: what is missing of its largest value. KL: nats."
    )
    console.print("Rows known to be wrong are ok when they miss the optimum.")
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} rows as they must be" + "".join(f", not {n}" for n in failed)
    )
    return out.getvalue().rstrip().splitlines()
