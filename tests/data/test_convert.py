"""Files of judgments written in TRL's columns and in the canonical table: the same judgments come back."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.data.check import survey
from kedge.data.convert import LOST, TIE, convert
from kedge.data.pairing import ALONE, SAME, group_sizes, paired
from kedge.data.records import Message, Preference, Ranking, Rating, Verdict
from kedge.data.validate import load_judgments
from kedge.errors import InputError

SUFFIXES = ["jsonl", "parquet", "csv"]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "go"}]
PROMPT = tuple(Message(**turn) for turn in TURNS)
ODD = 'ünï 🎉, "quoted"\nsecond line'


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(tmp_path, rows, suffix="jsonl", **options):
    """The conversion and the judgments that are read back."""
    source = jsonl(tmp_path / "source.jsonl", rows)
    out = tmp_path / f"out.{suffix}"
    done = convert(survey(source, show=5), out, **options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return done, load_judgments(out, max_rejected=0.0).rows


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["p", TURNS], ids=["standard", "conversational"])
def test_pairs_come_back(tmp_path, suffix, prompt):
    rows = [{"prompt": prompt, "chosen": ODD, "rejected": "", "margin": 0.5}]
    rows += [{"prompt": prompt, "chosen": f"c{n}", "rejected": "r", "margin": n} for n in range(3)]
    done, read = converted(tmp_path, rows, suffix)
    asked = prompt if prompt == "p" else PROMPT
    assert read == (
        Preference(asked, ODD, "", margin=0.5),
        *(Preference(asked, f"c{n}", "r", margin=n) for n in range(3)),
    )
    assert done.written == 4 and not +Counter(done.left_out) and not +Counter(done.unsaid)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", ["p", TURNS], ids=["standard", "conversational"])
def test_verdicts_come_back(tmp_path, suffix, prompt):
    rows = [{"prompt": prompt, "response": ODD, "reward": 1}, {"prompt": prompt, "response": "", "reward": 0}]
    _, read = converted(tmp_path, rows, suffix)
    asked = prompt if prompt == "p" else PROMPT
    assert read == (Verdict(asked, ODD, True), Verdict(asked, "", False))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("prompt", ["p", TURNS], ids=["standard", "conversational"])
def test_datasets_reads_the_columns_of_trl(tmp_path, suffix, prompt):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": prompt, "chosen": f"c{n} {ODD}", "rejected": f"r{n}"} for n in range(3)]
    converted(tmp_path, rows, suffix)
    form = "json" if suffix == "jsonl" else suffix
    files = str(tmp_path / f"out.{suffix}")
    read = datasets.load_dataset(form, data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read.column_names == ["prompt", "chosen", "rejected"]
    text = (lambda cell: cell) if prompt == "p" else (lambda cell: cell[-1]["content"])
    assert [(text(row["chosen"]), text(row["rejected"])) for row in read] == [
        (row["chosen"], row["rejected"]) for row in rows
    ]
    assert [row["prompt"] for row in read] == [prompt] * 3
    read.save_to_disk(tmp_path / "saved")
    out = load_judgments(tmp_path / f"out.{suffix}", max_rejected=0.0)
    assert load_judgments(tmp_path / "saved", max_rejected=0.0).rows == out.rows
    again = tmp_path / "again.jsonl"
    convert(survey(tmp_path / "saved"), again)
    assert load_judgments(again, max_rejected=0.0).rows == out.rows
    split = datasets.DatasetDict({"train": read})
    split.save_to_disk(tmp_path / "splits")
    assert load_judgments(tmp_path / "splits" / "train", max_rejected=0.0).rows == out.rows


def test_what_trl_cannot_say_is_left_out_and_counted(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    extras = [{}, {"tie": True}, {"strength": 0.25}, {"votes": "2,1"}, {"margin": 1, "annotator": "a", "position": 1}]
    done, read = converted(tmp_path, [pair | extra for extra in extras])
    assert read == (Preference("p", "c", "r"),) * 3
    assert done.left_out == {TIE: 1, LOST: 1}
    assert done.unsaid == {"strength": 1, "votes": 1, "margin": 1, "annotator": 1, "shown": 1}


def test_the_canonical_table_says_all_of_it(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    extras = [{}, {"tie": True}, {"votes": "1,2", "position": 2}, {"margin": 1, "annotator": "a"}]
    rows = [pair | extra for extra in extras] + [{**pair, "prompt": TURNS}]
    done, read = converted(tmp_path, rows, "parquet", to="canonical")
    assert read == load_judgments(tmp_path / "source.jsonl", max_rejected=0.0).rows
    assert done.written == 5 and done.left_out == {} and done.unsaid == {}


def test_rankings_become_all_their_pairs(tmp_path):
    rows = [{"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 1, 2], "annotator": "a"}]
    done, read = converted(tmp_path, rows, pairs=True)
    assert read == (Preference("p", "y", "x"), Preference("p", "y", "z"))
    assert done.left_out == {TIE: 1} and done.unsaid["annotator"] == 2
    (tmp_path / "out.jsonl").unlink()
    _, read = converted(tmp_path, rows, "parquet", pairs=True, to="canonical")
    assert sorted(pair.strength for pair in read) == [0.5, 1.0, 1.0]


def test_ratings_become_pairs_within_prompt_and_annotator(tmp_path):
    graded = [("p", "x", 3, "a"), ("q", "x", 1, "a"), ("p", "y", 5, "a"), ("p", "z", 1, "b"), ("p", "y", 5, "a"),
              ("q", "w", 1, "a")]  # fmt: skip
    rows = [dict(zip(("prompt", "response", "rating", "annotator"), grade, strict=True)) for grade in graded]
    done, read = converted(tmp_path, rows, pairs=True)
    assert read == (Preference("p", "y", "x", margin=2.0), Preference("p", "y", "x", margin=2.0))
    assert done.left_out == {SAME: 1, ALONE: 1, TIE: 1}


def test_verdicts_become_pairs_of_good_over_bad(tmp_path):
    rows = [{"prompt": "p", "response": text, "label": text in "ac"} for text in "abc"]
    done, read = converted(tmp_path, rows, pairs=True)
    assert set(read) == {Preference("p", "a", "b"), Preference("p", "c", "b")}
    assert done.left_out == {TIE: 1}


GRADES = st.lists(
    st.builds(Rating, st.sampled_from("pq"), st.sampled_from("wxyz"), st.integers(0, 2).map(float), st.none()),
    max_size=8,
)


@settings(max_examples=100)
@given(GRADES)
def test_pairs_of_grades_are_those_of_a_plain_loop(grades):
    items = [(f"f:{number}", grade) for number, grade in enumerate(grades)]
    found = Counter(
        (pair.prompt, frozenset({(pair.chosen, pair.strength == 0.5 or "better"), pair.rejected}), pair.margin)
        for _, pair in paired(items, group_sizes(items), Counter())
    )
    expected = Counter()
    for a, b in combinations(grades, 2):
        if a.prompt == b.prompt and a.response != b.response:
            tie = a.rating == b.rating
            better, worse = (a, b) if a.rating >= b.rating else (b, a)
            sides = frozenset({(better.response, tie or "better"), worse.response})
            expected[a.prompt, sides, abs(a.rating - b.rating)] += 1
    assert found == expected


def test_a_ranking_and_a_rating_say_nothing_to_trl(tmp_path):
    source = jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "response": "x", "rating": 1}])
    with pytest.raises(InputError, match="TRL has no columns for a rating -> make pairs of them with --as pairs"):
        convert(survey(source), tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="nothing is left to write \\(1 rows: no other response"):
        convert(survey(source), tmp_path / "out.jsonl", pairs=True)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_plain_and_conversational_prompts_do_not_share_a_trl_column(tmp_path):
    rows = [{"prompt": prompt, "chosen": "c", "rejected": "r"} for prompt in ("p", TURNS)]
    source = jsonl(tmp_path / "both.jsonl", rows)
    with pytest.raises(InputError, match=r"standard first at .*both.jsonl:1, conversational first at .*both.jsonl:2"):
        convert(survey(source), tmp_path / "out.jsonl")


def test_malformed_rows_are_left_out_only_as_far_as_that_is_allowed(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = [pair, pair, pair, {**pair, "chosen": None}]
    with pytest.raises(InputError) as caught:
        converted(tmp_path, rows)
    assert str(caught.value.problems[0]).startswith(f"{tmp_path / 'source.jsonl'}:4: chosen is missing")
    assert "1 of 4 rows are rejected" in str(caught.value) and "--max-rejected 0.5" in str(caught.value)
    done, read = converted(tmp_path, rows, max_rejected=0.25)
    assert done.written == len(read) == 3
    with pytest.raises(InputError, match="2 of 2 rows are rejected"):
        converted(tmp_path, [{**pair, "chosen": None}] * 2, "csv", max_rejected=1.0)


def test_text_that_csv_would_read_as_messages_is_left_out_of_it(tmp_path):
    texts = ['[{"role": "user"}]', "[{no", "[1]", '["a"]', "true", "null", "3"]
    rows = [{"prompt": "p", "chosen": text, "rejected": "r"} for text in texts]
    done, read = converted(tmp_path, rows, "csv")
    assert [pair.chosen for pair in read] == texts[1:]
    assert sum(done.left_out.values()) == 1


def test_a_conversation_that_repeats_its_only_turn(tmp_path):
    said = {"role": "assistant", "content": "hello"}
    _, read = converted(tmp_path, [{"prompt": [said], "chosen": "hello", "rejected": "bye"}])
    assert read == (Preference((Message("assistant", "hello"),), "hello", "bye"),)


def test_several_kinds_are_refused(tmp_path):
    rows = [{"prompt": "p", "response": "x", "rating": 1}, {"prompt": "p", "response": "x", "label": 1}]
    with pytest.raises(InputError, match=r"rating first at .*:1, verdict first at .*:2; a file holds one kind"):
        converted(tmp_path, rows, pairs=True)


def test_a_ranking_through_the_table(tmp_path):
    rows = [{"prompt": "p", "responses": ["x", "y"], "scores": [0.1, 0.2]}]
    _, read = converted(tmp_path, rows, "parquet", to="canonical")
    assert read == (Ranking("p", ("y", "x"), (0, 1)),)
