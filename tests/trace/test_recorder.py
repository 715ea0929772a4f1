"""A plain loop, recorded: what is on disk after a finished, an interrupted, a killed and a resumed run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.diagnose.checks import reducers, run_checks
from kedge.diagnose.view import view_of
from kedge.errors import InputError
from kedge.trace.foreign import Conventions, Rows
from kedge.trace.reader import Run, read_run
from kedge.trace.recorder import Recorder
from kedge.trace.writer import SampleRecord

GRPO = Conventions(
    "a loop", kl="reward", kl_estimator="k1", beta=0.1, normalisation="group mean and deviation", epsilon=1e-4
)


def rows_of(step: int, **changes: Any) -> Rows:
    """Four responses to two prompts, of which the last is empty; scores 0 and 1, k1 of 0.5 nats a token."""
    mask = np.array([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
    old = np.full(mask.shape, -1.0) - 0.01 * step
    given: dict[str, Any] = {
        "group": [0, 0, 1, 1],
        "prompts": ["p", "p", "q", "q"],
        "responses": ["a b c", "a b", "a", ""],
        "ended": [True, True, True, False],
        "old_logprob": old,
        "behaviour_logprob": old - 0.02,
        "reference_logprob": old - 0.5,
        "entropy": np.full(mask.shape, 0.7),
    }
    return Rows(step, mask, {"score": [0.0, 1.0, 1.0, 0.0]}, **(given | changes))


def metrics(run: Run, stage: str = "policy") -> dict[str, list[float]]:
    return {name: series.values.tolist() for name, series in run.metrics(stage).items()}


def test_a_run_that_finished(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with Recorder(out, GRPO, name="mine", settings={"policy": {"kl": {"beta": 0.1}}}) as recorder:
        assert read_run(out).manifest["status"] == "running"
        for step in range(3):
            recorder.step(rows_of(step), **{"policy/loss": 0.5, "kl/beta": 0.2})
    run = read_run(out)
    assert run.steps() == (0, 1, 2) and run.name == "mine"
    assert run.settings == {"policy": {"kl": {"beta": 0.1}}}
    about = run.manifest
    assert (about["status"], about["trainer"], about["advantage"]) == ("finished", "a loop", "derived")
    assert about["channels"] == ["score", "kl"] and about["critic"] == "none" and about["positions"] == "tokens"
    assert about["conventions"]["beta"] == 0.1 and about["absent"] == [
        "active", "new_logprob", "old_eos_logprob", "reference_eos_logprob", "values",
    ]  # fmt: skip
    assert [step.channels for step in run.traces()] == [("score", "kl")] * 3
    found = metrics(run)
    assert found["policy/loss"] == [0.5] * 3
    assert found["kl/beta"] == [0.2] * 3  # the trainer's own word counts
    assert found["length/mean"] == [1.5] * 3 and found["length/ended"] == [0.75] * 3
    assert found["score/mean"] == [0.5] * 3 and found["score/std"] == [0.5] * 3
    assert np.allclose(found["kl/reference_per_sequence"], 0.75)  # 3, 2, 1 and 0 tokens of 0.5 nats
    assert np.allclose(found["kl/reference_per_token"], 0.5)
    assert np.allclose(found["kl/reference_per_sequence_k3"], 1.5 * (math.exp(-0.5) - 0.5))
    assert np.allclose(found["kl/sampler_gap"], 0.02) and np.allclose(found["entropy/per_token"], 0.7)
    assert np.allclose(found["weight/kl"], -0.1) and np.allclose(found["weight/score"], 1)


def test_checks_read_it(tmp_path: Path) -> None:
    """Every check answers, empty responses, NaN scores and a prompt with one response among the rows."""
    with Recorder(tmp_path, GRPO) as recorder:
        for step in range(12):
            recorder.step(rows_of(step, group=[0, 0, 0, 1]))
            # a reward function that scored nothing
    run = read_run(tmp_path)
    with np.errstate(all="ignore"):
        found = run_checks(view_of(run, reducers()))
    assert {one.status for one in found} <= {"ok", "warn", "fail", "not_checked"}


def test_several_scores_and_those_that_were_not_given(tmp_path: Path) -> None:
    scores = {"fit": [1.0, np.nan, 3.0, np.nan], "form": [np.nan] * 4}
    rows = Rows(0, np.ones((4, 2), bool), scores, {"fit": 2.0}, group=[0, 0, 1, 1])
    with Recorder(tmp_path, Conventions("any", kl="none", normalisation="group mean")) as recorder:
        recorder.step(rows)
    found = metrics(read_run(tmp_path))
    assert found["rewards/fit/mean"] == [2.0] and found["rewards/fit/std"] == [1.0]
    assert "rewards/form/mean" not in found and "score/mean" not in found
    assert found["reward/mean"] == [2.0]  # 2 * (1 + 0 + 3 + 0) / 4


def test_explained_variance_of_a_critic(tmp_path: Path) -> None:
    """Two tokens each, score 1 and 3 at the end, values that lack half of it: returns 1, 1, 3, 3 at lambda 1."""
    values = np.array([[0.5, 0.5], [1.5, 1.5]])
    rows = Rows(0, np.ones((2, 2), bool), {"score": [1.0, 3.0]}, values=values, advantage=[[0.5, 0.5], [1.5, 1.5]])
    with Recorder(tmp_path, Conventions("any", kl="none", normalisation="none", critic=True)) as recorder:
        recorder.step(rows)
    found = metrics(read_run(tmp_path))
    assert np.allclose(found["value/explained_variance.critic"], 1 - 0.25)
    assert np.allclose(found["advantage/mean"], 1.0) and np.allclose(found["advantage/std"], 0.5)


def test_an_interrupted_loop_keeps_its_steps(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, GRPO) as recorder:
        for step in range(3):
            recorder.step(rows_of(step))
        raise KeyboardInterrupt
    run = read_run(tmp_path)
    assert run.manifest["status"] == "interrupted" and run.events()[-1]["event"] == "interrupted"
    assert [step.step for step in run.traces()] == [0, 1, 2]
    assert len(metrics(run)["length/mean"]) == 3


def test_steps_that_do_not_rise(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO) as recorder:
        recorder.step(rows_of(4))
        for again in (4, 3):
            with pytest.raises(InputError, match=rf"step {again} came after step 4; steps must rise"):
                recorder.step(rows_of(again))
        recorder.step(rows_of(5))
    assert read_run(tmp_path).steps() == (4, 5)


LOOP = """
import os, sys
sys.path.insert(0, {folder!r})
from test_recorder import GRPO, Recorder, rows_of
recorder = Recorder({out!r}, GRPO)
for step in range(5):
    recorder.step(rows_of(step))
