"""What `kedge verify` runs: a row per optimiser, per place and estimator of the KL, and per configuration known wrong.

Every method is held against its own optimum. With the objective J = E[r] - beta KL(pi || reference) that is
pi* = reference exp(r / beta) / Z; where a method has another objective, or none, `optima` says where theory sends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kedge.experiment.verify import direct, optima
from kedge.experiment.verify.direct import Direct
from kedge.experiment.verify.enumerable import Space, random_task
from kedge.experiment.verify.training import OnPolicy, score_of, train
from kedge.ops.kl import absolute, k2, k3
from kedge.train.experience import GROUP_EPSILON
from kedge.train.methods import METHODS

# Two prompts of unequal length, 15 responses each; the optimum is 0.54 away from the reference in total variation.
TASK = random_task(Space(letters=2, budget=3, prompts=2), seed=4)

NEAR, NEAR_GAP = 0.01, 0.01  # a right method ends within this total variation and leaves this share of the gain
NOISY = 0.025  # the same where learning goes by draws: labels, or which answer was best
FAR, FAR_GAP = 0.1, 0.05  # a wrong one ends beyond both
MUST_FAIL = "must fail"

GROUP = 4  # answers to a prompt, where a method compares them or keeps the best
TAU = 0.1  # of IPO: at the tilt's strength its optimum is hardly away from the reference
SMOOTHING = 0.2  # of labels by rank alone, which have no optimum without it
# At pi* every reward paid, KL included, is the same, and with it goes the noise of the gradient. Where the KL stands in
# the loss, or the baseline is not the prompt's own, noise stays, and larger batches must average it out.
STEADY: dict[str, Any] = {"batch": 2048, "steps": 200, "lr": 0.08, "epochs": 1}
CRITIC: dict[str, Any] = {"lam": 0.95, "whiten": True, "heads": 4}

Kind = Literal["optimiser", "estimator", "control"]


@dataclass(frozen=True)
class End:
    """Where a method should end and did end, as log-probabilities [prompts, N].

    The objective lacks `strength` times KL(reached || optimum), or KL(optimum || reached) where the method imitates the
    optimum's samples.
    """

    optimum: Tensor
    reached: Tensor
    strength: float
    imitates: bool = False

    def lacks(self, policy: Tensor) -> float:
        """What the objective lacks of its largest value at a policy [prompts, N], in its own unit."""
        pair = (self.optimum, policy) if self.imitates else (policy, self.optimum)
        return self.strength * optima.divergence(*pair)


@dataclass(frozen=True)
class Check:
    """A configuration by the name of its row, what it is, where it must end, and how to find out."""

    name: str
    kind: Kind
    what: str
    run: Callable[[], End]
    expected: str = "pi*"
    within: float = NEAR


@dataclass(frozen=True)
class Row:
    """What came of a check. `tv` is the total variation from the optimum, the largest over prompts.

    `objective_gap` is what the objective lacks, `gap_share` the same over what the reference lacks; `kl` is the KL
    from the reference in nats per sequence and `kl_gap` how far that is from the optimum's.
    """

    name: str
    kind: Kind
    what: str
    expected: str
    tv: float
    objective_gap: float
    gap_share: float
    kl: float
    kl_gap: float
    seconds: float
    ok: bool


def verify(checks: Sequence[Check]) -> Iterator[Row]:
    """Run the checks and yield a row after each."""
    for check in checks:
        began = time.monotonic()
        yield judged(check, check.run(), time.monotonic() - began)


def judged(check: Check, end: End, seconds: float) -> Row:
    """The row of a check that ended there."""
    reference = TASK.reference_logprobs
    tv = optima.variation(end.reached, end.optimum)
    lacks = end.lacks(end.reached)
    share = lacks / end.lacks(reference)
    kl = optima.divergence(end.reached, reference)
    if check.expected == MUST_FAIL:
        ok = tv > FAR and share > FAR_GAP
    else:
        ok = tv < check.within and share < NEAR_GAP
    return Row(
        name=check.name,
        kind=check.kind,
        what=check.what,
        expected=check.expected,
        tv=tv,
        objective_gap=lacks,
        gap_share=share,
        kl=kl,
        kl_gap=abs(kl - optima.divergence(end.optimum, reference)),
        seconds=seconds,
        ok=ok,
    )


def _on_policy(settings: OnPolicy, optimum: Callable[[], Tensor] | None = None) -> Callable[[], End]:
    """Train so, and hold the end against pi* or another optimum."""

    def run() -> End:
        reached = TASK.space.sequence_logprobs(train(TASK, settings))
        return End(TASK.optimum if optimum is None else optimum(), reached, TASK.beta)

    return run


def _optimiser(name: str, what: str, **settings: Any) -> Check:
    """An on-policy optimiser with k1 in the reward."""
    return Check(name, "optimiser", what, _on_policy(OnPolicy(METHODS[name], group=GROUP, **settings)))


def _estimator(name: str, what: str, **settings: Any) -> Check:
    """PPO with another place or estimator of the KL."""
    within = 0.015 if "kl_loss" in settings else NEAR
    return Check(name, "estimator", what, _on_policy(OnPolicy(**CRITIC, **settings)), within=within)


def _control(name: str, what: str, settings: OnPolicy | None = None, **changed: Any) -> Check:
    """A configuration that is known not to reach pi*, of PPO if not of another method."""
    chosen = OnPolicy(**CRITIC, **changed) if settings is None else settings
    return Check(name, "control", what, _on_policy(chosen), MUST_FAIL)


def _grpo() -> Tensor:
    return optima.grpo(TASK, GROUP, GROUP_EPSILON)


def _dpo() -> End:
    return End(TASK.optimum, _of_responses(direct.from_pairs(TASK, "dpo", PAIRS, TASK.beta)), TASK.beta)


def _ipo() -> End:
    uniform = torch.zeros_like(TASK.reward).log_softmax(dim=-1)  # of the judged pairs
    return End(optima.ipo(TASK, uniform, TAU), _of_responses(direct.from_pairs(TASK, "ipo", PAIRS, TAU)), TAU)


def _online_dpo() -> End:
    reached = direct.from_own_pairs(TASK, ANSWERS, direct.annotated(TASK, seed=1))
    return End(TASK.optimum, _of_responses(reached), TASK.beta)


def _online_dpo_ranks() -> End:
    reached = direct.from_own_pairs(TASK, ANSWERS, score_of(TASK), SMOOTHING)
    return End(optima.ranked_pairs(TASK, SMOOTHING), _of_responses(reached), TASK.beta)


def _online_dpo_hard() -> End:
    return End(TASK.optimum, _of_responses(direct.from_own_pairs(TASK, ANSWERS, score_of(TASK))), TASK.beta)


def _rejection() -> End:
    best = optima.best_of(TASK.reference_logprobs, TASK.reward, GROUP, unlike=True)
    return End(best, _of_responses(direct.from_kept(TASK, KEPT, GROUP)), 1.0, imitates=True)


def _best_of_n() -> End:
    best = optima.best_of(TASK.reference_logprobs, TASK.reward, GROUP)
    return End(best, direct.kept(TASK, GROUP, draws=40_000), 1.0)


def _of_responses(table: Tensor) -> Tensor:
    """[prompts, N] log-probabilities of a trained policy's responses."""
    return TASK.space.sequence_logprobs(table)


