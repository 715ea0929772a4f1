"""Guards: each action does what it says, what is undone is kept, and a killed run decides the same again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import Stop, assert_same, kedge, lines, manifest, ran, stage_lines

KILLED = -signal.SIGKILL
FIXED = (
    "policy.steps=6",
    "policy.kl.beta=0.05",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "guard.checks=['weak_beta']",
)


def add_checks() -> None:
    """Two checks more: one that fails from step 3 on while beta is below 0.08, and one that always fails."""
    import sys
    import types

    import kedge.diagnose.checks as checks
    from kedge.diagnose.checks.check import Check, Kind
    from kedge.diagnose.finding import Finding, graded
    from kedge.diagnose.view import View
    from kedge.trace.reader import StepTrace

    def reduce(step: StepTrace) -> dict[str, float]:
        return {"weak_beta/beta": float(-step.weights[:, step.channels.index("kl")].mean())}

    def weak(view: View) -> Finding:
        beta = view.fact("weak_beta/beta")
        assert beta is not None and len(beta.steps) == beta.steps[-1] + 1, "every step is there, once"
        here = (beta.values < 0.08) & (beta.steps >= 3)
        onset = int(beta.steps[here][0]) if here.any() else None
        finding = Finding("weak_beta", "ok", f"beta is {beta.values[-1]:.3g}.", onset=onset)
        return graded(finding, float(here[-1]) * 2)

    def always(view: View) -> Finding:
        return Finding("always", "fail", "It always fails.", strength=1.0)

    found = {
        "weak_beta": Check("weak_beta", "beta is small", Kind.CAUSE, ("M1",), weak, reduce),
        "always": Check("always", "always", Kind.CAUSE, (), always, validated=True),
    }
    names = list(checks.pkgutil.iter_modules(checks.__path__))
    for name, check in found.items():
        module = types.ModuleType(f"kedge.diagnose.checks.{name}", "A check of the tests.")
        module.CHECK = check  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        names.append(types.SimpleNamespace(name=name))  # type: ignore[arg-type]
    checks.pkgutil = types.SimpleNamespace(iter_modules=lambda _: names)  # type: ignore[assignment]
    checks.all_checks.cache_clear()


def command(plain: Path, start: Path, out: Path, *settings: str) -> list[str | Path]:
    return ["run", plain, "--out", out, "--start", start, *(w for one in (*FIXED, *settings) for w in ("--set", one))]


def guarded(folder: Path, plain: Path, start: Path, *settings: str) -> Path:
    ran(folder, *command(plain, start, folder / "run", *settings), prepare=add_checks)
    return folder / "run"


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "events.jsonl") if line["event"].startswith("guard_")]


def betas(run: Path) -> list[float]:
    return [line["kl/beta"] for line in stage_lines(run, "policy")]


@pytest.fixture(scope="module")
def unguarded(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guarded(tmp_path_factory.mktemp("unguarded"), plain, start, "guard.checks=[]", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def raised(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guarded(tmp_path_factory.mktemp("raised"), plain, start, "guard.action=raise_beta", "guard.patience=2")


@pytest.fixture(scope="module")
def returned(plain: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guarded(tmp_path_factory.mktemp("returned"), plain, start, "guard.action=roll_back")


def test_a_warning_changes_nothing(unguarded: Path, plain: Path, start: Path, tmp_path: Path) -> None:
    run = guarded(tmp_path, plain, start, "guard.patience=1")
    assert [event["step"] for event in events(run)] == [4, 5, 6]
    assert all(event["event"] == "guard_warn" and "weak_beta" in event["message"] for event in events(run))
    assert (run / "metrics.jsonl").read_bytes() == (unguarded / "metrics.jsonl").read_bytes()
    assert manifest(run)["status"] == "finished"


def test_beta_rises_from_the_next_step(raised: Path, unguarded: Path) -> None:
    (event,) = events(raised)
    assert event["event"] == "guard_raise_beta" and event["step"] == 5, "steps 3 and 4 are two looks that fail"
    assert "from 0.05 to 0.1" in event["message"]
    assert betas(raised) == [0.05] * 5 + [0.1]
    assert stage_lines(raised, "policy")[:5] == stage_lines(unguarded, "policy")[:5], "until then nothing differs"


def test_a_return_restores_the_weights_and_takes_another_way(returned: Path, unguarded: Path) -> None:
    (event,) = events(returned)
    assert event["event"] == "guard_roll_back" and event["step"] == 5
    assert "step 2" in event["message"] and "branch 1" in event["message"] and "from 0.05 to 0.1" in event["message"]
    assert betas(returned) == [0.05] * 2 + [0.1] * 4
    before, after = stage_lines(unguarded, "policy"), stage_lines(returned, "policy")
    assert [line["step"] for line in after] == list(range(6))
    assert after[:2] == before[:2]
    assert after[2]["length/mean"] != before[2]["length/mean"], "other prompts and responses"
    assert manifest(returned)["branch"] == 1


def test_what_is_undone_is_kept(returned: Path, unguarded: Path) -> None:
    kept = returned / "branches" / "000"
    assert stage_lines(kept, "policy") == stage_lines(unguarded, "policy")[2:5]
    assert [line["step"] for line in stage_lines(kept, "evaluation")] == [4]
    import pyarrow.parquet as parquet

    for step in (2, 3, 4):
        name = f"trace/step-{step:06d}.parquet"
        assert parquet.read_table(kept / name).equals(parquet.read_table(unguarded / name), check_metadata=True)
        assert not parquet.read_table(returned / name).equals(parquet.read_table(unguarded / name))
    about = json.loads((kept / "branch.json").read_text())
    assert about == {
        "left": 0, "at": 5, "to": 2, "onset": 3, "check": "weak_beta", "summary": "beta is 0.05."
    }  # fmt: skip
    assert not (returned / "rollback.json").exists()


def test_the_weights_are_those_of_the_checkpoint(unguarded: Path, plain: Path, start: Path, tmp_path: Path) -> None:
    """Killed just after the return: the folder goes on from the bits of the run without a guard."""
    run = tmp_path / "run"
    arguments = command(plain, start, run, "guard.action=roll_back")
    stopped = kedge(tmp_path, *arguments, stop=Stop(run, "trace/.step-000002", 2), prepare=add_checks)
    assert stopped.wait() == KILLED
    (event,) = events(run)
    assert event["event"] == "guard_roll_back"
    place = "checkpoints/step-000002/state.safetensors"
    assert (run / place).read_bytes() == (unguarded / place).read_bytes()
    state = json.loads((run / "checkpoints/step-000002/state.json").read_text())
    assert state["controller"]["groups"][0]["beta"] == 0.1
    assert state["guard"] == {"branch": 1, "alarms": {}, "acted": 1, "stopped": ""}


def test_before_the_first_checkpoint_it_goes_back_to_the_start(plain: Path, start: Path, tmp_path: Path) -> None:
    run = guarded(tmp_path, plain, start, "guard.action=roll_back", "guard.checks=['always']", "guard.actions=2",
                  "guard.patience=3")  # fmt: skip
    assert [event["event"] for event in events(run)] == [
        "guard_roll_back",
        "guard_roll_back",
        "guard_warn",
        "guard_warn",
    ]
    assert "step 0" in events(run)[0]["message"]
    assert betas(run) == [0.2] * 6, "each return doubles what its checkpoint held"
    assert sorted(path.name for path in (run / "branches").iterdir()) == ["000", "001"]
    assert [line["step"] for line in stage_lines(run, "evaluation")] == [0, 2, 4, 6]


def test_a_guard_may_end_the_stage(plain: Path, start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(plain, start, run, "guard.action=stop")
    stopped = kedge(tmp_path, *arguments, prepare=add_checks)
    assert stopped.wait() == 4, stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert "policy step 5" in line and "weak_beta failed at 2 looks in a row" in line
    assert manifest(run)["status"] == "stopped by guard"
    assert len(stage_lines(run, "policy")) == 5
    assert (run / "models" / "policy").is_dir() and (run / "report.html").exists()
    again = kedge(tmp_path, *arguments, "--resume", prepare=add_checks)
    assert again.wait() == 4, "it stays stopped"
    assert len(stage_lines(run, "policy")) == 5


# Killed between the actions


@pytest.mark.parametrize(
    ("within", "count"),
    [
        pytest.param("rollback.json", 1, marks=pytest.mark.slow),  # before the note
        pytest.param("rollback.json", 2, marks=pytest.mark.slow),  # before it has its name
        pytest.param("branches/", 3, marks=pytest.mark.slow),
        ("branches/.000.tmp", 6),
        pytest.param("checkpoints/step-000002/.state.json", 1, marks=pytest.mark.slow),
        pytest.param("checkpoints/step-000004", 1, marks=pytest.mark.slow),  # while later checkpoints go
        ("rollback.json", 3),  # before the note goes
        pytest.param("/metrics.jsonl", 14, marks=pytest.mark.slow),
        pytest.param("trace/.step-000004", 2, marks=pytest.mark.slow),  # in the new branch
    ],
)
def test_killed_while_it_goes_back(
    within: str, count: int, returned: Path, plain: Path, start: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(plain, start, run, "guard.action=roll_back")
    assert kedge(tmp_path, *arguments, stop=Stop(run, within, count), prepare=add_checks).wait() == KILLED
    ran(tmp_path, *arguments, "--resume", prepare=add_checks)
    assert_same(run, returned)


@pytest.mark.parametrize("count", [pytest.param(5, marks=pytest.mark.slow), 6])
def test_killed_around_a_rise_of_beta(count: int, raised: Path, plain: Path, start: Path, tmp_path: Path) -> None:
    """Between two alarms and just after the rise: the checkpoint of step 4 holds the first alarm."""
    run = tmp_path / "run"
    arguments = command(plain, start, run, "guard.action=raise_beta", "guard.patience=2")
    stop = Stop(run, "trace/.step-", count)
    assert kedge(tmp_path, *arguments, stop=stop, prepare=add_checks).wait() == KILLED
    ran(tmp_path, *arguments, "--resume", prepare=add_checks)
    assert_same(run, raised)


def test_interrupted_beside_a_regular_checkpoint(returned: Path, plain: Path, start: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves a checkpoint of step 3, which an uninterrupted run does not have: it is not gone back to."""
    run = tmp_path / "run"
    arguments = command(plain, start, run, "guard.action=roll_back")
    stop = Stop(run, "trace/.step-000002", 1, signal.SIGINT)
    assert kedge(tmp_path, *arguments, stop=stop, prepare=add_checks).wait() == 130
    ran(tmp_path, *arguments, "--resume", prepare=add_checks)
    assert_same(run, returned)


