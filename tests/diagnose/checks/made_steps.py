"""Rows of made-up policy steps whose numbers fit together, and views of them.

Tokens are drawn from the policy that the rows say, EOS is token 0, the reference is the start, and the critic knows
most of the score: a run made of these is healthy, and each argument makes it sick in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks import Check
from kedge.diagnose.finding import Finding
from kedge.diagnose.view import View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
CHANNELS = ("score", "kl", "length", "missing_eos")
VOCABULARY = 8
LEARNING: Mapping[str, Any] = {
    "epochs": 2,
    "minibatches": 2,
    "clip": 0.2,
    "aggregation": "token_mean",
    "kl_loss": None,
    "entropy_bonus": 0.0,
}


@dataclass(frozen=True)
class Made:
    """One policy step of a made-up run."""

    step: int
    seed: int = 0
    batch: int = 96
    longest: int = 24
    distance: float = 0.3  # of the policy's logits from the reference's, standard deviations
    end: float = 1.0  # added to the logit of EOS
    beta: float = 0.3
    estimator: Callable[[Array], Array] = field(default=lambda k: k)
    in_loss: str | None = None
    per_token: float = 0.0  # weight of the length channel
    unit: float = 1.0  # of the score
    missing_eos: float = -1.0  # weight of an end that is missing
    gamma: float = 1.0
    lam: float = 1.0
    known: float = 0.6  # share of the score's variance that the critic knows
    level: float = 0.0  # what the critic adds to every value
    whiten: bool = True
    moved: float = 0.01  # nats per token
    active: float = 0.99
    end_active: bool = True
    gap: float = 0.0  # of the sampler's log-probabilities, nats
    top_p: float = 1.0
    bonus: float = 0.0
    learning: Mapping[str, Any] = field(default_factory=lambda: LEARNING)

    def rows(self) -> StepTrace:
        """The rows; shapes as `kedge.trace.reader` says."""
        rng = np.random.default_rng([self.seed, self.step])
        shape = (self.batch, self.longest, VOCABULARY)
        logits = rng.normal(0, 1, shape)
        logits[..., 0] += self.end - 1.0
        reference, policy = (
            _log_softmax(one) for one in (logits, logits + self.distance * rng.normal(0, 1, shape) + _tilt(self))
        )
        ids = _drawn(policy, self.top_p, rng)
        mask = np.cumsum(ids == 0, axis=1) - (ids == 0) == 0
        ended = (ids == 0).any(axis=1)
        old, ref = (np.take_along_axis(one, ids[..., None], -1)[..., 0] for one in (policy, reference))
        entropy = -(np.exp(policy) * policy).sum(axis=-1)
        lengths = mask.sum(axis=1)
        last = np.arange(self.longest) == lengths[:, None] - 1
        knowable, rest = rng.normal(0, np.sqrt(self.known), self.batch), rng.normal(0, 1, self.batch)
        score = self.unit * (0.5 + knowable + np.sqrt(1 - self.known) * rest)
        rewards = np.zeros((self.batch, self.longest, len(CHANNELS)))
        rewards[..., 0] = last * score[:, None]
        rewards[..., 1] = self.estimator(old - ref) * mask
        rewards[..., 2] = mask
        rewards[..., 3] = last & ~ended[:, None]
        values = np.zeros_like(rewards)
        values[..., 0] = mask * (self.unit * (0.5 + knowable)[:, None] + self.level)
        kl_weight = 0.0 if self.in_loss else -self.beta
        weights = np.tile([1.0, kl_weight, self.per_token, self.missing_eos], (self.batch, 1))
        active = mask & (rng.random(mask.shape) < self.active) & (self.end_active | ~last)
        moved = self.moved * rng.choice([-1.0, 1.0], mask.shape)
        made = StepTrace(
            path=Path("made"),
            step=self.step,
            channels=CHANNELS,
            gamma=self.gamma,
            lam=self.lam,
            critic="channels",
            group=np.arange(self.batch),
            prompts=(None,) * self.batch,
            responses=(None,) * self.batch,
            response_mask=mask,
            ended=ended,
            active=active,
            tokens={
                "behaviour_logprob": (old + self.gap) * mask,
                "old_logprob": old * mask,
                "reference_logprob": ref * mask,
                "new_logprob": (old + moved) * mask,
                "old_eos_logprob": policy[..., 0] * mask,
                "reference_eos_logprob": reference[..., 0] * mask,
                "entropy": entropy * mask,
            },
            rewards=rewards,
            values=values,
            weights=weights,
            shift=np.zeros(self.batch),
            scale=np.ones(self.batch),
            advantage_sum=np.zeros(self.batch),
            advantage_abs_sum=np.zeros(self.batch),
            members=np.zeros((self.batch, 0)),
            disagreement=np.full(self.batch, np.nan),
            support_distance=np.full(self.batch, np.nan),
            loss_beta=np.full(self.batch, self.beta if self.in_loss else 0.0),
            learning={**self.learning, "kl_loss": self.in_loss, "entropy_bonus": self.bonus} if self.learning else {},
            response_ids=None,
        )
        if not self.whiten:
            return made
        raw = made.advantage()[mask]
        shift, scale = np.full(self.batch, raw.mean()), np.full(self.batch, raw.std())
        loss_beta = made.loss_beta / scale
        return replace(made, shift=shift, scale=scale, loss_beta=loss_beta)


def _tilt(made: Made) -> Array:
    """The policy prefers one token as it leaves the reference, so that k1 is above 0 on average."""
    tilt = np.zeros(VOCABULARY)
    tilt[3] = made.distance
    return tilt


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _drawn(policy: Array, top_p: float, rng: np.random.Generator) -> Array:
    """Token ids from the policy, or from its smallest set of tokens with mass `top_p`."""
    order = np.argsort(-policy, axis=-1)
    ordered = np.take_along_axis(np.exp(policy), order, -1)
    kept = np.where(np.cumsum(ordered, axis=-1) - ordered < top_p, ordered, 0.0)
    kept /= kept.sum(axis=-1, keepdims=True)
    place = (rng.random((*policy.shape[:2], 1)) > np.cumsum(kept, axis=-1)).sum(axis=-1)
    return np.take_along_axis(order, np.minimum(place, VOCABULARY - 1)[..., None], -1)[..., 0]


def run(count: int, change: Mapping[str, Any] | None = None, at: int = 0, **always: Any) -> list[Made]:
    """`count` steps, with `change` from step `at` on. The distance grows from 0 as it does while a policy learns."""
    grown = {step: {"distance": 0.3 * min(1.0, step / 8), **always} for step in range(count)}
    return [Made(step, **{**grown[step], **(change or {} if step >= at else {})}) for step in range(count)]


def view_of_steps(
    check: Check,
    steps: Sequence[Made],
    *,
    metrics: Mapping[str, Sequence[float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    **parts: Any,
) -> View:
    """The view that `check` would be given of these steps; `metrics` are of stage policy, one number a step."""
    facts: dict[str, tuple[list[int], list[float]]] = {}
    for made in steps:
        for name, value in (check.reduce(made.rows()) if check.reduce else {}).items():
            numbers, values = facts.setdefault(name, ([], []))
            numbers.append(made.step)
            values.append(float(value))
    numbers = np.array([made.step for made in steps], dtype=np.int64)
    return View(
        name="made",
        facts={name: Series(np.array(at, dtype=np.int64), np.array(values)) for name, (at, values) in facts.items()},
        metrics={"policy": {name: Series(numbers, np.array(values)) for name, values in (metrics or {}).items()}},
        settings=settings or {},
        **parts,
    )


def found(check: Check, steps: Sequence[Made], **parts: Any) -> Finding:
    """What `check` finds in these steps, without a recipe unless `settings` is given; it has to be a whole finding."""
    finding = check(view_of_steps(check, steps, **parts))
    assert np.isfinite(finding.strength) and finding.check == check.name
    if finding.status != "not_checked":
        assert finding.evidence and finding.mechanism is not None
    if finding.status in ("warn", "fail"):
        assert finding.remedies and finding.refuted_by and finding.mechanism
    return finding
