"""The figures of a judge as text, 80 columns wide."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kedge.evaluate.reward.accuracy import Agreement
from kedge.evaluate.reward.answers import NotChecked
from kedge.evaluate.reward.grades import Graded
from kedge.evaluate.reward.grid import STYLES, Grids
from kedge.evaluate.reward.measure import Ensemble, Measurement
from kedge.evaluate.reward.padding import Padding
from kedge.report.numbers import fixed, percent, plain, signed
from kedge.report.reward_words import PARTS, between, not_checked, sentences, to_digits

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
Rows = list[tuple[str, ...]]


def lines(found: Measurement) -> list[str]:
    """Tables, then what they mean, then what could not be checked."""
    from rich.console import Console
    from rich.padding import Padding as Indented
    from rich.text import Text

    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, force_terminal=False)
    console.print(Text(f"judge: {found.judge}"))
    for title, heads, rows in _tables(found):
        console.print(Text(f"\n{title}"))
        console.print(_table(heads, rows))
    for title, items in (("What it means", sentences(found)), ("Not checked", not_checked(found))):
        if items:
            console.print(Text(f"\n{title}"))
        for item in items:
            console.print(Indented(Text(item), (0, 0, 0, 2)))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _table(heads: Sequence[str], rows: Rows) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _tables(found: Measurement) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    yield (
        "Agreement with people, 95% intervals over prompts",
        ("comparisons", "number", "right", "longer wins"),
        _agreement(found),
    )
    if isinstance(found.padding, Padding):
        yield (
            "Padding probe: neutral sentences behind the same answers",
            ("sentences", "change of score", _unit(found.padding), "in sd", "p", "rises"),
            _doses(found.padding),
        )
    if isinstance(found.grid, Grids):
        matrix = found.grid.judge.matrix
        rows: Rows = [(style, *(fixed(cell, 3) for cell in row)) for style, row in zip(STYLES, matrix, strict=True)]
        yield "Right answer in the style of the row above wrong one in that of the column", ("", *STYLES), rows
    if isinstance(found.ensemble, Ensemble):
        yield (
            "Members; what an answer longer by half the median gains",
            ("member", "right", "length-balanced", "sd for half more"),
            _members(found.ensemble),
        )


def _agreement(found: Measurement) -> Rows:
    rows: Rows = []
    for name, part in found.accuracy.items():
        if isinstance(part, NotChecked):
            rows.append((PARTS[name], "not checked", "", ""))
        else:
            rows.append((PARTS[name], f"{part.weight:.0f}", between(part.accuracy), between(part.longer)))
    if isinstance(found.grades, Graded):
        kind = {"auc": "good over bad", "spearman": "rank corr."}[found.grades.kind]
        rows.append((kind, str(found.grades.answers), between(found.grades.estimate), between(found.grades.longer)))
    return rows


def _unit(found: Padding) -> str:
    return "per character" if found.doses[0].per_token is None else "per token"


def _doses(found: Padding) -> Rows:
    return [
        (
            str(dose.sentences),
            to_digits(dose.change),
            plain(dose.per_character if dose.per_token is None else dose.per_token),
            signed(dose.in_spread),
            "<0.001" if dose.p < 0.001 else fixed(dose.p, 3),
            percent(dose.rises),
        )
        for dose in found.doses
    ]


def _members(found: Ensemble) -> Rows:
    rows: Rows = []
    for number, member in enumerate(found.members):
        parts = (member.accuracy, member.length_balanced)
        cells = [between(part.accuracy) if isinstance(part, Agreement) else "not checked" for part in parts]
        rows.append((str(number), *cells, signed(member.half_more)))
    return rows
