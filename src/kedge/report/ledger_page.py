"""The ledger of a run as text for a terminal, as a page with charts, and as a file of numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.diagnose.push import Push
from kedge.diagnose.survey import Account, Survey
from kedge.errors import InputError, Problem
from kedge.report.html import write_page
from kedge.report.ledger_tables import LONG, Table, long_rows, opening, tables, unknown
from kedge.report.plots import Bar, Line, bar_chart, line_chart
from kedge.trace.jsonl import write_atomically

FORMATS = (".csv", ".parquet", ".json")
COLUMNS = 6  # groups beside each other in text
_CHARTED = 8
_LABEL = 18  # characters that fit beside a bar
_TONES = ("up", "down", "gold", "policy", "drift", "reference")


def lines(found: Survey, name: str, notes: Sequence[str] = ()) -> list[str]:
    """The survey as text."""
    made = [*opening(found, name), *notes, *unknown(found)]
    for table in tables(found):
        for piece in _pieces(table):
            made += ["", *_text(piece)]
        made += [table.note] if table.note else []
    return made


def write_ledger(found: Survey, name: str, out: Path, notes: Sequence[str] = ()) -> Path:
    """Write the page to `out` and return it. Raises InputError where it cannot be written."""
    from markupsafe import Markup

    charts = [chart for account in found.accounts for chart in _charts(account, found.unit)]
    charts += [_share_chart(push) for push in found.pushes[:_CHARTED]]
    context = {
        "name": name,
        "opening": [*opening(found, name), *notes, *unknown(found)],
        "charts": [Markup(chart) for chart in charts if chart],  # charts escape their own text
        "tables": tables(found),
    }
    write_page(out, "ledger.html", context)
    return out


def check_export(out: Path) -> None:
    """Raise InputError unless the name of a file of numbers says how to write it."""
    if out.suffix.lower() not in FORMATS:
        raise InputError(Problem(f"--export {out}", "is no name of a table", f"end it in {', '.join(FORMATS)}"))


def export(found: Survey, out: Path) -> Path:
    """Write every number as one long table; replaces a file of that name. Raises InputError."""
    check_export(out)
    rows = list(long_rows(found))
    if out.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        columns = {name: [row[name] for row in rows] for name in LONG}
        types = [(name, pa.float64() if name == "value" else pa.string()) for name in LONG]
        pq.write_table(pa.table(columns, pa.schema(types)), sink)
        content = sink.getvalue()
    elif out.suffix.lower() == ".json":
        plain = [row | {"value": row["value"] if math.isfinite(row["value"]) else None} for row in rows]
        content = (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, LONG, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"value": row["value"] if math.isfinite(row["value"]) else ""} for row in rows)
        content = text.getvalue().encode("utf-8", "replace")
    write_atomically(out, content)
    return out


def _pieces(table: Table) -> Iterator[Table]:
    """A table of many groups in pieces that fit a terminal."""
    groups = table.heads[1:]
    for first in range(0, len(groups), COLUMNS):
        last = first + COLUMNS
        rows = tuple((label, cells[first:last]) for label, cells in table.rows)
        yield Table(table.caption, (table.heads[0], *groups[first:last]), rows, table.totals)


def _text(table: Table) -> list[str]:
    lines = [(table.heads[0], table.heads[1:]), *table.rows]
    left = max(len(label) for label, _ in lines)
    widths = [max(len(cells[at]) for _, cells in lines) for at in range(len(table.heads) - 1)]
    made = [
        "  ".join([label.ljust(left), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]).rstrip()
        for label, cells in lines
    ]
    return [table.caption, *made]


def _charts(account: Account, unit: str) -> list[str]:
    """Parts by group: over time as lines, else as bars on one scale."""
    parts = [entry for entry in account.sums if entry.kind == "part"]
    means = {entry: account.per_token(account.sums[entry]) for entry in parts}
    shown = [entry for entry in parts if np.nanmax(np.abs(means[entry]), initial=0.0) >= 5e-4]
    unit = f"{unit} per token"
    if account.grouping == "time" and len(account.labels) > 1:
        x = np.arange(1, len(account.labels) + 1, dtype=float)
        drawn = [
            Line(entry.name, x, means[entry], _TONES[index % len(_TONES)], dashed=index >= len(_TONES))
            for index, entry in enumerate(shown)
        ]
        return [line_chart("Parts of the advantage over time", drawn, x="stretch of the run", y=unit, zero=True)]
    groups = [at for at, count in enumerate(account.tokens) if count][:_CHARTED]
    limit = max((abs(float(values[at])) for values in means.values() for at in groups), default=1.0)
    total = account.per_token(account.advantage)
    return [
        bar_chart(
            account.labels[at],
            [
                *(Bar(_short(entry.name), float(means[entry][at])) for entry in shown),
                Bar("sum", float(total[at]), True),
            ],
            unit=unit,
            limit=limit,
            note=f"{int(account.tokens[at]):,} tokens",
        )
        for at in groups
    ]


def _share_chart(push: Push) -> str:
    known = [(entry.name, part.value) for entry, part in push.parts.items() if part.value]
    if not known:
        return ""
    size = sum(value for _, value in known)
    bars = [*(Bar(_short(name), value) for name, value in known), Bar("sum", size, True)]
    limit = max(abs(bar.value) for bar in bars)
    title = f"Pushed on {push.measure}"
    return bar_chart(
        title, bars, unit=f"{push.unit} × advantage", limit=limit, note="Covariance within steps, by part."
    )


def _short(label: str) -> str:
    label = label.replace("_", " ").replace("(estimated)", "(est.)")
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def as_json(found: Survey) -> dict[str, Any]:
    """The survey for a program."""
    return {
        "steps": [found.steps[0], found.steps[-1]],
        "responses": found.responses,
        "tokens": found.tokens,
        "unit": found.unit,
        "centring": found.centring,
        "notes": list(found.notes),
        "gap": {
            "token": found.gap.token,
            "digest": found.gap.digest,
            "excess": found.gap.excess,
            "holds": found.gap.holds,
        },
        "rows": list(long_rows(found)),
    }
