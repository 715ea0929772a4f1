"""The sampler against enumeration: the right distribution, and log-probabilities of exactly what was sampled from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lab import ascent_per_response, generate, prompts_of, score, weights_for
from scipy.stats import chisquare
from torch import Tensor

from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableCritic, TableModel, random_table, random_task
from kedge.models.reward import RewardModel
from kedge.rollout.engine import TorchEngine
from kedge.rollout.reward import scores
from kedge.rollout.score import token_scores, token_values
from kedge.structs import Rollouts, Sampling

SPACE = Space(3, 3, prompts=3)
TABLE = random_table(SPACE, 2, scale=1.0)
BATCH = 30_000


def draw(sampling: Sampling, *, batch: int = BATCH, engine_batch: int = 8192) -> Rollouts:
    engine = TorchEngine(eos_id=EOS, pad_id=PAD, batch=engine_batch)
    return engine.generate(
        TableModel(SPACE, TABLE), prompts_of(SPACE, batch), sampling, torch.Generator().manual_seed(0), 7
    )


def nucleus(table: Tensor, top_p: float) -> Tensor:
    """[..., actions] logits with everything outside the nucleus forbidden, by sorting lists."""
    truncated = torch.full_like(table, -torch.inf)
    for prompt, row in torch.cartesian_prod(torch.arange(table.shape[0]), torch.arange(table.shape[1])).tolist():
        probabilities = table[prompt, row].softmax(-1).tolist()
        mass = 0.0
        for action in sorted(range(len(probabilities)), key=lambda a: -probabilities[a]):
            if mass >= top_p:
                break
            truncated[prompt, row, action] = table[prompt, row, action]
            mass += probabilities[action]
    return truncated


SAMPLINGS = {
    "plain": (Sampling(3), TABLE),
    "temperature": (Sampling(3, temperature=0.7), TABLE / 0.7),
    "nucleus": (Sampling(3, top_p=0.8), nucleus(TABLE, 0.8)),
    "both": (Sampling(3, temperature=1.5, top_p=0.9), nucleus(TABLE / 1.5, 0.9)),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_responses_follow_the_exact_distribution(name: str) -> None:
    sampling, table = SAMPLINGS[name]
    rollouts = draw(sampling)
    exact = SPACE.sequence_logprobs(table).exp()
    index = SPACE.index_of(rollouts.response_ids, rollouts.response_mask)
    for prompt in range(SPACE.prompts):
        counts = torch.bincount(index[rollouts.group_id == prompt], minlength=len(SPACE.sequences)).double()
        expected = exact[prompt] * counts.sum()
        possible = expected > 0
        assert counts[~possible].sum() == 0
        assert chisquare(counts[possible], expected[possible]).pvalue > 1e-4


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("engine_batch", [8192, 7])
def test_behaviour_logprobs_are_of_the_distribution_sampled_from(name: str, engine_batch: int) -> None:
    sampling, table = SAMPLINGS[name]
    rollouts = draw(sampling, batch=500, engine_batch=engine_batch)
    index = SPACE.index_of(rollouts.response_ids, rollouts.response_mask)
    expected = SPACE.token_logprobs(table)[rollouts.group_id, index]
    assert torch.allclose(rollouts.behaviour_logprobs, expected, atol=1e-12)
    assert torch.equal(rollouts.response_mask, SPACE.mask[index])
    assert torch.equal(rollouts.ended, SPACE.ended[index])


def test_rollouts_are_padded_and_marked() -> None:
    rollouts = draw(Sampling(3), batch=300)
    assert rollouts.policy_version == 7
    assert (rollouts.response_ids[~rollouts.response_mask] == PAD).all()
    assert not (rollouts.response_ids[rollouts.response_mask] == PAD).any()
    last = rollouts.response_ids.gather(1, rollouts.last.unsqueeze(1)).squeeze(1)
    assert torch.equal(last == EOS, rollouts.ended)


def test_the_budget_ends_a_response_without_eos() -> None:
    rollouts = draw(Sampling(1), batch=300)
    assert rollouts.response_ids.shape[1] == 1
    assert torch.equal(rollouts.ended, rollouts.response_ids[:, 0] == EOS)
    assert 0 < rollouts.ended.sum() < 300


def test_the_same_seed_draws_the_same_responses() -> None:
    assert torch.equal(draw(Sampling(3), batch=100).response_ids, draw(Sampling(3), batch=100).response_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("microbatch", [7, 1000])
def test_scoring_repeats_what_the_sampler_said(temperature: float, microbatch: int) -> None:
    """At one temperature, with nothing truncated, learner and sampler are the same distribution."""
    rollouts = draw(Sampling(3, temperature=temperature), batch=200)
    policy = TableModel(SPACE, TABLE)
    scores = token_scores(policy, rollouts, temperature=temperature, eos_id=EOS, microbatch=microbatch)
    assert torch.allclose(scores.logprobs, rollouts.behaviour_logprobs, atol=1e-12)
    index = SPACE.index_of(rollouts.response_ids, rollouts.response_mask)
    states = SPACE.path[0][index]
    distribution = (TABLE / temperature).log_softmax(-1)[rollouts.group_id.unsqueeze(1), states]
    mask = rollouts.response_mask
    assert torch.allclose(scores.eos_logprobs, distribution[..., 0] * mask, atol=1e-12)
    assert torch.allclose(scores.entropy, -(distribution.exp() * distribution).sum(-1) * mask, atol=1e-12)


def test_token_values_are_of_what_comes_before_the_token() -> None:
    rollouts = draw(Sampling(3), batch=200)
    critic = TableCritic(SPACE, random_table(SPACE, 5, width=2))
    index = SPACE.index_of(rollouts.response_ids, rollouts.response_mask)
    before = critic.table[rollouts.group_id.unsqueeze(1), SPACE.path[0][index]]
    assert torch.equal(token_values(critic, rollouts), before * rollouts.response_mask.unsqueeze(-1))


class LastPosition:
    """A reward model whose hidden state is each token's id and position: what it reads off is plain to see."""

    @staticmethod
    def base_model(input_ids: Tensor, position_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, position_ids], dim=-1))

    @staticmethod
    def score(hidden: Tensor) -> Tensor:
        return (hidden[..., :1] + 1000 * hidden[..., 1:]).double()


