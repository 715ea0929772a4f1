"""Everything that is measured of a judge, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kedge.evaluate.intervals import Estimate, Floats, clustered, ratio
from kedge.evaluate.reward.accuracy import Agreement, agreements
from kedge.evaluate.reward.answers import Judged, NotChecked, Reading, RewardJudge
from kedge.evaluate.reward.calibration import Calibration, calibration
from kedge.evaluate.reward.grades import Graded, graded_apart
from kedge.evaluate.reward.grid import GridRow, Grids, evaluate_grid
from kedge.evaluate.reward.length import LengthUse, centred, length_use
from kedge.evaluate.reward.padding import NEUTRAL, Padding, padding_probe


@dataclass(frozen=True)
class Counts:
    """What was there to measure on. `unread` answers, such as those past the context, are left out everywhere."""

    prompts: int
    answers: int
    unread: int
    comparisons: int
    tied: int
    identical: int
    decided: int


@dataclass(frozen=True)
class Member:
    """One member of an ensemble by itself."""

    accuracy: Agreement | NotChecked
    length_balanced: Agreement | NotChecked
    half_more: float | None  # see `Slope.half_more`


@dataclass(frozen=True)
class Ensemble:
    """The members, and the mean correlation between their scores after taking off each prompt's mean."""

    members: tuple[Member, ...]
    correlation: float


@dataclass(frozen=True)
class Distance:
    """How many answers lie beyond `limit`, where one in a hundred of those trained on would."""

    beyond: Estimate
    median: float
    limit: float


@dataclass(frozen=True)
class Measurement:
    """What is known of a judge; each part that could not be had says why."""

    judge: str
    counts: Counts
    accuracy: Mapping[str, Agreement | NotChecked]
    grades: Graded | NotChecked
    calibration: Calibration | NotChecked
    length: LengthUse | NotChecked
    padding: Padding | NotChecked
    grid: Grids | NotChecked
    distance: Distance | NotChecked
    ensemble: Ensemble | NotChecked

    def figures(self) -> dict[str, Any]:
        """As nested dictionaries, for JSON."""
        return asdict(self)


def measure(
    judge: RewardJudge,
    judged: Judged,
    *,
    sentences: Sequence[str] = NEUTRAL,
    grid: Sequence[GridRow] | None = None,
) -> Measurement:
    """Let the judge read every answer once, then padded samples and the grid, and compare with what people said."""
    reading = judge.read(judged.answers)
    scores = reading.score
    read = np.isfinite(scores)
    seen = judged.where(read[judged.first] & read[judged.second])
    tokens = None if judge.tokens is None else judge.tokens([text for _, text in judged.answers])
    return Measurement(
        judge=judge.name,
        counts=_counts(judged, seen, read.sum()),
        accuracy=agreements(seen, scores),
        grades=graded_apart(judged, scores),
        calibration=calibration(seen, scores, judge.log_odds),
        length=length_use(seen, scores, tokens),
        padding=padding_probe(judge, judged, scores, sentences),
        grid=NotChecked("no grid was given") if grid is None else evaluate_grid(judge, grid),
        distance=_distance(judge, judged, reading),
        ensemble=_ensemble(seen, reading),
    )


def _counts(judged: Judged, seen: Judged, read: int) -> Counts:
    identical = seen.first == seen.second
    return Counts(
        prompts=len(np.unique(judged.prompt)),
        answers=len(judged.answers),
        unread=len(judged.answers) - int(read),
        comparisons=len(judged.first),
        tied=int(((seen.share == 0.5) & ~identical).sum()),
        identical=int(identical.sum()),
        decided=int(seen.decided.sum()),
    )


def _distance(judge: RewardJudge, judged: Judged, reading: Reading) -> Distance | NotChecked:
    if reading.distance is None or judge.limit is None:
        return NotChecked("nothing is known of what this judge was trained on")
    known = np.isfinite(reading.distance)
    if not known.any():
        return NotChecked("no answer can be read")
    distance = reading.distance[known]
    beyond = (distance > judge.limit).astype(np.float64)
    parts = np.stack([beyond, np.ones_like(beyond)], axis=1)
    return Distance(clustered(parts, judged.prompt[known], ratio), float(np.median(distance)), judge.limit)


def _ensemble(seen: Judged, reading: Reading) -> Ensemble | NotChecked:
    if reading.members is None or reading.members.shape[1] < 2:
        return NotChecked("this judge has one member")
    read = np.isfinite(reading.score)
    if read.sum() < 2:
        return NotChecked("no answers can be read")
    return Ensemble(
        tuple(_member(seen, scores) for scores in reading.members.T), _correlation(seen, reading.members, read)
    )


def _member(seen: Judged, scores: Floats) -> Member:
    found, length = agreements(seen, scores), length_use(seen, scores, None)
    half_more = None if isinstance(length, NotChecked) else length.character.half_more
    return Member(found["all"], found["length_balanced"], half_more)


def _correlation(seen: Judged, members: Floats, read: Any) -> float:
    within = np.stack([centred(column[read], seen.prompt[read]) for column in members.T])
    size = np.sqrt((within**2).sum(axis=1))
    if not (size > 0).all():
        return 0.0
    unit = within / size[:, None]
    pairs = np.triu_indices(len(unit), k=1)
    return float((unit @ unit.T)[pairs].mean())
