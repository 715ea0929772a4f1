"""The checks on runs that really had a fault, or had none: views of real runs, made by benchmarks/diagnosis.py.

Each file is a run of 40 steps in the built-in desk, named after what was done to it, how strongly, and its seed. The
fault set in somewhere between step 12 and 24. Thresholds may have been set with these runs in view; what the checks do
on runs that nobody had seen is in docs/results/diagnosis.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.diagnose.checks import check_named, run_checks
from kedge.diagnose.checks.check import Kind
from kedge.diagnose.diagnosis import diagnose
from kedge.diagnose.view import View, load

FIXTURES = Path(__file__).parent / "fixtures"
CAUSES = {
    "length_bonus": "length_reward",
    "beta_low": "beta",
    "score_scale": "reward_unit",
    "token_constant": "token_constant",
    "kl_in_reward": "kl_estimator",
    "kl_in_loss": "kl_estimator",
    "ends_untrained": "ending",
    "cut_short": "ending",
    "gamma": "discount",
    "critic_rate": "critic",
    "controller_unit": "controller",
    "moved_reference": "reference",
    "nucleus": "sampler",
    "stale_sampler": "sampler",
    "step_size": "step_size",
    "refusal_reward": "feature_reward",
    "phrase_bonus": "exploit",
    "unscaled": "unscaled_reward",
    "entropy": "entropy_bonus",
    "frozen": "frozen",
}
FILES = sorted(FIXTURES.glob("*.json.gz"))
FAULTED = [path for path in FILES if path.name.split("-")[0] in CAUSES]
HEALTHY = [path for path in FILES if path not in FAULTED]


def _name(path: Path) -> str:
    return path.name.removesuffix(".json.gz")


def _failing(view: View) -> list[str]:
    """Checks that call the run faulty: a benign change is none."""
    return [
        one.check for one in run_checks(view) if one.status == "fail" and check_named(one.check).kind is not Kind.BENIGN
    ]


def test_there_are_faulted_runs_of_most_causes_and_healthy_ones() -> None:
    assert len({CAUSES[path.name.split("-")[0]] for path in FAULTED}) >= 12
    assert len(HEALTHY) >= 3


@pytest.mark.parametrize("recipe", ["read", "unknown"])
@pytest.mark.parametrize("path", FAULTED, ids=_name)
def test_the_cause_of_a_real_fault_fails_and_comes_first(path: Path, recipe: str) -> None:
    view = load(path)
    found = diagnose(view if recipe == "read" else view.without_settings())
    causes = [one for one in found.findings if check_named(one.check).kind is not Kind.BENIGN]
    assert causes[0].check == CAUSES[path.name.split("-")[0]]
    assert causes[0].status == "fail"


@pytest.mark.parametrize("path", HEALTHY, ids=_name)
def test_no_check_fails_where_nothing_is_wrong(path: Path) -> None:
    view = load(path)
    assert _failing(view) == []
    assert _failing(view.without_settings()) == []


@pytest.mark.parametrize("path", FAULTED, ids=_name)
def test_no_alarm_is_dated_before_the_earliest_fault(path: Path) -> None:
    dated = [one for one in diagnose(load(path)).findings if one.status == "fail" and one.onset is not None]
    assert dated and all(one.onset is not None and one.onset >= 12 for one in dated)
