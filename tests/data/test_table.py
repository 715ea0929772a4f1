"""Judgments through the canonical table and back, in memory and through a file."""

from __future__ import annotations

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.data import columns
from kedge.data.records import Loaded, Message, Preference, Ranking, Rating, Verdict
from kedge.data.table import SCHEMA, batches, from_table, to_table
from kedge.data.validate import load_judgments
from kedge.errors import InputError, Problem

TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
FILLED = TEXT.map(lambda text: "p" + text)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
PROMPTS = FILLED | st.lists(st.builds(Message, ROLES, TEXT), min_size=1, max_size=3).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.none() | FILLED


@st.composite
def pairs(draw):
    """Pairs whose votes, if they were counted, say what the strength says."""
    votes = draw(st.none() | st.tuples(*[st.integers(0, 2**40)] * 3).filter(any))
    strength = draw(st.floats(0, 1)) if votes is None else (votes[0] + votes[2] / 2) / sum(votes)
    margin = draw(st.none() | st.floats(0, allow_infinity=False))
    shown = draw(st.integers(0, 2))
    return Preference(draw(PROMPTS), draw(FILLED), draw(TEXT), strength, margin, votes, draw(NAMES), shown)


@st.composite
def rankings(draw):
    responses = draw(st.lists(TEXT, min_size=2, max_size=4, unique=True))
    steps = draw(st.lists(st.integers(0, 2), min_size=len(responses) - 1, max_size=len(responses) - 1))
    ranks = tuple(sum(steps[:place]) for place in range(len(responses)))
    return Ranking(draw(PROMPTS), tuple(responses), ranks, draw(NAMES))


KINDS = {
    "pair": pairs(),
    "ranking": rankings(),
    "rating": st.builds(Rating, PROMPTS, TEXT, FINITE, NAMES),
    "verdict": st.builds(Verdict, PROMPTS, TEXT, st.booleans(), NAMES),
}
PROBLEMS = st.lists(st.builds(Problem, TEXT, TEXT, TEXT), max_size=2)


@settings(max_examples=30)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_table_gives_back_what_it_was_given(kind, data):
    rows = data.draw(st.lists(KINDS[kind], max_size=4))
    rejected = tuple(data.draw(PROBLEMS))
    loaded = Loaded(tuple(rows), tuple(f"f:{n}" for n in range(len(rows))), rejected, len(rows) + len(rejected))
    table = to_table(loaded)
    assert table.schema.equals(SCHEMA)
    assert from_table(table) == loaded


@settings(max_examples=30)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_canonical_file_is_read_like_any_other(kind, data, tmp_path_factory):
    rows = data.draw(st.lists(KINDS[kind], min_size=1, max_size=4))
    path = tmp_path_factory.getbasetemp() / f"{kind}.parquet"
    parquet.write_table(to_table(Loaded.of(rows, "made")), path)
    loaded = load_judgments(path, max_rejected=0.0)
    assert loaded.rows == tuple(rows)
    assert loaded.lines[0] == f"{path}:1"
    assert from_table(parquet.read_table(path)) == Loaded.of(rows, "made")


def test_the_columns_are_those_that_are_recognised():
    assert tuple(SCHEMA.names) == columns.CANONICAL


def test_batches_hold_no_more_than_their_size():
    taken = []

    def endless():
        for number in range(10**9):
            taken.append(number)
            yield f"f:{number}", Rating("p", "r", number)

    stream = batches(endless(), size=10)
    assert [next(stream).num_rows for _ in range(3)] == [10, 10, 10]
    assert len(taken) <= 31


def test_another_table_is_refused():
    with pytest.raises(InputError, match="the columns are a; expected a canonical table"):
        from_table(arrow.table({"a": [1]}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kind": "song"}, "kind is 'song' with 2 responses"),
        ({"kind": "rating"}, "kind is 'rating' with 2 responses"),
        ({"responses": ["x"]}, "kind is 'pair' with 1 responses"),
        ({"responses": None}, "responses is missing"),
        ({"votes": [1, 2]}, "votes holds 2 numbers, expected 3"),
        ({"plain": None}, "plain is None"),
        ({"prompt": []}, "prompt holds no messages"),
        ({"prompt": [{"role": "user", "content": "a"}] * 2}, "prompt is plain text but holds 2 messages"),
    ],
)
def test_canonical_rows_that_were_changed_by_hand(change, what):
    (row,) = to_table(Loaded.of([Preference("p", "x", "y")], "made")).to_pylist()
    with pytest.raises(columns.Unusable) as caught:
        columns.judgment({**row, **change})
    assert what in caught.value.what
