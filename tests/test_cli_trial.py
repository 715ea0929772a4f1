"""`kedge trial` and `kedge forecast` as commands: results, mistakes, Ctrl-C and going on."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from kedge import cli

sys.path.append(str(Path(__file__).parent / "pipeline"))
from processes import RECIPE, Stop, kedge, manifest, ran

TRIAL = ("--from", "2", "--set", "policy.lr=0.01", "--steps", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.replace("[checkpoint]", "[checkpoint]\nkeep = 9"))
    ran(folder, "run", recipe, "--out", folder / "run")
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a mistaken command says; it is no bug."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "bug" not in captured.err and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "3", "--set", "policy.lr=1e-3"), "there are 0, 2, 4, 5"),
        (("--from", "2"), "a trial needs a change"),
        (("--set", "policy.lr=1e-3"), "--from"),
        (("--from", "2", "--set", "policy.lrr=1e-3"), "did you mean policy.lr"),
        (("--from", "2", "--set", "seed=1"), "settled before the reward model"),
        (("--from", "2", "--arm", "policy.lr='1e-3"), "--arm"),
        (("--from", "2", "--set", "policy.lr=1e-3", "--seeds", "0"), "--seeds"),
    ],
)
def test_a_trial_that_cannot_be(
    arguments: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said(capsys, "trial", run, *arguments)
    assert not (run / "trials").exists()


def test_no_run_and_taken_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such run" in said(capsys, "trial", tmp_path / "none", *TRIAL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "is not empty" in said(capsys, "trial", run, *TRIAL, "--out", tmp_path / "mine")
    assert "no run of Kedge to resume" in said(capsys, "trial", run, *TRIAL, "--out", tmp_path / "mine", "--resume")


@pytest.mark.slow
def test_a_trial_stopped_and_gone_on_with(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("trial", run, *TRIAL, "--seeds", "2", "--workers", "1", "--out", out)
    stopped = kedge(tmp_path, *command, stop=Stop(out / "done", "", 1, signal.SIGINT))
    assert stopped.wait() == 130
    assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if "forks: about" in line]
    assert re.match(r"4 forks: about \d+ s, .* and \d+ MiB on disk", line)
    ended = ran(tmp_path, *command, "--resume", "--json")
    found = json.loads(ended.stdout)
    assert found["seeds"] == 2 and found["cost"]["taken_seconds"] > 0
    assert json.loads(Path(found["trial"]).read_text())["arms"] == found["arms"]
    assert {manifest(out / name)["status"] for name in ("null-1", "null-2", "changed-0-1", "changed-0-2")} == {
        "finished"
    }
    shown = ran(tmp_path, *command, "--resume").stdout
    assert "policy.lr=0.01" in shown and "95% over seeds" in shown and "gold (truth)" in shown


# Forecast


def test_a_forecast_of_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "page.html"
    asked = [{"prompt": f"facts : refund {n} . q : can i cancel my order ? a :"} for n in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked) + "{}\n")
    models = run / "models"
    given = ("--policy", models / "sft", "--reward", models / "reward", "--prompts", prompts, "--samples", "16")
    options = ("--max-new-tokens", "8", "--html", page, "--feature", "regex:order", "--beta", "3", "--json")
    assert cli.main([str(argument) for argument in ("forecast", *given, *options)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 12 and len(found["left_out"]) == 1
    assert found["forecasts"][0]["betas"][0]["beta"] == 3 and page.exists() and found["report"] == str(page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs --policy, --reward, --prompts"),
        (("--policy", "nowhere", "--reward", "r", "--prompts", "p"), "--policy nowhere: there is no such folder"),
        (("{run}", "--policy", "{run}/models/sft"), "a run brings its own policy"),
        (("{run}", "--beta", "0"), "--beta: must be above 0"),
        (("{run}", "--samples", "4"), "--samples"),
        (("{run}", "--html", "page.txt"), "end it in .html"),
        (("{run}", "--reward", "{run}"), "no tokenizer in it"),
        (("{run}", "--feature", "(", "--samples", "16"), "is not a regular expression"),
        (("{run}", "--max-new-tokens", "400"), "lower it"),
        (("{run}/models",), "not a Kedge run"),
    ],
)
def test_a_forecast_that_cannot_be(
    arguments: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said(capsys, "forecast", *(argument.format(run=run) for argument in arguments))
