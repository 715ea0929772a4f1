"""sampler, ending, scoring_noise, critic, whitening, step_size, wasted_kl, unscaled_reward, entropy_bonus, frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from made_steps import Made, found, run, view_of_steps

from kedge.diagnose.checks import check_named
from kedge.diagnose.checks.ending import _above
from kedge.diagnose.view import Probes, View
from kedge.trace.reader import Series, StepTrace

SAMPLER, ENDING, NOISE = (check_named(name) for name in ("sampler", "ending", "scoring_noise"))
CRITIC, WHITENING, STEP = (check_named(name) for name in ("critic", "whitening", "step_size"))
WASTED, UNSCALED = check_named("wasted_kl"), check_named("unscaled_reward")
ENTROPY, FROZEN = check_named("entropy_bonus"), check_named("frozen")


def test_a_gap_between_sampler_and_learner_is_found() -> None:
    assert found(SAMPLER, run(12, {"gap": 0.05}, at=6)).onset == 8
    small = found(SAMPLER, run(12, {"gap": 0.008}, at=6))
    assert small.status == "fail"  # far above what this run had before
    assert found(SAMPLER, run(12, gap=0.008)).status == "ok"  # another precision, from the start


def test_truncated_sampling_is_found_though_the_logged_probabilities_agree() -> None:
    finding = found(SAMPLER, run(20, {"top_p": 0.85}, at=10))
    assert finding.status == "fail" and finding.onset is not None and finding.onset <= 15
    assert "likelier" in finding.summary


def test_draws_from_the_policy_itself_are_no_surprise() -> None:
    for seed in range(6):
        assert found(SAMPLER, run(40, seed=seed)).strength < 0.5
    assert found(SAMPLER, run(2)).status == "not_checked"


def test_the_surprise_is_that_of_loops() -> None:
    made = Made(9).rows()
    sums = []
    for row in range(len(made)):
        places = np.flatnonzero(made.response_mask[row])
        sums.append(sum(-made.tokens["old_logprob"][row, t] - made.tokens["entropy"][row, t] for t in places))
    tokens = int(made.response_mask.sum())
    mean = sum(sums) / tokens
    error = np.sqrt(sum((s - mean * n) ** 2 for s, n in zip(sums, made.lengths, strict=True))) / tokens
    facts = SAMPLER.reduce(made)  # type: ignore[misc]
    assert facts["sampler/surprise"] == pytest.approx(mean)
    assert facts["sampler/surprise_error"] == pytest.approx(error)


def test_an_end_outside_the_loss_is_found() -> None:
    finding = found(ENDING, run(20, {"end_active": False}, at=12))
    assert (finding.status, finding.onset) == ("fail", 13) and finding.strength > 2
    assert "no part in the loss" in finding.summary


class Masked(Made):
    """The last token of every response that ended is left out of the mask."""

    def rows(self) -> StepTrace:
        rows = super().rows()
        mask = rows.response_mask.copy()
        last = mask.sum(axis=1) - 1
        here = rows.ended & (last > 0)
        mask[np.flatnonzero(here), last[here]] = False
        return replace(rows, response_mask=mask)


def test_an_end_outside_the_mask_is_found() -> None:
    finding = found(ENDING, [Masked(step) for step in range(10)])
    assert finding.status == "fail" and "no EOS" in finding.summary


def test_a_penalty_that_was_taken_away_is_found() -> None:
    finding = found(ENDING, run(20, {"missing_eos": 0.0}, at=12, end=-1.0))
    assert (finding.status, finding.onset) == ("fail", 13)
    assert "as if they were complete" in finding.summary


def test_no_penalty_at_all_counts_where_cut_answers_are_paid_as_much() -> None:
    assert found(ENDING, run(20, missing_eos=0.0, longest=60)).status == "ok"  # few are cut
    assert found(ENDING, run(20, missing_eos=0.0, end=-1.0, unit=0.01)).status != "not_checked"
    assert found(ENDING, run(12)).status == "ok"
    assert found(ENDING, run(1)).status == "not_checked"


@dataclass(frozen=True)
class Foreign(Made):
    """Rows of a trainer without a channel for missing ends: what these cost is in the score."""

    end: float = -1.0
    cut_costs: float = 0.0

    def rows(self) -> StepTrace:
        rows = super().rows()
        keep = [index for index, name in enumerate(rows.channels) if name != "missing_eos"]
        rewards = rows.rewards.copy()
        last = rows.response_mask.sum(axis=1) - 1
        rewards[np.arange(len(rows)), last, rows.channels.index("score")] -= self.cut_costs * ~rows.ended
        channels = tuple(rows.channels[index] for index in keep)
        kept = {name: getattr(rows, name)[..., keep] for name in ("values", "weights")}
        return replace(rows, channels=channels, rewards=rewards[..., keep], **kept)


def test_cut_answers_of_another_trainer_are_compared_with_those_that_ended() -> None:
    alike = found(ENDING, [Foreign(step) for step in range(10)])
    assert alike.status == "fail" and "paid as much as those that end" in alike.summary
    assert found(ENDING, [Foreign(step, cut_costs=5.0) for step in range(10)]).status == "ok"


def test_cut_and_ended_answers_are_compared_on_the_same_prompt() -> None:
    reward, ended = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False])
    assert _above(reward, ended, np.array([0, 0, 1, 1])) == 1.0  # 2 over 1, 4 over 3
    assert _above(reward, ended, None) == 0.75  # 2 is not over 3
    assert _above(reward, ended, np.array([0, 1, 2, 3])) == 0.75  # no prompt has both


def test_rising_truncation_fails_but_never_strongly() -> None:
    finding = found(ENDING, run(30, {"end": -4.0}, at=20))
    assert finding.status == "fail" and finding.strength <= 1.2


def test_ratios_that_are_not_one_before_the_first_step() -> None:
    steps = run(10)
    noisy = found(NOISE, steps, metrics={"policy/first_ratio_error": [1e-6] * 5 + [0.05] * 5})
    assert (noisy.status, noisy.onset) == ("fail", 6)
    assert found(NOISE, steps, metrics={"policy/first_ratio_error": [1e-6] * 10}).status == "ok"
    assert found(NOISE, steps).status == "not_checked"


def test_a_floor_of_the_kl_at_the_start() -> None:
    steps = run(10, distance=0.3)
    floor = found(NOISE, steps, metrics={"kl/original_per_sequence": [0.4] * 10})
    assert (floor.status, floor.onset) == ("fail", 0)
    other = found(NOISE, steps, metrics={"kl/original_per_sequence": [0.0] * 10})
    assert other.status == "ok"  # another reference on purpose


class Lost(Made):
    """The critic's values have nothing to do with the returns."""

    def rows(self) -> StepTrace:
        rows = super().rows()
        rng = np.random.default_rng([9, self.step])
        values = np.zeros_like(rows.values)
        values[..., 0] = rng.normal(0, 1.5, rows.response_mask.shape) * rows.response_mask
        return replace(rows, values=values)


