"""Where a reward model will push a policy, from scored answers of its reference alone.

Of all policies at the same mean KL from the reference, the one with the highest score is the reference tilted by
exp(r / b), with one b for all prompts (`kedge.evaluate.frontier`). Under KL control with coefficient b it is the
optimum. From N answers a prompt the tilt is the weights softmax(r / b), and what it does to any feature f is
sum_n w_n f_n. A policy that is trained needs more KL to get as far, so the path is to be read by what is gained in
score, or as what the KL at most can do. The tilt only reweighs what the reference says: it foresees no answer that is
not among the samples.

Dimensions: P prompts, N answers, K points of the path, D draws of prompts, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kedge.errors import InputError, Problem
from kedge.evaluate.frontier import frontier
from kedge.evaluate.intervals import MIN_PROMPTS

Floats = NDArray[np.float64]

DRAWS = 1000
STATIONS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # nats at which the path is told
LEAST_ANSWERS = 20  # with a feature that more do not share, or lack, its share is not known well enough to reweigh
LEAST_WITH_ANSWERS = 5  # prompts among which these must be
BAND = 0.25  # of the reference's length, on each side
LENGTH = "length"


class Interval(NamedTuple):
    """A figure with its 95% interval over resampled prompts; `low` and `high` are nan for too few prompts."""

    value: float
    low: float
    high: float

    def excludes(self, number: float = 0.0) -> bool:
        return self.low > number or self.high < number

    def to_dict(self) -> dict[str, float]:
        return self._asdict()


@dataclass(frozen=True)
class Place:
    """A point of the path. `values` and `changes` are by feature: of the tilted reference, and from the reference."""

    kl: float  # nats per sequence
    beta: float  # reward per nat; infinite at the reference
    score: float  # gained
    effective: float  # answers that count, mean over prompts
    values: Mapping[str, Interval]
    changes: Mapping[str, Interval]


@dataclass(frozen=True)
class Leaving:
    """Where a feature first leaves what the reference does: at this beta, and from there on for smaller ones.

    `beta` and `kl` are None where it does not, as far as the samples go.
    """

    feature: str
    low: float
    high: float
    beta: float | None
    kl: float | None
    direction: int  # 1 upwards, -1 downwards, 0 not at all


@dataclass(frozen=True)
class Forecast:
    """The path of one reward model. `unknown` says of features why the samples do not tell where they go."""

    reward: str
    prompts: int
    answers: int
    spread: float  # standard deviation of the score within a prompt
    end: float  # nats up to which the samples support the path
    least_beta: float  # of that end: optima of a smaller one are beyond the samples
    path: tuple[Place, ...]  # from the reference to the end, evenly in the root of the KL
    stations: tuple[Place, ...]  # at round KL
    betas: Mapping[float, Place | str]  # at the betas asked for; a reason where the samples do not reach
    leaving: tuple[Leaving, ...]
    slope: Interval  # of the score over length within prompts, score per token
    runaway: Interval  # slope times the reference's length: the beta at which the runaway number is 1
    unknown: Mapping[str, str]
    standardised: Mapping[str, float]  # change at the common KL over the spread between the reference's answers

    @property
    def start(self) -> Place:
        """The reference."""
        return self.path[0]


@dataclass(frozen=True)
class _Path:
    """Everything along the grid, by prompt."""

    pressure: Floats  # [K] 1 / b
    kl: Floats  # [K, P]
    score: Floats  # [K, P] gain
    effective: Floats  # [K, P]
    features: Mapping[str, Floats]  # [K, P] each

    def at(self, places: Floats) -> _Path:
        """Between the points of the grid, linearly; `places` [M] in units of its points."""
        low = np.minimum(places.astype(int), len(self.pressure) - 2)
        share = places - low

        def between(values: Floats) -> Floats:
            part = share.reshape(-1, *[1] * (values.ndim - 1))
            found: Floats = values[low] * (1 - part) + values[low + 1] * part
            return found

        features = {name: between(values) for name, values in self.features.items()}
        return _Path(between(self.pressure), between(self.kl), between(self.score), between(self.effective), features)


def reach(answers: int) -> float:
    """nats that N answers a prompt support at most: the KL of the best of N, log N - (N - 1) / N."""
    return math.log(answers) - (answers - 1) / answers


def forecast(
    reward: str,
    scores: ArrayLike,
    features: Mapping[str, ArrayLike],
    *,
    betas: Sequence[float] = (),
    common: float = 1.0,
    draws: int = DRAWS,
) -> Forecast:
    """Where `scores` [P, N] push `features`, each [P, N] and `length` in tokens among them.

    `common` is the KL at which `standardised` changes are taken, or the end of the path if that is nearer. Raises
    `ValueError` for values that are not finite and `InputError` for a reward model to which all answers are alike.
    """
    score = np.asarray(scores, dtype=np.float64)
    given = {name: np.asarray(values, dtype=np.float64) for name, values in features.items()}
    for name, values in {"scores": score, **given}.items():
        if values.shape != score.shape or not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite and of the scores' shape {score.shape}, not {values.shape}")
    path = _supported(_path(score, given), score.shape[1])
    if len(path.pressure) < 2:
        what = f"scores every answer to a prompt alike, or {score.shape[1]} answers are too few to tell"
        raise InputError(Problem(reward, what, "give another reward model, or more --samples"))
    counts = _draws(score.shape[0], draws)
    kl = path.kl.mean(axis=1)
    end = float(kl[-1])
    unknown = {name: why for name, values in given.items() if (why := _too_rare(values))}
    told = [name for name in given if name not in unknown]
    stations = np.array([station for station in STATIONS if station <= end])
    slope, runaway = _slope(score, given[LENGTH], counts)
    standardised = _standardised(path, given, told, min(common, end))
    return Forecast(
        reward=reward,
        prompts=score.shape[0],
        answers=score.shape[1],
        spread=float(np.sqrt(score.var(axis=1).mean())),
        end=end,
        least_beta=math.inf if path.pressure[-1] == 0 else float(1 / path.pressure[-1]),
        path=tuple(_places(path, np.linspace(0, math.sqrt(end), 25) ** 2, told, counts)),
        stations=tuple(_places(path, stations, told, counts)),
        betas={beta: _at_beta(path, beta, told, counts) for beta in betas},
        leaving=tuple(_leaving(path, name, given[name]) for name in told),
        slope=slope,
        runaway=runaway,
        unknown=unknown,
        standardised=standardised,
    )


def supported_end(scores: ArrayLike) -> float:
    """nats up to which scored answers [P, N] support a path."""
    score = np.asarray(scores, dtype=np.float64)
    return min(frontier(score).end, reach(score.shape[1]))


def _path(scores: Floats, features: Mapping[str, Floats]) -> _Path:
    """The tilt along the frontier's own pressures, as far as the effective sample size goes."""
    best = frontier(scores)
    kl, score, effective = (np.empty((len(best.pressure), len(scores))) for _ in range(3))
    found = {name: np.empty_like(kl) for name in features}
    centred = scores - scores.mean(axis=1, keepdims=True)
    for k, pressure in enumerate(best.pressure):
        raised = pressure * centred
        top = raised.max(axis=1, keepdims=True)
        weights = np.exp(raised - top)
        weights /= weights.sum(axis=1, keepdims=True)
        log_mean = top[:, 0] + np.log(np.exp(raised - top).mean(axis=1))
        score[k] = (weights * centred).sum(axis=1)
        kl[k] = np.maximum(pressure * score[k] - log_mean, 0)
        effective[k] = 1 / (weights**2).sum(axis=1)
        for name, values in features.items():
            found[name][k] = (weights * values).sum(axis=1)
    kl[0] = score[0] = 0  # the reference itself, without rounding
    return _Path(best.pressure, kl, score, effective, found)


