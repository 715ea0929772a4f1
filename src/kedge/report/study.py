"""The over-optimisation study as one HTML page and as Markdown, from its figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.report.html import write_page
from kedge.report.numbers import fixed, signed
from kedge.report.plots import Line, line_chart
from kedge.trace.jsonl import write_atomically

Found = Mapping[str, Any]

TONES = ("drift", "gold", "policy", "quiet", "total", "reference")
ROOT = "√KL, √nats per response"
GAIN = "gain, gold utility"
SCORE = "gain, standard deviations of the score"
NOISE = "The highest gold is the best of many evaluations, each with noise of its own, and so somewhat too high."
ABOVE = "Gains are over the supervised policy on the same prompts; KL is k1 in nats per response."


def write_study(found: Found, out: Path) -> Path:
    """Write `report.html` and `overoptimisation.md` in the folder `out`; returns the page's path."""
    page = out / "report.html"
    write_page(page, "study.html", _page(found))
    write_atomically(out / "overoptimisation.md", markdown(found).encode())
    return page


COMMAND = "kedge study overoptimisation"


def markdown(found: Found) -> str:
    """The tables of the study."""
    page = ["# Over-optimisation in the built-in desk", "", f"Made by `{COMMAND}`. {_extent(found)} {ABOVE}", ""]
    page += ["In brackets the lowest and the highest seed; of laws the 95% interval.", "", "## Ends of the runs", ""]
    page += [NOISE, ""]
    page += _markdown_table(_END_HEADS, _end_rows(found))
    page += ["", "## Laws", "", *_LAWS, ""]
    page += _markdown_table(_LAW_HEADS, _law_rows(found))
    page += ["", "## Reading", "", *[f"- {sentence}" for sentence in _sentences(found)]]
    return "\n".join([*page, ""])


def _page(found: Found) -> dict[str, Any]:
    from markupsafe import Markup

    def safe(charts: Sequence[str]) -> list[Any]:
        return [Markup(chart) for chart in charts if chart]

    return {
        "found": found,
        "extent": _extent(found),
        "above": ABOVE,
        "noise": NOISE,
        "summary": _sentences(found),
        "sweep": safe(_sweep(found)),
        "judges": safe(_judges(found)),
        "efficiency": safe([_efficiency(found)]),
        "end_heads": _END_HEADS,
        "ends": _end_rows(found),
        "law_heads": _LAW_HEADS,
        "laws": _law_rows(found),
    }


def _extent(found: Found) -> str:
    seeds, counts = len(found["seeds"]), sorted({judge["labels"] for judge in found["judges"]})
    labels = ", ".join(str(count) for count in counts)
    return (
        f"Recipe {found['recipe']}, {seeds} seed{'s' * (seeds > 1)}, reward models from {labels} labels, "
        f"{found['samples']} answers of the supervised policy per prompt."
    )


# Charts


def _sweep(found: Found) -> list[str]:
    """Score and gold of policies at every beta, and the law."""
    main = next(judge for judge in found["judges"] if judge["main"])
    runs = [(f"beta {beta:g}", _of(found, "policy", main, beta)) for beta in found["betas"]]
    law = _law(found, "policies at every beta", main)
    return [
        line_chart("Score: policies", _lines(runs, "proxy"), x=ROOT, y=SCORE, zero=True),
        line_chart("Gold: policies", _lines(runs, "gold") + law, x=ROOT, y=GAIN, zero=True,
                   note="Dashed: the law R = d (α − β log d) of all of them."),
    ]  # fmt: skip


def _judges(found: Found) -> list[str]:
    """Gold by reward model: policies at one beta, and the best of n with its laws."""
    names = [(judge, _judge_name(judge)) for judge in found["judges"]]
    beta = found["label_beta"]
    runs = [(name, _of(found, "policy", judge, beta)) for judge, name in names]
    best = [(name, _of(found, "best_of_n", judge, None)) for judge, name in names]
    return [
        line_chart(f"Score: policies at beta {beta:g}", _lines(runs, "proxy"), x=ROOT, y=SCORE, zero=True),
        line_chart(f"Gold: policies at beta {beta:g}", _lines(runs, "gold"), x=ROOT, y=GAIN, zero=True),
        line_chart("Score: best of n", _lines(best, "proxy"), x=ROOT, y=SCORE, zero=True),
        line_chart("Gold: best of n", _lines(best, "gold"), x=ROOT, y=GAIN, zero=True),
    ]


def _efficiency(found: Found) -> str:
    """The score gained over the most that any policy can gain at the same KL."""
    main = next(judge for judge in found["judges"] if judge["main"])
    runs = [(f"beta {beta:g}", _of(found, "policy", main, beta)) for beta in found["betas"]]
    runs.append(("best of n", _of(found, "best_of_n", main, None)))
    note = f"Up to {found['support']:.1f} nats, as far as the answers support the frontier."
    return line_chart(
        "KL efficiency", _lines(runs, "efficiency"), x=ROOT, y="share of the frontier", zero=True, note=note
    )


def _of(found: Found, optimiser: str, judge: Found, strength: float | None) -> list[Found]:
    return [
        point
        for point in found["points"]
        if point["optimiser"] == optimiser
        and (point["labels"], point["hidden"]) == (judge["labels"], judge["hidden"])
        and strength in (None, point["strength"])
    ]


