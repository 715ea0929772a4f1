"""The channel ledger: how much of the advantage came from each channel's rewards, its critic, and whitening.

The split is exact per token (`StepTrace.parts`), so every sum of it is: over styles of response, positions and time.
"Verbose" is a response longer than 1.5 times the mean length of the reference's samples in the probes, "concise" one
no longer than that mean. Advantages sum over tokens; they say what training pushed on, not what caused the push.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import Part, Run, StepTrace

Array = NDArray[Any]
STYLES = ("concise", "between", "verbose")
VERBOSE_RATIO = 1.5
POSITIONS = (0, 1, 8, 16, 32)  # first token of each bucket
WINDOWS = 3


@dataclass(frozen=True)
class Row:
    """One part's account over a set of responses. Whitened advantage has no unit; here 1 is one standard deviation."""

    part: Part
    token_mean: float
    response_sum: float  # mean over responses of the sum over tokens


@dataclass(frozen=True)
class Covariance:
    """How one part's sum over a response goes with the response's length, within steps."""

    part: Part
    covariance: float  # advantage x tokens
    share: float  # of the total's covariance; shares sum to 1 and may be negative


@dataclass(frozen=True)
class Ledger:
    """Sums of every part; axes: windows W, styles S, position buckets Q, parts J."""

    reference_length: float | None  # tokens; None when no probe holds a sample of the reference
    windows: tuple[tuple[int, int], ...]  # first and last policy step of each
    parts: tuple[Part, ...]
    sums: Array  # [W, S, Q, J]
    totals: Array  # [W, S, Q] sum of the advantage itself, accumulated apart from its parts
    tokens: Array  # [W, S, Q]
    responses: Array  # [W, S]
    products: Array  # [W, J] sum over responses of (part's sum) x (length - the step's mean length)

    @property
    def residual(self) -> float:
        """Largest |sum of parts - advantage| over all cells, relative to the sum of absolute parts; rounding only."""
        size = np.abs(self.sums).sum(axis=-1)
        return float((np.abs(self.sums.sum(axis=-1) - self.totals) / np.maximum(size, 1e-12)).max(initial=0.0))

    def rows(self, style: str | None = None, window: int | None = None, position: int | None = None) -> list[Row]:
        """The account of one style, window or position bucket, or of all where None; empty without responses."""
        w, s, q = (
            slice(None) if index is None else slice(index, index + 1)
            for index in (window, STYLES.index(style) if style else None, position)
        )
        tokens, responses = self.tokens[w, s, q].sum(), self.responses[w, s].sum()
        if not tokens:
            return []
        sums = self.sums[w, s, q].sum(axis=(0, 1, 2))
        return [Row(part, float(x / tokens), float(x / responses)) for part, x in zip(self.parts, sums, strict=True)]

    def count(self, style: str, window: int | None = None) -> int:
        """Responses of a style."""
        counts = self.responses[:, STYLES.index(style)]
        return int(counts.sum() if window is None else counts[window])

    def length_shares(self, window: int | None = None) -> list[Covariance]:
        """Each part's share of the covariance of advantage and length, within steps; empty without any."""
        products = self.products.sum(axis=0) if window is None else self.products[window]
        responses = self.responses.sum() if window is None else self.responses[window].sum()
        total = products.sum()
        if not responses or not total:
            return []
        return [
            Covariance(part, float(x / responses), float(x / total))
            for part, x in zip(self.parts, products, strict=True)
        ]


def reference_length(run: Run) -> float | None:
    """Mean tokens of the reference's samples among the probes, or None when there are none."""
    total, count = 0.0, 0
    for at in run.probe_steps():
        probes = run.probes(at)
        lengths = probes.column("reference_length").to_numpy()[probes.column("variant").to_numpy() == "reference"]
        lengths = lengths[np.isfinite(lengths)]
        total, count = total + float(lengths.sum(dtype=np.float64)), count + len(lengths)
    return total / count if count else None


def ledger(run: Run, windows: int = WINDOWS) -> Ledger | None:
    """The ledger of all policy steps on disk, one step in memory at a time; None when there are none.

    Without a reference length every response counts as "between". Raises InputError when a step's rows do not fit
    their digest.
    """
    steps, usual = run.steps(), reference_length(run)
    if not steps:
        return None
    spans = [span for span in np.array_split(np.array(steps), min(windows, len(steps))) if len(span)]
    cells = (len(spans), len(STYLES), len(POSITIONS))
    parts: tuple[Part, ...] = ()
    sums = products = np.zeros(0)
    totals, tokens, responses = np.zeros(cells), np.zeros(cells), np.zeros(cells[:2])
    for window, span in enumerate(spans):
        for number in span:
            step = run.step(int(number))
            split = step.parts()
            if not parts:
                parts = tuple(split)
                sums, products = np.zeros((*cells, len(parts))), np.zeros((len(spans), len(parts)))
            stacked = np.stack([split[part] for part in parts], axis=-1)
            style, bucket = styles(step.lengths, usual), _buckets(step)
            index = (np.broadcast_to(style[:, None], bucket.shape)[step.response_mask], bucket[step.response_mask])
            np.add.at(sums[window], index, stacked[step.response_mask])
            np.add.at(totals[window], index, step.advantage()[step.response_mask])
            np.add.at(tokens[window], index, 1)
            np.add.at(responses[window], style, 1)
            products[window] += (step.lengths - step.lengths.mean()) @ stacked.sum(axis=1)
    bounds = tuple((int(span[0]), int(span[-1])) for span in spans)
    return Ledger(usual, bounds, parts, sums, totals, tokens, responses, products)


def styles(lengths: Array, usual: float | None) -> Array:
    """[B] index into STYLES of responses with `lengths` [B] tokens."""
    if usual is None:
        return np.full(len(lengths), STYLES.index("between"))
    return np.where(lengths > VERBOSE_RATIO * usual, 2, np.where(lengths <= usual, 0, 1))


def _buckets(step: StepTrace) -> Array:
    """[B, T] index into POSITIONS of each of the policy's tokens; holes are not counted."""
    place = np.maximum(np.cumsum(step.response_mask, axis=1) - 1, 0)
    return np.asarray(np.searchsorted(POSITIONS, place, side="right") - 1)


def position_names(edges: Sequence[int] = POSITIONS) -> list[str]:
    """What to call the position buckets: "1", "2–8", ..., counting tokens from 1."""
    stops = [*edges[1:], None]
    return [
        f"{first + 1}+" if stop is None else str(first + 1) if stop == first + 1 else f"{first + 1}–{stop}"
        for first, stop in zip(edges, stops, strict=True)
    ]
