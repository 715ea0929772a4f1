"""What a judge pays for length, between answers to the same prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kedge.evaluate.intervals import MIN_PROMPTS, Estimate, Floats, Integers, clustered, ratio
from kedge.evaluate.reward.answers import Judged, NotChecked


@dataclass(frozen=True)
class Slope:
    """Score per unit of length within prompts, and the score, in standard deviations, of half a median more of it."""

    per_unit: Estimate
    median: float  # units of an answer
    half_more: float  # standard deviations of the score within prompts, for an answer longer by half the median


@dataclass(frozen=True)
class LengthUse:
    """`prefers_longer` is the share of decided comparisons in which the judge scores the longer response higher,
    `people_prefer_longer` that in which people preferred it. Correlation is Pearson's, after taking off each prompt's
    mean; `spread` is the score's standard deviation after the same.
    """

    character: Slope
    token: Slope | NotChecked
    correlation: float
    spread: float
    prefers_longer: Estimate
    people_prefer_longer: Estimate
    answers: int
    prompts: int


def length_use(judged: Judged, scores: Floats, tokens: Floats | None) -> LengthUse | NotChecked:
    """From prompts with two or more answers. `tokens` [A] are the lengths that the judge itself sees, if any."""
    several = np.bincount(judged.prompt, weights=np.isfinite(scores), minlength=1)[judged.prompt] > 1
    use = several & np.isfinite(scores)
    prompt, score, characters = judged.prompt[use], scores[use], judged.characters[use]
    prompts = len(np.unique(prompt))
    if prompts < MIN_PROMPTS:
        return NotChecked(f"{prompts} prompts with two or more answers, {MIN_PROMPTS} are needed")
    if not np.any(centred(characters, prompt)):
        return NotChecked("all answers to a prompt are equally long")
    spread = within_spread(score, prompt)
    part = judged.where(judged.decided & (judged.characters[judged.first] != judged.characters[judged.second]))
    side = np.sign(judged.characters[part.first] - judged.characters[part.second])
    agreed = 0.5 + 0.5 * side * np.sign(scores[part.first] - scores[part.second])
    shares = [
        clustered(np.stack([values, np.ones(len(values))], axis=1), part.pair_prompt, ratio)
        if len(values)
        else Estimate(math.nan, None, None)
        for values in (agreed, 0.5 + 0.5 * side)
    ]
    return LengthUse(
        character=_slope(score, characters, prompt, spread),
        token=NotChecked("this judge has no tokens") if tokens is None else _slope(score, tokens[use], prompt, spread),
        correlation=_correlation(centred(score, prompt), centred(characters, prompt)),
        spread=spread,
        prefers_longer=shares[0],
        people_prefer_longer=shares[1],
        answers=len(score),
        prompts=prompts,
    )


def centred(values: Floats, prompt: Integers) -> Floats:
    """Values less the mean of their prompt: Bradley-Terry leaves that mean free, so it says nothing."""
    _, number = np.unique(prompt, return_inverse=True)
    return np.asarray(values - (np.bincount(number, values) / np.bincount(number))[number])


def within_spread(scores: Floats, prompt: Integers) -> float:
    """Standard deviation of scores within prompts, one degree of freedom less for each prompt."""
    free = len(scores) - len(np.unique(prompt))
    return math.sqrt(float(np.sum(centred(scores, prompt) ** 2)) / free) if free > 0 else math.nan


def slope_within(scores: Floats, lengths: Floats, prompt: Integers) -> Estimate:
    """Least squares with an effect for each prompt; the interval is robust to dependence within prompts.

    Sandwich variance over prompts with the factor G / (G - 1) and Student's t with G - 1 degrees of freedom
    (Cameron & Miller 2015); the prompts' own effects are nested in the clusters and cost no degrees of freedom.
    """
    from scipy import stats

    x, y = centred(lengths, prompt), centred(scores, prompt)
    total = float(x @ x)
    if total == 0:
        return Estimate(math.nan, None, None)
    slope = float(x @ y) / total
    _, number = np.unique(prompt, return_inverse=True)
    clusters = int(number.max()) + 1
    if clusters < MIN_PROMPTS:
        return Estimate(slope, None, None)
    push = np.bincount(number, x * (y - slope * x))
    error = math.sqrt(clusters / (clusters - 1) * float(push @ push)) / total
    half = float(stats.t.ppf(0.975, clusters - 1)) * error
    return Estimate(slope, slope - half, slope + half)


def _slope(score: Floats, lengths: Floats, prompt: Integers, spread: float) -> Slope:
    per_unit, median = slope_within(score, lengths, prompt), float(np.median(lengths))
    gain = per_unit.value * 0.5 * median / spread if spread > 0 else 0.0
    return Slope(per_unit, median, gain)


def _correlation(x: Floats, y: Floats) -> float:
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else 0.0
