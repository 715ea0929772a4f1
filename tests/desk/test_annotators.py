"""The annotators' choices against probabilities worked out by hand, one bias at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from kedge.desk.annotators import Bias, first_wins
from kedge.desk.gold import Judgment

DRAWS = 40_000
PLAIN = Judgment(1.0, True, True, False, False, 4)
LONG = Judgment(0.5, True, True, False, False, 14)
CERTAIN = Judgment(1.0, True, True, True, False, 4)
DECLINES = Judgment(0.0, False, True, False, True, 5)
QUIET = {"noise": 0.0, "sharpness": 1.0}


def share(first: Judgment, second: Judgment, bias: Bias, seed: int = 0) -> float:
    return float(first_wins([(first, second)] * DRAWS, bias, np.random.default_rng(seed)).mean())


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("first", "second", "bias", "margin"),
    [
        (PLAIN, LONG, Bias(**QUIET), 0.5),
        (LONG, PLAIN, Bias(**QUIET), -0.5),
        (PLAIN, LONG, Bias(length=0.13, **QUIET), 0.5 - 1.3),
        (CERTAIN, PLAIN, Bias(tone=0.7, **QUIET), 0.7),
        (PLAIN, CERTAIN, Bias(tone=0.7, **QUIET), -0.7),
        (DECLINES, PLAIN, Bias(refusal=2.0, **QUIET), 2.0 - 1.0),
        (PLAIN, PLAIN, Bias(position=0.4, **QUIET), 0.4),
        (PLAIN, LONG, Bias(noise=0.0, sharpness=3.0), 3 * 0.5),
        (PLAIN, LONG, Bias(position=0.4, noise=0.0, sharpness=3.0), 3 * 0.9),
    ],
)
def test_each_bias_moves_the_choice_by_its_own_amount(
    first: Judgment, second: Judgment, bias: Bias, margin: float
) -> None:
    expected = sigmoid(margin)
    assert share(first, second, bias) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS))


def test_noise_is_a_coin_on_its_share_of_the_labels() -> None:
    better, worse = Judgment(50.0, True, True, False, False, 1), Judgment(-50.0, False, True, False, False, 1)
    assert share(better, worse, Bias(noise=0.0)) == 1
    assert share(better, worse, Bias(noise=0.2)) == pytest.approx(0.9, abs=0.01)
    assert share(better, worse, Bias(noise=1.0)) == pytest.approx(0.5, abs=0.02)


def test_without_bias_the_order_does_not_matter() -> None:
    assert share(PLAIN, LONG, Bias()) + share(LONG, PLAIN, Bias(), seed=1) == pytest.approx(1, abs=0.02)


def test_choices_follow_the_generator() -> None:
    pairs: Sequence[tuple[Judgment, Judgment]] = [(PLAIN, LONG), (CERTAIN, DECLINES)] * 50
    one, again, other = (first_wins(pairs, Bias(), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (one == again).all() and (one != other).any()
    assert one.dtype == np.bool_
