"""The audit of a file of judgments as a page: findings, worst first, then charts where eyes beat numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge.report.html import write_page
from kedge.report.plots import Bar, Line, bar_chart, line_chart

if TYPE_CHECKING:
    from kedge.data.audit.domain import DomainMix
    from kedge.data.audit.whole import Audit

_BARS = 14
_LABEL = 18  # characters that fit beside a bar


def write_audit(found: Audit, out: Path) -> Path:
    """Write the page to `out` and return it. Raises InputError where it cannot be written."""
    tables = found.tables
    facts = [f"{tables.total:,} rows", *(f"{count:,} {kind}" for kind, count in sorted(tables.kinds.items()))]
    facts += [f"{tables.rejected_count:,} rejected", f"{found.prompts.prompts:,} prompts"]
    from markupsafe import Markup

    figures = [_length(found), _marks(found), *map(_domain, found.domains[:4]), _reliability(found)]
    write_page(
        out,
        "audit.html",
        {
            "name": Path(tables.path).name,
            "path": tables.path,
            "facts": facts,
            "findings": found.findings,
            "charts": [Markup(figure) for figure in figures if figure],  # charts escape their own text
            "annotators": found.annotators,
            "domains": found.domains,
            "problems": [str(problem) for problem in tables.rejected],
        },
    )
    return out


def _length(found: Audit) -> str:
    """How often the longer response wins by how much longer it is, beside the logistic curve."""
    if found.length is None:
        return ""
    ratio, share, _ = (np.array(column, dtype=float) for column in zip(*found.length.curve, strict=True))
    lines = [Line("measured", ratio, share, "policy")]
    if found.length.slope is not None:
        xs = np.linspace(0, max(float(ratio.max()), 0.1), 40)
        lines.append(Line("logistic fit", xs, 1 / (1 + np.exp(-found.length.slope * xs)), "drift", dashed=True))
        lines.append(Line("coin", xs, np.full(len(xs), 0.5), "reference", dashed=True))
    note = f"{found.length.pairs:,} decided pairs of unequal length, in bins of equal counts."
    return line_chart("The longer response wins", lines, x="log(longer / shorter)", y="share of wins", note=note)


def _marks(found: Audit) -> str:
    known = [(effect.mark, effect.coefficient) for effect in found.format if effect.coefficient is not None]
    return _bars("Marks of style at equal length", known, "log-odds for the side that has it", "")


def _domain(mix: DomainMix) -> str:
    rows = sum(part.rows for part in mix.parts)
    mean = sum(part.rows * part.share for part in mix.parts) / rows
    values = [(f"{part.value} ({part.share:.2f})", part.share - mean) for part in mix.parts]
    return _bars(f"{mix.column}: {mix.what}", values, "less that of all", f"All: {mean:.2f} of {rows:,} rows.")


def _reliability(found: Audit) -> str:
    values = [(one.name, one.agrees - 0.5) for one in found.annotators if one.agrees is not None]
    note = "Share of labels that agree with the majority of the others, less one half; the least reliable first."
    return _bars("Reliability of annotators", sorted(values, key=lambda one: one[1]), "agreement less 0.5", note)


def _bars(title: str, values: list[tuple[str, float]], unit: str, note: str) -> str:
    if not values:
        return ""
    bars = [Bar(_short(label), value) for label, value in values[:_BARS]]
    limit = max(abs(bar.value) for bar in bars if math.isfinite(bar.value))
    more = f" {len(values) - _BARS} more are in the JSON." if len(values) > _BARS else ""
    return bar_chart(title, bars, unit=unit, limit=limit, note=f"{note}{more}".strip())


def _short(label: Any) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 8]}…{label[-7:]}"
