"""Marks of style: which a text carries, and which of them the labels reward at equal length."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from kedge.data.audit.clusters import Clusters, clustered
from kedge.data.audit.fit import fit_logistic
from kedge.data.audit.tables import Array, log_ratio, outcome

READ = 20_000  # characters in which marks are looked for
LEAST, LEAST_TEXTS = 30, 10  # pairs of which one side alone has the mark, and distinct texts among those sides

_LIST = re.compile(r"^[ \t]*(?:[-*\u2022+]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
_DIGIT = re.compile(r"\d")
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apologies)\b", re.IGNORECASE)

MARKS: dict[str, Callable[[str], bool]] = {
    "list": lambda text: _LIST.search(text) is not None,
    "heading": lambda text: "#" in text and _HEADING.search(text) is not None,
    "bold": lambda text: text.count("**") >= 2,
    "code": lambda text: "`" in text,
    "paragraphs": lambda text: "\n\n" in text,
    "exclamation": lambda text: "!" in text,
    "question": lambda text: "?" in text,
    "digits": lambda text: _DIGIT.search(text) is not None,
    "link": lambda text: "http" in text or "www." in text,
    "apology": lambda text: _APOLOGY.search(text) is not None,
}


@dataclass(frozen=True)
class MarkEffect:
    """What one mark does to the label: win rate of the side that has it, and its weight beside log length ratio.

    `coefficient` is in log-odds, from one logistic regression on all marks and log length ratio together; `interval`
    is 95%, `p` two-sided, both clustered by prompt. They are None where too few pairs differ in the mark.
    """

    mark: str
    pairs: int
    win_rate: float | None
    coefficient: float | None
    interval: tuple[float, float] | None
    p: float | None


def marks_of(text: str) -> int:
    """The marks a text carries, one bit each in the order of MARKS."""
    text = text[:READ]
    return sum(1 << bit for bit, has in enumerate(MARKS.values()) if has(text))


def format_bias(pairs: Array) -> tuple[MarkEffect, ...]:
    """The effect of every mark on decided pairs."""
    decided = pairs[outcome(pairs) != 0]
    sign = outcome(decided).astype(np.int16)
    bits = {
        mark: _bit(decided["chosen_marks"], bit) - _bit(decided["rejected_marks"], bit)
        for bit, mark in enumerate(MARKS)
    }
    differs = {mark: sign * values for mark, values in bits.items()}
    counts = {mark: int(np.count_nonzero(values)) for mark, values in differs.items()}
    fitted = [mark for mark in MARKS if counts[mark] >= LEAST and _texts(decided, bits, mark) >= LEAST_TEXTS]
    coefficients, errors = _joint(decided, [differs[mark] for mark in fitted])
    effects = []
    for mark in MARKS:
        rate = float(np.mean(differs[mark][differs[mark] != 0] > 0)) if counts[mark] else None
        if mark not in fitted:
            effects.append(MarkEffect(mark, counts[mark], rate, None, None, None))
            continue
        weight, error = coefficients[fitted.index(mark)], errors[fitted.index(mark)]
        p = float(2 * ndtr(-abs(weight) / error)) if error > 0 else 1.0
        interval = (float(weight - 1.96 * error), float(weight + 1.96 * error))
        effects.append(MarkEffect(mark, counts[mark], rate, float(weight), interval, p))
    return tuple(effects)


def _texts(pairs: Array, bits: dict[str, Array], mark: str) -> int:
    """How many distinct texts carry the mark alone: one text in many pairs says little about its mark."""
    carriers = pairs["chosen"][bits[mark] > 0], pairs["rejected"][bits[mark] < 0]
    return len(np.unique(np.concatenate(carriers)))


def _bit(marks: Array, bit: int) -> Array:
    return ((marks >> bit) & 1).astype(np.int16)


def _joint(decided: Array, columns: list[Array]) -> tuple[Array, Array]:
    """Coefficients of the marks beside log length ratio, and their errors clustered by prompt."""
    if not columns:
        return np.zeros(0), np.zeros(0)
    features = np.column_stack([*columns, log_ratio(decided)]).astype(np.float32)
    clusters: Clusters = clustered(decided["prompt"])
    found = fit_logistic(features, np.ones(len(features)), clusters)
    return found.coefficients[:-1], found.errors[:-1]
