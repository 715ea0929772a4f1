"""The demo in small: its files, its JSON, and a demo that was stopped in either act."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from processes import RECIPE, Stop, assert_same, kedge, manifest, ran

from kedge.diagnose.correction import Proposal
from kedge.trace.reader import read_run

CORRECTION = ("policy.length_penalty=0.05", "policy.kl.target=0.05")
FIGURES = ("proxy", "gold", "kl_per_sequence", "length")


class Small:
    """The demo with a tiny recipe, and a rule that answers without looking: too little happens in five steps."""

    def __init__(self, recipe: Path, overrides: tuple[str, ...] = CORRECTION) -> None:
        self.recipe, self.overrides = recipe, overrides

    def __call__(self) -> None:
        import sys

        import kedge.pipeline  # noqa: F401 (the module is hidden by the function of its name)

        module = sys.modules["kedge.pipeline.demo"]
        proposal = Proposal(bool(self.overrides), "fail", (), self.overrides, ("score pays for length",), ())
        module.RECIPE, module.propose = self.recipe, lambda run: proposal


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    path = tmp_path_factory.mktemp("demo") / "demo.toml"
    path.write_text(RECIPE)
    return Small(path)


@pytest.fixture(scope="module")
def told(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = ran(folder, "demo", "--seed", "3", "--out", folder / "out", "--json", prepare=small)
    return folder / "out", done.stdout


def test_one_json_object_last_on_stdout(told: tuple[Path, str]) -> None:
    out, text = told
    (line,) = text.splitlines()
    found = json.loads(line)
    assert found["run_dir"] == str(out)
    assert Path(found["report"]) == out / "report.html"
    for act in ("drift", "corrected"):
        for name in FIGURES:
            assert len(found[act][name]) == 3
            assert all(isinstance(value, float) for value in found[act][name])
        assert Path(found[act]["run_dir"]) == out / act


def test_figures_are_those_of_the_fixed_evaluation_set(told: tuple[Path, str]) -> None:
    out, text = told
    for act in ("drift", "corrected"):
        found = json.loads(text)[act]
        evaluation = read_run(out / act).metrics("evaluation")
        truth = [json.loads(line) for line in (out / act / "truth" / "evaluation.jsonl").read_text().splitlines()]
        gold = [line["gold"] for line in truth]
        chosen = [0, gold.index(max(gold)), len(gold) - 1]
        assert found["gold"] == [gold[index] for index in chosen]
        for name, metric in (("proxy", "score"), ("kl_per_sequence", "kl_per_sequence"), ("length", "length")):
            values = evaluation[f"evaluation/{metric}"].values
            assert found[name] == [values[index] for index in chosen]


def test_two_runs_from_one_start(told: tuple[Path, str]) -> None:
    out, _ = told
    drift, corrected = (read_run(out / act) for act in ("drift", "corrected"))
    for model in ("sft", "reward"):
        one, other = (run.path / "models" / model / "model.safetensors" for run in (drift, corrected))
        assert one.read_bytes() == other.read_bytes()
    assert corrected.settings["policy"]["length_penalty"] == 0.05
    assert drift.settings["policy"]["length_penalty"] == 0
    assert manifest(corrected.path)["started_from"] == "drift"
    assert (drift.settings["seed"], corrected.settings["seed"]) == (3, 3)
    for stage in ("sft", "reward"):
        assert str(drift.metrics(stage)) == str(corrected.metrics(stage))
    first, other = (run.metrics("evaluation")["evaluation/score"].values for run in (drift, corrected))
    assert first[0] == other[0], "the same reference on the same prompts"
    assert first[-1] != other[-1]
    assert json.loads((out / "proposal.json").read_text())["overrides"] == list(CORRECTION)


def test_five_lines_and_the_path_of_the_report(small: Small, told: tuple[Path, str]) -> None:
    out, _ = told
    again = ran(out.parent, "demo", "--seed", "3", "--out", out, "--resume", prepare=small)
    *summary, last = again.stdout.splitlines()
    assert len(summary) == 5
    assert last == f"report: {out / 'report.html'}"


def test_without_drift_there_is_one_act(small: Small, tmp_path: Path) -> None:
    done = ran(tmp_path, "demo", "--out", tmp_path / "out", "--json", prepare=Small(small.recipe, ()))
    found = json.loads(done.stdout)
    assert found["corrected"] is None
    assert Path(found["report"]).is_file()
    assert not (tmp_path / "out" / "corrected").exists()


@pytest.mark.parametrize(
    ("within", "count"),
    [
        pytest.param("drift/metrics.jsonl", 9, marks=pytest.mark.slow),
        pytest.param("corrected/models/sft", 1, marks=pytest.mark.slow),
        ("corrected/metrics.jsonl", 11),
    ],
)
def test_a_demo_killed_in_either_act_goes_on(
    within: str, count: int, small: Small, told: tuple[Path, str], tmp_path: Path
) -> None:
    out, text = told
    arguments = ("demo", "--seed", "3", "--out", tmp_path / "out", "--json")
    killed = kedge(tmp_path, *arguments, stop=Stop(tmp_path / "out", within, count), prepare=small)
    assert killed.wait() == -signal.SIGKILL
    done = ran(tmp_path, *arguments, "--resume", prepare=small)
    for act in ("drift", "corrected"):
        assert_same(tmp_path / "out" / act, out / act)
    assert json.loads(done.stdout) == json.loads(text.replace(str(out), str(tmp_path / "out")))
