"""What must not reach training does not: the truth, the optimiser's hand on frozen models, the writing of the trace."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import assert_same, lines, ran

from kedge import cli


class Truth:
    """Replace what the world knows of answers; what its annotators prefer stays."""

    def __init__(self, poisoned: bool) -> None:
        self.poisoned = poisoned

    def __call__(self) -> None:
        import kedge.pipeline.tasks as tasks

        desk_task = tasks.desk_task
        truth = dict.fromkeys(("gold", "correct", "answered", "verbose"), -9.0)
        answer = (lambda prompt, response: truth) if self.poisoned else None
        tasks.desk_task = lambda **named: replace(desk_task(**named), truth=answer)


def models(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


@pytest.mark.parametrize("poisoned", [True, False])
def test_training_never_sees_the_gold(poisoned: bool, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran(tmp_path, "run", recipe, "--out", run, prepare=Truth(poisoned))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert models(run) == models(whole)
    assert [line["gold"] for line in lines(run / "truth" / "evaluation.jsonl")] == ([-9.0] * 4 if poisoned else [])


def test_truth_may_be_deleted_before_a_resume(whole: Path, recipe: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    ran(tmp_path, "sft", recipe, "--out", run)
    ran(tmp_path, "reward", recipe, "--out", run, "--resume")
    shutil.rmtree(run / "truth", ignore_errors=True)
    ran(tmp_path, "policy", recipe, "--out", run, "--resume")
    assert_same(run, whole)


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def test_only_policy_and_critic_move(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from kedge.desk import world
    from kedge.models.load import load_policy
    from kedge.models.reward import load_reward_model
    from kedge.pipeline import tasks

    module = sys.modules["kedge.pipeline.policy"]
    build, held, before = module.learner_of, [], {}

    def watched(context: Any, policy: Any, reference: Any, critic: Any) -> Any:
        held[:] = [policy, critic, reference]
        before.update({id(model): digest(model) for model in held})
        return build(context, policy, reference, critic)

    monkeypatch.setattr(module, "learner_of", watched)
    monkeypatch.setattr(tasks, "DESK_PROMPTS", 64)
    monkeypatch.setattr(world, "HELD_OUT", 16)
    assert cli.main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    policy, critic, reference = held
    assert digest(policy) != before[id(policy)]
    assert digest(critic) != before[id(critic)]
    assert digest(reference) == before[id(reference)] == digest(load_policy(tmp_path / "run" / "models" / "sft")[0])
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert digest(load_policy(tmp_path / "run" / "models" / "policy")[0]) == digest(policy)
    score_head = load_reward_model(tmp_path / "run" / "models" / "reward").models[0].score
    assert not torch.equal(critic.heads.weight[critic.score_index], score_head.weight[0]), "a copy, which was trained"


def test_the_trace_is_written_by_another_thread(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran(tmp_path, "run", recipe, "--out", run, prepare=note_threads)
    noted = (tmp_path / "threads.txt").read_text().split()
    assert set(noted) == {"kedge-trace"}
    assert len(noted) == 5 + 4 + 4, "steps, probes and samples"
    assert_same(run, whole)


def note_threads() -> None:
    from kedge.trace import writer

    write = writer.write_table

    def noted(table: Any, path: Path) -> None:
        with Path("threads.txt").open("a") as file:
            file.write(f"{threading.current_thread().name}\n")
        write(table, path)

    writer.write_table = noted


def test_scores_are_normalised_on_the_references_answers(whole: Path, recipe: Path) -> None:
    """Mean 0 and deviation 1 over fresh answers of the supervised policy to the prompts of training."""
    from kedge.models.load import load_policy
    from kedge.models.reward import load_reward_model
    from kedge.pipeline.context import Context
    from kedge.pipeline.tasks import inputs_of
    from kedge.progress import Interrupt, Progress
    from kedge.recipe import load
    from kedge.rollout.reward import scores
    from kedge.structs import Sampling
    from kedge.trace.run_dir import RunDir
    from kedge.train.schedule import seeded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kedge.pipeline.tasks.DESK_PROMPTS", 64)
        inputs = inputs_of(load(recipe))
    context = Context(load(recipe), RunDir(whole), inputs.task, inputs.tokenizer, Progress(quiet=True), Interrupt())
    prompts = context.encode_prompts(inputs.task.prompts.rows)
    policy = load_policy(whole / "models" / "sft")[0]
    answers = context.engine.generate(policy, prompts, Sampling(12), seeded(0, "normalise"))
    found = scores(load_reward_model(whole / "models" / "reward"), answers)
    assert len(found) == 64
    assert float(found.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.std()) == pytest.approx(1, abs=1e-4)


def test_no_prompt_of_the_evaluation_is_trained_on(recipe: Path) -> None:
    """With thousands of prompts about one in a hundred would be found on both sides by chance."""
    from kedge.pipeline.tasks import inputs_of
    from kedge.recipe import load

    task = inputs_of(load(recipe, ["evaluate.prompts=512", "pairs.prompts=2000", "desk.demonstrations=4000"])).task
    measured = set(task.evaluation.rows)
    trained = {row.prompt for row in task.demonstrations.rows} | set(task.prompts.rows) | set(task.pair_prompts)
    assert len(trained) > 10_000
    assert not measured & trained
    assert not {row.prompt for row in task.held_out.rows} & trained