@pytest.mark.parametrize("hole", [False, True])
def test_reward_model_reads_the_last_token_of_the_policy(hole: bool) -> None:
    rollouts = draw(Sampling(3), batch=200)
    if hole:  # the first of several tokens is the environment's
        mask = rollouts.response_mask & ((torch.arange(3) > 0) | (rollouts.lengths == 1).unsqueeze(1))
        rollouts = replace(rollouts, response_mask=mask)
    got = scores(RewardModel((LastPosition(),), means=(0.0,), scales=(1.0,)), rollouts)
    for b in range(len(rollouts)):
        last = max(t for t in range(3) if rollouts.response_mask[b, t])
        position = int(rollouts.prompt_mask[b].sum()) + last
        assert got[b].item() == int(rollouts.response_ids[b, last]) + 1000 * position


def test_tokens_with_a_logit_of_minus_infinity_do_no_harm() -> None:
    """Padded vocabularies and suppressed tokens have such logits, and padding holds such a token."""
    task, gradients = random_task(SPACE), []
    for forbidden in (-1e4, -torch.inf):
        policy = TableModel(SPACE, TABLE, forbidden)
        rollouts = generate(SPACE, policy, 200, torch.Generator().manual_seed(3))
        scored = score(rollouts, policy, task)
        assert torch.allclose(scored.old.logprobs, rollouts.behaviour_logprobs, atol=1e-12)
        assert scored.old.entropy.isfinite().all()
        gradients.append(ascent_per_response(scored, policy, weights_for(task.beta)))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