def _lines(named: Sequence[tuple[str, Sequence[Found]]], figure: str) -> list[Line]:
    """A line per name: means over seeds at the same step or n; what a seed lacks there is left out."""
    lines = []
    for (name, points), tone in zip(named, TONES, strict=False):
        places: dict[float, list[Found]] = {}
        for point in points:
            if point[figure] is not None:
                places.setdefault(point.get("step", point["strength"]), []).append(point)
        x = [statistics.fmean(point["root_kl"] for point in place) for place in places.values()]
        y = [statistics.fmean(point[figure] for point in place) for place in places.values()]
        lines.append(Line(name, np.array(x), np.array(y), tone))
    return lines


def _law(found: Found, what: str, judge: Found) -> list[Line]:
    for law in found["laws"]:
        mine = (law["labels"], law["hidden"]) == (judge["labels"], judge["hidden"])
        if law["what"] == what and mine and "curve" in law:
            curve = law["curve"]
            return [Line("law", np.array(curve["d"]), np.array(curve["gold"]), "reference", dashed=True)]
    return []


# Tables and words

_END_HEADS = ("optimiser", "reward model", "KL, nats", "score", "gold", "correct", "tokens", "highest gold", "at √KL")
_LAW_HEADS = ("points", "reward model", "α", "β", "highest at d", "turns within the points")
_LAWS = (
    "d = √KL; best of n: R = d (α − β d), highest at α / 2β; policies: R = d (α − β log d), highest at exp(α / β − 1)",
    "(Gao, Schulman and Hilton 2022). Intervals resample seeds, and within them runs or prompts.",
)


def _judge_name(judge: Found) -> str:
    return f"{judge['labels']} labels, width {judge['hidden']}"


def _end_rows(found: Found) -> list[tuple[str, list[str]]]:
    rows = []
    for row in found["ends"]:
        name = f"policy, beta {row['strength']:g}" if row["optimiser"] == "policy" else f"best of {row['strength']:g}"
        figures = [("kl", 1), ("proxy", 2), ("gold", 2), ("correct", 2), ("length", 1), ("highest_gold", 2)]
        cells = [_spread(row[figure], places) for figure, places in [*figures, ("highest_at", 2)]]
        rows.append((name, [_judge_name(row), *cells]))
    return rows


def _law_rows(found: Found) -> list[tuple[str, list[str]]]:
    rows = []
    for law in found["laws"]:
        if "refused" in law:
            rows.append((law["what"], [_judge_name(law), "not fitted", law["refused"], "", ""]))
            continue
        cells = [_between(law[name]) for name in ("alpha", "beta", "peak")]
        rows.append((law["what"], [_judge_name(law), *cells, "yes" if law["turns"] else "no"]))
    return rows


def _spread(values: Sequence[float], places: int) -> str:
    mean, low, high = (fixed(value, places) for value in values)
    return mean if low == high else f"{mean} ({low} to {high})"


def _between(estimate: Found) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    shown = "none" if value is None else fixed(value)
    if low is None:
        return shown
    return f"{shown} ({fixed(low)} to {'∞' if high is None else fixed(high)})"


def _sentences(found: Found) -> list[str]:
    return [*_said_of_policies(found), *_said_of_best_of_n(found), *_said_of_judges(found)]


def _said_of_policies(found: Found) -> Iterator[str]:
    main = next(judge for judge in found["judges"] if judge["main"])
    rows = [row for row in found["ends"] if row["optimiser"] == "policy" and _same(row, main)]
    if rows:
        weak, strong = min(rows, key=lambda row: row["strength"]), max(rows, key=lambda row: row["strength"])
        for row, word in ((weak, "weakest"), (strong, "strongest")):
            yield (
                f"Policies, {word} leash: beta {row['strength']:g} ends at {fixed(row['kl'][0], 1)} nats with score "
                f"{signed(row['proxy'][0])} and gold {signed(row['gold'][0])}; gold was highest, "
                f"{signed(row['highest_gold'][0])}, at √KL {fixed(row['highest_at'][0])}."
            )


def _said_of_best_of_n(found: Found) -> Iterator[str]:
    for row in found["ends"]:
        if row["optimiser"] == "best_of_n" and any(judge["main"] and _same(row, judge) for judge in found["judges"]):
            yield (
                f"Best of n: the best of {row['strength']:g} is {fixed(row['kl'][0], 1)} nats away, with score "
                f"{signed(row['proxy'][0])} and gold {signed(row['gold'][0])}; gold was highest, "
                f"{signed(row['highest_gold'][0])}, at √KL {fixed(row['highest_at'][0])}."
            )


def _said_of_judges(found: Found) -> Iterator[str]:
    rows = [row for row in found["ends"] if row["optimiser"] == "best_of_n"]
    if len(rows) > 1:
        parts = [f"{_judge_name(row)} {signed(row['highest_gold'][0])}, {signed(row['gold'][0])}" for row in rows]
        yield f"Reward models: gold of the best of n at its highest and at the largest n: {'; '.join(parts)}."


def _same(row: Found, judge: Found) -> bool:
    return bool((row["labels"], row["hidden"]) == (judge["labels"], judge["hidden"]))


def _markdown_table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "--|" * len(heads),
        *["| " + " | ".join([name, *cells]) + " |" for name, cells in rows],
    ]
