"""Rows into records: the column spellings people use, and what is said about rows that cannot be used."""

from __future__ import annotations

import json
import math

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.data import columns
from kedge.data.records import Demonstration, Message, Preference, prompt_text
from kedge.data.validate import check_rejected, load_demonstrations, load_preferences, load_prompts
from kedge.errors import InputError, Problem


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def conversation(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def messages(*texts):
    return tuple(Message(**turn) for turn in conversation(*texts))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r", "id": 3}, Demonstration("p", "r")),
        ({"prompt": "p", "completion": "r"}, Demonstration("p", "r")),
        ({"instruction": "i", "input": "", "output": "r"}, Demonstration("i", "r")),
        ({"instruction": "i", "output": "r"}, Demonstration("i", "r")),
        ({"instruction": "i", "input": "x", "output": "r"}, Demonstration("i\n\nx", "r")),
        ({"messages": conversation("a", "b", "c", "d")}, Demonstration(messages("a", "b", "c"), "d")),
        ({"prompt": conversation("a"), "response": "b"}, Demonstration(messages("a"), "b")),
        ({"prompt": conversation("a"), "completion": [assistant("b")]}, Demonstration(messages("a"), "b")),
        ({"prompt": "a", "completion": [assistant("b")]}, Demonstration("a", "b")),
        ({"prompt": conversation("a"), "completion": conversation("a", "b")}, Demonstration(messages("a"), "b")),
        ({"prompt": [{**user("a"), "name": None}], "response": "b"}, Demonstration(messages("a"), "b")),
    ],
)
def test_demonstration_spellings(row, expected):
    assert columns.demonstration(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
        ({"prompt": conversation("p"), "chosen": "c", "rejected": "r"}, Preference(messages("p"), "c", "r")),
        (
            {"prompt": conversation("p"), "chosen": [assistant("c")], "rejected": [assistant("r")]},
            Preference(messages("p"), "c", "r"),
        ),
        (  # the prompt said twice, as text and inside the conversations
            {"prompt": "p", "chosen": conversation("p", "c"), "rejected": conversation("p", "r")},
            Preference(messages("p"), "c", "r"),
        ),
        (
            {"chosen": conversation("p", "q", "s", "c"), "rejected": conversation("p", "q", "s", "r")},
            Preference(messages("p", "q", "s"), "c", "r"),
        ),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, Preference("p", "c", "")),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "strength": 0.75}, Preference("p", "c", "r", 0.75)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "strength": "0.6"}, Preference("p", "c", "r", 0.6)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "strength": None}, Preference("p", "c", "r", 1.0)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": True}, Preference("p", "c", "r", 0.5)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": "false"}, Preference("p", "c", "r", 1.0)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": 0, "strength": 0.9}, Preference("p", "c", "r", 0.9)),
    ],
)
def test_preference_spellings(row, expected):
    assert columns.preference(row) == expected


def test_a_system_turn_before_the_repeated_prompt_is_kept():
    system = {"role": "system", "content": "be kind"}
    row = {"prompt": "p", "chosen": [system, *conversation("p", "c")], "rejected": [system, *conversation("p", "r")]}
    assert columns.preference(row) == Preference((Message("system", "be kind"), *messages("p")), "c", "r")


def test_transcripts_become_conversations():
    opening = "\n\nHuman: What is it?\nTell me.\n\nAssistant: A pen.\n\nHuman: Human: is a label\n\nAssistant:"
    row = {"chosen": opening + " Good.\n\nTwo paragraphs.", "rejected": opening + ""}
    assert columns.preference(row) == Preference(
        messages("What is it?\nTell me.", "A pen.", "Human: is a label"), "Good.\n\nTwo paragraphs.", ""
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": conversation("p")}, messages("p")),
        ({"instruction": "i", "input": "x"}, "i\n\nx"),
        ({"messages": conversation("a", "b")}, messages("a")),
        ({"messages": conversation("a", "b", "c")}, messages("a", "b", "c")),
    ],
)
def test_prompt_spellings(row, expected):
    assert columns.prompt(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "response": None}, "response is missing, expected text"),
        ({"prompt": "p", "response": 3}, "response is of type int, expected text"),
        ({"prompt": "p", "response": " \n"}, "response is empty"),
        ({"prompt": "", "response": "r"}, "prompt is empty"),
        ({"prompt": None, "response": "r"}, "prompt is missing"),
        ({"prompt": [], "response": "r"}, "prompt holds no messages"),
        ({"prompt": "half \ud83d", "response": "r"}, "half a surrogate pair"),
        ({"prompt": ["p"], "response": "r"}, "message 1 of prompt is not a role and content"),
        ({"prompt": [user(["parts"])], "response": "r"}, "message 1 of prompt is of type list"),
        ({"prompt": [{"role": "a<eos>", "content": "x"}], "response": "r"}, "has the role 'a<eos>'"),
        ({"prompt": "p", "response": [user("r")]}, "ends with the role user, expected assistant"),
        ({"messages": conversation("a")}, "ends with the role user, expected assistant"),
        ({"messages": [assistant("b")]}, "a response but no prompt"),
        ({"messages": "a"}, "messages holds no messages"),
        ({"instruction": 5, "input": "x", "output": "r"}, "instruction is of type int"),
    ],
)
def test_unusable_demonstrations_are_rejected_with_the_reason(row, reason):
    with pytest.raises(columns.Unusable) as caught:
        columns.demonstration(row)
    assert reason in caught.value.what and caught.value.remedy


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, -0.1, 1.1, "much", "nan", True, [1], 10**400])
def test_strengths_that_are_no_share_are_rejected(strength):
    with pytest.raises(columns.Unusable, match="expected a share from 0 to 1"):
        columns.preference({"prompt": "p", "chosen": "c", "rejected": "r", "strength": strength})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": None}, "rejected is missing"),
        ({"prompt": "p", "chosen": "", "rejected": " "}, "both empty"),
        ({"chosen": conversation("a", "b"), "rejected": conversation("x", "b")}, "different prompts"),
        ({"chosen": conversation("a", "b"), "rejected": conversation("a", "b", "c", "d")}, "different prompts"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": True, "strength": 1.0}, "tie is set but strength"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": "perhaps"}, "tie is 'perhaps'"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tie": math.nan}, "tie is nan"),
    ],
)
def test_unusable_preferences_are_rejected_with_the_reason(row, reason):
    with pytest.raises(columns.Unusable, match=reason):
        columns.preference(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "prompt",
        "response",
        "completion",
        "instruction",
        "input",
        "output",
        "messages",
        "chosen",
        "rejected",
        "strength",
        "tie",
    ]
)


