"""`kedge import` in a test: what it writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedge import cli
from kedge.trace.reader import Run, read_run


def imported(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *options: str) -> tuple[Run, dict[str, Any]]:
    """The run, and what was said as JSON. Open questions get their defaults."""
    capsys.readouterr()
    code = cli.main(["import", str(path), "--out", str(out), "--yes", "--json", *options])
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return read_run(out), found


def refused(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *options: str) -> str:
    """The error, in one line. No traceback, no run."""
    capsys.readouterr()
    assert cli.main(["import", str(path), "--out", str(out), "--yes", *options]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error:") and "Traceback" not in said.err and not out.exists()
    assert not [one for one in out.parent.iterdir() if one.name.startswith(f".{out.name}")]
    return said.err


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
