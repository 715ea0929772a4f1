"""Symptoms: length, collapse, capability, and length that spreads to brief prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_views import Said, Story, with_metrics

from kedge.diagnose.checks.brief_prompts import CHECK as BRIEF
from kedge.diagnose.checks.capability import CHECK as CAPABILITY
from kedge.diagnose.checks.mode_collapse import CHECK as COLLAPSE
from kedge.diagnose.checks.runaway_length import CHECK as LENGTH
from kedge.diagnose.view import View

NOTHING = View(name="", facts={}, metrics={})
LOOKS = 9


def test_too_little_says_what_is_missing() -> None:
    for check in (BRIEF, CAPABILITY, COLLAPSE, LENGTH):
        found = check(NOTHING)
        assert found.status == "not_checked" and found.summary and found.strength == 0


def test_healthy_runs_are_quiet() -> None:
    view = with_metrics(
        Story(said=lambda step: Said(fillers=0.6 - 0.01 * step)).view(),
        "evaluation",
        {
            "evaluation/entropy": np.linspace(0.4, 0.27, LOOKS),
            "evaluation/anchor_accuracy": np.linspace(0.856, 0.848, LOOKS),
            "evaluation/anchor_loss": np.linspace(0.41, 0.52, LOOKS),
            "evaluation/tercile0/length_ratio": np.linspace(1.0, 0.8, LOOKS),
        },
    )
    for check in (BRIEF, CAPABILITY, COLLAPSE, LENGTH):
        found = check(view.without_settings())
        assert found.status == "ok" and found.strength < 0.5, found


def test_runaway_length() -> None:
    view = Story(said=lambda step: Said(fillers=0.6 + 0.05 * step)).view()
    found = LENGTH(view)
    lengths, usual = (np.array([one[name].mean() for one in view.samples]) for name in ("length", "reference_tokens"))
    lasting = ((lengths / usual)[1:] + (lengths / usual)[:-1]) / 2
    assert found.strength == pytest.approx((lasting.max() - 1) / 0.4)
    assert found.onset == view.samples[1 + int(np.argmax(lasting >= 1.4))]["step"]


def test_runaway_length_in_training_steps_where_nothing_was_evaluated() -> None:
    view = with_metrics(
        replace(Story().view(), metrics={}, samples=()), "policy", {"length/mean": [9.0] * 5 + [90.0] * 5}
    )
    assert LENGTH(view).status == "fail" and LENGTH(view).onset == 5


def test_collapse_of_entropy_and_of_answers() -> None:
    one = replace(Story(), said=lambda step: Said(refuse=1.0 if step > 20 else 0.15)).view()
    found = COLLAPSE(one)
    assert found.status == "fail" and found.onset == 25
    sure = with_metrics(Story().view(), "evaluation", {"evaluation/entropy": [0.4] * 4 + [0.01] * 5})
    found = COLLAPSE(sure)
    assert found.status == "fail" and found.onset == 25
    assert found.strength == pytest.approx(np.log(40) / np.log(4))


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_capability(name: str) -> None:
    line = {"accuracy": [0.85] * 4 + [0.75] * 5, "loss": [0.4] * 4 + [0.9] * 5}[name]
    found = CAPABILITY(with_metrics(NOTHING, "evaluation", {f"evaluation/anchor_{name}": line}))
    assert found.status == "fail" and found.onset == {"accuracy": 20, "loss": 20}[name]


def spill(brief: float, long: float) -> View:
    """Net margins of the first and the last third of the prompts, and answers that grow in the first."""
    view = Story(kl=lambda step: 0.0).view()
    rng = np.random.default_rng(0)
    pairs = tuple(
        replace(one, score=np.where(one.tercile == 0, brief, long) + rng.normal(0, 0.1, len(one.score)))
        for one in view.pairs
    )
    line = {"evaluation/tercile0/length_ratio": np.linspace(1.0, 2.2, LOOKS)}
    return with_metrics(replace(view, pairs=pairs), "evaluation", line)


def test_length_that_spreads_to_brief_prompts() -> None:
    found = BRIEF(spill(-0.5, 0.8))
    assert found.status == "fail" and found.strength > 2


@pytest.mark.parametrize(("brief", "long"), [(0.5, 0.8), (-0.5, -0.8)])
def test_length_that_pays_everywhere_or_nowhere_is_another_checks(brief: float, long: float) -> None:
    assert BRIEF(spill(brief, long)).strength == 0
