"""Trials: what they say of forks whose figures are known, what they carry out, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import stage_lines

from kedge.errors import InputError, Interrupted
from kedge.experiment import trial as trials
from kedge.experiment.effects import Measured, compared, measured, over_prompts, over_seeds, said
from kedge.experiment.jobs import Job
from kedge.progress import Interrupt, Progress
from kedge.trace.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("small_desk")
N = 40
BETA = ("policy.kl.mode=fixed", "policy.kl.beta=0.7")


# What is said of figures that are known


def fork(rng: np.random.Generator, *, length: float = 10.0, seed: float = 0.0, gold: float = 1.0) -> Measured:
    lengths = np.arange(N) % 7 + length + seed + 0.1 * rng.normal(size=N)
    quality = rng.normal(size=N)
    return Measured(
        by_prompt={"score": quality, "kl": np.ones(N), "length": lengths, "win_rate": (quality > 0).astype(float)},
        reference={"score": np.zeros(N), "length": np.full(N, 9.0)},
        whole={"entropy": 2.0 + 0.01 * rng.normal()},
        margins=np.linspace(-1, 1, 12) + seed,
        truth={"gold": gold + 0.01 * rng.normal()},
    )


def rows_of(nulls: Sequence[Measured], changed: Sequence[Measured], **named: Any) -> dict[str, dict[str, Any]]:
    return {row["figure"]: row for row in compared(nulls, changed, **named)}


def test_a_real_change_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    seeds = 3 * rng.normal(size=4)  # forks differ far more than arms do: only pairs show the change
    nulls = [fork(rng, seed=seed) for seed in seeds]
    changed = [fork(rng, length=8.0, seed=seed) for seed in seeds]
    rows = rows_of(nulls, changed)
    row = rows["length"]
    assert row["caused"] and row["difference"] == pytest.approx(-2, abs=0.05)
    assert row["over_seeds"]["low"] < -2 < row["over_seeds"]["high"] < 0
    assert row["reference"] == 9.0 and len(row["differences"]) == 4
    assert not any(rows[name]["caused"] for name in ("score", "entropy", "gold", "net_margin", "kl"))
    assert rows["kl"]["over_seeds"] == {"low": 0.0, "high": 0.0}
    (sentence, still) = said(["policy.lr=1"], list(rows.values()))
    assert sentence.startswith("policy.lr=1 caused length to fall by 1.99 tokens") and "over 4 seeds" in sentence
    assert still.startswith("Not shown to move: score,") and "gold" not in still


def test_the_truth_is_a_row_of_its_own_and_marked() -> None:
    rng = np.random.default_rng(1)
    found = compared([fork(rng) for _ in range(3)], [fork(rng, gold=2.0) for _ in range(3)])
    assert [row["figure"] for row in found if row["truth"]] == ["gold"] and found[-1]["figure"] == "gold"
    assert any("gold (the built-in world's truth) to rise" in sentence for sentence in said(["a=1"], found))


def test_with_one_seed_nothing_is_caused() -> None:
    rng = np.random.default_rng(2)
    row = rows_of([fork(rng)], [fork(rng, length=99)])["length"]
    assert row["over_seeds"] is None and row["over_prompts"]["low"] > 80 and not row["caused"]


def test_seeds_that_differ_are_not_outvoted_by_many_prompts() -> None:
    """Each fork moved by several tokens, in one direction or another: over prompts certain, over seeds chance."""
    rng = np.random.default_rng(3)
    nulls = [fork(rng) for _ in range(3)]
    changed = [fork(rng, length=10 + gap) for gap in (5, -4, 2)]
    row = rows_of(nulls, changed)["length"]
    assert row["over_prompts"]["low"] > 0.5 and not row["caused"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_interval_over_seeds_is_students(count: int) -> None:
    quantile = {2: 12.7062, 3: 4.30265, 8: 2.36462}[count]  # of t at 97.5%, from a table
    values = np.random.default_rng(count).normal(size=count)
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    found = over_seeds(values)
    assert found is not None
    assert found["high"] - mean == pytest.approx(quantile * spread / math.sqrt(count), rel=1e-5)
    assert found["low"] + found["high"] == pytest.approx(2 * mean)


def test_of_forks_that_nothing_moved_one_in_twenty_is_excluded() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(4000, 5))
    outside = [not found["low"] <= 0 <= found["high"] for row in values if (found := over_seeds(row))]
    assert np.mean(outside) == pytest.approx(0.05, abs=0.012)


def test_too_few_prompts_have_no_interval() -> None:
    assert over_prompts(np.arange(5.0)) is None
    assert over_prompts(np.ones(30)) == {"low": 1.0, "high": 1.0}


def test_with_another_reward_model_both_arms_are_scored_by_the_runs() -> None:
    rng = np.random.default_rng(5)
    nulls = [fork(rng) for _ in range(2)]
    changed = [fork(rng).rescored(np.full(N, 0.5)) for _ in range(2)]
    assert "win_rate" not in changed[0].by_prompt
    rows = rows_of(nulls, changed, anew=True)
    assert rows["score"]["changed"] == 0.5 and rows["win_rate"]["changed"] == 1.0
    assert rows["score"]["note"] == rows["win_rate"]["note"] == "by the run's own reward model"
    assert "each arm's own" in rows["net_margin"]["note"] and rows["length"]["note"] == ""


def test_a_run_without_probes_has_no_net_margin() -> None:
    rng = np.random.default_rng(6)
    one = [replace(fork(rng), margins=np.zeros(0)) for _ in range(2)]
    assert "net_margin" not in rows_of(one, one)


# What is carried out


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs one after another in this process; returns the names of those that were done."""
    done: list[str] = []

    def carry_out(jobs: Sequence[Job], marks: Path, *, interrupt: Interrupt, **_: Any) -> None:
        marks.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            interrupt.check(job.name)
            assert all((marks / f"{needed}.done").exists() for needed in job.needs)
            if not (marks / f"{job.name}.done").exists():
                job.work(interrupt)
                (marks / f"{job.name}.done").touch()
                done.append(job.name)

    monkeypatch.setattr(trials, "carry_out_jobs", carry_out)
    return done


