"""The generic schema: every column round trips, half columns and other mistakes are named with their line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_files import generic_record, generic_step, write_lines

from kedge.errors import InputError
from kedge.importers import Intake
from kedge.importers.generic import COLUMNS, FORMAT, LISTS, SINGLE
from kedge.trace.foreign import Rows

DEFAULTS = {one.key: one.default or "unknown" for one in FORMAT.asks}


def rows_of(path: Path, intake: Intake | None = None, **answers: str) -> list[Rows]:
    return list(FORMAT.read(path, DEFAULTS | answers, intake or Intake()))


def refusal(path: Path, records: list[dict[str, Any]], **answers: str) -> str:
    write_lines(path, records)
    with pytest.raises(InputError) as caught:
        rows_of(path, **answers)
    return str(caught.value)


def changed(at: int, /, **fields: Any) -> list[dict[str, Any]]:
    """A step of which one row says something else."""
    records = generic_step(0)
    records[at] |= fields
    return records


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_become_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rollouts{suffix}"
    records = [record for step in (3, 5) for record in generic_step(step, beta=0.05, policy_version=step)]
    if suffix == ".jsonl":
        write_lines(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    assert FORMAT.recognises(path) and FORMAT.recognises(tmp_path)
    assert not FORMAT.text_only(path)
    first, second = rows_of(path)
    assert (first.step, second.step, second.policy_version, first.beta) == (3, 5, 5, 0.05)
    assert first.response_mask.tolist() == [[at < row + 1 for at in range(4)] for row in range(4)]
    assert first.scores["score"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert first.old_logprob[3].tolist() == [-0.5, -0.6, -0.7, -0.8]
    assert first.reference_logprob[3].tolist() == pytest.approx([-0.75, -0.85, -0.95, -1.05])
    assert first.response_ids[1].tolist() == [10, 11, 0, 0]
    assert first.prompt_ids.tolist() == [[0, 7], [0, 7], [7, 7], [7, 7]]
    assert first.prompt_mask.tolist() == [[False, True], [False, True], [True, True], [True, True]]
    assert first.group.tolist() == [0, 0, 1, 1]
    assert first.ended.tolist() == [True, False, True, False]
    assert first.advantage[2, :3].tolist() == [1.0, 1.0, 1.0]
    assert first.values is None and first.new_logprob is None


def test_channels_and_their_weights(tmp_path: Path) -> None:
    fields = {"score.help": 1.0, "score.harm": 2.0, "weight.harm": -0.5}
    records = [{name: value for name, value in one.items() if name != "score"} | fields for one in generic_step(0)]
    (rows,) = rows_of(write_lines(tmp_path / "a.jsonl", records))
    assert {name: column.tolist() for name, column in rows.scores.items()} == {"harm": [2.0] * 4, "help": [1.0] * 4}
    assert rows.weights == {"harm": -0.5}


def test_scores_per_token_are_told_by_the_file(tmp_path: Path) -> None:
    records = generic_step(0)
    for record in records:
        record["score"] = [0.5] * len(record["response_ids"])
    path = write_lines(tmp_path / "a.jsonl", records)
    assert FORMAT.told(path) == {"score_position": "token"}
    (rows,) = rows_of(path, score_position="token")
    assert rows.scores["score"][1, :2].tolist() == [0.5, 0.5]
    assert "say --answer score_position=token" in refusal(path, records)


def test_text_alone_has_words(tmp_path: Path) -> None:
    records = [{"step": 0, "prompt": "p", "response": text, "score": 1.0} for text in ("a", "a b c")]
    path = write_lines(tmp_path / "a.jsonl", records)
    assert FORMAT.text_only(path)
    (rows,) = rows_of(path)
    assert rows.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert rows.group is None and rows.prompts == ["p", "p"]


def test_what_the_files_say_is_not_asked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", generic_step(0))
    place = tmp_path / "conventions.json"
    place.write_text(json.dumps({"trainer": "ours", "kl": "reward", "kl_unit": "per token", "beta": 0.1}))
    assert FORMAT.told(path) == {"kl": "reward", "kl_unit": "per-token", "beta": "0.1"}
    conventions = FORMAT.conventions(path, DEFAULTS | FORMAT.told(path))
    assert (conventions.trainer, conventions.kl_unit, conventions.beta) == ("ours", "per token", 0.1)
    place.write_text('{"kl": "reward"')
    with pytest.raises(InputError, match=r"conventions\.json: cannot be read"):
        FORMAT.told(path)
    place.write_text('{"bata": 1}')
    with pytest.raises(InputError, match="'bata' is not known"):
        FORMAT.told(path)


def test_files_of_a_folder_are_one_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", generic_step(0)[:2])
    write_lines(tmp_path / "b.jsonl", [*generic_step(0)[2:], *generic_step(1)])
    intake = Intake()
    assert [(one.step, len(one.prompts)) for one in rows_of(tmp_path, intake)] == [(0, 4), (1, 4)]
    assert intake.rows == 8


def test_order_and_copies(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    backwards = [*generic_step(1), *generic_step(0)]
    assert "a.jsonl:5: step 0 comes after step 1" in refusal(path, backwards)
    twice = [*generic_step(0), generic_step(0)[2]]
    assert f"a.jsonl:5: row 2 of step 0 is there already, at {path}:3" in refusal(path, twice)
    write_lines(path, generic_step(0))
    shutil.copy(path, tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl: is a copy of a\.jsonl"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        (1, {"old_logprob": [-0.1]}, "a.jsonl:2: lists of different lengths: response_ids 2, response_mask 2, old_"),
        (1, {"old_logprob": None}, "a.jsonl:2: old_logprob is null here, but not in other rows of step 0"),
        (1, {"old_logprob": ["x", "y"]}, "a.jsonl:2: old_logprob holds something else"),
        (1, {"response_ids": 5}, "a.jsonl:2: response_ids is not a list"),
        (1, {"response_mask": [1, 0]}, "a.jsonl:2: response_mask holds something else"),
        (2, {"score": "high"}, "a.jsonl:3: score is not a number"),
        (2, {"ended": "yes"}, "a.jsonl:3: ended is neither true nor false"),
        (2, {"group": ["a"]}, "a.jsonl:3: group is neither a number nor text"),
        (2, {"prompt_ids": ["a"]}, "a.jsonl:3: prompt_ids is not a list of whole numbers"),
        (2, {"prompt": 3}, "a.jsonl:3: prompt is neither text nor a list of messages"),
        (3, {"step": 0.5}, "a.jsonl:4: step is not a whole number"),
        (3, {"row": "last"}, "a.jsonl:4: row is not a whole number"),
        (3, {"extra": 1}, "a.jsonl:4: other fields than the first record: extra"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, row: int, fields: Any, expected: str) -> None:
    assert expected in refusal(tmp_path / "a.jsonl", changed(row, **fields))


def test_a_number_that_should_be_the_same_in_a_step(tmp_path: Path) -> None:
    records = [generic_record(0, row, 2, beta=0.1 * (row == 1)) for row in range(2)]
    assert "a.jsonl:2: beta is not the same number" in refusal(tmp_path / "a.jsonl", records)


def test_rows_that_are_left_out(tmp_path: Path) -> None:
    nothing = {"response_ids": [], "response_mask": [], "old_logprob": [], "reference_logprob": [], "advantage": []}
    path = write_lines(tmp_path / "a.jsonl", changed(1, **nothing, response=""))
    intake = Intake()
    (rows,) = rows_of(path, intake)
    assert len(rows.prompts) == 3
    assert intake.left_out["the response has no position"].first.endswith("a.jsonl:2")


def test_nothing_in_a_number_is_not_known(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", changed(1, score=None, old_logprob=[-0.5, None]))
    (rows,) = rows_of(path)
    assert np.isnan(rows.scores["score"]).tolist() == [False, True, False, False]
    assert math.isnan(rows.old_logprob[1, 1])


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_lists_of_any_length_round_trip(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    records = [generic_record(0, row, length) for row, length in enumerate(lengths)]
    path = write_lines(tmp_path_factory.mktemp("generic") / "a.jsonl", records)
    (rows,) = rows_of(path)
    for row, record in enumerate(records):
        for name in ("response_ids", "old_logprob", "reference_logprob", "advantage"):
            assert getattr(rows, name)[row, : lengths[row]].tolist() == record[name]
        assert rows.response_mask[row].sum() == lengths[row]


def test_the_page_describes_every_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text(encoding="utf-8")
    assert [name for name in sorted(COLUMNS | {*LISTS, *SINGLE}) if f"`{name}`" not in page] == []
