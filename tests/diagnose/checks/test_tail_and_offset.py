"""Heavy tails of the score, and prompts whose own level goes with length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_steps import Made

from kedge.diagnose.checks.heavy_tail import CHECK as TAIL
from kedge.diagnose.checks.heavy_tail import facts as tail
from kedge.diagnose.checks.prompt_offset import CHECK as OFFSET
from kedge.diagnose.checks.prompt_offset import facts as offset
from kedge.diagnose.rows import at_last
from kedge.diagnose.view import View
from kedge.trace.reader import Series, StepTrace

NOTHING = View(name="", facts={}, metrics={})


def scored(step: int, score: np.ndarray) -> StepTrace:
    rows = Made(step).rows()
    rewards = rows.rewards.copy()
    rewards[..., 0] = np.where(at_last(rows), score[:, None], 0.0)
    return replace(rows, rewards=rewards, values=np.zeros_like(rows.values), scale=np.ones(len(rows)))


def run(draw) -> View:  # type: ignore[no-untyped-def]
    lines = [tail(scored(step, draw(np.random.default_rng(step))))["heavy_tail/top"] for step in range(12)]
    return View(name="", facts={"heavy_tail/top": Series(np.arange(12), np.array(lines))}, metrics={})


def test_the_share_of_the_top() -> None:
    score = np.random.default_rng(0).normal(size=96)
    rows = scored(0, score)
    whole = [
        sum(float(part[row].sum()) for name, part in rows.parts().items() if name.channel == "score")
        for row in range(len(rows))
    ]
    push = [value - sum(whole) / len(whole) for value in whole]
    expected = max(push) / sum(value for value in push if value > 0)
    assert tail(rows)["heavy_tail/top"] == pytest.approx(expected)
    assert tail(Made(0, batch=20).rows()) == {}


def test_heavy_tails_fail_and_normal_ones_do_not() -> None:
    assert TAIL(run(lambda rng: rng.normal(size=96))).strength < 0.5
    heavy = TAIL(run(lambda rng: np.exp(4 * rng.normal(size=96))))
    assert heavy.status == "fail" and heavy.onset is not None
    assert TAIL(NOTHING).status == "not_checked"


def groups(step: int, level: float) -> StepTrace:
    """Four responses to each of 24 prompts; a prompt's level of score goes with its length, an answer's does not."""
    rng = np.random.default_rng(step)
    need = rng.normal(size=24)[np.repeat(np.arange(24), 4)]
    length = np.clip(np.round(12 + 4 * need + rng.normal(0, 1, 96)), 1, 24).astype(int)
    rows = Made(step).rows()
    mask = np.arange(rows.response_mask.shape[1]) < length[:, None]
    rows = replace(rows, response_mask=mask, group=np.repeat(np.arange(24), 4))
    rewards = np.zeros_like(rows.rewards)
    rewards[np.arange(96), length - 1, 0] = level * need + rng.normal(0, 0.5, 96)
    return replace(rows, rewards=rewards)


@pytest.mark.parametrize(("level", "status"), [(1.5, "fail"), (0.0, "ok")])
def test_prompts_whose_level_goes_with_length(level: float, status: str) -> None:
    lines = [offset(groups(step, level))["prompt_offset/offset"] for step in range(12)]
    view = View(name="", facts={"prompt_offset/offset": Series(np.arange(12), np.array(lines))}, metrics={})
    found = OFFSET(view)
    assert found.status == status, found
    if level:  # the slope between prompts is level / 4 per token, that within 0; deviations of 4 tokens and 0.5 score
        assert np.median(lines) == pytest.approx(level / 0.5, rel=0.25)
    known = {"policy": {"value/explained_variance.score": Series(np.arange(12), np.full(12, 0.6))}}
    assert OFFSET(replace(view, metrics=known)).status == "ok"


def test_one_response_per_prompt_cannot_tell() -> None:
    assert offset(replace(Made(0).rows(), group=np.arange(96))) == {}
    assert offset(replace(groups(0, 1.0), critic="none")) == {}
    assert OFFSET(NOTHING).status == "not_checked"
