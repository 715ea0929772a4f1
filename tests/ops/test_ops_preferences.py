"""Losses of judgments against values and gradients worked out by hand, in float64 plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples
from torch import Tensor

from kedge.ops import preferences

margins = st.floats(-8, 8)
rates = st.floats(0.0, 0.45)
seeds = st.integers(0, 2**32 - 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def both(loss: Callable[[Tensor], Tensor], *at: float) -> tuple[float, list[float]]:
    """Value and gradient of a loss of one tensor [len(at)] or, for one number, of a scalar."""
    point = torch.tensor(at if len(at) > 1 else at[0], dtype=torch.float64, requires_grad=True)
    value = loss(point).sum()
    (gradient,) = torch.autograd.grad(value, point)
    return value.item(), gradient.reshape(-1).tolist()


def close(found: tuple[float, list[float]], value: float, *gradient: float) -> None:
    assert found[0] == pytest.approx(value, abs=1e-9, rel=1e-9)
    assert found[1] == pytest.approx(list(gradient), abs=1e-9, rel=1e-9)


# Pairs


@examples
@given(margin=margins)
def test_bradley_terry_is_minus_log_sigmoid_with_its_closed_form_gradient(margin: float) -> None:
    close(both(preferences.bradley_terry, margin), -math.log(sigmoid(margin)), sigmoid(margin) - 1)
    probability = preferences.preference_probability(torch.tensor(margin, dtype=torch.float64))
    assert probability.item() == pytest.approx(sigmoid(margin), abs=1e-12)


@pytest.mark.parametrize("margin", [100.0, -100.0, 1000.0, -1000.0])
def test_no_loss_of_a_pair_overflows(margin: float) -> None:
    at = torch.tensor(margin)
    assert preferences.bradley_terry(at).item() == pytest.approx(max(0.0, -margin), abs=1e-6)
    for loss in (preferences.smoothed, preferences.robust, preferences.flip_aware):
        for rate in (0.0, 0.25):
            value, (gradient,) = both(lambda x, loss=loss, rate=rate: loss(x, rate), margin)
            assert math.isfinite(value) and math.isfinite(gradient)
    assert preferences.davidson(at, torch.tensor(0.0)).isfinite().all()


@examples
@given(margin=margins, required=st.floats(0, 3))
def test_required_margin_shifts_bradley_terry(margin: float, required: float) -> None:
    found = both(lambda x: preferences.required_margin(x, torch.tensor(required, dtype=torch.float64)), margin)
    close(found, plain(margin - required), -sigmoid(required - margin))


@examples
@given(margin=margins, rate=rates)
def test_smoothed_is_the_mixture_of_both_labels(margin: float, rate: float) -> None:
    expected = (1 - rate) * plain(margin) + rate * plain(-margin)
    close(both(lambda x: preferences.smoothed(x, rate), margin), expected, sigmoid(margin) - (1 - rate))


def test_smoothing_of_a_tenth_is_least_at_a_margin_of_2_197() -> None:
    best = math.log(0.9 / 0.1)
    assert best == pytest.approx(2.197, abs=5e-4)
    value, (gradient,) = both(lambda x: preferences.smoothed(x, 0.1), best)
    assert gradient == pytest.approx(0, abs=1e-12)
    assert all(both(lambda x: preferences.smoothed(x, 0.1), best + off)[0] > value for off in (-0.1, 0.1))


@examples
@given(margin=st.floats(-4.9, 4.9), rate=rates)
def test_robust_is_unbiased_under_flips(margin: float, rate: float) -> None:
    """Enumerated: the label is right with probability 1 - e, else the pair is seen the other way round."""
    at = torch.tensor([margin, -margin], dtype=torch.float64)
    right, flipped = preferences.robust(at, rate).tolist()
    assert (1 - rate) * right + rate * flipped == pytest.approx(plain(margin), abs=1e-9)


@examples
@given(margin=st.floats(-15, 4.9), rate=rates)
def test_gradient_of_the_robust_loss(margin: float, rate: float) -> None:
    expected = ((1 - rate) * plain(margin) - rate * plain(-margin)) / (1 - 2 * rate)
    slope = -((1 - rate) * sigmoid(-margin) + rate * sigmoid(margin)) / (1 - 2 * rate)
    close(both(lambda x: preferences.robust(x, rate), margin), expected, slope)


def test_the_robust_loss_is_bounded_below_and_beyond_the_limit_the_other_label_pulls_back() -> None:
    floor = both(lambda x: preferences.robust(x, 0.25), 5.0)[0]
    for margin in (5.1, 50.0, 5000.0):
        close(both(lambda x: preferences.robust(x, 0.25), margin), floor, 0.0)
    at = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    mean = 0.75 * preferences.robust(at, 0.25) + 0.25 * preferences.robust(-at, 0.25)
    assert torch.autograd.grad(mean, at)[0].item() > 0


@examples
@given(margin=margins, rate=rates)
def test_flip_aware_is_the_likelihood_of_a_label_that_may_be_flipped(margin: float, rate: float) -> None:
    won = sigmoid(margin)
    seen = rate + (1 - 2 * rate) * won
    slope = -(1 - 2 * rate) * won * (1 - won) / seen
    close(both(lambda x: preferences.flip_aware(x, rate), margin), -math.log(seen), slope)


def test_accuracy_of_080_is_seen_as_065_when_a_quarter_of_the_labels_is_flipped() -> None:
    margin = math.log(0.8 / 0.2)
    assert both(lambda x: preferences.flip_aware(x, 0.25), margin)[0] == pytest.approx(-math.log(0.65), abs=1e-12)


def test_a_pair_far_on_the_wrong_side_stops_pulling_where_flips_are_known_of() -> None:
    value, (gradient,) = both(lambda x: preferences.flip_aware(x, 0.1), -30.0)
    assert value == pytest.approx(math.log(10), abs=1e-9)
    assert abs(gradient) < 1e-10


@examples
@given(margin=margins, log_tie=st.floats(-5, 3))
def test_davidson_probabilities_add_up_to_1_and_have_their_gradients(margin: float, log_tie: float) -> None:
    won, tied, lost = math.exp(margin / 2), math.exp(log_tie), math.exp(-margin / 2)
    total = won + tied + lost
    point = torch.tensor([margin, log_tie], dtype=torch.float64, requires_grad=True)
    logs = preferences.davidson(*point)
    assert logs.exp().tolist() == pytest.approx([won / total, tied / total, lost / total], abs=1e-12)
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    tilt, tie = (won - lost) / (2 * total), tied / total
    slopes = [[0.5 - tilt, -tie], [-tilt, 1 - tie], [-0.5 - tilt, -tie]]
    for log, slope in zip(logs, slopes, strict=True):
        (gradient,) = torch.autograd.grad(log, point, retain_graph=True)
        assert gradient.tolist() == pytest.approx(slope, abs=1e-9)


def test_davidson_without_ties_is_bradley_terry() -> None:
    margin = torch.linspace(-5, 5, 11, dtype=torch.float64)
    logs = preferences.davidson(margin, torch.tensor(-60.0, dtype=torch.float64))
    assert torch.allclose(-logs[:, 0], preferences.bradley_terry(margin), atol=1e-12)


# Rankings


def chosen_in_turn(scores: list[float], grades: list[float]) -> float:
    """Probability that responses are chosen in the order of their grades, each from those not yet passed."""
    probability = 1.0
    for score, grade in zip(scores, grades, strict=True):
        left = [s for s, g in zip(scores, grades, strict=True) if g <= grade]
        probability *= math.exp(score) / sum(map(math.exp, left))
    return probability


@examples
@given(
    scores=st.lists(st.floats(-4, 4), min_size=1, max_size=5),
    padding=st.integers(0, 2),
    data=st.data(),
)
def test_plackett_luce_is_the_product_of_the_choices(scores: list[float], padding: int, data: st.DataObject) -> None:
    count = len(scores)
    grades = data.draw(st.lists(st.sampled_from([-3.0, -2.0, -1.0, 0.0]), min_size=count, max_size=count))
    mask = torch.tensor([[True] * count + [False] * padding])
    given_grades = torch.tensor([grades + [0.0] * padding])
    value, gradient = both(
        lambda x: preferences.plackett_luce(x.reshape(1, -1), given_grades, mask), *scores, *[7.0] * padding
    )
    assert value == pytest.approx(-math.log(chosen_in_turn(scores, grades)), abs=1e-9)
    expected = [0.0] * (count + padding)
    for i in range(count):  # minus one for being chosen, plus the chance of being so in each choice it stood for
        left = [j for j in range(count) if grades[j] <= grades[i]]
        total = sum(math.exp(scores[j]) for j in left)
        expected[i] -= 1
        for j in left:
            expected[j] += math.exp(scores[j]) / total
    assert gradient == pytest.approx(expected, abs=1e-9)


def test_orders_of_three_have_probabilities_that_add_up_to_1() -> None:
    scores = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses = [
        preferences.plackett_luce(scores, -torch.tensor([order], dtype=torch.float64), mask).item()
        for order in itertools.permutations(range(3))
    ]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, abs=1e-12)


def test_two_responses_ranked_are_a_pair_and_two_tied_are_twice_a_divided_vote() -> None:
    scores, mask = torch.tensor([[0.7, -0.4]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    assert preferences.plackett_luce(scores, torch.tensor([[0.0, -1.0]]), mask).item() == pytest.approx(plain(1.1))
    tied = preferences.plackett_luce(scores, torch.tensor([[0.0, 0.0]]), mask).item()
    assert tied == pytest.approx(2 * (0.5 * plain(1.1) + 0.5 * plain(-1.1)))


def test_members_and_items_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    grades = torch.randn(3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    found = preferences.plackett_luce(scores, grades, mask)
    assert found.shape == (2, 3)
    for member, item in itertools.product(range(2), range(3)):
        there = mask[item].tolist()
        one = [scores[member, item, k].item() for k in range(4) if there[k]]
        expected = -math.log(chosen_in_turn(one, [grades[item, k].item() for k in range(4) if there[k]]))
        assert found[member, item].item() == pytest.approx(expected, abs=1e-9)


def test_all_pairs_are_each_two_real_responses_both_ways() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    met = preferences.all_pairs(mask)
    expected = {(0, i, j) for i in range(3) for j in range(3) if i != j}
    assert {tuple(place) for place in met.nonzero().tolist()} == expected


@examples
@given(seed=seeds, width=st.integers(1, 9), data=st.data())
def test_a_tournament_is_a_knock_out(seed: int, width: int, data: st.DataObject) -> None:
    """Everyone but the champion loses exactly once, the champion is the best, and k - 1 matches are played."""
    counts = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    rng = np.random.default_rng(seed)
    grades = torch.from_numpy(np.stack([rng.permutation(width) for _ in counts]).astype(float))
    mask = torch.arange(width) < torch.tensor(counts).unsqueeze(1)
    met = preferences.tournament(grades, mask, torch.Generator().manual_seed(seed))
    assert torch.equal(met, met.transpose(1, 2))
    for item, count in enumerate(counts):
        matches = [(i, j) for i, j in met[item].nonzero().tolist() if i < j]
        assert len(matches) == count - 1 and all(j < count for _, j in matches)
        losers = [i if grades[item, i] < grades[item, j] else j for i, j in matches]
        champion = int(grades[item, :count].argmax())
        assert sorted([*losers, champion]) == list(range(count))


def test_brackets_differ_between_items_and_seeds_and_repeat_with_the_seed() -> None:
    grades, mask = torch.arange(8.0).repeat(20, 1), torch.ones(20, 8, dtype=torch.bool)
    one, again, other = (
        preferences.tournament(grades, mask, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({tuple(item.flatten().tolist()) for item in one}) > 15


# What holds of every comparison


COMPARISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bradley_terry": lambda s: preferences.bradley_terry(s[..., 0] - s[..., 1]),
    "required_margin": lambda s: preferences.required_margin(s[..., 0] - s[..., 1], torch.tensor(0.5)),
    "smoothed": lambda s: preferences.smoothed(s[..., 0] - s[..., 1], 0.1),
    "robust": lambda s: preferences.robust(s[..., 0] - s[..., 1], 0.1),
    "flip_aware": lambda s: preferences.flip_aware(s[..., 0] - s[..., 1], 0.1),
    "davidson": lambda s: preferences.davidson(s[..., 0] - s[..., 1], torch.tensor(0.0)),
    "plackett_luce": lambda s: preferences.plackett_luce(
        s, torch.tensor([[0.0, -1.0, -1.0, -2.0]]), torch.ones(1, 4, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_constant_added_to_a_prompt_changes_no_comparison(name: str) -> None:
    scores = torch.tensor([[0.4, -0.7, 1.1, 0.2]], dtype=torch.float64)
    assert torch.allclose(COMPARISONS[name](scores), COMPARISONS[name](scores + 3.7), atol=1e-12)


def test_a_constant_changes_centring() -> None:
    scores, mask = torch.tensor([[0.4, -0.4]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    assert preferences.centring(scores, mask).item() == pytest.approx(0)
    assert preferences.centring(scores + 1, mask).item() == pytest.approx(4)


@examples
@given(first=margins, second=margins, third=margins)
def test_centring_of_a_pair_is_the_squared_sum_and_its_gradient(first: float, second: float, third: float) -> None:
    pair, three = torch.tensor([[True, True, False]]), torch.tensor([[True, True, True]])
    found = both(lambda x: preferences.centring(x.reshape(1, 3), pair), first, second, third)
    total = first + second
    close(found, total**2, 2 * total, 2 * total, 0.0)
    mean = (first + second + third) / 3
    found = both(lambda x: preferences.centring(x.reshape(1, 3), three), first, second, third)
    close(found, 4 * mean**2, *[8 * mean / 3] * 3)


# Ratings and verdicts


@examples
@given(score=margins, rating=margins)
def test_regression_is_the_squared_error(score: float, rating: float) -> None:
    found = both(lambda x: preferences.regression(x, torch.tensor(rating, dtype=torch.float64)), score)
    close(found, (score - rating) ** 2, 2 * (score - rating))


@examples
@given(score=st.floats(-6, 6), start=st.floats(-3, 3), steps=st.lists(st.floats(0.05, 3), max_size=4))
def test_ordinal_probabilities_are_differences_of_sigmoids_and_add_up_to_1(
    score: float, start: float, steps: list[float]
) -> None:
    thresholds = list(itertools.accumulate([start, *steps]))
    below = [0.0, *(sigmoid(t - score) for t in thresholds), 1.0]  # P(y <= c)
    table = torch.tensor(thresholds, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for level in range(len(thresholds) + 1):
        at = torch.tensor(score, dtype=torch.float64, requires_grad=True)
        loss = preferences.ordinal(at, torch.tensor(level), table)
        probability = below[level + 1] - below[level]
        total += math.exp(-loss.item())
        assert math.exp(-loss.item()) == pytest.approx(probability, abs=1e-9)
        gradient, edges = torch.autograd.grad(loss, (at, table))
        low, high = below[level], below[level + 1]
        assert gradient.item() == pytest.approx((high * (1 - high) - low * (1 - low)) / probability, abs=1e-6)
        expected = [0.0] * len(thresholds)
        if level < len(thresholds):
            expected[level] = -high * (1 - high) / probability
        if level > 0:
            expected[level - 1] = low * (1 - low) / probability
        assert edges.tolist() == pytest.approx(expected, abs=1e-6)
    assert total == pytest.approx(1, abs=1e-9)


def test_ordinal_keeps_its_digits_far_out() -> None:
    """P(grade 1 of 0, 1, 2) at a score of 60 is e^-59 - e^-61 up to rounding, which sigmoids of float64 cannot hold."""
    loss = preferences.ordinal(
        torch.tensor(60.0, dtype=torch.float64), torch.tensor(1), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    )
    assert loss.item() == pytest.approx(59 - math.log1p(-math.exp(-2)), abs=1e-9)


def test_ordinal_of_several_members_uses_each_ones_thresholds() -> None:
    scores = torch.tensor([[0.2, -1.0], [0.5, 0.1]], dtype=torch.float64)
    thresholds = torch.tensor([[-0.5, 0.6], [0.0, 2.0]], dtype=torch.float64)
    levels = torch.tensor([0, 2])
    found = preferences.ordinal(scores, levels, thresholds)
    assert found[0].tolist() == pytest.approx([-math.log(sigmoid(-0.7)), -math.log(1 - sigmoid(1.6))])
    assert found[1].tolist() == pytest.approx([-math.log(sigmoid(-0.5)), -math.log(1 - sigmoid(1.9))])


@examples
@given(score=margins, good=st.sampled_from([0.0, 1.0]), rate=st.floats(0.05, 0.95))
def test_a_verdict_is_logistic_from_the_base_rate(score: float, good: float, rate: float) -> None:
    probability = rate * math.exp(score) / (rate * math.exp(score) + 1 - rate)
    found = both(lambda x: preferences.verdict(x, torch.tensor(good, dtype=torch.float64), rate), score)
    close(found, -math.log(probability if good else 1 - probability), probability - good)


def test_a_score_of_0_is_as_good_as_the_average_response() -> None:
    loss = preferences.verdict(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0), 0.7)
    assert math.exp(-loss.item()) == pytest.approx(0.7, abs=1e-9)
