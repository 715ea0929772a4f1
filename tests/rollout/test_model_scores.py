"""What models say about rollouts: alone or in a batch, padded or not, through holes, at the last real token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import BUDGET, EOS, FAMILIES, PAD, VOCABULARY, classifier, language_model, prompts

from kedge.models.heads import Critic
from kedge.models.reward import reward_model
from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import normalised_on, scores
from kedge.rollout.score import (
    inputs,
    last_token_logits,
    score_rollouts,
    token_scores,
    token_values,
)
from kedge.structs import Rollouts, Sampling
from kedge.train.reward_model import raw_scores


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def drawn(family: str, count: int = 30) -> Rollouts:
    generator = torch.Generator().manual_seed(3)
    return TorchEngine(EOS, PAD).generate(language_model(family), prompts(count), Sampling(BUDGET), generator)


def alone(rollouts: Rollouts, row: int) -> Rollouts:
    return rollouts.rows(torch.tensor([row]))


def test_log_probabilities_are_those_of_the_model_on_the_bare_tokens(family: str) -> None:
    model, rollouts = language_model(family, seed=5), drawn(family)
    scores = token_scores(model, rollouts, temperature=0.7, eos_id=EOS)
    for row in range(0, len(rollouts), 4):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(dim=-1).detach()
        length = len(response)
        taken = expected[torch.arange(length), response]
        torch.testing.assert_close(scores.logprobs[row, :length], taken, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.eos_logprobs[row, :length], expected[:, EOS], atol=1e-5, rtol=0)
        entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
        torch.testing.assert_close(scores.entropy[row, :length], entropy, atol=1e-5, rtol=0)
        for field in (scores.logprobs, scores.eos_logprobs, scores.entropy):
            assert (field[row, length:] == 0).all()


def test_the_cut_into_micro_batches_does_not_show(family: str) -> None:
    model, rollouts = language_model(family, seed=5), drawn(family)
    critic = Critic.from_reward_model(reward_model([classifier(family)]), ("score", "kl"), 0)
    found = [
        score_rollouts(rollouts, model, model, critic, {}, temperature=1.0, eos_id=EOS, microbatch=size)
        for size in (1, 7, 256)
    ]
    for one in found[:-1]:
        for a, b in zip(vars(one.old).values(), vars(found[-1].old).values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(one.values, found[-1].values, atol=2e-6, rtol=2e-6)
    scorer = classifier(family)
    torch.testing.assert_close(
        raw_scores(scorer, rollouts, microbatch=4), raw_scores(scorer, rollouts), atol=2e-6, rtol=2e-6
    )


def test_order_of_rows_is_kept(family: str) -> None:
    model, rollouts = language_model(family, seed=5), drawn(family)
    scores = token_scores(model, rollouts, temperature=1.0, eos_id=EOS, microbatch=4).logprobs
    for row in range(len(rollouts)):
        one = token_scores(model, alone(rollouts, row), temperature=1.0, eos_id=EOS).logprobs[0]
        torch.testing.assert_close(scores[row, : len(one)], one, atol=2e-6, rtol=2e-6)


def test_tokens_in_a_hole_are_context_and_no_more(family: str) -> None:
    """A turn of someone else in the middle: unscored, but what follows depends on it."""
    model, generator = language_model(family, seed=5), torch.Generator().manual_seed(1)
    asked, lengths = prompts(10), torch.randint(6, BUDGET, (10,), generator=generator).tolist()
    said = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    rollouts = as_rollouts([ids[mask].tolist() for ids, mask in zip(asked.ids, asked.mask, strict=True)], said, PAD)
    mask = rollouts.response_mask.clone()
    mask[:, 2:4] = False
    holed = replace(rollouts, response_mask=mask)
    assert torch.equal(inputs(holed)["attention_mask"], inputs(rollouts)["attention_mask"])
    assert torch.equal(holed.last, rollouts.last)
    scores, whole = (token_scores(model, r, temperature=1.0, eos_id=EOS) for r in (holed, rollouts))
    torch.testing.assert_close(scores.logprobs[mask], whole.logprobs[mask], atol=1e-6, rtol=0)
    assert (scores.logprobs[:, 2:4] == 0).all() and (scores.entropy[:, 2:4] == 0).all()
    changed = rollouts.response_ids.clone()
    changed[:, 2:4] = (changed[:, 2:4] + 1) % VOCABULARY
    other = token_scores(model, replace(holed, response_ids=changed), temperature=1.0, eos_id=EOS)
    torch.testing.assert_close(other.logprobs[:, :2], scores.logprobs[:, :2], atol=1e-6, rtol=0)
    assert (other.logprobs[:, 4:6] - scores.logprobs[:, 4:6]).abs().max() > 1e-3


def test_the_score_is_the_classifiers_at_the_last_real_token(family: str) -> None:
    model, rollouts = classifier(family), drawn(family)
    columns = inputs(rollouts)
    columns["input_ids"] = columns["input_ids"].masked_fill(columns["attention_mask"] == 0, PAD)
    with torch.no_grad():
        expected = model(**columns, use_cache=False).logits.squeeze(-1)
        found = last_token_logits(model, rollouts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(raw_scores(model, rollouts)[:, 0], expected, atol=1e-5, rtol=0)
    for row in (0, 7, 20):
        ids = torch.cat([rollouts.prompt_ids[row][rollouts.prompt_mask[row]], own_ids(rollouts, row)])[None]
        with torch.no_grad():
            bare = model(input_ids=ids, use_cache=False).logits.item()
        assert found[row].item() == pytest.approx(bare, abs=1e-5)


def own_ids(rollouts: Rollouts, row: int) -> torch.Tensor:
    return rollouts.response_ids[row][rollouts.response_mask[row]]


def test_normalised_scores_have_mean_0_and_deviation_1_where_they_were_taken(family: str) -> None:
    model, rollouts = classifier(family), drawn(family)
    raw = raw_scores(model, rollouts)[:, 0]
    found = scores(normalised_on(reward_model([model]), rollouts), rollouts)
    assert found.shape == (30,)
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found.argsort(), raw.argsort())


def test_a_value_is_taken_before_its_token(family: str) -> None:
    """The value at t may depend on the tokens before t only; the score head starts as the reward model's."""
    model, rollouts = classifier(family), drawn(family)
    critic = Critic.from_reward_model(reward_model([model]), ("score", "kl"), 0)
    values = token_values(critic, rollouts).detach()
    changed = rollouts.response_ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    other = token_values(critic, replace(rollouts, response_ids=changed)).detach()
    torch.testing.assert_close(other[:, :4], values[:, :4], atol=1e-6, rtol=0)
    assert (other[:, 4:] - values[:, 4:]).abs().max() > 1e-3
    assert (values[..., 1] == 0).all() and (values[~rollouts.response_mask] == 0).all()
    second = alone(rollouts, int(rollouts.lengths.argmax()))
    cut = as_rollouts([second.prompt_ids[0].tolist()], [second.response_ids[0, :3].tolist()], PAD)
    with torch.no_grad():
        expected = last_token_logits(model, cut)
        assert float(token_values(critic, second)[0, 3, 0]) == pytest.approx(float(expected), abs=1e-5)
