"""TRL's completions files: mapping, what the files tell, repeated and overwritten rows, damage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_files import ANSWERS, GRPO, REWARDS, ROOT2, completions, write_trl

from kedge.errors import InputError
from kedge.importers import Intake
from kedge.importers.trl import FORMAT
from kedge.importers.trl_rewards import explanations
from kedge.trace.foreign import Rows

DEFAULTS = {
    "rewards": "all",
    "weights": "1",
    "scale_rewards": "group",
    "beta": "0",
    "use_bias_correction_kl": "unknown",
}


def rows_of(path: Path, intake: Intake | None = None, **answers: str) -> list[Rows]:
    return list(FORMAT.read(path, DEFAULTS | answers, intake or Intake()))


def refusal(path: Path, **answers: str) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(path, **answers)
    return str(caught.value)


def test_a_file_becomes_the_rows_of_a_step(tmp_path: Path) -> None:
    write_trl(tmp_path, 1)
    write_trl(tmp_path, 2)
    assert FORMAT.recognises(tmp_path)
    intake = Intake()
    first, second = rows_of(tmp_path, intake)
    assert (first.step, second.step, intake.rows, intake.left_out) == (1, 2, 8, {})
    assert list(first.scores) == ["accuracy_reward"]
    assert list(first.scores["accuracy_reward"]) == REWARDS
    assert first.weights == {"accuracy_reward": 1.0}
    assert list(first.group) == [0, 0, 1, 1]
    assert first.prompts == ["first?", "first?", "second?", "second?"]
    assert first.responses == [f"{words} 1" for words in ANSWERS]
    assert first.response_mask.sum(axis=1).tolist() == [2, 3, 4, 6]  # words, the number among them
    assert first.advantage.tolist() == GRPO
    assert first.ended is None and first.reference_logprob is None and first.response_ids is None


@pytest.mark.parametrize("kind", ["output_dir", "folder", "file"])
def test_the_output_folder_its_completions_and_one_file_are_recognised(tmp_path: Path, kind: str) -> None:
    file = write_trl(tmp_path, 5)
    path = {"output_dir": tmp_path, "folder": file.parent, "file": file}[kind]
    assert FORMAT.recognises(path)
    assert [rows.step for rows in rows_of(path)] == [5]


def test_what_the_numbers_mean(tmp_path: Path) -> None:
    unknown = FORMAT.conventions(tmp_path, DEFAULTS | {"beta": "unknown", "scale_rewards": "unknown"})
    assert (unknown.kl, unknown.normalisation) == ("unknown", "unknown")
    none = FORMAT.conventions(tmp_path, DEFAULTS)
    assert (none.kl, none.normalisation, none.epsilon) == ("none", "group mean and deviation", 1e-4)
    answers = {"beta": "0.04", "scale_rewards": "none", "use_bias_correction_kl": "false"}
    charged = FORMAT.conventions(tmp_path, DEFAULTS | answers)
    assert (charged.kl, charged.kl_estimator, charged.kl_unit, charged.beta) == ("loss", "k3", "per token", 0.04)
    assert (charged.normalisation, charged.epsilon) == ("group mean", 0.0)
    corrected = FORMAT.conventions(tmp_path, DEFAULTS | {"beta": "0.04", "use_bias_correction_kl": "true"})
    assert corrected.kl_estimator == "k3+"


# What the files tell


def test_the_scaling_is_found_from_the_advantages(tmp_path: Path) -> None:
    write_trl(tmp_path / "group", 1)
    assert FORMAT.told(tmp_path / "group") == {
        "rewards": "accuracy_reward",
        "weights": "1",
        "scale_rewards": "group",
    }
    write_trl(tmp_path / "none", 1, completions(1, advantage=[-1.0, 1.0, -2.0, 2.0]))
    assert FORMAT.told(tmp_path / "none")["scale_rewards"] == "none"
    # Rewards 1, 3, 0, 4: mean 2, squared deviations 1 + 1 + 4 + 4 = 10, over n - 1 = 3.
    batch = [value / (math.sqrt(10 / 3) + 1e-4) for value in (-1.0, 1.0, -2.0, 2.0)]
    write_trl(tmp_path / "batch", 1, completions(1, advantage=batch))
    assert FORMAT.told(tmp_path / "batch")["scale_rewards"] == "batch"
    write_trl(tmp_path / "other", 1, completions(1, advantage=[0.3, 0.1, -2.0, 2.0]))
    assert FORMAT.told(tmp_path / "other") == {}


def test_a_logged_column_is_told_from_a_reward(tmp_path: Path) -> None:
    write_trl(tmp_path, 1, completions(1, latency=[0.5, 0.1, 0.9, 0.2], advantage=[-1.0, 1.0, -2.0, 2.0]))
    assert FORMAT.told(tmp_path)["rewards"] == "accuracy_reward"
    two = tmp_path / "two"  # sums 1, 4, 0.5, 5 have the means 2.5 and 2.75
    columns = {"tone_reward": [0.0, 1.0, 0.5, 1.0], "latency": [0.5, 0.1, 0.9, 0.2]}
    write_trl(two, 1, completions(1, **columns, advantage=[-1.5, 1.5, -2.25, 2.25]))
    assert FORMAT.told(two)["rewards"] == "accuracy_reward,tone_reward"
    constant = tmp_path / "constant"
    write_trl(constant, 1, completions(1, format_reward=[1.0] * 4))
    assert FORMAT.told(constant) == {"scale_rewards": "group"}  # with it or without it, the advantage is the same
    (named,) = rows_of(constant, rewards="format_reward, accuracy_reward", weights="0.5,2")
    assert named.weights == {"format_reward": 0.5, "accuracy_reward": 2.0}


@given(
    rewards=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
    extra=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
)
def test_the_truth_is_always_among_the_explanations(rewards: list[float], extra: list[float]) -> None:
    """Advantages by a loop of their own, for groups of three."""
    advantage = []
    for start in (0, 3):
        group = rewards[start : start + 3]
        mean = sum(group) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in group) / 2)
        advantage += [(value - mean) / (deviation + 1e-4) for value in group]
    scores = {"reward": np.array(rewards), "extra": np.array(extra)}
    found = explanations(scores, np.array(advantage), np.array([0, 0, 0, 1, 1, 1]))
    assert found is None or ("reward", "group") in found


# Prompts of messages


def test_messages_become_text(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "first?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "second?"}, {"type": "image", "text": None}]}]
    answers = [[{"role": "assistant", "content": words}] for words in ANSWERS]
    write_trl(tmp_path, 1, completions(1, prompt=[asked, asked, asked[1:], asked[1:]], completion=answers))
    (rows,) = rows_of(tmp_path)
    assert rows.prompts == ["system: be brief\n\nuser: first?"] * 2 + ["first?"] * 2
    assert rows.responses == ANSWERS
    write_trl(tmp_path / "parts", 1, completions(1, prompt=[parts] * 4))
    (rows,) = rows_of(tmp_path / "parts")
    assert rows.prompts == ["second?"] * 4


# Rows that are there twice, or not the training's


def test_rows_repeated_from_the_file_before_are_dropped_and_counted(tmp_path: Path) -> None:
    write_trl(tmp_path, 1)
    write_trl(tmp_path, 2, completions(1) | {"step": [2] * 4})  # no new generation in between
    new = completions(3)
    half = {name: [*list(completions(1)[name])[2:], *list(new[name])[:2]] for name in new} | {"step": [3] * 4}
    write_trl(tmp_path, 3, half)
    intake = Intake()
    rows = rows_of(tmp_path, intake)
    assert [(one.step, len(one.responses)) for one in rows] == [(1, 4), (3, 2)]
    assert rows[1].responses == ["one 3", "two words 3"]
    ((reason, left),) = intake.left_out.items()
    assert "repeated from the file before" in reason
    assert (left.rows, Path(left.first).name) == (6, "completions_00002.parquet:1")
    assert intake.rows == 12
    assert not any("in the same order" in note for note in intake.notes)


def test_one_row_that_happens_to_come_again_is_kept(tmp_path: Path) -> None:
    """A queue of whole groups never begins in the middle of one."""
    write_trl(tmp_path, 1)
    last = {name: list(column)[-1] for name, column in completions(1).items()}
    again = {name: [last[name], *list(column)[:3]] for name, column in completions(2).items()}
    write_trl(tmp_path, 2, again | {"step": [2] * 4, "prompt": ["second?"] * 4})
    intake = Intake()
    assert [len(one.responses) for one in rows_of(tmp_path, intake)] == [4, 4]
    assert not intake.left_out


def test_a_file_that_an_evaluation_overwrote_is_left_out(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_trl(tmp_path, step)
    history = [{"step": 2, "loss": 0.1}, {"step": 2, "eval_reward": 1.0}, {"step": 3, "loss": 0.1}]
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"log_history": history}))
    intake = Intake()
    assert [one.step for one in rows_of(tmp_path, intake)] == [1, 3]
    assert [(reason[:21], left.rows) for reason, left in intake.left_out.items()] == [("rows of an evaluation", 4)]


def test_the_same_prompts_in_the_same_order_are_pointed_at(tmp_path: Path) -> None:
    write_trl(tmp_path, 10)
    write_trl(tmp_path, 20)
    intake = Intake()
    rows_of(tmp_path, intake)
    assert any("1 files ask the prompts of an earlier one in the same order (steps 20)" in one for one in intake.notes)
    assert any("every 10 steps" in note for note in intake.notes)


# Rows and files that cannot be used


def test_rows_without_a_score_or_an_advantage(tmp_path: Path) -> None:
    write_trl(tmp_path, 1, completions(1, accuracy_reward=[1.0, None, 0.0, math.nan]))
    (rows,) = rows_of(tmp_path)
    assert np.isnan(rows.scores["accuracy_reward"]).tolist() == [False, True, False, True]
    write_trl(tmp_path / "null", 1, completions(1, advantage=[0.5, None, math.nan, -0.5]))
    intake = Intake()
    (rows,) = rows_of(tmp_path / "null", intake)
    assert rows.advantage.tolist() == [0.5, -0.5]
    assert intake.left_out["the advantage is not a finite number"].rows == 2


def test_an_empty_completion_has_one_position(tmp_path: Path) -> None:
    write_trl(tmp_path, 1, completions(1, completion=["", "two words", "", "x"]))
    (rows,) = rows_of(tmp_path)
    assert rows.response_mask.sum(axis=1).tolist() == [1, 2, 1, 1]


def test_damage_is_named(tmp_path: Path) -> None:
    file = write_trl(tmp_path, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert not FORMAT.recognises(tmp_path)
    assert "completions_00003.parquet: not readable as Parquet" in refusal(tmp_path)
    renamed = tmp_path / "renamed"
    write_trl(renamed, 4).rename(renamed / "completions" / "completions_00007.parquet")
    assert "completions_00007.parquet:1: its step is 4, the file's name says 7" in refusal(renamed)
    assert "holds no completions_*.parquet" in refusal(tmp_path / "nowhere")


def test_rewards_that_are_not_there(tmp_path: Path) -> None:
    write_trl(tmp_path, 1, completions(1, label=["a", "b", "c", "d"]))
    assert "has no reward column 'speed'" in refusal(tmp_path, rewards="speed")
    assert "column 'label' holds no numbers" in refusal(tmp_path, rewards="accuracy_reward,label")
    assert "2 weights for 1 reward columns" in refusal(tmp_path, weights="1,2")
    assert "is not numbers with commas" in refusal(tmp_path, weights="high")
    assert abs(GRPO[0] + 1 / ROOT2) < 1e-4


def test_a_tokenizer_counts_tokens(tmp_path: Path) -> None:
    write_trl(tmp_path, 1)
    intake = Intake(tokenise=lambda text: [ord(letter) for letter in text])
    (rows,) = rows_of(tmp_path, intake)
    assert rows.response_mask.sum(axis=1).tolist() == [len(f"{words} 1") for words in ANSWERS]
    assert rows.response_ids[0, :3].tolist() == [ord("o"), ord("n"), ord("e")]