def test_a_critic_that_is_lost_is_found() -> None:
    sick = run(16) + [Lost(step, distance=0.3) for step in range(16, 32)]
    finding = found(CRITIC, sick)
    assert finding.status == "fail" and finding.strength > 1.3
    assert finding.onset is not None and 17 <= finding.onset <= 24


def test_a_critic_that_is_off_by_a_constant_is_found() -> None:
    finding = found(CRITIC, run(32, {"level": -1.5}, at=16))
    assert finding.status == "fail" and "below the returns" in finding.summary


def test_a_critic_that_has_to_learn_another_reward_is_given_time() -> None:
    """Wrong for three steps, then as good as before."""
    steps = run(16) + [Lost(step, distance=0.3) for step in range(16, 19)]
    steps += [Made(step) for step in range(19, 32)]
    assert found(CRITIC, steps).status != "fail"


def test_a_sound_critic_and_a_run_without_one() -> None:
    assert found(CRITIC, run(32)).strength < 0.5
    assert found(CRITIC, run(8)).status == "not_checked"

    class Without(Made):
        def rows(self) -> StepTrace:
            return replace(super().rows(), critic="none")

    assert found(CRITIC, [Without(step) for step in range(32)]).status == "not_checked"


def test_explained_variance_is_that_of_loops() -> None:
    made = Made(9).rows()
    returns, errors = [], []
    for row in range(len(made)):
        places = np.flatnonzero(made.response_mask[row])
        for t in places:
            ahead = sum(float(made.weights[row] @ made.rewards[row, u]) for u in places if u >= t)
            value = float(made.weights[row] @ made.values[row, t])
            returns.append(ahead)
            errors.append(ahead - value)
    facts = CRITIC.reduce(made)  # type: ignore[misc]
    assert facts["critic/explained"] == pytest.approx(1 - np.var(errors) / np.var(returns))
    assert facts["critic/bias"] == pytest.approx(np.mean(errors) / np.std(returns))


