"""Rows into judgments of every kind: spellings, precedence, and what is refused as wrong or ambiguous."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.data import columns
from kedge.data.records import Message, Preference, Ranking, Rating, Verdict
from kedge.data.validate import kind_of, load_judgments
from kedge.errors import InputError


def conversation(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def messages(*texts):
    return tuple(Message(**turn) for turn in conversation(*texts))


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
LETTERS = {"prompt": "p", "response_a": "x", "response_b": "y"}
FIGURES = {"instruction": "p", "output_1": "x", "output_2": "y"}
FROM_ZERO = {"prompt": "p", "response_0": "x", "response_1": "y"}
THREE = {"prompt": "p", "responses": ["x", "y", "z"]}
ONE = {"prompt": "p", "response": "x"}


def reason(row):
    with pytest.raises(columns.Unusable) as caught:
        columns.judgment(row)
    assert caught.value.remedy
    return caught.value.what


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"margin": "1.5"}, Preference("p", "c", "r", margin=1.5)),
        ({"margin": 0}, Preference("p", "c", "r", margin=0.0)),
        ({"margin": ""}, Preference("p", "c", "r")),
        ({"annotator": "ann"}, Preference("p", "c", "r", annotator="ann")),
        ({"annotator_id": 7}, Preference("p", "c", "r", annotator="7")),
        ({"worker": 7.0}, Preference("p", "c", "r", annotator="7")),
        ({"annotator": None, "worker_id": "w"}, Preference("p", "c", "r", annotator="w")),
        ({"chosen_pos": 2}, Preference("p", "c", "r", shown=2)),
        ({"position": "first"}, Preference("p", "c", "r", shown=1)),
        ({"position": "0"}, Preference("p", "c", "r")),
        ({"votes": "3,1,0"}, Preference("p", "c", "r", 0.75, votes=(3, 1, 0))),
        ({"votes": "1,3,1", "chosen_pos": 2, "n_votes": 5}, Preference("p", "c", "r", 0.7, votes=(3, 1, 1), shown=2)),
        ({"votes": [3, 1]}, Preference("p", "c", "r", 0.75, votes=(3, 1, 0))),
        ({"votes": "[3, 1, 0]"}, Preference("p", "c", "r", 0.75, votes=(3, 1, 0))),
        ({"votes_chosen": 3, "votes_rejected": "1"}, Preference("p", "c", "r", 0.75, votes=(3, 1, 0))),
        ({"votes_chosen": 1, "votes_rejected": 0, "votes_tie": 1}, Preference("p", "c", "r", 0.75, votes=(1, 0, 1))),
        ({"votes": "2,1", "strength": 0.67}, Preference("p", "c", "r", 0.67, votes=(2, 1, 0))),  # rounded
        ({"votes": "0,1,2", "tie": True}, Preference("p", "c", "r", 0.5, votes=(0, 1, 2))),
        ({"votes": "2,1,2", "strength": 0.5}, Preference("p", "c", "r", 0.5, votes=(2, 1, 2))),
        ({"votes": "1,3", "strength": 0.25}, Preference("p", "c", "r", 0.25, votes=(1, 3, 0))),
    ],
)
def test_what_a_pair_may_say_beside_its_sides(extra, expected):
    assert columns.judgment({**PAIR, **extra}) == expected
    assert columns.preference({**PAIR, **extra}) == expected


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"margin": -1}, "margin is -1, expected a number of 0 or more"),
        ({"margin": math.nan}, "margin is nan"),
        ({"margin": "wide"}, "margin is 'wide'"),
        ({"margin": "1_0"}, "margin is '1_0'"),
        ({"annotator": ["a", "b"]}, "annotator is ['a', 'b'], expected a name"),
        ({"annotator": math.nan}, "annotator is nan"),
        ({"position": 3}, "position is 3, expected 1 or 2"),
        ({"position": True}, "position is True"),
        ({"votes": "1,3"}, "chosen lost"),
        ({"votes": "0,0"}, "votes are all 0"),
        ({"votes": "3"}, "votes is of type str, expected a list"),
        ({"votes": "3,x"}, "votes is 'x', expected a whole number"),
        ({"votes": "3,-1"}, "votes is '-1'"),
        ({"votes": [1.5, 1]}, "votes is 1.5"),
        ({"votes": [1, 2, 3, 4]}, "votes holds 4 numbers"),
        ({"votes": "3,1", "n_votes": 5}, "n_votes is 5, the votes add up to 4"),
        ({"votes": "3,1", "strength": 0.6}, "strength is 0.6 but votes are 3 for chosen, 1 for rejected"),
        ({"votes": "3,0", "tie": True}, "strength is 0.5 but votes are 3"),
        ({"votes_chosen": 3}, "votes_rejected is None, expected a whole number"),
    ],
)
def test_contradictions_and_figures_that_are_none(extra, what):
    assert what in reason({**PAIR, **extra})


FIRST = Preference("p", "x", "y", shown=1)
SECOND = Preference("p", "y", "x", shown=2)
TIE = Preference("p", "x", "y", 0.5, shown=1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**LETTERS, "winner": "a"}, FIRST),
        ({**LETTERS, "winner": "B"}, SECOND),
        ({**LETTERS, "winner": "model_a"}, FIRST),
        ({**LETTERS, "label": "response_b"}, SECOND),
        ({**LETTERS, "preference": "tie"}, TIE),
        ({**LETTERS, "winner": "tie (bothbad)"}, TIE),
        ({**LETTERS, "winner": "a", "label": "A"}, FIRST),
        ({**LETTERS, "winner": "b", "votes": "1,3,0"}, Preference("p", "y", "x", 0.75, votes=(3, 1, 0), shown=2)),
        ({**FIGURES, "preference": 1}, FIRST),
        ({**FIGURES, "preference": "2"}, SECOND),
        ({**FIGURES, "preference": 0}, TIE),
        ({**FIGURES, "preference": 1.5}, TIE),
        ({**FIGURES, "preference": 1.75}, Preference("p", "y", "x", 0.75, shown=2)),
        ({**FIGURES, "preference": 1.25}, Preference("p", "x", "y", 0.75, shown=1)),
        ({**FROM_ZERO, "better_response_id": 0}, FIRST),
        ({**FROM_ZERO, "label": 1}, SECOND),
        ({"instruction": "p", "response1": "x", "response2": "y", "label": 2}, SECOND),
        (
            {"conversation_a": conversation("p", "x"), "conversation_b": conversation("p", "y"), "winner": "model_b"},
            Preference(messages("p"), "y", "x", shown=2),
        ),
    ],
)
def test_two_named_responses(row, expected):
    assert columns.judgment(row) == expected


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({**LETTERS, "winner": 1}, "winner is 1, expected a, b or tie, as in response_a and response_b"),
        ({**LETTERS, "winner": None}, "no winner is given"),
        ({**LETTERS, "winner": "a", "label": "b"}, "the columns winner, label name different winners"),
        ({**FIGURES, "preference": 3}, "preference is 3, expected 1, 2 or tie"),
        ({**FIGURES, "preference": "a"}, "expected 1, 2 or tie"),
        ({**FIGURES, "preference": math.nan}, "preference is nan"),
        ({**FIGURES, "preference": True}, "preference is True"),
        ({**FIGURES, "preference": 1.2, "strength": 0.6}, "strength is given beside a winner that leans"),
        ({**FROM_ZERO, "label": 2}, "label is 2, expected 0, 1 or tie"),
        ({**FROM_ZERO, "label": 0.7}, "label is 0.7"),
        ({**FROM_ZERO, "response_2": "z", "label": 0}, "more than two responses: response_0, response_1, response_2"),
        (LETTERS, "the columns are prompt, response_a, response_b; expected"),
    ],
)
def test_winners_that_are_none(row, what):
    assert what in reason(row)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"ranks": [0, 1, 2]}, ("xyz", (0, 1, 2))),
        ({"ranks": [3, 1, 2]}, ("yzx", (0, 1, 2))),
        ({"ranks": "2,1,1"}, ("yzx", (0, 0, 1))),
        ({"ranks": "[1.0, 1.0, 3.0]"}, ("xyz", (0, 0, 2))),
        ({"order": [2, 0, 1]}, ("zxy", (0, 1, 2))),
        ({"order": [3, 1, 2]}, ("zxy", (0, 1, 2))),
        ({"ranking": [2, 1, 3]}, ("yxz", (0, 1, 2))),  # one swap is the same as ranks and as an order
        ({"ranking": [1, 1, 2]}, ("xyz", (0, 0, 1))),  # ties say that it is ranks
        ({"scores": [0.5, 2, 1]}, ("yzx", (0, 1, 2))),
        ({"ratings": "1,1,3"}, ("zxy", (0, 1, 1))),
        ({"wins": [0.0, 1.5, 1.5]}, ("yzx", (0, 0, 1))),
        ({"overall": [3, 2, 1], "scores": '[{"fluency": 1}]'}, ("xyz", (0, 1, 2))),
        ({"best_first": True}, ("xyz", (0, 1, 2))),
        ({"best_first": "true", "scores": [1, 2, 3]}, ("xyz", (0, 1, 2))),
        ({"ranks": [1, 2, 3], "scores": [1, 2, 3]}, ("xyz", (0, 1, 2))),
    ],
)
def test_rankings(extra, expected):
    order, ranks = expected
    assert columns.judgment({**THREE, **extra}) == Ranking("p", tuple(order), ranks)


def test_responses_of_a_ranking_may_be_turns_conversations_or_json():
    expected = Ranking(messages("p"), ("y", "x"), (0, 1), "ann")
    said = {"scores": [1, 2], "annotator": "ann"}
    turns = [[{"role": "assistant", "content": text}] for text in "xy"]
    whole = [conversation("p", "x"), conversation("p", "y")]
    assert columns.judgment({"prompt": conversation("p"), "completions": turns, **said}) == expected
    assert columns.judgment({"candidates": whole, **said}) == expected
    assert columns.judgment({"prompt": conversation("p"), "answers": '["x", "y"]', **said}) == expected


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({}, "nothing says which response is better"),
        ({"best_first": False}, "nothing says which response is better"),
        ({"ranks": [0, 1]}, "ranks holds 2 for 3 responses"),
        ({"ranks": 1}, "ranks is of type int, expected a list"),
        ({"ranks": [0, 1, -1]}, "ranks is -1"),
        ({"ranks": [0, 1, 0.5]}, "ranks is 0.5"),
        ({"ranks": [0, 1, None]}, "ranks is None"),
        ({"order": [0, 0, 1]}, "order does not name every response once"),
        ({"ranking": [2, 3, 1]}, "which says one thing as ranks and another as places"),
        ({"scores": [1, 2, math.nan]}, "scores is nan"),
        ({"scores": [1, 2, math.inf]}, "scores is inf"),
        ({"scores": [1, 2, True]}, "scores is True"),
        ({"responses": ["x"], "ranks": [0]}, "responses holds 1, a ranking needs 2 or more"),
        ({"responses": [], "ranks": []}, "responses holds 0"),
        ({"responses": ["x", "y", "x"], "ranks": [0, 1, 2]}, "responses[0] and [2] are the same text"),
        ({"responses": ["x", None, "z"], "ranks": [0, 1, 2]}, "responses[1] is missing"),
        ({"responses": "x", "ranks": [0]}, "responses is of type str, expected a list"),
        ({"responses": "[no", "ranks": [0]}, "responses is not readable as a JSON list"),
        ({"responses": None, "ranks": [0]}, "responses is missing, expected a list"),
    ],
)
def test_rankings_that_are_none(extra, what):
    assert what in reason({**THREE, **extra})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**ONE, "rating": 4}, Rating("p", "x", 4.0)),
        ({**ONE, "score": "-0.5", "worker": 3}, Rating("p", "x", -0.5, "3")),
        ({"prompt": "p", "completion": "", "rating": 1}, Rating("p", "", 1.0)),
        ({**ONE, "label": True}, Verdict("p", "x", True)),
        ({"prompt": "p", "completion": "x", "label": "False"}, Verdict("p", "x", False)),
        ({**ONE, "good": 1}, Verdict("p", "x", True)),
        ({**ONE, "reward": "0.0", "annotator": "a"}, Verdict("p", "x", False, "a")),
        ({"messages": conversation("p", "x"), "label": 1}, Verdict(messages("p"), "x", True)),
        ({"prompt": conversation("p"), "completion": [{"role": "assistant", "content": "x"}], "rating": 1},
         Rating(messages("p"), "x", 1.0)),
    ],
)  # fmt: skip
def test_ratings_and_verdicts(row, expected):
    assert columns.judgment(row) == expected


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({**ONE, "rating": math.nan}, "rating is nan, expected a number"),
        ({**ONE, "rating": "high"}, "rating is 'high'"),
        ({**ONE, "rating": None}, "rating is None"),
        ({**ONE, "score": True}, "score is True"),
        ({**ONE, "label": -1}, "label is -1, expected true or false"),
        ({**ONE, "label": None}, "label is None"),
        ({**ONE, "reward": 0.3}, "reward is 0.3"),
        ({"prompt": "p", "response": None, "label": 1}, "response is missing"),
        ({"prompt": "p"}, "the columns are prompt; expected prompt and one of"),
        ({**ONE}, "the columns are prompt, response; expected"),
    ],
)
def test_ratings_and_verdicts_that_are_none(row, what):
    assert what in reason(row)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**PAIR, **ONE, **THREE, "rating": 1, "label": 1, "ranks": [0, 1, 2]}, "pair"),
        ({**LETTERS, **ONE, **THREE, "winner": "a", "ranks": [0, 1, 2]}, "pair"),
        ({**THREE, **ONE, "rating": 1, "ranks": [0, 1, 2]}, "ranking"),
        ({**ONE, "rating": 1, "label": 1}, "rating"),
        ({**ONE, "rating": None, "label": 1}, "verdict"),
        ({**ONE, "chosen": None, "rejected": None, "rating": 1}, "rating"),
    ],
)
def test_which_columns_win(row, kind):
    assert kind_of(columns.judgment(row)) == kind


def test_errors_stay_short_and_printable():
    for row in ({**PAIR, "strength": "x" * 10**6}, {"\ud800\n\x1b[31m" + str(n): 1 for n in range(1000)}):
        what = reason(row)
        assert len(what) < 3000 and what.isprintable()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["[1", "a", "1,2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)
NAMES = (
    "prompt chosen rejected strength tie margin votes n_votes votes_chosen votes_rejected annotator position shown "
    "response responses completion messages rating score label good reward winner preference response_a response_b "
    "response_0 response_1 response_2 ranks ranking order scores best_first kind plain line instruction input"
)


@given(st.dictionaries(st.sampled_from(NAMES.split()), ANYTHING, max_size=8))
def test_no_row_whatsoever_causes_another_error(row):
    with contextlib.suppress(columns.Unusable):
        assert kind_of(columns.judgment(row))


@given(st.fixed_dictionaries(dict.fromkeys(columns.CANONICAL, ANYTHING)))
def test_no_canonical_row_whatsoever_causes_another_error(row):
    for kind in ("pair", "ranking", "rating", "verdict", row["kind"]):
        with contextlib.suppress(columns.Unusable):
            assert kind_of(columns.judgment({**row, "kind": kind})) == kind


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_holds_one_kind(tmp_path):
    rows = [{**ONE, "rating": 1}, {**ONE, "rating": None}, PAIR, {**ONE, "rating": 2}, {**ONE, "label": 0}]
    path = jsonl(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_judgments(path, max_rejected=0.5)
    (problem,) = caught.value.problems
    found = f"rating first at {path}:1, pair first at {path}:3, verdict first at {path}:5"
    assert problem.what == f"several kinds of judgments: {found}; a file holds one kind"


def test_judgments_keep_their_lines_beside_what_is_rejected(tmp_path):
    path = jsonl(tmp_path / "verdicts.jsonl", [{**ONE, "label": 1}, {**ONE, "label": 2}, {**ONE, "label": 0}])
    loaded = load_judgments(path, max_rejected=0.4)
    assert loaded.rows == (Verdict("p", "x", True), Verdict("p", "x", False))
    assert loaded.lines == (f"{path}:1", f"{path}:3") and loaded.total == 3
    assert [problem.where for problem in loaded.rejected] == [f"{path}:2"]
    with pytest.raises(InputError, match="1 of 3 rows are rejected"):
        load_judgments(path, max_rejected=0.1)
    with pytest.raises(InputError, match="the columns are question"):
        load_judgments(jsonl(tmp_path / "other.jsonl", [{"question": "q"}]), max_rejected=1.0)
