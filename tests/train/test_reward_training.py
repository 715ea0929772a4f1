"""The reward model's loss and its held-out figures against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_learner import PAD, policy, reward_model, weights_of
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.rollout.given import as_rollouts
from kedge.structs import Rollouts
from kedge.train import reward_model as module
from kedge.train.reward_model import Comparisons, examine, raw_scores, train_reward_model
from kedge.train.sft import heldout_loss, train_sft


def answers(lengths: list[int], token: int = 5) -> Rollouts:
    return as_rollouts([[3]] * len(lengths), [[token] * length for length in lengths], PAD)


def figures(
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[float],
    rejected: list[float],
    strength: list[float],
    lengths: tuple[list[int], list[int]] | None = None,
):
    """`examine` with the model's scores given."""
    long, short = lengths or ([2] * len(chosen), [2] * len(rejected))
    comparisons = Comparisons(answers(long), answers(short), torch.tensor(strength))
    given = {id(comparisons.chosen): chosen, id(comparisons.rejected): rejected}
    monkeypatch.setattr(module, "raw_scores", lambda model, rollouts: torch.tensor(given[id(rollouts)]))
    return examine(None, comparisons)


def test_accuracy_counts_ties_half_and_leaves_undecided_pairs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    report = figures(monkeypatch, [2.0, 0.0, 1.0, 5.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.8, 0.5])
    assert report.accuracy == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_vote_against_the_chosen_one_counts_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = figures(monkeypatch, [2.0, 2.0], [1.0, 1.0], [0.9, 0.2])
    assert report.accuracy == pytest.approx(0.5)


def test_calibration_of_a_model_that_is_sure_and_right_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All margins are 2 or -2: it says 0.881 or 0.119 where a half is true. Equal predictions are not told apart."""
    report = figures(monkeypatch, [2.0, 0.0] * 50, [0.0, 2.0] * 50, [1.0] * 100)
    assert report.accuracy == 0.5
    assert report.calibration_error == pytest.approx(1 / (1 + math.exp(-2)) - 0.5, abs=1e-6)


def test_calibration_of_a_model_that_says_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margin log 3 says 0.75, and three of four are won."""
    margin = math.log(3)
    report = figures(monkeypatch, [margin, margin, margin, 0.0] * 25, [0.0, 0.0, 0.0, margin] * 25, [1.0] * 100)
    assert report.accuracy == pytest.approx(0.75)
    assert report.calibration_error == pytest.approx(0, abs=1e-6)


def test_calibration_of_a_model_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures(monkeypatch, [1.0] * 30, [1.0] * 30, [1.0] * 30).calibration_error == pytest.approx(0)


def test_calibration_in_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty distinct margins, all won: a bin of two pairs in each order, and each is off by what is missing to 1."""
    margins = [0.1 * (index + 1) for index in range(20)]
    report = figures(monkeypatch, margins, [0.0] * 20, [1.0] * 20)
    expected = sum(1 - 1 / (1 + math.exp(-margin)) for margin in margins) / 20
    assert report.calibration_error == pytest.approx(expected, abs=1e-6)


def test_without_a_decided_pair_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    report = figures(monkeypatch, [1.0, 2.0], [0.0, 0.0], [0.5, 0.5], ([1, 2], [3, 4]))
    assert math.isnan(report.accuracy) and math.isnan(report.calibration_error)


def test_length_correlation_and_the_judge_that_counts_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ([4, 6, 3, 5], [2, 3, 6, 5])
    scores = [float(length) for side in lengths for length in side]
    report = figures(monkeypatch, scores[:4], scores[4:], [1.0] * 4, lengths)
    assert report.length_correlation == pytest.approx(1)
    assert report.length_only_accuracy == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    report = figures(monkeypatch, [-s for s in scores[:4]], [-s for s in scores[4:]], [1.0] * 4, lengths)
    assert report.length_correlation == pytest.approx(-1)


def trained(strength: list[float], seed: int = 0, epochs: int = 1) -> tuple[list[float], torch.nn.Module]:
    model, losses = reward_model(), []
    comparisons = Comparisons(answers([3] * len(strength), 5), answers([3] * len(strength), 7), torch.tensor(strength))
    train_reward_model(
        model,
        comparisons,
        epochs=epochs,
        batch_size=8,
        lr=1e-2,
        seed=seed,
        on_step=lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(len(losses)))
    return [loss for _, loss in losses], model


def test_the_first_loss_is_that_of_the_untrained_margin() -> None:
    model = reward_model()
    margin = float(raw_scores(model, answers([3], 5)) - raw_scores(model, answers([3], 7)))
    for strength in (1.0, 0.75, 0.0):
        losses, _ = trained([strength] * 8)
        won, lost = -math.log(1 / (1 + math.exp(-margin))), -math.log(1 / (1 + math.exp(margin)))
        assert losses[0] == pytest.approx(strength * won + (1 - strength) * lost, abs=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.75, 0.5, 0.2])
def test_the_margin_goes_to_the_odds_of_the_votes(strength: float) -> None:
    losses, model = trained([strength] * 16, epochs=60)
    assert len(losses) == 120
    margin = float(raw_scores(model, answers([3], 5)) - raw_scores(model, answers([3], 7)))
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
    def poisoned(margin: Tensor, other: Tensor) -> Tensor:
        return margin * float("nan")

    monkeypatch.setattr(module, "bradley_terry", poisoned)
    with pytest.raises(DivergenceError, match=r"step 0: loss nan.* -> lower reward\.lr"):
        trained([1.0] * 8)


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
