"""Generalised advantage estimation against the double sum over true positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, gae_channels, poisoned, ragged_mask
from torch import Tensor

from kedge.ops.advantages import gae
from kedge.ops.masked import whitening

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)
shares = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def batch_of(seed: int, batch: int, length: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    rewards, values = (torch.from_numpy(rng.normal(size=(batch, length, channels))) for _ in range(2))
    return rewards, values, mask


@examples
@given(seed=seeds, batch=sizes, length=sizes, channels=st.integers(1, 4), gamma=shares, lam=shares)
def test_gae_equals_the_double_sum(seed: int, batch: int, length: int, channels: int, gamma: float, lam: float) -> None:
    rewards, values, mask = batch_of(seed, batch, length, channels)
    expected = gae_channels(rewards, values, mask, gamma, lam)
    for poison in (0.0, math.nan, math.inf):
        result = gae(poisoned(rewards, mask, poison), poisoned(values, mask, poison), mask, gamma=gamma, lam=lam)
        np.testing.assert_allclose(result[0].numpy(), expected[0], atol=1e-12)
        np.testing.assert_allclose(result[1].numpy(), expected[1], atol=1e-12)


@examples
@given(seed=seeds, batch=sizes, length=sizes, extra=st.integers(1, 4))
def test_padding_changes_nothing(seed: int, batch: int, length: int, extra: int) -> None:
    rewards, values, mask = batch_of(seed, batch, length, 2)
    longer = torch.cat([mask, torch.zeros(batch, extra, dtype=torch.bool)], dim=1)
    padding = torch.randn(batch, extra, 2, dtype=torch.float64)
    plain = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    padded = gae(torch.cat([rewards, padding], 1), torch.cat([values, padding], 1), longer, gamma=0.9, lam=0.8)
    for a, b in zip(plain, padded, strict=True):
        assert torch.equal(a, b[:, :length])
        assert not b[:, length:].any()


@examples
@given(seed=seeds, length=sizes)
def test_a_response_with_holes_is_the_response_without_them(seed: int, length: int) -> None:
    rewards, values, mask = batch_of(seed, 1, length, 3)
    dense = mask[0].nonzero().squeeze(1)
    whole = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    squeezed = gae(rewards[:, dense], values[:, dense], mask[:, dense], gamma=0.9, lam=0.7)
    for a, b in zip(whole, squeezed, strict=True):
        assert torch.equal(a[:, dense], b)


@examples
@given(seed=seeds, batch=sizes, length=sizes, channels=st.integers(1, 5), gamma=shares, lam=shares)
def test_weighted_channels_sum_to_the_scalar_advantage(
    seed: int, batch: int, length: int, channels: int, gamma: float, lam: float
) -> None:
    rewards, values, mask = batch_of(seed, batch, length, channels)
    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, 1, channels)))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        r, v, w = (x.to(dtype) for x in (rewards, values, weights))
        parts, targets = gae(r, v, mask, gamma=gamma, lam=lam)
        summed = ((w * r).sum(-1, keepdim=True), (w * v).sum(-1, keepdim=True))
        whole, target = gae(*summed, mask, gamma=gamma, lam=lam)
        allowed = tolerance * max(1.0, whole[mask].double().std(correction=0).item())
        assert ((w * parts).sum(-1, keepdim=True) - whole).abs().max().item() <= allowed
        assert ((w * targets).sum(-1, keepdim=True) - target).abs().max().item() <= allowed


def test_the_sum_is_exact_to_a_hundred_thousandth_of_the_spread_on_a_realistic_batch() -> None:
    rewards, values, mask = batch_of(7, 64, 48, 4)
    weights = torch.tensor([1.0, -0.05, -0.02, -1.0], dtype=torch.float64)
    parts = gae(rewards.float(), values.float(), mask, gamma=1.0, lam=0.95)[0]
    total = (weights.float() * parts).sum(-1)
    scalar = gae_channels((weights * rewards).sum(-1, True), (weights * values).sum(-1, True), mask, 1.0, 0.95)[0]
    spread = np.std(scalar[..., 0][mask.numpy()])
    assert np.abs(total.numpy() - scalar[..., 0]).max() < 1e-5 * spread


def test_monte_carlo_limit_is_reward_to_go_minus_value() -> None:
    rewards = torch.tensor([[[1.0], [2.0], [4.0]]])
    values = torch.tensor([[[10.0], [20.0], [40.0]]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert advantages.flatten().tolist() == [7 - 10, 6 - 20, 4 - 40]
    assert returns.flatten().tolist() == [7, 6, 4]


def test_one_step_limit_is_the_temporal_difference_with_no_value_after_the_last_token() -> None:
    rewards = torch.tensor([[[1.0], [2.0], [4.0]]])
    values = torch.tensor([[[10.0], [20.0], [40.0]]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.0)
    assert advantages.flatten().tolist() == [1 + 10 - 10, 2 + 20 - 20, 4 - 40]


def test_gamma_and_lambda_are_not_interchangeable() -> None:
    rewards, values, mask = batch_of(3, 2, 5, 1)
    assert not torch.allclose(
        gae(rewards, values, mask, gamma=0.9, lam=0.5)[0], gae(rewards, values, mask, gamma=0.5, lam=0.9)[0]
    )


def test_inputs_are_left_as_they_were() -> None:
    rewards, values, mask = batch_of(5, 3, 4, 2)
    copies = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), copies, strict=True))


def test_whitening_is_an_affine_map_so_the_parts_still_sum() -> None:
    rewards, values, mask = batch_of(11, 4, 6, 3)
    weights = torch.tensor([1.0, -0.1, 0.5], dtype=torch.float64)
    zero = torch.zeros_like(rewards)
    total = (weights * gae(rewards, values, mask, gamma=1.0, lam=0.95)[0]).sum(-1)
    shift, scale = whitening(total, mask)
    from_rewards = (weights * gae(rewards, zero, mask, gamma=1.0, lam=0.95)[0]).sum(-1) / scale
    from_critic = (weights * gae(zero, values, mask, gamma=1.0, lam=0.95)[0]).sum(-1) / scale
    parts = (from_rewards + from_critic - shift / scale)[mask]
    assert (parts - ((total - shift) / scale)[mask]).abs().max().item() < 1e-12


@pytest.mark.parametrize("batch", [1, 3])
def test_a_single_token_response(batch: int) -> None:
    rewards, values = torch.full((batch, 1, 1), 2.0), torch.full((batch, 1, 1), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(batch, 1, dtype=torch.bool), gamma=0.9, lam=0.9)
    assert advantages.flatten().tolist() == [1.5] * batch
    assert returns.flatten().tolist() == [2.0] * batch
