"""The figures of a judge as one HTML page; texts and names in it are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.evaluate.reward.accuracy import Agreement
from kedge.evaluate.reward.answers import NotChecked
from kedge.evaluate.reward.calibration import Calibration
from kedge.evaluate.reward.grid import STYLES, Grids, StyleGrid
from kedge.evaluate.reward.measure import Ensemble, Measurement
from kedge.evaluate.reward.padding import Padding
from kedge.report.html import write_page
from kedge.report.plots import Line, line_chart
from kedge.report.reward_words import PARTS, between, not_checked, sentences

_SHADES = 6


def write_reward_page(found: Measurement, data: str, out: Path) -> Path:
    """Write the page to `out` and return it; `data` names what the judge was measured on. Raises `InputError`."""
    write_page(out, "reward.html", _page(found, data))
    return out


def _page(found: Measurement, data: str) -> dict[str, Any]:
    from markupsafe import Markup

    reliability = _reliability(found.calibration) if isinstance(found.calibration, Calibration) else ""
    return {
        "judge": found.judge,
        "data": data,
        "counts": found.counts,
        "summary": sentences(found),
        "missing": not_checked(found),
        "accuracy": [(PARTS[name], *_row(part)) for name, part in found.accuracy.items()],
        "charts": [Markup(reliability)] if reliability else [],
        "calibration": found.calibration if isinstance(found.calibration, Calibration) else None,
        "padding": found.padding if isinstance(found.padding, Padding) else None,
        "between": between,
        "grids": _grids(found.grid) if isinstance(found.grid, Grids) else [],
        "styles": STYLES,
        "members": _members(found.ensemble) if isinstance(found.ensemble, Ensemble) else [],
    }


def _row(part: Agreement | NotChecked) -> tuple[str, ...]:
    if isinstance(part, NotChecked):
        return "not checked", "", "", ""
    return f"{part.weight:.0f}", *(between(estimate) for estimate in (part.accuracy, part.longer, part.lead))


def _members(found: Ensemble) -> list[tuple[str, str, float | None]]:
    def shown(part: Agreement | NotChecked) -> str:
        return between(part.accuracy) if isinstance(part, Agreement) else "not checked"

    return [(shown(one.accuracy), shown(one.length_balanced), one.half_more) for one in found.members]


def _reliability(found: Calibration) -> str:
    confidence, observed, low, high = (
        np.array([getattr(one, name) for one in found.bins]) for name in ("confidence", "observed", "low", "high")
    )
    lines = [
        Line("calibrated", np.array([0.5, 1.0]), np.array([0.5, 1.0]), "reference", dashed=True),
        Line("this judge", confidence, observed, "policy", low, high),
    ]
    note = f"Each point holds about {found.pairs // len(found.bins)} comparisons; the band is Wilson's 95% interval."
    return line_chart(
        "Reliability", lines, x="how sure the judge is", y="share of votes for what it prefers", note=note
    )


def _grids(found: Grids) -> list[dict[str, Any]]:
    """Tables for the judge and for length, each cell with its shade, and means by domain."""
    titles = {"this judge": found.judge, "the longer response wins": found.longer}
    return [
        {
            "title": title,
            "rows": [(style, _shaded(row)) for style, row in zip(STYLES, grid.matrix, strict=True)],
            "means": _means(grid),
            "grid": grid,
        }
        for title, grid in titles.items()
    ]


def _means(grid: StyleGrid) -> list[tuple[str, str]]:
    return [(name, between(getattr(grid, name))) for name in ("hard", "normal", "easy")]


def _shaded(row: Sequence[float]) -> list[tuple[float, str]]:
    """Cells with a class of the style sheet: k1 to k6 above one half, n1 to n6 below."""
    shades = []
    for cell in row:
        level = min(_SHADES, round(abs(cell - 0.5) * 2 * _SHADES))
        shades.append((cell, f"{'k' if cell > 0.5 else 'n'}{level}" if level else "k0"))
    return shades