def _supported(path: _Path, answers: int) -> _Path:
    """The path up to the most that so many answers can support."""
    kl, limit = path.kl.mean(axis=1), reach(answers)
    if kl[-1] <= limit:
        return path
    last = int(np.argmax(kl > limit))  # the first point beyond; the last piece ends at the limit
    place = last - 1 + (limit - kl[last - 1]) / (kl[last] - kl[last - 1])
    return path.at(np.append(np.arange(last), place))


def _too_rare(values: Floats) -> str:
    """Why a feature's share is not known: it is on nearly no answer, or on nearly all alike."""
    usual = np.median(values)
    apart = values != usual
    if not apart.any():
        word = f"all {values.size} answers have {usual:g}; the tilt can only reweigh what the reference says"
        return f"{word} (95%: fewer than {3 / values.size:.2g} of its answers differ)"
    if apart.sum() < LEAST_ANSWERS or apart.any(axis=1).sum() < min(LEAST_WITH_ANSWERS, len(values)):
        where = (
            f"{int(apart.sum())} of {values.size} answers, on {int(apart.any(axis=1).sum())} of {len(values)} prompts"
        )
        return f"only {where}, differ from {usual:g}: too few to reweigh"
    return ""


# Intervals


def _draws(prompts: int, draws: int) -> Floats:
    """[D, P] shares of the prompts in resamples of them, the same every time; none for too few prompts."""
    if prompts < MIN_PROMPTS:
        return np.zeros((0, prompts))
    found: Floats = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts
    return found


