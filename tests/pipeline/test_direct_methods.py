"""Runs of DPO, IPO, online DPO, rejection and best-of-n: from start to end, stopped and resumed, on a user's pairs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import Stop, assert_same, kedge, lines, manifest, ran, stage_lines
from user_files import DEMONSTRATIONS, bring, write

from kedge import cli
from kedge.trace.reader import read_run
from kedge.trace.schema import describe

GROUPED = ("policy.samples_per_prompt=4",)
METHODS = {
    "dpo": ("policy.label_smoothing=0.1",),
    "ipo": ("policy.kl.beta=0.2",),
    "online_dpo": (*GROUPED, "policy.kl.mode=adaptive", "policy.kl.target=0.1", "policy.kl.horizon=40"),
    "rejection": (*GROUPED, "policy.kl.limit=3.0"),
    "best_of_n": GROUPED,
}


def arguments(method: str, plain: Path, out: Path) -> list[str | Path]:
    """What to say to carry out `method`."""
    settings = [f"policy.method={method}", *METHODS[method]]
    return ["run", plain, "--out", out, *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="session")
def finished(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("methods")
    for method in METHODS:
        ran(folder, *arguments(method, plain, folder / method), "--start", start)
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_finished_and_says_what_it_did(method: str, finished: dict[str, Path]) -> None:
    run = finished[method]
    assert manifest(run)["status"] == "finished"
    assert (run / "models" / "policy" / "model.safetensors").exists()
    evaluations = stage_lines(run, "evaluation")
    last = 1 if method == "best_of_n" else 5
    assert [evaluations[0]["step"], evaluations[-1]["step"]] == [0, last]
    assert evaluations[0]["evaluation/kl_per_sequence"] == pytest.approx(0, abs=1e-4)
    unknown = [
        name
        for line in lines(run / "metrics.jsonl")
        for name in line
        if name not in ("stage", "step") and describe(name, line["stage"]) is None
    ]
    assert unknown == []
    report = (run / "report.html").read_text()
    assert "nats per response" in report
    assert ("Nothing was trained" in report) == (method == "best_of_n")
    assert ("learnt from judged pairs" in report) == (method in ("dpo", "ipo"))
    assert "has not begun" not in report


@pytest.mark.parametrize("method", ["online_dpo", "rejection"])
def test_rows_of_what_was_drawn_fit_their_digest(method: str, finished: dict[str, Path]) -> None:
    read = read_run(finished[method])
    assert read.steps() == (0, 1, 2, 3, 4)
    for trace in read.traces():  # raises where they do not
        assert "choice" in trace.channels and len(trace) == 32


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_held_out_pairs_are_examined_at_each_evaluation(method: str, finished: dict[str, Path]) -> None:
    steps = stage_lines(finished[method], "policy")
    assert [line["step"] for line in steps if "direct/heldout_accuracy" in line] == [1, 3, 4]
    assert all("direct/margin" in line for line in steps)
    assert read_run(finished[method]).steps() == ()


def test_the_best_of_n_scores_higher_and_its_divergence_is_estimated(finished: dict[str, Path]) -> None:
    first, last = stage_lines(finished["best_of_n"], "evaluation")
    assert last["evaluation/score"] > first["evaluation/score"] + 0.3
    # Answers of a model that has hardly learnt to write come once, so the estimate is the bound, log 4 - 3 / 4.
    assert last["evaluation/kl_per_sequence"] == pytest.approx(0.636, abs=0.01)
    models = finished["best_of_n"] / "models"
    sft, policy = ((models / name / "model.safetensors").read_bytes() for name in ("sft", "policy"))
    assert sft == policy


@pytest.mark.parametrize("method", ["dpo", "online_dpo", "rejection", "best_of_n"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    method: str, plain: Path, start: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / method
    command = arguments(method, plain, out)
    stop = Stop(out, "samples-", 2) if method == "best_of_n" else Stop(out, "checkpoints", 8)
    assert kedge(tmp_path, *command, "--start", start, stop=stop).wait() == -9
    ran(tmp_path, *command, "--start", start, "--resume")
    assert_same(out, finished[method])


def test_pairs_that_are_missing_are_named(plain: Path, start: Path, tmp_path: Path) -> None:
    copy = tmp_path / "start"
    shutil.copytree(start, copy)
    (copy / "pairs.jsonl").unlink()
    failed = kedge(tmp_path, *arguments("dpo", plain, tmp_path / "run"), "--start", copy)
    assert failed.wait() == 2
    assert "pairs.jsonl: dpo learns from these pairs" in failed.stderr and "Traceback" not in failed.stderr


# A user's judgments


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    bring(tmp_path)
    return tmp_path


def settings(*given: str) -> list[str]:
    return [word for setting in given for word in ("--set", setting)]


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_a_users_pairs_are_learnt_from(method: str, folder: Path) -> None:
    assert cli.main(["run", "files.toml", "--out", "run", *settings(f"policy.method={method}")]) == 0
    steps = stage_lines(folder / "run", "policy")
    assert len(steps) == 2 and steps[-1]["direct/heldout_accuracy"] >= 0
    assert not (folder / "run" / "pairs.jsonl").exists()


def test_a_users_ratings_are_no_pairs_which_is_said_before_anything_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "r.jsonl", [{**row, "rating": len(row["response"]) % 5} for row in DEMONSTRATIONS])
    chosen = settings("policy.method=dpo", "data.preferences=r.jsonl")
    assert cli.main(["run", "files.toml", "--out", "run", *chosen]) == 2
    said = capsys.readouterr().err
    assert "policy.method: dpo learns which of two responses is better" in said and "rating" in said
    assert not (folder / "run" / "manifest.json").exists()
