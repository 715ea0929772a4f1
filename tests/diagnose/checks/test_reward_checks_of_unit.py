"""token_constant, discount, reward_unit, saturation and length_normalised: what a number in the reward is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_steps import LEARNING, Made, found, run, view_of_steps

from kedge.diagnose.checks import check_named
from kedge.diagnose.checks.discount import facts as discount_facts
from kedge.diagnose.checks.token_constant import facts as constant_facts
from kedge.diagnose.view import Probes
from kedge.trace.reader import StepTrace

CONSTANT, DISCOUNT, UNIT = (check_named(name) for name in ("token_constant", "discount", "reward_unit"))
SATURATION, NORMALISED = check_named("saturation"), check_named("length_normalised")


@pytest.mark.parametrize(("reward", "least"), [(0.15, 2.0), (0.06, 1.0)])
def test_a_reward_per_token_is_found(reward: float, least: float) -> None:
    finding = found(CONSTANT, run(20, {"per_token": reward}, at=12))
    assert (finding.status, finding.onset) == ("fail", 14) and finding.strength >= least
    assert "length pays" in finding.summary


def test_a_length_penalty_that_somebody_set_is_passed_over() -> None:
    assert found(CONSTANT, run(20, {"per_token": -0.15}, at=12)).status == "ok"
    assert found(CONSTANT, run(20)).status == "ok"
    assert found(CONSTANT, run(2)).status == "not_checked"


@settings(max_examples=25, deadline=None)
@given(st.floats(-2, 2).filter(lambda c: abs(c) > 0.01), st.sampled_from(["score", "kl", "missing_eos"]))
def test_a_constant_hidden_in_any_channel_is_read_off(constant: float, channel: str) -> None:
    made = Made(9).rows()
    index = made.channels.index(channel)
    made.rewards[..., index] += constant * made.response_mask
    weight = float(made.weights[0, index])
    assert constant_facts(made)[f"token_constant/of.{channel}"] == pytest.approx(weight * constant, rel=1e-6)


def test_a_terminal_reward_on_a_straight_line_is_a_constant_per_token() -> None:
    made = Made(9).rows()
    last = made.response_mask.sum(axis=1) - 1
    made.rewards[np.arange(len(made)), last, 3] = 0.2 * made.lengths + 1
    assert constant_facts(made)["token_constant/of.missing_eos"] == pytest.approx(-0.2)
    made.rewards[0, last[0], 3] += 0.5  # no line any more
    assert constant_facts(made)["token_constant/of.missing_eos"] == 0


@pytest.mark.parametrize("change", [{"gamma": 0.9}, {"gamma": 0.97}, {"lam": 0.5}, {"gamma": 0.99, "lam": 0.95}])
def test_a_discount_that_fell_within_the_run_fails(change: dict[str, Any]) -> None:
    finding = found(DISCOUNT, run(24, change, at=15))
    assert (finding.status, finding.onset) == ("fail", 15) and finding.strength > 1.4


def test_discounts_from_the_start_count_by_what_they_do() -> None:
    assert found(DISCOUNT, run(12)).strength == 0
    assert found(DISCOUNT, run(12, lam=0.95)).status == "ok"
    assert found(DISCOUNT, run(12, lam=0.95, longest=200, end=-6.0)).strength < 1  # a critic stands in
    assert found(DISCOUNT, run(12, lam=0.5)).status == "fail"
    assert found(DISCOUNT, run(12, {"lam": 1.0}, at=6, lam=0.95)).status == "ok"  # a longer horizon is no fault
    assert found(DISCOUNT, run(2)).status == "not_checked"


def test_the_reward_that_discounting_pays_leaves_the_kl_out() -> None:
    made = Made(9, missing_eos=-1.0).rows()
    by_hand = [float(made.rewards[b, :, 0].sum() - made.rewards[b, :, 3].sum()) for b in range(len(made))]
    assert discount_facts(made)["discount/reward"] == pytest.approx(np.mean(by_hand))


def probes(step: int, scores: np.ndarray) -> Probes:
    count = len(scores)
    nothing = np.zeros(count)
    return Probes(
        step, 0.3, np.arange(count), np.full(count, "brief"), np.arange(count) + 3, scores, nothing, nothing,
        (None,) * count,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [5.0, 2.5])
def test_fixed_texts_say_the_new_unit(factor: float) -> None:
    first = np.random.default_rng(0).normal(0, 1, 40)
    scored = tuple(probes(step, first * (factor if step >= 12 else 1) + 0.3 * (step >= 12)) for step in (0, 6, 12, 18))
    finding = found(UNIT, run(20, {"unit": factor}, at=12), probes=scored)
    assert finding.status == "fail" and finding.onset == 12
    assert f"{factor:.2g} units" in finding.summary
    assert finding.strength == pytest.approx(np.log(factor) / np.log(1.5), rel=0.3)


def test_a_jump_of_the_responses_scores_is_enough() -> None:
    finding = found(UNIT, run(24, {"unit": 5.0}, at=14))
    assert (finding.status, finding.onset) == ("fail", 15)
    same = tuple(probes(step, np.linspace(-1, 1, 40)) for step in (0, 12, 18))  # kept from the start
    assert found(UNIT, run(24, {"unit": 5.0}, at=14), probes=same).status == "fail"


def test_another_reward_model_is_not_another_unit() -> None:
    rng = np.random.default_rng(0)
    first, other = rng.normal(0, 1, 40), rng.normal(0, 3, 40)
    scored = (probes(0, first), probes(12, 0.3 * first + other))
    assert found(UNIT, run(24, {"unit": 3.0}, at=12), probes=scored).status == "ok"


def test_scores_that_narrow_or_drift_are_sound() -> None:
    narrowing = [Made(step, unit=1.0 - 0.015 * step) for step in range(40)]
    assert found(UNIT, narrowing).strength < 0.5
    rising = [Made(step, level=0.1 * step) for step in range(20)]
    assert found(UNIT, rising).strength < 0.5
    assert found(UNIT, run(5)).status == "not_checked"


def test_advantages_that_are_themselves_out_of_scale_are_for_another_check() -> None:
    finding = found(UNIT, run(24, {"unit": 20.0, "whiten": False}, at=14))
    assert finding.status == "warn"


def test_scores_at_a_limit_are_found() -> None:
    class Clipped(Made):
        def rows(self) -> StepTrace:
            rows = super().rows()
            np.clip(rows.rewards[..., 0], -1.0, 1.0, out=rows.rewards[..., 0])
            return rows

    finding = found(SATURATION, [Clipped(step, unit=1.0) for step in range(10)])
    assert finding.status == "fail" and "stand at 1" in finding.summary
    assert finding.remedies[0].overrides == ("policy.score_clip=2",)
    assert found(SATURATION, run(10)).strength < 0.5
    assert found(SATURATION, run(3)).status == "not_checked"


def test_log_ratios_at_a_clamp_are_found() -> None:
    held = found(SATURATION, run(12, estimator=lambda k: np.clip(k, -0.3, 0.3)))
    assert held.status == "fail" and "clamp" in held.summary


def test_a_grade_is_no_clamp() -> None:
    class Graded(Made):
        def rows(self) -> StepTrace:
            rows = super().rows()
            rows.rewards[..., 0] = np.clip(np.round(rows.rewards[..., 0]), -2, 2)
            return rows

    assert found(SATURATION, [Graded(step) for step in range(10)]).status == "ok"


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_right_or_wrong_is_no_clamp(limit: float) -> None:
    """Most answers are right, or all of them are: nothing is held."""

    class Verified(Made):
        def rows(self) -> StepTrace:
            rows = super().rows()
            last = rows.rewards[..., 0] != 0
            rows.rewards[..., 0] = np.where(last & (rows.rewards[..., 0] < limit), 1.0, 0.0)
            return rows

    finding = found(SATURATION, [Verified(step) for step in range(10)])
    assert finding.status == "ok"


def test_a_clamp_that_comes_to_hold_all_scores_is_found() -> None:
    class Held(Made):
        def rows(self) -> StepTrace:
            rows = super().rows()
            if self.step >= 5:
                rows.rewards[..., 0] = np.where(rows.rewards[..., 0] != 0, 3.0, 0.0)
            return rows

    assert found(SATURATION, [Held(step) for step in range(14)]).status == "fail"


def test_length_in_the_divisor_matters_with_the_kl_in_the_loss() -> None:
    mean = {**LEARNING, "aggregation": "sequence_mean"}
    both = found(NORMALISED, run(8, learning=mean, in_loss="k2", longest=40, end=-0.5))
    assert both.status == "fail"
    assert found(NORMALISED, run(8, learning=mean)).status == "ok"  # KL in the reward
    assert found(NORMALISED, run(8, in_loss="k2")).status == "ok"
    assert found(NORMALISED, run(8, learning={})).status == "not_checked"
    even = found(NORMALISED, run(8, learning=mean, in_loss="k2", longest=6, end=-8.0))
    assert even.status == "ok"  # all answers are as long


def test_the_pressure_of_a_divisor_is_the_difference_of_covariances() -> None:
    made = Made(5, learning={**LEARNING, "aggregation": "sequence_mean"}, in_loss="k2").rows()
    facts = NORMALISED.reduce(made)  # type: ignore[misc]
    lengths = made.lengths.astype(float)
    sums = made.advantage().sum(axis=1)
    direct = np.cov(lengths, sums * lengths.mean() / lengths, bias=True)[0, 1] - np.cov(lengths, sums, bias=True)[0, 1]
    expected = direct / (lengths.std() * sums.std())
    assert facts["length_normalised/pressure"] == pytest.approx(expected, rel=1e-6)


def test_a_recipe_changes_nothing_here() -> None:
    view = view_of_steps(CONSTANT, run(12, {"per_token": 0.2}, at=5), settings={"policy": {}})
    assert CONSTANT(view) == CONSTANT(view.without_settings())
    assert replace(CONSTANT(view), validated=True).status == "fail"
