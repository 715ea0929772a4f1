"""How scores go with grades that people gave answers one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kedge.evaluate.intervals import Estimate, Floats, Integers, resampled
from kedge.evaluate.reward.answers import Judged, NotChecked

MIN_ANSWERS = 30
DRAWS = 300


@dataclass(frozen=True)
class Graded:
    """Over all prompts: the area under the ROC curve for verdicts, Spearman's rank correlation for ratings.

    Scores of different prompts are compared here, which Bradley-Terry leaves free; accuracy compares answers to one.
    """

    kind: Literal["auc", "spearman"]
    estimate: Estimate
    longer: Estimate  # of a judge that prefers the longer response
    answers: int


def graded_apart(judged: Judged, scores: Floats) -> Graded | NotChecked:
    """Of answers with a rating or a verdict; an answer counts as good if most people called it that."""
    use = np.isfinite(judged.grade) & np.isfinite(scores)
    if not np.isfinite(judged.grade).any():
        return NotChecked("the data compare answers, nobody graded them one by one")
    if use.sum() < MIN_ANSWERS:
        return NotChecked(f"{int(use.sum())} graded answers, {MIN_ANSWERS} are needed")
    grade = judged.grade[use]
    if judged.verdicts:
        grade = (grade > 0.5).astype(np.float64)
    if len(np.unique(grade)) < 2:
        return NotChecked("every answer has the same grade")
    figure = auc if judged.verdicts else spearman
    prompt = judged.prompt[use]

    def estimate(values: Floats) -> Estimate:
        def over(rows: Integers) -> float:
            return figure(values[rows], grade[rows])

        return resampled(prompt, over, draws=DRAWS)

    kind: Literal["auc", "spearman"] = "auc" if judged.verdicts else "spearman"
    return Graded(kind, estimate(scores[use]), estimate(judged.characters[use]), int(use.sum()))


def auc(scores: Floats, good: Floats) -> float:
    """Chance that a good answer's score is above a bad one's, equal scores counting half (Mann & Whitney 1947)."""
    from scipy.stats import rankdata

    number = int(good.sum())
    others = len(good) - number
    if not number or not others:
        return math.nan
    return float((rankdata(scores)[good > 0.5].sum() - number * (number + 1) / 2) / (number * others))


def spearman(scores: Floats, grades: Floats) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; NaN where either never differs."""
    from scipy.stats import rankdata

    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (scores, grades))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan
