"""Pushes of the loss against their definitions; shares that sum to 1; intervals that know what is independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_traces import random_step, step_trace

from kedge.diagnose.push import Measure, Tally, clusters, loss_pushes, mix_note, moved, relative_weight
from kedge.diagnose.split import split
from kedge.trace.reader import StepTrace


def length_of(step: StepTrace) -> np.ndarray:
    return step.lengths.astype(float)


LENGTH = Measure("length", "tokens", length_of)


def with_loss(kind: str, beta: float = 0.3, **learning: object) -> StepTrace:
    rng = np.random.default_rng(2)
    step = random_step(rng, learning={"kl_loss": kind, **learning}, loss_beta=np.full(6, beta))
    return step


def slope_of_weighted_k3(k: float, step: float = 1e-5) -> float:
    """Derivative of pi / pi_old times k3 in log pi, at pi_old, by differences; `k` is log pi / ref."""

    def weighted(more: float) -> float:
        return math.exp(more) * (math.exp(-k - more) - 1 + k + more)

    return (weighted(step) - weighted(-step)) / (2 * step)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+", "full"])
def test_kl_in_the_loss(kind: str) -> None:
    step = with_loss(kind)
    (push,) = loss_pushes(step)
    assert push.name == f"KL ({kind})" and push.meaning
    for b in range(len(step)):
        kept = np.flatnonzero(step.response_mask[b]).tolist()
        d = [float(step.tokens["old_logprob"][b, t] - step.tokens["reference_logprob"][b, t]) for t in kept]
        each = {
            "k1": [1.0] * len(d),
            "k2": [math.fsum(d)] * len(d),
            "k3": [1 - math.exp(-x) for x in d],
            "k3+": [slope_of_weighted_k3(x) for x in d],
            "full": [math.fsum(d[i:]) for i in range(len(d))],
        }[kind]
        close = 1e-8 if kind == "k3+" else 1e-12
        np.testing.assert_allclose(push.tokens[b, kept], [-0.3 * x for x in each], atol=close)
        whole = {"k1": 0.0, "k2": math.fsum(d), "full": math.fsum(d)}.get(kind, math.fsum(each))
        assert push.whole[b] == pytest.approx(-0.3 * whole, abs=10 * close)
    assert not push.tokens[~step.response_mask].any()


def test_an_entropy_bonus_and_demonstrations() -> None:
    step = random_step(np.random.default_rng(3), learning={"entropy_bonus": 0.02, "mix_weight": 0.5})
    (push,) = loss_pushes(step)
    expected = -0.02 * (step.tokens["old_logprob"] + step.tokens["entropy"])
    np.testing.assert_allclose(push.tokens, np.where(step.response_mask, expected, 0), atol=1e-12)
    assert "0.5" in mix_note(step) and "policy/mix_loss" in mix_note(step)


def test_an_older_trace_has_no_pushes() -> None:
    step = random_step(np.random.default_rng(3), loss_beta=np.full(6, np.nan), learning={"kl_loss": "k2"})
    assert loss_pushes(step) == [] and mix_note(step) == ""


def test_weights_of_responses_follow_the_aggregation() -> None:
    mask = np.array([[True, True, True, True], [True, False, False, False]])
    plain = step_trace(np.zeros((2, 4, 2)), mask)
    assert relative_weight(plain).tolist() == [1, 1]
    by_sequence = step_trace(np.zeros((2, 4, 2)), mask, learning={"aggregation": "sequence_mean"})
    weight = relative_weight(by_sequence)
    np.testing.assert_allclose(weight, [2.5 / 4, 2.5 / 1])
    assert (weight * mask.sum(axis=1)).sum() / mask.sum() == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    critic=st.sampled_from(("channels", "scalar", "none")),
    unknown=st.floats(0, 0.6),
    aggregation=st.sampled_from(("token_mean", "sequence_mean")),
)
def test_covariance_shares_sum_to_1(seed: int, critic: str, unknown: float, aggregation: str) -> None:
    rng = np.random.default_rng(seed)
    steps = [
        random_step(rng, critic=critic, batch=8, step=number, learning={"aggregation": aggregation})
        for number in range(3)
    ]
    values = {number: np.where(rng.random(8) < unknown, np.nan, rng.normal(size=8)) for number in range(3)}
    tally = Tally(Measure("random", "1", lambda step: values[step.step]))
    product, total, count = 0.0, 0.0, 0
    for step in steps:
        rows = split(step)
        tally.add(step, rows)
        phi = values[step.step]
        known = np.isfinite(phi) & (step.lengths > 0)
        if known.sum() < 2:
            continue
        whole = rows.whole[:, rows.of_kind("part")].sum(axis=1) * relative_weight(step)
        centred = phi[known] - phi[known].mean()
        product += math.fsum(centred * whole[known])
        total += math.fsum(centred * moved(step)[known])
        count += int(known.sum())
    push = tally.result()
    if push is None:
        assert count == 0
        return
    assert sum(part.value for part in push.parts.values()) == pytest.approx(product / count, rel=1e-7, abs=1e-12)
    assert push.moved.value == pytest.approx(total / count, rel=1e-7, abs=1e-12)
    for by_token in (False, True):
        shares = push.shares(by_token=by_token)
        assert not shares or sum(shares.values()) == pytest.approx(1, abs=1e-6)


def test_intervals_are_as_wide_as_prompts_are_different() -> None:
    """400 prompts of one response, and the same responses 4 times over: as many prompts, the same interval."""
    rng = np.random.default_rng(7)
    rewards = rng.normal(size=(400, 1, 1))
    phi = rng.normal(size=400) + 0.5 * rewards[:, 0, 0]
    estimates = []
    for copies in (1, 4):
        many = np.repeat(rewards, copies, axis=0)
        prompts = [f"prompt {row // copies}" for row in range(400 * copies)]
        step = step_trace(many, np.ones((400 * copies, 1), bool), channels=("score",), prompts=prompts)
        tally = Tally(Measure("phi", "1", lambda step, copies=copies: np.repeat(phi, copies)))
        tally.add(step, split(step))
        push = tally.result()
        assert push is not None and 250 < push.prompts <= 400  # bunches
        estimates.append(push.predicted)
    one, four = estimates
    product = (phi - phi.mean()) * rewards[:, 0, 0]
    assert one.value == four.value == pytest.approx(product.mean())
    expected = 2 * 1.96 * product.std() / math.sqrt(400)
    for estimate in estimates:
        assert estimate.high - estimate.low == pytest.approx(expected, rel=0.2)
        assert estimate.low < estimate.value < estimate.high


def test_too_few_prompts_have_no_interval() -> None:
    step = random_step(np.random.default_rng(1))
    tally = Tally(LENGTH)
    tally.add(step, split(step))
    push = tally.result()
    assert push is not None and math.isnan(push.predicted.low) and math.isfinite(push.predicted.value)
    assert Tally(Measure("nothing", "1", lambda step: np.full(len(step), np.nan))).result() is None


def test_bunches_follow_prompts() -> None:
    step = random_step(np.random.default_rng(1))
    bunch = clusters(step)
    assert bunch[0] == bunch[1] and bunch[2] == bunch[3]
    nameless = random_step(np.random.default_rng(1), prompts=[None] * 6)
    assert len(set(clusters(nameless).tolist())) > 3


def test_the_rate_is_moved_over_pushed() -> None:
    rng = np.random.default_rng(11)
    step = random_step(rng, batch=40, holes=False, gamma=1.0, lam=1.0)
    rows = split(step)
    whole = rows.whole[:, rows.of_kind("part")].sum(axis=1)
    step.tokens["new_logprob"][:] = step.tokens["old_logprob"]
    step.tokens["new_logprob"][:, 0] += 0.03 * whole
    tally = Tally(LENGTH)
    tally.add(step, rows)
    push = tally.result()
    assert push is not None and push.rate == pytest.approx(0.03, rel=1e-6)
