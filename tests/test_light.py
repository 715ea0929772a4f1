"""What only looks at a run works where PyTorch and SciPy are not installed and `kedge.train` cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run

BARRED = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "scipy", "krippendorff", "kedge.train")
PROGRAM = """
import importlib.abc, json, sys

class Barred(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(one + ".") for one in {barred!r}):
            raise AssertionError(name + " is imported")

sys.meta_path.insert(0, Barred())
from kedge import cli
for arguments in json.load(sys.stdin):
    code = cli.main(arguments)
    print("code", code, *arguments, flush=True)
    assert code in (0, 1), (code, arguments)
assert not any(name == one or name.startswith(one + ".") for name in sys.modules for one in {barred!r})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", World(steps=6, batch=16))
    rows = [{"step": step, "row": row, "verdict": "good"} for step in range(6) for row in range(16)]
    (tmp_path / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        {"step": step, "prompt": f"p {row // 4}", "response": "yes , you can " * (row + 1), "score": float(row)}
        for step in range(4)
        for row in range(16)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path


def test_looking_imports_no_training_stack(folder: Path) -> None:
    commands = [
        ["--version"],
        ["checks"],
        ["checks", "beta"],
        ["import", "rollouts.jsonl", "--out", "imported", "--yes"],
        ["diagnose", "imported"],
        ["label", "join", "run", "audit.jsonl"],
        ["ledger", "run", "--by", "style", "--by", "label:audit", "--html", "ledger.html", "--export", "l.parquet"],
        ["diagnose", "run"],
        ["compare", "run", "run"],
        ["report", "run"],
        ["trace", "redact", "run", "--text", "hashed", "--out", "redacted"],
        ["ledger", "redacted", "--by", "label:verdict"],
        ["diagnose", "redacted", "--json"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(barred=BARRED)],
        input=json.dumps(commands), cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_needs_scipy_says_so(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a b", "rejected": "c"}\n' * 40)
    program = "import sys; sys.modules['scipy'] = None; from kedge import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "data", "audit", "pairs.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "scipy" in done.stderr and "pip install 'kedge[audit]'" in done.stderr
