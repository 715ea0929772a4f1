"""What a replay of given changes knows exactly, what it estimates, and what it cannot know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kedge.experiment.replay.keys import BETA, CLIPS, PENALTIES, Plan
from kedge.experiment.replay.setting import Setting
from kedge.trace.reader import StepTrace
from kedge.train.experience import SCALAR_CRITIC

ENOUGH = 0.3  # of the responses: with fewer behind the push, few of them decide
_LEARNT = {"policy.gamma", "policy.lam"}


@dataclass(frozen=True)
class Statement:
    """One sentence about what a replay is worth."""

    kind: Literal["exact", "estimated", "unknown"]
    text: str


def statements(
    plan: Plan, step: StepTrace, setting: Setting, effective: float, *, slope: float
) -> tuple[Statement, ...]:
    """About a replay whose last step is `step` with the changed `setting`; `effective` is a share of the responses."""
    return (
        Statement("exact", _exact(step, setting)),
        *(Statement("estimated", text) for text in _estimated(plan, step, setting, slope)),
        *(Statement("unknown", text) for text in _unknown(plan, step, setting, effective)),
    )


def _exact(step: StepTrace, setting: Setting) -> str:
    if SCALAR_CRITIC in step.channels and setting.method.baseline is None:
        return "rewards, returns and the formula of the advantage, on the responses that were drawn"
    return "rewards, returns, advantages and first-minibatch weights, on the responses that were drawn"


def _estimated(plan: Plan, step: StepTrace, setting: Setting, slope: float) -> Iterator[str]:
    critic = setting.method.baseline is None
    paid = plan.keys & {*BETA, *PENALTIES} or plan.transform or plan.reward or plan.rules
    if critic and paid and SCALAR_CRITIC in step.channels:
        yield (
            "the critic has one head for the reward as it was: its values are what it expected before the change "
            "(a head per channel, policy.critic = channels, would follow the weights exactly)"
        )
    if critic and plan.keys & _LEARNT:
        yield "the critic's values were learnt under the logged gamma and lambda; another pair would have learnt others"
    if critic and plan.reward is not None:
        yield "the critic's score head still expects the logged score, not that of the other reward model"
    if critic and SCALAR_CRITIC not in step.channels:
        new = [name for name in setting.weights if name not in step.channels]
        if new:
            yield f"no head of the critic predicts {', '.join(sorted(new))}: its advantages are not centred"
    if plan.transform == "residual_length":
        yield (
            f"score=residual_length takes {slope:+.4g} per token off the score, a straight line through the replayed "
            "responses with a level for each step (or prompt, where it has several); part of it may be real quality"
        )
    if plan.keys & {"policy.score_clip"}:
        yield "scores that the logged limit held stay at it: a wider limit does not bring them back"
    if plan.after.policy.kl.mode != "fixed" and plan.keys & set(BETA):
        yield "the steered beta answers the divergences that were logged, not those that it would have brought about"
    if setting.place == "loss" and setting.estimator == "full":
        yield "the push of the KL over the whole vocabulary is estimated from the tokens taken"
    if setting.entropy_bonus:
        yield "the entropy bonus is estimated from the tokens taken"
    if plan.keys & set(CLIPS):
        yield "the clip acts from the second minibatch on: its share of active tokens is at the ratios that were logged"
    if not plan.known:
        yield "the run holds no recipe: what its trace does not say is taken from the defaults"


def _unknown(plan: Plan, step: StepTrace, setting: Setting, effective: float) -> Iterator[str]:
    yield "one step only: what a changed policy would have drawn next is not in the trace"
    yield "whether answers become better: a policy can follow length and style sooner than it can learn facts"
    if effective < ENOUGH:
        yield f"few responses decide: the push rests on {effective:.0%} of them, effectively"
    if step.learning.get("mix_weight"):
        yield "the push of the demonstrations mixed in is left out"
    if plan.keys & {"policy.kl.place"} and setting.place == "loss" and setting.estimator in ("k1", "k3"):
        yield f"{setting.estimator} in the loss has another gradient than the KL, with which the return counts it"
