"""A run that takes over another's models: what it copies, what it makes itself, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from user_files import bring

from kedge import cli, pipeline, recipe
from kedge.desk.world import word_tokenizer
from kedge.errors import InputError
from kedge.pipeline.tasks import inputs_of
from kedge.progress import Interrupt, Progress
from kedge.trace.jsonl import read_json_lines
from kedge.trace.run_dir import RunDir


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run of it up to the reward model."""
    folder = bring(tmp_path_factory.mktemp("first")).parent
    recipe = str(folder / "files.toml")
    assert cli.main(["sft", recipe, "--out", str(folder / "sft"), "--json"]) == 0
    assert cli.main(["reward", recipe, "--out", str(folder / "both"), "--start", str(folder / "sft"), "--json"]) == 0
    return folder


def started(first: Path, out: Path, start: str, *settings: str) -> int:
    command = ["policy", str(first / "files.toml"), "--out", str(out), "--start", str(first / start), "--json"]
    for setting in settings:
        command += ["--set", setting]
    return cli.main(command)


def test_a_supervised_policy_is_taken_over_and_the_reward_model_made(first: Path) -> None:
    run, start = RunDir(first / "both"), RunDir(first / "sft")
    assert run.read_manifest()["stages"] == {"sft": "done", "reward": "done"}
    assert run.read_manifest()["started_from"] == "sft"
    weights = [(place.models / "sft/model.safetensors").read_bytes() for place in (run, start)]
    assert weights[0] == weights[1]
    stages = [line["stage"] for line in read_json_lines(run.metrics)]
    assert stages == sorted(stages, key=["sft", "reward"].index) and set(stages) == {"sft", "reward"}


def test_both_models_are_taken_over(first: Path, tmp_path: Path) -> None:
    assert started(first, tmp_path / "run", "both", "policy.kl.beta=0.4", "name=other") == 0
    run = RunDir(tmp_path / "run")
    assert run.read_manifest()["status"] == "finished"
    again = (run.models / "reward/model.safetensors").read_bytes()
    assert again == (first / "both/models/reward/model.safetensors").read_bytes()


def test_what_is_missing_is_named(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(first, tmp_path / "run", "sft") == 2
    assert "stage policy needs this model" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["seed=5", "model.hidden=32", "data.holdout=0.3"])
def test_a_start_on_other_data_or_another_model_is_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert started(first, tmp_path / "run", "both", setting) == 2
    told = capsys.readouterr().err
    assert setting.partition("=")[0] in told and "leave --start out" in told
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_start_that_is_no_run_is_refused(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(first, tmp_path / "run", "nowhere") == 2
    assert "there is no run of Kedge here" in capsys.readouterr().err


def test_models_that_read_other_tokens_are_refused(plain: Path, start: Path, tmp_path: Path) -> None:
    """A vocabulary depends on the texts a run learns from, and these on more than one key of the recipe."""
    given = recipe.load(plain)
    inputs = replace(inputs_of(given), tokenizer=word_tokenizer(["quite other words"]))
    with pytest.raises(InputError, match="another tokenizer than this run"):
        pipeline.run(
            given,
            tmp_path / "run",
            recipe_text="",
            resume=False,
            progress=Progress(quiet=True),
            interrupt=Interrupt(),
            start=start,
            inputs=inputs,
        )
    assert not (tmp_path / "run").exists()
