"""Payment for length: with growth, or begun within the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from made_steps import Made, view_of_steps
from made_views import Said, Story, plain, with_metrics

from kedge.diagnose.checks.length_reward import CHECK, facts
from kedge.diagnose.finding import Finding
from kedge.diagnose.view import View
from kedge.trace.reader import StepTrace


def longer(per_token: float):
    return lambda text: plain(text) + per_token * (len(text.split()) + 1)


def begun(per_token: float, at: int = 20) -> Story:
    """A reward model that pays for length from a step on; the policy has not followed yet."""
    return Story(pay=lambda step: longer(per_token) if step > at else plain)


def drift(**more: object) -> Story:
    """Pays from the start, and the policy follows."""
    return Story(pay=lambda step: longer(0.1), said=lambda step: Said(fillers=0.6 + 0.05 * step), **more)  # type: ignore[arg-type]


def test_a_healthy_run_is_quiet() -> None:
    for seed in range(5):
        found = CHECK(Story(seed=seed).view())
        assert found.status == "ok" and found.strength < 0.5, found


def test_drift_from_the_start_is_found_with_its_numbers() -> None:
    found = CHECK(drift().view())
    assert found.status == "fail" and found.strength > 2
    assert found.onset is not None and found.onset <= 15
    evidence = {one.name: one.value for one in found.evidence}
    assert evidence["net margin"] > 1 and evidence["prompts that pay"] == 1
    # Two fillers of nine words are 18 tokens: plain takes 0.02 a word, the reward pays 0.1.
    penalty = float(found.remedies[0].overrides[0].removeprefix("policy.length_penalty="))
    assert penalty == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize(("per_token", "least"), [(0.1, 5.0), (0.02, 1.5)])
def test_payment_that_begins_in_the_run_is_found_at_once(per_token: float, least: float) -> None:
    found = CHECK(begun(per_token).view())
    assert found.status == "fail" and found.strength >= least
    assert found.onset == 25  # the first look after step 20
    assert "came to pay" in found.summary
    price = next(one.value for one in found.evidence if one.name == "change of the price of length")
    assert price == pytest.approx(per_token, rel=1e-6)


def test_payment_without_growth_is_no_fault() -> None:
    found = CHECK(Story(pay=lambda step: longer(0.1)).view())
    assert found.status == "ok" and "did not grow" in found.summary


def test_growth_without_payment_is_no_fault() -> None:
    found = CHECK(Story(said=lambda step: Said(fillers=0.6 + 0.05 * step)).view())
    assert found.status == "ok" and found.strength == 0


def test_a_rescaled_score_pays_for_nothing_new() -> None:
    found = CHECK(Story(pay=lambda step: (lambda text: 5 * plain(text)) if step > 20 else plain).view())
    assert found.status == "ok"


def test_a_better_reward_model_that_likes_brevity_is_no_fault() -> None:
    """A change of all scores in which length costs more than before."""
    found = CHECK(begun(-0.05).view())
    assert found.status == "ok" and found.strength == 0


def test_an_open_bonus_per_token_is_not_the_scores_price() -> None:
    view = Story(said=lambda step: Said(fillers=0.6 + 0.05 * step)).view()
    paying = replace(view, pairs=tuple(replace(one, penalty=-1.0) for one in view.pairs))
    assert CHECK(paying).strength == 0


def test_without_probes_the_answers_are_matched_with_the_references() -> None:
    view = replace(drift().view(), probes=(), pairs=())
    found = CHECK(view)
    assert found.status == "fail"


def test_it_needs_no_settings_and_no_texts() -> None:
    assert CHECK(drift().view().without_settings()).status == "fail"
    assert CHECK(replace(drift(), texts=False).view()).status == "fail"
    assert CHECK(replace(begun(0.1), texts=False).view()).onset == 25


def test_nothing_later_counts_for_onset() -> None:
    """Cut after any step, a run that has spoken keeps its onset, and one that has not is quiet."""
    view = drift().view()
    whole = CHECK(view).onset
    assert whole is not None
    for last in range(10, 41, 5):
        cut = replace(
            view,
            probes=tuple(one for one in view.probes if one.step <= last),
            pairs=tuple(one for one in view.pairs if one.step <= last),
            samples=tuple(one for one in view.samples if one["step"] <= last),
            metrics={
                stage: {
                    name: type(line)(line.steps[line.steps <= last], line.values[line.steps <= last])
                    for name, line in lines.items()
                }
                for stage, lines in view.metrics.items()
            },
        )
        assert CHECK(cut).onset == (whole if last >= whole else None)


def test_too_little_says_what_is_missing() -> None:
    nothing = View(name="", facts={}, metrics={})
    found = CHECK(nothing)
    assert found.status == "not_checked" and "no probe pairs" in found.summary
    rows = replace(
        nothing,
        facts={"length_reward/score_slope": with_metrics(nothing, "policy", {"x": [0.1] * 9}).metrics["policy"]["x"]},
    )
    assert "across prompts" in CHECK(rows).summary and CHECK(rows).status == "not_checked"


def test_slopes_of_rows_are_least_squares() -> None:
    step = Made(3).rows()
    found = facts(step)
    weights = step.weights[:, None, :] * step.rewards
    reward = sum(weights[..., at].sum(axis=1) for at, name in enumerate(step.channels) if name != "kl")
    expected = np.polyfit(step.lengths.astype(float), np.asarray(reward, dtype=float), 1)[0]
    assert found["length_reward/score_slope"] == pytest.approx(expected, rel=1e-6)
    within = replace(step, group=np.arange(len(step)) // 4)
    slopes = facts(within)
    length, worth = step.lengths.astype(float), np.asarray(reward, dtype=float)
    top = bottom = 0.0
    for group in range(len(step) // 4):
        rows = slice(4 * group, 4 * group + 4)
        around = length[rows] - length[rows].mean()
        top += float((around * worth[rows]).sum())
        bottom += float((around**2).sum())
    assert slopes["length_reward/score_slope"] == pytest.approx(top / bottom, rel=1e-9)
    assert slopes["length_reward/within"] == 1


@dataclass(frozen=True)
class Several(Made):
    """Four responses to each prompt."""

    def rows(self) -> StepTrace:
        rows = super().rows()
        return replace(rows, group=np.arange(len(rows)) // 4)


def several(per_token: float, shorter: float, kind: type[Made] = Several) -> Finding:
    """Thirty steps of which the responses grow as EOS gets less likely, with so much reward a token."""
    steps = [kind(step, per_token=per_token, end=1.0 - shorter * min(step, 15) / 15, beta=0.1) for step in range(30)]
    return CHECK(view_of_steps(CHECK, steps))


def test_rows_of_several_responses_show_what_length_is_paid() -> None:
    found = several(0.15, 0.8)
    assert found.status == "fail" and "Among responses to the same prompt" in found.summary
    assert found.onset is not None and 9 <= found.onset <= 20
    slope = {one.name: one.value for one in found.evidence}["slope of the reward on length"]
    assert slope == pytest.approx(0.15, abs=0.1)


def test_rows_need_payment_growth_and_the_same_prompt() -> None:
    assert several(0.15, -0.3).status != "fail"  # paid, not longer
    assert several(0.0, 0.8).status != "fail"  # longer, not paid
    assert several(0.15, 0.8, Made).status == "not_checked"  # across prompts: they may need their length


def test_rows_are_not_asked_where_there_are_probes() -> None:
    view = Story(seed=0).view()
    paid = view_of_steps(CHECK, [Several(step, per_token=0.15, end=1.0 - min(step, 15) / 20) for step in range(30)])
    assert CHECK(replace(view, facts={**view.facts, **paid.facts})) == CHECK(view)
