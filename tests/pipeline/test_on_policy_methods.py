"""Runs of every on-policy method, hold of the KL, and kind of policy or reference: whole, and killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import Stop, assert_same, kedge, lines, ran, stage_lines
from safetensors.torch import load_file

from kedge import cli
from kedge.trace.reader import read_run
from kedge.trace.schema import describe

GROUPED = ("policy.samples_per_prompt=4", "policy.prompts_per_step=2")
STEERED = ("policy.kl.target=0.1",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "ppo": ("policy.critic_warmup=1", "policy.entropy_bonus=0.01"),
    "a2c": ("policy.method=a2c",),
    "reinforce": ("policy.method=reinforce", "policy.score_normalisation=running"),
    "rloo": ("policy.method=rloo", *GROUPED),
    "grpo": ("policy.method=grpo", *GROUPED, "policy.kl.place=loss", "policy.dual_clip=3.0"),
    "dr_grpo": ("policy.method=dr_grpo", *GROUPED, "policy.clip_high=0.28"),
    "reinforce_pp": ("policy.method=reinforce_pp", "policy.importance_cap=2.0"),
    "full KL in the loss": ("policy.kl.place=loss", "policy.kl.estimator=full", "policy.aggregation=sequence_sum"),
    "lagrangian": ("policy.kl.mode=lagrangian", *STEERED),
    "pid": ("policy.kl.mode=pid", *STEERED, "policy.kl.budgets=[0.5, 1, 2]"),
    "stop": ("policy.kl.limit=0.001", "policy.kl.at_limit=stop"),
    "reject": ("policy.kl.limit=0.001", "policy.lr=0.01"),
    "rollback": ("policy.kl.limit=0.001", "policy.kl.at_limit=rollback", "checkpoint.every=2", "policy.lr=0.01"),
    "adapters": ("policy.lora_rank=2", "policy.lr=0.01", "policy.critic=scalar"),
    "rounds": (
        "policy.reference_every=2",
        "policy.lr=0.01",
        "policy.score_normalisation=prompt",
        "policy.kl.budgets=[0.5, 1, 2]",
    ),
    "shaped": (
        "policy.overlong_penalty=0.5",
        "policy.overlong_buffer=4",
        "policy.target_penalty=0.05",
        "policy.repetition_penalty=0.5",
        "policy.pretraining_mix=0.2",
    ),
}
QUICK = ("rloo", "pid", "reject", "rounds")
RESUMED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


def arguments(name: str, plain: Path, out: Path, start: Path) -> list[str | Path]:
    settings = (word for setting in VARIANTS[name] for word in ("--set", setting))
    return ["run", plain, "--out", out, "--start", start, *settings]


@pytest.fixture(scope="session")
def finished(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("on-policy")
    runs = {name: folder / name.replace(" ", "-") for name in VARIANTS}
    for name, out in runs.items():
        ran(folder, *arguments(name, plain, out, start))
    return runs


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_is_finished_and_every_figure_is_defined(name: str, finished: dict[str, Path]) -> None:
    steps = stage_lines(finished[name], "policy")
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert all(describe(metric, "policy") for line in steps for metric in line if metric not in ("stage", "step"))
    assert (finished[name] / "report.html").stat().st_size > 1000
    assert steps[0]["kl/original_per_sequence"] == pytest.approx(0, abs=1e-4)
    moved = max(abs(line["kl/original_per_sequence"]) for line in steps)
    assert moved > 1e-4 or name in ("stop", "reject", "rollback")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_trace_has_the_advantage_that_training_used(name: str, finished: dict[str, Path]) -> None:
    """The reader derives advantages from rewards and values and compares them with the digest; it raises otherwise."""
    run = read_run(finished[name])
    for number in (0, 4):
        step = run.step(number)
        parts = sum(step.parts().values())
        assert abs(parts - step.advantage()).max() < 1e-9
        assert abs(step.advantage()).max() > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    name: str, plain: Path, start: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = arguments(name, plain, out, start)
    assert kedge(tmp_path, *command, stop=Stop(out, "checkpoints", 8)).wait() == -9
    ran(tmp_path, *command, "--resume")
    assert_same(out, finished[name])


def weights(run: Path, model: str) -> dict[str, torch.Tensor]:
    return load_file(run / "models" / model / "model.safetensors")


def test_past_the_limit_nothing_of_an_update_remains(finished: dict[str, Path]) -> None:
    for name in ("reject", "rollback"):
        steps = stage_lines(finished[name], "policy")
        undone = steps[-1]["kl/rejected"] + steps[-1]["kl/branch"]
        assert undone == len(steps), "no update of a large step stays within a thousandth of a nat"
        before, after = weights(finished[name], "sft"), weights(finished[name], "policy")
        assert all(torch.equal(before[key], after[key]) for key in before)
        events = [line for line in lines(finished[name] / "events.jsonl") if line["stage"] == "policy"]
        assert sum("against a limit of 0.001" in line["message"] for line in events) == len(steps)


def test_adapters_end_as_plain_weights_that_differ(finished: dict[str, Path]) -> None:
    before, after = weights(finished["adapters"], "sft"), weights(finished["adapters"], "policy")
    assert before.keys() == after.keys(), "no adapter is left"
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_after_a_round_the_divergence_starts_again_but_not_from_the_original(finished: dict[str, Path]) -> None:
    steps = stage_lines(finished["rounds"], "policy")
    for number in (2, 4):
        assert steps[number]["kl/reference_per_sequence"] == pytest.approx(0, abs=1e-5)
        assert abs(steps[number]["kl/original_per_sequence"]) > 1e-3


def test_each_budget_group_has_a_beta_of_its_own(finished: dict[str, Path]) -> None:
    step = read_run(finished["pid"]).step(4)
    betas = step.weights[:, step.channels.index("kl")]
    assert len(set(betas.tolist())) > 1


def test_a_path_is_a_reference(plain: Path, start: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    other = finished["shaped"] / "models" / "policy"
    out = tmp_path / "run"
    ran(tmp_path, *arguments("ppo", plain, out, start), "--set", f"policy.reference={other}")
    first = stage_lines(out, "policy")[0]
    assert first["kl/original_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert abs(first["kl/reference_per_sequence"]) > 1e-4


def test_a_reference_that_reads_other_tokens_is_refused(
    plain: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(start / "models" / "sft", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, last = sorted(words, key=words.__getitem__)[-2:]
    words[first], words[last] = words[last], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = [*arguments("ppo", plain, tmp_path / "run", start), "--set", f"policy.reference={other}"]
    assert cli.main([str(word) for word in command]) == 2
    assert "another tokenizer" in capsys.readouterr().err
