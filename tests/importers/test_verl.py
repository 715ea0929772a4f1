"""veRL's rollout files: v1 with uid and the older kind, what is derived from them, and damage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rollout_files import ANSWERS, REWARDS, verl_records, write_lines

from kedge.errors import InputError
from kedge.importers import Intake
from kedge.importers.verl import FORMAT
from kedge.trace.foreign import Rows, as_record

DEFAULTS = {"adv_estimator": "grpo", "kl": "none", "kl_estimator": "unknown", "beta": "unknown"}


def rows_of(path: Path, intake: Intake | None = None) -> list[Rows]:
    return list(FORMAT.read(path, DEFAULTS, intake or Intake()))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(path)
    return str(caught.value)


def test_files_become_steps_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (10, 2, 1):
        write_lines(tmp_path / f"{step}.jsonl", verl_records(step))
    assert FORMAT.recognises(tmp_path) and FORMAT.recognises(tmp_path / "2.jsonl")
    intake = Intake()
    rows = rows_of(tmp_path, intake)
    assert [one.step for one in rows] == [1, 2, 10]
    assert intake.rows == 12
    first = rows[0]
    assert list(first.scores["score"]) == REWARDS
    assert list(first.group) == [0, 0, 1, 1]
    assert first.responses == [f"{words} 1" for words in ANSWERS]
    assert first.response_mask.sum(axis=1).tolist() == [2, 3, 4, 6]
    assert first.advantage is None and first.ended is None
    assert any("no uid" in note for note in intake.notes)


def test_uid_tells_groups_of_the_same_prompt_apart(tmp_path: Path) -> None:
    records = verl_records(1)
    for record, uid in zip(records, ("b", "b", "a", "a"), strict=True):
        record |= {"uid": uid, "input": "the same"}
    write_lines(tmp_path / "1.jsonl", records)
    intake = Intake()
    (rows,) = rows_of(tmp_path, intake)
    assert list(rows.group) == [0, 0, 1, 1]
    assert not any("no uid" in note for note in intake.notes)


def test_what_the_reward_function_returned_besides_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "1.jsonl", verl_records(1, acc=1.0, request_id="r", reward=2.0))
    intake = Intake()
    rows_of(tmp_path, intake)
    assert any(note.endswith("besides the score: acc, reward") for note in intake.notes)
    assert any("validation_data_dir" in note for note in intake.notes)


def test_the_advantage_is_derived_only_where_the_file_allows_it(tmp_path: Path) -> None:
    """GRPO over rewards (1, 3) and (0, 4): deviations sqrt(2) and 2 sqrt(2), epsilon 1e-6."""
    write_lines(tmp_path / "1.jsonl", verl_records(1))
    (rows,) = rows_of(tmp_path)
    record = as_record(rows, FORMAT.conventions(tmp_path, DEFAULTS))
    root2 = math.sqrt(2)
    expected = [-1 / (root2 + 1e-6), 1 / (root2 + 1e-6), -2 / (2 * root2 + 1e-6), 2 / (2 * root2 + 1e-6)]
    assert record.advantage[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    for answers in ({"kl": "reward"}, {"kl": "unknown"}, {"adv_estimator": "gae"}, {"adv_estimator": "other"}):
        conventions = FORMAT.conventions(tmp_path, DEFAULTS | answers)
        assert conventions.normalisation == "unknown", answers
        assert "advantage" in as_record(rows, conventions).absent
    rloo = as_record(rows, FORMAT.conventions(tmp_path, DEFAULTS | {"adv_estimator": "rloo"}))
    assert rloo.advantage[:, 0].tolist() == pytest.approx([-2, 2, -4, 4])


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    records = verl_records(1)
    records[1]["score"] = None
    records[2]["output"] = None
    records[3]["score"] = math.nan
    write_lines(tmp_path / "1.jsonl", records)
    intake = Intake()
    (rows,) = rows_of(tmp_path, intake)
    assert rows.responses == ["one 1"]
    left = {reason: (one.rows, Path(one.first).name) for reason, one in intake.left_out.items()}
    assert left == {
        "the score is not a finite number": (2, "1.jsonl:2"),
        "the prompt or the response is neither text nor a list of messages": (1, "1.jsonl:3"),
    }


def test_damage_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "1.jsonl", verl_records(1))
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert "1.jsonl:4: not readable as JSON" in refusal(tmp_path)
    assert "question" not in refusal(tmp_path)  # words of a row stay out of messages
    file.write_text(whole + json.dumps({"content": "x", "rewards": 1}) + "\n")
    assert "1.jsonl:5: the record lacks input, output, score, step" in refusal(tmp_path)
    file.write_text(whole + json.dumps(verl_records(1, uid="u")[0]) + "\n")
    assert "1.jsonl:5: other fields than the first record: uid" in refusal(tmp_path)
    file.write_text(whole + json.dumps(verl_records(2)[0]) + "\n")
    assert "1.jsonl:5: its step is 2, the file's name says 1" in refusal(tmp_path)
    file.write_text("")
    assert not FORMAT.recognises(tmp_path)
    assert "holds no {step}.jsonl" in refusal(tmp_path / "nothing")
