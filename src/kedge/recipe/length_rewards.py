"""Which settings of a recipe pay for length, found before anything is trained.

A constant per token adds up to a reward for going on, or for stopping, whatever it was meant for. Some settings do that
openly, some by the way; each is named with what it does. What rules and reward models pay is not a setting:
`kedge.train.token_constants` looks at the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kedge.recipe.methods import SAMPLING
from kedge.recipe.sections import Policy, Recipe

# Recipes know no training code; a test holds this to `train.methods.METHODS`.
MEAN_OF_RESPONSE = ("grpo",)  # aggregate as sequence_mean unless told otherwise
SCORED = (*SAMPLING, "best_of_n")
RESIDUALS = ("residual", "padded_residual")


@dataclass(frozen=True)
class Notice:
    """A setting that pays for length: its key, what it does, what to do if that is not meant."""

    key: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what} -> {self.remedy}"


def length_rewards(recipe: Recipe) -> list[Notice]:
    """Every setting that pays for long or short responses by their length; of a recipe that has been validated.

    So a setting that its method does not read is not there.
    """
    policy = recipe.policy
    return [*_residual(recipe), *(notice for check in _CHECKS for notice in check(policy))]


def _residual(recipe: Recipe) -> Iterator[Notice]:
    reward = recipe.reward
    if reward.length in RESIDUALS and reward.length_share > 1 and recipe.policy.method in SCORED:
        what = f"{reward.length_share:g} takes off more than length adds to the score, as meant: long responses pay"
        yield Notice("reward.length_share", what, "1 leaves length neither paid nor charged")


def _discount(policy: Policy) -> Iterator[Notice]:
    if policy.gamma < 1:
        what = (
            f"{policy.gamma:g} discounts the score by every token before the end: "
            "a score below 0 gains by going on, one above 0 by stopping"
        )
        yield Notice("policy.gamma", what, "set it to 1")


def _aggregation(policy: Policy) -> Iterator[Notice]:
    """With the KL in the reward all advantages are 0 at the optimum, however weighed; with it in the loss not."""
    if policy.kl.place == "reward" or not _tied(policy):
        return
    if policy.aggregation is None and policy.method in MEAN_OF_RESPONSE:
        said = f"sequence_mean, as {policy.method} has it,"
    elif policy.aggregation == "sequence_mean":
        said = "sequence_mean"
    else:
        return
    what = f"{said} divides by a response's length, and the KL is in the loss: the longer, the less its KL costs"
    yield Notice("policy.aggregation", what, 'set it to "constant" or "sequence_sum", or put the KL in the reward')


def _tied(policy: Policy) -> bool:
    """Whether there is a KL penalty, wherever it counts; a steered beta may start at 0."""
    return policy.kl.beta > 0 or policy.kl.mode != "fixed"


def _entropy(policy: Policy) -> Iterator[Notice]:
    if policy.entropy_bonus > 0:
        what = (
            f"{policy.entropy_bonus:g} per nat pays for undecided tokens: "
            "it draws the chance to end towards one in the vocabulary, so that responses go on"
        )
        yield Notice("policy.entropy_bonus", what, "set it to 0: the KL keeps entropy near the reference's")


def _estimator(policy: Policy) -> Iterator[Notice]:
    """k2 and k3 in the reward are wrong in another way: they do not hold the policy, and length goes anywhere."""
    kl = policy.kl
    if kl.estimator == "abs" and _tied(policy):
        what = "abs in the reward is never below 0: every token costs, none earns back, and responses grow shorter"
        yield Notice("policy.kl.estimator", what, "leave it out: k1")
    if kl.place == "loss" and kl.estimator == "k3" and _tied(policy):
        what = "k3 in the loss charges a token for its own KL alone: going on costs nothing of the KL that follows"
        yield Notice("policy.kl.estimator", what, 'leave it out, which is k2 of the whole response, or use "full"')


def _truncation(policy: Policy) -> Iterator[Notice]:
    if policy.missing_eos_penalty == 0 and policy.overlong_penalty == 0:
        what = (
            f"0 lets a response that is cut off at {policy.max_new_tokens} tokens score as if it were complete: "
            "never to end costs nothing"
        )
        yield Notice("policy.missing_eos_penalty", what, "set it above 0, such as 1, or set policy.overlong_penalty")


def _meant(policy: Policy) -> Iterator[Notice]:
    """Penalties that are there to be length rewards."""
    if policy.length_penalty > 0:
        budget = policy.max_new_tokens
        what = f"{policy.length_penalty:g} per token, as meant: {budget} tokens pay {policy.length_penalty * budget:g}"
        yield Notice("policy.length_penalty", what, "policy.target_penalty charges only tokens beyond the reference's")
    if policy.target_penalty > 0:
        what = f"{policy.target_penalty:g} per token beyond the reference's answer, as meant: only longer ones pay"
        yield Notice("policy.target_penalty", what, "set it to 0 if length is not to count")
    if policy.overlong_penalty > 0:
        buffer = policy.overlong_buffer
        what = f"{policy.overlong_penalty / buffer:g} per token over the last {buffer} of the budget, as meant"
        yield Notice("policy.overlong_penalty", what, "raise policy.max_new_tokens if good answers need them")


_CHECKS = (_discount, _aggregation, _entropy, _estimator, _truncation, _meant)
