"""Self-contained HTML reports: no script, no request to anywhere, model text escaped.

The page's content policy allows one style sheet, named by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedge.diagnose.correction import Proposal
from kedge.diagnose.ledger import VERBOSE_RATIO, Covariance, Ledger, Row, position_names
from kedge.report import words
from kedge.report.charts import Act, curves, frontier, ledger_charts, ledger_limit, margin_charts, margin_comparison
from kedge.report.numbers import fixed, percent, plain, signed
from kedge.report.samples import LEVELS, choose, read_samples
from kedge.report.view import View, read_view
from kedge.trace.jsonl import write_atomically

_TEMPLATES = Path(__file__).parent / "templates"
_TERCILES = ("briefest", "middle", "longest")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run in folder `run` to `out`; returns its path.

    By default it is `report.html` in the folder, and the diagnosis it speaks of is written beside it.

    Works on a run in progress and says what is missing. Raises InputError when the folder is no run, its trace is
    damaged, or `out` cannot be written.
    """
    from kedge.report.diagnosis_page import findings_section

    view = read_view(run)
    place = view.run.dir.report if out is None else out
    found = findings_section(run, place, write=out is None)
    write_page(place, "run.html", {**_run_page(view), "findings": found})
    return place


def write_comparison(drift: Path, corrected: Path, out: Path, proposal: Proposal) -> Path:
    """Write two runs from the same start side by side to `out`; returns `out`.

    `proposal` is what the rule proposed from the trace of `drift` and `corrected` was run with.
    """
    first, second = read_view(drift), read_view(corrected)
    write_page(out, "comparison.html", _comparison_page(first, second, proposal, out))
    return out


def write_page(out: Path, template: str, context: Mapping[str, Any]) -> None:
    """Fill a template of this package and write the page; every text in `context` is escaped unless it is Markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, fixed=fixed, signed=signed, percent=percent)
    css = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    page = environment.get_template(template).render(
        css=Markup(css),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        **context,
    )
    write_atomically(out, page.encode("utf-8", "replace"))


def _run_page(view: View) -> dict[str, Any]:
    act = Act(view, "policy", "policy")
    return {
        "view": view,
        "facts": _facts(view),
        "summary": words.summary(view),
        "paragraphs": (words.what_happened(view), words.what_accounts(view)),
        "curves": _safe(curves([act])),
        "frontier": _safe([frontier([act])]),
        "terciles": _terciles(view),
        "ledger": _ledger(view.ledger),
        "margins": _safe(margin_charts(view)),
        "verdict": words.verdict(view),
        "samples": choose(read_samples(view.run)),
        "levels": LEVELS,
        "settings": _flat(view.run.settings),
    }


def _comparison_page(drift: View, corrected: View, proposal: Proposal, out: Path) -> dict[str, Any]:
    labels = ("drifting", "corrected") if proposal.drift else ("first run", "second run")
    acts = [Act(drift, labels[0], "drift"), Act(corrected, labels[1], "policy")]
    names = [f"Act {number}: {label}" for number, label in zip(("one", "two"), labels, strict=True)]
    by_prompt = {sample.prompt: sample for sample in read_samples(corrected.run)}
    pairs = [(one, by_prompt[one.prompt]) for one in read_samples(drift.run) if one.prompt in by_prompt]
    chosen = {sample.prompt for sample in choose([one for one, _ in pairs])}
    limit = ledger_limit([act.view.ledger for act in acts])
    return {
        "acts": [
            {
                "title": title,
                "view": act.view,
                "facts": _facts(act.view),
                "paragraphs": (words.what_happened(act.view), words.what_accounts(act.view)),
                "terciles": _terciles(act.view),
                "ledger": _ledger(act.view.ledger, limit),
                "link": _link(act.view.run.dir.report, out),
            }
            for title, act in zip(names, acts, strict=True)
        ],
        "title": "Drift, and its correction" if proposal.drift else "Two runs from the same start",
        "names": [view.run.name for view in (drift, corrected)],
        "summary": words.comparison_summary(drift, corrected, proposal),
        "figures": _figures(drift, corrected),
        "proposal": proposal,
        "curves": _safe(curves(acts)),
        "frontier": _safe([frontier(acts)]),
        "margins": _safe(margin_comparison(acts)),
        "pairs": [pair for pair in pairs if pair[0].prompt in chosen],
        "levels": LEVELS,
        "settings": _differences(drift.run.settings, corrected.run.settings),
    }


def _safe(figures: Sequence[str]) -> list[Any]:
    """Charts escape their own text."""
    from markupsafe import Markup

    return [Markup(figure) for figure in figures if figure]


def _facts(view: View) -> list[str]:
    """One line under the title: status, seed, world, progress, versions."""
    manifest = view.run.manifest
    found = [str(manifest.get("status", "status not known")), f"{view.updates} policy updates"]
    found += [f"{key} {manifest[key]}" for key in ("seed", "world") if key in manifest]
    found += [f"Kedge {manifest['kedge']}"] if "kedge" in manifest else []
    return found


def _terciles(view: View) -> list[dict[str, Any]]:
    """Rows of the tercile table: values at the first and the last evaluation."""
    columns = {
        "length_ratio": "evaluation/tercile{}/length_ratio",
        "kl": "evaluation/tercile{}/kl_per_sequence",
        "score": "evaluation/tercile{}/score",
        "answered": "tercile{}/answered",
        "correct": "tercile{}/correct",
    }
    rows = []
    for index, name in enumerate(_TERCILES):
        values = {key: (view.first(path.format(index)), view.last(path.format(index))) for key, path in columns.items()}
        if any(last is not None for _, last in values.values()):
            rows.append({"name": name, "known": bool(view.truth), **values})
    return rows


def _ledger(account: Ledger | None, limit: float | None = None) -> dict[str, Any] | None:
    """The ledger's charts and tables, or None without rows."""
    if account is None:
        return None
    return {
        "charts": _safe(ledger_charts(account, limit)),
        "reference_length": account.reference_length,
        "verbose_above": account.reference_length and VERBOSE_RATIO * account.reference_length,
        "tables": _ledger_tables(account),
        "residual": account.residual,
    }


