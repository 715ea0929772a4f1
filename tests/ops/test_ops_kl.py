"""The KL estimators and Ziegler's controller by hand-worked values and by expectation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, log_softmax

from kedge.ops.kl import adapted_coefficient, k1, k2, k3


def test_estimators_on_a_token_twice_as_likely_under_the_policy() -> None:
    policy, reference = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))
    assert k1(policy, reference).item() == pytest.approx(0.693147, abs=1e-6)
    assert k2(policy, reference).item() == pytest.approx(0.240227, abs=1e-6)
    assert k3(policy, reference).item() == pytest.approx(0.5 - 1 + 0.693147, abs=1e-6)


def test_estimators_on_a_token_half_as_likely_under_the_policy() -> None:
    policy, reference = torch.tensor(math.log(0.25)), torch.tensor(math.log(0.5))
    assert k1(policy, reference).item() == pytest.approx(-0.693147, abs=1e-6)
    assert k2(policy, reference).item() == pytest.approx(0.240227, abs=1e-6)
    assert k3(policy, reference).item() == pytest.approx(2 - 1 - 0.693147, abs=1e-6)


@examples
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(2, 6))
def test_k1_and_k3_are_unbiased_under_the_policy_and_k2_is_not(seed: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    policy, reference = (log_softmax(rng.normal(size=vocab).tolist()) for _ in range(2))
    exact = sum(math.exp(p) * (p - r) for p, r in zip(policy, reference, strict=True))
    p, r = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    assert (p.exp() * k1(p, r)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p.exp() * k3(p, r)).sum().item() == pytest.approx(exact, abs=1e-12)
    half_square = sum(math.exp(a) * (a - b) ** 2 / 2 for a, b in zip(policy, reference, strict=True))
    assert (p.exp() * k2(p, r)).sum().item() == pytest.approx(half_square, abs=1e-12)


@examples
@given(policy=st.floats(-20, 0), reference=st.floats(-20, 0))
def test_k2_and_k3_are_not_negative_and_vanish_only_at_equality(policy: float, reference: float) -> None:
    p, r = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    assert k2(p, r) >= 0
    assert k3(p, r) >= -1e-15
    assert k3(p, p) == 0 and k2(p, p) == 0 and k1(p, p) == 0
    if abs(policy - reference) > 1e-3:
        assert k3(p, r) > 0


def test_k3_keeps_its_digits_near_equality() -> None:
    policy = torch.tensor(-1.0, dtype=torch.float64)
    assert k3(policy, policy - 1e-5).item() == pytest.approx(5e-11, rel=1e-4)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 0.0512)),  # 10% above: the error is 0.1
        (5.4, 0.15 * (1 - 0.1 * 0.0512)),
        (60.0, 0.15 * (1 + 0.2 * 0.0512)),  # saturated above
        (0.0, 0.15 * (1 - 0.2 * 0.0512)),  # saturated below
        (-1.0, 0.15 * (1 - 0.2 * 0.0512)),  # a sampled k1 may be negative
    ],
)
def test_controller_by_hand(measured: float, expected: float) -> None:
    assert adapted_coefficient(0.15, measured, 6.0, episodes=512, horizon=10000) == pytest.approx(expected, rel=1e-12)


def test_a_saturated_controller_doubles_beta_in_542_steps_of_64_episodes() -> None:
    beta, steps = 0.1, 0
    while beta < 0.2:
        beta, steps = adapted_coefficient(beta, 100.0, 6.0, episodes=64, horizon=10000), steps + 1
    assert steps == 542


def test_controller_moves_by_a_fifth_over_one_horizon() -> None:
    assert adapted_coefficient(1.0, 100.0, 1.0, episodes=500, horizon=500) == pytest.approx(1.2)


def test_zero_beta_stays_zero() -> None:
    assert adapted_coefficient(0.0, 100.0, 6.0, episodes=64, horizon=100) == 0
