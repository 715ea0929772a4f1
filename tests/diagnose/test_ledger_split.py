"""The parts sum to the advantage whatever the run, each is what its equation says, and whole responses telescope."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_traces import random_step, step_trace

from kedge.diagnose.split import CENTRING, LIMIT, Entry, centring, gap, split
from kedge.trace.reader import StepTrace

CRITICS = ("channels", "scalar", "none")


def positions(step: StepTrace, b: int) -> list[int]:
    return np.flatnonzero(step.response_mask[b]).tolist()


def advantage_by_loops(step: StepTrace) -> np.ndarray[Any, Any]:
    """Schulman et al. (2016), equation 16, term by term, on the weighted sum of rewards and values."""
    found = np.zeros(step.response_mask.shape)
    for b in range(len(step)):
        kept = positions(step, b)
        reward = [math.fsum(step.weights[b] * step.rewards[b, t]) for t in kept]
        value = [math.fsum(step.weights[b] * step.values[b, t]) for t in kept] + [0.0]
        delta = [r + step.gamma * value[i + 1] - value[i] for i, r in enumerate(reward)]
        for i, t in enumerate(kept):
            total = math.fsum((step.gamma * step.lam) ** k * d for k, d in enumerate(delta[i:]))
            found[b, t] = (total - step.shift[b]) / step.scale[b]
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    critic=st.sampled_from(CRITICS),
    whiten=st.booleans(),
    width=st.integers(1, 9),
    channels=st.lists(st.sampled_from(("score", "kl", "length", "rule")), min_size=1, max_size=4, unique=True),
)
def test_the_parts_sum_to_the_advantage(seed: int, critic: str, whiten: bool, width: int, channels: list[str]) -> None:
    step = random_step(np.random.default_rng(seed), critic=critic, whiten=whiten, width=width, channels=channels)
    rows = split(step)
    expected = advantage_by_loops(step)
    total = rows.tokens[..., rows.of_kind("part")].sum(axis=-1)
    spread = max(float(expected[step.response_mask].std()), 1e-3)
    assert np.abs(total - expected)[step.response_mask].max() < 1e-9 * max(1.0, np.abs(expected).max()) / min(1, spread)
    assert not total[~step.response_mask].any()
    here = gap(step, rows)
    assert here.token < LIMIT and here.holds


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), critic=st.sampled_from(CRITICS))
def test_the_two_sides_of_the_kl_sum_to_its_reward_part(seed: int, critic: str) -> None:
    step = random_step(np.random.default_rng(seed), critic=critic)
    rows = split(step)
    entries = {entry.name: index for index, entry in enumerate(rows.entries)}
    sides = [entries["kl entropy side"], entries["kl prior side"]]
    part = entries["kl reward"]
    np.testing.assert_allclose(rows.tokens[..., sides].sum(-1), rows.tokens[..., part], atol=1e-9)
    np.testing.assert_allclose(rows.whole[:, sides].sum(-1), rows.whole[:, part], atol=1e-9)
    step_alone = advantage_of(step, "kl", old=True)
    np.testing.assert_allclose(rows.tokens[..., sides[0]], step_alone, atol=1e-9)


def advantage_of(step: StepTrace, channel: str, *, old: bool) -> np.ndarray[Any, Any]:
    """-beta log pi, discounted from each token on, by a loop."""
    found = np.zeros(step.response_mask.shape)
    weight = step.weights[:, step.channels.index(channel)]
    for b in range(len(step)):
        kept = positions(step, b)
        for i, t in enumerate(kept):
            logs = [step.tokens["old_logprob" if old else "reference_logprob"][b, u] for u in kept[i:]]
            onward = math.fsum((step.gamma * step.lam) ** k * log for k, log in enumerate(logs))
            found[b, t] = weight[b] / step.scale[b] * onward
    return found


def test_a_whole_response_is_its_return_less_the_first_value() -> None:
    rng = np.random.default_rng(3)
    for critic in CRITICS:
        step = random_step(rng, gamma=1.0, lam=0.95, critic=critic)
        rows = split(step)
        whole = rows.whole[:, rows.of_kind("part")].sum(axis=1)
        for b in range(len(step)):
            kept = positions(step, b)
            if not kept:
                assert whole[b] == 0
                continue
            earned = math.fsum((step.weights[b] * step.rewards[b, kept]).ravel())
            first = math.fsum(step.weights[b] * step.values[b, kept[0]])
            assert whole[b] == pytest.approx((earned - first - step.shift[b]) / step.scale[b], abs=1e-9)


def test_a_whole_response_is_the_sum_of_td_errors_for_any_discount() -> None:
    step = random_step(np.random.default_rng(4), gamma=0.9, lam=0.0)
    rows = split(step)
    parts = [index for index in rows.of_kind("part") if rows.entries[index].channel != "whitening"]
    one_step = rows.tokens[..., parts].sum(axis=1)  # at lambda 0 every advantage is its TD error
    np.testing.assert_allclose(rows.whole[:, parts], one_step, atol=1e-9)


def test_the_share_of_one_critic_is_estimated_and_called_so() -> None:
    rng = np.random.default_rng(5)
    batch, width = 200, 6
    mask = np.arange(width) < rng.integers(1, width + 1, (batch, 1))
    old = -rng.random((batch, width))
    reference = old - rng.normal(0.3, 0.1, (batch, width))
    rewards = np.zeros((batch, width, 3))
    last = mask.sum(axis=1) - 1
    rewards[np.arange(batch), last, 0] = 2.0
    rewards[..., 1] = (old - reference) * mask
    left = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] * mask
    values = np.zeros_like(rewards)
    values[..., 2] = (2.0 - 0.1 * 0.3 * left) * mask  # knows both channels
    weights = np.tile([1.0, -0.1, 1.0], (batch, 1))
    step = step_trace(
        rewards,
        mask,
        values=values,
        weights=weights,
        channels=("score", "kl", "critic"),
        critic="scalar",
        old=old,
        reference=reference,
    )
    rows = split(step)
    entries = {entry.name: index for index, entry in enumerate(rows.entries)}
    score = rows.tokens[..., entries["score critic (estimated)"]][mask]
    np.testing.assert_allclose(score, -2.0, atol=1e-6)  # the score is always 2: all that there is to know
    assert rows.entries[entries["kl critic (estimated)"]].estimated
    assert gap(step, rows).token < 1e-9
    kl = rows.tokens[..., entries["kl critic (estimated)"]][mask]
    to_go = 0.1 * 0.3 * left[mask]
    assert np.corrcoef(kl, to_go)[0, 1] > 0.9


def test_what_predicts_the_channels() -> None:
    rng = np.random.default_rng(6)
    assert [centring(random_step(rng, critic=critic)) for critic in CRITICS] == list(CRITICS)
    assert centring(random_step(rng, critic="channels")) in CENTRING
    baseline = random_step(rng, critic="channels")
    object.__setattr__(baseline, "critic", "none")
    assert centring(baseline) == "channels"  # a baseline for each channel centres it


def test_the_kl_is_not_divided_where_it_is_no_k1_or_does_not_count() -> None:
    step = random_step(np.random.default_rng(7))
    index = step.channels.index("kl")
    names = {entry.kind for entry in split(step).entries}
    assert "side" in names
    squared = step.rewards.copy()
    squared[..., index] = squared[..., index] ** 2
    object.__setattr__(step, "rewards", squared)
    assert "side" not in {entry.kind for entry in split(step).entries}
    free = random_step(np.random.default_rng(7))
    free.weights[:, index] = 0
    assert "side" not in {entry.kind for entry in split(free).entries}


def test_a_gap_is_seen() -> None:
    step = random_step(np.random.default_rng(8), whiten=False)
    assert gap(step).holds
    step.advantage_sum[0] += 0.1
    assert not gap(step).holds and gap(step).token < LIMIT


def test_rounding_before_terms_cancel_is_no_gap() -> None:
    """A group of equal rewards: float32 leaves noise over a small scale, and the step's other rows set the unit."""
    rewards = np.zeros((2, 1, 1))
    rewards[0, 0, 0], rewards[1, 0, 0] = 1.0, 2e-4
    values = np.zeros_like(rewards)
    values[0] = 1.0
    step = step_trace(rewards, np.ones((2, 1), bool), values=values, channels=("score",), scale=np.array([1e-4, 1e-4]))
    step.advantage_sum[0] = 2.0**-24 / 1e-4
    assert gap(step).digest > LIMIT and gap(step).holds


def test_names() -> None:
    assert Entry("score", "reward").name == "score reward"
    assert Entry("whitening", "shift").name == "whitening"
    assert Entry("kl", "critic", estimated=True).name == "kl critic (estimated)"
