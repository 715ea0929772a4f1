"""kl_estimator, beta, controller and reference: what counts as KL, how much, and from where."""

from __future__ import annotations

import numpy as np
import pytest
from made_steps import Made, found, run

from kedge.diagnose.checks import check_named
from kedge.diagnose.checks.controller import streaks
from kedge.diagnose.checks.kl_estimator import facts as kl_facts

ESTIMATOR, BETA = check_named("kl_estimator"), check_named("beta")
CONTROLLER, REFERENCE = check_named("controller"), check_named("reference")
WRONG = {
    "k2": lambda k: k**2 / 2,
    "k3": lambda k: np.exp(-k) - 1 + k,
    "abs": np.abs,
    "unknown": lambda k: 3 * k - 1,
}


@pytest.mark.parametrize("name", WRONG)
def test_another_estimate_in_the_reward_is_named_from_the_step_it_comes(name: str) -> None:
    finding = found(ESTIMATOR, run(20, {"estimator": WRONG[name]}, at=12))
    assert (finding.status, finding.onset) == ("fail", 14)  # three steps have to show it
    assert 2 <= finding.strength <= 10
    said = {"k2": "k2", "k3": "k3", "abs": "absolute", "unknown": "nor another known"}
    assert said[name] in finding.summary


def test_k1_is_sound_token_by_token_or_summed_up_at_the_end() -> None:
    assert found(ESTIMATOR, run(20)).status == "ok"
    made = Made(9).rows()
    sums = np.zeros_like(made.rewards[..., 1])
    last = made.response_mask.sum(axis=1) - 1
    sums[np.arange(len(made)), last] = made.rewards[..., 1].sum(axis=1)
    made.rewards[..., 1] = sums
    assert kl_facts(made)["kl_estimator/k1"] == pytest.approx(0, abs=1e-9)


def test_distances_are_those_of_loops() -> None:
    made = Made(9, estimator=WRONG["k3"]).rows()
    k = [
        made.tokens["old_logprob"][b, t] - made.tokens["reference_logprob"][b, t]
        for b, t in np.argwhere(made.response_mask)
    ]
    gaps = [np.exp(-x) - 1 for x in k]  # k3 - k1
    middle = float(np.median(gaps))
    by_token = sum(abs(gap - middle) for gap in gaps) / sum(abs(x) for x in k)
    rewards, gap = made.rewards[..., 1], made.tokens["old_logprob"] - made.tokens["reference_logprob"]
    sums = [(sum(rewards[b]), sum(gap[b])) for b in range(len(made))]
    by_response = sum(abs(paid - own) for paid, own in sums) / sum(abs(own) for _, own in sums)
    expected = min(by_token, by_response)
    assert kl_facts(made)["kl_estimator/k1"] == pytest.approx(expected, rel=1e-5)
    assert kl_facts(made)["kl_estimator/k3"] == pytest.approx(0, abs=1e-9)


def test_the_loss_is_judged_by_what_the_optimiser_was_told() -> None:
    assert found(ESTIMATOR, run(20, in_loss="k2")).status == "ok"
    assert found(ESTIMATOR, run(20, in_loss="full")).status == "ok"
    assert found(ESTIMATOR, run(20, in_loss="k3+")).status == "ok"
    assert found(ESTIMATOR, run(20, in_loss="k3")).status == "warn"
    changed = found(ESTIMATOR, run(20, {"in_loss": "k3"}, at=12))
    assert (changed.status, changed.onset) == ("fail", 14)
    without_force = found(ESTIMATOR, run(20, {"in_loss": "k1"}, at=12))
    assert (without_force.status, without_force.onset) == ("fail", 14)
    assert without_force.strength > changed.strength


def test_a_kl_that_counts_nowhere_warns_unless_it_runs_away_or_once_counted() -> None:
    assert found(ESTIMATOR, run(20, beta=0.0)).status == "warn"
    assert found(ESTIMATOR, run(20, {"distance": 4.0, "end": -4.0}, at=10, beta=0.0)).status == "fail"
    assert found(ESTIMATOR, run(20, {"beta": 0.0}, at=10)).status == "fail"


def test_a_paid_divergence_fails() -> None:
    finding = found(ESTIMATOR, run(20, beta=-0.1))
    assert finding.status == "fail" and "paid for" in finding.summary


def test_policy_and_reference_that_agree_say_nothing() -> None:
    assert found(ESTIMATOR, run(10, distance=0.0)).status == "not_checked"
    assert found(ESTIMATOR, run(2)).status == "not_checked"


@pytest.mark.parametrize(("factor", "least"), [(10, 3.0), (3, 1.4)])
@pytest.mark.parametrize("in_loss", [None, "k2"])
def test_a_beta_that_fell_is_found_at_once(factor: float, least: float, in_loss: str | None) -> None:
    finding = found(BETA, run(24, {"beta": 0.3 / factor}, at=15, in_loss=in_loss, whiten=in_loss is None))
    assert (finding.status, finding.onset) == ("fail", 16)
    assert least < finding.strength < 5
    assert finding.remedies[0].overrides == ("policy.kl.beta=0.3",)


