"""The score against other judges: members, rules, people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_steps import Made
from made_views import Story, with_metrics

from kedge.diagnose.checks.human_gap import CHECK as GAP
from kedge.diagnose.checks.overconfidence import CHECK as SURE
from kedge.diagnose.checks.reward_hacking import CHECK as HACKING
from kedge.diagnose.checks.reward_hacking import facts
from kedge.diagnose.labels import labelled
from kedge.diagnose.view import View
from kedge.trace.labels import Labels, LabelSet
from kedge.trace.reader import Series

RISING = np.linspace(0, 2, 30)
NOTHING = View(name="", facts={}, metrics={})


def noisy(line: np.ndarray, seed: int = 0) -> np.ndarray:
    return line + np.random.default_rng(seed).normal(0, 0.05, len(line))


def ruled(rule: np.ndarray, weight: float = 0.0) -> View:
    lines = {"score/mean": noisy(RISING), "rewards/facts/mean": rule, "rewards/facts/std": np.ones(30)}
    return with_metrics(Story().view(), "policy", {**lines, "weight/facts": np.full(30, weight)})


def test_a_rule_that_falls_while_the_score_rises() -> None:
    found = HACKING(ruled(noisy(-RISING, 1)).without_settings())
    assert found.status == "fail" and "rule facts" in found.summary
    assert found.onset is not None and 7 <= found.onset <= 16


def test_a_rule_that_rises_too_or_a_penalty_is_quiet() -> None:
    assert HACKING(ruled(noisy(RISING, 1))).strength == 0
    assert HACKING(ruled(noisy(0 * RISING, 1))).strength < 0.5
    assert HACKING(ruled(noisy(-RISING, 1), weight=-1.0)).status == "not_checked"


def test_members_are_second_judges() -> None:
    rows = Made(0).rows()
    members = np.random.default_rng(0).normal(size=(len(rows), 3))
    found = facts(replace(rows, members=members))
    assert found["reward_hacking/member.2"] == pytest.approx(members[:, 2].mean())
    assert len(found) == 6 and facts(rows) == {}
    steps = np.arange(30)
    view = with_metrics(NOTHING, "policy", {"score/mean": noisy(RISING)})
    lines = {"reward_hacking/member.0": noisy(RISING), "reward_hacking/member.1": noisy(-RISING)}
    spread = {f"reward_hacking/spread.{member}": np.ones(30) for member in (0, 1)}
    view = replace(view, facts={name: Series(steps, line) for name, line in {**lines, **spread}.items()})
    assert HACKING(view).status == "fail" and "member 1" in HACKING(view).summary


def test_without_a_second_judge_nothing_is_said() -> None:
    for check in (HACKING, GAP, SURE):
        assert check(Story().view()).status == "not_checked"
        assert check(NOTHING).status == "not_checked"


def joined(agree, sure=lambda step: 0.8):  # type: ignore[no-untyped-def]
    """A view with what labels say: people agree with the score as `agree(step)` has it."""
    found: dict[str, list[float]] = {}
    for number in range(12):
        rows = Made(number).rows()
        rng = np.random.default_rng(number)
        score = rows.rewards[..., 0].sum(axis=1)
        people = agree(number) * score + rng.normal(0, 0.3, len(rows))
        right = rng.random(len(rows)) < 0.6
        columns = {"human": people, "correct": right, "confidence": np.full(len(rows), sure(number))}
        said = {name: {(number, row): float(value) for row, value in enumerate(line)} for name, line in columns.items()}
        labels = Labels([LabelSet("made", {}, said)])
        for name, value in labelled(labels)(rows).items():
            found.setdefault(name, []).append(value)
    return View(
        name="", facts={name: Series(np.arange(12), np.array(line)) for name, line in found.items()}, metrics={}
    )


def test_people_and_score_that_part() -> None:
    found = GAP(joined(lambda step: 1.0 if step < 5 else -0.5))
    assert found.status == "fail" and found.onset == 11
    assert GAP(joined(lambda step: 1.0)).status == "ok"


def test_confidence_that_outgrows_accuracy() -> None:
    assert SURE(joined(lambda step: 1.0, lambda step: 0.6 + 0.03 * step)).status == "fail"
    assert SURE(joined(lambda step: 1.0)).status == "ok"


def test_few_labels_count_for_nothing() -> None:
    rows = Made(0).rows()
    labels = Labels([LabelSet("made", {}, {"human": {(0, row): 1.0 for row in range(5)}})])
    assert labelled(labels)(rows) == {}
