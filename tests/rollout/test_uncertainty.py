"""How far an opinion can be trusted: members on their prompt, distance from training, and what a step keeps of it."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import PAD, VOCABULARY, classifier
from torch import Tensor

from kedge.models.reward import RewardModel, reward_model
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import fit_support, judge, member_scores, normalised_on
from kedge.rollout.uncertainty import Uncertainty, uncertainty
from kedge.structs import Rollouts
from kedge.train.record import _means


def answers(count: int, seed: int, groups: int = 6) -> Rollouts:
    """`count` random responses to `groups` prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, 12, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    asked = [ids() for _ in range(groups)]
    group = torch.arange(count) % groups
    return replace(as_rollouts([asked[g] for g in group], [ids() for _ in range(count)], PAD), group_id=group)


def judges(count: int, family: str = "llama") -> RewardModel:
    return normalised_on(reward_model([classifier(family, seed) for seed in range(count)]), answers(40, 9))


class Constant(torch.nn.Module):
    """A member whose score is another's plus a number for each prompt, by the prompt's first token."""

    def __init__(self, inner: Any, constants: Tensor) -> None:
        super().__init__()
        self.inner, self.constants, self.config = inner, constants, inner.config

    def base_model(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Any:
        output = self.inner.base_model(input_ids=input_ids, attention_mask=attention_mask, **rest)
        first = input_ids[torch.arange(len(input_ids)), attention_mask.argmax(dim=1)]
        added = self.constants[first][:, None, None].expand(-1, input_ids.shape[1], 1)
        output.last_hidden_state = torch.cat([output.last_hidden_state, added], dim=2)
        return output

    def score(self, states: Tensor) -> Tensor:
        raw: Tensor = self.inner.score(states[:, :-1])
        return raw + states[:, -1:]


@pytest.mark.parametrize("seed", [0, 1])
def test_members_that_differ_by_a_constant_per_prompt_agree(seed: int) -> None:
    inner = classifier("llama", seed)
    constants = 3 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    model = RewardModel(tuple(Constant(inner, c) for c in constants), (0.0,) * 3, (1.0,) * 3)
    rollouts, reference = answers(24, seed), answers(24, seed)
    again = replace(
        reference, response_ids=reference.response_ids.flip(0), response_mask=reference.response_mask.flip(0)
    )
    for usual in (None, again):
        found = uncertainty(model, judge(model, rollouts), rollouts, usual)
        assert float(judge(model, rollouts).members.std(dim=1).max()) > 1
        torch.testing.assert_close(found.disagreement, torch.zeros(24), atol=1e-5, rtol=0)


def test_disagreement_on_reference_answers_is_that_of_a_loop() -> None:
    model, rollouts, reference = judges(3), answers(10, 1), answers(10, 2)
    found = uncertainty(model, judge(model, rollouts), rollouts, reference)
    own, usual = member_scores(model, rollouts).double(), member_scores(model, reference).double()
    for row in range(10):
        left = [float(own[row, m] - usual[row, m]) for m in range(3)]
        assert float(found.disagreement[row]) == pytest.approx(statistics.stdev(left), abs=1e-5)
    assert torch.equal(found.members, member_scores(model, rollouts))


def test_disagreement_within_a_prompt_is_that_of_a_loop() -> None:
    model, rollouts = judges(4), answers(11, 1, groups=6)  # the last prompt has a single response
    found = uncertainty(model, judge(model, rollouts), rollouts, None).disagreement
    own, group = member_scores(model, rollouts).double(), rollouts.group_id.tolist()
    for row in range(11):
        same = [other for other in range(11) if group[other] == group[row]]
        if len(same) == 1:
            assert math.isnan(float(found[row]))
            continue
        left = [float(own[row, m] - sum(own[j, m] for j in same) / len(same)) for m in range(4)]
        expected = math.sqrt(len(same) / (len(same) - 1)) * statistics.stdev(left)
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)


def test_one_member_without_support_knows_nothing() -> None:
    model, rollouts = judges(1), answers(5, 0)
    found = uncertainty(model, judge(model, rollouts), rollouts, None)
    assert found == Uncertainty() and _means(found) == {}


@pytest.mark.parametrize("members", [1, 3])
def test_distance_and_length_are_held_against_the_training_data(members: int) -> None:
    model = judges(members, "gpt2")
    model = replace(model, support=fit_support(model, answers(200, 3), answers(200, 4)))
    rollouts = answers(50, 5)
    ids = torch.cat([rollouts.response_ids, rollouts.response_ids], dim=1)
    longer = replace(
        rollouts, response_ids=ids, response_mask=torch.ones_like(ids).bool(), behaviour_logprobs=torch.zeros(ids.shape)
    )
    found = uncertainty(model, judge(model, longer), longer, None)
    assert found.longer_than_training.all() and model.support.longest == 11
    usual = uncertainty(model, judge(model, rollouts), rollouts, None)
    assert not usual.longer_than_training.any()
    assert torch.equal(usual.beyond_support, usual.distance > float(model.support.percentiles[99]))
    assert float(usual.beyond_support.float().mean()) <= 0.1
    means = _means(usual)
    assert ("disagreement" in means) is (members > 1)
    assert float(means["beyond_support"]) == pytest.approx(float(usual.beyond_support.sum()) / 50)


def test_a_response_with_nothing_to_compare_does_not_count() -> None:
    doubt = Uncertainty(disagreement=torch.tensor([1.0, math.nan, 3.0]))
    assert float(_means(doubt)["disagreement"]) == 2
