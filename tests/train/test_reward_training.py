"""The reward model's training and its held-out figures against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judged import answers, judged, pairs
from tiny_learner import PAD, policy, reward_model, weights_of
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.rollout.given import as_rollouts
from kedge.structs import Rollouts
from kedge.train.objectives import Lesson
from kedge.train.reward_model import (
    RewardSettings,
    examine,
    item_scores,
    raw_scores,
    steps,
    train_reward_model,
)
from kedge.train.sft import heldout_loss, train_sft


def figures(
    first: list[float],
    second: list[float],
    strength: list[float],
    lengths: tuple[list[int], list[int]] | None = None,
):
    """`examine` of pairs with the scores of their two sides given."""
    long, short = lengths or ([2] * len(first), [2] * len(second))
    return examine(torch.tensor([*first, *second]), pairs(strength, long, short))


def test_accuracy_counts_ties_half_and_leaves_undecided_pairs_out() -> None:
    report = figures([2.0, 0.0, 1.0, 5.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.8, 0.5])
    assert report.accuracy == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_vote_against_the_chosen_one_counts_against_it() -> None:
    assert figures([2.0, 2.0], [1.0, 1.0], [0.9, 0.2]).accuracy == pytest.approx(0.5)


def test_calibration_of_a_model_that_is_sure_and_right_half_of_the_time() -> None:
    """All margins are 2 or -2: it says 0.881 or 0.119 where a half is true. Equal predictions are not told apart."""
    report = figures([2.0, 0.0] * 50, [0.0, 2.0] * 50, [1.0] * 100)
    assert report.accuracy == 0.5
    assert report.calibration_error == pytest.approx(1 / (1 + math.exp(-2)) - 0.5, abs=1e-6)


def test_calibration_of_a_model_that_says_what_happens() -> None:
    """Margin log 3 says 0.75, and three of four are won."""
    margin = math.log(3)
    report = figures([margin, margin, margin, 0.0] * 25, [0.0, 0.0, 0.0, margin] * 25, [1.0] * 100)
    assert report.accuracy == pytest.approx(0.75)
    assert report.calibration_error == pytest.approx(0, abs=1e-6)


def test_calibration_of_a_model_that_says_nothing() -> None:
    assert figures([1.0] * 30, [1.0] * 30, [1.0] * 30).calibration_error == pytest.approx(0)


def test_calibration_in_bins() -> None:
    """Twenty distinct margins, all won: a bin of two pairs in each order, and each is off by what is missing to 1."""
    margins = [0.1 * (index + 1) for index in range(20)]
    report = figures(margins, [0.0] * 20, [1.0] * 20)
    expected = sum(1 - 1 / (1 + math.exp(-margin)) for margin in margins) / 20
    assert report.calibration_error == pytest.approx(expected, abs=1e-6)


def test_without_a_decided_pair_there_is_nothing_to_say() -> None:
    report = figures([1.0, 2.0], [0.0, 0.0], [0.5, 0.5], ([1, 2], [3, 4]))
    assert math.isnan(report.accuracy) and math.isnan(report.calibration_error)


def test_length_correlation_and_the_judge_that_counts_words() -> None:
    lengths = ([4, 6, 3, 5], [2, 3, 6, 5])
    scores = [float(length) for side in lengths for length in side]
    report = figures(scores[:4], scores[4:], [1.0] * 4, lengths)
    assert report.length_correlation == pytest.approx(1)
    assert report.length_only_accuracy == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    report = figures([-s for s in scores[:4]], [-s for s in scores[4:]], [1.0] * 4, lengths)
    assert report.length_correlation == pytest.approx(-1)


def test_rankings_are_examined_by_their_decided_pairs() -> None:
    """First before second and third, which tie; the second item has two responses."""
    items = judged([[0, 1, 2], [3, 4]], [[0.0, -1.0, -1.0], [0.0, -1.0]], answers([2] * 5))
    assert examine(torch.tensor([1.0, 0.0, 3.0, 5.0, 0.0]), items).accuracy == pytest.approx(2 / 3)


def test_ratings_are_examined_against_one_another() -> None:
    grades = [[float(grade)] for grade in range(6)]
    items = judged([[row] for row in range(6)], grades, answers([2] * 6))
    assert examine(torch.arange(6.0), items).accuracy == 1
    assert examine(-torch.arange(6.0), items).accuracy == 0


# Training


def settings(**changed: Any) -> RewardSettings:
    return RewardSettings(**{"epochs": 1, "batch_size": 8, "lr": 1e-2, "seed": 0, **changed})


def trained(strength: list[float], seed: int = 0, epochs: int = 1) -> tuple[list[float], torch.nn.Module]:
    model, losses = reward_model(), []
    data, how = pairs(strength, [3] * len(strength), [3] * len(strength)), settings(seed=seed, epochs=epochs)
    train_reward_model(model, data, "pair", how, on_step=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(steps(data, how)))
    return [loss for _, loss in losses], model


def margin_of(model: Any) -> float:
    return float(raw_scores(model, answers([3], 5)) - raw_scores(model, answers([3], 7)))


def test_the_first_loss_is_that_of_the_untrained_margin() -> None:
    margin = margin_of(reward_model())
    for strength in (1.0, 0.75, 0.0):
        losses, _ = trained([strength] * 8)
        won, lost = -math.log(1 / (1 + math.exp(-margin))), -math.log(1 / (1 + math.exp(margin)))
        assert losses[0] == pytest.approx(strength * won + (1 - strength) * lost, abs=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.5, 0.2])
def test_the_margin_goes_to_the_odds_of_the_votes(strength: float) -> None:
    losses, model = trained([strength] * 16, epochs=60)
    assert len(losses) == 120
    margin = margin_of(model)
    if strength == 1:
        assert margin > 4
    else:
        assert 1 / (1 + math.exp(-margin)) == pytest.approx(strength, abs=0.05)


def test_training_repeats_itself() -> None:
    one, again = trained([1.0] * 20), trained([1.0] * 20)
    assert one[0] == again[0]
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(one[1]).values(), weights_of(again[1]).values(), strict=True)
    )


def test_a_loss_that_is_not_finite_names_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Lesson, scores: Tensor, items: Tensor, head: torch.nn.Linear) -> Tensor:
        return scores.sum() * float("nan")

    monkeypatch.setattr(Lesson, "forward", poisoned)
    with pytest.raises(DivergenceError, match=r"step 0: loss nan.* -> lower reward\.lr"):
        trained([1.0] * 8)


def test_item_scores_are_those_of_the_responses_and_0_on_padding() -> None:
    """Rows of several lengths, one of them in two items; in a batch of the second item alone a column is empty."""
    model, responses = reward_model(heads=2), answers([1, 4, 2, 6])
    items = judged([[0, 2, 3], [2, 1]], [[0.0, -1.0, -2.0], [0.0, -1.0]], responses)
    alone = raw_scores(model, responses)
    expected = torch.stack([alone[[0, 2, 3]].T, torch.cat([alone[[2, 1]].T, torch.zeros(2, 1)], dim=1)], dim=1)
    assert torch.allclose(item_scores(model, items), expected, atol=1e-5)
    assert torch.allclose(item_scores(model, items.rows(torch.tensor([1]))), expected[:, 1:], atol=1e-5)


def test_frozen_parameters_are_left_alone() -> None:
    model = reward_model()
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    before = weights_of(model)
    train_reward_model(model, pairs([1.0] * 8, [3] * 8, [2] * 8), "pair", settings(), on_step=lambda step, loss: None)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {"score.weight"}


def test_members_on_one_trunk_learn_the_same_and_differ() -> None:
    """Each of three heads learns from its own four fifths of the prompts."""
    model = reward_model(heads=3)
    data = pairs([1.0] * 20, [3] * 20, [3] * 20)
    train_reward_model(model, data, "pair", settings(epochs=20), on_step=lambda step, loss: None)
    margins = raw_scores(model, answers([3], 5)) - raw_scores(model, answers([3], 7))
    assert (margins > 1).all()
    assert len(set(margins.flatten().tolist())) == 3


# Supervised fine-tuning


def demonstrations(count: int = 24) -> Rollouts:
    """Each prompt is answered by its own last token, twice, and an end."""
    prompts = [[3 + index % 8] for index in range(count)]
    return as_rollouts(prompts, [[prompt[-1]] * (1 + index % 3) + [1] for index, prompt in enumerate(prompts)], PAD)


def fine_tuned(model: Any, shown: Rollouts, *, steps: int) -> list[float]:
    """The losses of `steps` steps."""
    losses: list[float] = []
    train_sft(
        model,
        shown,
        steps=steps,
        batch_size=8,
        lr=1e-2,
        warmup=5,
        weight_decay=0.0,
        seed=0,
        on_step=lambda step, loss: losses.append(loss),
    )
    return losses


def test_held_out_loss_is_nats_per_response_token() -> None:
    model, shown = policy(), demonstrations(9)
    total, right, count = 0.0, 0, 0
    for row in range(9):
        prompt, response = shown.prompt_ids[row], shown.response_ids[row][shown.response_mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, response, reduction="sum"))
        right += int((logits.argmax(dim=-1) == response).sum())
        count += len(response)
    for microbatch in (256, 2):
        loss, accuracy = heldout_loss(model, shown, microbatch=microbatch)
        assert loss == pytest.approx(total / count, abs=1e-5)
        assert accuracy == pytest.approx(right / count)


def test_fine_tuning_learns_the_answers() -> None:
    model, shown = policy(), demonstrations()
    before, _ = heldout_loss(model, shown)
    losses = fine_tuned(model, shown, steps=150)
    after, accuracy = heldout_loss(model, shown)
    assert len(losses) == 150
    assert after < before / 2 and accuracy > 0.6


def test_only_responses_count() -> None:
    """A first batch of all rows reports their held-out loss, in which prompts have no part."""
    shown = demonstrations(8)
    expected, _ = heldout_loss(policy(), shown)
    assert fine_tuned(policy(), shown, steps=1)[0] == pytest.approx(expected, abs=1e-5)


def test_a_supervised_loss_that_is_not_finite_names_its_step() -> None:
    model = policy()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(DivergenceError, match=r"step 0: loss nan.* -> lower sft\.lr"):
        fine_tuned(model, demonstrations(), steps=2)
