"""NeMo-RL's train_data_step files: every number where it belongs, and what is refused.

The step: prompt 7 8 9 with the answers 20 21 22 (reward 1) and 30 31 (reward 0.5; two turns: 30, an environment's
90 91, 31), padded to 8. Rewards 1 and 0.5 in one group give advantages 0.25 and -0.25 over the deviation 0.25.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import imported, refused, write_lines

PAD = 0


def sample(**changes: Any) -> dict[str, Any]:
    """A record as the logger writes it: every value a list of one."""
    plain = {
        "content": ["system. ", "question", "answer", "Environment: correct"],
        "rewards": 1.0,
        "input_lengths": 7,
        "token_ids": [7, 8, 9, 20, 21, 22, 90, PAD],
        "token_loss_mask": [0, 0, 0, 1, 1, 1, 0, 0],
        "sample_loss_mask": 1.0,
        "advantages": [1.0] * 8,
        "generation_logprobs": [0.0, 0.0, 0.0, -0.1, -0.2, -0.3, 0.0, 5.0],
        "prev_logprobs": [0.0, -9.0, -9.0, -0.4, -0.5, -0.6, -9.0, 5.0],
    } | changes
    return {name: [value] for name, value in plain.items()} | {"idx": 0}


def other(**changes: Any) -> dict[str, Any]:
    return sample(
        **{
            "content": ["system. ", "question", "one", "tool says", "two"],
            "rewards": 0.5,
            "token_ids": [7, 8, 9, 30, 90, 91, 31, PAD],
            "token_loss_mask": [0, 0, 0, 1, 0, 0, 1, 0],
            "advantages": [-1.0] * 8,
            "generation_logprobs": [0.0, 0.0, 0.0, -0.7, 0.0, 0.0, -0.8, 5.0],
            "prev_logprobs": [0.0, -9.0, -9.0, -0.75, -9.0, -9.0, -0.85, 5.0],
        }
        | changes
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_every_number_is_where_it_belongs(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "logs" / "exp_001"
    for number in (10, 2):
        write_lines(folder / f"train_data_step{number}.jsonl", [sample(), other()])
    write_lines(folder / "val_data_step2.jsonl", [{"content": ["x"], "rewards": [1.0], "idx": 0}])

    run, said = imported(capsys, tmp_path / "logs", out)

    assert run.steps() == (2, 10) and said["format"] == "nemo-rl" and said["rows"] == 4 and said["left_out"] == {}
    assert said["answers"]["normalisation"] == "group-mean-and-deviation"  # (1 - 0.75) / 0.25
    step = run.step(10)
    assert step.group.tolist() == [0, 0]
    np.testing.assert_array_equal(step.response_ids, [[20, 21, 22, 0], [30, 90, 91, 31]])
    np.testing.assert_array_equal(step.response_mask, [[True, True, True, False], [True, False, False, True]])
    behaviour, old = step.tokens["behaviour_logprob"], step.tokens["old_logprob"]
    np.testing.assert_allclose(behaviour[step.response_mask], [-0.1, -0.2, -0.3, -0.7, -0.8], rtol=1e-6)
    np.testing.assert_allclose(old[step.response_mask], [-0.4, -0.5, -0.6, -0.75, -0.85], rtol=1e-6)
    np.testing.assert_allclose(step.advantage()[step.response_mask], [1, 1, 1, -1, -1], atol=1e-4)
    score = step.rewards[..., step.channels.index("score")]
    np.testing.assert_allclose(score.sum(axis=1), [1, 0.5])
    assert score[0, 2] == 1  # on the last token of the policy's
    assert {"reference_logprob", "ended"} <= step.absent
    assert not {"behaviour_logprob", "old_logprob", "group", "advantage", "score"} & step.absent


def test_text_only_where_it_is_known_who_said_what(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path
) -> None:
    write_lines(tmp_path / "one" / "train_data_step1.jsonl", [sample(), sample(rewards=0.0, advantages=[-1.0] * 8)])
    write_lines(tmp_path / "two" / "train_data_step1.jsonl", [sample(), other()])
    run, _ = imported(capsys, tmp_path / "one", out)
    assert run.step(1).responses == ("answer", "answer") and run.step(1).prompts == ("system. question",) * 2
    run, _ = imported(capsys, tmp_path / "two", tmp_path / "run2")
    assert run.step(1).responses == (None, None)


def test_filtered_rewards_belong_to_the_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    rows = [sample(rewards=9.0, filtered_rewards=1.0), other(rewards=8.0, filtered_rewards=0.0)]
    run, said = imported(capsys, write_lines(tmp_path / "train_data_step1.jsonl", rows), out)
    np.testing.assert_allclose(run.step(1).rewards[..., 0].sum(axis=1), [1, 0])
    assert any("filtered_rewards are read" in note for note in said["notes"])


def test_zeros_are_not_log_probabilities(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    """force_on_policy_ratio writes zeros for prev_logprobs."""
    rows = [sample(prev_logprobs=[0.0] * 8), other(prev_logprobs=[0.0] * 8)]
    run, said = imported(capsys, write_lines(tmp_path / "train_data_step1.jsonl", rows), out)
    assert "old_logprob" in run.step(1).absent and "behaviour_logprob" not in run.step(1).absent
    assert any("did not compute it" in note for note in said["notes"])


def test_what_the_loss_left_out_has_no_advantage(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    rows = [sample(), other(sample_loss_mask=0.0)]
    run, said = imported(capsys, write_lines(tmp_path / "train_data_step1.jsonl", rows), out)
    step = run.step(1)
    np.testing.assert_allclose(step.advantage()[step.response_mask], [1, 1, 1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(step.rewards[..., 0].sum(axis=1), [1, 0.5])
    assert any("sample_loss_mask 0" in note for note in said["notes"])


def test_columns_of_a_local_edit(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    reference = [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, 5.0]
    values = [0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 5.0]
    rows = [sample(reference_policy_logprobs=reference, values=values)]
    file = write_lines(tmp_path / "train_data_step1.jsonl", rows)
    run, _ = imported(capsys, file, out, "--answer", "kl=loss", "--answer", "kl_estimator=k3", "--answer", "beta=0.01")
    step = run.step(1)
    np.testing.assert_allclose(step.tokens["reference_logprob"][0], [-1, -2, -3])
    np.testing.assert_allclose(step.values[0, :, step.channels.index("critic")], [0.1, 0.2, 0.3], rtol=1e-6)
    assert run.manifest["conventions"]["kl"] == "loss" and run.manifest["conventions"]["beta"] == 0.01
    np.testing.assert_allclose(step.loss_beta, 0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prev_logprobs": [0.0] * 7}, "prev_logprobs has 7 entries, expected 8"),
        ({"token_loss_mask": [0] * 8}, "the loss took none of its tokens"),
        ({"token_loss_mask": [0, 0, 0, 2, 1, 1, 0, 0]}, "token_loss_mask is no list of 0 and 1"),
        ({"input_lengths": 9}, "input_lengths is more than there are token_ids"),
        ({"input_lengths": "7"}, "input_lengths is no whole number of at least 0"),
        ({"rewards": "good"}, "the reward is not a finite number"),
        ({"token_ids": [7.5] * 8}, "token_ids is no list of token ids"),
        ({"token_ids": [[7], [8, 9]]}, "token_ids is no list of token ids"),
        ({"advantages": "none"}, "advantages is no list of numbers"),
    ],
)
def test_malformed_rows_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path, changes: dict[str, Any], reason: str
) -> None:
    file = write_lines(tmp_path / "train_data_step3.jsonl", [sample(), other(), sample(**changes)])
    run, said = imported(capsys, file, out)
    assert said["rows"] == 3 and len(run.step(3)) == 2
    assert said["left_out"] == {reason: {"rows": 1, "first": f"{file}:3"}}


def test_torn_mixed_and_foreign_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    torn = write_lines(tmp_path / "torn" / "train_data_step1.jsonl", [sample(), other()])
    torn.write_bytes(torn.read_bytes()[:-40])
    assert f"{torn}:2" in refused(capsys, torn, out)

    mixed = write_lines(tmp_path / "mixed" / "train_data_step1.jsonl", [sample(), {"input": "x", "output": "y"}])
    message = refused(capsys, mixed.parent, out)
    assert f"{mixed}:2: the record lacks" in message and "token_ids" in message

    older = {name: value for name, value in sample().items() if name not in ("token_ids", "token_loss_mask")}
    message = refused(capsys, write_lines(tmp_path / "old" / "train_data_step1.jsonl", [older]), out)
    assert "token_ids" in message and "token_loss_mask" in message

    empty = tmp_path / "train_data_step1.jsonl"
    empty.write_text("")
    assert "no rows in it" in refused(capsys, empty, out, "--format", "nemo-rl")

    empty.unlink()
    message = refused(capsys, tmp_path, out, "--format", "nemo-rl")
    assert "holds no train_data_step{N}.jsonl" in message and "token_loss_mask" in message


def test_two_runs_are_not_one(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    for name in ("exp_001", "exp_002"):
        write_lines(tmp_path / "logs" / name / "train_data_step1.jsonl", [sample(), other()])
    message = refused(capsys, tmp_path / "logs", out)
    assert "exp_001, exp_002" in message and "give one of these folders" in message
