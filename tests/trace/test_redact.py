"""After a redaction no text of the run is in its folder, every number is the bit it was, and a kill loses nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from synthetic_run import World, make_run

from kedge.errors import InputError
from kedge.trace import redact as module
from kedge.trace.labels import match, store
from kedge.trace.reader import read_run
from kedge.trace.redact import redact
from kedge.trace.run_dir import RunDir

WORDS = "zanzibar"  # in every text of the run, and nowhere else


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that can hold text: rows, probes, samples, pairs, labels, events, branches, pages."""
    path = make_run(tmp_path_factory.mktemp("redact") / "run", World(steps=4, batch=8))
    run = RunDir(path)
    for kind in ("step", "probes", "samples"):
        for _, file in run.files(kind):
            _rename(file)
    source = path.parent / "audit.csv"
    source.write_text("-")
    store(read_run(path), "audit", match([("audit.csv:2", {"step": 1, "row": 2, "n": 1})], read_run(path)), source)
    pairs = [{"prompt": f"p {WORDS}", "chosen": f"c {WORDS}", "rejected": f"r {WORDS}"}] * 2
    pairs.append({"prompt": [{"role": "user", "content": WORDS}], "chosen": f"c {WORDS}", "rejected": WORDS})  # type: ignore[dict-item]
    (path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    told = {"stage": "data", "step": 0, "event": "rejected_rows", "message": f"1 of 9 rows left out; first: {WORDS}"}
    run.events.write_text(json.dumps(told) + "\n" + json.dumps(told | {"event": "guard", "message": "stopped"}) + "\n")
    shutil.copytree(path / "trace", path / "branches" / "000" / "trace")
    (path / "branches" / "000" / "metrics.jsonl").write_text("{}\n")
    (path / "branches" / "000" / "branch.json").write_text("{}\n")
    run.recipe_json.write_text(json.dumps({"name": "x", "trace": {"text": "full", "keep": 0}}))
    for name in ("report.html", "diagnosis.html", "ledger.html"):
        (path / name).write_text(f"<html><title>a page · Kedge</title>{WORDS}")
    (path / "trace" / ".step-000009.parquet.tmp").write_text(WORDS)
    (path / "models").mkdir(exist_ok=True)
    (path / "models" / "tokenizer.json").write_text(WORDS)
    return path


def _rename(file: Path) -> None:
    """The same file with a word in every text that is found nowhere else."""
    import pyarrow as pa

    table = parquet.read_table(file)
    for name in ("prompt", "response", "reference_response"):
        if name in table.column_names:
            values = [f"{value} {WORDS}" for value in table.column(name).to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
    if "response_tokens" in table.column_names:
        at = table.column_names.index("response_tokens")
        values = [[f"{token}{WORDS}" for token in row] for row in table.column("response_tokens").to_pylist()]
        table = table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
    parquet.write_table(table, file)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def texts(path: Path) -> set[str]:
    found: set[str] = set()
    for file in (path / "trace").glob("*.parquet"):
        table = parquet.read_table(file)
        for name in ("prompt", "response", "reference_response"):
            if name in table.column_names:
                found |= {value for value in table.column(name).to_pylist() if value}
    return found


def holding(path: Path, words: set[str]) -> list[str]:
    """Files outside models/ in which one of the words is, in their bytes or, of Parquet, in any cell or statistic."""
    found = []
    for file in sorted(path.rglob("*")):
        if file.is_file() and "models" not in file.parts:
            content = file.read_bytes() + _spelt(file)
            found += [file.name for word in words if word.encode() in content]
    return found


def _spelt(file: Path) -> bytes:
    if file.suffix != ".parquet":
        return b""
    opened = parquet.ParquetFile(file)
    statistics = [
        str(opened.metadata.row_group(0).column(column).statistics) for column in range(opened.metadata.num_columns)
    ]
    cells = opened.read()
    return json.dumps([cells.to_pylist(), statistics, str(cells.schema.metadata)], default=str).encode()


def numbers(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Every column of every trace file that is no text, as bytes."""
    spelt = ("prompt", "response", "reference_response", "response_tokens", "prompt_ids", "response_ids")
    for file in sorted(path.rglob("trace/*.parquet")):
        table = parquet.read_table(file)
        for name in table.column_names:
            if name not in spelt:
                array = table.column(name).combine_chunks()
                yield file.name, name, [None if b is None else b.to_pybytes() for b in array.buffers()]


@pytest.mark.parametrize("text", ["hashed", "none"])
@pytest.mark.parametrize("copied", [False, True])
def test_no_text_is_left_and_no_number_moves(run: Path, tmp_path: Path, text: Any, copied: bool) -> None:
    words, before, there = texts(run) | {WORDS}, list(numbers(run)), sorted(run.rglob("*"))
    assert len(holding(run, {WORDS})) > 10
    place = tmp_path / "copy" if copied else run
    done = redact(run, text=text, out=place if copied else None)
    assert holding(place, words) == []
    assert list(numbers(place)) == before and len(before) > 300
    for step in read_run(place).traces():  # the digest holds
        assert (step.response_ids is None and set(step.prompts) != {None}) or text == "none"
    assert json.loads((place / "recipe.json").read_text())["trace"] == {"text": text, "keep": 0}
    manifest = read_run(place).manifest
    assert (manifest["text"], manifest["redaction"]) == (text, "done")
    pages = {"report.html", "diagnosis.html", "ledger.html"}
    if copied:
        assert sorted(run.rglob("*")) == there and list(numbers(run)) == before and pages < set(done.left_behind)
        assert not (place / "models").exists()
    else:
        assert (
            pages < set(done.removed) and done.models == ["models"] and "trace/.step-000009.parquet.tmp" in done.removed
        )
        assert (run / "models" / "tokenizer.json").exists()


def test_equal_texts_have_equal_hashes(run: Path, made: Path) -> None:
    redact(run, text="hashed")
    before, after = read_run(made).step(1), read_run(run).step(1)
    assert list(after.prompts) == [digest(str(prompt)) for prompt in before.prompts]
    assert list(after.responses) == [digest(str(response)) for response in before.responses]
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0] == pairs[1] and pairs[0]["chosen"] == pairs[2]["chosen"] == digest(f"c {WORDS}")


def test_a_second_time_changes_nothing_and_none_is_stricter_than_hashed(run: Path) -> None:
    redact(run, text="hashed")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    again = redact(run, text="hashed")
    assert again.rewritten == [] and {file: file.read_bytes() for file in before} == before
    assert len(redact(run, text="none").rewritten) > 10
    assert read_run(run).step(0).prompts == (None,) * 8
    assert redact(run, text="hashed").rewritten == [] and read_run(run).manifest["text"] == "none"


def test_a_text_that_looks_like_a_hash_is_hashed(run: Path) -> None:
    import pyarrow as pa

    file = RunDir(run).step_file(0)
    table = parquet.read_table(file)
    at = table.column_names.index("response")
    parquet.write_table(table.set_column(at, "response", pa.array(["0123456789abcdef"] * len(table))), file)
    redact(run, text="hashed")
    assert read_run(run).step(0).responses[0] == digest("0123456789abcdef")


@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_a_kill_is_taken_up(run: Path, made: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Killed before the n-th file is replaced, its temporary copy of the old text left behind as a kill leaves it."""
    calls = 0
    write = module.write_table

    def killed(table: Any, path: Path) -> None:
        nonlocal calls
        if calls == after:
            path.with_name(f".{path.name}.tmp").write_text(WORDS)
            raise KeyboardInterrupt
        calls += 1
        write(table, path)

    monkeypatch.setattr(module, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        redact(run, text="hashed")
    assert read_run(run).manifest["redaction"] == "under way"
    assert list(numbers(run)) == list(numbers(made))
    monkeypatch.setattr(module, "write_table", write)
    done = redact(run, text="hashed")
    assert holding(run, {WORDS}) == [] and list(numbers(run)) == list(numbers(made))
    assert len(done.already) >= after and read_run(run).manifest["redaction"] == "done"


def test_unknown_files_are_refused_in_place_and_left_behind_by_a_copy(run: Path, tmp_path: Path) -> None:
    (run / "notes.txt").write_text(WORDS)
    (run / "page.html").write_text(f"<title>mine</title>{WORDS}")
    with pytest.raises(InputError) as refused:
        redact(run, text="none")
    assert {Path(problem.where).name for problem in refused.value.problems} == {"notes.txt", "page.html"}
    assert holding(run, {WORDS})
    done = redact(run, text="none", out=tmp_path / "copy")
    assert {"notes.txt", "page.html"} < set(done.left_behind) and holding(tmp_path / "copy", {WORDS}) == []


def test_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jsonl").write_text(WORDS)
    (run / "timings.jsonl").unlink()
    (run / "timings.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(InputError, match="does not know this file"):
        redact(run, text="none")


def test_a_run_under_way_is_refused_in_place(run: Path, tmp_path: Path) -> None:
    RunDir(run).update_manifest(status="running")
    with pytest.raises(InputError, match="under way, or was killed"):
        redact(run, text="none")
    redact(run, text="none", out=tmp_path / "copy")
    assert holding(tmp_path / "copy", {WORDS}) == []


def test_old_steps_and_their_labels_go(run: Path, tmp_path: Path) -> None:
    done = redact(run, text=None, keep=2)
    assert read_run(run).steps() == (2, 3) and done.removed == [
        "trace/step-000000.parquet",
        "trace/step-000001.parquet",
    ]
    assert parquet.read_table(run / "labels" / "audit.parquet").num_rows == 0
    assert read_run(run).step(2).prompts[0] is not None and "text" not in read_run(run).manifest
    redact(run, text="none", keep=1, out=tmp_path / "copy")
    assert read_run(tmp_path / "copy").steps() == (3,) and read_run(run).steps() == (2, 3)
    assert redact(run, text=None, keep=9).removed == []


def test_a_folder_that_is_not_empty_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("x")
    with pytest.raises(InputError, match="nothing was overwritten"):
        redact(run, text="none", out=tmp_path / "copy")
    with pytest.raises(InputError, match="no manifest"):
        redact(tmp_path / "copy", text="none")
    assert holding(run, {WORDS})
