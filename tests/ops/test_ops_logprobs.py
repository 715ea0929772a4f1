"""Log-probabilities and entropies against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, log_softmax

from kedge.ops.logprobs import entropy, next_token_logprobs, taken

seeds = st.integers(0, 2**32 - 1)


@examples
@given(seed=seeds, vocab=st.integers(1, 9), temperature=st.floats(0.2, 3), shift=st.floats(-500, 500))
def test_logprobs_and_entropy_of_random_logits(seed: int, vocab: int, temperature: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(shift + 4 * rng.normal(size=(2, 3, vocab)))
    tokens = torch.from_numpy(rng.integers(0, vocab, (2, 3)))
    logprobs = next_token_logprobs(logits, temperature)
    picked, uncertainty = taken(logprobs, tokens), entropy(logprobs)
    for b in range(2):
        for t in range(3):
            expected = log_softmax([x / temperature for x in logits[b, t].tolist()])
            np.testing.assert_allclose(logprobs[b, t].numpy(), expected, atol=1e-11)
            assert picked[b, t].item() == pytest.approx(expected[int(tokens[b, t])], abs=1e-11)
            assert uncertainty[b, t].item() == pytest.approx(-sum(math.exp(x) * x for x in expected), abs=1e-11)


def test_temperature_defaults_to_one_and_sharpens_below_it() -> None:
    logits = torch.tensor([0.0, 1.0])
    assert torch.equal(next_token_logprobs(logits), next_token_logprobs(logits, 1.0))
    assert next_token_logprobs(logits, 0.5).exp()[1].item() == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_to_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.5, -2.0, 0.25], dtype=dtype)
    logprobs = next_token_logprobs(logits)
    assert logprobs.dtype == torch.float32
    np.testing.assert_allclose(logprobs.numpy(), log_softmax([1.5, -2.0, 0.25]), atol=1e-6)
    assert next_token_logprobs(logits.double()).dtype == torch.float64


def test_forbidden_tokens_add_no_entropy_and_no_nan_gradient() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    uncertainty = entropy(next_token_logprobs(logits))
    assert uncertainty.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(uncertainty, logits)
    np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-12)


def test_entropy_gradient_is_closed_form() -> None:
    logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy(next_token_logprobs(logits)), logits)
    logprobs = log_softmax(logits.tolist())
    total = -sum(math.exp(x) * x for x in logprobs)
    np.testing.assert_allclose(gradient.numpy(), [-math.exp(x) * (x + total) for x in logprobs], atol=1e-12)


def test_a_certain_token_has_entropy_zero_and_a_uniform_choice_log_n() -> None:
    assert entropy(next_token_logprobs(torch.tensor([0.0, -1e9]))).item() == 0
    assert entropy(next_token_logprobs(torch.zeros(5))).item() == pytest.approx(math.log(5))
