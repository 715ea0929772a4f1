"""`kedge label join`, and what ledger and diagnosis make of it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge import cli
from kedge.trace.reader import read_run

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", World(steps=9, batch=16))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def kedge(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


VERDICTS = [
    {
        "prompt": f"prompt {row // 2}",
        "response": f"response {row}",
        "verdict": "bad" if row % 3 else "good",
        "remark": "",
    }
    for row in range(16)
]


def test_it_says_what_found_nothing_and_where(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    stray = {"prompt": "prompt 0", "response": "the secret answer", "verdict": "bad", "remark": "a secret remark"}
    audit = written(tmp_path / "audit.csv", [*VERDICTS, stray, {**VERDICTS[0], "verdict": "bad"}])
    code, out, err = kedge(capsys, "label", "join", run, audit)
    assert code == 0 and "secret" not in out + err
    assert "15 of 18 rows label 135 responses (15 by prompt and response)" in out
    assert "3 rows label nothing:" in out
    for line, why in ((2, f"verdict is not what {audit}:19 says"), (18, "no such text"), (19, f"{audit}:2")):
        (told,) = (text for text in out.splitlines() if f"  {audit}:{line}:" in text)
        assert why in told
    code, out, _ = kedge(capsys, "ledger", run, "--by", "label:audit.verdict")
    assert code == 0 and "verdict bad  verdict good" in out
    assert "labels/audit: 135 responses have a label, 135 of them in the steps read." in out


def test_a_name_is_taken_until_replace(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    audit = written(tmp_path / "week 1.csv", VERDICTS)
    code, out, _ = kedge(capsys, "label", "join", run, audit, "--json")
    said = json.loads(out)
    assert code == 0 and said["name"] == "week-1" and said["responses"] == 144 and said["left_out"] == []
    before = Path(said["file"]).read_bytes()
    code, _, err = kedge(capsys, "label", "join", run, audit)
    assert code == 2 and "nothing was overwritten" in err and Path(said["file"]).read_bytes() == before
    written(audit, VERDICTS[:1])
    code, out, _ = kedge(capsys, "label", "join", run, audit, "--replace")
    assert code == 0 and "label 9 responses" in out and Path(said["file"]).read_bytes() != before
    assert kedge(capsys, "label", "join", run, audit, "--name", "other")[0] == 0


def test_nothing_is_kept_where_nothing_fits(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    audit = written(tmp_path / "audit.csv", [{"response": "elsewhere", "verdict": "good"}])
    code, out, err = kedge(capsys, "label", "join", run, audit)
    assert code == 2 and out == "" and f"{audit}:2: no such text" in err and "elsewhere" not in err
    assert not (run / "labels").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit.csv", "--name", "../x"), "is no name for labels"),
        (("audit.csv", "--column", "a", "--column", "b=a"), "names something twice"),
        (("absent.csv",), "there is no such file"),
        (("bad.csv",), "no row"),
        (("audit.csv", "--column", "verdict=human"), "human is not a number"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    written(tmp_path / "audit.csv", VERDICTS)
    (tmp_path / "bad.csv").write_text("response,verdict\n")
    code, out, err = kedge(capsys, "label", "join", run, tmp_path / arguments[0], *arguments[1:])
    assert code == 2 and out == "" and message in err and not (run / "labels").exists()


def test_torn_rows_are_reported_with_their_line(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    audit.write_text('{"response": "response 1", "n": 1}\n{"response": "response 2", "n"\n[1]\n')
    code, out, _ = kedge(capsys, "label", "join", run, audit)
    assert code == 0 and "1 of 3 rows label 9 responses" in out
    assert f"{audit}:2: not readable as JSON" in out and f"{audit}:3: a JSON list" in out


def test_the_checks_read_labels(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    """People who agree with the score early and disagree late: the check for it has nothing to read before, and fails
    after the join."""
    trace = read_run(run)
    rows = []
    for number in trace.steps():
        step = trace.step(number)
        score = step.rewards[..., step.channels.index("score")].sum(axis=1)
        sign = 1 if number < 5 else -1
        rows += [{"step": number, "row": row, "stars": float(sign * score[row])} for row in range(len(step))]
    assert len(rows) == 144 and np.std([row["stars"] for row in rows]) > 0

    def status() -> dict[str, Any]:
        _, out, _ = kedge(capsys, "diagnose", run, "--check", "human_gap", "--no-html", "--json")
        found: dict[str, Any] = json.loads(out)["findings"][0]
        return found

    assert status()["status"] == "not_checked"
    audit = written(tmp_path / "stars.csv", rows)
    assert kedge(capsys, "label", "join", run, audit, "--column", "stars=human")[0] == 0
    found = status()
    values = [one["value"] for one in found["evidence"]]
    assert found["status"] == "fail" and values == pytest.approx([1.0, -1.0])