# What is refused


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        (("guard.checks=['samplr']",), "guard.checks", "did you mean sampler?"),
        (("guard.checks=['sampler']", "trace.keep=3"), "trace.keep", "guards read every step"),
        (("guard.checks=['sampler']", "policy.method=dpo"), "guard.checks", "draws no responses"),
        (("guard.checks=['sampler']", "guard.action=raise_beta", "policy.kl.beta=0"), "policy.kl.beta", "0 stays 0"),
        (
            ("guard.checks=['sampler']", "guard.action=raise_beta", "guard.beta_factor=1"),
            "beta_factor",
            "raises nothing",
        ),
    ],
)
def test_what_does_not_go_together(settings: tuple[str, ...], where: str, what: str) -> None:
    from kedge import recipe
    from kedge.errors import InputError

    with pytest.raises(InputError) as caught:
        recipe.parse("", settings)
    assert any(where in str(problem) and what in str(problem) for problem in caught.value.problems)


# Small parts


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_alarms_in_a_row(failed: list[bool], patience: int) -> None:
    """It speaks exactly where the last `patience` looks since it last spoke all failed."""
    from kedge.diagnose.finding import Finding
    from kedge.pipeline.guard import judged
    from kedge.recipe.sections import Guard
    from kedge.train.checkpoint import Watched

    settings, watched, since = Guard(checks=("one",), patience=patience), Watched(), 0
    for index, fails in enumerate(failed):
        watched, alarm = judged(settings, watched, [Finding("one", "fail" if fails else "warn", "")])
        window = failed[max(since, index + 1 - patience) : index + 1]
        assert (alarm is not None) == (len(window) == patience and all(window))
        if alarm is not None:
            since = index + 1


