"""prime-rl's token exports: packed sequences, ranks, markers, and what is refused.

One record packs two sequences: 7 8 -> 20 21 and 7 8 -> 30 40 31, of which 40 is an environment's. Rank 1 has a third,
of another prompt: 5 -> 50.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import imported, refused, write_lines


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "step": 4,
        "export_step": 4,
        "rank": 0,
        "micro_step": 0,
        "micro_sequence_idx": 0,
        "export_sequence_idx": 0,
        "run_id": None,
        "env_name": "math",
        "token_ids": [7, 8, 20, 21, 7, 8, 30, 40, 31],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 3, 4],
        "loss_mask": [False, False, True, True, False, False, True, False, True],
        "advantages": [0.0, 0.0, 0.5, 0.25, 0.0, 0.0, -0.5, 0.0, -0.75],
        "inference_logprobs": [0.0, 0.0, -0.1, -0.2, 0.0, 0.0, -0.3, 0.0, -0.4],
        "trainer_logprobs": [-9.0, -9.0, -0.15, -0.25, -9.0, -9.0, -0.35, -9.0, -0.45],
        "entropy": [3.0, 3.0, 1.0, 1.1, 3.0, 3.0, 1.2, 3.0, 1.3],
        "mismatch_kl": [0.0] * 9,
        "log_importance_ratio": [0.0] * 9,
        "importance_ratio": [1.0] * 9,
        "prob_delta": [0.0] * 9,
        "is_masked": [False, False, False, True, False, False, False, False, False],
        "is_masked_high": [False] * 9,
        "is_masked_low": [False] * 9,
        "rl_weights": [None] * 9,
        "ce_weights": [None] * 9,
        "ref_kl_weights": [None] * 9,
    } | changes


def single(**changes: Any) -> dict[str, Any]:
    return packed(
        **{
            "rank": 1,
            "token_ids": [5, 50],
            "position_ids": [0, 1],
            "loss_mask": [False, True],
            "advantages": [0.0, 2.0],
            "inference_logprobs": [0.0, -0.5],
            "trainer_logprobs": [-9.0, -0.55],
            "entropy": [3.0, 1.4],
            **dict.fromkeys(("is_masked", "is_masked_high", "is_masked_low"), [False] * 2),
            **dict.fromkeys(("mismatch_kl", "log_importance_ratio", "importance_ratio", "prob_delta"), [0.0] * 2),
            **dict.fromkeys(("rl_weights", "ce_weights", "ref_kl_weights"), [None] * 2),
        }
        | changes
    )


def export(tmp_path: Path, step: int = 4, *, stable: bool = True, **ranks: list[dict[str, Any]]) -> Path:
    """An output folder with one more step; `rank_0=[...]` names the files."""
    folder = tmp_path / "outputs" / "token_exports" / f"step_{step}"
    for name, rows in ranks.items():
        write_lines(folder / f"{name}.jsonl", [row | {"step": step, "export_step": step} for row in rows])
    if stable:
        (folder / "STABLE").touch()
    return tmp_path / "outputs"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_packed_sequences_are_split_and_ranks_put_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path
) -> None:
    run, said = imported(capsys, export(tmp_path, rank_0=[packed()], rank_1=[single()]), out)
    step = run.step(4)
    assert said["format"] == "prime-rl" and said["rows"] == 3 and said["answers"] == {"kl": "none"}
    np.testing.assert_array_equal(step.response_ids, [[20, 21, 0], [30, 40, 31], [50, 0, 0]])
    np.testing.assert_array_equal(step.response_mask, [[True, True, False], [True, False, True], [True, False, False]])
    assert step.group.tolist() == [0, 0, 1]  # the same prompt tokens
    mask = step.response_mask
    np.testing.assert_allclose(step.tokens["behaviour_logprob"][mask], [-0.1, -0.2, -0.3, -0.4, -0.5], rtol=1e-6)
    np.testing.assert_allclose(step.tokens["old_logprob"][mask], [-0.15, -0.25, -0.35, -0.45, -0.55], rtol=1e-6)
    np.testing.assert_allclose(step.tokens["entropy"][mask], [1.0, 1.1, 1.2, 1.3, 1.4], rtol=1e-6)
    np.testing.assert_array_equal(step.active[mask], [True, False, True, True, True])
    np.testing.assert_allclose(step.advantage()[mask], [0.5, 0.25, -0.5, -0.75, 2.0], atol=1e-4)
    assert {"score", "ended", "reference_logprob", "new_logprob"} <= step.absent


@pytest.mark.parametrize("level", ["token_exports", "token_exports/step_4", "token_exports/step_4/rank_0.jsonl"])
def test_any_level_of_the_folder_will_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path, level: str
) -> None:
    export(tmp_path, rank_0=[packed()])
    run, _ = imported(capsys, tmp_path / "outputs" / level, out)
    assert run.steps() == (4,) and len(run.step(4)) == 2


def test_a_step_that_is_being_written_is_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path
) -> None:
    export(tmp_path, 10, stable=False, rank_0=[packed()])
    assert "still being written" in refused(capsys, tmp_path / "outputs", out)
    export(tmp_path, 9, rank_0=[packed()])
    run, said = imported(capsys, tmp_path / "outputs", out)
    assert run.steps() == (9,)
    assert said["notes"] == ["step 10 has no STABLE marker: it is still being written, and was left out"]


def test_weights_scale_the_advantage(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    """The token at weight 0 belongs to another part of the loss."""
    row = single(
        token_ids=[5, 50, 51], position_ids=[0, 1, 2], loss_mask=[False, True, True], advantages=[0.0, 2.0, 2.0],
        inference_logprobs=[0.0, -0.5, 0.0], trainer_logprobs=[0.0, -0.6, -0.7], entropy=[1.0, 1.0, 1.0],
        is_masked=[None] * 3, rl_weights=[0.0, 0.5, 0.0], ce_weights=[0.0, 0.0, 1.0], ref_kl_weights=[0.0, 0.1, 0.0],
    )  # fmt: skip
    run, said = imported(capsys, export(tmp_path, rank_0=[row]), out)
    step = run.step(4)
    np.testing.assert_array_equal(step.response_ids, [[50]])
    assert "active" in step.absent
    np.testing.assert_allclose(step.advantage(), [[1.0]], atol=1e-4)
    assert said["answers"] == {"kl": "loss"} and any("ref_kl_weights" in note for note in said["notes"])


def test_rewards_where_they_are_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    """Each token repeats its response's reward: 1 and 0, centred 0.5 and -0.5."""
    advantages = [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, -0.5, 0.0, -0.5]
    row = packed(rewards=[1.0] * 4 + [0.0] * 5, advantages=advantages)
    run, _ = imported(capsys, export(tmp_path, rank_0=[row]), out)
    step = run.step(4)
    np.testing.assert_allclose(step.rewards[..., step.channels.index("score")].sum(axis=1), [1, 0])
    np.testing.assert_allclose(step.advantage()[step.response_mask], [0.5, 0.5, -0.5, -0.5], atol=1e-4)
    assert run.manifest["conventions"]["normalisation"] == "group mean"


