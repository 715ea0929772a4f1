"""Labels find the responses they are about, and nothing else; what could mean two things labels nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import World, replace, step_record

from kedge.errors import InputError, Problem
from kedge.trace.jsonl import Record
from kedge.trace.labels import Joined, Labels, LabelSet, match, place_of, read_labels, refuse_taken, require_name, store
from kedge.trace.reader import Run, read_run
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import TraceWriter

# Two steps of eight rows. Rows 0 to 5: three prompts, each response its own. Row 6 and 7: one text, two prompts.
PROMPTS = ["p0", "p0", "p1", "p1", "p2", "p2", "p0", "p1"]
RESPONSES = ["r0", "r1", "r2", "r3", "r4", "r5", "same", "same"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def written(path: Path, text: Any = "full", prompts: list[str] | None = PROMPTS) -> Run:
    folder = RunDir.create(path)
    folder.update_manifest(name="labelled", status="finished")
    rng = np.random.default_rng(0)
    with TraceWriter(folder, text=text) as writer:
        for step in range(2):
            record = step_record(World(batch=8), step, rng)
            writer.write_step(replace(record, prompts=prompts, responses=RESPONSES))
    return read_run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("labels")
    return {text: written(folder / text, text) for text in ("full", "hashed", "none")}


def matched(run: Run, rows: list[Record | Problem], columns: dict[str, str] | None = None) -> Joined:
    return match(((f"audit.csv:{number}", row) for number, row in enumerate(rows, 2)), run, columns)


def places(found: Joined, column: str) -> dict[tuple[int, int], Any]:
    values = dict(zip(found.places, found.columns.get(column, ()), strict=True))
    return {place: value for place, value in values.items() if value is not None}


BOTH = {(step, row) for step in (0, 1) for row in (2,)}


@pytest.mark.parametrize("text", ["full", "hashed"])
@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"prompt": "p1", "response": "r2"}, BOTH),
        ({"response": "r2"}, BOTH),
        ({"hash": digest("r2")}, BOTH),
        ({"response_hash": digest("r2"), "prompt_hash": digest("p1")}, BOTH),
        ({"response": digest("r2")}, BOTH),
        ({"step": 1, "row": 2}, {(1, 2)}),
        ({"step": "1", "row": "2.0", "response": "r2"}, {(1, 2)}),
        ({"step": 0, "response": "r2"}, {(0, 2)}),
        ({"prompt": "p1", "response": "same"}, {(0, 7), (1, 7)}),
        ({"prompt": "p2"}, {(step, row) for step in (0, 1) for row in (4, 5)}),
    ],
)
def test_a_row_labels_all_that_it_is_about(runs: dict[str, Run], text: str, about: Record, expected: set[Any]) -> None:
    found = matched(runs[text], [about | {"verdict": "bad"}])
    assert places(found, "verdict") == dict.fromkeys(expected, "bad") and not found.left


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"response": "same"}, "ambiguous: 4 responses to different or unknown prompts"),
        ({"response": "other"}, "no such text"),
        ({"prompt": "p1", "response": "r0"}, "no such text"),
        ({"step": 7, "row": 0}, "no such step and row"),
        ({"step": 0, "row": 8}, "no such step and row"),
        ({"step": 0, "row": 2, "response": "r3"}, "do not fit"),
        ({"step": 0}, "says nowhere"),
        ({"row": 0}, "says nowhere"),
        ({}, "says nowhere"),
        ({"step": "x", "row": 1}, "step is no whole number"),
        ({"step": 0, "row": 1.5}, "row is no whole number"),
        ({"step": -1, "row": 1}, "step is no whole number"),
        ({"response": "r0", "hash": digest("r1")}, "are of different texts"),
        (Problem("audit.csv:3", "not readable", ""), "not readable"),
    ],
)
def test_what_is_not_certain_labels_nothing_and_is_reported(runs: dict[str, Run], about: Any, why: str) -> None:
    row = about if isinstance(about, Problem) else about | {"verdict": "bad"}
    found = matched(runs["full"], [{"response": "r0", "verdict": "good"}, row])
    assert set(places(found, "verdict")) == {(0, 0), (1, 0)}
    (left,) = found.left
    assert left.where == "audit.csv:3" and why in left.what


def test_without_texts_only_step_and_row_find_anything(runs: dict[str, Run]) -> None:
    found = matched(runs["none"], [{"step": 0, "row": 3, "response": "r3", "n": 1}, {"response": "r2", "n": 2}])
    assert places(found, "n") == {(0, 3): 1.0}
    assert [problem.where for problem in found.left] == ["audit.csv:3"]


def test_a_response_to_unknown_prompts_is_ambiguous_only_where_it_is_there_twice(tmp_path: Path) -> None:
    run = written(tmp_path / "run", prompts=None)
    found = matched(run, [{"response": "r2", "n": 1}, {"step": 0, "response": "r3", "n": 2}])
    assert places(found, "n") == {(0, 3): 2.0} and "ambiguous" in found.left[0].what


def test_rows_that_contradict_each_other_label_nothing(runs: dict[str, Run]) -> None:
    rows: list[Any] = [
        {"response": "r0", "verdict": "good"},
        {"response": "r1", "verdict": "good"},
        {"prompt": "p0", "response": "r1", "verdict": "good"},
        {"step": 1, "row": 0, "verdict": "bad"},
        {"response": "r2", "verdict": "good", "n": 1},
        {"step": 0, "row": 2, "n": 3},
        {"step": 0, "row": 3, "n": 4},
    ]
    found = matched(runs["full"], rows)
    assert [problem.where for problem in found.left] == [f"audit.csv:{line}" for line in (2, 5, 6, 7)]
    assert "audit.csv:5" in found.left[0].what and "good" not in str(found.left)
    assert places(found, "verdict") == {(0, 1): "good", (1, 1): "good"} and places(found, "n") == {(0, 3): 4.0}
    assert found.repeated == 1 and found.ways == {"response": 1, "prompt and response": 1, "step and row": 1}


def test_columns_are_numbers_or_few_words(runs: dict[str, Run]) -> None:
    rows: list[Any] = [
        {"response": f"r{row}", "n": str(row), "flag": row > 2, "word": "ab"[row % 2], "half": "x" if row else 0.5,
         "note": f"a remark about the answer that is long: {row}", "turns": [{"role": "user"}], "copied": f"r{row}"}
        for row in range(6)
    ]  # fmt: skip
    found = matched(runs["full"], rows)
    values = {name: [places(found, name)[0, row] for row in range(6)] for name in found.columns}
    assert values == {
        "n": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        "flag": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        "word": list("ababab"),
        "half": ["0.5", "x", "x", "x", "x", "x"],
    }
    assert set(found.dropped) == {"note", "turns", "copied"}
    assert "prompt or a response of the run" in found.dropped["copied"]
    many = [{"step": 0, "row": 0, "n": 1, "free": ""}] + [{"step": 0, "row": 1, "free": f"w{k}"} for k in range(25)]
    assert "25 different texts" in matched(runs["full"], many).dropped["free"]


def test_chosen_columns_take_new_names(runs: dict[str, Run]) -> None:
    rows: list[Any] = [{"response": "r0", "verdict": 3, "other": 1}, {"response": "r1", "other": 1}]
    found = matched(runs["full"], rows, {"verdict": "human"})
    assert list(found.columns) == ["human"] and places(found, "human") == {(0, 0): 3.0, (1, 0): 3.0}
    assert [problem.what for problem in found.left] == ["holds no label"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"human": "good"}, "audit.csv:2: human is not a number"),
        ({"confidence": 1.5}, "confidence is not a number from 0 to 1"),
        ({"correct": "-1"}, "correct is not a number from 0 to 1"),
        ({"note": "x" * 41}, "no column can be a label"),
        ({"note": "r3"}, "no column can be a label"),
    ],
)
def test_what_checks_read_must_be_what_they_mean(runs: dict[str, Run], row: Record, message: str) -> None:
    with pytest.raises(InputError, match=message):
        matched(runs["full"], [{"response": "r0"} | row])
    with pytest.raises(InputError, match="holds no row"):
        matched(runs["full"], [])


ABOUT: list[Callable[[int, int], Record]] = [
    lambda step, row: {"step": step, "row": row},
    lambda step, row: {"prompt": PROMPTS[row], "response": RESPONSES[row]},
    lambda step, row: {"response": RESPONSES[row]},
    lambda step, row: {"prompt_hash": digest(PROMPTS[row])},
    lambda step, row: {"step": step, "hash": digest(RESPONSES[row])},
]


@settings(max_examples=60, deadline=None)
@given(
    given_rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 7), st.integers(0, len(ABOUT) - 1), st.integers(0, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_nothing_is_guessed(runs: dict[str, Run], given_rows: list[tuple[int, int, int, int]]) -> None:
    """Against a loop over all pairs of rows: a label stands where every row about a response says the same."""
    rows = [ABOUT[kind](step, row) | {"n": n} for step, row, kind, n in given_rows]
    about: list[set[tuple[int, int]]] = []
    for step, row, kind, _ in given_rows:
        fits = {
            (s, r)
            for s in (0, 1)
            for r in range(8)
            if (kind not in (0, 4) or s == step)
            and (kind != 0 or r == row)
            and (kind != 1 or (PROMPTS[r], RESPONSES[r]) == (PROMPTS[row], RESPONSES[row]))
            and (kind not in (2, 4) or RESPONSES[r] == RESPONSES[row])
            and (kind != 3 or PROMPTS[r] == PROMPTS[row])
        }
        about.append(set() if kind in (2, 4) and RESPONSES[row] == "same" else fits)
    bad = {
        i
        for i, one in enumerate(about)
        for j, other in enumerate(about)
        if one & other and given_rows[i][3] != given_rows[j][3]
    }
    expected = {
        place: float(given_rows[i][3]) for i, fits in enumerate(about) if i not in bad for place in fits
    }  # fmt: skip
    found = matched(runs["full"], rows)  # type: ignore[arg-type]
    assert places(found, "n") == expected
    empty = {i for i, fits in enumerate(about) if not fits}
    assert {problem.where for problem in found.left} == {f"audit.csv:{i + 2}" for i in empty | bad}


# In the run's folder


def test_what_is_kept_holds_no_text(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    source = tmp_path / "audit.csv"
    source.write_text("response,verdict,worth\nr2,good,1\n")
    found = matched(run, [{"response": "r2", "verdict": "good", "worth": "1"}])
    path = store(run, "audit", found, source)
    assert path == run.path / "labels" / "audit.parquet" and not list(path.parent.glob(".*"))
    table = parquet.read_table(path)
    assert table.to_pydict() == {"step": [0, 1], "row": [2, 2], "verdict": ["good"] * 2, "worth": [1.0, 1.0]}
    about = json.loads(table.schema.metadata[b"kedge"])
    assert about["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert about["joined"].startswith("20") and about["rows"] == 1 and about["left"] == 0
    assert b"r2" not in path.read_bytes() and b"p1" not in path.read_bytes()
    labels = read_labels(run)
    assert labels is not None and labels.of(run.step(0), "verdict")[1:4] == [None, "good", None]
    with pytest.raises(InputError, match="nothing was overwritten"):
        refuse_taken(run, "audit")
    refuse_taken(run, "audit-2")


@pytest.mark.parametrize("name", ["", "../up", "a.b", "a b", ".hidden", "-x", "ä/b"])
def test_names_of_labels(runs: dict[str, Run], name: str) -> None:
    with pytest.raises(InputError, match="is no name for labels"):
        require_name(name)
    assert place_of(runs["full"], "week-1_a").name == "week-1_a.parquet"


def test_sets_of_labels_add_up_and_contradictions_count_for_nothing() -> None:
    first = LabelSet("first", {}, {"human": {(0, 0): 1.0, (0, 1): 2.0}})
    second = LabelSet("second", {}, {"human": {(0, 1): 3.0, (0, 2): 4.0}, "grade": {(0, 0): "a"}})
    labels = Labels([first, second])
    assert labels.names == ("human", "grade", "first", "first.human", "second.human", "second.grade")
    assert labels.known("human") == {(0, 0): 1.0, (0, 2): 4.0}
    assert labels.known("first") == labels.known("first.human") == {(0, 0): 1.0, (0, 1): 2.0}
    with pytest.raises(InputError, match="no such label"):
        labels.known("second")


def test_a_column_comes_before_a_set_of_its_name() -> None:
    labels = Labels([LabelSet("human", {}, {"grade": {(0, 0): 5.0}}), LabelSet("b", {}, {"human": {(0, 0): 1.0}})])
    assert labels.known("human") == {(0, 0): 1.0}


def test_files_that_are_no_labels(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    assert read_labels(run) is None
    (run.path / "labels").mkdir()
    (run.path / "labels" / "x.parquet").write_bytes(run.dir.step_file(0).read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(run)
    table = parquet.read_table(run.dir.step_file(0)).replace_schema_metadata({})
    parquet.write_table(table, run.path / "labels" / "x.parquet")
    with pytest.raises(InputError, match="holds no labels"):
        read_labels(run)
