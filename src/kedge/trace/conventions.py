"""What a trainer's numbers mean: units, places and formulas on which trainers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kedge.errors import InputError, Problem

UNKNOWN = "unknown"
BASELINES = {
    "group mean": "group mean",
    "group mean and deviation": "group mean",
    "group mean and batch": "group mean",
    "leave one out": "leave one out",
    "leave one out and batch": "leave one out",
}
"""Normalisations that compare responses to the same prompt, and with what."""
ESTIMATORS = ("k1", "k2", "k3", "abs")
CHOICES = {
    "kl": ("reward", "loss", "none", UNKNOWN),
    "kl_estimator": (*ESTIMATORS, "k3+", "full", UNKNOWN),
    "kl_unit": ("per token", "per sequence", UNKNOWN),
    "kl_credit": ("response", "to go"),
    "score_position": ("last", "after", "token"),
    "normalisation": ("none", *BASELINES, "batch", UNKNOWN),
    "positions": ("tokens", "words"),
    "aggregation": ("token_mean", "sequence_mean", "sequence_sum", "constant", None),
}


@dataclass(frozen=True)
class Conventions:
    """What a trainer's numbers mean. What is not known stays "unknown", nan or None: nothing is assumed.

    Raises `InputError` for a word that is not among the choices, and for settings that contradict each other.
    """

    trainer: str  # name and version, such as "trl 1.16.0 GRPO"
    gamma: float = 1.0
    lam: float = 1.0
    kl: str = UNKNOWN  # where the KL to the reference is charged: "reward", "loss" or "none"
    kl_estimator: str = UNKNOWN  # "k1", "k2", "k3", "abs", "full"; "k3+": k3 times the ratio, in the loss; as charged
    kl_unit: str = UNKNOWN  # of the KL that the trainer logs and of its target: "per token" or "per sequence"
    beta: float = math.nan  # reward per nat; beside the advantage, in the loss, advantage per nat
    kl_credit: str = "response"  # where a group's baseline meets a KL in the reward: the whole response's, or "to go"
    score_position: str = "last"  # response token; "after" it, where the arrays have the slot; one per "token"
    normalisation: str = UNKNOWN  # of the advantage
    epsilon: float = 0.0  # added to the deviation
    critic: bool | None = None  # whether there is one
    scale_by: str = ""  # in words, what cannot be said above
    positions: str = "tokens"
    clip: tuple[float, float] | None = None  # of the ratio, below and above 1
    epochs: int | None = None
    minibatches: int | None = None
    aggregation: str | None = None  # of token losses

    def __post_init__(self) -> None:
        if problems := [*self._unknown_words(), *self._contradictions()]:
            raise InputError(problems)

    @property
    def baseline(self) -> str | None:
        """What responses to the same prompt are compared with: "group mean", "leave one out" or nothing."""
        return BASELINES.get(self.normalisation)

    @property
    def whitened(self) -> bool:
        """Whether advantages are centred and divided by their deviation over the batch."""
        return self.normalisation.endswith("batch")

    @property
    def whole_response(self) -> bool:
        """Whether every token is credited with the reward of its whole response; then gamma and lambda are 1."""
        return self.baseline is not None and self.kl_credit == "response"

    @property
    def charged(self) -> bool:
        """Whether it is known where the KL is charged, and how much."""
        if self.kl == "none":
            return True
        known = self.kl == "loss" or (self.kl == "reward" and self.kl_estimator in ESTIMATORS)
        return known and math.isfinite(self.beta)

    def learning(self) -> dict[str, Any]:
        """What the optimiser was told, as a trace names it; only what is known."""
        low, high = self.clip or (None, None)
        told = {
            "clip": low,
            "clip_high": high,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "aggregation": self.aggregation,
            "kl_loss": self.kl_estimator if self.kl == "loss" else None,
        }
        return {name: value for name, value in told.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """For a manifest: null where a number is not known."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: None if value != value else value for name, value in plain.items()}

    def _unknown_words(self) -> Iterator[Problem]:
        for name, choices in CHOICES.items():
            given = getattr(self, name)
            if given not in choices:
                what = f"{given!r} is not one of {', '.join(repr(one) for one in choices)}"
                yield Problem(f"Conventions.{name}", what, "see docs/recording.md")

    def _contradictions(self) -> Iterator[Problem]:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                yield Problem(f"Conventions.{name}", f"{getattr(self, name)} is not between 0 and 1")
        if not self.epsilon >= 0:
            yield Problem("Conventions.epsilon", f"{self.epsilon} is not 0 or above")
        if self.critic and self.baseline:
            what = f"a critic and the baseline {self.baseline!r} cannot both be taken off"
            yield Problem("Conventions.normalisation", what, "say which of them the trainer has")
        if self.whole_response and (self.gamma, self.lam) != (1.0, 1.0):
            what = f"{self.normalisation!r} credits whole responses: gamma and lam must be 1"
            yield Problem("Conventions.normalisation", what, 'kl_credit="to go" discounts rewards from each token on')