def _ledger_tables(account: Ledger) -> list[dict[str, Any]]:
    """The ledger cut in four ways; each table has a caption, column heads, and rows of a label and cells."""
    labels = [str(part).replace("_", " ") for part in account.parts]

    def column(rows: Sequence[Row] | Sequence[Covariance], field: str = "token_mean") -> list[str]:
        values = [getattr(row, field) for row in rows]
        return [signed(value, 3) for value in [*values, sum(values)]] if rows else ["–"] * (len(labels) + 1)

    def table(caption: str, heads: Sequence[str], columns: Sequence[Sequence[str]]) -> dict[str, Any]:
        rows = [(label, [cells[index] for cells in columns]) for index, label in enumerate([*labels, "sum"])]
        return {"caption": caption, "heads": heads, "rows": rows}

    verbose, concise, shares = account.rows("verbose"), account.rows("concise"), account.length_shares()
    windows, places = range(len(account.windows)), range(len(position_names()))
    return [
        table(
            "Whole run, standard deviations of advantage",
            ("verbose, per token", "verbose, per response", "concise, per token", "concise, per response"),
            [column(rows, field) for rows in (verbose, concise) for field in ("token_mean", "response_sum")],
        ),
        table(
            "Verbose responses over time, per token",
            [f"steps {first}–{last}" for first, last in account.windows],
            [column(account.rows("verbose", window)) for window in windows],
        ),
        table(
            "Verbose responses by position of the token, per token",
            [f"token {name}" for name in position_names()],
            [column(account.rows("verbose", None, place)) for place in places],
        ),
        table(
            "Covariance of a response's summed advantage with its length, within steps (advantage × tokens)",
            ("covariance", "share of the total"),
            [column(shares, "covariance"), column(shares, "share")],
        ),
    ]


def _figures(drift: View, corrected: View) -> list[dict[str, Any]]:
    """The comparison's main table: each number for the reference, at the highest gold, and at the end."""
    rows = (
        ("Score, unpenalised", "normalised", "evaluation/score", "evaluation/score_reference", 2),
        ("Gold utility", "gold", "gold", "gold_reference", 2),
        ("KL to the reference", "nats per response", "evaluation/kl_per_sequence", None, 1),
        ("Length", "tokens", "evaluation/length", "evaluation/length_reference", 1),
        ("Correct", "share", "correct", None, 2),
        ("Answered", "share", "answered", None, 2),
    )
    table = []
    for label, unit, name, reference, places in rows:
        start = drift.first(reference) if reference else 0.0 if name == "evaluation/kl_per_sequence" else None
        cells = [start if start is not None else drift.first(name)]
        for view in (drift, corrected):
            best = view.best_gold
            cells += [None if best is None else view.at(name, best), view.last(name)]
        if any(cell is not None for cell in cells[1:]):
            table.append({"label": label, "unit": unit, "cells": [fixed(cell, places) for cell in cells]})
    return table


def _link(report: Path, out: Path) -> str | None:
    """The way from `out` to another report, when it exists."""
    return Path(os.path.relpath(report, out.parent)).as_posix() if report.exists() else None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys and printed values."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        else:
            found.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return found


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings in which two runs differ."""
    one, other = dict(_flat(first)), dict(_flat(second))
    keys = dict.fromkeys([*one, *other])
    return [(key, one.get(key, "–"), other.get(key, "–")) for key in keys if one.get(key) != other.get(key)]