class Turned(Made):
    """Whitening takes off a mean far below 0, so that the long responses come out above it."""

    def rows(self) -> StepTrace:
        rows = super().rows()
        return replace(rows, shift=np.full(self.batch, -4.0))


def test_signs_that_whitening_turns_are_found() -> None:
    class Bad(Turned):
        def rows(self) -> StepTrace:
            rows = super().rows()
            values = rows.values.copy()
            values[..., 0] += 3.0 * rows.response_mask  # every raw advantage is below 0
            return replace(rows, values=values)

    assert found(WHITENING, [Bad(step) for step in range(20)]).status == "fail"
    assert found(WHITENING, run(20)).strength < 0.5
    assert found(WHITENING, run(8)).status == "not_checked"
    assert found(WHITENING, run(20, whiten=False)).status == "not_checked"


def test_steps_that_are_too_large_are_found() -> None:
    finding = found(STEP, run(24, {"moved": 0.2, "active": 0.8}, at=14))
    assert (finding.status, finding.onset) == ("fail", 16) and finding.strength > 2
    mild = found(STEP, run(24, {"moved": 0.08}, at=14))
    assert mild.status == "fail"
    assert "0.01 before" in mild.summary
    told = found(STEP, run(24, {"moved": 0.1}, at=14), settings={"policy": {"lr": 3e-4}})
    assert told.remedies[0].overrides == ("policy.lr=3e-05",)


def test_steps_of_the_usual_size_are_sound() -> None:
    decaying = [Made(step, moved=0.03 * (1 - step / 45)) for step in range(40)]
    assert found(STEP, decaying).strength < 0.5
    assert found(STEP, run(24, {"moved": 0.02}, at=14)).strength < 0.7  # a warm restart
    assert found(STEP, run(24, {"end_active": False}, at=14)).strength < 0.5  # not the clip's doing
    assert found(STEP, run(5)).status == "not_checked"
    assert found(STEP, run(20, moved=0.0)).status == "not_checked"


def evaluated(scores: list[float], kls: list[float], references: list[float] | None = None) -> View:
    steps = np.arange(len(scores)) * 4
    names = {
        "score": scores,
        "kl_per_sequence": kls,
        "score_reference": references or [0.0] * len(scores),
        "score_reference_within": [0.8] * len(scores),
    }
    metrics = {f"evaluation/{name}": Series(steps, np.array(values)) for name, values in names.items()}
    return View("made", {}, {"evaluation": metrics})


def test_divergence_without_score_is_found() -> None:
    kl = [0.0, 0.5, 1.0, 2.0, 4.0, 6.0]
    frontier = [0.8 * np.sqrt(2 * k) for k in kl]
    assert WASTED(evaluated([0.7 * s for s in frontier], kl)).strength < 0.5
    wasted = WASTED(evaluated([0.7 * s for s in frontier[:3]] + [0.5, 0.4, 0.3], kl))
    assert wasted.status == "fail" and wasted.onset == 20
    assert WASTED(evaluated([0.7 * s for s in frontier[:3]], kl[:3])).status != "fail"
    assert WASTED(evaluated([0.1] * 4, [0.01] * 4)).status == "not_checked"
    assert WASTED(View("made", {}, {})).status == "not_checked"


def test_a_new_reward_model_gives_the_policy_time() -> None:
    kl = [0.0, 0.5, 1.0, 1.1, 1.2, 1.3]
    changed = evaluated([0.0, 0.6, 0.8, 0.2, 0.2, 0.2], kl, references=[0.0, 0.0, 0.0, -0.1, -0.1, -0.1])
    assert WASTED(changed).status != "fail"


