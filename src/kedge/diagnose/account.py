"""The advantage of long and of short responses by where it came from, per step, and what it would be under a change.

The advantage is linear in every channel's weight. On the rows of a step another beta multiplies the KL parts, and a
length penalty adds a part that is the advantage of one unit of reward per token. What is not redone is the shift of
whitening and the sampling of the next step; `kedge replay` redoes the first, a trial both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kedge.diagnose.ledger import styles
from kedge.diagnose.steps import late
from kedge.diagnose.view import Facts, Reducer, View
from kedge.trace.advantages import gae
from kedge.trace.reader import Part, StepTrace

NAMES = ("concise", "between", "verbose")
PARTS = ("score", "kl", "critic", "whitening", "other channels")


@dataclass(frozen=True)
class Account:
    """Mean advantage per token of one style of response late in the run, in standard deviations, by part.

    A channel's part holds its own critic head or baseline; what a critic of all channels says is a part of its own.
    """

    parts: Mapping[str, float]
    per_token: float  # advantage of one unit of reward per token

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())

    def under(self, *, beta: float = 1.0, penalty: float = 0.0) -> float:
        """The total with `beta` times the KL part and `penalty` reward taken per token, whitening's shift as it was."""
        return self.total + (beta - 1) * self.parts["kl"] - penalty * self.per_token


def account(usual: float | None) -> Reducer:
    """What to take from every step; `usual` is the mean length of the reference's answers, tokens."""

    def facts(step: StepTrace) -> Facts:
        found: dict[str, float] = {}
        parts: dict[str, np.ndarray] = {}
        for part, values in step.parts().items():
            name = _name(part)
            parts[name] = parts[name] + values if name in parts else values
        unit = gae(step.response_mask[..., None] * 1.0, np.zeros((*step.response_mask.shape, 1)), step.response_mask,
                   gamma=step.gamma, lam=step.lam)[..., 0] / step.scale[:, None]  # fmt: skip
        parts["per token"] = unit
        index = styles(step.lengths, usual)
        for number, style in enumerate(NAMES):
            here = index == number
            tokens = int(step.lengths[here].sum())
            for name, values in parts.items():
                found[f"account/{style}/{name}"] = float(values[here].sum()) / tokens if tokens else np.nan
        return found

    return facts


def account_of(view: View, style: str) -> Account | None:
    """The account of one style over the last third of the steps that hold such responses; None where none does."""
    found = {name: view.fact(f"account/{style}/{name}") for name in (*PARTS, "per token")}
    if found["score"] is None or found["per token"] is None:
        return None
    values = {name: late(series) if series is not None else 0.0 for name, series in found.items()}
    per_token = values.pop("per token")
    return Account(values, per_token)


def _name(part: Part) -> str:
    return part.channel if part.channel in PARTS else "other channels"
