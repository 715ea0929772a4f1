"""A change of the prompts is told from a change of the policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_steps import Made

from kedge.diagnose.checks.prompt_mix import CHECK, facts, shift
from kedge.diagnose.view import View
from kedge.trace.reader import Series

BRIEF, LONG = "can i cancel my order ?", "please explain your whole refund procedure ."


def view(share, length=lambda long, step: 20.0 if long else 8.0, steps: int = 30, batch: int = 96) -> View:  # type: ignore[no-untyped-def]
    """Prompts of two kinds, `share(step)` of the long one, whose answers take `length(long, step)` tokens."""
    found: dict[str, list[float]] = {}
    means = []
    for step in range(steps):
        rng = np.random.default_rng(step)
        long = rng.random(batch) < share(step)
        tokens = np.array([length(one, step) for one in long]) + rng.integers(-2, 3, batch)
        rows = Made(step, batch=batch).rows()
        mask = np.arange(40) < tokens[:, None]
        rows = replace(rows, response_mask=mask, prompts=tuple(LONG if one else BRIEF for one in long))
        means.append(float(tokens.mean()))
        for name, value in facts(rows).items():
            found.setdefault(name, []).append(value)
    return View(
        name="",
        facts={name: Series(np.arange(steps), np.array(line)) for name, line in found.items()},
        metrics={"policy": {"length/mean": Series(np.arange(steps), np.array(means))}},
    )


def test_the_same_prompts_are_quiet() -> None:
    found = CHECK(view(lambda step: 0.3))
    assert found.status == "ok" and found.strength == 0 and "stayed the same" in found.summary


def test_a_policy_that_grows_on_the_same_prompts_is_no_change_of_mix() -> None:
    found = CHECK(view(lambda step: 0.3, lambda long, step: 8.0 + step))
    assert found.status == "ok" and shift(view(lambda step: 0.3, lambda long, step: 8.0 + step)) is None


def test_a_change_of_prompts_is_reported_and_never_fails() -> None:
    run = view(lambda step: 0.9 if step >= 15 else 0.2)
    found = CHECK(run.without_settings())
    assert found.status == "warn" and found.strength == 0 and found.onset == 17
    change = shift(run)
    assert change is not None
    # All of it is the mix: 0.7 more of the prompts take 12 tokens more.
    assert change.length == pytest.approx(0.7 * 12, abs=0.8)
    assert change.mix == pytest.approx(change.length, rel=0.05)


def test_mix_and_policy_are_parted_as_kitagawa_does() -> None:
    """Long prompts are asked more often, and all answers grow by 5 tokens at the same step."""
    length = lambda long, step: (20.0 if long else 8.0) + (5.0 if step >= 15 else 0.0)  # noqa: E731
    change = shift(view(lambda step: 0.9 if step >= 15 else 0.2, length))
    assert change is not None
    assert change.mix == pytest.approx(0.7 * 12, abs=0.8)
    assert change.length - change.mix == pytest.approx(5.0, abs=0.5)


def test_without_prompts_it_says_so() -> None:
    rows = Made(0).rows()
    assert facts(replace(rows, prompts=(None,) * len(rows))) == {}
    assert facts(replace(rows, prompts=("0123456789abcdef",) * len(rows))) == {}
    assert CHECK(View(name="", facts={}, metrics={})).status == "not_checked"
    assert CHECK(view(lambda step: 0.3, steps=4)).status == "not_checked"
