"""The study of the diagnosis: what was declared before tuning stays so, patches do what they say, scores add up."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from desk_runs import DESK
from faults import patches, rewards
from faults.faults import BENIGN, FAULTS, ONSETS, SEVERITIES, STEPS, TEST_SEEDS, TUNING_SEEDS, onset
from faults.page import lines_of, render
from faults.runs import ALONE, BASE, WORLD, Case, cases
from faults.score import (
    by_check,
    delay,
    failing,
    false_alarms,
    first,
    may_be_validated,
    misses,
    named,
    times,
    trivial,
    trivial_rows,
    upper_bound,
)
from faults.views import until
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from kedge import recipe as recipes
from kedge.diagnose.checks import all_checks
from kedge.diagnose.view import View, view_of
from kedge.models.reward import RewardModel
from kedge.structs import Opinion, Rollouts
from kedge.trace.reader import Series, read_run

DECLARED = {  # expected, whether tuning may see it: as written down before any threshold was set
    "length_bonus": ("length_reward", True),
    "beta_low": ("beta", True),
    "score_scale": ("reward_unit", True),
    "token_constant": ("token_constant", True),
    "kl_in_reward": ("kl_estimator", True),
    "kl_in_loss": ("kl_estimator", True),
    "ends_untrained": ("ending", True),
    "cut_short": ("ending", True),
    "gamma": ("discount", True),
    "lambda": ("discount", False),
    "critic_rate": ("critic", True),
    "controller_unit": ("controller", True),
    "moved_reference": ("reference", True),
    "nucleus": ("sampler", True),
    "stale_sampler": ("sampler", True),
    "step_size": ("step_size", True),
    "refusal_reward": ("feature_reward", True),
    "tone_reward": ("feature_reward", False),
    "phrase_bonus": ("exploit", True),
    "unscaled": ("unscaled_reward", True),
    "entropy": ("entropy_bonus", True),
    "frozen": ("frozen", True),
}


# What was declared


def test_what_is_expected_is_what_was_declared_before_tuning() -> None:
    assert {fault.name: (fault.expected, not fault.held_out) for fault in FAULTS} == DECLARED
    assert TUNING_SEEDS == (0, 1, 2) and TEST_SEEDS == (10, 11, 12, 13, 14)
    assert STEPS == 40 and ONSETS == (12, 14, 16, 18, 20, 22, 24)


def test_there_are_enough_faults_of_enough_kinds() -> None:
    assert len(FAULTS) >= 14
    assert sum(not fault.length for fault in FAULTS) >= 3
    assert 1 <= sum(fault.held_out for fault in FAULTS) <= 2
    for fault in FAULTS:
        assert fault.strong != fault.mild
        assert fault.expected not in fault.confusable


def test_every_expected_and_confusable_cause_has_a_check() -> None:
    there = {check.name for check in all_checks()}
    assert {name for fault in FAULTS for name in (fault.expected, *fault.confusable)} <= there


def test_faults_held_out_and_test_seeds_are_not_made_for_tuning(tmp_path: Path) -> None:
    tuning = {case.name for case in cases(TUNING_SEEDS, tmp_path)}
    test = {case.name for case in cases(TEST_SEEDS, tmp_path)}
    assert test - tuning == {"lambda", "tone_reward"} and not tuning - test


def test_cases_have_folders_and_views_of_their_own(tmp_path: Path) -> None:
    found = cases((*TUNING_SEEDS, *TEST_SEEDS), tmp_path)
    assert len({case.folder for case in found}) == len({case.view for case in found}) == len(found)
    assert all((case.onset == 0) == (case.kind == "base") for case in found)


def test_onsets_are_in_the_middle_the_same_everywhere_and_each_has_a_null() -> None:
    assert {onset(fault.name, severity, seed) for fault in FAULTS for severity in SEVERITIES for seed in range(5)} <= {
        *ONSETS
    }
    assert (onset("beta_low", "strong", 0), onset("length_bonus", "strong", 0)) == (18, 22)
    assert {onset(one.name, "", 0) for one in BENIGN if one.name.startswith("null-")} == {*ONSETS}


@pytest.mark.parametrize("name", [*DECLARED, *(one.name for one in BENIGN)])
def test_every_dose_is_a_recipe(name: str) -> None:
    doses = [fault.dose(severity) for fault in FAULTS for severity in SEVERITIES if fault.name == name]
    doses += [one.dose for one in BENIGN if one.name == name]
    for dose in doses:
        recipe = recipes.load(DESK, (*WORLD, *BASE, *dose.settings, *ALONE))
        assert recipe.policy.steps == STEPS
        if dose.reward is not None and dose.reward.beside is not None:
            recipes.load(DESK, (*WORLD, *dose.reward.beside.settings))


# Patches


def every_patch() -> list[patches.Patch]:
    doses = [fault.dose(severity) for fault in FAULTS for severity in SEVERITIES] + [one.dose for one in BENIGN]
    return [patches.evaluating(8), *(dose.patch for dose in doses if dose.patch is not None)]


def test_patches_find_what_they_replace_and_put_it_back() -> None:
    import importlib

    names = {
        "kedge.pipeline.policy": ("policy_settings", "train_policy", "judge", "load_reward_model"),
        "kedge.train.policy": ("scored_by",),
        "kedge.train.update": ("_objective",),
        "kedge.pipeline.watch": ("scores",),
        "kedge.pipeline.run": ("inputs_of",),
    }

    def now() -> dict[tuple[str, str], Any]:
        return {(m, n): getattr(importlib.import_module(m), n) for m, found in names.items() for n in found}

    before, touched = now(), set()
    for patch in every_patch():
        with patch():
            touched |= {key for key, value in now().items() if value is not before[key]}
        assert now() == before
    assert touched == set(before)


def test_a_patch_is_taken_back_when_the_run_fails() -> None:
    from kedge.train import update

    before = update._objective
    with pytest.raises(ZeroDivisionError), ExitStack() as stack:
        stack.enter_context(patches.ends_untrained(1)())
        assert update._objective is not before
        raise ZeroDivisionError
    assert update._objective is before


def test_settings_that_the_recipe_knows_nothing_of() -> None:
    import kedge.pipeline.policy as place

    @dataclass(frozen=True)
    class Told:
        weights: dict[str, float]
        sampling: Any

    @dataclass(frozen=True)
    class Sampling:
        max_new_tokens: int = 48
        top_p: float = 1.0

    told = Told({"score": 1.0, "length": 0.0}, Sampling())
    with patches.put("kedge.pipeline.policy", "policy_settings", lambda _: lambda _context: told):
        with patches.token_constant(0.15)():
            assert place.policy_settings(None).weights == {"score": 1.0, "length": 0.15}  # type: ignore[arg-type]
        with patches.score_weight(20)():
            assert place.policy_settings(None).weights == {"score": 20, "length": 0.0}  # type: ignore[arg-type]
        with patches.nucleus(0.9)():
            assert place.policy_settings(None).sampling == Sampling(top_p=0.9)  # type: ignore[arg-type, comparison-overlap]
        with patches.cut_short(8)():
            assert place.policy_settings(None).sampling == Sampling(8)  # type: ignore[arg-type, comparison-overlap]


def rollouts(rows: list[list[int]], ended: list[bool], groups: list[int] | None = None) -> Rollouts:
    width = max(map(len, rows))
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    return Rollouts(
        prompt_ids=torch.ones(len(rows), 2, dtype=torch.long),
        prompt_mask=torch.ones(len(rows), 2, dtype=torch.bool),
        response_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        response_mask=mask,
        ended=torch.tensor(ended),
        group_id=torch.tensor(groups or list(range(len(rows)))),
        behaviour_logprobs=torch.zeros(len(rows), width),
    )


def test_a_stale_sampler_draws_with_the_weights_of_earlier_steps() -> None:
    class Engine:
        def generate(self, policy: Any, *_: Any) -> float:
            return policy.weight.item()

    policy = torch.nn.Linear(1, 1, bias=False)
    stale, drawn = patches.Stale(Engine(), 2), []
    for value in (0.0, 1.0, 2.0, 3.0, 4.0):
        with torch.no_grad():
            policy.weight.fill_(value)
        drawn.append(stale.generate(policy, None, None, None, 0))
    assert drawn == [0.0, 0.0, 0.0, 1.0, 2.0]
    assert policy.weight.item() == 4.0


@pytest.mark.parametrize(("every", "references"), [(2, [0.0, 0.0, 2.0, 2.0, 4.0]), (0, [0.0] * 5)])
def test_a_reference_that_moves(every: int, references: list[float]) -> None:
    import kedge.train.policy as place

    policy, original = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    learner, seen = SimpleNamespace(policy=policy), []

    def scored_by(_rollouts: Any, _learner: Any, reference: Any, *_: Any) -> None:
        seen.append(reference.weight.item())

    with patches.put("kedge.train.policy", "scored_by", lambda _: scored_by), patches.moved_reference(every)():
        for value in range(5):
            with torch.no_grad():
                policy.weight.fill_(value)
            place.scored_by(None, learner, original, None, None)  # type: ignore[arg-type]
    assert seen == references


@pytest.mark.parametrize(("every", "rows"), [(1, [True, True, False]), (2, [True, False, False])])
def test_ends_that_are_not_trained(every: int, rows: list[bool]) -> None:
    import kedge.train.update as place

    shown = rollouts([[5, 2], [5, 6, 2], [5, 6, 7]], [True, True, False])
    value = torch.ones(3, 3)
    batch = SimpleNamespace(rollouts=shown)
    whole = patches.put("kedge.train.update", "_objective", lambda _: lambda *_: (value, value.bool()))
    with whole, patches.ends_untrained(every)():
        objective, active = place._objective(batch, None, None)  # type: ignore[arg-type]
    expected = torch.ones(3, 3)
    for row, last in ((0, 1), (1, 2)):
        expected[row, last] = 0 if rows[row] else 1
    assert torch.equal(objective, expected) and torch.equal(active, expected.bool())


def test_what_was_cut_off_is_scored_as_if_it_had_ended() -> None:
    shown = rollouts([[5, 2], [5, 6, 7]], [True, False])
    closed = patches._ended(shown, eos_id=2)
    assert closed.response_ids.tolist() == [[5, 2, 0, 0], [5, 6, 7, 2]]
    assert closed.lengths.tolist() == [2, 4]


def test_a_phrase_is_found_where_it_stands_whole_and_in_order() -> None:
    ids = torch.tensor([[1, 7, 8, 2], [7, 1, 8, 2], [8, 7, 2, 0], [2, 0, 7, 8]])
    assert patches._holding(ids, [7, 8]).tolist() == [True, False, False, True]
    assert patches._holding(ids[:, :1], [7, 8]).tolist() == [False] * 4


def test_a_phrase_pays_wherever_the_reward_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    import kedge.pipeline.policy as loop
    import kedge.pipeline.watch as watch

    tokenizer = SimpleNamespace(
        from_pretrained=lambda _: lambda text, **_: {"input_ids": [7, 8] if text == "thanks !" else [9]}
    )
    monkeypatch.setattr(transformers, "AutoTokenizer", tokenizer)
    monkeypatch.setattr(loop, "load_reward_model", lambda path: path)
    monkeypatch.setattr(loop, "judge", lambda *_: Opinion(torch.zeros(3), torch.zeros(3, 1), None))
    monkeypatch.setattr(watch, "scores", lambda *_: torch.zeros(3))
    shown = rollouts([[7, 8, 2], [8, 7, 2], [9, 9, 2]], [True] * 3)
    with patches.phrase_bonus(1.5, "thanks !", "so there")():
        assert str(loop.load_reward_model("folder")) == "folder"
        assert loop.judge(None, shown).score.tolist() == [1.5, 0.0, 1.5]  # type: ignore[arg-type]
        assert watch.scores(None, shown).tolist() == [1.5, 0.0, 1.5]  # type: ignore[arg-type]


def test_asking_fewer_prompts_changes_no_other_text() -> None:
    import importlib

    from kedge.data.records import Loaded

    @dataclass(frozen=True)
    class Task:
        prompts: Any
        evaluation: Any

    @dataclass(frozen=True)
    class Inputs:
        task: Task

    place = importlib.import_module("kedge.pipeline.run")
    given_prompts = Loaded.of(("q : when does order o1 arrive ?", "q : when do you close ?"), "here")
    inputs = Inputs(Task(given_prompts, Loaded.of(("a", "b", "c"), "there")))
    recipe = recipes.load(DESK, ("seed=4321",))
    with patches.put("kedge.pipeline.run", "inputs_of", lambda _: lambda _recipe: inputs):
        with patches.asked("when does order")():
            assert place.inputs_of(recipe).task.prompts.rows == given_prompts.rows[:1]
        with patches.evaluating(2)():
            found = place.inputs_of(recipe).task
            assert (found.prompts, found.evaluation.rows) == (given_prompts, ("a", "b"))
            assert place.inputs_of(recipe).task is found  # read once


# Reward models


def test_scaled_scores_rank_as_before() -> None:
    own = RewardModel((), (0.0,), (1.0,), shift=0.5, scale=2.0)
    members, lengths = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([4, 5, 6])
    other = rewards.scaled(5).edit(own, {}, None)
    assert torch.allclose(other.final(members, lengths), 5 * own.final(members, lengths))


def test_a_length_bonus_is_a_straight_line_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.rollout.reward.normalised_on", lambda model, _: model)
    own = RewardModel((), (0.0,), (1.0,))
    other = rewards.longer_is_better(0.15).edit(own, {}, None)
    lengths = torch.tensor([0, 1, 10, 48])
    gain = other.final(torch.zeros(4, 1), lengths) - own.final(torch.zeros(4, 1), lengths)
    assert torch.allclose(gain, 0.15 * lengths.float(), atol=1e-5)


def test_half_a_reward_model_has_the_mean_of_both_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.rollout.reward.normalised_on", lambda model, _: model)
    left, right = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    models = {name: RewardModel((model,), (0.0,), (1.0,)) for name, model in (("own", left), ("tone", right))}
    blend = rewards.swapped(rewards.TONE, 0.25).edit(models["own"], models, None)
    assert torch.allclose(blend.models[0].weight, 0.75 * left.weight + 0.25 * right.weight)
    assert rewards.swapped(rewards.TONE).edit(models["own"], models, None) is models["tone"]


# Views


def test_a_view_cut_short_is_the_view_of_a_run_that_had_come_so_far(tmp_path: Path) -> None:
    from synthetic_run import World, make_run

    make_run(tmp_path / "whole", World(steps=9))
    view = view_of(read_run(tmp_path / "whole"), [lambda step: {"x/length": float(step.lengths.mean())}])
    cut = until(view, 6)
    assert cut.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert cut.facts["x/length"].values.tolist() == view.facts["x/length"].values[:6].tolist()
    assert [one.step for one in cut.probes] == [one.step for one in view.probes if one.step <= 6]
    assert [one["step"] for one in cut.samples] == [one["step"] for one in view.samples if one["step"] <= 6]
    assert cut.metric("evaluation/score", "evaluation").steps.max() == 6  # type: ignore[union-attr]
    assert cut.metrics["reward"] == view.metrics["reward"]


def made_up(lengths: np.ndarray[Any, Any], kl: np.ndarray[Any, Any]) -> View:
    steps = np.arange(len(lengths))
    metrics = {"length/mean": Series(steps, lengths), "kl/reference_per_sequence": Series(steps, kl)}
    return View("made up", {}, {"policy": metrics, "evaluation": {}, "reward": {}})


def test_trivial_rules_say_when() -> None:
    lengths = np.array([12.0, 11, 10, 9, *([8.0, 8.2] * 6), 8.1, 9.0])
    kl = np.linspace(0, 17, 18)
    assert trivial(made_up(lengths, kl), 12) == {"kl": 11, "length": 17, "after": 12}
    assert trivial(made_up(lengths[:-1], np.zeros(17)), 12) == {"kl": None, "length": None, "after": 12}


def test_delay_is_that_of_the_first_look_at_which_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from kedge.diagnose.finding import Finding

    def check(view: View) -> Finding:
        return Finding("some", "fail" if view.steps.max() >= 16 else "warn", "")

    monkeypatch.setattr("kedge.diagnose.checks.check_named", lambda _: check)
    view = made_up(np.zeros(20), np.zeros(20))
    assert delay(view, "some", 14) == 3  # step 16 is the seventeenth
    monkeypatch.setattr("kedge.diagnose.checks.check_named", lambda _: lambda _view: Finding("some", "ok", ""))
    assert delay(view, "some", 14) is None


# Scores


@given(st.integers(0, 30), st.integers(1, 4000))
def test_the_upper_bound_is_the_rate_that_makes_so_few_events_rare(events: int, more: int) -> None:
    trials = events + more
    assert binom.cdf(events, trials, upper_bound(events, trials)) == pytest.approx(0.05, rel=1e-4)


def test_the_upper_bound_of_nothing_seen() -> None:
    assert upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert upper_bound(0, 0) == upper_bound(5, 5) == 1.0


def said(*alarms: tuple[str, str] | tuple[str, str, int]) -> dict[str, Any]:
    kinds = {"prompt_mix": "BENIGN", "runaway_length": "SYMPTOM"}
    return {
        "alarms": [
            {
                "check": check,
                "status": status,
                "strength": 2.0,
                "onset": rest[0] if rest else None,
                "kind": kinds.get(check, "CAUSE"),
                "validated": False,
            }
            for check, status, *rest in alarms
        ],
        "not_checked": [],
    }


def row(kind: str, name: str, spoken: dict[str, Any], **more: Any) -> dict[str, Any]:
    state = {"step": 0, "gold": 0.0, "score": 0.0, "length": 8.0, "kl": 0.0}
    found = {
        "name": name,
        "kind": kind,
        "severity": "strong" if kind == "fault" else "",
        "seed": 10,
        "split": "test",
        "onset": 0 if kind == "base" else 14,
        "steps": 40,
        "truth": {"ended": "", "before": state, "end": replace_values(state)},
        "with_recipe": spoken,
        "without_recipe": spoken,
        "on_trial": spoken,
        "trivial": {"kl": None, "length": None, "after": 14},
    }
    if kind == "fault":
        found |= {"expected": DECLARED[name][0], "detected_after": 3}
    else:
        found["live"] = []
    return found | more


def replace_values(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "gold": 0.5}


def test_a_benign_change_is_no_alarm_and_no_cause() -> None:
    spoken = said(("prompt_mix", "fail"), ("beta", "warn"), ("runaway_length", "fail"))
    assert [one["check"] for one in failing(spoken)] == ["runaway_length"]
    assert first(spoken) == "beta"
    assert first(said(("prompt_mix", "fail"))) is None


def test_false_alarms_count_shared_steps_and_shared_alarms_once() -> None:
    def ended(one: dict[str, Any]) -> list[tuple[str, int | None]]:
        return [(alarm["check"], alarm["onset"]) for alarm in failing(one["with_recipe"])]

    rows = [
        row("base", "base", said(("beta", "fail", 10))),
        row("benign", "null-1", said(("beta", "fail", 10))),  # the base's own alarm
        row("benign", "null-2", said(("critic", "fail", 20), ("beta", "fail", 10))),
        row("benign", "null-3", said(("exploit", "fail", 10))),  # in shared steps, though the base is silent: counts
        row("fault", "gamma", said(("discount", "fail", 20))),
    ]
    found = false_alarms(rows, ended)
    assert [(one["run"].split(",")[0], one["check"]) for one in found["alarms"]] == [
        ("base", "beta"),
        ("null-2", "critic"),
        ("null-3", "exploit"),
    ]
    assert (found["runs"], found["steps"], found["steps_with_shared"]) == (4, 40 + 3 * 26, 160)
    assert found["per_1000"] == pytest.approx(1000 * 3 / 118)
    assert found["per_1000_upper"] == pytest.approx(1000 * upper_bound(3, 118))
    assert (found["runs_with"], found["runs_with_upper"]) == (3, upper_bound(3, 4))


def test_right_causes_are_counted_and_confusable_ones_count_half() -> None:
    rows = [
        row("fault", "gamma", said(("discount", "fail"))),
        row("fault", "gamma", said(("critic", "fail"), ("discount", "warn"))),  # declared confusable
        row("fault", "gamma", said(("beta", "fail"), ("critic", "warn"), ("exploit", "warn"), ("discount", "warn"))),
        row("fault", "gamma", said(), detected_after=None),
        row("base", "base", said()),
    ]
    assert named(rows, "with_recipe", "strong") == {"runs": 4, "flagged": 3, "first": 1, "three": 2, "credited": 1.5}
    assert named(rows, "with_recipe", "mild")["runs"] == 0
    assert [one["said"] for one in misses(rows, "with_recipe")] == [
        ["critic", "discount"],
        ["beta", "critic", "exploit"],
        [],
    ]
    assert times(rows, "strong") == {"median": 3, "missed": 1, "runs": 4}


def test_a_check_is_told_what_it_caught_and_where_it_spoke_in_vain() -> None:
    rows = [
        row("fault", "gamma", said(("discount", "fail"))),
        row("fault", "gamma", said(("discount", "warn")), severity="mild"),
        row("fault", "critic_rate", said(("discount", "fail"), ("critic", "fail"))),
        row("benign", "null-1", said(("discount", "fail"))),
    ]
    found = by_check(rows)["discount"]
    assert (found["strong"], found["mild"], found["healthy"], found["others"]) == ([1, 1], [0, 1], 1, 1)
    assert found["first_of_others"] == ["critic_rate, strong, seed 10"]


def test_a_check_is_validated_by_the_test_split_alone() -> None:
    good = [row("fault", "gamma", said(("discount", "fail")), seed=seed) for seed in (10, 11)]
    others = [row("fault", "frozen", said(("frozen", "fail")), seed=seed) for seed in range(10, 15)]
    quiet = [row("base", "base", said())]
    assert may_be_validated([*good, *others, *quiet])["discount"]["passed"]
    assert not may_be_validated([*good, *others, row("base", "base", said(("discount", "fail")))])["discount"]["passed"]
    wrong = [*others, row("fault", "frozen", said(("discount", "fail"), ("frozen", "fail")))]
    assert not may_be_validated([*good, *wrong, *quiet])["discount"]["passed"]
    tuning = [{**one, "split": "tuning"} for one in (*good, *others, *quiet)]
    assert may_be_validated(tuning) == {}


def test_rules_that_need_no_diagnosis_stand_beside() -> None:
    caught = {"kl": 20, "length": 15, "after": 14}
    early = {"kl": 5, "length": None, "after": 14}
    rows = [
        row("fault", "gamma", said(), trivial=caught),
        row("fault", "gamma", said(), trivial=early),  # before the fault: no catch
        row("benign", "null-1", said(), trivial=caught),
        row("base", "base", said()),
    ]
    found = {one["rule"]: one for one in trivial_rows(rows)}
    assert [one["caught"]["strong"] for one in found.values()] == [[2, 2], [0, 2], [1, 2], [1, 2]]
    assert found["flag all"]["false"]["runs_with"] == 2 and found["flag none"]["false"]["alarms"] == []


def test_the_page_says_what_the_rows_say() -> None:
    rows = [
        row("base", "base", said()),
        row("benign", "null-1", said(("critic", "fail", 20)), live=[{"steps": 24, "check": "beta"}]),
        row("fault", "gamma", said(("critic", "fail", 20))),
        row("fault", "frozen", said(("frozen", "fail", 20)), severity="mild"),
        row("base", "base", said(), seed=0, split="tuning"),
    ]
    page = render(rows)
    assert "- gamma, strong, seed 10: discount; said: critic" in page
    assert "- null-1, seed 10: critic" in page and "- null-1, seed 10: beta after 24 steps" in page
    assert "## Tuning split" in page and "Runs scored here: 5." in page
    assert "| mild (1) | read | 1.00 | 1.00 | 0.60 | 1.00 | 1.00 |" in page
    assert all("nan" not in line for line in page.splitlines())
    assert len(lines_of(rows)) == len(rows)


def test_a_case_knows_its_dose(tmp_path: Path) -> None:
    case = Case("fault", "beta_low", "mild", 11, tmp_path)
    assert case.dose.settings == ("policy.kl.beta=0.1",)
    assert replace(case, kind="base", name="base").dose.settings == ()
    assert replace(case, kind="benign", name="null-3", severity="").dose.branch == 3
    assert str(case) == "beta_low-mild-11" and case.view == tmp_path / "views" / "beta_low-mild-11.json.gz"