recorder.flush()
{end}
"""


def loop(out: Path, end: str) -> int:
    program = LOOP.format(folder=str(Path(__file__).parent), out=str(out), end=end)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    return done.returncode


def test_resumed_after_a_kill(tmp_path: Path) -> None:
    """Steps 0 to 4 are on disk; the trainer goes on from a checkpoint before step 3, with other rows."""
    out = tmp_path / "run"
    assert loop(out, "os.kill(os.getpid(), 9)") == -9
    run = read_run(out)
    assert run.manifest["status"] == "running" and run.steps() == (0, 1, 2, 3, 4)
    (out / "trace" / ".step-000009.parquet.tmp").write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "pol')
    with Recorder(out, GRPO, resume=True) as recorder:
        recorder.step(rows_of(3, responses=["other"] * 4))
        recorder.step(rows_of(4))
    run = read_run(out)
    assert run.steps() == (0, 1, 2, 3, 4) and run.manifest["status"] == "finished"
    assert [step.responses[0] for step in run.traces()] == ["a b c"] * 3 + ["other", "a b c"]
    assert run.metrics("policy")["length/mean"].steps.tolist() == [0, 1, 2, 3, 4]
    assert [event["event"] for event in run.events()] == ["resumed"]
    assert not list(out.glob("trace/.*"))


def test_resumed_further_back(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO) as recorder:
        for step in range(5):
            recorder.step(rows_of(step))
    with Recorder(tmp_path, GRPO, resume=True) as recorder:
        recorder.step(rows_of(2))
    assert read_run(tmp_path).steps() == (0, 1, 2)


def test_resume_where_nothing_is(tmp_path: Path) -> None:
    with Recorder(tmp_path / "new", GRPO, resume=True) as recorder:
        recorder.step(rows_of(0))
    assert read_run(tmp_path / "new").steps() == (0,)


@pytest.mark.parametrize("end", ["", "raise ValueError", "sys.exit(3)"])
def test_a_recorder_that_nobody_closed(tmp_path: Path, end: str) -> None:
    code = loop(tmp_path / "run", end)
    run = read_run(tmp_path / "run")
    assert run.steps() == (0, 1, 2, 3, 4)
    assert run.manifest["status"] == ("interrupted" if end.startswith("raise") else "finished")
    assert code == {"": 0, "raise ValueError": 1, "sys.exit(3)": 3}[end]


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO):
        pass
    with pytest.raises(InputError, match="not empty"):
        Recorder(tmp_path, GRPO)
    with pytest.raises(InputError, match="normalisation was 'group mean and deviation' and is 'none' now"):
        Recorder(tmp_path, Conventions("a loop", normalisation="none", kl="reward", kl_estimator="k1"), resume=True)
    Recorder(tmp_path, GRPO, resume=True).close()


def test_a_run_of_another_writer_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "status": "finished"}))
    with pytest.raises(InputError, match="not written by a recorder"):
        Recorder(tmp_path, GRPO, resume=True)


def test_a_disk_that_fails(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, GRPO)
    shutil.rmtree(tmp_path / "trace")
    (tmp_path / "trace").write_text("in the way")
    recorder.step(rows_of(0))
    with pytest.raises(InputError, match="cannot be written"):
        recorder.flush()
    recorder.step(rows_of(1))
    with pytest.raises(InputError, match="cannot be written"):
        recorder.close()
    assert read_run(tmp_path).manifest["status"] == "interrupted"
    recorder.close()


def test_an_error_on_its_way_out_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path, GRPO) as recorder:
        shutil.rmtree(tmp_path / "trace")
        (tmp_path / "trace").write_text("in the way")
        recorder.step(rows_of(0))
        raise ZeroDivisionError


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "file" / "run", GRPO)


def test_arrays_may_be_used_again(tmp_path: Path) -> None:
    """A loop that fills the same buffers anew while the thread has not written them yet."""
    buffers = {name: np.zeros((2, 3)) for name in ("old_logprob", "reference_logprob")}
    mask, score, texts = np.ones((2, 3), bool), np.zeros(2), ["", ""]
    with Recorder(tmp_path, Conventions("any", kl="none", normalisation="none", critic=False)) as recorder:
        for step in range(8):
            score[:], texts[:] = step, [str(step)] * 2
            for buffer in buffers.values():
                buffer[:] = -step
            mask[:] = True
            recorder.step(Rows(step, mask, {"score": score}, responses=texts, **buffers))
            mask[:] = False
            score[:] = texts[:] = [99, 99]
    for step in read_run(tmp_path).traces():
        assert step.rewards[0, -1, 0] == step.step and (step.tokens["old_logprob"] == -step.step).all()
        assert step.responses == (str(step.step),) * 2


def test_wrong_arrays_are_told_at_once(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO) as recorder:
        with pytest.raises(InputError, match=r"step 0: entropy has shape \(1,\)"):
            recorder.step(rows_of(0, entropy=[0.0]))
        with pytest.raises(InputError, match="metric 'policy/loss': list is not a number"):
            recorder.step(rows_of(0), **{"policy/loss": [1.0]})  # type: ignore[arg-type]
        with pytest.raises(InputError, match="metric 'stage': this name is taken"):
            recorder.step(rows_of(0), stage=1.0)
        recorder.step(rows_of(0))
    assert read_run(tmp_path).steps() == (0,)


def test_advantages_that_are_not_finite_are_noted(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO) as recorder:
        recorder.step(rows_of(0, advantage=[0.0, 0.0, 0.0, 0.0]))
        recorder.step(rows_of(1, advantage=[math.nan, 0.0, 0.0, 0.0]))
    run = read_run(tmp_path)
    assert [event["step"] for event in run.events()] == [1]
    assert run.manifest["advantage"] == "mixed" and "advantage" not in run.manifest["absent"]
    assert run.manifest["channels"] == ["score", "kl", "rest"]
    assert "advantage" in run.step(1).absent


@pytest.mark.parametrize("text", ["full", "hashed", "none"])
def test_texts_are_kept_as_asked(tmp_path: Path, text: Any) -> None:
    with Recorder(tmp_path, GRPO, text=text, keep=2) as recorder:
        for step in range(4):
            recorder.step(rows_of(step, response_ids=np.full((4, 3), 7)))
    run = read_run(tmp_path)
    assert run.steps() == (2, 3) and run.manifest["text"] == text
    step = run.step(3)
    assert (step.responses[0] == "a b c", step.responses[0] is None) == (text == "full", text == "none")
    assert (step.response_ids is None) == (text != "full")


def sample(step: int, **changes: Any) -> SampleRecord:
    given: dict[str, Any] = {
        "prompt": ["p", "q", "r"],
        "response": ["a b", "c", "d e f"],
        "reference_response": ["a", "c", "d"],
        "response_tokens": [["a", "b"], ["c"], ["d", "e", "f"]],
        "token_kl": [[1.0, 0.5], [0.0], [0.5, 0.5, 0.5]],
        "score": [2.0, 1.0, 0.0],
        "reference_score": [1.0, 1.0, 1.0],
        "reference_kl": [-0.5, 0.0, -1.0],
        "length": [2, 1, 3],
        "reference_tokens": [1, 1, 1],
        "reference_length": [1.0, 1.0, 2.0],
        "tercile": [0, 1, 2],
    }
    return SampleRecord(step=step, **(given | changes))


def test_evaluations(tmp_path: Path) -> None:
    with Recorder(tmp_path, GRPO) as recorder:
        recorder.samples(sample(0), **{"evaluation/ended": 0.5})
        recorder.step(rows_of(0))
        recorder.samples(sample(1, score=[3.0, 1.0, math.nan]))
    run = read_run(tmp_path)
    assert run.sample_steps() == (0, 1)
    found = metrics(run, "evaluation")
    assert found["evaluation/ended"] == [0.5]
    assert found["evaluation/score"] == [1.0, 2.0] and found["evaluation/score_reference"] == [1.0, 1.0]
    assert found["evaluation/kl_per_sequence"] == [1.0, 1.0] and found["evaluation/kl_per_token"] == [0.5, 0.5]
    assert found["evaluation/length"] == [2.0, 2.0] and found["evaluation/length_reference"] == [1.0, 1.0]
    assert found["evaluation/win_rate"] == [0.5, 0.75]
    # Wilson at 3 of which half are won: centre 0.5, half-width 1.96 / (1 + z2 / 3) * sqrt(0.25 / 3 + z2 / 36)
    z2 = 1.959964**2
    half = 1.959964 / (1 + z2 / 3) * math.sqrt(0.25 / 3 + z2 / 36)
    ends = [found[f"evaluation/win_rate_{end}"][0] for end in ("low", "high")]
    assert np.allclose(ends, [0.5 - half, 0.5 + half])
    assert found["evaluation/tercile2/length_ratio"] == [3.0, 3.0]
    assert found["evaluation/tercile0/score"] == [2.0, 3.0]


def test_evaluations_of_a_resumed_run(tmp_path: Path) -> None:
    """The evaluation at the checkpoint stays unless it is given again; later ones go."""
    with Recorder(tmp_path, GRPO) as recorder:
        for step in range(4):
            recorder.samples(sample(step))
            recorder.step(rows_of(step))
    shutil.copytree(tmp_path, other := tmp_path.with_name("other"))
    with Recorder(tmp_path, GRPO, resume=True) as recorder:
        recorder.step(rows_of(2))
    assert read_run(tmp_path).metrics("evaluation")["evaluation/score"].steps.tolist() == [0, 1, 2]
    with Recorder(other, GRPO, resume=True) as recorder:
        recorder.samples(sample(2, score=[9.0, 9.0, 9.0]))
    found = read_run(other).metrics("evaluation")["evaluation/score"]
    assert found.steps.tolist() == [0, 1, 2] and found.values.tolist() == [1.0, 1.0, 9.0]
    assert read_run(other).steps() == (0, 1)
