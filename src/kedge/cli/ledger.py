"""`kedge ledger`: what the advantage of a run is made of, by group, and what its parts pushed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.diagnose.groups import Grouping
    from kedge.diagnose.phrases import PhraseTally
    from kedge.diagnose.push import Measure
    from kedge.trace.labels import Labels
    from kedge.trace.reader import Run

PHRASE_SIZES = range(1, 9)


def ledger(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="GROUP",
            help="style, tercile, position, time, phrase, feature:NAME or label:NAME; repeat it to cross groups.",
        ),
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            "--feature", metavar="NAME", help="A feature by name, a regular expression, or module:function; repeatable."
        ),
    ] = None,
    since: Annotated[int, typer.Option("--since", min=0, metavar="STEP", help="Leave out the steps before.")] = 0,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Every number: .csv, .parquet or .json.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with charts.")] = None,
    as_json: Json = False,
) -> None:
    """Say what the advantage was made of, by group, and what its parts pushed."""
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--html {html}", "is not the name of an HTML file", "end it in .html"))

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.diagnose.groups import crossed
        from kedge.diagnose.survey import survey
        from kedge.report import ledger_page
        from kedge.trace.labels import read_labels
        from kedge.trace.reader import read_run

        if export is not None:
            ledger_page.check_export(export)
        run = read_run(folder)
        steps = tuple(step for step in run.steps() if step >= since)
        labels = read_labels(run)
        names = list(dict.fromkeys(by or ()))
        phrases = _phrases([name for name in names if name.partition(":")[0] == "phrase"], run)
        cuts = _groupings([name for name in names if name.partition(":")[0] != "phrase"], run, steps, labels)

        def watch(numbers: Iterable[int]) -> Iterator[int]:
            with progress.stage("steps", len(steps)) as stage:
                for index, number in enumerate(numbers):
                    interrupt.check(f"step {number}")
                    yield number
                    stage.advance(index)

        found = survey(
            run,
            [one for one in cuts if not one.labels] + [crossed([one for one in cuts if one.labels])],
            _measures(feature, labels),
            phrases=phrases,
            since=since,
            watch=watch,
        )
        asked = any(name.startswith("label:") for name in (*names, *(feature or ())))
        notes = [*_of_labels(labels if asked else None, steps), *_of_phrases(phrases)]
        result: dict[str, Any] = ledger_page.as_json(found) | {"said": notes}
        result["lines"] = ledger_page.lines(found, run.name, notes)
        if export is not None:
            result["export"] = ledger_page.export(found, export)
        if html is not None:
            result["report"] = ledger_page.write_ledger(found, run.name, html, notes)
        return result

    execute(work, as_json=as_json)


def _groupings(names: list[str], run: Run, steps: tuple[int, ...], labels: Labels | None) -> list[Grouping]:
    from kedge.diagnose.groups import grouping_named

    return [grouping_named(name, run, steps, labels) for name in names]


def _phrases(names: list[str], run: Run) -> PhraseTally | None:
    from kedge.diagnose.phrases import SIZE, PhraseTally, vocabulary

    if not names:
        return None
    if len(names) > 1:
        raise InputError(Problem("--by phrase", "is there more than once", "give one length of phrases"))
    _, _, size = names[0].partition(":")
    if size and not (size.isdigit() and int(size) in PHRASE_SIZES):
        raise InputError(Problem(f"--by {names[0]}", "is no length of phrases", "write phrase:1 to phrase:8"))
    return PhraseTally(vocabulary(run), size=int(size or SIZE))


def _measures(names: list[str] | None, labels: Labels | None) -> list[Measure]:
    """What covariances are taken with: the features asked for, else all that Kedge knows by name."""
    from kedge.diagnose.features import FEATURES, feature_named
    from kedge.diagnose.push import Measure

    made = []
    for name in dict.fromkeys(names or FEATURES):
        kind, _, column = name.partition(":")
        if kind == "label" and column:
            if labels is None:
                raise InputError(Problem(f"--feature {name}", "the run has no labels", "kedge label join RUN FILE"))
            labels.known(column)
            made.append(Measure(name, "1", _of_column(labels, column)))
        else:
            feature = feature_named(name)
            made.append(Measure(feature.name, feature.unit, feature.of))
    return made


def _of_column(labels: Labels, column: str) -> Any:
    return lambda step: labels.numbers(step, column)


def _of_labels(labels: Labels | None, steps: tuple[int, ...]) -> list[str]:
    if labels is None:
        return []
    there = set(steps)
    return [
        f"labels/{one.name}: {len(one.places):,} responses have a label, "
        f"{sum(step in there for step, _ in one.places):,} of them in the steps read."
        for one in labels.sets
    ]


def _of_phrases(phrases: PhraseTally | None) -> list[str]:
    if phrases is None:
        return []
    said = []
    if phrases.unknown_steps:
        said.append(f"Phrases are not known on {phrases.unknown_steps} steps: the trace keeps no text.")
    if phrases.dropped:
        said.append(f"{phrases.dropped:,} phrases with the smallest sums were dropped on the way.")
    return said
