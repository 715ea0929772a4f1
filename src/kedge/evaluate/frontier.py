"""The most score that any policy can gain at a given divergence from the reference, and how near one comes to it.

Of all policies at the same mean KL(policy || reference) over the prompts, the one with the highest mean score is the
exponential tilt reference(y|x) exp(r(x, y) / b) / Z(x), with one b for all prompts (the Gibbs variational principle,
Donsker and Varadhan 1975). Its path over b is the frontier. What is tilted is the score alone.

From N samples a prompt the tilt is a reweighting of the samples, softmax(r / b): the exact frontier of a reference that
says nothing but them. Its expectation at a given KL rises with N towards the truth (Jensen's inequality in
F(d) = min_b b d + b mean_x log E exp(r / b)). So few samples make the frontier too low and an efficiency too high;
`shortfall` says by how much.

Dimensions: P prompts, N responses, K points of the path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEAST = 10.0  # effective samples per prompt below which the tilt rests on too few answers
_AT_ONCE = 2**19  # weights held at a time: bounds memory
_PRESSURES = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 481)])  # 1 / b, per standard deviation of the score


@dataclass(frozen=True)
class Frontier:
    """The path of the tilt from the reference to where the samples cease to support it, as far as KL rises."""

    kl: Floats  # [K] nats per sequence, mean over prompts, rising from 0
    score: Floats  # [K] gain in mean score over the reference, rising from 0 and concave in `kl`
    pressure: Floats  # [K] 1 / b: nats that a unit of score is worth; the slope of the score over KL is b
    effective: Floats  # [K] samples that count, 1 / sum w^2, mean over prompts; infinite where all responses are known

    @property
    def end(self) -> float:
        """The largest KL that the samples support, nats per sequence."""
        return float(self.kl[-1])

    def gain(self, kl: ArrayLike) -> Floats:
        """The most that can be gained at `kl`; NaN below 0 and beyond the end."""
        # Near the reference the gain grows with the root of the KL, so that is what is interpolated in.
        root = np.sqrt(np.maximum(_floats(kl), 0))
        found = np.interp(root, np.sqrt(self.kl), self.score)
        return np.where((_floats(kl) >= 0) & (_floats(kl) <= self.end), found, np.nan)

    def ceiling(self, kl: ArrayLike) -> Floats:
        """As `gain`, but beyond the end what a concave frontier cannot exceed: its tangent at the end."""
        if self.pressure[-1] == 0:
            return self.gain(kl)
        beyond = self.score[-1] + (_floats(kl) - self.end) / self.pressure[-1]
        return np.where(_floats(kl) > self.end, beyond, self.gain(kl))


def frontier(scores: ArrayLike, reference: ArrayLike | None = None, *, least: float = LEAST) -> Frontier:
    """The frontier of a reference from the scores [P, N] of its answers.

    Without `reference` the answers of a prompt are independent samples, and the path ends where fewer than `least` of
    them count. With it they are all there are, and it holds their log-probabilities [P, N]. Raises `ValueError` for
    scores that are not finite, or fewer than two a prompt.
    """
    scores = _floats(scores)
    if scores.ndim != 2 or scores.shape[1] < 2 or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite and [prompts, at least 2 answers], not {scores.shape}")
    known = reference is not None
    usual = np.full(scores.shape, -np.log(scores.shape[1])) if reference is None else _floats(reference)
    mean = (np.exp(usual) * scores).sum(axis=1, keepdims=True)
    centred = scores - mean
    spread = float(np.sqrt((np.exp(usual) * centred**2).sum(axis=1).mean()))
    if spread <= 1e-12 * max(1.0, float(np.abs(scores).max())):  # every answer is as good as any other
        zero = np.zeros(1)
        return Frontier(zero, zero, zero, np.full(1, np.inf if known else float(scores.shape[1])))
    kl, score, effective = _path(centred, usual, _PRESSURES / spread, 0.0 if known else least)
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(kl)) > 0])
    pressure = (_PRESSURES / spread)[: len(kl)][rising]
    return Frontier(kl[rising], score[rising], pressure, np.full(len(pressure), np.inf) if known else effective[rising])


def efficiency(score_gain: ArrayLike, kl: ArrayLike, best: Frontier) -> Floats:
    """The score gained at `kl` over the most that any policy can gain there; NaN at 0 and beyond the support.

    At most 1, but for sampling error in the three figures and for the shortfall of the frontier. The gain is over the
    reference's mean score on the same prompts, `kl` the mean KL there in nats per sequence.
    """
    return _over(_floats(score_gain), best.gain(kl))


def least_efficiency(score_gain: ArrayLike, kl: ArrayLike, best: Frontier) -> Floats:
    """As `efficiency`, and beyond the support a lower bound of it: the gain over the frontier's tangent."""
    return _over(_floats(score_gain), best.ceiling(kl))


def shortfall(scores: ArrayLike, kl: ArrayLike) -> Floats:
    """By how much the frontier of samples `scores` [P, N] is too low at `kl`: what it gains over that of N / 2 samples.

    To first order the error falls as 1 / N, so that the step from N / 2 to N is the step from N to infinitely many.
    """
    scores = _floats(scores)
    whole = frontier(scores, least=0).gain(kl)
    halves = [frontier(scores[:, part::2], least=0) for part in (0, 1)]
    fewer = [half.gain(np.minimum(_floats(kl), half.end)) for half in halves]
    return whole - (fewer[0] + fewer[1]) / 2


def _path(scores: Floats, usual: Floats, pressures: Floats, least: float) -> tuple[Floats, Floats, Floats]:
    """KL, gain and effective samples [K] along `pressures`, as far as `least` samples count; the start is always in."""
    step = max(1, _AT_ONCE // scores.size)
    parts: list[Floats] = []
    for first in range(0, len(pressures), step):
        pressure = pressures[first : first + step, None, None]
        unnormalised = usual + pressure * scores  # [k, P, N]
        top = unnormalised.max(axis=2, keepdims=True)
        log_z = top + np.log(np.exp(unnormalised - top).sum(axis=2, keepdims=True))
        weights = np.exp(unnormalised - log_z)
        gain = (weights * scores).sum(axis=2)
        kl = pressure[..., 0] * gain - log_z[..., 0]  # sum w log(w / reference)
        effective = 1 / (weights**2).sum(axis=2)
        parts.append(np.stack([np.maximum(kl, 0).mean(axis=1), gain.mean(axis=1), effective.mean(axis=1)]))
        if parts[-1][2, -1] < least:
            break
    found = np.concatenate(parts, axis=1)
    found[:2, 0] = 0  # the reference itself, without rounding
    enough = found[2] >= least
    enough[0] = True
    kept = found[:, : len(enough) if enough.all() else int(enough.argmin())]
    return kept[0], kept[1], kept[2]


def _over(gain: Floats, most: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(most > 0, gain / most, np.nan)


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)
