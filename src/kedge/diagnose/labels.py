"""Labels that a user has joined to a run's responses, as numbers of a step for the checks that need people.

Columns with these names are looked for: `human`, what people think of the response, larger is better; `correct`, 0 or
1; `confidence`, from 0 to 1, how sure the response or the policy is to be correct.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.rows import channel
from kedge.diagnose.view import Facts, Reducer
from kedge.trace.labels import Labels
from kedge.trace.reader import StepTrace

HUMAN, CORRECT, CONFIDENCE = "human", "correct", "confidence"
FEWEST = 8  # labelled responses of a step


def labelled(labels: Labels) -> Reducer:
    """What the labels say of a step: for `view_of`, beside the reducers of the checks."""

    def facts(step: StepTrace) -> Facts:
        found: dict[str, float] = {}
        if HUMAN in labels.columns:
            found |= _human(step, labels.numbers(step, HUMAN))
        if CORRECT in labels.columns and CONFIDENCE in labels.columns:
            sure, right = labels.numbers(step, CONFIDENCE), labels.numbers(step, CORRECT)
            known = np.isfinite(sure) & np.isfinite(right)
            if known.sum() >= FEWEST:
                found["labels/overconfidence"] = float((sure - right)[known].mean())
        return found

    return facts


def _human(step: StepTrace, said: NDArray[np.float64]) -> Facts:
    score = channel(step, "score")
    known = np.isfinite(said)
    if known.sum() < FEWEST:
        return {}
    found = {"labels/human": float(said[known].mean()), "labels/human_spread": float(said[known].std())}
    if score is not None:
        found["labels/agreement"] = _correlation(score.sum(axis=1)[known], said[known])
    return found


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where one does not vary."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (one, other)]
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size > 0 else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[place], dtype=np.float64)
