"""A grid of styles: is the right answer still preferred when the wrong one is written in more style?

The matrix and its three means are those of RM-Bench (Liu et al. 2024): chosen in style i against rejected in style j,
styles from plain to rich.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge.data import columns
from kedge.data.files import read_rows
from kedge.data.records import Prompt, prompt_text
from kedge.errors import InputError, Problem
from kedge.evaluate.intervals import Estimate, Floats, clustered, ratio
from kedge.evaluate.reward.answers import NotChecked, RewardJudge, lengths

STYLES = ("concise", "detailed", "markdown")
MIN_ROWS = 30
SHOWN = 5


@dataclass(frozen=True)
class GridRow:
    """A right and a wrong answer to a prompt, each in every style."""

    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    domain: str


@dataclass(frozen=True)
class StyleGrid:
    """`matrix[i][j]`: share of rows in which the right answer in style i beats the wrong one in style j.

    `hard` is the mean where the wrong answer has more style than the right one, `normal` where both have the same,
    `easy` where it has less. `domains` has hard, normal and easy by domain.
    """

    matrix: tuple[tuple[float, ...], ...]
    hard: Estimate
    normal: Estimate
    easy: Estimate
    domains: Mapping[str, tuple[float, float, float]]
    rows: int
    unread: int


@dataclass(frozen=True)
class Grids:
    """The judge's grid beside that of a judge that prefers the longer response."""

    judge: StyleGrid
    longer: StyleGrid


def load_grid(path: Path) -> tuple[GridRow, ...]:
    """Rows with the columns prompt, chosen and rejected (three texts each) and, where there is one, domain.

    Raises `InputError` with the first problems if any row cannot be used.
    """
    rows: list[GridRow] = []
    problems: list[Problem] = []
    for number, row in read_rows(path):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            rows.append(_row(row))
        except columns.Unusable as error:
            problems.append(Problem(f"{path}:{number}", error.what, error.remedy))
    if problems:
        raise InputError(problems[:SHOWN])
    return tuple(rows)


def _row(row: Mapping[str, Any]) -> GridRow:
    sides = []
    for name in ("chosen", "rejected"):
        texts = row.get(name)
        if not isinstance(texts, list | tuple) or len(texts) != len(STYLES):
            remedy = f"write a list of {len(STYLES)} texts: {', '.join(STYLES)}"
            raise columns.Unusable(f"{name} is not {len(STYLES)} texts", remedy)
        if not all(isinstance(text, str) for text in texts):
            raise columns.Unusable(f"{name} holds something that is not text", "write texts")
        sides.append(tuple(texts))
    return GridRow(columns.prompt(row), sides[0], sides[1], str(row.get("domain") or "all"))


def evaluate_grid(judge: RewardJudge, rows: Sequence[GridRow]) -> Grids | NotChecked:
    """The judge's matrix, by the rows of which it can read every text; equal scores count half."""
    answers = [(row.prompt, text) for row in rows for text in (*row.chosen, *row.rejected)]
    scores = judge.score(answers).reshape(-1, 2, len(STYLES))
    read = np.asarray(np.isfinite(scores).all(axis=(1, 2)))
    if read.sum() < MIN_ROWS:
        return NotChecked(f"{int(read.sum())} of {len(rows)} rows can be read, {MIN_ROWS} are needed")
    kept = [row for row, ok in zip(rows, read.tolist(), strict=True) if ok]
    sizes = lengths(answers).reshape(-1, 2, len(STYLES))
    return Grids(_grid(scores[read], kept, len(rows)), _grid(sizes[read], kept, len(rows)))


def _grid(scores: Floats, rows: Sequence[GridRow], total: int) -> StyleGrid:
    won = 0.5 + 0.5 * np.sign(scores[:, 0, :, None] - scores[:, 1, None, :])  # [N, chosen style, rejected style]
    size = len(STYLES)
    index = np.arange(size)
    masks = [index[:, None] < index, index[:, None] == index, index[:, None] > index]
    parts = np.stack([won[:, mask].mean(axis=1) for mask in masks], axis=1)
    names: dict[str, int] = {}
    prompt = np.array([names.setdefault(prompt_text(row.prompt), len(names)) for row in rows])
    ones = np.ones(len(rows))
    hard, normal, easy = (clustered(np.stack([part, ones], axis=1), prompt, ratio) for part in parts.T)
    domains = {}
    for name in sorted({row.domain for row in rows}):
        means = parts[[row.domain == name for row in rows]].mean(axis=0)
        domains[name] = (float(means[0]), float(means[1]), float(means[2]))
    matrix = tuple(tuple(float(cell) for cell in line) for line in won.mean(axis=0))
    return StyleGrid(matrix, hard, normal, easy, domains, len(rows), total - len(rows))
