"""A run that was killed or interrupted anywhere and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from processes import (
    Stop,
    assert_same,
    contents,
    count_changes,
    kedge,
    lines,
    manifest,
    ran,
    stage_lines,
    start,
    wait_for,
)

KILLED = -signal.SIGKILL


def killed_and_resumed(folder: Path, recipe: Path, stop: Stop, *settings: str) -> Path:
    run = folder / "run"
    arguments = ("run", recipe, "--out", run, *settings)
    assert kedge(folder, *arguments, stop=stop).wait() == KILLED
    ran(folder, *arguments, "--resume")
    return run


@pytest.mark.parametrize(
    ("within", "count"),
    [
        ("recipe.json", 1),  # a manifest but no run yet
        ("/metrics.jsonl", 2),  # in supervised fine-tuning
        pytest.param("models/.sft.partial", 3, marks=pytest.mark.slow),  # while its model is written
        pytest.param("pairs.jsonl", 1, marks=pytest.mark.slow),
        ("/metrics.jsonl", 6),  # in the reward model
        ("/metrics.jsonl", 9),  # in the first policy step, after the evaluation before it, without a checkpoint
        pytest.param("truth/", 3, marks=pytest.mark.slow),  # between the two halves of an evaluation
        ("checkpoints/.step-000002", 2),  # in the first checkpoint
        ("/metrics.jsonl", 15),  # in the last step
        pytest.param("models/.policy.partial", 2, marks=pytest.mark.slow),
        pytest.param("report.html", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(within: str, count: int, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = killed_and_resumed(tmp_path, recipe, Stop(tmp_path / "run", within, count))
    assert_same(run, whole)


@pytest.mark.parametrize("step", [0, 2])
def test_killed_from_outside_in_a_policy_step(step: int, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start(tmp_path, "run", recipe, "--out", run)
    wait_for(lambda: len(stage_lines(run, "policy")) > step, command)
    command.process.kill()
    assert command.wait() == KILLED
    assert manifest(run)["status"] == "running"
    ran(tmp_path, "run", recipe, "--out", run, "--resume")
    assert_same(run, whole)


def test_killed_twice(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kedge(tmp_path, "run", recipe, "--out", run, stop=Stop(run, "/metrics.jsonl", 11)).wait() == KILLED
    again = kedge(tmp_path, "run", recipe, "--out", run, "--resume", stop=Stop(run, "truth/", 4))
    assert again.wait() == KILLED
    ran(tmp_path, "run", recipe, "--out", run, "--resume")
    assert_same(run, whole)


def test_killed_with_a_scalar_critic_and_a_gpt2(recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "policy.critic=scalar", "--set", "model.family=gpt2", "--set", "policy.samples_per_prompt=2")
    ran(tmp_path, "run", recipe, "--out", tmp_path / "whole", *settings)
    (last,) = stage_lines(tmp_path / "whole", "policy")[-1:]
    assert "value/loss.critic" in last and "value/loss.score" not in last
    run = killed_and_resumed(tmp_path, recipe, Stop(tmp_path / "run", "/metrics.jsonl", 12), *settings)
    assert_same(run, tmp_path / "whole")


def test_killed_with_several_reward_models(recipe: Path, tmp_path: Path) -> None:
    """Their disagreement is taken on answers of the reference that belong to the step."""
    settings = ("--set", "reward.trunk=shared", "--set", "reward.members=2", "--set", "reward.aggregate=worst")
    ran(tmp_path, "run", recipe, "--out", tmp_path / "whole", *settings)
    found = [line["uncertainty/disagreement"] for line in stage_lines(tmp_path / "whole", "policy")]
    assert len(set(found)) == 5
    run = killed_and_resumed(tmp_path, recipe, Stop(tmp_path / "run", "/metrics.jsonl", 14), *settings)
    assert_same(run, tmp_path / "whole")


@pytest.mark.slow
def test_killed_before_any_change_to_the_disk(whole: Path, recipe: Path, tmp_path: Path) -> None:
    """Every place at which a kill could leave the folder in another state, in steps with a random start."""
    counted = tmp_path / "counted" / "run"
    counted.parent.mkdir()  # as below, so that making it is no change to count
    ran(tmp_path, "run", recipe, "--out", counted, prepare=_Counting(counted))
    total = int((tmp_path / "changes.txt").read_text())
    assert total > 100
    for count in range(random.randrange(1, 4), total + 1, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        arguments = ("run", recipe, "--out", folder / "run")
        assert kedge(folder, *arguments, stop=Stop(folder / "run", "", count)).wait() == KILLED
        begun = (folder / "run" / "manifest.json").exists()
        resumed = kedge(folder, *arguments, "--resume")
        if not begun and resumed.wait() == 2:
            assert "choose another --out" in resumed.stderr
            continue
        assert resumed.wait() == 0, f"killed before change {count} of {total}\n{resumed.stderr}"
        assert_same(folder / "run", whole)


class _Counting:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        count_changes(self.folder)


# Ctrl-C


@pytest.mark.parametrize(
    ("count", "where"),
    [
        (1, "sft step 1"),
        pytest.param(5, "reward step 1", marks=pytest.mark.slow),
        pytest.param(10, "policy step 2", marks=pytest.mark.slow),
        (12, "policy step 3"),
    ],
)
def test_interrupted_and_resumed(count: int, where: str, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("run", recipe, "--out", run)
    stopped = kedge(tmp_path, *arguments, stop=Stop(run, "/metrics.jsonl", count, signal.SIGINT))
    assert stopped.wait() == 130
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert where in line and "--resume" in line
    assert "Traceback" not in stopped.stderr
    assert manifest(run)["status"] == "interrupted"
    assert lines(run / "events.jsonl")[-1]["event"] == "interrupted"
    if where.startswith("policy"):
        step = int(where.rpartition(" ")[2])
        assert (run / "checkpoints" / f"step-{step:06d}" / "state.json").is_file(), "nothing done is lost"
    ran(tmp_path, *arguments, "--resume")
    assert_same(run, whole)


def test_two_interrupts_stop_at_once(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start(tmp_path, "run", recipe, "--out", run, prepare=_impatient)
    assert command.wait() == 130
    assert "Traceback" not in command.stderr
    assert manifest(run)["status"] == "interrupted"
    assert len(stage_lines(run, "policy")) == 2
    ran(tmp_path, "run", recipe, "--out", run, "--resume")
    assert_same(run, whole)


def _impatient() -> None:
    """Two signals in the third step, before it is over."""
    import os

    import kedge.train.policy as policy

    update, calls = policy.update, []

    def update_until(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments, **named)

    policy.update = update_until


# Other settings


@pytest.mark.parametrize(
    ("setting", "key", "was", "now"),
    [
        ("policy.kl.beta=0.2", "policy.kl.beta", "0.05", "0.2"),
        ("seed=5", "seed", "0", "5"),
        ("policy.steps=9", "policy.steps", "5", "9"),
    ],
)
def test_a_changed_setting_is_refused(
    setting: str, key: str, was: str, now: str, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    before = contents(whole)
    refused = kedge(tmp_path, "run", recipe, "--out", whole, "--resume", "--set", setting)
    assert refused.wait() == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and f"{key}: was {was}, now {now} -> " in line
    assert contents(whole) == before, "a refused command changes nothing"


def test_a_run_is_never_written_over(whole: Path, recipe: Path, tmp_path: Path) -> None:
    before = contents(whole)
    refused = kedge(tmp_path, "run", recipe, "--out", whole)
    assert refused.wait() == 2
    assert "--resume" in refused.stderr
    assert contents(whole) == before


def test_a_stage_needs_the_one_before_it(recipe: Path, tmp_path: Path) -> None:
    for command, needed in (("reward", "sft"), ("policy", "sft")):
        refused = kedge(tmp_path, command, recipe, "--out", tmp_path / command)
        assert refused.wait() == 2
        assert f"kedge {needed}" in refused.stderr


def test_a_damaged_checkpoint_is_named(recipe: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    assert kedge(tmp_path, "run", recipe, "--out", run, stop=Stop(run, "/metrics.jsonl", 15)).wait() == KILLED
    folder = run / "checkpoints" / "step-000004"
    (folder / "state.safetensors").write_bytes(b"torn")
    refused = kedge(tmp_path, "run", recipe, "--out", run, "--resume")
    assert refused.wait() == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert str(folder) in line and "remove this folder" in line
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    ran(tmp_path, "run", recipe, "--out", run, "--resume")
    assert_same(run, whole)