PAIRS, ANSWERS, KEPT = Direct(160, 2048, 0.08), Direct(160, 4096, 0.05), Direct(120, 4096, 0.3)
GRPO_K2, GRPO_K3 = (OnPolicy(METHODS["grpo"], group=GROUP, kl_loss=name, **STEADY) for name in ("k2", "k3"))
CHECKS: tuple[Check, ...] = (
    _optimiser("ppo", "clipped, critic by channels, lambda 0.95, whitened", **CRITIC),
    _optimiser("a2c", "PPO with one epoch and no clip", epochs=1, **CRITIC),
    _optimiser("reinforce", "baseline: the batch's other answers", **STEADY),
    _optimiser("rloo", "baseline: the prompt's other answers", epochs=1),
    _optimiser("grpo", "over the group's deviation, response means", epochs=1),
    _optimiser("dr_grpo", "group mean, token sums over a constant", epochs=1),
    _optimiser("reinforce_pp", "no baseline, reward to go, whitened", **STEADY),
    Check(
        "grpo_k2_loss",
        "optimiser",
        "GRPO with k2 of the sequence in the loss",
        _on_policy(GRPO_K2, _grpo),
        "ref exp((A - c L) / beta)",
        0.015,
    ),
    Check("dpo", "optimiser", "pairs judged in Bradley and Terry's proportions", _dpo),
    Check("ipo", "optimiser", "the same pairs", _ipo, "ref exp(p(y beats mu) / tau) / Z"),
    Check("online_dpo", "optimiser", "own pairs, judged with Bradley and Terry's chances", _online_dpo, within=NOISY),
    Check(
        "online_dpo_ranks",
        "optimiser",
        f"own pairs, judged by rank, labels smoothed by {SMOOTHING:g}",
        _online_dpo_ranks,
        "ref exp(odds of ranks / beta) / Z",
        NOISY,
    ),
    Check(
        "rejection",
        "optimiser",
        f"imitates the best of {GROUP} answers of the reference",
        _rejection,
        f"best of {GROUP} unlike answers",
        NOISY,
    ),
    Check(
        "best_of_n", "optimiser", f"keeps the best of {GROUP} answers", _best_of_n, f"best of {GROUP} answers", NOISY
    ),
    _estimator("k1_reward", "k1 in the reward", minibatches=4, epochs=1, steps=80),
    _estimator("k2_loss", "k2 of the sequence in the loss", kl_loss="k2", **STEADY),
    _estimator("full_loss", "whole vocabulary in the loss, with the KL that follows", kl_loss="full", **STEADY),
    _control("k2_reward", "k2 in the reward", kl_reward=k2),
    _control("k3_reward", "k3 in the reward", kl_reward=k3),
    _control("abs_reward", "|k1| in the reward", kl_reward=absolute),
    _control("k1_loss", "k1 in the loss", kl_loss="k1"),
    _control("k3_loss", "k3 of each token in the loss", kl_loss="k3"),
    _control("grpo_k3_loss", "GRPO as published: k3 of each token in the loss", GRPO_K3),
    _control("no_kl", "nothing ties the policy", beta=0.0),
    Check("online_dpo_hard", "control", "own pairs, judged by rank, labels not smoothed", _online_dpo_hard, MUST_FAIL),
)
