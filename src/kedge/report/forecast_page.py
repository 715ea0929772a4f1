"""A forecast as one HTML page, from its figures alone; texts of prompts and answers are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.report.html import write_page
from kedge.report.numbers import fixed, plain, signed
from kedge.report.plots import Line, line_chart

Found = Mapping[str, Any]

TONES = ("policy", "drift", "gold", "quiet", "total", "reference")
KL = "KL from the reference, nats per response"
_BAND = "The band is a 95% interval; prompts are resampled."


def write_forecast(found: Found, out: Path) -> Path:
    """Write the page to `out` and return it. `found` is what `experiment.forecasting` gives. Raises `InputError`."""
    write_page(out, "forecast.html", _page(found))
    return out


def _page(found: Found) -> dict[str, Any]:
    from markupsafe import Markup

    forecasts = found["forecasts"]
    names = list(dict.fromkeys(name for one in forecasts for name in one["reference"]))
    charts = [_score(forecasts), *(_feature(forecasts, name) for name in names)]
    return {
        "title": found["policy"],
        "facts": [f"{found['prompts']} prompts", f"{found['answers']} answers each"],
        "summary": _summary(found),
        "left_out": found["left_out"],
        "notes": found["notes"],
        "charts": [Markup(chart) for chart in charts if chart],
        "forecasts": [_shown(one) for one in forecasts],
    }


def _summary(found: Found) -> list[str]:
    said = []
    for one in found["forecasts"]:
        first = one["advice"][0] if one["advice"] else "no feature was told"
        said.append(f"{one['reward']}: {first}.")
    for place, row in enumerate(found.get("ranking", ()), start=1):
        change = signed(row["change"])
        what = f"{row['furthest']} moves by {change} of the spread between answers" if row["furthest"] else "moves none"
        said.append(f"Rank {place}: {row['reward']}, {what} at {plain(found['common_kl'])} nats.")
    return said


def _score(forecasts: Sequence[Found]) -> str:
    lines = [
        Line(one["reward"], _column(one, "kl"), _column(one, "score"), tone)
        for one, tone in zip(forecasts, TONES, strict=False)
    ]
    note = "The most that any policy can gain at a KL; one in training needs more."
    return line_chart("Score", lines, x=KL, y="gain, score", zero=True, note=note)


def _feature(forecasts: Sequence[Found], name: str) -> str:
    lines = []
    for one, tone in zip(forecasts, TONES, strict=False):
        if name in one["reference"]:
            three = [[place["values"][name][key] for place in one["path"]] for key in ("value", "low", "high")]
            value, low, high = (np.array(values, dtype=float) for values in three)
            band = (low, high) if np.isfinite(low).all() else (None, None)
            lines.append(Line(one["reward"], _column(one, "kl"), value, tone, *band))
    note = _BAND if any(line.low is not None for line in lines) else ""
    return line_chart(name, lines, x=KL, y=name, note=note)


def _column(one: Found, name: str) -> Any:
    return np.array([place[name] for place in one["path"]], dtype=float)


def _shown(one: Found) -> dict[str, Any]:
    names = list(one["reference"])
    rows = [(f"{place['kl']:.2f}", _cells(place, names)) for place in (*one["stations"], one["end"])]
    betas = [
        (f"{row['beta']:g}", row["reason"] if row["status"] != "ok" else "", _cells(row, names, kl=True))
        for row in one["betas"]
    ]
    return {
        "reward": one["reward"],
        "support": f"{one['support']['kl']:.2f} nats, beta {plain(one['support']['least_beta'])}",
        "names": names,
        "reference": [fixed(one["reference"][name]["value"], 3) for name in names],
        "rows": rows,
        "betas": betas,
        "advice": one["advice"],
        "missing": one["not_checked"],
        "exploits": one["exploits"],
    }


def _cells(place: Found, names: Sequence[str], *, kl: bool = False) -> list[str]:
    if place.get("status", "ok") != "ok":
        return []
    first = [fixed(place["kl"])] if kl else [plain(place["beta"])]
    return [*first, signed(place["score"]), *(_cell(place, name) for name in names)]


def _cell(place: Found, name: str) -> str:
    value, change = place["values"][name]["value"], place["changes"][name]
    moved = change["low"] > 0 or change["high"] < 0
    return f"{fixed(value, 3)}{'*' if moved else ''}"