def test_advantages_out_of_scale_are_found() -> None:
    finding = found(UNSCALED, run(20, {"unit": 20.0, "whiten": False}, at=12))
    assert (finding.status, finding.onset) == ("fail", 14) and finding.strength > 2
    assert found(UNSCALED, run(20, {"unit": 20.0}, at=12)).status == "ok"  # whitened
    assert found(UNSCALED, run(20, whiten=False)).strength < 0.5
    assert found(UNSCALED, run(3)).status == "not_checked"


def test_an_entropy_bonus_that_drives_to_noise_is_found() -> None:
    class Noisy(Made):
        def rows(self) -> StepTrace:
            rows = super().rows()
            tokens = {**rows.tokens, "entropy": rows.tokens["entropy"] * (1 + 0.08 * max(0, self.step - 10))}
            return replace(rows, tokens=tokens)

    sick = [Noisy(step, bonus=0.015 if step >= 10 else 0.0) for step in range(30)]
    finding = found(ENTROPY, sick)
    assert finding.status == "fail" and finding.onset is not None and finding.onset > 12
    # The same rise without a bonus has another cause; a small bonus without a rise is what bonuses are for.
    assert found(ENTROPY, [Noisy(step) for step in range(30)]).status == "ok"
    assert found(ENTROPY, run(30, bonus=0.005)).strength < 0.5
    assert found(ENTROPY, run(30, {"bonus": 2.0}, at=20)).status == "fail"
    assert found(ENTROPY, run(30, learning={})).status == "not_checked"


@pytest.mark.parametrize("moved", [0.0, 2e-5])
def test_a_policy_that_stopped_moving_is_found(moved: float) -> None:
    finding = found(FROZEN, run(24, {"moved": moved}, at=14))
    assert (finding.status, finding.onset) == ("fail", 16)
    assert "though there was something to learn" in finding.summary


def test_a_policy_that_never_moves_is_found_after_a_warm_up() -> None:
    assert found(FROZEN, run(8, moved=0.0)).status != "fail"
    assert (found(FROZEN, run(12, moved=0.0)).status, found(FROZEN, run(12, moved=0.0)).onset) == ("fail", 9)
    warmed = [Made(step, moved=0.0 if step < 6 else 0.01) for step in range(24)]
    assert found(FROZEN, warmed).status == "ok"


def test_a_rate_that_decays_to_nothing_is_no_standstill() -> None:
    decaying = [Made(step, moved=0.02 * (1 - step / 199)) for step in range(200)]
    assert found(FROZEN, decaying).status == "ok"
    assert found(FROZEN, run(24)).strength == 0


def still(steps: list[int], changes: list[float]) -> tuple[Probes, ...]:
    count, kl = 20, np.zeros(20)
    found_probes = []
    for step, change in zip(steps, changes, strict=True):
        kl = kl + change
        nothing = np.zeros(count)
        names: dict[str, Any] = {"probe": np.arange(count), "variant": np.full(count, "brief"), "length": nothing}
        found_probes.append(Probes(step, 0.3, **names, score=nothing, kl=kl, tercile=nothing, response=(None,) * count))
    return tuple(found_probes)


def test_probes_show_a_standstill_where_updates_take_one_step() -> None:
    one = {"epochs": 1, "minibatches": 1, "aggregation": "token_mean", "kl_loss": None}
    steps = run(24, moved=0.0, learning=one)
    sick = found(FROZEN, steps, probes=still([0, 3, 6, 9, 12, 15, 18], [0, 0.1, 0.2, 0.1, 0, 0, 0]))
    assert sick.status == "fail" and sick.onset == 12
    sound = found(FROZEN, steps, probes=still([0, 3, 6, 9], [0, 0.1, 0.2, 0.1]))
    assert sound.status == "ok"
    assert found(FROZEN, steps).status == "not_checked"


def test_why_nothing_moves_is_said() -> None:
    clipped = found(FROZEN, run(24, {"moved": 0.0, "active": 0.0}, at=14))
    assert "the clip holds every token" in clipped.summary


def test_no_check_needs_the_recipe() -> None:
    for check in (SAMPLER, ENDING, CRITIC, STEP, FROZEN, UNSCALED):
        view = view_of_steps(check, run(20), settings={"policy": {"lr": 1e-4}})
        assert check(view).status == check(view.without_settings()).status == "ok"
