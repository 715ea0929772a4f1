"""Beam search against the list of every answer there is, on models of a few tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small_models import FAMILIES, PAD, config_of
from transformers import AutoModelForCausalLM

from kedge.rollout.beam import beam_candidates
from kedge.rollout.given import as_prompts
from kedge.structs import Rollouts, Sampling

EOS, VOCABULARY, BUDGET = 1, 5, 3
PROMPTS = [[2, 3], [4], [3, 3, 2, 4]]


def tiny(family: str, seed: int = 0) -> Any:
    config = config_of(family)
    config.vocab_size = VOCABULARY
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def every_answer(model: Any, prompt: list[int], temperature: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every answer within the budget with its log-probability, likeliest first, token by token without padding."""
    letters = [token for token in range(VOCABULARY) if token != EOS]
    found = []
    for length in range(BUDGET + 1):
        for written in itertools.product(letters, repeat=length):
            answer = written if length == BUDGET else (*written, EOS)
            found.append((sum(logprobs(model, prompt, answer, temperature)), answer))
    return sorted(found, reverse=True)


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], answer: tuple[int, ...], temperature: float) -> list[float]:
    ids = [*prompt, *answer]
    logits = model(torch.tensor([ids])).logits[0].double() / temperature
    values = []
    for place, token in enumerate(answer, start=len(prompt)):
        row = logits[place - 1].tolist()
        values.append(row[token] - math.log(math.fsum(map(math.exp, row))))
    return values


def search(model: Any, beams: int, temperature: float = 1.0, budget: int = BUDGET) -> Rollouts:
    sampling = Sampling(budget, temperature)
    return beam_candidates(model, as_prompts(PROMPTS, PAD), sampling, beams, EOS, PAD)


def answers(found: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(found.response_ids, found.response_mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_search_wide_enough_finds_the_best_of_all(family: str, temperature: float) -> None:
    model, beams = tiny(family), 85
    found = search(model, beams, temperature)
    texts = answers(found)
    for number, prompt in enumerate(PROMPTS):
        expected = every_answer(model, prompt, temperature)
        assert len(expected) == beams
        own = texts[number * beams : (number + 1) * beams]
        assert len(set(own)) == beams
        totals = [sum(logprobs(model, prompt, answer, temperature)) for answer in own]
        assert totals == pytest.approx([total for total, _ in expected], abs=1e-5)
        assert own[:10] == [answer for _, answer in expected[:10]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_search_of_padded_prompts(family: str) -> None:
    model, beams = tiny(family, seed=1), 4
    found = search(model, beams, 0.8, budget=9)
    assert found.group_id.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row, answer in enumerate(answers(found)):
        prompt = PROMPTS[row // beams]
        assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == prompt
        own = found.behaviour_logprobs[row]
        assert own[: len(answer)].tolist() == pytest.approx(logprobs(model, prompt, answer, 0.8), abs=1e-5)
        assert not own[len(answer) :].any()
        assert bool(found.ended[row]) == (EOS in answer)
        assert EOS not in answer[:-1]
        assert found.ended[row] or len(answer) == 9
        assert (found.response_ids[row, len(answer) :] == PAD).all()
    totals = found.behaviour_logprobs.sum(dim=1).view(3, beams)
    assert (totals.diff(dim=1) <= 1e-5).all()
    assert found.response_mask.any(dim=0).all(), "no column is padding in every row"


def test_a_search_does_not_depend_on_what_else_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    import kedge.rollout.beam as beam

    model = tiny("llama", seed=2)
    whole = search(model, 3, budget=7)
    monkeypatch.setattr(beam, "ROWS", 1)
    apart = search(model, 3, budget=7)
    assert torch.equal(whole.response_ids, apart.response_ids)
    assert torch.equal(whole.response_mask, apart.response_mask)
    assert torch.equal(whole.ended, apart.ended)
    assert torch.allclose(whole.behaviour_logprobs, apart.behaviour_logprobs, atol=1e-5)


def test_settings_of_the_model_folder_play_no_part() -> None:
    model = tiny("llama")
    plain = search(model, 4)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 3
    model.generation_config.top_p = 0.1
    own = model.generation_config
    again = search(model, 4)
    assert torch.equal(plain.response_ids, again.response_ids)
    assert model.generation_config is own


def test_padding_may_be_the_end_token() -> None:
    model = tiny("gpt2")
    prompts = as_prompts(PROMPTS, EOS)
    found = beam_candidates(model, prompts, Sampling(BUDGET), 6, EOS, EOS)
    assert answers(found) == answers(search(model, 6))
    assert found.ended.tolist() == search(model, 6).ended.tolist()
