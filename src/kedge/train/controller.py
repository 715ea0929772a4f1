"""The KL coefficient over a run: fixed, or steered towards a target; one for all prompts, or one per prompt group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kedge.ops.control import adapted_coefficient, lagrangian_coefficient, pid_coefficient


@dataclass(frozen=True)
class Fixed:
    """`beta` in reward per nat, whatever happens."""

    beta: float

    def observe(self, kl_per_sequence: float, episodes: int) -> Fixed:  # noqa: ARG002
        """Itself."""
        return self


@dataclass(frozen=True)
class Adaptive:
    """Ziegler et al. (2019): `target` in nats per sequence, `horizon` in episodes."""

    beta: float
    target: float
    horizon: float

    def observe(self, kl_per_sequence: float, episodes: int) -> Adaptive:
        """The controller after a batch of `episodes` responses with this mean k1, in nats per sequence."""
        beta = adapted_coefficient(self.beta, kl_per_sequence, self.target, episodes=episodes, horizon=self.horizon)
        return replace(self, beta=beta)


@dataclass(frozen=True)
class Lagrangian:
    """Dual ascent on log beta: `target` in nats per sequence, `rate` per step and relative error."""

    beta: float
    target: float
    rate: float

    def observe(self, kl_per_sequence: float, episodes: int) -> Lagrangian:  # noqa: ARG002
        """The controller one step on; how many responses stand behind the mean k1 does not matter."""
        return replace(self, beta=lagrangian_coefficient(self.beta, kl_per_sequence, self.target, rate=self.rate))


@dataclass(frozen=True)
class Pid:
    """Stooke et al. (2020): gains in beta per relative error, `target` in nats per sequence.

    `total` is the sum of relative errors, `previous` the KL one step ago; None before the first step. The sum then
    starts where it gives the beta that the controller starts with.
    """

    beta: float
    target: float
    proportional: float
    integral: float
    derivative: float
    total: float | None = None
    previous: float | None = None

    def observe(self, kl_per_sequence: float, episodes: int) -> Pid:  # noqa: ARG002
        """The controller one step on; how many responses stand behind the mean k1 does not matter."""
        start = self.beta / self.integral if self.integral else 0.0
        beta, total = pid_coefficient(
            kl_per_sequence,
            self.target,
            total=start if self.total is None else self.total,
            previous=kl_per_sequence if self.previous is None else self.previous,
            proportional=self.proportional,
            integral=self.integral,
            derivative=self.derivative,
        )
        return replace(self, beta=beta, total=total, previous=kl_per_sequence)


Controller = Fixed | Adaptive | Lagrangian | Pid
MODES: dict[str, type[Controller]] = {"fixed": Fixed, "adaptive": Adaptive, "lagrangian": Lagrangian, "pid": Pid}


@dataclass(frozen=True)
class Controllers:
    """One controller per prompt group, or one for all prompts.

    A prompt's group is its `tier`, 0 ... groups - 1: in policy training the tercile of the reference's usual length.
    """

    groups: tuple[Controller, ...]

    @classmethod
    def of(cls, controller: Controller, budgets: Sequence[float] | None = None) -> Controllers:
        """The controller for all prompts or, with `budgets`, one per share of its target; beta starts divided by the
        share, because the KL of an optimum falls as beta rises."""
        if budgets is None:
            return cls((controller,))
        return cls(tuple(_scaled(controller, share) for share in budgets))

    def beta(self, tier: Tensor) -> Tensor:
        """[B] float64 coefficient of each response, from its tier [B]."""
        betas = torch.tensor([group.beta for group in self.groups], dtype=torch.float64)
        return betas[tier] if len(betas) > 1 else betas.expand(len(tier))

    @property
    def mean_beta(self) -> float:
        """The mean over groups, in reward per nat."""
        return sum(group.beta for group in self.groups) / len(self.groups)

    def observe(self, kl: Tensor, tier: Tensor) -> Controllers:
        """After a batch: `kl` [B] k1 per sequence, `tier` [B]. A group without a response stays as it is."""
        if len(self.groups) == 1:
            return Controllers((self.groups[0].observe(float(kl.mean()), len(kl)),))
        parts = [kl[tier == number] for number in range(len(self.groups))]
        pairs = zip(self.groups, parts, strict=True)
        return Controllers(
            tuple(group.observe(float(part.mean()), len(part)) if len(part) else group for group, part in pairs)
        )

    def times(self, factor: float) -> Controllers:
        """The same with every beta `factor` times as large. What steers beta goes on from there: towards its target."""
        return Controllers(tuple(_times(group, factor) for group in self.groups))

    def record(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        names = {kind: mode for mode, kind in MODES.items()}
        return {"groups": [{"mode": names[type(group)], **asdict(group)} for group in self.groups]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Controllers:
        """Raises `ValueError`, `KeyError` or `TypeError` on what `record` does not give."""
        if set(record) != {"groups"} or not record["groups"]:
            raise ValueError(f"no controllers in {sorted(record)}")
        rows = [dict(row) for row in record["groups"]]
        return cls(tuple(MODES[row.pop("mode")](**row) for row in rows))


def _times(controller: Controller, factor: float) -> Controller:
    raised = replace(controller, beta=controller.beta * factor)
    if not isinstance(raised, Pid):
        return raised
    # Its beta is a sum of gains times errors, so with `factor` times the gains it is `factor` times as large.
    gains = {name: getattr(raised, name) * factor for name in ("proportional", "integral", "derivative")}
    return replace(raised, **gains)


def _scaled(controller: Controller, share: float) -> Controller:
    scaled = replace(controller, beta=controller.beta / share)
    return scaled if isinstance(scaled, Fixed) else replace(scaled, target=scaled.target * share)
