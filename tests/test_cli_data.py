"""kedge data check and kedge data convert: what they print, write and refuse, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc
from pathlib import Path

import pytest

from kedge import cli
from kedge.cli import data
from kedge.data import validate
from kedge.data.check import MOST_REASONS, OTHER, reason_of, survey
from kedge.data.validate import load_judgments

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD = [{**PAIR, "chosen": None}, {**PAIR, "strength": "much"}, {**PAIR, "strength": 7}, {**PAIR, "rejected": None}]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def run(*arguments: str) -> int:
    return cli.main(["data", *arguments])


# check


def test_a_sound_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("sound.jsonl", [PAIR, {**PAIR, "tie": True}, {**PAIR, "annotator": "a", "margin": 1}])
    assert run("check", file) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "sound.jsonl: 3 rows, 3 usable, 0 rejected",
        "kinds: pair 3",
        "forms: standard 3",
        "holds: ties 1, annotator 1, margin 1",
    ]
    assert captured.err == ""


def test_rejected_rows_are_counted_by_reason_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("bad.jsonl", [PAIR, *BAD, PAIR])
    assert run("check", file, "--max-shown", "1") == 2
    assert capsys.readouterr().out.splitlines() == [
        "bad.jsonl: 6 rows, 2 usable, 4 rejected",
        "kinds: pair 2",
        "forms: standard 2",
        "rejected, by reason:",
        "        2  strength is ..., expected a share from N to N (first at bad.jsonl:3)",
        "        1  chosen is missing, expected text (first at bad.jsonl:2)",
        "        1  rejected is missing, expected text (first at bad.jsonl:5)",
        "bad.jsonl:2: chosen is missing, expected text -> write text or remove the row",
        "and 3 more: see --max-shown and --rejects",
        "to use the others: data.max_rejected = 1.0 in a recipe, convert --max-rejected 1.0",
    ]


def test_json_and_the_file_of_rejected_rows(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("bad.jsonl", [PAIR, *BAD])
    assert run("check", file, "--json", "--rejects", "out.jsonl") == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["rows"], result["usable"], result["rejected"]) == (5, 1, 4)
    assert result["kinds"] == {"pair": {"rows": 1, "first": "bad.jsonl:1"}}
    assert result["reasons"]["chosen is missing, expected text"] == {"rows": 1, "first": "bad.jsonl:2"}
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert written == result["problems"] and len(written) == 4
    assert set(written[0]) == {"where", "what", "remedy"} and written[1]["where"] == "bad.jsonl:3"
    assert captured.err == ""
    assert run("check", file, "--rejects", "out.jsonl") == 2
    assert "out.jsonl: is already there, and nothing is overwritten" in capsys.readouterr().err


def test_several_kinds_in_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("mixed.jsonl", [PAIR, {"prompt": "p", "response": "x", "label": 1}])
    assert run("check", file) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "kinds: pair 1 (first at mixed.jsonl:1), verdict 1 (first at mixed.jsonl:2)"
    assert lines[-1] == "a file holds one kind: split it"


@pytest.mark.parametrize("name", ["none.jsonl", "empty.jsonl", "rows.xlsx"])
def test_files_that_cannot_be_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for present in ("empty.jsonl", "rows.xlsx"):
        Path(present).touch()
    assert run("check", name, "--rejects", "out.jsonl") == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: ")
    assert not list(Path().glob("*out.jsonl*"))


def test_like_reasons_count_as_one_and_there_are_not_too_many() -> None:
    assert reason_of("votes are 3 for chosen, 1 for rejected") == reason_of("votes are 0 for chosen, 12 for rejected")
    assert reason_of("message 3 of prompt has the role 'x'") == reason_of("message 1 of prompt has the role 'y'")
    assert reason_of("chosen is missing, expected text") != reason_of("chosen is of type int, expected text")
    assert "response_1" in reason_of("expected 1 or 2, as in response_1")
    names = ["abcdefghij"[number % 10] * (1 + number // 10) for number in range(500)]
    file = write("many.jsonl", [{"prompt": "p", name: 1} for name in names])
    seen = survey(file)
    assert len(seen.reasons) == MOST_REASONS + 1 and seen.reasons[OTHER].rows == 500 - MOST_REASONS
    assert sum(tally.rows for tally in seen.reasons.values()) == seen.rejected == 500


def test_memory_does_not_grow_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for count in (2_000, 20_000):
        rows = ((n, {**PAIR, "chosen": f"c{n}" if n % 2 else None}) for n in range(1, count + 1))
        monkeypatch.setattr(validate, "read_rows", lambda path, rows=rows: rows)
        tracemalloc.start()
        assert survey("made", show=5).rows == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_large_files_show_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(data, "WATCHED", 0)
    file = write("large.jsonl", [PAIR] * 2500)
    assert run("check", file) == 0
    captured = capsys.readouterr()
    assert "1000/2501" in captured.err and "2501/2501" in captured.err
    assert "2500 usable" in captured.out
    assert run("check", file, "--json") == 0
    assert capsys.readouterr().err == ""


def test_a_request_to_stop_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("file.jsonl", [PAIR] * 3)
    read = validate.read_rows

    def stopped(path):  # type: ignore[no-untyped-def]
        for row in read(path):
            os.kill(os.getpid(), signal.SIGINT)
            yield row
            return

    monkeypatch.setattr(validate, "read_rows", stopped)
    assert run("check", file, "--rejects", "out.jsonl") == 130
    assert "error: file.jsonl:1: stopped on request" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["file.jsonl"]


# convert


def test_convert_says_what_it_wrote_and_what_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("pairs.jsonl", [PAIR, {**PAIR, "tie": True}, {**PAIR, "strength": 0.8}, BAD[0]])
    assert run("convert", file, "out.csv") == 2
    assert "error: pairs.jsonl: 1 of 4 rows are rejected" in capsys.readouterr().err
    assert run("convert", file, "out.csv", "--max-rejected", "0.25") == 0
    assert capsys.readouterr().out.splitlines() == [
        "out.csv: 2 rows written, of 3 usable in pairs.jsonl",
        "left out, 1 rows: malformed (kedge data check says why)",
        "left out, 1 rows: a tie, which chosen and rejected cannot say",
        "not written, strength of 1 rows: TRL reads no such column",
    ]
    assert len(load_judgments("out.csv", max_rejected=0.0).rows) == 2


def test_convert_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    file = write("ranked.jsonl", [{"prompt": "p", "responses": ["x", "y", "z"], "ranks": [1, 1, 2]}])
    assert run("convert", file, "out.parquet", "--as", "pairs", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    left_out = {"a tie, which chosen and rejected cannot say": 1}
    assert result == {
        "out": "out.parquet", "rows": 1, "rejected": 0, "written": 2, "left_out": left_out, "unsaid": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["out.jsonl", "--to", "csv"], "--to csv: is not known"),
        (["out.jsonl", "--as", "triples"], "--as triples: is not known"),
        (["out.txt"], "out.txt: the suffix '.txt' is not one for --to trl"),
        (["out.csv", "--to", "canonical"], "end the name in .parquet"),
        (["pairs.jsonl"], "pairs.jsonl: is already there"),
        (["none/out.jsonl"], "none: there is no such folder"),
    ],
)
def test_convert_refuses(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write("pairs.jsonl", [PAIR])
    assert run("convert", file, *arguments) == 2
    captured = capsys.readouterr()
    assert what in captured.err and "bug" not in captured.err
    assert [path.name for path in Path().iterdir()] == ["pairs.jsonl"]
