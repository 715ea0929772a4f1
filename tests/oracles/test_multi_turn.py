"""Responses with tool turns in them (holes in the mask), through scoring, experience and update, against enumeration.

The environment answers a first letter with a letter of its own. That letter is context: the policy is not scored on
it, it costs no KL and no length, and no gradient passes through it, but what follows is conditioned on it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab import all_rollouts, ascent_per_response, weights_for, z_scores
from torch import Tensor

from kedge.experiment.verify.enumerable import EOS, Space, TableCritic, TableModel, random_table, random_task
from kedge.rollout.score import score_rollouts
from kedge.structs import Rollouts, ScoredRollouts
from kedge.train.experience import make_experience

SPACE = Space(3, 4)
TASK = random_task(SPACE, seed=8)
POLICY = TASK.reference + random_table(SPACE, 5, scale=0.6)
TOOL_SAYS = 2  # the action that the environment writes as the second token


def policys_own() -> Tensor:
    """[N, T] bool: tokens that the policy wrote."""
    mask = SPACE.mask.clone()
    mask[:, 1] = False
    return mask


def possible() -> Tensor:
    """[N] bool: the second token, if there is one, is the environment's, and something follows it."""
    _, actions = SPACE.path
    return (SPACE.lengths == 1) | ((SPACE.lengths >= 3) & (actions[:, 1] == TOOL_SAYS))


def own_logprobs(table: Tensor) -> Tensor:
    """[N] log-probability of the policy's own tokens, minus infinity where the environment would not answer so."""
    logprobs = (SPACE.token_logprobs(table)[0] * policys_own()).sum(-1)
    return logprobs.masked_fill(~possible(), -torch.inf)


def sample(batch: int, generator: torch.Generator) -> Rollouts:
    everything = all_rollouts(SPACE)
    index = torch.multinomial(own_logprobs(POLICY).exp(), batch, replacement=True, generator=generator)
    logprobs = SPACE.token_logprobs(POLICY)[0] * policys_own()
    return Rollouts(
        prompt_ids=everything.prompt_ids[index],
        prompt_mask=everything.prompt_mask[index],
        response_ids=everything.response_ids[index],
        response_mask=policys_own()[index],
        ended=SPACE.ended[index],
        group_id=torch.zeros_like(index),
        behaviour_logprobs=logprobs[index],
    )


def reward_of(rollouts: Rollouts) -> Tensor:
    """The task's reward for the whole conversation, tool turns included."""
    return TASK.reward[0, SPACE.index_of(rollouts.response_ids, rollouts.context_mask)]


def objective(table: Tensor) -> Tensor:
    """E[score - beta sum of k1 over own tokens - 0.2 own tokens], by enumeration."""
    probability = own_logprobs(table).exp()
    own = policys_own()
    k = ((SPACE.token_logprobs(table) - SPACE.token_logprobs(TASK.reference))[0] * own).sum(-1)
    return (probability * (TASK.reward[0] - TASK.beta * k - 0.2 * own.sum(-1))).sum()


WEIGHTS = {**weights_for(TASK.beta), "length": -0.2}


def scored(rollouts: Rollouts, policy: TableModel, critic: TableCritic | None = None) -> ScoredRollouts:
    reference = TableModel(SPACE, TASK.reference)
    return score_rollouts(rollouts, policy, reference, critic, {"score": reward_of}, temperature=1.0, eos_id=EOS)


def test_conversations_are_a_distribution() -> None:
    assert own_logprobs(POLICY).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("heads", [None, 4])
def test_mean_gradient_is_exact_with_tool_turns(heads: int | None) -> None:
    policy, generator = TableModel(SPACE, POLICY), torch.Generator().manual_seed(0)
    critic = None if heads is None else TableCritic(SPACE, random_table(SPACE, 8, width=heads))
    table = POLICY.clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective(table), table)
    z = z_scores(lambda: ascent_per_response(scored(sample(2000, generator), policy, critic), policy, WEIGHTS), exact)
    assert z.max() < 4


def test_ignoring_the_mask_is_seen() -> None:
    """The same conversations with the tool's words taken for the policy's own."""
    policy, generator = TableModel(SPACE, POLICY), torch.Generator().manual_seed(0)
    table = POLICY.clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective(table), table)

    def draw() -> Tensor:
        rollouts = sample(2000, generator)
        rollouts = replace(rollouts, response_mask=rollouts.context_mask)
        return ascent_per_response(scored(rollouts, policy), policy, WEIGHTS)

    assert z_scores(draw, exact).max() > 6


def test_what_follows_a_tool_turn_is_conditioned_on_it() -> None:
    rollouts = sample(200, torch.Generator().manual_seed(1))
    result = scored(rollouts, TableModel(SPACE, POLICY))
    assert torch.allclose(result.old.logprobs, rollouts.behaviour_logprobs, atol=1e-12)
    changed = rollouts.response_ids.clone()
    after_tool = rollouts.context_mask[:, 1]
    changed[after_tool, 1] = SPACE.tokens[1]
    other = scored(replace(rollouts, response_ids=changed), TableModel(SPACE, POLICY))
    assert torch.equal(result.old.logprobs[:, 0], other.old.logprobs[:, 0])
    assert not torch.allclose(result.old.logprobs[after_tool, 2], other.old.logprobs[after_tool, 2])


def test_a_tool_turn_costs_nothing_and_earns_nothing() -> None:
    rollouts = sample(200, torch.Generator().manual_seed(1))
    critic = TableCritic(SPACE, random_table(SPACE, 8, width=4))
    experience = make_experience(
        scored(rollouts, TableModel(SPACE, POLICY), critic), weights=WEIGHTS, gamma=1.0, lam=0.95, whiten=True
    )
    assert not experience.rewards[:, 1].any()
    assert not experience.advantage()[:, 1].any()
    assert not experience.returns[:, 1].any()
    assert torch.equal(experience.channel("length"), rollouts.lengths.double())
    assert torch.equal(experience.channel("score"), reward_of(rollouts))
    landed = experience.rewards[..., 0].gather(1, rollouts.last.unsqueeze(1)).squeeze(1)
    assert torch.equal(landed, reward_of(rollouts))


def test_rows_keep_holes_and_drop_padding() -> None:
    rollouts = sample(200, torch.Generator().manual_seed(1))
    short = (rollouts.last == 2).nonzero().squeeze(1)
    part = rollouts.rows(short)
    assert part.response_ids.shape == (len(short), 3)
    assert part.response_mask.tolist() == [[True, False, True]] * len(short)
    assert part.context_mask.all()
    assert torch.equal(part.last, rollouts.last[short]) and torch.equal(part.lengths, rollouts.lengths[short])
