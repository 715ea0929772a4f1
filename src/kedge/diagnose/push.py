"""What a step pushes besides its advantages, and how far its pushes explain what moved.

The loss of a token with weight w and advantage A has the gradient -w A grad log pi where the ratio is 1. A term of the
loss beside the surrogate is therefore a push in the advantage's unit: the coefficient of +grad log pi of the sampled
token, in expectation over the policy's own samples. Derivatives of the estimators: Liu et al. (2025), 2510.01555, and
Tang and Munos (2025), 2506.09477.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import StepTrace

if TYPE_CHECKING:
    from kedge.diagnose.split import Entry, Split

Array = NDArray[Any]
RESAMPLES = 1000
BUCKETS = 512  # prompts are resampled in this many bunches at most, so that memory does not grow with the run
FEW = 8  # bunches: with fewer an interval says nothing
KL_LOSSES = {
    "k2": "minus loss_beta K(y) on every token, K(y) = sum_t log pi - log ref: the gradient of the KL",
    "k3": "minus loss_beta (1 - ref / pi): the gradient of KL(ref || policy) token by token, never above loss_beta",
    "k3+": "minus loss_beta (log pi - log ref) of the token: the gradient of k3 times the ratio, the KL token by token",
    "k1": "minus loss_beta on every token: no push in expectation",
    "full": "minus loss_beta times the KL from the token on, here by its sampled k1",
}


@dataclass(frozen=True)
class LossPush:
    """A term of the loss as a push: `tokens` [B, T], `whole` [B] what it adds up to for a response."""

    name: str
    tokens: Array
    whole: Array
    meaning: str


@dataclass(frozen=True)
class Measure:
    """A number for every response of a step: [B] float64, nan where it is not known."""

    name: str
    unit: str
    of: Callable[[StepTrace], Array]


@dataclass(frozen=True)
class Estimate:
    """A covariance with its 95% interval, from prompts drawn again; nan ends where there are too few."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Push:
    """How one feature goes with the advantage, within steps, and with what the update then did.

    `parts` and `losses` hold covariances with rows of whole responses, in the feature's unit times the advantage's;
    `by_token` with the rows summed over tokens. `moved` is the covariance with sum_t log pi_new - log pi_old: to first
    order, how far the update moved the feature's mean, in its unit.
    """

    measure: str
    unit: str
    responses: int
    prompts: int  # or bunches of prompts
    parts: dict[Entry, Estimate]
    by_token: dict[Entry, float]
    losses: dict[Entry, Estimate]
    predicted: Estimate  # of the advantage and the loss's other pushes
    moved: Estimate

    def shares(self, *, by_token: bool = False) -> dict[Entry, float]:
        """Each part's share of the covariance with the advantage; they sum to 1. Empty where that is 0."""
        values = self.by_token if by_token else {entry: part.value for entry, part in self.parts.items()}
        total = sum(values.values())
        size = sum(map(abs, values.values()))
        return {entry: value / total for entry, value in values.items()} if abs(total) > 1e-12 * size else {}

    @property
    def rate(self) -> float:
        """What a unit of predicted push moved: the step size, if the natural gradient were followed; nan without."""
        return self.moved.value / self.predicted.value if self.predicted.value else float("nan")


def loss_pushes(step: StepTrace) -> list[LossPush]:
    """The terms that the loss of a step had beside the surrogate, as pushes."""
    return [*_kl_in_loss(step), *_entropy_bonus(step)]


def mix_note(step: StepTrace) -> str:
    """What is known of demonstrations mixed into the loss; empty where there were none."""
    weight = float(step.learning.get("mix_weight") or 0.0)
    if not weight:
        return ""
    return f"demonstrations are mixed into the loss with weight {weight:g}; of their push only policy/mix_loss is known"


def relative_weight(step: StepTrace) -> Array:
    """[B] what a token of each response weighs in the loss, over the mean of its step's tokens."""
    lengths = step.lengths.astype(np.float64)
    if step.learning.get("aggregation") != "sequence_mean" or not lengths.sum():
        return np.ones(len(step))
    return np.where(lengths > 0, lengths.sum() / (lengths > 0).sum() / np.maximum(lengths, 1), 0.0)


def _kl_in_loss(step: StepTrace) -> Iterator[LossPush]:
    kind = step.learning.get("kl_loss")
    beta = np.nan_to_num(step.loss_beta)
    if kind not in KL_LOSSES or not beta.any():
        return
    mask = step.response_mask
    k1 = np.where(mask, step.tokens["old_logprob"] - step.tokens["reference_logprob"], 0.0).astype(np.float64)
    total = k1.sum(axis=1)
    onward = np.cumsum(k1[:, ::-1], axis=1)[:, ::-1]
    each = {
        "k1": np.ones(k1.shape),
        "k2": np.broadcast_to(total[:, None], k1.shape),
        "k3": -np.expm1(-k1),
        "k3+": k1,
        "full": onward,
    }[kind]
    summed = np.where(mask, each, 0.0).sum(axis=1)
    whole = {"k1": np.zeros(len(step)), "k2": total, "k3": summed, "k3+": summed, "full": total}[kind]
    tokens = np.where(mask, -beta[:, None] * each, 0.0)
    yield LossPush(f"KL ({kind})", tokens, -beta * whole, KL_LOSSES[kind])


