"""The over-optimisation study: what it consists of, what it makes of runs in which a law holds, and its command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge import cli
from kedge.errors import InputError
from kedge.experiment import overoptimisation
from kedge.experiment.laws import gain
from kedge.experiment.overoptimisation import jobs, lines, study
from kedge.experiment.plan import Given, Judge, Plan, plan
from kedge.experiment.points import collected
from kedge.experiment.samples import Samples
from kedge.progress import Interrupt, Progress
from kedge.report.study import write_study
from kedge.trace.jsonl import append_json
from kedge.trace.run_dir import RunDir

DEMO = Given((Path(cli.__file__).parents[1] / "desk" / "demo.toml").read_text(encoding="utf-8"), "demo")
TINY = """
name = "tiny"
[desk]
demonstrations = 200
[model]
hidden = 16
layers = 1
heads = 2
context = 80
[sft]
steps = 6
batch_size = 16
[pairs]
prompts = 40
[reward]
epochs = 1
[policy]
steps = 6
prompts_per_step = 8
max_new_tokens = 8
[evaluate]
prompts = 12
"""
ALPHA, BETA = 1.4, 0.9


def test_the_plan_of_the_demo() -> None:
    found = plan(DEMO, seeds=3, quick=False)
    labels = [(500, 64), (2000, 64), (5000, 64)]
    assert [(judge.labels, judge.hidden) for judge in found.judges] == [*labels, (5000, 32), (5000, 16)]
    assert found.main == Judge(5000, 64)
    assert [run for run in found.runs() if run[0] == found.main] == [
        (found.main, beta) for beta in (0.02, 0.05, 0.2, 0.4)
    ]
    assert {beta for judge, beta in found.runs() if judge != found.main} == {0.05}
    assert found.seeds == (0, 1, 2)
    assert found.given.recipe(*found.settings(1)).evaluate.every == 4


def test_every_job_comes_after_what_it_needs_and_the_quick_study_is_smaller() -> None:
    whole, quick = (jobs(plan(DEMO, seeds=3 - 2 * fast, quick=bool(fast)), Path("out")) for fast in (0, 1))
    for found in (whole, quick):
        names = [job.name for job in found]
        assert len(set(names)) == len(names)
        assert all(names.index(needed) < names.index(job.name) for job in found for needed in job.needs)
    assert (len(whole), len(quick)) == (3 * (3 + 5 + 1 + 8), 2 + 3 + 1 + 4)
    needs = {job.name: job.needs for job in whole}
    assert needs["labels-500-width-64-beta-0.05-2"] == ("labels-500-width-64-2",)
    assert set(needs["labels-5000-width-16-1"]) == {"sft-1", "sft-width-16-1"}
    assert len(needs["samples-1"]) == 5


def test_a_world_that_does_not_know_gold_is_refused() -> None:
    given = Given('world = "files"\n[data]\ndemonstrations = "d"\npreferences = "p"\n', "mine.toml")
    with pytest.raises(InputError, match="over-optimisation cannot be seen"):
        plan(given, seeds=1, quick=False)


def made_up(folder: Path, seeds: int = 3) -> tuple[Plan, dict[str, Any]]:
    """A finished study in which policies follow the law of Gao et al.; those of 2000 labels end at once."""
    planned = plan(DEMO, seeds=seeds, quick=False)
    samples = {}
    for seed in planned.seeds:
        rng = np.random.default_rng(seed)
        gold = rng.normal(size=(40, 96))
        scores = {judge.name: gold + rng.normal(size=gold.shape) for judge in planned.judges}
        logprobs = rng.normal(-20, 1, size=gold.shape)
        truth = {"gold": gold, "correct": (gold > 0).astype(float)}
        samples[seed] = Samples(scores, logprobs, np.full(gold.shape, 9.0), truth)
        for judge, beta in planned.runs():
            run = RunDir(folder / f"{judge.name}-{beta}-{seed}")
            for step in range(0, 3 if judge.labels == 2000 else 37, 2):
                d = 0.3 * np.sqrt(step) / np.sqrt(beta) ** 0.5
                line = {"evaluation/kl_per_sequence": d**2, "evaluation/length": 10.0 + step}
                line["evaluation/score"] = scores[judge.name].mean() + 0.5 * d
                append_json(run.metrics, {"stage": "evaluation", "step": step, **line})
                worth = float(gain("rl", ALPHA, BETA, d)) + 0.01 * rng.normal()
                append_json(run.truth, {"step": step, "gold": gold.mean() + worth, "correct": 0.5})
            append_json(run.metrics, {"stage": "policy", "step": 0})
    return planned, collected(planned, samples, lambda j, b, s: RunDir(folder / f"{j.name}-{b}-{s}"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made_up(tmp_path_factory.mktemp("study"))[1]


def test_the_law_of_the_policies_is_found(found: dict[str, Any]) -> None:
    law = next(law for law in found["laws"] if law["what"] == "policies at every beta")
    assert law["alpha"]["value"] == pytest.approx(ALPHA, abs=0.02)
    assert law["beta"]["value"] == pytest.approx(BETA, abs=0.02)
    assert law["alpha"]["low"] < ALPHA < law["alpha"]["high"]
    assert law["peak"]["value"] == pytest.approx(np.exp(ALPHA / BETA - 1), abs=0.05) and law["turns"]


def test_too_short_runs_are_named_and_not_fitted(found: dict[str, Any]) -> None:
    refused = [law for law in found["laws"] if "refused" in law]
    assert [(law["labels"], law["hidden"]) for law in refused] == [(2000, 64)]
    assert "a law needs 5" in refused[0]["refused"]
    assert any("no law fitted: 1 different d" in line for line in lines(found))


def test_the_best_of_n_is_unbiased_and_pays_the_usual_kl(found: dict[str, Any]) -> None:
    """Score and gold are normal with correlation 1 / sqrt 2, so that gold gains half of what the score does; answers
    are unlikely, so that the KL is log n - (n - 1) / n."""
    mine = [p for p in found["points"] if p["optimiser"] == "best_of_n" and p["labels"] == 500]
    assert {p["strength"] for p in mine} == {2, 4, 8, 16, 32, 64}
    for point in mine:
        assert point["kl"] == pytest.approx(np.log(point["strength"]) - 1 + 1 / point["strength"], abs=1e-3)
        assert point["gold"] == pytest.approx(point["proxy"] / 2, abs=0.2)
        if point["efficiency"] is not None and point["kl"] < 2:
            assert 0.75 < point["efficiency"] < 1.02
    two = np.mean([p["proxy"] for p in mine if p["strength"] == 2])
    assert two == pytest.approx(np.sqrt(2) / np.sqrt(np.pi), abs=0.06)  # E max of two normal numbers of variance 2
    laws = [law for law in found["laws"] if law["form"] == "best_of_n"]
    assert len(laws) == 5 and all(law["alpha"]["low"] < law["alpha"]["value"] < law["alpha"]["high"] for law in laws)


def test_ends_say_where_gold_was_highest(found: dict[str, Any]) -> None:
    row = next(row for row in found["ends"] if row["optimiser"] == "policy" and row["strength"] == 0.02)
    turn = np.exp(ALPHA / BETA - 1)
    assert row["highest_at"][0] == pytest.approx(turn, abs=0.5)
    assert row["gold"][0] < row["highest_gold"][0]
    assert row["length"] == [46, 46, 46]
    assert len(found["ends"]) == 8 + 5


def test_the_page_holds_all_it_shows(found: dict[str, Any], tmp_path: Path) -> None:
    page = write_study(json.loads(json.dumps(overoptimisation._plain(found))), tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    assert page.count('<svg class="plot"') == 7
    assert "beta 0.02" in page and "5000 labels, width 16" in page and "not fitted" in page
    text = (tmp_path / "overoptimisation.md").read_text(encoding="utf-8")
    assert "| policy, beta 0.02 |" in text and "| best of 64 |" in text and "nan" not in text


def test_another_study_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(plan(DEMO, seeds=2, quick=True).described()))
    with pytest.raises(InputError, match="began with other settings"):
        study(plan(DEMO, seeds=1, quick=True), tmp_path, workers=1, resume=True,
              progress=Progress(quiet=True), interrupt=Interrupt())  # fmt: skip


def test_samples_come_back_as_they_were_saved(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4))
    samples = Samples({"a b": values, "c": -values}, values - 9, values + 5, {"gold": 2 * values})
    samples.save(tmp_path / "samples.npz")
    again = Samples.load(tmp_path / "samples.npz")
    np.testing.assert_array_equal(again.scores["a b"], values)
    np.testing.assert_array_equal(again.truth["gold"], 2 * values)
    np.testing.assert_array_equal(again.logprobs, values - 9)
    assert list(again.scores) == ["a b", "c"] and [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.toml"], "there is no such recipe"),
        (["--seeds", "0"], "--seeds"),
        (["--out", "taken"], "is not empty"),
        (["--out", "taken", "--resume"], "no run of Kedge to resume"),
    ],
)
def test_what_cannot_be_carried_out_is_told(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert cli.main(["study", "overoptimisation", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_starts_without_torch() -> None:
    call = "main(['study', 'overoptimisation', '--help'])"
    program = f"import sys; from kedge.cli import main; {call}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_a_study_from_beginning_to_end_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    command = ["study", "overoptimisation", str(recipe), "--quick", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(result["report"]).exists() and result["seeds"] == [0]
    written = json.loads((tmp_path / "out" / "overoptimisation.json").read_text())
    assert {point["optimiser"] for point in written["points"]} == {"policy", "best_of_n"}
    samples = Samples.load(tmp_path / "out" / "samples-0.npz")
    assert {values.shape for values in (*samples.scores.values(), *samples.truth.values())} == {(12, 64)}
    assert list(samples.scores) == ["labels-16-width-16", "labels-40-width-16", "labels-40-width-8"]
    assert {"gold", "correct"} <= set(samples.truth)
    assert (samples.logprobs < 0).all() and (samples.lengths >= 1).all() and (samples.lengths <= 8).all()
    # What is done is left alone; what is missing is made again, and comes out the same.
    (tmp_path / "out" / "done" / "samples-0.done").unlink()
    assert cli.main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "out" / "overoptimisation.json").read_text()) == written
    assert cli.main(command) == 2
