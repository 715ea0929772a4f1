"""A diagnosis as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kedge.diagnose.changes import Change
from kedge.diagnose.diagnosis import ALARMS, Diagnosis
from kedge.diagnose.finding import Status
from kedge.diagnose.prose import Cause, Prose, evidence_line
from kedge.diagnose.trials import MANY, conclusions

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100
_TONES = {"fail": "bold red", "warn": "yellow", "ok": "green", "not_checked": "bright_black"}
_EVIDENCE = 4  # numbers shown of a finding; the page and --json have all


def lines(
    found: Diagnosis, said: Prose, *, command: str | None = None, width: int = WIDTH, colour: bool = False
) -> list[str]:
    """What was found, most likely first, why the penalty did not stop it, what would, and what was not checked.

    `command` tries the proposals that have not been tried.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=min(width, WIDTH), force_terminal=colour, highlight=False)
    for part in _parts(found, said, command):
        console.print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def _parts(found: Diagnosis, said: Prose, command: str | None) -> Iterator[RenderableType]:
    from rich.text import Text

    span = "" if found.steps is None else f", policy steps {found.steps[0]} to {found.steps[1]}"
    counts = [(len(found.of(status)), word) for status, word in _WORDS.items()]
    yield Text(f"{found.run}{span}: " + ", ".join(f"{number} {word}" for number, word in counts if number))
    yield Text(f"\n{said.verdict}", "bold")
    yield from _section("What is happening", said.happening)
    for cause in said.causes:
        yield from _cause(cause)
    if found.of(*ALARMS):
        yield from _section("Why the KL penalty did not stop it", said.penalty)
    if said.changes:
        yield Text("\nWhat would change it", "bold")
        for number, change in enumerate(said.changes, start=1):
            yield from _change(number, change, said.contrast.subject)
        if command is not None:
            yield _indented(f"To try what has not been tried: {command}")
        if any(change.tried for change in said.changes):
            yield _indented(MANY)
        for sentence in said.beyond:
            yield _indented(f"Beyond settings: {_ended(sentence)}")
    passed = ", ".join(one.check for one in found.of("ok"))
    if passed:
        yield Text("\nNothing found by", "bold")
        yield _indented(passed)
    missing = found.of("not_checked")
    if missing:
        yield Text("\nNot checked", "bold")
        for one in missing:
            yield _indented(f"{one.check}: {one.summary}")
    for note in found.notes:
        yield Text(f"\n{note}")


_WORDS: dict[Status, str] = {"fail": "failing", "warn": "warning", "ok": "ok", "not_checked": "not checked"}


def _section(title: str, sentences: Sequence[str]) -> Iterator[RenderableType]:
    from rich.text import Text

    if sentences:
        yield Text(f"\n{title}", "bold")
    for sentence in sentences:
        yield _indented(sentence)


def _cause(cause: Cause) -> Iterator[RenderableType]:
    from rich.text import Text

    one = cause.finding
    when = "" if one.onset is None else f", from step {one.onset}"
    head = Text(f"\n{one.status.upper()}", _TONES[one.status])
    head.append(f"  {cause.title} ({cause.check}, {one.strength:.2g} of its threshold{when})", "bold")
    yield head
    for sentence in cause.sentences:
        yield _indented(sentence)
    if cause.marked:
        yield _indented(f"{cause.marked[0].upper()}{cause.marked[1:]}.")
    for number in one.evidence[:_EVIDENCE]:
        yield _indented(evidence_line(number), 4)
    if cause.symptoms:
        yield _indented("It would explain:")
    for symptom in cause.symptoms:
        yield _indented(symptom, 4)
    if cause.refuted_by:
        yield _indented(f"What would speak against it: {cause.refuted_by}.")


def _change(number: int, change: Change, subject: str) -> Iterator[RenderableType]:
    yield _indented(f"{number}. {change.settings}")
    for sentence in (change.effect, change.reward, change.gradient):
        if sentence:
            yield _indented(_ended(sentence), 5)
    if change.cost:
        yield _indented(f"It costs: {_ended(change.cost)}", 5)
    if change.tried is None:
        yield _indented("Not tried yet: kedge trial measures it against unchanged forks.", 5)
    else:
        said, *rows = conclusions(change.tried, subject)
        yield _indented(said, 5)
        for row in rows:
            yield _indented(row, 7)


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _indented(text: str, by: int = 2) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text), (0, 0, 0, by))


def check_lines() -> list[str]:
    """Every check in a line: name, what it looks for, mechanisms, whether it has been validated."""
    from kedge.diagnose.checks import all_checks

    rows = [
        (one.name, one.title, ", ".join(one.mechanisms), "" if one.validated else "not validated")
        for one in all_checks()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


def check_page(name: str) -> list[str]:
    """The page of one check, as its module writes it."""
    from kedge.diagnose.checks import check_named, page

    check = check_named(name)
    state = "validated" if check.validated else "not validated"
    about = f"{check.name}: {check.title} ({check.kind.name.lower()}, {', '.join(check.mechanisms) or '–'}, {state})"
    return [about, "", *page(check).splitlines()]
