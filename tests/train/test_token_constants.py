"""Channels that pay by the token are found in a batch, and named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_learner import EOS, drawn, learner, likes_fours, policy
from torch import Tensor

from kedge.rollout.score import Rewarder, score_rollouts
from kedge.structs import Experience, Rollouts
from kedge.train.experience import make_experience
from kedge.train.token_constants import constant_token_rewards, constant_words

WEIGHTS = {"score": 1.0, "kl": -0.1, "length": 0.0, "missing_eos": -1.0}


def made(
    rule: Rewarder | None = None, weight: float = 1.0, rollouts: Rollouts | None = None, **weights: float
) -> Experience:
    """An experience of the production path, with a rule as a channel beside the score."""
    of = learner()
    rewarders: dict[str, Rewarder] = {"score": likes_fours} | ({} if rule is None else {"rule": rule})
    rollouts = drawn(of.policy) if rollouts is None else rollouts
    scored = score_rollouts(rollouts, of.policy, policy(seed=9), None, rewarders, temperature=1.0, eos_id=EOS)
    return make_experience(scored, weights=WEIGHTS | {"rule": weight} | weights)


def added_to_kl(experience: Experience, constant: float) -> Experience:
    """As if token rewards had been whitened: the channel is a constant but for its name."""
    rewards = experience.rewards.clone()
    rewards[..., experience.channels.index("kl")] = constant
    return replace(experience, rewards=rewards)


def test_a_plain_batch_names_nothing() -> None:
    assert constant_token_rewards(made()) == {}


def test_a_length_penalty_is_named_with_its_sign_and_size() -> None:
    assert constant_token_rewards(made(length=-0.02)) == {"length": pytest.approx(-0.02)}


def test_a_channel_that_pays_nothing_per_token_is_named_only_if_it_has_a_weight() -> None:
    experience = added_to_kl(made(), 2.0)
    assert constant_token_rewards(experience) == {"kl": pytest.approx(-0.2)}
    assert constant_token_rewards(replace(experience, weights=0 * experience.weights)) == {}


def test_a_policy_that_is_still_the_reference_pays_no_constant() -> None:
    assert constant_token_rewards(added_to_kl(made(), 0.0)) == {}


def test_one_other_token_is_enough_not_to_be_constant() -> None:
    experience = added_to_kl(made(), 2.0)
    experience.rewards[0, 0, experience.channels.index("kl")] = 2.1
    assert "kl" not in constant_token_rewards(experience)


def tokens(rollouts: Rollouts) -> Tensor:
    return rollouts.lengths.float()


@pytest.mark.parametrize(("offset", "per_token", "weight"), [(0.0, 1.0, 0.5), (3.0, -0.2, 2.0), (-50.0, 0.01, -1.0)])
def test_a_rule_that_counts_tokens_at_the_end_is_the_same_reward(
    offset: float, per_token: float, weight: float
) -> None:
    found = constant_token_rewards(made(lambda r: offset + per_token * tokens(r), weight))
    assert found == {"rule": pytest.approx(per_token * weight, rel=1e-4)}


def test_a_rule_that_grows_with_length_but_is_not_length_is_not_named() -> None:
    assert constant_token_rewards(made(lambda r: tokens(r) ** 2)) == {}
    assert constant_token_rewards(made(lambda r: tokens(r) + 0.1 * likes_fours(r))) == {}
    assert constant_token_rewards(made(lambda r: torch.ones(len(r)))) == {}, "the same for every response"


def test_two_lengths_lie_on_any_line_and_one_token_is_on_every_token() -> None:
    rollouts = drawn(policy())
    lengths = rollouts.lengths
    two = rollouts.rows(((lengths == lengths.max()) | (lengths == lengths.min())).nonzero().squeeze(1))
    assert constant_token_rewards(made(tokens, rollouts=two)) == {}
    short = replace(rollouts, response_mask=torch.arange(rollouts.response_ids.shape[1]).expand(len(rollouts), -1) < 1)
    assert constant_token_rewards(made(lambda r: torch.full((len(r),), 2.0), rollouts=short)) == {}


def test_the_words_name_channel_sign_and_size() -> None:
    assert constant_words("length", -0.02) == (
        "channel length takes 0.02 reward per token, whatever the token: it is a reward for short responses "
        "-> keep it if that is meant, else set its weight to 0 or let it count once per response"
    )
    assert constant_words("polite", 0.5).startswith("channel polite pays 0.5 reward per token")
    assert "for long responses" in constant_words("polite", 0.5)
