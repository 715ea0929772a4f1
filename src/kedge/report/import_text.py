"""What an import found, for people: what the numbers mean, and which checks the columns allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kedge.diagnose.checks import Check
from kedge.diagnose.needs import in_words
from kedge.trace.foreign import Conventions

PLACES = {
    "reward": "in the reward",
    "loss": "in the loss",
    "none": "not charged",
    "unknown": "not known where it is charged",
}
SCORES = {
    "last": "on the last position of a response",
    "after": "in the slot after the last position",
    "token": "one for each position",
}


def stated(conventions: Conventions) -> dict[str, str]:
    """What the numbers are taken to mean."""
    beta = "" if conventions.beta != conventions.beta else f", coefficient {conventions.beta:g}"
    beside = f", {conventions.scale_by}" if conventions.scale_by else ""
    return {
        "KL": f"{PLACES[conventions.kl]}{beta}",
        "estimator": conventions.kl_estimator,
        "unit of the trainer's KL": conventions.kl_unit,
        "score position": SCORES[conventions.score_position],
        "advantage": f"{conventions.normalisation}{beside}",
        "positions": f"{conventions.positions}; lengths and sums over a response are in {conventions.positions}",
    }


def table_lines(present: Iterable[str], table: Sequence[tuple[Check, tuple[str, ...]]]) -> list[str]:
    """Columns present -> checks possible, and what the other checks lack."""
    able = [check for check, lacking in table if not lacking]
    lines = [
        f"columns present: {', '.join(present) or 'none'}",
        f"checks possible ({len(able)} of {len(table)}):",
        *(f"  {check.name:<18} {check.title}" for check in able),
    ]
    without: dict[tuple[str, ...], list[str]] = {}
    for check, lacking in table:
        if lacking:
            without.setdefault(lacking, []).append(check.name)
    lines += ["not possible:"] if without else []
    return lines + [f"  {', '.join(names)}: without {in_words(lacking)}" for lacking, names in without.items()]