def test_null_is_a_number_that_was_not_finite(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    row = single(trainer_logprobs=[None, None])
    run, said = imported(capsys, export(tmp_path, rank_0=[packed()], rank_1=[row]), out)
    assert "old_logprob" in run.step(4).absent and len(run.step(4)) == 3
    assert any("old_logprob is missing from some rows" in note for note in said["notes"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainer_logprobs": [-1.0]}, "trainer_logprobs has 1 entries, expected 2"),
        ({"loss_mask": [False, False]}, "the loss took none of its tokens"),
        ({"token_ids": ["a", "b"]}, "token_ids is no list of token ids"),
        ({"advantages": [0.0, "much"]}, "advantages is no list of numbers"),
    ],
)
def test_malformed_rows_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path, changes: dict[str, Any], reason: str
) -> None:
    path = export(tmp_path, rank_0=[packed()], rank_1=[single(), single(**changes)])
    run, said = imported(capsys, path, out)
    file = path / "token_exports" / "step_4" / "rank_1.jsonl"
    assert said["rows"] == 4 and len(run.step(4)) == 3
    assert said["left_out"] == {reason: {"rows": 1, "first": f"{file}:2"}}


def test_torn_mixed_and_foreign_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    path = export(tmp_path, rank_0=[packed(), packed()])
    file = path / "token_exports" / "step_4" / "rank_0.jsonl"
    whole = file.read_bytes()

    file.write_bytes(whole[:-50])
    assert f"{file}:2" in refused(capsys, path, out)

    write_lines(file, [packed(), packed(step=5, export_step=5)])
    message = refused(capsys, path, out)
    assert f"{file}:2: its step is 5, the folder's name says 4" in message

    write_lines(file, [packed(schema_version=2)])
    assert "schema version 2; this Kedge reads 1" in refused(capsys, path, out)

    write_lines(file, [packed(), {"input": "x"}])
    message = refused(capsys, path, out)
    assert f"{file}:2: the record lacks" in message and "position_ids" in message

    write_lines(file, [{"trace": "an episode"}])
    assert "not recognised" in refused(capsys, path, out)
    message = refused(capsys, tmp_path, out, "--format", "prime-rl")
    assert "holds no token_exports/step_{n}" in message and "STABLE" in message
