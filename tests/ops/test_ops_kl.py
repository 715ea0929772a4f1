"""The KL estimators by hand-worked values and by expectation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, log_softmax, ragged_mask

from kedge.ops.kl import absolute, full_kl, full_kl_loss, k1, k2, k3, sequence_k2, token_sum


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


# As a loss


def random_logprobs(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(-rng.exponential(size=shape))


@examples
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), width=st.integers(1, 6))
def test_a_sequences_k2_and_its_gradient_are_those_of_its_log_ratio(seed: int, rows: int, width: int) -> None:
    """(sum of k1)^2 / 2; the gradient of every token of the response is the whole sum, and nothing elsewhere."""
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, rows, width)
    policy, reference = random_logprobs(rng, rows, width).requires_grad_(), random_logprobs(rng, rows, width)
    found = sequence_k2(policy, reference, mask)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    for b in range(rows):
        gap = math.fsum(policy[b, t].item() - reference[b, t].item() for t in range(width) if mask[b, t])
        assert found[b].item() == pytest.approx(gap * gap / 2, abs=1e-10)
        for t in range(width):
            assert gradient[b, t].item() == pytest.approx(gap if mask[b, t] else 0.0, abs=1e-10)


def test_token_sum_and_absolute_by_hand() -> None:
    mask = torch.tensor([[True, False, True]])
    policy, reference = torch.tensor([[-1.0, math.nan, -2.0]]), torch.tensor([[-1.5, 0.0, -1.0]])
    assert absolute(policy, reference)[0, 0] == 0.5 and absolute(policy, reference)[0, 2] == 1.0
    assert token_sum(k1(policy, reference), mask).tolist() == [-0.5]


@examples
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(2, 5))
def test_full_kl_is_the_sum_over_the_vocabulary(seed: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    policy, reference = (log_softmax(rng.normal(size=vocab).tolist()) for _ in range(2))
    expected = math.fsum(math.exp(p) * (p - r) for p, r in zip(policy, reference, strict=True))
    found = full_kl(torch.tensor([[policy]], dtype=torch.float64), torch.tensor([[reference]], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_full_kl_takes_tokens_that_the_policy_cannot_write() -> None:
    policy, reference = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert full_kl(policy[None, None], reference[None, None]).item() == pytest.approx(math.log(2))


@examples
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), width=st.integers(1, 5))
def test_the_full_loss_charges_each_token_for_what_follows(seed: int, rows: int, width: int) -> None:
    """Its value is the sum of the token KLs; a token's log-probability gets the token KLs after it as gradient."""
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, rows, width)
    token_kl = torch.from_numpy(rng.exponential(size=(rows, width))).requires_grad_()
    logprobs = random_logprobs(rng, rows, width).requires_grad_()
    found = full_kl_loss(token_kl, logprobs, mask)
    of_kl, of_logprobs = torch.autograd.grad(found.sum(), (token_kl, logprobs))
    for b in range(rows):
        kept = [t for t in range(width) if mask[b, t]]
        assert found[b].item() == pytest.approx(math.fsum(float(token_kl[b, t]) for t in kept), abs=1e-10)
        for t in range(width):
            after = math.fsum(float(token_kl[b, u]) for u in kept if u > t)
            assert of_logprobs[b, t].item() == pytest.approx(after if mask[b, t] else 0.0, abs=1e-10)
            assert of_kl[b, t].item() == (1.0 if mask[b, t] else 0.0)