def _entropy_bonus(step: StepTrace) -> Iterator[LossPush]:
    coefficient = float(step.learning.get("entropy_bonus") or 0.0)
    if not coefficient:
        return
    surprise = step.tokens["old_logprob"].astype(np.float64) + step.tokens["entropy"]
    tokens = np.where(step.response_mask, -coefficient * surprise, 0.0)
    meaning = "minus the coefficient times (log pi + entropy): the gradient of the entropy in expectation"
    yield LossPush("entropy bonus", tokens, tokens.sum(axis=1), meaning)


def clusters(step: StepTrace) -> Array:
    """[B] the bunch of prompts that each response belongs to, below BUCKETS; the same prompt is always in the same."""
    keys = [
        prompt if prompt is not None else f"{step.step}/{group}"
        for prompt, group in zip(step.prompts, step.group.tolist(), strict=True)
    ]
    return np.array([zlib.crc32(key.encode("utf-8", "surrogatepass")) % BUCKETS for key in keys], dtype=np.int64)


def moved(step: StepTrace) -> Array:
    """[B] sum over the policy's tokens of log pi_new - log pi_old, in nats."""
    change = step.tokens["new_logprob"].astype(np.float64) - step.tokens["old_logprob"]
    return np.asarray(np.where(step.response_mask, change, 0.0).sum(axis=1))


@dataclass
class Tally:
    """Covariances of one measure with every row, added up step by step; its size does not depend on the steps."""

    measure: Measure
    responses: int = 0
    _counts: Array = field(default_factory=lambda: np.zeros(BUCKETS))
    _sums: dict[str, Array] = field(default_factory=dict)  # products by bunch
    _entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, step: StepTrace, rows: Split) -> None:
        """Add the responses of a step, less the step's means."""
        given = np.asarray(self.measure.of(step), dtype=np.float64)
        known = np.isfinite(given) & (step.lengths > 0)
        if known.sum() < 2:
            return
        centred = np.where(known, given, 0.0) - given[known].mean()
        centred = np.where(known, centred, 0.0)
        bunch, weight = clusters(step), relative_weight(step)[:, None]
        whole, summed = rows.whole * weight, rows.tokens.sum(axis=1) * weight
        for index, entry in enumerate(rows.entries):
            self._entries.setdefault(entry.name, entry)
            self._put(f"whole/{entry.name}", bunch, centred * whole[:, index])
            self._put(f"token/{entry.name}", bunch, centred * summed[:, index])
        self._put("moved", bunch, centred * moved(step))
        self._counts += np.bincount(bunch[known], minlength=BUCKETS)
        self.responses += int(known.sum())

    def result(self, *, seed: int = 0) -> Push | None:
        """The covariances with their intervals; None where no step had two responses of a known value."""
        if not self.responses:
            return None
        there = self._counts > 0
        draws = _draws(int(there.sum()), seed)
        counts = draws @ self._counts[there]

        def estimate(*names: str) -> Estimate:
            products = np.sum([self._sums[name][there] for name in names], axis=0) if names else np.zeros(there.sum())
            value = float(products.sum() / self.responses)
            if len(products) < FEW:
                return Estimate(value, float("nan"), float("nan"))
            low, high = np.quantile(draws @ products / np.maximum(counts, 1), [0.025, 0.975])
            return Estimate(value, float(low), float(high))

        kinds = {kind: [e for e in self._entries.values() if e.kind == kind] for kind in ("part", "loss", "side")}
        whole = {entry: estimate(f"whole/{entry.name}") for entry in self._entries.values()}
        pushing = [*kinds["part"], *kinds["loss"]]
        return Push(
            measure=self.measure.name,
            unit=self.measure.unit,
            responses=self.responses,
            prompts=int(there.sum()),
            parts={entry: whole[entry] for entry in kinds["part"]},
            by_token={e: float(self._sums[f"token/{e.name}"].sum() / self.responses) for e in kinds["part"]},
            losses={entry: whole[entry] for entry in kinds["loss"]},
            predicted=estimate(*(f"whole/{entry.name}" for entry in pushing)),
            moved=estimate("moved"),
        )

    def _put(self, name: str, bunch: Array, products: Array) -> None:
        found = np.bincount(bunch, weights=products, minlength=BUCKETS)
        self._sums[name] = self._sums[name] + found if name in self._sums else found


def _draws(count: int, seed: int) -> Array:
    """[RESAMPLES, count] how often each bunch is drawn."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def pushes(tallies: Sequence[Tally]) -> tuple[Push, ...]:
    """What the tallies hold."""
    return tuple(one for one in (tally.result() for tally in tallies) if one is not None)
