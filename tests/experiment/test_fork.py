"""Forks: null forks equal their source bit for bit, changes take effect, sources stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from processes import lines, manifest, stage_lines

from kedge.errors import InputError, Interrupted
from kedge.experiment.fork import Fork, begin, carry_out, carry_out_reward, checkpoint_steps
from kedge.progress import Interrupt, Progress, Stage
from kedge.trace.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("small_desk")
TIMED = ("timings.jsonl", "events.jsonl", "manifest.json", "report.html", "recipe.json")


def forked(fork: Fork, out: Path) -> Path:
    carry_out(fork, out, progress=Progress(quiet=True), interrupt=Interrupt())
    return out


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def assert_same(run: Path, expected: Path, *, but: tuple[str, ...] = ()) -> None:
    """The same files with the same contents, tables compared by their values."""
    one, other = (
        {name for name in files(folder) if name not in TIMED and not name.startswith((*but, "trials/"))}
        for folder in (run, expected)
    )
    assert one == other
    for name in one:
        if name.endswith(".parquet"):
            assert parquet.read_table(run / name).equals(parquet.read_table(expected / name), check_metadata=True), name
        else:
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(autouse=True)
def _untouched(source: Path):
    """Whatever a fork does, its source stays as it was, though they share files."""
    before = files(source)
    yield
    assert files(source) == before


@pytest.mark.parametrize("step", [2, 4])
def test_a_null_fork_goes_on_as_its_source_did(step: int, source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, step, (), 5 - step), tmp_path / "fork")
    gone = {"checkpoints/step-000002/", "checkpoints/step-000004/"} - {
        f"checkpoints/step-{at:06d}/" for at in (step, 4)
    }
    assert_same(run, source, but=tuple(gone))
    assert manifest(run)["forked_from"] == "drift" and manifest(run)["forked_at"] == step
    assert manifest(run)["status"] == "finished"
    events = [line["event"] for line in lines(run / "events.jsonl")]
    assert "forked" in events and "resumed" in events


def test_a_fork_from_the_start_needs_no_checkpoint(source: Path, tmp_path: Path) -> None:
    assert_same(forked(Fork(source, 0, (), 5), tmp_path / "fork"), source)


def test_a_shorter_fork_ends_where_it_is_told(source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, 2, (), 2), tmp_path / "fork")
    assert [line["step"] for line in stage_lines(run, "policy")] == [0, 1, 2, 3]
    assert stage_lines(run, "policy") == stage_lines(source, "policy")[:4]
    assert (run / "trace" / "samples-000004.parquet").exists() and (run / "models" / "policy").is_dir()


def test_another_branch_draws_others_from_there_on(source: Path, tmp_path: Path) -> None:
    one, same, other = (
        stage_lines(forked(Fork(source, 2, (), 2, branch), tmp_path / str(at)), "policy")
        for at, branch in enumerate((1, 1, 2))
    )
    before = stage_lines(source, "policy")
    assert one[:2] == other[:2] == before[:2], "what was before is shared"
    assert one == same, "a branch is a function of its number"
    assert one[2:] != before[2:4] and one[2:] != other[2:]
    prompts = [parquet.read_table(tmp_path / name / "trace/step-000002.parquet")["prompt"] for name in "02"]
    assert prompts[0] != prompts[1]


def test_a_beta_takes_effect_though_the_checkpoint_holds_the_controller(source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, 2, ("policy.kl.mode=fixed", "policy.kl.beta=0.7"), 2), tmp_path / "fork")
    betas = [line["kl/beta"] for line in stage_lines(run, "policy")]
    assert betas[2:] == [0.7, 0.7]
    assert betas[:2] == [line["kl/beta"] for line in stage_lines(source, "policy")[:2]]
    # The step begins from the same policy with the same draws, so that only its update differs.
    ours, theirs = (stage_lines(one, "policy")[2] for one in (run, source))
    assert ours["score/mean"] == theirs["score/mean"] and ours["length/mean"] == theirs["length/mean"]
    assert ours != theirs


def test_another_setting_leaves_the_controller_as_it_was(source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, 2, ("policy.lr=1e-3",), 1), tmp_path / "fork")
    assert stage_lines(run, "policy")[2]["kl/beta"] == stage_lines(source, "policy")[2]["kl/beta"]


def test_a_running_score_begins_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, 2, ("policy.score_normalisation=running",), 1), tmp_path / "fork")
    state = json.loads((run / "checkpoints/step-000003/state.json").read_text())
    assert state["score"]["count"] == 8
    assert json.loads((source / "checkpoints/step-000002/state.json").read_text())["score"] is None


@pytest.mark.parametrize("change", ["reward.epochs=2", "desk.annotators.length=0.5", "pairs.temperature=1.5"])
def test_what_makes_the_reward_model_is_trained_anew(change: str, source: Path, tmp_path: Path) -> None:
    run = forked(Fork(source, 2, (change,), 1), tmp_path / "fork")
    name = "models/{}/model.safetensors"
    assert (run / name.format("reward")).read_bytes() != (source / name.format("reward")).read_bytes()
    assert (run / name.format("sft")).stat().st_ino == (source / name.format("sft")).stat().st_ino
    assert stage_lines(run, "reward") != stage_lines(source, "reward")
    assert stage_lines(run, "policy")[:2] == stage_lines(source, "policy")[:2]
    assert stage_lines(run, "policy")[2]["score/mean"] != stage_lines(source, "policy")[2]["score/mean"]


def test_a_reward_model_is_trained_once_for_several_forks(source: Path, tmp_path: Path) -> None:
    changes = ("reward.epochs=2",)
    quiet, interrupt = Progress(quiet=True), Interrupt()
    judge = tmp_path / "judge"
    carry_out_reward(Fork(source, 2, changes, 2), judge, progress=quiet, interrupt=interrupt)
    assert not (judge / "models" / "policy").exists()
    own = forked(Fork(source, 2, changes, 2, 1), tmp_path / "own")
    taken = forked(Fork(source, 2, changes, 2, 1, judge), tmp_path / "taken")
    assert_same(taken, own)


class Stopping(Progress):
    """Asks for a stop in a step of the policy stage."""

    def __init__(self, interrupt: Interrupt, step: int) -> None:
        super().__init__(quiet=True)
        self.interrupt, self.step = interrupt, step

    def stage(self, name: str, total: int, *, start: int = 0) -> Any:
        outer, made = self, super().stage(name, total, start=start)

        class Followed:
            def __enter__(self) -> Stage:
                stage = made.__enter__()
                advance = stage.advance

                def watched(step: int, **figures: float) -> None:
                    outer.interrupt.requested |= name == "policy" and step == outer.step
                    advance(step, **figures)

                stage.advance = watched  # type: ignore[method-assign]
                return stage

            def __exit__(self, *error: Any) -> Any:
                return made.__exit__(*error)

        return Followed()


@pytest.mark.parametrize("step", [0, 2])
def test_interrupted_and_resumed(step: int, source: Path, tmp_path: Path) -> None:
    fork = Fork(source, step, ("policy.lr=1e-3",), 3, 1)
    whole = forked(fork, tmp_path / "whole")
    interrupt = Interrupt()
    with pytest.raises(Interrupted):
        carry_out(fork, tmp_path / "fork", progress=Stopping(interrupt, step), interrupt=interrupt)
    assert manifest(tmp_path / "fork")["status"] == "interrupted"
    run = forked(fork, tmp_path / "fork")
    stopped = f"checkpoints/step-{step + 1:06d}/"  # a stop makes a checkpoint, which pushes none out here
    assert_same(run, whole, but=(stopped,))


def test_what_a_fork_needs_is_its_own_once_it_has_begun(source: Path, tmp_path: Path) -> None:
    """A run that goes on removes its checkpoints; the fork keeps the one it left."""
    import shutil

    copy = tmp_path / "drift"
    shutil.copytree(source, copy)
    fork = Fork(copy, 2, (), 1)
    begin(fork, tmp_path / "fork")
    inode = (tmp_path / "fork/checkpoints/step-000002/state.safetensors").stat().st_ino
    assert inode == (copy / "checkpoints/step-000002/state.safetensors").stat().st_ino, "shared, not copied"
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    run = forked(fork, tmp_path / "fork")
    assert stage_lines(run, "policy") == stage_lines(source, "policy")[:3]


def refusal(fork: Fork, out: Path) -> str:
    with pytest.raises(InputError) as error:
        carry_out(fork, out, progress=Progress(quiet=True), interrupt=Interrupt())
    return str(error.value)


@pytest.mark.parametrize(
    ("step", "changes", "steps", "said"),
    [
        (3, (), 1, "there are 0, 2, 4, 5"),
        (2, ("seed=4",), 1, "--set seed=4: was settled before the reward model"),
        (2, ("sft.steps=3", "desk.demonstrations=9"), 1, "--set desk.demonstrations=9"),
        (2, ("model.hidden=32",), 1, "change it in a run of its own"),
        (2, ("policy.critic=scalar",), 1, "fork from step 0"),
        (2, ("policy.method=rloo", "policy.samples_per_prompt=2"), 1, "policy.method = rloo"),
        (2, ("policy.repetition_penalty=1",), 1, "reward channels = score, repetition_penalty"),
        (2, ("policy.lora_rank=2",), 1, "policy.lora_rank"),
        (2, ("policy.nothing=1",), 1, "there is no key policy.nothing"),
        (2, ("policy.kl.beta=-1",), 1, "policy.kl.beta=-1"),
        (4, (), 2, "the recipe has 5 in all"),
        (2, (), 0, "fork for 1 step or more"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    step: int, changes: tuple[str, ...], steps: int, said: str, source: Path, tmp_path: Path
) -> None:
    assert said in refusal(Fork(source, step, changes, steps), tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_from_the_start_what_is_trained_may_change(source: Path, tmp_path: Path) -> None:
    changes = ("policy.method=rloo", "policy.samples_per_prompt=2")
    run = forked(Fork(source, 0, changes, 1), tmp_path / "fork")
    assert len(stage_lines(run, "policy")) == 1


def test_folders_that_hold_something_else_are_left_alone(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "nothing is overwritten" in refusal(Fork(source, 2, (), 1), mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert "holds a run that is no fork" in refusal(Fork(source, 2, (), 1), source)
    run = forked(Fork(source, 2, (), 1), tmp_path / "fork")
    assert "left drift after step 2" in refusal(Fork(source, 4, (), 1), run)
    assert "policy.lr" in refusal(Fork(source, 2, ("policy.lr=1e-2",), 1), run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert "not a Kedge run" in refusal(Fork(tmp_path, 2, (), 1), tmp_path / "fork")
    assert checkpoint_steps(RunDir(tmp_path)) == []
