"""The laws of over-optimisation: a world in which one holds exactly, other fitters, loops, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize_scalar

from kedge.experiment.laws import fit, gain, least_squares, peak

FORMS = ("best_of_n", "rl")
D = np.linspace(0.3, 3.0, 12)


def by_hand(form: str, alpha: float, beta: float, d: float) -> float:
    return d * (alpha - beta * (d if form == "best_of_n" else math.log(d)))


def test_a_tilted_normal_policy_follows_the_best_of_n_law_exactly() -> None:
    """Reference sheet O9: the proxy is x ~ N(0, 1), gold a x - b (x^2 - 1), the policy the tilt of the proxy, summed
    here on a fine grid. Then gold = d (alpha - beta d) with alpha = sqrt(2) a and beta = 2 b."""
    a, b = 1.3, 0.21
    x = np.linspace(-14, 14, 20001)
    reference = np.exp(-0.5 * x**2)
    reference /= reference.sum()
    d, gold = [], []
    for strength in np.linspace(0.2, 4.0, 12):
        policy = reference * np.exp(strength * x)
        policy /= policy.sum()
        kept = policy > 0
        d.append(math.sqrt((policy[kept] * np.log(policy[kept] / reference[kept])).sum()))
        gold.append(((policy - reference) * (a * x - b * (x**2 - 1))).sum())
    alpha, beta = least_squares("best_of_n", d, gold)
    assert alpha == pytest.approx(math.sqrt(2) * a, abs=1e-6) == pytest.approx(1.838478, abs=1e-6)
    assert beta == pytest.approx(2 * b, abs=1e-6)
    assert float(peak("best_of_n", alpha, beta)) == pytest.approx(math.sqrt(2) * a / (4 * b), abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_law_by_hand(form: str) -> None:
    found = gain(form, 1.2, 0.5, D)
    assert found.tolist() == pytest.approx([by_hand(form, 1.2, 0.5, d) for d in D])
    assert float(gain(form, 1.2, 0.5, 0.0)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_another_fitter_finds_the_same(form: str) -> None:
    gold = gain(form, 1.2, 0.5, D) + 0.1 * np.random.default_rng(0).normal(size=len(D))
    expected, _ = curve_fit(lambda d, a, b: [by_hand(form, a, b, one) for one in d], D, gold, p0=(0.1, 0.1))
    assert least_squares(form, D, gold) == pytest.approx(tuple(expected), rel=1e-5)


@given(st.sampled_from(FORMS), st.floats(0.1, 3), st.floats(0.1, 2))
def test_the_peak_is_where_the_law_is_highest(form: str, alpha: float, beta: float) -> None:
    turn = float(peak(form, alpha, beta))
    found = minimize_scalar(lambda d: -by_hand(form, alpha, beta, d), bounds=(1e-9, 4 * turn), method="bounded")
    assert turn == pytest.approx(found.x, rel=1e-3)


def test_a_law_that_does_not_turn_has_no_peak() -> None:
    assert peak("rl", 1.0, 0.0) == peak("best_of_n", 1.0, -0.2) == math.inf
    assert float(peak("best_of_n", -1.0, 0.5)) == 0  # it falls from the start
    assert peak("rl", [1.0, 1.0], [0.5, -0.5]).tolist() == pytest.approx([math.e, math.inf])


def runs(form: str, seeds: int, spread: float, seed: int = 0) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Three runs a seed; every run has its own alpha around 1.5, with beta 0.6."""
    rng = np.random.default_rng(seed)
    return [
        [(D, gain(form, 1.5 + spread * rng.normal(), 0.6, D)) for _ in range(3)]
        for _ in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_intervals_hold_the_truth_about_as_often_as_they_say(form: str) -> None:
    laws = [fit(form, runs(form, 8, 0.3, seed), draws=300) for seed in range(60)]
    held = [law.alpha.low <= 1.5 <= law.alpha.high for law in laws]
    assert 0.8 <= np.mean(held) <= 1  # a percentile interval of 8 groups is somewhat narrow
    assert all(law.alpha.low < law.alpha.value < law.alpha.high for law in laws)
    assert all(law.peak.low <= law.peak.value <= law.peak.high for law in laws)


def test_the_bootstrap_by_loops() -> None:
    """The same percentiles as from refitting resampled runs one draw at a time."""
    groups = runs("rl", 4, 0.5)
    law = fit("rl", groups, draws=4000)
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(4000):
        chosen = [groups[i][j] for i in rng.integers(4, size=4) for j in rng.integers(3, size=3)]
        d, gold = (np.concatenate([run[part] for run in chosen]) for part in (0, 1))
        drawn.append(least_squares("rl", d, gold)[0])
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert (law.alpha.low, law.alpha.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_runs_that_agree_leave_no_doubt_and_draws_do_not_vary() -> None:
    law = fit("rl", runs("rl", 3, 0.0))
    assert (law.alpha.low, law.alpha.high) == pytest.approx((1.5, 1.5))
    assert law.peak.value == pytest.approx(math.exp(1.5 / 0.6 - 1))
    assert (law.points, law.longest, law.turns) == (9 * len(D), 3.0, False)
    assert fit("best_of_n", [[(D, 1.5 * D - 0.6 * D**2)]]).turns
    again = runs("rl", 3, 0.4)
    assert fit("rl", again) == fit("rl", again)


def test_fewer_than_three_runs_have_no_interval() -> None:
    law = fit("rl", [[(D, D)], [(D, 2 * D)]])
    assert law.alpha.low is None and law.beta.high is None and law.peak.low is None


def test_seeds_without_a_run_are_left_out() -> None:
    groups = runs("rl", 3, 0.4)
    assert fit("rl", [*groups, []]) == fit("rl", groups)


@pytest.mark.parametrize(
    ("d", "gold", "why"),
    [
        ([], [], "no points"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "4 different d from 1.00 to 4.00"),
        ([1, 1, 2, 2, 3, 3], [1, 2, 3, 4, 5, 6], "3 different d"),
        ([1, 1.1, 1.2, 1.3, 1.4, 1.5], [1, 2, 3, 4, 5, 6], "2 times the smallest"),
        ([0, 1, 2, 3, math.nan], [0, 1, 2, 3, 4], "finite"),
        ([-1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], "at least 0"),
    ],
)
def test_too_few_points_are_refused(d: list[float], gold: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit("rl", [[(d, gold)]] if d else [])
