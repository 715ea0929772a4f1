"""Write the tables of docs/verify.md from a run of `kedge verify`. `tests/test_verify.py` holds their rows current.

Usage: python tools/render_verify.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kedge.experiment.verify.checks import CHECKS, Row, verify

PAGE = Path(__file__).parents[1] / "docs" / "verify.md"
MARK = "<!-- rows -->\n"  # what stands above it is written by hand
COLUMNS = ("row", "what it is", "must end at", "TV", "objective gap", "KL", "KL gap", "ok")
TITLES = {
    "optimiser": "Optimisers",
    "estimator": "Places and estimators of the KL",
    "control": "Configurations known to be wrong",
}


def render(rows: Sequence[Row]) -> str:
    """The tables."""
    parts = []
    for kind, title in TITLES.items():
        cells = [_cells(row) for row in rows if row.kind == kind]
        lines = [COLUMNS, ("---",) * 3 + ("---:",) * 4 + ("---",), *cells]
        parts.append(f"\n### {title}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    figures = [f"{row.tv:.4f}", f"{row.objective_gap:.5f}", f"{row.kl:.3f}", f"{row.kl_gap:.3f}"]
    texts = (f"`{row.name}`", escaped(row.what), escaped(row.expected))
    return (*texts, *figures, "yes" if row.ok else "**no**")


def escaped(text: str) -> str:
    """Text as a cell of a table."""
    return text.replace("|", r"\|").replace("*", r"\*")


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for row in verify(CHECKS):
        found.append(row)
        sys.stderr.write(f"{row.name} {row.tv:.4f} {row.seconds:.1f} s {'ok' if row.ok else 'FAIL'}\n")
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(above + MARK + render(found), encoding="utf-8")
