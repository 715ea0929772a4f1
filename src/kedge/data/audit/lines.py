"""An audit for a terminal of 80 columns: findings, worst first, then the figures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from kedge.data.audit.findings import Finding, shares, span
from kedge.data.audit.whole import Audit

WIDTH = 80


def lines(found: Audit) -> list[str]:
    """Lines without colour; what came from the file holds no control characters in them."""
    tables = found.tables
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tables.kinds.items()))
    out = [*_wrapped(f"{tables.path}: {tables.total:,} rows, {kinds}, {tables.rejected_count:,} rejected."), ""]
    for finding in found.findings:
        out += _finding(finding)
    out += ["", "Figures", *_figures(found)]
    return ["".join(sign if sign.isprintable() else "?" for sign in line) for line in out]


def _finding(finding: Finding) -> Iterator[str]:
    title = f"{finding.status.replace('_', ' '):<12}{finding.name.replace('_', ' ')}"
    if finding.status in ("ok", "not_checked"):
        yield from _wrapped(f"{title}: {finding.says}", rest=12)
        return
    yield title
    for part in (finding.says, finding.effect, f"-> {finding.remedy}"):
        yield from _wrapped(part, first=12, rest=12)


def _figures(found: Audit) -> Iterator[str]:
    if found.length is not None:
        bias = found.length
        yield from _wrapped(
            f"length: longer wins {bias.longer_wins:.3f} ({shares(bias.longer_wins_ci)}), slope "
            f"{bias.slope if bias.slope is not None else 0:+.3f} ({span(bias.slope_ci, '{:+.3f}')}), length-only judge "
            f"{bias.length_only_accuracy:.3f}, {bias.prompts:,} prompts"
            + ("" if bias.by_prompt else "; too few prompts to resample: the intervals take pairs as independent"),
            first=2,
            rest=4,
        )
    for effect in found.format:
        if effect.coefficient is not None and effect.win_rate is not None:
            yield (
                f"  {effect.mark:<12} {effect.pairs:>9,} pairs, wins {effect.win_rate:.2f}, weight at equal length "
                f"{effect.coefficient:+.2f}"
            )
    for mix in found.domains[:4]:
        yield from _wrapped(f"{mix.column}: {mix.what}, effect {mix.effect:.2f}", first=2, rest=4)
        for part in mix.parts[:8]:
            slope = "" if part.slope is None else f", length slope {part.slope:+.2f}"
            yield f"    {_cut(part.value, 30):<30} {part.rows:>9,} rows {part.share:.2f}{slope}"
    for one in found.annotators[:10]:
        agrees = "not known" if one.agrees is None else f"{one.agrees:.2f}"
        yield f"  {_cut(one.name, 20):<20} {one.labels:>9,} labels, agrees with the rest {agrees}"


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _wrapped(text: str, first: int = 0, rest: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, initial_indent=" " * first, subsequent_indent=" " * rest)