def test_which_checkpoint_is_healthy(tmp_path: Path) -> None:
    from kedge.pipeline.guard import healthy_checkpoint
    from kedge.trace.run_dir import RunDir

    run = RunDir(tmp_path)
    assert healthy_checkpoint(run, 5, 2) is None
    for step in (0, 2, 3, 4, 6):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text("{}")
    assert [healthy_checkpoint(run, onset, 2) for onset in (0, 2, 3, 4, 5, 9)] == [0, 0, 2, 2, 4, 6]


def test_a_raised_controller_gives_that_much_more() -> None:
    import torch

    from kedge.train.controller import Adaptive, Controllers, Fixed, Lagrangian, Pid

    kinds = (Fixed(0.1), Adaptive(0.1, 6, 1e4), Lagrangian(0.1, 6, 0.1), Pid(0.1, 6, 0.2, 0.02, 0.05))
    for kind in kinds:
        usual, raised = Controllers.of(kind, [1, 2, 0.5]), Controllers.of(kind, [1, 2, 0.5]).times(3)
        for kl in (4.0, 9.0, 7.0):
            assert raised.mean_beta == pytest.approx(3 * usual.mean_beta)
            assert Controllers.from_record(raised.record()) == raised
            seen = torch.full((6,), kl)
            usual, raised = (one.observe(seen, torch.arange(6) % 3) for one in (usual, raised))