def _places(path: _Path, targets: Floats, names: Sequence[str], counts: Floats) -> list[Place]:
    """The path at KL `targets`, each draw of prompts at the point where its own KL is that."""
    whole = _where(path.kl.mean(axis=1), targets)
    drawn = np.array([_where(path.kl @ share, targets) for share in counts]).reshape(len(counts), len(targets))
    return _described(path, whole, drawn, names, counts, targets)


def _at_beta(path: _Path, beta: float, names: Sequence[str], counts: Floats) -> Place | str:
    """The optimum at a coefficient, or why the samples do not tell it."""
    if beta <= 0 or 1 / beta > path.pressure[-1] * (1 + 1e-9):
        end, least = path.kl[-1].mean(), 1 / path.pressure[-1] if path.pressure[-1] else math.inf
        return f"the optimum is beyond {end:.2f} nats, where the samples end (beta {least:.3g})"
    place = np.interp([1 / beta], path.pressure, np.arange(len(path.pressure)))
    return _described(path, place, np.repeat(place[None], len(counts), axis=0), names, counts, None)[0]


def _where(kl: Floats, targets: Floats) -> Floats:
    """[M] places of the grid at which the rising `kl` [K] is each target, in its root, in which the start is linear."""
    places: Floats = np.interp(np.sqrt(targets), np.sqrt(np.maximum.accumulate(kl)), np.arange(len(kl)))
    return places


def _described(
    path: _Path, whole: Floats, drawn: Floats, names: Sequence[str], counts: Floats, targets: Floats | None
) -> list[Place]:
    """`whole` [M] places of the grid, `drawn` [D, M] those of each draw."""
    here = path.at(whole)
    columns = np.arange(len(path.pressure))
    values: dict[str, list[Interval]] = {}
    changes: dict[str, list[Interval]] = {}
    for name in names:
        grid, usual = path.features[name], path.features[name][0]
        means = counts @ grid.T  # [D, K]
        found = np.array([np.interp(at, columns, mean) for at, mean in zip(drawn, means, strict=True)])
        found = found.reshape(len(counts), len(whole))
        value = here.features[name].mean(axis=1)
        values[name] = _intervals(value, found)
        changes[name] = _intervals(value - usual.mean(), found - means[:, :1])
    pressure, kl = here.pressure, here.kl.mean(axis=1)
    return [
        Place(
            kl=float(kl[m] if targets is None else targets[m]),
            beta=math.inf if pressure[m] == 0 else float(1 / pressure[m]),
            score=float(here.score[m].mean()),
            effective=float(here.effective[m].mean()),
            values={name: values[name][m] for name in names},
            changes={name: changes[name][m] for name in names},
        )
        for m in range(len(whole))
    ]


def _intervals(values: Floats, drawn: Floats) -> list[Interval]:
    """Of each of `values` [M], from `drawn` [D, M]."""
    if not len(drawn):
        return [Interval(float(value), math.nan, math.nan) for value in values]
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    return [Interval(*map(float, three)) for three in zip(values, low, high, strict=True)]


# Advice


