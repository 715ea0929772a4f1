"""The charts of a report: which series of a run go into which figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kedge.diagnose.ledger import Ledger, Row
from kedge.report.plots import Bar, Line, bar_chart, line_chart
from kedge.report.view import View
from kedge.trace.reader import Series

UPDATES = "policy updates"
_BAND = "The band is a 95% interval; prompts are resampled."
_CHARTED = ("verbose", "concise")
_SMALL = 5e-4  # ledger parts below this everywhere are left out of the bars; the table keeps them


class Act(NamedTuple):
    """One run in a chart: what to call it and its colour."""

    view: View
    label: str
    tone: str


def curves(acts: Sequence[Act]) -> list[str]:
    """Score, gold, KL per sequence and per token, length and entropy over updates; what is missing is left out."""
    figures = [
        line_chart("Score", _score(acts), x=UPDATES, y="normalised score", zero=True),
        line_chart("Gold utility", _gold(acts), x=UPDATES, y="gold utility", zero=True,
                   note="Never shown to training."),
        line_chart("Length", _length(acts), x=UPDATES, y="tokens"),
        line_chart("KL per response", _lines(acts, "evaluation/kl_per_sequence"), x=UPDATES, y="nats, k1", zero=True),
        line_chart("KL per token", _lines(acts, "evaluation/kl_per_token"), x=UPDATES, y="nats, k1", zero=True,
                   note="Longer answers dilute it; it can fall while the KL per response grows."),
        line_chart("Entropy", _lines(acts, "evaluation/entropy"), x=UPDATES, y="nats per token", zero=True),
    ]  # fmt: skip
    return [figure for figure in figures if figure]


def frontier(acts: Sequence[Act]) -> str:
    """Score and gold against the square root of the KL: how far the policy went for what it got."""
    lines = []
    for act in acts:
        kl = act.view.evaluation.get("evaluation/kl_per_sequence")
        if kl is None:
            continue
        root = np.sqrt(np.maximum(kl.values, 0))
        for name, label, tone in (("evaluation/score", "score", act.tone), ("gold", "gold", "gold")):
            found = act.view.evaluation.get(name) or act.view.truth.get(name)
            if found is not None:
                same = np.isin(found.steps, kl.steps)
                at = np.searchsorted(kl.steps, found.steps[same])
                title = label if len(acts) == 1 else f"{label}, {act.label}"
                dashed = len(acts) > 1 and name == "gold"
                tone = act.tone if len(acts) > 1 else tone
                lines.append(Line(title, root[at], found.values[same], tone, dashed=dashed))
    known = any(act.view.truth for act in acts)
    title, y = ("Score and gold against √KL", "score, gold") if known else ("Score against √KL", "score")
    return line_chart(title, lines, x="√KL per response, √nats", y=y, zero=True)


def margin_charts(view: View) -> list[str]:
    """The matched net margin with its interval, what it is made of, and the net by tercile; empty without probes."""
    if not view.margins:
        return []
    tones = ("quiet", "reference", "drift")
    by_tercile = [
        Line(f"reference {label}", np.array([one.step for one in found]), np.array([one.net for one in found]), tone)
        for label, tone, found in zip(("briefest", "middle", "longest"), tones, view.tercile_margins, strict=True)
    ]
    net = [_net(view, "net, all prompts", "policy")]
    charts = [
        line_chart("Net margin of the verbose answer", net, x=UPDATES, y="reward", zero=True, note=_BAND),
        _margin_parts(view, "What it is made of"),
        line_chart("Net margin by tercile", by_tercile, x=UPDATES, y="reward", zero=True),
    ]
    return [chart for chart in charts if chart]


def margin_comparison(acts: Sequence[Act]) -> list[str]:
    """The matched net margins of several runs in one chart, then what each is made of."""
    nets = [_net(act.view, act.label, act.tone) for act in acts if act.view.margins]
    charts = [line_chart("Net margin of the verbose answer", nets, x=UPDATES, y="reward", zero=True, note=_BAND)]
    charts += [_margin_parts(act.view, f"What it is made of: {act.label}") for act in acts if act.view.margins]
    return [chart for chart in charts if chart]


def _net(view: View, label: str, tone: str) -> Line:
    found = view.margins
    x, y, low, high = (np.array([getattr(one, name) for one in found]) for name in ("step", "net", "low", "high"))
    return Line(label, x, y, tone, low, high)


def _margin_parts(view: View, title: str) -> str:
    found = view.margins
    x, score, kl, length = (
        np.array([getattr(one, name) for one in found]) for name in ("step", "score", "kl_cost", "length_cost")
    )
    parts = [Line("score margin", x, score, "up"), Line("minus KL cost", x, -kl, "down")]
    if np.any(length):
        parts.append(Line("minus length cost", x, -length, "gold"))
    return line_chart(title, parts, x=UPDATES, y="reward", zero=True)


def ledger_limit(accounts: Sequence[Ledger | None]) -> float:
    """The longest bar of several ledgers, so that their charts share one scale."""
    means = [
        [row.token_mean for row in account.rows(style)]
        for account in accounts
        if account is not None
        for style in _CHARTED
    ]
    return max((abs(value) for values in means for value in [*values, sum(values)]), default=1.0)


def ledger_charts(account: Ledger, limit: float | None = None) -> list[str]:
    """Token means of every part over all steps, for verbose and for concise responses, on one scale."""
    accounts = {style: account.rows(style) for style in _CHARTED}
    shown = {row.part for rows in accounts.values() for row in rows if abs(row.token_mean) >= _SMALL}
    return [
        bar_chart(
            f"{style.capitalize()} responses",
            [*(_bar(row) for row in rows if row.part in shown), Bar("sum", sum(row.token_mean for row in rows), True)],
            unit="advantage per token, standard deviations",
            limit=ledger_limit([account]) if limit is None else limit,
            note=f"{account.count(style)} responses",
        )
        for style, rows in accounts.items()
        if rows
    ]


def _bar(row: Row) -> Bar:
    return Bar(str(row.part).replace("_", " "), row.token_mean)


def _series(view: View, name: str) -> Series | None:
    return view.evaluation.get(name) or view.truth.get(name)


def _lines(acts: Sequence[Act], name: str) -> list[Line]:
    found = ((act, _series(act.view, name)) for act in acts)
    return [Line(act.label, one.steps, one.values, act.tone) for act, one in found if one is not None]


def _reference(acts: Sequence[Act], name: str) -> list[Line]:
    """A dashed yardstick from the first run that has it."""
    found = next((one for act in acts if (one := _series(act.view, name)) is not None), None)
    return [] if found is None else [Line("reference", found.steps, found.values, "reference", dashed=True)]


def _score(acts: Sequence[Act]) -> list[Line]:
    return _lines(acts, "evaluation/score") + _reference(acts, "evaluation/score_reference")


def _gold(acts: Sequence[Act]) -> list[Line]:
    lines = _lines(acts, "gold")
    if len(acts) == 1:
        lines = [Line(line.label, line.x, line.y, "gold") for line in lines]
    return lines + _reference(acts, "gold_reference") if lines else []


def _length(acts: Sequence[Act]) -> list[Line]:
    lines = _lines(acts, "evaluation/length")
    if len(acts) == 1 and lines:
        low, high = (_series(acts[0].view, f"evaluation/length_p{end}") for end in (10, 90))
        if low is not None and high is not None and len(low.steps) == len(high.steps) == len(lines[0].x):
            label = "policy (10th to 90th percentile)"
            lines = [Line(label, lines[0].x, lines[0].y, lines[0].tone, low.values, high.values)]
    return lines + _reference(acts, "evaluation/length_reference")
