"""Losses against plain Python, hand-worked values and closed-form gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, kept, poisoned, ragged_mask

from kedge.ops.losses import importance_weights, ppo_objective, token_nll, token_weights, value_loss

seeds = st.integers(0, 2**32 - 1)
reals = st.floats(-6, 6)


def surrogate(ratio: float, advantage: float, clip: float = 0.2) -> tuple[float, bool, float]:
    """The clipped surrogate at one token: its value, its active flag and its gradient in the log-probability."""
    old = torch.tensor(-1.5, dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    value, active = ppo_objective(logprob, old, torch.tensor(advantage, dtype=torch.float64), clip=clip)
    (gradient,) = torch.autograd.grad(value, logprob)
    return value.item(), bool(active), gradient.item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "active"),
    [
        (3.0, 0.7, 2.1, True),
        (3.0, 1.0, 3.0, True),
        (3.0, 1.3, 3.6, False),
        (-3.0, 0.7, -2.4, False),
        (-3.0, 1.0, -3.0, True),
        (-3.0, 1.3, -3.9, True),
        (0.0, 1.3, 0.0, True),
    ],
)
def test_truth_table_of_the_clipped_surrogate(advantage: float, ratio: float, value: float, active: bool) -> None:
    got, flag, gradient = surrogate(ratio, advantage)
    assert got == pytest.approx(value, abs=1e-12)
    assert flag == active
    assert gradient == pytest.approx(ratio * advantage if active else 0.0, abs=1e-12)


@examples
@given(ratio=st.floats(0.05, 20), advantage=reals, clip=st.floats(0.01, 0.9))
def test_surrogate_is_the_lesser_product_and_flag_says_whether_it_has_a_gradient(
    ratio: float, advantage: float, clip: float
) -> None:
    value, active, gradient = surrogate(ratio, advantage, clip)
    held = min(max(ratio, 1 - clip), 1 + clip)
    assert value == pytest.approx(min(ratio * advantage, held * advantage), abs=1e-9)
    edge = min(abs(ratio - 1 - clip), abs(ratio - 1 + clip))
    if edge > 1e-9:
        flat = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
        assert active == (not flat)
        assert gradient == pytest.approx(0 if flat else ratio * advantage, abs=1e-9)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.75, 1.25])
def test_exactly_on_the_boundary_the_whole_gradient_is_active(advantage: float, ratio: float) -> None:
    logprob = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    old = torch.zeros((), dtype=torch.float64)
    exact = torch.exp(logprob).item()
    objective, active = ppo_objective(logprob, old, torch.tensor(advantage, dtype=torch.float64), clip=abs(exact - 1))
    assert active
    assert objective.item() == exact * advantage
    assert torch.autograd.grad(objective, logprob)[0].item() == pytest.approx(exact * advantage)


@examples
@given(value=reals, old=reals, target=reals, variance=st.floats(0.05, 9), clip=st.floats(0.05, 2))
def test_value_loss_is_the_greater_of_the_free_and_the_held_error(
    value: float, old: float, target: float, variance: float, clip: float
) -> None:
    limit = clip * math.sqrt(variance)
    held = old + min(max(value - old, -limit), limit)
    expected = max((value - target) ** 2, (held - target) ** 2) / 2 / variance
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (value, old, target, variance))
    assert value_loss(*tensors, clip=clip).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "loss", "gradient"),
    [
        (2.0, 3.24 / 8, 0.0),  # moved towards the return by more than 0.2: held at 0.2, flat
        (-2.0, 9 / 8, 3 / 4),  # moved away from the return: the free error counts and pulls back
    ],
)
def test_value_loss_by_hand(target: float, loss: float, gradient: float) -> None:
    value = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    old, returns, variance = (torch.tensor([x], dtype=torch.float64) for x in (0.0, target, 4.0))
    result = value_loss(value, old, returns, variance, clip=0.1)
    assert result.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(result.sum(), value)[0].item() == pytest.approx(gradient, abs=1e-12)


@examples
@given(seed=seeds, unit=st.floats(0.01, 1000))
def test_value_loss_does_not_depend_on_the_unit_of_a_head(seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    values, old, returns = (torch.from_numpy(rng.normal(size=(2, 3, 1))) for _ in range(3))
    variance = torch.tensor([0.7], dtype=torch.float64)
    plain = value_loss(values, old, returns, variance, clip=0.3)
    rescaled = value_loss(values * unit, old * unit, returns * unit, variance * unit**2, clip=0.3)
    np.testing.assert_allclose(rescaled.numpy(), plain.numpy(), rtol=1e-9, atol=1e-12)


def test_value_loss_keeps_heads_apart() -> None:
    values, old = torch.zeros(2, 2), torch.zeros(2, 2)
    returns, variance = torch.tensor([[1.0, 10.0], [2.0, 20.0]]), torch.tensor([1.0, 100.0])
    loss = value_loss(values, old, returns, variance, clip=1.0)
    np.testing.assert_allclose(loss.numpy(), [[0.5, 0.5], [2.0, 2.0]])


@examples
@given(seed=seeds, batch=st.integers(1, 5), length=st.integers(1, 6), tokens=st.floats(0.5, 50))
def test_token_nll_is_the_sum_over_true_tokens_per_given_token(
    seed: int, batch: int, length: int, tokens: float
) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    logprobs = torch.from_numpy(-rng.exponential(size=(batch, length)))
    expected = -math.fsum(kept(logprobs, mask)) / tokens
    assert token_nll(poisoned(logprobs, mask), mask, tokens).item() == pytest.approx(expected, rel=1e-12)
    assert token_nll(poisoned(logprobs, mask, -math.inf), mask, tokens).item() == pytest.approx(expected, rel=1e-12)


# Variants of the surrogate


@examples
@given(
    ratio=st.floats(0.05, 20),
    advantage=reals,
    low=st.floats(0.05, 0.9),
    high=st.floats(0.05, 3),
    dual=st.floats(1.1, 5),
)
def test_upper_bound_and_dual_clip_by_cases(
    ratio: float, advantage: float, low: float, high: float, dual: float
) -> None:
    """Above 0 the ratio stops at 1 + high; below 0 it stops at 1 - low, and at dual on the other side."""
    old = torch.tensor(-1.5, dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    of = torch.tensor(advantage, dtype=torch.float64)
    value, active = ppo_objective(logprob, old, of, clip=low, clip_high=high, dual_clip=dual)
    (gradient,) = torch.autograd.grad(value, logprob)
    held = min(ratio, 1 + high) if advantage >= 0 else min(max(ratio, 1 - low), dual)
    assert value.item() == pytest.approx(held * advantage, abs=1e-9)
    if min(abs(ratio - 1 - high), abs(ratio - 1 + low), abs(ratio - dual)) > 1e-9 and abs(advantage) > 1e-6:
        flat = held != ratio
        assert bool(active) == (not flat)
        assert gradient.item() == pytest.approx(0 if flat else ratio * advantage, abs=1e-9)


def test_an_infinite_clip_leaves_the_ratio_free() -> None:
    for ratio, advantage in ((0.01, -2.0), (50.0, 2.0), (50.0, -2.0)):
        value, active, gradient = surrogate(ratio, advantage, math.inf)
        assert (value, active) == (pytest.approx(ratio * advantage), True)
        assert gradient == pytest.approx(ratio * advantage)


def test_importance_weights_are_capped_ratios() -> None:
    learner, sampler = torch.tensor([0.2, 0.4, 0.9]).log(), torch.tensor([0.4, 0.4, 0.1]).log()
    assert importance_weights(learner, sampler, 2.0).tolist() == pytest.approx([0.5, 1.0, 2.0])


@examples
@given(seed=seeds, rows=st.integers(1, 5), width=st.integers(1, 6))
def test_aggregations_are_what_their_names_say(seed: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, rows, width)
    losses = torch.from_numpy(rng.normal(size=(rows, width)))
    sums = [math.fsum(kept(losses[b], mask[b])) for b in range(rows)]
    lengths = [int(mask[b].sum()) for b in range(rows)]
    expected = {
        "token_mean": math.fsum(sums) / sum(lengths),
        "sequence_sum": math.fsum(sums) / rows,
        "sequence_mean": math.fsum(s / n for s, n in zip(sums, lengths, strict=True)) / rows,
        "constant": math.fsum(sums) / (rows * 17),
    }
    for name, wanted in expected.items():
        weights = token_weights(mask, name, tokens=mask.sum(), responses=rows, budget=17)
        found = float((weights.double() * losses).sum())
        assert found == pytest.approx(wanted, abs=1e-6)
        assert not weights[~mask].any()