@given(st.dictionaries(NAMES, JSON, max_size=5))
def test_no_row_whatsoever_causes_another_error(row):
    for convert in (columns.demonstration, columns.preference, columns.prompt):
        try:
            record = convert(row)
        except columns.Unusable:
            continue
        text = [record] if isinstance(record, str) else list(vars(record).values()) if hasattr(record, "prompt") else []
        assert all(isinstance(value, str | tuple | float) for value in text)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_loaded_rows_keep_their_lines(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": None}, {"prompt": "q", "response": "s"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_demonstrations(path, max_rejected=0.4)
    assert loaded.rows == (Demonstration("p", "r"), Demonstration("q", "s"))
    assert loaded.lines == (f"{path}:1", f"{path}:3")
    assert [problem.where for problem in loaded.rejected] == [f"{path}:2"]
    assert loaded.total == 3


def test_malformed_rows_beyond_the_share_are_refused_with_the_first_five_and_a_count(tmp_path):
    rows = [{"prompt": "p", "response": "r" if number % 20 else None} for number in range(1000)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_demonstrations(path, max_rejected=0.0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[1] == f"{path}:21: response is missing, expected text -> write text or remove the row"
    assert lines[5] == (
        f"{path}: and 45 more of 1000 rows are rejected -> fix them or allow a share with --set data.max_rejected=0.05"
    )
    assert len(load_demonstrations(path, max_rejected=0.05).rejected) == 50


@given(st.integers(1, 300), st.floats(0, 1), st.data())
def test_the_share_that_is_proposed_is_enough(total, share, data):
    rejected = [Problem(f"f:{line}", "bad") for line in range(data.draw(st.integers(0, total)))]
    try:
        check_rejected("f", rejected, total, share)
    except InputError as error:
        assert len(rejected) > share * total or len(rejected) == total
        if len(rejected) < total:
            check_rejected("f", rejected, total, float(error.problems[-1].remedy.rpartition("=")[2]))
    else:
        assert len(rejected) <= share * total


def test_no_share_lets_a_file_without_a_usable_row_pass(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": None}] * 3)
    with pytest.raises(InputError, match="all 3 rows are rejected"):
        load_demonstrations(path, max_rejected=1.0)


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences, load_prompts])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_wrong_columns_are_one_error_with_those_found_and_expected(tmp_path, load, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        jsonl(path, [{"question": "q", "answer": "a"}] * 10)
    elif suffix == "csv":
        path.write_text("question,answer\n" + "q,a\n" * 10)
    else:
        parquet.write_table(arrow.table({"question": ["q"] * 10, "answer": ["a"] * 10}), path)
    with pytest.raises(InputError) as caught:
        load(path, max_rejected=1.0)
    (problem,) = caught.value.problems
    assert "the columns are question, answer; expected" in problem.what and problem.remedy == "rename the columns"


def test_a_nan_strength_in_every_format(tmp_path):
    good = {"prompt": "p", "chosen": "c", "rejected": "r", "strength": 0.5}
    bad = {**good, "strength": math.nan}
    jsonl(tmp_path / "a.jsonl", [good, bad])
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,strength\np,c,r,0.5\np,c,r,NaN\n")
    parquet.write_table(arrow.Table.from_pylist([good, bad]), tmp_path / "a.parquet")
    for name, line in (("a.jsonl", 2), ("a.csv", 3), ("a.parquet", 2)):
        loaded = load_preferences(tmp_path / name, max_rejected=0.5)
        assert loaded.rows == (Preference("p", "c", "r", 0.5),)
        assert [problem.where for problem in loaded.rejected] == [f"{tmp_path / name}:{line}"]


def test_prompt_text_renders_turns():
    assert prompt_text("plain") == "plain"
    assert prompt_text(messages("a", "b")) == "user: a\nassistant: b"
