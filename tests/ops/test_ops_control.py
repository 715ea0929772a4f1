"""The rules that move beta, by hand, against sums written out, and in a closed loop; the KL of a policy that moved."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, log_softmax

from kedge.ops.control import adapted_coefficient, kl_estimate, lagrangian_coefficient, pid_coefficient

# Ziegler


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
def test_adapted_by_hand(measured: float, expected: float) -> None:
    assert adapted_coefficient(0.15, measured, 6.0, episodes=512, horizon=10000) == pytest.approx(expected, rel=1e-12)


def test_a_saturated_error_doubles_beta_in_542_steps_of_64_episodes() -> None:
    beta, steps = 0.1, 0
    while beta < 0.2:
        beta, steps = adapted_coefficient(beta, 100.0, 6.0, episodes=64, horizon=10000), steps + 1
    assert steps == 542


def test_a_saturated_error_moves_beta_by_a_fifth_over_one_horizon() -> None:
    assert adapted_coefficient(1.0, 100.0, 1.0, episodes=500, horizon=500) == pytest.approx(1.2)


def test_zero_beta_stays_zero() -> None:
    assert adapted_coefficient(0.0, 100.0, 6.0, episodes=64, horizon=100) == 0


# The dual


@pytest.mark.parametrize(
    ("measured", "factor"),
    [(6.0, 1.0), (12.0, math.exp(0.1)), (0.0, math.exp(-0.1)), (9.0, math.exp(0.05)), (-6.0, math.exp(-0.2))],
)
def test_lagrangian_steps_log_beta(measured: float, factor: float) -> None:
    assert lagrangian_coefficient(0.05, measured, 6.0, rate=0.1) == pytest.approx(0.05 * factor, rel=1e-12)


def test_a_run_that_blew_up_gives_a_number() -> None:
    assert math.isfinite(lagrangian_coefficient(0.05, 1e9, 0.1, rate=0.1))


# PID


@examples
@given(
    kl=st.lists(st.floats(0, 30), min_size=1, max_size=12),
    gains=st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)),
    start=st.floats(0, 3),
)
def test_pid_is_the_written_out_sum(kl: list[float], gains: tuple[float, float, float], start: float) -> None:
    """The clamped sum is found without a recursion: after each step, the largest of the sums that begin anywhere."""
    target, total, previous = 5.0, start, kl[0]
    errors = [value / target - 1 for value in kl]
    for step, value in enumerate(kl):
        beta, total = pid_coefficient(
            value, target, total=total, previous=previous,
            proportional=gains[0], integral=gains[1], derivative=gains[2],
        )  # fmt: skip
        since = [sum(errors[first : step + 1]) for first in range(step + 2)]  # the last one is empty: 0
        expected_total = max([start + since[0], *since])
        rise = errors[step] - errors[step - 1] if step else 0.0
        expected = gains[0] * errors[step] + gains[1] * expected_total + gains[2] * (rise if rise > 0 else 0)
        assert total == pytest.approx(expected_total, abs=1e-9)
        assert beta == pytest.approx(expected if expected > 0 else 0, abs=1e-9)
        previous = value


def test_pid_by_hand() -> None:
    gains = {"proportional": 0.1, "integral": 0.02, "derivative": 0.5}
    beta, total = pid_coefficient(9.0, 6.0, total=1.0, previous=7.5, **gains)
    assert total == 1.5
    assert beta == pytest.approx(0.1 * 0.5 + 0.02 * 1.5 + 0.5 * 0.25)


def test_a_long_time_below_the_target_leaves_no_debt() -> None:
    total, gains = 0.0, {"proportional": 0.0, "integral": 1.0, "derivative": 0.0}
    for _ in range(1000):
        beta, total = pid_coefficient(0.1, 6.0, total=total, previous=0.1, **gains)
    assert (beta, total) == (0, 0)
    beta, _ = pid_coefficient(12.0, 6.0, total=total, previous=0.1, **gains)
    assert beta == 1, "the first step past the target is answered in full"


# Closed loops

TARGET = 4.0


def settled(rule: Callable[[float, float], float], beta: float, kl_of: Callable[[float], float], seed: int) -> float:
    """Mean KL over the second half of 600 steps; the policy goes a fifth of the way to its optimum in each step."""
    rng = np.random.default_rng(seed)
    kl, seen = 0.0, []
    for _ in range(600):
        kl += 0.2 * (min(60.0, kl_of(beta)) - kl)
        seen.append(kl)
        beta = rule(beta, kl * math.exp(0.15 * rng.normal()))
    return float(np.mean(seen[300:]))


def pid() -> Callable[[float, float], float]:
    held = {"total": 0.0, "previous": 0.0}

    def rule(beta: float, kl: float) -> float:
        new, held["total"] = pid_coefficient(kl, TARGET, **held, proportional=0.05, integral=0.01, derivative=0.05)
        held["previous"] = kl
        return new

    return rule


RULES: dict[str, Callable[[], Callable[[float, float], float]]] = {
    "adaptive": lambda: lambda beta, kl: adapted_coefficient(beta, kl, TARGET, episodes=64, horizon=256),
    "lagrangian": lambda: lambda beta, kl: lagrangian_coefficient(beta, kl, TARGET, rate=0.05),
    "pid": pid,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", [0.02, 2.0])
@pytest.mark.parametrize("power", [1, 2])
def test_each_rule_settles_at_its_target(rule: str, start: float, power: int) -> None:
    """On policies whose KL is c / beta, and on ones whose optimum is a Gaussian tilt, with KL = Var(r) / (2 beta^2)."""
    for seed in range(3):
        kl = settled(RULES[rule](), start, lambda beta: 0.8 / max(beta, 1e-6) ** power, seed)
        assert kl == pytest.approx(TARGET, rel=0.1), seed


def test_a_fixed_beta_does_not_settle_there() -> None:
    assert settled(lambda beta, _: beta, 0.02, lambda beta: 0.8 / beta, 0) == pytest.approx(40, rel=0.01)


# The KL of a policy that moved


def test_the_estimate_is_the_weighted_mean_written_out() -> None:
    rng = np.random.default_rng(0)
    new, old, reference = rng.normal(-2, 0.5, size=(3, 7, 5))
    mask = rng.random((7, 5)) < 0.7
    mask[:, 0] = True
    weights = [math.exp(sum(new[b, t] - old[b, t] for t in range(5) if mask[b, t])) for b in range(7)]
    k = [sum(new[b, t] - reference[b, t] for t in range(5) if mask[b, t]) for b in range(7)]
    expected = sum(w * value for w, value in zip(weights, k, strict=True)) / sum(weights)
    shares = [w / sum(weights) for w in weights]
    spread = sum(share**2 * (value - expected) ** 2 for share, value in zip(shares, k, strict=True))
    effective = sum(weights) ** 2 / sum(w * w for w in weights)
    error = math.sqrt(spread * effective / (effective - 1))
    found = kl_estimate(*(torch.tensor(x) for x in (new, old, reference)), torch.tensor(mask))
    assert [float(x) for x in found] == pytest.approx([expected, error, effective], rel=1e-12)


def test_the_estimate_is_the_kl_of_a_policy_that_moved() -> None:
    """One token: 200 000 draws of the old policy against the sum over the vocabulary."""
    rng = np.random.default_rng(1)
    new, old, reference = (np.array(log_softmax((0.7 * rng.normal(size=6)).tolist())) for _ in range(3))
    drawn = rng.choice(6, size=200_000, p=np.exp(old))
    columns = [torch.tensor(row[drawn]).unsqueeze(1) for row in (new, old, reference)]
    kl, error, effective = kl_estimate(*columns, torch.ones(len(drawn), 1, dtype=torch.bool))
    exact = sum(math.exp(p) * (p - r) for p, r in zip(new, reference, strict=True))
    weighed = sum(math.exp(2 * p - o) for p, o in zip(new, old, strict=True))  # E[w^2]; E[w] is 1
    assert float(error) < 0.005
    assert float(kl) == pytest.approx(exact, abs=4 * float(error))
    assert float(effective) == pytest.approx(len(drawn) / weighed, rel=0.02)
    small = [
        kl_estimate(*(c[part] for c in columns), torch.ones(500, 1, dtype=torch.bool))
        for part in torch.arange(len(drawn)).split(500)
    ]
    z = torch.tensor([(float(kl) - exact) / float(error) for kl, error, _ in small])
    assert float(z.std()) == pytest.approx(1, abs=0.15), "errors are as large as they say"
    of_old = float((columns[1] - columns[2]).mean())
    assert abs(of_old - exact) > 0.1, "the old policy has another KL"


def test_a_policy_that_did_not_move_has_its_mean_k1_and_all_its_responses() -> None:
    old, reference = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(9, 4, dtype=torch.bool)
    kl, error, effective = kl_estimate(old, old, reference, mask)
    k = (old - reference).sum(dim=1)
    assert float(kl) == pytest.approx(float(k.mean()))
    assert float(error) == pytest.approx(float(k.std()) / 3)
    assert float(effective) == pytest.approx(9)


def test_huge_weights_do_not_overflow() -> None:
    old, mask = torch.full((3, 1), -2000.0), torch.ones(3, 1, dtype=torch.bool)
    new = torch.tensor([[-1.0], [-1500.0], [-2000.0]])
    kl, error, effective = kl_estimate(new, old, new - 5, mask)
    assert (float(kl), float(effective)) == (5, 1)
    assert not math.isfinite(float(error)), "one response says nothing of how sure it is"