def _leaving(path: _Path, name: str, values: Floats) -> Leaving:
    """Length leaves 25% around the reference's; any other feature leaves where 95% of evaluations of the reference on
    as many prompts, with one answer each, would find it. `values` [P, N] is the feature of the answers."""
    grid = path.features[name].mean(axis=1)
    half = grid[0] * BAND if name == LENGTH else 1.96 * float(values.std()) / math.sqrt(len(values))
    low, high = grid[0] - half, grid[0] + half
    outside = (grid < low) | (grid > high)
    if not outside.any():
        return Leaving(name, float(low), float(high), None, None, 0)
    first = int(np.argmax(outside))
    edge = high if grid[first] > high else low
    gap = grid[first] - grid[first - 1]
    place = np.array([first - 1 + (edge - grid[first - 1]) / gap])
    there = path.at(place)
    return Leaving(
        feature=name,
        low=float(low),
        high=float(high),
        beta=float(1 / there.pressure[0]),
        kl=float(there.kl[0].mean()),
        direction=1 if grid[first] > high else -1,
    )


def _slope(scores: Floats, lengths: Floats, counts: Floats) -> tuple[Interval, Interval]:
    """Slope of the score over length within prompts (score per token), and the beta at which the runaway number
    slope * length / beta is 1, with both taken from the same draws."""
    away = lengths - lengths.mean(axis=1, keepdims=True)
    both = (away * (scores - scores.mean(axis=1, keepdims=True))).mean(axis=1)
    own, usual = (away**2).mean(axis=1), lengths.mean(axis=1)
    if not own.any():
        return Interval(math.nan, math.nan, math.nan), Interval(math.nan, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (counts @ both) / (counts @ own)
    value = both.mean() / own.mean()
    slope = _intervals(np.array([value]), drawn[:, None])[0]
    return slope, _intervals(np.array([value * usual.mean()]), (drawn * (counts @ usual))[:, None])[0]


def _standardised(path: _Path, given: Mapping[str, Floats], names: Sequence[str], kl: float) -> dict[str, float]:
    here = path.at(_where(path.kl.mean(axis=1), np.array([kl])))
    return {
        name: float((here.features[name][0].mean() - path.features[name][0].mean()) / given[name].std())
        for name in names
    }


# What the reward model likes


@dataclass(frozen=True)
class Exploit:
    """The answer to a prompt that the tilt raises most, beside one whose score is usual there."""

    prompt: int
    answer: int
    usual: int
    score: float
    usual_score: float
    times: float  # as likely as under the reference


def exploits(scores: ArrayLike, place: Place, count: int) -> list[Exploit]:
    """On the `count` prompts where the tilt gains most at `place`, the answers that it prefers."""
    score = np.asarray(scores, dtype=np.float64)
    pressure = 0.0 if math.isinf(place.beta) else 1 / place.beta
    raised = pressure * (score - score.max(axis=1, keepdims=True))
    weights = np.exp(raised) / np.exp(raised).sum(axis=1, keepdims=True)
    gain = (weights * score).sum(axis=1) - score.mean(axis=1)
    found = []
    for prompt in np.argsort(-gain, kind="stable")[:count]:
        row = score[prompt]
        best, usual = int(np.argmax(row)), int(np.argsort(row, kind="stable")[(len(row) - 1) // 2])
        times = float(weights[prompt, best] * len(row))
        found.append(Exploit(int(prompt), best, usual, float(row[best]), float(row[usual]), times))
    return found


def rank(found: Sequence[Forecast], style: Sequence[str]) -> list[dict[str, Any]]:
    """Reward models in order of how far they push the features `style`, least first.

    How far is the largest change of any of them at the same KL, over the spread between the reference's answers.
    """

    def furthest(one: Forecast) -> tuple[float, str]:
        known = [(abs(value), name) for name, value in one.standardised.items() if name in style]
        return max(known, default=(0.0, ""))

    ordered = sorted(found, key=lambda one: furthest(one)[0])
    return [
        {"reward": one.reward, "furthest": furthest(one)[1], "change": one.standardised.get(furthest(one)[1], 0.0)}
        for one in ordered
    ]
