"""Generation against Hugging Face's own, and its log-probabilities against a scoring pass, on two families."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_models import BUDGET, EOS, FAMILIES, PAD, language_model, prompts
from torch import Tensor

from kedge.rollout.engine import TorchEngine, truncate
from kedge.rollout.score import response_logprobs, token_scores
from kedge.structs import Rollouts, Sampling

ENGINE = TorchEngine(EOS, PAD)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest):
    return language_model(request.param)


def own(rollouts: Rollouts, row: int) -> list[int]:
    return rollouts.response_ids[row][rollouts.response_mask[row]].tolist()


def test_without_chance_it_writes_what_hugging_face_writes(model) -> None:
    asked = prompts()
    rollouts = ENGINE.generate(model, asked, Sampling(BUDGET, temperature=1e-5), seeded())
    written = model.generate(
        input_ids=asked.ids,
        attention_mask=asked.mask.long(),
        max_new_tokens=BUDGET,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[:, asked.ids.shape[1] :]
    lengths = set()
    for row in range(len(asked)):
        expected = written[row].tolist()
        expected = expected[: expected.index(EOS) + 1] if EOS in expected else expected
        assert own(rollouts, row) == expected
        assert bool(rollouts.ended[row]) == (expected[-1] == EOS)
        lengths.add(len(expected))
    assert len(lengths) > 2, "answers of one length would show little"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_behaviour_is_what_a_scoring_pass_finds(model, temperature: float) -> None:
    """Left padding, the cache and rows that leave the batch once they ended change nothing."""
    rollouts = ENGINE.generate(model, prompts(64), Sampling(BUDGET, temperature), seeded())
    scores = token_scores(model, rollouts, temperature=temperature, eos_id=EOS)
    torch.testing.assert_close(rollouts.behaviour_logprobs, scores.logprobs, atol=1e-5, rtol=0)
    assert rollouts.ended.float().mean() > 0.3, "rows did leave the batch"
    assert rollouts.lengths.unique().numel() > 5
    assert (rollouts.behaviour_logprobs[rollouts.response_mask] < 0).all()
    assert (rollouts.behaviour_logprobs[~rollouts.response_mask] == 0).all()
    assert (rollouts.response_ids[~rollouts.response_mask] == PAD).all()
    torch.testing.assert_close(rollouts.lengths, rollouts.last + 1)


def test_rows_leave_the_batch(model, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **named: widths.append(len(named["input_ids"])) or forward(**named))
    ENGINE.generate(model, prompts(64), Sampling(BUDGET), seeded())
    assert widths[0] == 64
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 40


def test_every_prompt_has_its_own_answer(model) -> None:
    """Without chance the batch an answer is drawn in does not show."""
    asked = prompts()
    together = ENGINE.generate(model, asked, Sampling(BUDGET, 1e-5), seeded())
    for row in range(0, len(asked), 5):
        index = torch.tensor([row])
        alone = replace(
            asked.rows(index), ids=asked.ids[index][:, asked.mask[row]], mask=asked.mask[index][:, asked.mask[row]]
        )
        answer = ENGINE.generate(model, alone, Sampling(BUDGET, 1e-5), seeded())
        assert own(answer, 0) == own(together, row)
    assert together.group_id.tolist() == list(range(len(asked)))


def test_small_batches_are_joined(model) -> None:
    asked = prompts(23)
    rollouts = TorchEngine(EOS, PAD, batch=5).generate(model, asked, Sampling(BUDGET), seeded(), policy_version=7)
    assert len(rollouts) == 23 and rollouts.policy_version == 7
    assert torch.equal(rollouts.prompt_ids, asked.ids)
    scores = token_scores(model, rollouts, temperature=1.0, eos_id=EOS)
    torch.testing.assert_close(rollouts.behaviour_logprobs, scores.logprobs, atol=1e-5, rtol=0)


def test_a_generator_draws_the_same_again(model) -> None:
    one, again, other = (ENGINE.generate(model, prompts(), Sampling(BUDGET), seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(one.response_ids, again.response_ids)
    assert torch.equal(one.behaviour_logprobs, again.behaviour_logprobs)
    assert one.response_ids.shape != other.response_ids.shape or not torch.equal(one.response_ids, other.response_ids)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model = language_model("llama")
    asked = prompts(1).rows(torch.zeros(20_000, dtype=torch.long))
    rollouts = ENGINE.generate(model, asked, Sampling(1, temperature=0.8), seeded())
    expected = response_logprobs(model, rollouts.rows(torch.tensor([0])), 0.8)[0, 0].exp()
    counted = Counter(rollouts.response_ids[:, 0].tolist())
    found = torch.tensor([counted[token] / 20_000 for token in range(len(expected))])
    torch.testing.assert_close(found, expected.detach(), atol=0.02, rtol=0)


def test_a_budget_of_one(model) -> None:
    rollouts = ENGINE.generate(model, prompts(), Sampling(1), seeded())
    assert rollouts.response_ids.shape == (24, 1) and rollouts.response_mask.all()
    assert torch.equal(rollouts.ended, rollouts.response_ids[:, 0] == EOS)


# Nucleus sampling


def test_truncation_keeps_the_smallest_set_of_its_mass() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = truncate(logprobs, 0.7).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0, 0], [0, 0, 0.375, 0.625]]))
    torch.testing.assert_close(truncate(logprobs, 0.85).exp()[0], torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95)
    torch.testing.assert_close(truncate(logprobs, 1e-9).exp()[0], torch.tensor([1.0, 0, 0, 0]))
    assert truncate(logprobs, 1.0) is logprobs


def truncated(model, rollouts: Rollouts, temperature: float, top_p: float) -> Tensor:
    full = response_logprobs(model, rollouts, temperature)
    kept = truncate(full.flatten(0, 1), top_p).view_as(full)
    return kept.gather(-1, rollouts.response_ids.unsqueeze(-1)).squeeze(-1)


def test_behaviour_under_truncation_is_renormalised(model) -> None:
    rollouts = ENGINE.generate(model, prompts(64), Sampling(BUDGET, 0.9, top_p=0.6), seeded())
    mask = rollouts.response_mask
    expected = truncated(model, rollouts, 0.9, 0.6).detach()
    torch.testing.assert_close(rollouts.behaviour_logprobs[mask], expected[mask], atol=1e-5, rtol=0)
    whole = token_scores(model, rollouts, temperature=0.9, eos_id=EOS).logprobs
    assert (rollouts.behaviour_logprobs[mask] >= whole[mask] - 1e-5).all(), "what is left becomes likelier"
    assert (rollouts.behaviour_logprobs - whole)[mask].mean() > 0.1
