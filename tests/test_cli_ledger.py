"""`kedge ledger`: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from kedge import cli

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run

PARTS = ("score reward", "kl reward", "score critic", "kl critic", "whitening", "= advantage")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("ledger") / "run", World(steps=6, batch=16, penalty=0.02))


def ledger(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main(["ledger", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ledger(capsys, *arguments, "--json"))
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main(["ledger", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error:") and "Traceback" not in captured.err
    return captured.err


def test_it_prints_the_parts_and_their_sum(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    text = ledger(capsys, run, "--by", "style")
    assert "6 steps" not in text and "steps 0 to 5, 96 responses" in text
    assert "the limit of 1e-05 holds" in text
    for part in PARTS:
        assert f"\n{part}" in text, part
    assert "concise  between  verbose" in text
    assert "silenced, advantage below 0" in text and "of kl reward: entropy side" in text
    assert "Pushed and moved, by feature" in text and "length (tokens)" in text
    assert "hedges" not in text  # no response differs in it


@pytest.mark.parametrize("group", ["position", "time", "feature:length", "feature:regex:1$"])
def test_every_group(capsys: pytest.CaptureFixture[str], run: Path, group: str) -> None:
    found = as_json(capsys, run, "--by", group, "--feature", "length")
    means = [row for row in found["rows"] if row["table"].startswith(group.split(":")[0]) and row["quantity"] == "sum"]
    parts = [row for row in means if row["kind"] == "part"]
    for label in {row["group"] for row in parts}:
        total = sum(row["value"] for row in parts if row["group"] == label)
        (advantage,) = (r["value"] for r in means if r["group"] == label and r["entry"] == "advantage")
        assert total == pytest.approx(advantage, abs=1e-8)
    assert found["gap"]["holds"] and found["gap"]["token"] < 1e-5


def test_groups_cross_and_phrases_stand_apart(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    text = ledger(capsys, run, "--by", "style", "--by", "time", "--by", "phrase:2", "--feature", "length")
    assert "By style × time" in text and "verbose, steps 5–5" in text
    assert "Phrases pushed most" in text


def test_unknown_groups_are_explained(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    text = ledger(capsys, run, "--by", "tercile")
    assert "tercile: none of the" in text and "By tercile" not in text


def test_features_of_ones_own(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def last(text):\n    return int(text[-1])\n")
    found = as_json(capsys, run, "--feature", "1[0-5]", "--feature", f"{tmp_path}/own.py:last")
    rows = [row for row in found["rows"] if row["table"] == "features"]
    assert {row["group"] for row in rows} == {"1[0-5]", f"{tmp_path}/own.py:last"}
    shares = [row["value"] for row in rows if row["group"] == "1[0-5]" and row["quantity"] == "share"]
    assert sum(shares) == pytest.approx(1)


def test_labels_are_joined(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    rows = [{"response": f"response {row}", "grade": "good" if row % 2 else "bad", "worth": row} for row in range(20)]
    with (tmp_path / "audit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for name in ("audit.csv", "audit.jsonl"):
        assert cli.main(["label", "join", str(run), str(tmp_path / name), "--replace"]) == 0
        assert "16 of 20 rows label 96 responses" in capsys.readouterr().out
        texts.append(ledger(capsys, run, "--by", "label:audit.grade", "--feature", "label:worth", "--since", 1))
        assert "labels/audit: 96 responses have a label, 80 of them in the steps read." in texts[-1]
        assert "grade bad  grade good" in texts[-1] and "label:worth" in texts[-1]
    assert texts[0] == texts[1]


def test_since(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert as_json(capsys, run, "--since", "4", "--feature", "length")["steps"] == [4, 5]
    assert "the last step on disk is 5" in refused(capsys, run, "--since", "6")


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.parquet"])
def test_every_number_is_written(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    found = as_json(capsys, run, "--by", "style", "--export", out)
    if name.endswith(".csv"):
        with out.open(newline="") as file:
            rows = [row | {"value": float(row["value"]) if row["value"] else None} for row in csv.DictReader(file)]
    elif name.endswith(".json"):
        rows = json.loads(out.read_text())
    else:
        table = parquet.read_table(out).to_pylist()
        rows = [row | {"value": None if row["value"] != row["value"] else row["value"]} for row in table]
    assert rows == found["rows"] and len(rows) > 100


def test_a_page_with_charts(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    for group in ("style", "time"):
        page = tmp_path / f"{group}.html"
        assert f"report: {page}" in ledger(capsys, run, "--by", group, "--html", page)
        text = page.read_text()
        assert text.count("<svg") > 1 and "Covariance with each feature" in text and "<script" not in text


def test_mistakes(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert "there is no such run" in refused(capsys, tmp_path / "absent")
    assert "not a Kedge run" in refused(capsys, tmp_path / "bare")
    assert "did you mean style" in refused(capsys, run, "--by", "styles")
    assert "kedge label join" in refused(capsys, run, "--by", "label:grade")
    assert "kedge label join" in refused(capsys, run, "--feature", "label:grade")
    assert "end it in .csv" in refused(capsys, run, "--export", tmp_path / "out.txt")
    assert "end it in .html" in refused(capsys, run, "--html", tmp_path / "out.txt")
    assert "regular expression" in refused(capsys, run, "--feature", "(")
    assert "phrase:1 to phrase:8" in refused(capsys, run, "--by", "phrase:9")
    assert "more than once" in refused(capsys, run, "--by", "phrase", "--by", "phrase:2")
    assert not list(tmp_path.glob("out*"))


def test_a_run_without_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", World(steps=1, batch=4))
    for file in path.glob("trace/step-*"):
        file.unlink()
    assert "holds no rows of policy steps" in refused(capsys, path)
