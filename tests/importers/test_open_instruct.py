"""open-instruct's rollout shards: steps that interleave and go on in the next shard, restarts, and what is refused.

Prompt 0 is 7 8 9 with the answers 20 21 (reward 3, stopped) and 30 31 32 (reward 1, at the budget); prompt 1 is 5 with
50 (reward 2) and 60 (reward 2). Centred: 1, -1, 0, 0; over the deviation of the first group, which is 1, the same: only
a second reward, 4 for the third row, tells the two apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import imported, refused, write_lines


def record(step: int, sample: int, response: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "sample_idx": sample,
        "prompt_idx": sample // 2,
        "prompt_tokens": [7, 8, 9] if sample < 2 else [5],
        "response_tokens": response,
        "reward": 2.0,
        "advantage": 0.0,
        "finish_reason": "stop",
        "dataset": "math",
        "ground_truth": [1],
        "request_info": None,
        "logprobs": [-0.1 * (sample + 1)] * len(response),
    } | changes


def step_of(number: int) -> list[dict[str, Any]]:
    return [
        record(number, 0, [20, 21], reward=3.0, advantage=1.0),
        record(number, 1, [30, 31, 32], reward=1.0, advantage=-1.0, finish_reason="length"),
        record(number, 2, [50], reward=4.0, advantage=1.0),
        record(number, 3, [60], reward=2.0, advantage=-1.0),
    ]


def shard(folder: Path, number: int, rows: list[dict[str, Any]], run: str = "grpo_7b") -> Path:
    return write_lines(folder / f"{run}_rollouts_{number:06d}.jsonl", rows)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rollouts"


def test_steps_interleave_and_go_on_in_the_next_shard(
    capsys: pytest.CaptureFixture[str], folder: Path, out: Path
) -> None:
    first, second, third = step_of(1), step_of(2), step_of(3)
    shard(folder, 0, [*first[:3], *second[:2], first[3], *third[:1]])
    shard(folder, 1, [*second[2:], *third[1:]])
    about = {"run_name": "grpo_7b", "git_commit": "abc123", "model_name": "olmo", "timestamp": "2026-01-01"}
    write_lines(folder / "grpo_7b_metadata.jsonl", [about])

    run, said = imported(capsys, folder, out)

    assert run.steps() == (1, 2, 3) and said["rows"] == 12 and said["format"] == "open-instruct"
    assert run.manifest["conventions"]["trainer"] == "open-instruct commit abc123 model olmo"
    for number in run.steps():
        step = run.step(number)
        np.testing.assert_array_equal(step.response_ids, [[20, 21, 0], [30, 31, 32], [50, 0, 0], [60, 0, 0]])
        assert step.lengths.tolist() == [2, 3, 1, 1] and step.group.tolist() == [0, 0, 1, 1]
        assert step.ended.tolist() == [True, False, True, True]
        np.testing.assert_allclose(step.rewards[..., step.channels.index("score")].sum(axis=1), [3, 1, 4, 2])
        sampler = step.tokens["behaviour_logprob"][step.response_mask]
        np.testing.assert_allclose(sampler, [-0.1, -0.1, -0.2, -0.2, -0.2, -0.3, -0.4], rtol=1e-6)
        np.testing.assert_allclose(step.advantage()[step.response_mask], [1, 1, -1, -1, -1, 1, -1], atol=1e-4)
        assert {"old_logprob", "reference_logprob", "entropy"} <= step.absent


@pytest.mark.parametrize(
    ("advantages", "normalisation"),
    [
        ([2.0, -2.0, 1.0, -1.0], "group-mean"),  # rewards 5 and 1, 4 and 2
        ([1.0, -1.0, 1.0, -1.0], "group-mean-and-deviation"),
        ([4.0, -4.0, 2.0, -2.0], "leave-one-out"),
        ([0.3, -0.1, 0.2, -0.7], "unknown"),
    ],
)
def test_the_advantage_shows_what_made_it(
    capsys: pytest.CaptureFixture[str], folder: Path, out: Path, advantages: list[float], normalisation: str
) -> None:
    rewards = (5.0, 1.0, 4.0, 2.0)
    rows = [
        row | {"reward": reward, "advantage": advantage}
        for row, reward, advantage in zip(step_of(1), rewards, advantages, strict=True)
    ]
    shard(folder, 0, rows)
    run, said = imported(capsys, folder, out)
    assert said["answers"]["normalisation"] == normalisation
    recorded = np.repeat(advantages, [2, 3, 1, 1])
    np.testing.assert_allclose(run.step(1).advantage()[run.step(1).response_mask], recorded, atol=1e-4)


def test_after_a_restart_the_later_rows_count(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    again = [row | {"response_tokens": [99], "logprobs": [-1.0]} for row in step_of(2)]
    shard(folder, 0, [*step_of(1), *step_of(2), *again])
    run, said = imported(capsys, folder, out)
    np.testing.assert_array_equal(run.step(1).response_ids, [[20, 21, 0], [30, 31, 32], [50, 0, 0], [60, 0, 0]])
    np.testing.assert_array_equal(run.step(2).response_ids, [[99]] * 4)
    assert said["notes"] == ["4 rows were written again after a restart; the later ones are read"]


def test_without_log_probabilities_there_are_none(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    run, _ = imported(capsys, shard(folder, 0, [row | {"logprobs": None} for row in step_of(1)]), out)
    assert "behaviour_logprob" in run.step(1).absent


def test_tools_are_told(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    shard(folder, 0, [row | {"request_info": {"tool_calleds": True}} for row in step_of(1)])
    _, said = imported(capsys, folder, out)
    assert any("a tool wrote" in note for note in said["notes"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprobs": [-0.1]}, "logprobs has 1 entries, expected 2"),
        ({"response_tokens": [], "logprobs": []}, "the loss took none of its tokens"),
        ({"response_tokens": "text"}, "response_tokens is no list of token ids"),
        ({"reward": None}, "reward is not a finite number"),
        ({"advantage": float("nan")}, "advantage is not a finite number"),
    ],
)
def test_malformed_rows_are_counted(
    capsys: pytest.CaptureFixture[str], folder: Path, out: Path, changes: dict[str, Any], reason: str
) -> None:
    rows = step_of(1)
    file = shard(folder, 0, [rows[0] | changes, *rows[1:]])
    run, said = imported(capsys, folder, out)
    assert said["rows"] == 4 and len(run.step(1)) == 3
    assert said["left_out"] == {reason: {"rows": 1, "first": f"{file}:1"}}


def test_torn_mixed_and_foreign_files(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    file = shard(folder, 0, step_of(1))
    whole = file.read_bytes()

    file.write_bytes(whole[:-30])
    assert f"{file}:4" in refused(capsys, folder, out)

    write_lines(file, [*step_of(1), {"prompt": "x"}])
    message = refused(capsys, folder, out)
    assert f"{file}:5: the record lacks" in message and "prompt_tokens" in message

    write_lines(file, [step_of(1)[0] | {"step": "one"}])
    assert f"{file}:1: step and sample_idx are whole numbers" in refused(capsys, folder, out)

    file.write_bytes(whole)
    shard(folder, 0, step_of(1), run="other")
    message = refused(capsys, folder, out)
    assert "holds rollouts of 2 runs: grpo_7b, other" in message

    message = refused(capsys, folder.parent, out, "--format", "open-instruct")
    assert "holds no {run}_rollouts_{shard}.jsonl" in message and "response_tokens" in message