def carried(plan: trials.Plan, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    quiet = Progress(quiet=True)
    return trials.trial(plan, out, workers=1, resume=resume, progress=progress or quiet, interrupt=Interrupt())


class Noting(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_trial(source: Path, tmp_path: Path, in_turn: list[str]) -> None:
    progress = Noting()
    plan = trials.plan(source, 2, steps=2, seeds=2, arms=[BETA, ("policy.lr=0.01",)])
    found = carried(plan, tmp_path / "out", progress=progress)
    assert "6 forks: about" in progress.notes[0] and "MiB on disk" in progress.notes[0]
    assert in_turn == [f"{arm}-{branch}" for branch in (1, 2) for arm in ("null", "changed-0", "changed-1")]
    written = json.loads(trials.results_file(plan).read_text())
    assert trials.results_file(plan).parent == source / "trials"
    assert (written["from"], written["until"], written["seeds"], written["prompts"]) == (2, 4, 2, 16)
    assert [arm["changes"] for arm in written["arms"]] == [list(BETA), ["policy.lr=0.01"]]
    rows = {row["figure"]: row for row in written["arms"][1]["rows"]}
    ends = [stage_lines(tmp_path / "out" / name, "evaluation")[-1] for name in ("null-1", "changed-1-1")]
    gap = ends[1]["evaluation/kl_per_sequence"] - ends[0]["evaluation/kl_per_sequence"]
    assert rows["kl"]["differences"][0] == pytest.approx(gap, abs=1e-5)
    assert rows["entropy"]["null"] == pytest.approx(np.mean([
        stage_lines(tmp_path / "out" / f"null-{k}", "evaluation")[-1]["evaluation/entropy"] for k in (1, 2)
    ]))  # fmt: skip
    assert {"gold", "correct"} <= {name for name, row in rows.items() if row["truth"]}
    assert found["lines"][0].startswith("drift, forked at step 2 for 2 steps")
    # Both arms of a branch draw the same: in the first step after the fork they are the same policy.
    null, changed = (stage_lines(tmp_path / "out" / name, "policy")[2] for name in ("null-2", "changed-1-2"))
    assert null["score/mean"] == changed["score/mean"]


def test_a_stopped_trial_goes_on_and_seeds_may_be_added(source: Path, tmp_path: Path, in_turn: list[str]) -> None:
    plan = trials.plan(source, 4, steps=1, seeds=1, arms=[("policy.lr=0.02",)])
    out = tmp_path / "out"
    out.mkdir()
    stopped = Interrupt()
    stopped.requested = True
    with pytest.raises(Interrupted):
        trials.trial(plan, out, workers=1, resume=False, progress=Progress(quiet=True), interrupt=stopped)
    assert not trials.results_file(plan).exists()
    first = carried(plan, out, resume=True)
    assert in_turn == ["null-1", "changed-0-1"]
    assert any("nothing is called caused" in note for note in first["notes"])
    more = trials.plan(source, 4, steps=1, seeds=2, arms=[("policy.lr=0.02",)])
    second = carried(more, out, resume=True)
    assert in_turn[2:] == ["null-2", "changed-0-2"] and more.name == plan.name
    assert second["arms"][0]["rows"][0]["differences"][0] == first["arms"][0]["rows"][0]["differences"][0]
    other = trials.plan(source, 4, steps=1, seeds=1, arms=[("policy.lr=0.03",)])
    with pytest.raises(InputError, match="began with other settings"):
        carried(other, out, resume=True)


def test_another_reward_model_is_trained_once(source: Path, tmp_path: Path, in_turn: list[str]) -> None:
    plan = trials.plan(source, 0, steps=1, seeds=2, arms=[("reward.epochs=2",)])
    assert trials.estimate(plan, 1).parts["reward models"] > 0
    found = carried(plan, tmp_path / "out")
    assert in_turn[0] == "reward-0"
    models = [tmp_path / "out" / name / "models/reward/model.safetensors" for name in ("reward-0", "changed-0-2")]
    assert models[0].stat().st_ino == models[1].stat().st_ino
    (arm,) = found["arms"]
    assert arm["retrained"] and any("trained once" in note for note in found["notes"])
    own = measured(tmp_path / "out" / "changed-0-1", 1).by_prompt["score"]
    with np.load(tmp_path / "out" / "changed-0-1" / trials.JUDGED) as judged:
        assert not np.allclose(judged["score"], own), "two reward models do not say the same"


def test_the_runs_judge_repeats_what_a_null_fork_was_told(source: Path, tmp_path: Path, in_turn: list[str]) -> None:
    """Scored once more under the same reward model, the answers of the last evaluation have the scores they had."""
    plan = trials.plan(source, 4, steps=1, seeds=1, arms=[("policy.lr=0.04",)])
    carried(plan, tmp_path / "out")
    run = tmp_path / "out" / "null-1"
    trials._judge_anew(plan.fork(None, 1, tmp_path), RunDir(run))
    with np.load(run / trials.JUDGED) as judged:
        np.testing.assert_allclose(judged["score"], measured(run, 5).by_prompt["score"], atol=1e-6)


def test_past_its_last_step_both_arms_go_on(source: Path) -> None:
    plan = trials.plan(source, 5, steps=3, seeds=1, arms=[("policy.lr=0.01",)])
    assert plan.settings == ("policy.steps=8",)
    assert all("policy.steps=8" in plan.fork(arm, 1, Path()).changes for arm in (None, 0))
    assert any("ends after 5 steps; both arms go on to 8" in note for note in trials._notes(plan, [False]))


def test_the_cost_grows_with_what_is_done(source: Path) -> None:
    one = trials.estimate(trials.plan(source, 2, steps=2, seeds=1, arms=[BETA]), 1)
    more = trials.estimate(trials.plan(source, 2, steps=2, seeds=3, arms=[BETA]), 1)
    assert (one.forks, more.forks) == (2, 6)
    assert more.seconds == pytest.approx(3 * one.seconds) and more.bytes == 3 * one.bytes
    assert trials.estimate(trials.plan(source, 2, steps=2, seeds=3, arms=[BETA]), 3).wall == pytest.approx(one.wall)
    assert "3 min" in trials.Cost(200, 170, 2**20, 2, {}).words()


@pytest.mark.parametrize(
    ("step", "arms", "said"),
    [
        (2, [], "needs a change"),
        (2, [()], "needs a change"),
        (1, [BETA], "there are 0, 2, 4, 5"),
        (2, [("trace.probes=4",)], "changes what is looked at"),
        (2, [("seed=3",)], "was settled before"),
        (2, [("policy.lr=0.0003",)], "has these settings already"),
        (2, [("policy.lr=fast",)], "policy.lr=fast"),
    ],
)
def test_what_cannot_be_tried_is_refused(step: int, arms: list[tuple[str, ...]], said: str, source: Path) -> None:
    with pytest.raises(InputError, match=said):
        trials.plan(source, step, steps=1, seeds=1, arms=arms)
