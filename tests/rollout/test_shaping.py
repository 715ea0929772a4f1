"""Rewarders of length and repetition, and what the reference answers to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from small_models import BUDGET, EOS, PAD, classifier, language_model, prompts

from kedge.models.reward import RewardModel
from kedge.rollout.engine import TorchEngine
from kedge.rollout.reward import judge
from kedge.rollout.score import Rewarder, score_rollouts
from kedge.rollout.shaping import SHAPING, ReferenceAnswers, above_reference, shaping_rewarders
from kedge.structs import Opinion, Prompts, Rollouts, Sampling
from kedge.train.schedule import seeded

SAMPLING = Sampling(BUDGET)


class Counting(TorchEngine):
    """Counts the prompts of each draw."""

    def __init__(self) -> None:
        super().__init__(EOS, PAD)
        self.draws: list[int] = []

    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts:
        self.draws.append(len(prompts))
        return super().generate(policy, prompts, sampling, generator, policy_version)


def answers(engine: TorchEngine | None = None) -> ReferenceAnswers:
    given = engine or TorchEngine(EOS, PAD)
    return ReferenceAnswers(given, language_model("llama", 1), SAMPLING, partial(seeded, 5, "reference answer"))


def drawn(step: int = 3, samples: int = 2, count: int = 12) -> Rollouts:
    """Responses of a policy, `samples` for each prompt, the prompts in no order."""
    pool = prompts(count)
    index = torch.randperm(count, generator=torch.Generator().manual_seed(9)).repeat_interleave(samples)
    engine = TorchEngine(EOS, PAD)
    return engine.generate(language_model("llama", 2), pool.rows(index), SAMPLING, seeded(0, "draw"), step)


def shaped(penalties: Mapping[str, float], given: ReferenceAnswers | None = None) -> dict[str, Rewarder]:
    return shaping_rewarders(**penalties, budget=BUDGET, buffer=4, answers=given or answers())


def numbers(rewarder: Rewarder, rollouts: Rollouts) -> list[float]:
    found = rewarder(rollouts)
    assert isinstance(found, torch.Tensor)
    return found.tolist()


# The reference's answers


def test_one_answer_per_prompt_is_drawn_and_shared_in_a_step() -> None:
    engine, rollouts = Counting(), drawn()
    given = answers(engine)
    first, row = given.of(rollouts)
    again, _ = given.of(rollouts)
    assert again is first
    assert engine.draws == [12]
    assert torch.equal(first.group_id[row], rollouts.group_id)
    for held, prompt in ((first.prompt_ids[row], rollouts.prompt_ids), (first.prompt_mask[row], rollouts.prompt_mask)):
        assert torch.equal(held, prompt)


def test_another_step_or_other_prompts_get_answers_of_their_own() -> None:
    engine, rollouts = Counting(), drawn()
    given = answers(engine)
    first, _ = given.of(rollouts)
    later, _ = given.of(drawn(step=4))
    fewer, row = given.of(drawn(step=4).rows(torch.tensor([0, 1, 5])))
    assert engine.draws == [12, 12, 2]
    assert first.response_ids.tolist() != later.response_ids.tolist()
    assert row.max() == len(fewer) - 1


def test_a_resumed_run_draws_the_same_answers() -> None:
    early = answers()
    for step in (1, 2, 3):
        went, _ = early.of(drawn(step))
    resumed, _ = answers().of(drawn(3))
    assert torch.equal(went.response_ids, resumed.response_ids)


# Channels


def test_only_what_is_weighed_is_there() -> None:
    assert shaped({}) == {}
    assert list(shaped({"repetition": 0.5})) == ["repetition"]
    assert tuple(shaped({"overlong": 1.0, "target": 0.1, "repetition": 0.5})) == SHAPING


def test_without_a_target_the_reference_is_not_asked() -> None:
    engine = Counting()
    for rewarder in shaped({"overlong": 1.0, "repetition": 0.5}, answers(engine)).values():
        rewarder(drawn())
    assert engine.draws == []


def test_overlong_counts_the_policys_tokens_up_to_the_budget() -> None:
    rollouts = drawn(count=24, samples=4)
    found = numbers(shaped({"overlong": 1.0})["overlong"], rollouts)
    for length, ended, share in zip(rollouts.lengths.tolist(), rollouts.ended.tolist(), found, strict=True):
        assert share == pytest.approx(max(0, length - (BUDGET - 4)) / 4 if ended else 1)
    assert len(set(found)) > 3, "the batch shows cut, late and early responses"


def test_over_target_compares_with_the_answer_to_the_same_prompt() -> None:
    rollouts, given = drawn(samples=3), answers()
    found = numbers(shaped({"target": 0.1}, given)["over_target"], rollouts)
    reference, _ = given.of(rollouts)
    usual = dict(zip(reference.group_id.tolist(), reference.lengths.tolist(), strict=True))
    expected = [
        max(0, n - usual[group]) for n, group in zip(rollouts.lengths.tolist(), rollouts.group_id.tolist(), strict=True)
    ]
    assert found == expected
    assert 0 in found and max(found) > 0


def test_repetition_reads_whole_responses() -> None:
    rollouts = drawn(count=24)
    found = numbers(shaped({"repetition": 1.0})["repetition"], rollouts)
    for ids, true, share in zip(rollouts.response_ids, rollouts.response_mask, found, strict=True):
        words = ids[true].tolist()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        assert share == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)


def test_they_are_scored_beside_the_score() -> None:
    rollouts, policy = drawn(), language_model("llama", 2)
    rewarders = {"score": lambda r: r.lengths.float(), **shaped({"overlong": 1.0, "target": 0.1, "repetition": 0.5})}
    scored = score_rollouts(rollouts, policy, language_model("llama", 1), None, rewarders, temperature=1.0, eos_id=EOS)
    assert tuple(scored.scores) == ("score", *SHAPING)
    assert all(len(score) == len(rollouts) for score in scored.scores.values())


# The score above the reference


def last_token(rollouts: Rollouts) -> torch.Tensor:
    return rollouts.response_ids[torch.arange(len(rollouts)), rollouts.last].double()


def test_the_score_of_the_reference_is_taken_off_per_prompt() -> None:
    rollouts, given = drawn(samples=3), answers()

    def score(of: Rollouts) -> torch.Tensor:
        return of.lengths.double() + 0.5 * last_token(of)

    found = numbers(above_reference(score, given), rollouts)
    reference, _ = given.of(rollouts)
    usual = dict(zip(reference.group_id.tolist(), score(reference).tolist(), strict=True))
    plain = zip(score(rollouts).tolist(), rollouts.group_id.tolist(), strict=True)
    assert found == pytest.approx([number - usual[group] for number, group in plain])


def test_a_constant_per_prompt_is_gone() -> None:
    rollouts = drawn(samples=3)
    offset = 10 * torch.randn(12, generator=seeded(0, "offset"))

    def free(of: Rollouts) -> torch.Tensor:
        return of.lengths + offset[of.group_id]

    found = numbers(above_reference(free, answers()), rollouts)
    plain = numbers(above_reference(lambda of: of.lengths.float(), answers()), rollouts)
    assert found == pytest.approx(plain, abs=1e-4)


def test_an_opinion_keeps_what_it_rests_on() -> None:
    rollouts = drawn()
    reward_model = RewardModel((classifier("llama"),), means=(0.0,), scales=(1.0,))
    plain = judge(reward_model, rollouts)
    found = above_reference(partial(judge, reward_model), answers())(rollouts)
    assert isinstance(found, Opinion)
    assert torch.equal(found.members, plain.members)
    gap = plain.score - found.score
    for group in rollouts.group_id.unique():
        assert gap[rollouts.group_id == group].unique().numel() <= 2, "up to rounding the same for a prompt"
    assert gap.std() > 0
