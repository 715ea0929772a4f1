"""The hard constraint KL(policy || reference) <= limit, in nats per sequence: stop the update, undo it, or go back.

`Stop` looks inside an update, at the responses that it learns from, after each optimiser step: it costs one forward
pass and is as exact as a minibatch. `Guard` looks after the update, at fresh responses, and undoes the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.ops.control import kl_estimate
from kedge.ops.kl import full_kl, k1
from kedge.ops.masked import masked_sum
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import by_length, response_logprobs, token_scores
from kedge.structs import Prompts, Rollouts, Sampling
from kedge.train.schedule import seeded
from kedge.train.snapshot import restore, snapshot
from kedge.train.update import Learner

CAUTION = 2.0  # standard errors by which an estimate must stay below the limit


@dataclass(frozen=True)
class Stop:
    """Whether responses of the sampling policy say that the policy, as an update has left it by now, is past `limit`.

    Past it is where the estimate and `CAUTION` of its standard errors are. An update that is told so takes the policy's
    last step back and leaves the rest out.
    """

    limit: float

    def __call__(self, new_logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> bool:
        """All [b, T], nats: now, when the responses were sampled, under the reference. What is no number is past it."""
        kl, error, _ = kl_estimate(new_logprobs, old_logprobs, ref_logprobs, mask)
        return not _inside(float(kl), float(error), self.limit)


@dataclass(frozen=True)
class Measured:
    """A mean over fresh responses and its standard error, in nats per sequence."""

    kl: float
    error: float


Check = Callable[[Any, int], Measured]
"""A policy and the step's number to the policy's KL from the reference."""


@dataclass(frozen=True)
class Past:
    """What the guard did so far. `held` is the learner that a rollback returns to: as before step `held_step`."""

    rejected: int = 0  # updates undone
    branch: int = 0  # returns to `held`
    held_step: int | None = None
    held: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def released(self) -> Past:
        """Without what is held: it was inside the limit of another reference."""
        return Past(self.rejected, self.branch)


@dataclass(frozen=True)
class Verdict:
    """What the guard found after an update, and did about it; `past` includes it."""

    kl: float
    error: float
    limit: float
    outcome: Literal["kept", "rejected", "rolled back"]
    past: Past

    def figures(self) -> dict[str, float]:
        """By metric name, as `kedge.trace.schema` defines them."""
        return {
            "kl/check": self.kl,
            "kl/check_error": self.error,
            "kl/rejected": self.past.rejected,
            "kl/branch": self.past.branch,
        }

    @property
    def sentence(self) -> str:
        """For people: what was measured, and what followed."""
        found = f"KL {self.kl:.3g} ± {self.error:.2g} nats per response against a limit of {self.limit:g}"
        if self.outcome == "kept":
            return f"{found}: kept"
        if self.outcome == "rejected":
            return f"{found}: the update is undone ({self.past.rejected} so far)"
        return f"{found}: back to the policy before step {self.past.held_step}, branch {self.past.branch}"


class Guard:
    """Looks at the policy before and after each update and takes back what went past `limit`.

    An update is kept if the measured KL and `CAUTION` standard errors stay within the limit. "reject" puts policy,
    critic and both optimisers back to just before the update. "rollback" returns to the last state found inside the
    limit at a multiple of `every` steps; what is random depends on the step, so that the way from there is another.
    """

    def __init__(self, limit: float, action: Literal["reject", "rollback"], check: Check, every: int = 1) -> None:
        self.limit, self.action, self.every = limit, action, every
        self._check = check
        self._past = Past()
        self._start: dict[str, Tensor] = {}

    def require_inside(self, policy: Any) -> None:
        """Raise `InputError` where the policy is past the limit before it learnt anything: no update would be kept."""
        found = self._check(policy, 0)
        if not _inside(found.kl, found.error, self.limit):
            what = f"the policy begins {found.kl:.3g} ± {found.error:.2g} nats per response from the reference"
            remedy = "raise the limit, or begin from a policy that is closer to policy.reference"
            raise InputError(Problem(f"policy.kl.limit = {self.limit:g}", what, remedy))

    def before(self, learner: Learner, past: Past) -> None:
        """Just before the update: remember what there is to go back to."""
        self._past = past
        if self.action == "reject" or not past.held:
            self._start = snapshot(learner)

    def after(self, learner: Learner, step: int) -> Verdict:
        """Just after the update of step number `step`: measure, take back if need be, and say so."""
        found, past = self._check(learner.policy, step), self._past
        inside = _inside(found.kl, found.error, self.limit)
        if self.action == "reject":
            if not inside:
                restore(learner, self._start)
                past = replace(past, rejected=past.rejected + 1)
            return Verdict(found.kl, found.error, self.limit, "kept" if inside else "rejected", past)
        if not past.held:
            past = replace(past, held_step=step, held=self._start)
        if not inside:
            restore(learner, past.held)
            past = replace(past, branch=past.branch + 1)
        elif (step + 1) % self.every == 0:
            past = replace(past, held_step=step + 1, held=snapshot(learner))
        return Verdict(found.kl, found.error, self.limit, "kept" if inside else "rolled back", past)


def _inside(kl: float, error: float, limit: float) -> bool:
    """False for what is not a number."""
    return kl + CAUTION * error <= limit


def exact_check(
    reference: Any,
    draw: Callable[[int], Prompts],
    engine: RolloutEngine,
    sampling: Sampling,
    seed: int,
    *,
    microbatch: int = 256,
) -> Check:
    """A check on fresh responses, one to each prompt that `draw(step)` gives; it needs at least two.

    Their random numbers are their own. They are sampled without truncation: a nucleus is another distribution, on which
    the sum would not be the policy's KL.
    """
    whole = replace(sampling, top_p=1.0)

    def check(policy: Any, step: int) -> Measured:
        rollouts = engine.generate(policy, draw(step), whole, seeded(seed, "kl check", step), step)
        each = expected_kl(policy, reference, rollouts, temperature=whole.temperature, microbatch=microbatch).double()
        return Measured(float(each.mean()), float(each.std()) / math.sqrt(len(each)))

    return check


@torch.no_grad()
def expected_kl(
    policy: Any, reference: Any, rollouts: Rollouts, *, temperature: float, microbatch: int = 256
) -> Tensor:
    """[B] per response of `policy`: the sum over its tokens of the next-token distributions' exact KL, in nats.

    Its mean over responses is unbiased for KL(policy || reference): each term is k1 averaged over the token that might
    have been drawn instead (Rao-Blackwell), so that it is never negative and varies less than k1.
    """
    policy.eval()
    reference.eval()

    def score(part: Rollouts) -> Tensor:
        own, usual = (response_logprobs(model, part, temperature) for model in (policy, reference))
        return full_kl(own, usual).unsqueeze(-1)

    return masked_sum(by_length(rollouts, score, microbatch).squeeze(-1), rollouts.response_mask, dim=1)


def sequence_kl(
    model: Any, rollouts: Rollouts, logprobs: Tensor, *, temperature: float, eos_id: int, microbatch: int = 256
) -> Tensor:
    """[B] k1 per sequence against `model`, from the policy's own `logprobs` [B, T], in nats."""
    usual = token_scores(model, rollouts, temperature=temperature, eos_id=eos_id, microbatch=microbatch)
    return masked_sum(k1(logprobs, usual.logprobs), rollouts.response_mask, dim=1)
