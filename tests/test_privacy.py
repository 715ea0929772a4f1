"""No command says a text of a run that keeps none, and no error message says one of any run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from kedge import cli
from kedge.trace.redact import redact
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import TraceWriter

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run, probe_record, replace, sample_record, step_record

WORD = "zanzibar"  # in every text of the runs
WORLD = World(steps=6, batch=16)


def make(path: Path, text: Any) -> Path:
    """A run with real columns whose every text holds a word; written with `trace.text` as given."""
    make_run(path, WORLD)
    rng, run = np.random.default_rng(1), RunDir(path)
    with TraceWriter(run, text=text) as writer:
        for step in range(WORLD.steps + 1):
            if step < WORLD.steps:
                record = step_record(WORLD, step, rng)
                texts = {
                    name: [f"{WORD} {name} {row}" for row in range(WORLD.batch)] for name in ("prompts", "responses")
                }
                writer.write_step(replace(record, **texts))
            if step % WORLD.every == 0:
                probes = probe_record(WORLD, step, rng)
                count = len(probes.probe)
                writer.write_probes(replace(probes, prompt=[f"{WORD} p"] * count, response=[f"{WORD} r"] * count))
                writer.write_samples(sample_record(step, f"yes , {WORD} .", f"can i {WORD} ?"))
    return path


@pytest.fixture(scope="module", params=["hashed", "none", "redacted to hashes", "redacted to nothing"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private") / "run"
    if request.param in ("hashed", "none"):
        return make(path, request.param)
    make(path, "full")
    redact(path, text="hashed" if "hashes" in request.param else "none")
    return path


@pytest.fixture(scope="module")
def open_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("open") / "run", "full")


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


COMMANDS: list[tuple[Any, ...]] = [
    ("diagnose",),
    ("diagnose", "--json"),
    ("diagnose", "--since", "99"),
    ("diagnose", "--check", "nothing"),
    ("ledger", "--by", "style", "--by", "time"),
    ("ledger", "--by", "tercile", "--feature", "repetition", "--html", "ledger.html"),
    ("ledger", "--by", "phrase:2", "--export", "ledger.csv"),
    ("ledger", "--by", "feature:regex:z.*r", "--json"),
    ("ledger", "--by", "label:absent"),
    ("replay", "--set", "policy.kl.beta=0.3"),
    ("replay", "--feature", "repetition", "--json"),
    ("replay", "--set", "policy.kl.betta=1"),
    ("report",),
    ("trace redact", "--text", "none", "--out", "copy"),
]


def test_no_command_says_a_text(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {file for file in run.rglob("*") if file.is_file() and WORD.encode() in file.read_bytes()}
    assert before == set()
    for name, *rest in COMMANDS:
        code, out, err = said(capfd, *name.split(), run, *rest)
        assert code in (0, 1, 2) and WORD not in out + err, (name, rest)
        assert "Traceback" not in err and "bug in Kedge" not in err, (name, rest)
    for file in [*tmp_path.rglob("*"), *run.rglob("*")]:
        assert not file.is_file() or WORD.encode() not in file.read_bytes(), file


def audit(path: Path, **columns: Any) -> Path:
    rows = [{"prompt": f"{WORD} prompts {row}", "response": f"{WORD} responses {row}"} | columns for row in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def damaged(path: Path, run: Path, name: str) -> Path:
    """A copy of the run in which something is wrong with the rows of step 2, or with a file."""
    import shutil

    copy = Path(shutil.copytree(run, path))
    file = RunDir(copy).step_file(2)
    if name == "torn":
        file.write_bytes(file.read_bytes()[:-200])
    elif name == "metrics":
        (copy / "metrics.jsonl").write_text(f'{{"stage": "policy", "step": 0}}\n{{"{WORD}": \n{{}}\n')
    else:
        table = parquet.read_table(file)
        at = table.column_names.index("advantage_sum")
        column = {
            "digest": ("advantage_sum", pa.array([9.0] * len(table), pa.float32())),
            "words": ("advantage_sum", pa.array([WORD] * len(table))),
            "lists": ("active", pa.array([[True]] * len(table))),
        }[name]
        at = table.column_names.index(column[0])
        parquet.write_table(table.set_column(at, *column), file)
    return copy


@pytest.mark.parametrize("name", ["torn", "metrics", "digest", "words", "lists"])
@pytest.mark.parametrize("command", ["diagnose", "ledger", "replay", "label join"])
def test_errors_say_where_not_what(
    open_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str,
    command: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    copy = damaged(tmp_path / "run", open_run, name)
    rest = [audit(tmp_path / "audit.jsonl", n=1)] if command == "label join" else []
    code, _, err = said(capfd, *command.split(), copy, *rest)
    assert WORD not in err and "Traceback" not in err
    assert code in (0, 1, 2)


@pytest.mark.parametrize(
    "columns",
    [{"note": f"{WORD} " * 9}, {"human": WORD}, {"confidence": WORD}, {"note": f"{WORD} responses 1"}, {}],
)
def test_a_file_of_labels_is_never_quoted(
    open_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], columns: dict[str, Any]
) -> None:
    file = audit(tmp_path / "audit.jsonl", **columns)
    with file.open("a") as stream:
        stream.write(f'{{"response": "{WORD} nowhere", "n": 1}}\n{{"response": "{WORD}", \n["{WORD}"]\n')
    code, out, err = said(capfd, "label", "join", open_run, file)
    assert code == 2 and WORD not in out + err and f"{file}:" in err
    assert not (open_run / "labels").exists()
