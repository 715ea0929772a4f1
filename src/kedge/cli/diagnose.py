"""`kedge diagnose` and `kedge checks`: what is wrong with a run, and what is looked for."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.diagnose.view import View

SOON = 1.0  # seconds without a word
FAILED = 1  # exit code where a check fails


def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.", show_default=False)],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The page; RUN/diagnosis.html if absent.")
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page.")] = False,
    since: Annotated[
        int, typer.Option("--since", metavar="STEP", min=0, help="Only what came after this many policy steps.")
    ] = 0,
    check: Annotated[
        list[str] | None,
        typer.Option("--check", metavar="NAME", help="Only this check; repeatable.", show_default=False),
    ] = None,
    ignore_recipe: Annotated[
        bool, typer.Option("--ignore-recipe", help="Judge by the trace alone, as if the recipe were not known.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Say what moved the policy: causes, most likely first, with the numbers, and what would change it."""
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--html {html}", "is not the name of an HTML file", "end it in .html"))
    if html is not None and no_html:
        raise InputError(Problem("--html", "and --no-html contradict each other", "give one of them"))
    failed = False

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        nonlocal failed
        from kedge.diagnose.diagnosis import diagnose, read_view, require_checks, with_notes
        from kedge.diagnose.prose import as_record, prose
        from kedge.diagnose.trials import read_trials, trial_command
        from kedge.report.diagnosis_text import lines

        names = require_checks(check) if check else None
        with _watched(progress, interrupt) as watch:
            view, notes = read_view(run, names, watch=watch)
        view = _narrowed(view, run, since, ignore_recipe=ignore_recipe)
        found = with_notes(diagnose(view, names), notes)
        said = prose(view, found, read_trials(run))
        failed = found.failed
        result = found.to_dict() | as_record(said)
        untried = [change.overrides for change in said.changes if change.tried is None]
        onset = None if found.first_alarm is None else found.first_alarm.onset
        command = trial_command(run, untried, onset)
        width = shutil.get_terminal_size((100, 24)).columns
        result |= {"lines": lines(found, said, command=command, width=width, colour=_terminal())}
        place = _page(run, html, wanted=not no_html)
        if place is not None:
            from kedge.report.diagnosis_page import write_diagnosis

            result["report"] = str(write_diagnosis(run, view, found, said, place))
        return result

    execute(work, as_json=as_json)
    return FAILED if failed else 0


def checks(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show the page of this check.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the checks, or show what one looks at, how, when it is wrong, and what helps."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:  # noqa: ARG001 (the shape execute wants)
        from kedge.diagnose.checks import all_checks, page
        from kedge.diagnose.diagnosis import require_checks
        from kedge.report.diagnosis_text import check_lines, check_page

        wanted = require_checks([name]) if name is not None else frozenset(one.name for one in all_checks())
        listed = [
            {
                "name": one.name,
                "title": one.title,
                "kind": one.kind.name.lower(),
                "mechanisms": list(one.mechanisms),
                "validated": one.validated,
                **({"page": page(one)} if name is not None else {}),
            }
            for one in all_checks()
            if one.name in wanted
        ]
        return {"checks": listed, "lines": check_lines() if name is None else check_page(name)}

    execute(work, as_json=as_json)


def _narrowed(view: View, run: Path, since: int, *, ignore_recipe: bool) -> View:
    """The view without what the user wants left out."""
    if ignore_recipe:
        view = view.without_settings()
    if not since:
        return view
    last = int(view.steps[-1]) if len(view.steps) else None
    if last is None or since > last:
        what = "the run holds no policy step" if last is None else f"the last policy step is {last}"
        raise InputError(Problem(f"--since {since}", f"{what}: {run}", "give an earlier step"))
    return view.since(since)


def _page(run: Path, html: Path | None, *, wanted: bool) -> Path | None:
    """Where the page goes; nowhere if the run's folder cannot be written and no other place was named."""
    if html is not None:
        if not html.parent.is_dir():
            raise InputError(Problem(f"--html {html}", "its folder is not there", "make the folder or choose another"))
        return html
    return run / "diagnosis.html" if wanted and os.access(run, os.W_OK | os.X_OK) else None


@contextmanager
def _watched(progress: Progress, interrupt: Interrupt) -> Iterator[Callable[[int, int], None]]:
    """What to call with the steps read: it stops where that is asked, and shows progress if reading takes a while."""
    began = time.monotonic()
    with ExitStack() as stack:
        stage: Any = None

        def step(done: int, total: int) -> None:
            nonlocal stage
            if interrupt.requested:
                raise Interrupted("kedge diagnose", "nothing is written; run the same command again")
            if stage is None and time.monotonic() - began > SOON:
                stage = stack.enter_context(progress.stage("diagnose", total, start=done - 1))
            if stage is not None:
                stage.advance(done - 1)

        yield step


def _terminal() -> bool:
    return sys.__stdout__ is not None and sys.__stdout__.isatty()