def test_the_kl_may_change_its_place_without_changing_its_price() -> None:
    steps = run(10) + [Made(step, in_loss="k2") for step in range(10, 20)]
    assert found(BETA, steps).strength < 0.3


def test_a_beta_that_a_controller_moves_or_that_rises_is_no_fall() -> None:
    slow = [Made(step, beta=0.3 * 0.93**step) for step in range(30)]
    assert found(BETA, slow).status == "ok"
    assert found(BETA, run(20, {"beta": 3.0}, at=10)).status == "ok"
    back = run(8) + [Made(8, beta=0.01)] + [Made(step) for step in range(9, 20)]
    assert found(BETA, back).status == "ok"  # one step does not last


def test_a_beta_too_small_while_kl_runs_away() -> None:
    weak = [Made(step, beta=0.001, distance=0.2 * step, unit=1 + 0.1 * step) for step in range(25)]
    finding = found(BETA, weak)
    assert finding.status == "fail" and "KL has grown" in finding.summary
    strong = [Made(step, beta=0.5, distance=0.05 * step) for step in range(25)]
    assert found(BETA, strong).status == "ok"
    assert found(BETA, run(4)).status == "not_checked"


def test_a_saturated_controller_is_found_without_its_recipe() -> None:
    steps = run(12) + [Made(step, beta=0.3 * 0.936 ** (step - 11)) for step in range(12, 30)]
    finding = found(CONTROLLER, steps)
    assert finding.status == "fail" and finding.onset is not None and 19 <= finding.onset <= 24
    told = found(CONTROLLER, steps, settings={"policy": {"kl": {"mode": "adaptive", "target": 400.0}}})
    assert told.strength > finding.strength and told.onset is not None and told.onset <= finding.onset


def test_a_controller_at_work_is_sound() -> None:
    """From its bound at the start to the target, as a controller with a short horizon does."""
    beta, steps = 0.3, []
    for step in range(40):
        steps.append(Made(step, beta=beta))
        error = np.clip(min(1.0, step / 12) * (1.2 if step % 2 else 0.9) - 1, -0.2, 0.2)
        beta *= 1 + 0.2 * error
    assert found(CONTROLLER, steps).strength < 0.7
    assert found(CONTROLLER, run(20)).status == "ok"
    assert found(CONTROLLER, run(5)).status == "not_checked"


def test_a_dead_controller_warns() -> None:
    told = {"policy": {"kl": {"mode": "adaptive", "target": 400.0}}}
    assert found(CONTROLLER, run(25), settings=told).status == "warn"
    near = {"policy": {"kl": {"mode": "adaptive", "target": 0.5}}}
    assert found(CONTROLLER, run(25, distance=0.3), settings=near).status == "ok"


def test_streaks_are_stretches_of_equal_moves() -> None:
    moves = np.array([0.0] * 6 + [-0.1] * 9 + [0.05] * 3 + [0.02] * 8)
    assert [(one.first, one.last, one.rested) for one in streaks(moves)] == [(6, 15, True), (18, 26, False)]
    assert streaks(moves)[0].total == pytest.approx(-0.9)


def kl_of(steps: list[Made]) -> list[float]:
    rows = [made.rows() for made in steps]
    return [float((one.tokens["old_logprob"] - one.tokens["reference_logprob"]).sum(axis=1).mean()) for one in rows]


def test_a_reference_that_became_the_policy_is_found_by_the_second_kl() -> None:
    steps = run(24, {"distance": 0.0}, at=14)
    original = [kl if step < 14 else 2.0 + 0.1 * step for step, kl in enumerate(kl_of(steps))]
    finding = found(REFERENCE, steps, metrics={"kl/original_per_sequence": original})
    assert (finding.status, finding.onset) == ("fail", 15) and finding.strength > 2


def test_a_reference_that_became_the_policy_is_found_by_their_agreement_alone() -> None:
    steps = run(24)
    steps[14] = Made(14, distance=0.0)
    finding = found(REFERENCE, steps)
    assert (finding.status, finding.onset) == ("fail", 14) and finding.strength >= 2
    same = found(REFERENCE, steps, metrics={"kl/original_per_sequence": kl_of(steps)})
    assert same.onset == 14  # the second KL was measured from the moved reference, too


def test_a_reference_that_stays_is_sound_and_another_one_from_the_start_warns() -> None:
    steps = run(20)
    assert found(REFERENCE, steps).status == "ok"
    assert found(REFERENCE, steps, metrics={"kl/original_per_sequence": kl_of(steps)}).status == "ok"
    elsewhere = [kl + 1.0 for kl in kl_of(steps)]
    assert found(REFERENCE, steps, metrics={"kl/original_per_sequence": elsewhere}).status == "warn"
    assert found(REFERENCE, run(20, distance=0.0)).status == "ok"  # never left it
    assert found(REFERENCE, run(3)).status == "not_checked"
