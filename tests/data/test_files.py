"""Rows out of files of every kind, whole and damaged."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import sys

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kedge.data.files import lines_at_most, new_file, read_rows
from kedge.errors import InputError, Problem

ROWS = [{"prompt": "Where is it?", "response": "Here.\nReally."}, {"prompt": 'ünï 🎉, "quoted"', "response": ""}]
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(path, rows):
    if ".csv" in path.suffixes:
        write_csv(path, rows)
    elif ".parquet" in path.suffixes:
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif ".jsonl" in path.suffixes:
        write_jsonl(path, rows)
    else:
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert caught.value.problems[0].remedy
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.v2.{suffix}"
    if suffix == "JSONL":
        write_jsonl(path, ROWS)
    else:
        write(path, ROWS)
    assert [row for _, row in read_rows(path)] == ROWS


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "response": TEXT}), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_any_text_survives(tmp_path, suffix, rows):
    path = tmp_path / f"rows.{suffix}"
    write(path, rows)
    assert [row for _, row in read_rows(path)] == rows


def test_lines_are_those_an_editor_shows(tmp_path):
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text('{"a": 1}\n\n\n{"a": 2}\r\n{"a": 3}')
    assert [number for number, _ in read_rows(jsonl)] == [1, 4, 5]
    table = tmp_path / "rows.csv"
    table.write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    assert list(read_rows(table)) == [(2, {"a": "1", "b": "two\nlines"}), (5, {"a": "3", "b": "4"})]
    array = tmp_path / "rows.json"
    array.write_text('[\n{"a": 1},\n{"a":\n 2}, {"a": 3}\n]')
    assert list(read_rows(array)) == [(2, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]


def test_json_lines_may_be_named_json_and_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in read_rows(path)] == [{"a": 1}, {"a": 2}]
    table = tmp_path / "rows.csv"
    table.write_bytes(b"\xef\xbb\xbfprompt\nhello\n")
    assert list(read_rows(table)) == [(2, {"prompt": "hello"})]


def test_csv_cells_may_hold_messages_and_100000_characters(tmp_path):
    limit = csv.field_size_limit()
    messages = [{"role": "user", "content": "hi"}]
    path = tmp_path / "rows.csv"
    write_csv(path, [{"prompt": json.dumps(messages), "response": "x" * 200_000}, {"prompt": "[{no", "response": "y"}])
    assert [row["prompt"] for _, row in read_rows(path)] == [messages, "[{no"]
    assert csv.field_size_limit() == limit


def test_malformed_json_lines_are_problems_among_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"a": 1}',
        b'{"a": ',
        b'\xff{"a": 1}',
        b"[1]",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 2}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(path))
    assert [row for _, row in rows if not isinstance(row, Problem)] == [{"a": 1}, {"a": 2}]
    problems = [row for _, row in rows if isinstance(row, Problem)]
    assert [problem.where for problem in problems] == [f"{path}:{line}" for line in range(2, 7)]
    assert "not readable as JSON" in problems[0].what
    assert "byte 1 is not UTF-8" in problems[1].what
    assert "a JSON list, expected an object" in problems[2].what
    assert all(problem.remedy and "\n" not in str(problem) for problem in problems)


def test_malformed_csv_rows_are_problems_among_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,response\nonly one\na,b,c\ncaf\xe9,b\n"a"b,c\ngood,row\n')
    rows = list(read_rows(path))
    assert [number for number, _ in rows] == [2, 3, 4, 5, 6]
    assert [row.what for _, row in rows[:3]] == ["1 cells, the header has 2", "3 cells, the header has 2", "not UTF-8"]
    assert "not readable as CSV" in rows[3][1].what
    assert rows[4][1] == {"prompt": "good", "response": "row"}


def test_a_parquet_row_that_is_not_utf8_is_a_problem_among_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    values = arrow.array([b"good", b"\xff\xfe", b"fine"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"prompt": values}), path)
    rows = list(read_rows(path))
    assert rows[0] == (1, {"prompt": "good"}) and rows[2] == (3, {"prompt": "fine"})
    assert rows[1][1].where == f"{path}:2" and "not readable" in rows[1][1].what


def test_parquet_rows_are_numbered_through_batches(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, [{"prompt": str(number)} for number in range(1, 2501)])
    assert all(row["prompt"] == str(number) for number, row in read_rows(path))
    assert sum(1 for _ in read_rows(path)) == 2500


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    assert "there is no such file" in refused(tmp_path / "nothing.jsonl")
    (tmp_path / "rows.xlsx").write_text("x")
    assert "the suffix '.xlsx' is not known" in refused(tmp_path / "rows.xlsx")
    (tmp_path / "rows").write_text("x")
    assert "the suffix '' is not known" in refused(tmp_path / "rows")
    for suffix in ("jsonl", "json", "csv", "jsonl.gz"):
        path = tmp_path / f"empty.{suffix}"
        path.write_bytes(gzip.compress(b"") if suffix.endswith("gz") else b"")
        assert f"{path}: no rows in it" in refused(path)
    (tmp_path / "header.csv").write_text("prompt,response\n")
    assert "no rows in it" in refused(tmp_path / "header.csv")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    assert "two columns are named 'prompt'" in refused(tmp_path / "twice.csv")
    (tmp_path / "excel.csv").write_text("prompt,response\na,b\n", encoding="utf-16")
    assert "UTF-16" in refused(tmp_path / "excel.csv")
    parquet.write_table(arrow.table({"prompt": arrow.array([], arrow.string())}), tmp_path / "none.parquet")
    assert "no rows in it" in refused(tmp_path / "none.parquet")


def test_torn_files_are_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(ROWS * 500), buffer)
    (tmp_path / "torn.parquet").write_bytes(buffer.getvalue()[:-200])
    assert "not readable as Parquet" in refused(tmp_path / "torn.parquet")
    lines = "".join(json.dumps({"prompt": str(number * 7919)}) + "\n" for number in range(5000)).encode()
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines)[:-1000])
    assert "the gzip stream is damaged" in refused(tmp_path / "torn.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(lines)
    assert "the gzip stream is damaged" in refused(tmp_path / "plain.jsonl.gz")
    for tail in ("", ",", '{"a"', '{"a": 2'):
        (tmp_path / "torn.json").write_text('[\n{"a": 1},\n{"a": 2}' + tail)
        assert "torn.json:3: " in refused(tmp_path / "torn.json")
    (tmp_path / "latin.json").write_bytes(b'[{"a": "caf\xe9"}]')
    assert "latin.json:1: not UTF-8" in refused(tmp_path / "latin.json")


def test_folders(tmp_path, monkeypatch):
    assert "not one saved by `datasets`" in refused(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install kedge[hub]" in refused(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs kedge[hub]")
def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(read_rows(tmp_path / "one")) == list(enumerate(ROWS, start=1))
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert "several splits: train" in refused(tmp_path / "splits")
    assert list(read_rows(tmp_path / "splits" / "train")) == list(enumerate(ROWS, start=1))


def test_the_lines_that_an_open_quote_takes_along_are_reported(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"3,4\n5,6\n7,"8"\n9,10\n')
    rows = dict(read_rows(path))
    assert rows[2] == {"a": "1", "b": "2"} and rows[6] == {"a": "9", "b": "10"}
    assert "not readable as CSV" in rows[3].what
    assert [rows[number].what for number in (4, 5)] == ["part of the unusable row that begins on line 3"] * 2
    path.write_text('a,b\n1,2\n3,"4\n5,6\n')
    assert [number for number, row in read_rows(path) if isinstance(row, Problem)] == [3, 4]
    path.write_text('a,b\n"two\nlines"\n1,2\n')
    assert [number for number, row in read_rows(path) if isinstance(row, Problem)] == [2, 3]


def test_headers_that_cannot_be_told_apart_or_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"prompt,caf\xe9\na,b\n")
    assert "the header is not UTF-8" in refused(tmp_path / "latin.csv")
    twice = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    assert "two columns are named 'prompt'" in refused(tmp_path / "twice.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_no_row_has_a_larger_number_than_was_foretold(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    write(path, ROWS * 3)
    last = max(number for number, _ in read_rows(path))
    assert last <= lines_at_most(path) <= last + 2
    assert lines_at_most(tmp_path / "none.jsonl") == lines_at_most(tmp_path) == 0


def test_a_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"] and path.read_text() == "whole"
    with pytest.raises(InputError, match="nothing is overwritten"), new_file(path):
        pass
    with pytest.raises(InputError, match="there is no such folder"), new_file(tmp_path / "none" / "out.jsonl"):
        pass
