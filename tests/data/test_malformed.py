"""A thousand and more malformed rows: each is loaded right or reported with its line, and none is dropped.

A file is made of sound rows and of rows damaged in ways that are known to make them unusable. So what has to come of
each line is known without asking the code under test.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from dataclasses import dataclass

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.data import columns
from kedge.data.records import Preference, Ranking, Rating, Verdict
from kedge.data.validate import kind_of, load_judgments, outcomes
from kedge.errors import InputError, Problem

NOT_SHARES = ["much", "nan", "inf", "-0.1", "1.5", "1e999", "0,5", math.nan, -math.inf]
NOT_NUMBERS = ["nan", "-inf", "good", "1e999", "--1", "0x10", math.nan, math.inf]
BAD_PROMPTS = [{"prompt": None}, {"prompt": ""}, {"prompt": " \t"}]
BAD_TEXTS = [3, 0.5, True, ["x"], {"a": 1}, [{"role": "user"}], [{"role": "user", "content": 3}], [], [[]], "\ud800"]

# For each kind: its columns, whose values in a sound row come from the texts p, x and y; the record; the damages.
KINDS = {
    "pair": (
        lambda p, x, y: {"prompt": p, "chosen": x, "rejected": y, "strength": None, "tie": None, "votes": None,
                         "margin": None, "position": None, "annotator": "ann"},
        lambda p, x, y: Preference(p, x, y, annotator="ann"),
        [*BAD_PROMPTS, {"chosen": "", "rejected": " "}, {"tie": "perhaps"}, {"tie": True, "strength": 0.9},
         *({"strength": value} for value in NOT_SHARES),
         *({"margin": value} for value in [*NOT_NUMBERS, -1]),
         *({"votes": value} for value in ["3", "3,x", "-1,2", "0,0", "1,3", "1.5,0", "1,2,3,4", [1], [None, 1], "[1"]),
         {"votes": "9,1", "strength": 0.1}, {"votes": "3,0,0", "tie": True},
         *({"position": value} for value in ["3", "left", -1, 1.5])],
    ),
    "named": (
        lambda p, x, y: {"prompt": p, "response_a": x, "response_b": y, "winner": "model_b"},
        lambda p, x, y: Preference(p, y, x, shown=2),
        [*BAD_PROMPTS, *({"winner": value} for value in [None, "", "c", 1, 0, "model", "nan"])],
    ),
    "ranking": (
        lambda p, x, y: {"prompt": p, "responses": [x, y], "ranks": [2, 1]},
        lambda p, x, y: Ranking(p, (y, x), (0, 1)),
        [*BAD_PROMPTS,
         *({"ranks": value} for value in [None, "", [1], [1, 2, 3], [1, -1], [0, 0.5], ["a", "b"], "1", 7]),
         *({"responses": value} for value in [None, "", [], ["x"], ["x", "x"], ["x", None], ["x", 3], "x", "[x"])],
    ),
    "rating": (
        lambda p, x, y: {"prompt": p, "response": x, "rating": 2.5},
        lambda p, x, y: Rating(p, x, 2.5),
        [*BAD_PROMPTS, *({"rating": value} for value in [*NOT_NUMBERS, None, "", "1,5"])],
    ),
    "verdict": (
        lambda p, x, y: {"prompt": p, "completion": x, "label": False},
        lambda p, x, y: Verdict(p, x, False),
        [*BAD_PROMPTS, *({"label": value} for value in [None, "", -1, 2, 0.5, "fine", math.nan])],
    ),
}  # fmt: skip

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=6)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=5,
)


@dataclass
class Line:
    """A row as it is written, and what must come of it: a record, or None for a rejection, or ... for either."""

    cells: dict
    expected: object
    raw: bytes | None = None  # instead of the cells


@st.composite
def lines(draw, suffix):
    make, record, damages = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    rows = [draw(line(make, record, damages, suffix)) for _ in range(draw(st.integers(1, 6)))]
    # Two open quotes make a cell of many lines, which CSV allows.
    return [row for place, row in enumerate(rows) if not (torn(row) and any(map(torn, rows[:place])))]


@st.composite
def line(draw, make, record, damages, suffix):
    texts = [name + draw(WORDS) for name in "pxy"]
    cells, sound = make(*texts), record(*texts)
    what = draw(st.sampled_from(["sound", "cells", "cells", "types", "garbage", "raw"]))
    if what == "cells":
        return Line(cells | draw(st.sampled_from(damages)), None)
    if what == "types" and suffix == "jsonl":
        return Line(cells | {"prompt": draw(st.sampled_from(BAD_TEXTS))}, None)
    if what == "garbage" and suffix == "jsonl":
        return Line(cells | {draw(st.sampled_from(sorted(cells))): draw(GARBAGE)}, ...)
    if what == "raw":
        return Line(cells, None, draw(damaged(cells, suffix)))
    return Line(cells, sound)


@st.composite
def damaged(draw, cells, suffix):
    """A row that is broken below the level of cells."""
    if suffix == "parquet":
        return b"\xff\xfe"
    if suffix == "csv":
        good = csv_line(cells.values()).rstrip(b"\n")
        short = csv_line(list(cells.values())[:-1]).rstrip(b"\n")
        return draw(st.sampled_from([short, short + b',"', good + b",x", good + b"\xff", b'"a"b' + good, b'"' + good]))
    whole = json.dumps(cells).encode()
    cut = whole[: draw(st.integers(1, len(whole) - 1))]
    others = [b"\xff" + whole, b"[1]", b"null", b"3", b'"text"', b"{}", b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}"]
    return draw(st.sampled_from([cut, cut, whole + b",", whole[:-1] + b",}", *others]))


def torn(row):
    """Whether a quote is left open."""
    return row.raw is not None and row.raw.count(b'"') % 2 == 1


def csv_line(cells):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(as_text, cells))
    return text.getvalue().encode("utf-8")


def as_text(cell):
    """A cell where every column holds text."""
    return json.dumps(cell) if isinstance(cell, list) else cell if cell is None else str(cell)


def write(path, rows, gaps):
    """Write the rows and return the number of the line on which each begins."""
    if path.suffix == ".parquet":
        names = rows[0].cells
        arrays = []
        for place, name in enumerate(names):
            cells = [row.raw if row.raw and place == 0 else encoded(row.cells[name]) for row in rows]
            arrays.append(arrow.array(cells, arrow.binary()).view(arrow.string()))
        parquet.write_table(arrow.table(arrays, names=list(names)), path)
        return list(range(1, len(rows) + 1))
    numbers, written = [], b"" if path.suffix == ".jsonl" else csv_line(rows[0].cells)
    for row, gap in zip(rows, gaps, strict=True):
        encode = (lambda cells: json.dumps(cells).encode() + b"\n") if path.suffix == ".jsonl" else csv_row
        written += b"\n" * gap
        numbers.append(written.count(b"\n") + 1)
        written += encode(row.cells) if row.raw is None else row.raw + b"\n"
    path.write_bytes(written)
    return numbers


def csv_row(cells):
    return csv_line(cells.values())


def encoded(cell):
    return None if cell is None else as_text(cell).encode()


def check(path, rows, numbers):
    """Every line that was written is loaded right or reported, once."""
    found = {}
    for where, outcome in outcomes(path, columns.judgment):
        name, _, number = where.rpartition(":")
        assert name == str(path) and int(number) not in found
        found[int(number)] = outcome
    # An open quote takes the lines after it along, the empty ones, too; they are reported one by one.
    open_quote = path.suffix == ".csv" and any(map(torn, rows))
    assert found.keys() >= set(numbers) if open_quote else found.keys() == set(numbers)
    for row, number in zip(rows, numbers, strict=True):
        outcome = found[number]
        if isinstance(outcome, Problem):
            assert outcome.where == f"{path}:{number}" and outcome.what and outcome.remedy
            assert row.expected is None or row.expected is ... or open_quote, outcome
        else:
            assert row.expected is ... or outcome == row.expected
    return found


def check_loader(path, found):
    """`load_judgments` has the same rows, or says why it does not."""
    usable = [outcome for outcome in found.values() if not isinstance(outcome, Problem)]
    if len({kind_of(outcome) for outcome in usable}) != 1:
        with pytest.raises(InputError):
            load_judgments(path, max_rejected=1.0)
        return
    loaded = load_judgments(path, max_rejected=1.0)
    assert list(loaded.rows) == usable
    assert loaded.total == len(loaded.rows) + len(loaded.rejected) == len(found)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_malformed_row_is_loaded_right_or_reported(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    seen = Counter()

    @settings(max_examples=340)
    @given(lines(suffix), st.lists(st.integers(0, 1), min_size=6, max_size=6))
    def examples(rows, gaps):
        numbers = write(path, rows, gaps[: len(rows)])
        found = check(path, rows, numbers)
        check_loader(path, found)
        seen["malformed"] += sum(row.expected is None for row in rows)
        seen["sound"] += sum(not isinstance(outcome, Problem) for outcome in found.values())

    examples()
    assert seen["malformed"] > 350 and seen["sound"] > 100, seen
