"""Annotators who like length: what each method leaves of it in the score, on a trunk that sees quality and length.

A response is one token repeated; which token is its quality, from -1 to 1, and the annotators add 0.2 per token.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from judged import answers, judged, pairs
from torch import Tensor, nn

from kedge.models.correction import LengthCorrection
from kedge.rollout.given import as_rollouts
from kedge.structs import Judgments, Rollouts
from kedge.train.length import LengthExpert, balanced, fit_length_residual
from kedge.train.reward_model import RewardSettings, raw_scores, train_reward_model

BIAS, SHARPNESS, PAIRS = 0.2, 2.0, 1500


class Trunk(nn.Module):
    """Hidden states [quality, length / 10, their square, 1] through a map that training may turn."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(4))

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        length = position_ids.float() / 10
        hidden = torch.stack([(input_ids - 15) / 10, length, length**2, torch.ones_like(length)], dim=-1)
        return SimpleNamespace(last_hidden_state=hidden @ self.turn.T)


class Scorer(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.base_model = Trunk()
        self.score = nn.Linear(4, heads, bias=False)
        with torch.no_grad():
            self.score.weight.copy_(torch.randn(heads, 4, generator=torch.Generator().manual_seed(heads)) / 2)


def sampled(count: int, seed: int) -> tuple[Rollouts, Tensor, Tensor]:
    """`count` prompts with two responses each, adjacent; their quality and their length in tokens."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(5, 26, (2 * count,), generator=generator)
    length = torch.randint(2, 20, (2 * count,), generator=generator)
    texts = [[t] * n for t, n in zip(token.tolist(), length.tolist(), strict=True)]
    rollouts = as_rollouts([[3]] * (2 * count), texts, 0)
    return replace(rollouts, group_id=torch.arange(2 * count) // 2), (token - 15) / 10, length.float()


def world(seed: int = 0) -> Judgments:
    rollouts, quality, length = sampled(PAIRS, seed)
    utility = (SHARPNESS * quality + BIAS * length).reshape(PAIRS, 2)
    wins = (
        torch.rand(PAIRS, generator=torch.Generator().manual_seed(seed + 1)) < (utility[:, 0] - utility[:, 1]).sigmoid()
    )
    index = torch.arange(2 * PAIRS).reshape(PAIRS, 2)
    index = torch.where(wins.unsqueeze(1), index, index.flip(1))
    return Judgments(rollouts, index, torch.tensor([[1.0, 0.0]]).repeat(PAIRS, 1), torch.zeros(PAIRS))


@cache
def trained(length: str, heads: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    model = Scorer(heads)
    how = RewardSettings(epochs=8, batch_size=64, lr=2e-2, seed=0, length=length)
    return model, train_reward_model(model, world(), "pair", how, on_step=lambda step, loss: None)


def slopes(scores: Tensor, quality: Tensor, length: Tensor) -> tuple[float, float]:
    """What a unit of quality and what a token adds to the score, by least squares."""
    columns = torch.stack([quality, length, torch.ones_like(length)], dim=1)
    worth, token, _ = torch.linalg.lstsq(columns, scores.unsqueeze(1)).solution.flatten().tolist()
    return worth, token


def fresh(model: nn.Module) -> tuple[Tensor, Rollouts, Tensor, Tensor]:
    rollouts, quality, length = sampled(500, 9)
    return raw_scores(model, rollouts)[:, 0], rollouts, quality, length


def test_left_alone_the_score_learns_the_bias() -> None:
    scores, _, quality, length = fresh(trained("keep")[0])
    worth, token = slopes(scores, quality, length)
    assert worth == pytest.approx(SHARPNESS, rel=0.25)
    assert token == pytest.approx(BIAS, rel=0.25)


@pytest.mark.parametrize(("length", "heads"), [("product", 1), ("two_head", 2), ("product", 2)])
def test_a_method_keeps_quality_and_leaves_hardly_any_of_the_bias(length: str, heads: int) -> None:
    scores, _, quality, tokens = fresh(trained(length, heads)[0])
    worth, token = slopes(scores, quality, tokens)
    assert worth > 0.8 * SHARPNESS
    assert abs(token) < BIAS / 10
    assert abs(np.corrcoef(scores, tokens)[0, 1]) < 0.15
    assert np.corrcoef(scores, quality)[0, 1] > 0.97


def test_balancing_takes_off_what_length_alone_explains_and_no_more() -> None:
    """Weights make length useless by itself. Beside quality it keeps some use: 0.2 a token less the log-odds that it
    has by itself, which are smaller, since qualities differ. The score learns about a third of the bias here.
    """
    scores, _, quality, tokens = fresh(trained("resample")[0])
    worth, token = slopes(scores, quality, tokens)
    assert worth > 0.8 * SHARPNESS
    assert BIAS / 5 < token < BIAS / 2


def test_the_length_head_takes_the_length() -> None:
    model, _ = trained("two_head", 2)
    rollouts, _, tokens = sampled(500, 9)
    length_head = raw_scores(model, rollouts)[:, 1]
    assert np.corrcoef(length_head, tokens)[0, 1] > 0.9


def test_the_quality_head_alone_scores_as_it_did() -> None:
    """Dropping the length head is keeping the first row."""
    model, _ = trained("two_head", 2)
    alone = copy.deepcopy(model)
    alone.score = nn.Linear(4, 1, bias=False)
    alone.score.weight = nn.Parameter(model.score.weight[:1].detach().clone())
    rollouts, _, _ = sampled(20, 9)
    assert torch.allclose(raw_scores(alone, rollouts)[:, 0], raw_scores(model, rollouts)[:, 0], atol=1e-6)


def test_the_residual_takes_the_bias_off_afterwards() -> None:
    scores, rollouts, quality, tokens = fresh(trained("keep")[0])
    correction = fit_length_residual(scores, rollouts.lengths, rollouts.group_id)
    worth, token = slopes(scores - correction(rollouts.lengths), quality, tokens)
    assert worth == pytest.approx(slopes(scores, quality, tokens)[0], rel=0.05)
    assert abs(token) < BIAS / 10


def test_the_residual_is_blind_to_what_prompts_ask_for() -> None:
    """Prompts with long answers have high levels; within a prompt length counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(300).repeat_interleave(4)
    usual = torch.rand(300, generator=generator)[prompts] * 50
    lengths = usual + 10 * torch.rand(1200, generator=generator)
    correction = fit_length_residual(0.3 * usual, lengths, prompts)
    assert max(map(abs, correction.values)) < 0.2
    pooled = fit_length_residual(0.3 * usual, lengths, torch.zeros(1200, dtype=torch.long))
    assert max(map(abs, pooled.values)) > 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_residual_of_hardly_anything_is_small_and_finite(count: int) -> None:
    lengths, prompts = torch.arange(count) + 3, torch.zeros(count, dtype=torch.long)
    correction = fit_length_residual(torch.arange(float(count)), lengths, prompts)
    assert correction(lengths).isfinite().all()
    alone = fit_length_residual(torch.arange(float(count)), lengths, torch.arange(count))
    assert alone(lengths).tolist() == pytest.approx([0] * count)
    same = fit_length_residual(torch.arange(float(count)), torch.full((count,), 7), prompts)
    assert same(lengths).tolist() == pytest.approx([0] * count)


def test_a_correction_is_straight_between_knots_and_flat_beyond() -> None:
    correction = LengthCorrection((10.0, 20.0, 40.0), (-1.0, 0.0, 4.0))
    at = torch.tensor([0, 10, 15, 20, 30, 40, 4000])
    assert correction(at).tolist() == pytest.approx([-1, -1, -0.5, 0, 2, 4, 4])
    assert correction(at).dtype == torch.float32


def test_a_correction_goes_through_json() -> None:
    correction = LengthCorrection((10.0, 20.0), (-0.1, 1 / 3))
    back = {name: tuple(column) for name, column in json.loads(json.dumps(asdict(correction))).items()}
    assert LengthCorrection(**back) == correction


@pytest.mark.parametrize(
    ("lengths", "values"),
    [((), ()), ((1.0,), ()), ((2.0, 1.0), (0.0, 0.0)), ((1.0, 1.0), (0.0, 1.0)), ((1.0,), (float("nan"),))],
)
def test_a_broken_correction_is_refused(lengths: tuple[float, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"lengths"):
        LengthCorrection(lengths, values)


def test_balancing_keeps_an_items_weight_on_average() -> None:
    items = world()
    wins = torch.zeros(PAIRS, 2, 2)
    wins[:, 0, 1] = 1
    found = balanced(wins, items.lengths)
    assert found.sum().item() == pytest.approx(PAIRS, rel=1e-5)
    longer = items.lengths[:, 0] > items.lengths[:, 1]
    shorter = items.lengths[:, 0] < items.lengths[:, 1]
    assert found[longer].sum().item() == pytest.approx(found[shorter].sum().item(), rel=1e-4)


def test_what_cannot_be_balanced_is_made_up_for_by_the_rest() -> None:
    """Among pairs of one length ratio either side wins; of those of the other only the longer does."""
    lengths = torch.tensor([[11, 10], [10, 11]] * 30 + [[80, 10]] * 60)
    wins = torch.zeros(120, 2, 2)
    wins[:, 0, 1] = 1
    found = balanced(wins, lengths)
    assert found[:60, 0, 1].tolist() == pytest.approx([2.0] * 60)
    assert found[60:].sum().item() == 0


def test_an_expert_reads_length_alone_and_each_member_has_its_own() -> None:
    expert = LengthExpert(torch.tensor([[4, 9], [2, 0], [30, 7]]), members=2)
    lengths = torch.tensor([[5, 5, 50]])
    assert expert(lengths).tolist() == [[[0, 0, 0]], [[0, 0, 0]]]
    with torch.no_grad():
        expert.weight[1, 0] = 1.0
    first, second = expert(lengths)
    assert first.tolist() == [[0, 0, 0]]
    assert second[0, 0] == second[0, 1] < second[0, 2]
    doubled = expert(torch.tensor([[5, 10, 20, 40]]))[1, 0].diff()
    assert doubled.tolist() == pytest.approx([doubled[0].item()] * 3, rel=1e-4)  # straight in the logarithm


def test_an_expert_of_equal_lengths_adds_nothing_to_a_pair() -> None:
    expert = LengthExpert(torch.full((3, 2), 6), members=1)
    with torch.no_grad():
        expert.weight.fill_(1.0)
    found = expert(torch.full((3, 2), 6))
    assert found.isfinite().all() and (found[..., 0] == found[..., 1]).all()


def test_an_expert_starts_as_the_judge_of_length() -> None:
    """Nine of ten longer responses win: before the first step the expert says so, and its weight is in the record."""
    count = 40
    long = [1.0 if row % 10 else 0.0 for row in range(count)]
    how = RewardSettings(epochs=1, batch_size=count, lr=1e-9, seed=0, length="product")
    losses: list[float] = []
    model = Scorer(1)
    with torch.no_grad():
        model.score.weight.zero_()
    data = pairs(long, [12] * count, [6] * count)
    numbers = train_reward_model(model, data, "pair", how, on_step=lambda step, loss: losses.append(loss))
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert losses[0] == pytest.approx(entropy, abs=0.01)
    assert np.shape(numbers["length_expert"]) == (1, 4)


@pytest.mark.parametrize(("kind", "grades"), [("rating", [1.0, 2.0, 3.0, 4.0]), ("verdict", [1.0, 0.0, 0.0, 1.0])])
@pytest.mark.parametrize("length", ["product", "two_head", "keep"])
def test_single_responses_can_be_learnt_without_length(kind: Any, grades: list[float], length: str) -> None:
    items = judged([[0], [1], [2], [3]], [[grade] for grade in grades], answers([2, 3, 4, 5]))
    how = RewardSettings(epochs=3, batch_size=4, lr=1e-2, seed=0, length=length)
    losses: list[float] = []
    model = Scorer(2 if length == "two_head" else 1)
    train_reward_model(model, items, kind, how, on_step=lambda step, loss: losses.append(loss))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_a_share_of_the_correction_and_more_than_all_of_it() -> None:
    correction = LengthCorrection((10.0, 20.0), (-1.0, 3.0))
    lengths = torch.tensor([5, 10, 15, 20, 99])
    for share in (0.0, 0.5, 1.5):
        torch.testing.assert_close(correction.times(share)(lengths), share * correction(lengths))
