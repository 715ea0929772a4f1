"""Items in, judgments out: every spelling, both foreign shapes, and what a recipe and `datasets` make of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from people_at_work import ask, choose, fill, join, pair, say, take_back
from sqlalchemy import select

from kedge.data.validate import load_judgments
from kedge.errors import InputError, Problem
from kedge.feedback import tables
from kedge.feedback.exporting import export, pseudonym
from kedge.feedback.importing import counted, read_items
from kedge.feedback.items import NewItem, item_of
from kedge.feedback.judge import adjudicate
from kedge.feedback.settings import Settings
from kedge.feedback.store import Store

Make = Callable[..., Store]
PLAIN = {"gold_share": 0, "repeat_share": 0}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]


def items_of(folder: Path, *rows: Any, name: str = "rows.jsonl", **options: Any) -> tuple[list[NewItem], list[Problem]]:
    path = folder / name
    text = json.dumps(list(rows)) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return counted(read_items(path, Settings(), **options))


def one(folder: Path, row: Any, **options: Any) -> NewItem:
    (item,), problems = items_of(folder, row, **options)
    assert problems == []
    return item


# Items in


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi?", "response_a": "a", "response_b": "b"},
        {"prompt": "Hi?", "response_a": "a", "response_b": "b", "winner": None},
        {"instruction": "Hi?", "output_1": "a", "output_2": "b", "preference": 2},
        {"prompt": "Hi?", "responses": ["a", "b"]},
        {"prompt": "Hi?", "completions": ["a", "b"], "scores": [1, 2]},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: a", "rejected": "\n\nHuman: Hi?\n\nAssistant: b"},
        {"fields": {"prompt": "Hi?", "response_a": "a", "response_b": "b"}, "responses": {}},
        {"data": {"prompt": "Hi?", "answer1": "a", "answer2": "b"}, "annotations": []},
    ],
    ids=lambda row: ",".join(row),
)
def test_two_responses_make_a_pair(tmp_path: Path, row: dict) -> None:
    item = one(tmp_path, row)
    assert (item.kind, item.responses, item.answer, item.purpose) == ("pair", ("a", "b"), None, "task")
    assert item.prompt in ("Hi?", [{"role": "user", "content": "Hi?"}])
    assert item.origin == "rows.jsonl:1"


def test_other_kinds_conversations_and_further_columns(tmp_path: Path) -> None:
    ranking = one(tmp_path, {"prompt": TURNS, "responses": ["a", "b", "c"], "model": "m", "long": "x" * 501, "n": 3})
    assert (ranking.kind, ranking.prompt, ranking.extra) == ("ranking", TURNS, {"model": "m", "n": 3})
    assert one(tmp_path, {"prompt": "p", "response": "a"}).kind == "rating"
    assert one(tmp_path, {"messages": [*TURNS, {"role": "assistant", "content": "a"}]}).responses == ("a",)
    assert one(tmp_path, {"prompt": "p", "responses": ["a", "b"]}, kind="ranking").kind == "ranking"
    argilla = {"fields": {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c"}, "metadata": {"k": 1}}
    item = one(tmp_path, argilla)
    assert (item.kind, item.responses, item.extra) == ("ranking", ("a", "b", "c"), {"k": 1})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"choice": 0}),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "b"}, {"choice": 1}),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"}, {"choice": "tie"}),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}, {"choice": 1}),
        ({"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 9, 2]}, {"ranks": [1, 0, 1]}),
        ({"prompt": "p", "response": "a", "rating": 4}, {"rating": 4}),
    ],
)
def test_gold_has_its_answer_in_the_items_own_order(tmp_path: Path, row: dict, answer: dict) -> None:
    item = one(tmp_path, row | {"why": "Because."}, purpose="gold")
    assert (item.answer, item.why, item.purpose) == (answer, "Because.", "gold")


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        ({"prompt": "p"}, {}, "expected prompt and responses"),
        ({"prompt": "p", "responses": ["a", "a"]}, {}, "the same text"),
        ({"prompt": "p", "responses": list("abcdefghij")}, {}, "at most 9"),
        ({"prompt": "", "responses": ["a", "b"]}, {}, "prompt is empty"),
        ({"prompt": "p", "responses": ["a", 3]}, {}, "expected text"),
        ({"prompt": "p", "responses": ["a", "b", "c"]}, {"kind": "pair"}, "make no pair"),
        ({"prompt": "p", "response_a": "a", "response_b": "b"}, {"purpose": "gold"}, "expected"),
        ({"prompt": "p", "response": "a", "rating": 9}, {"purpose": "gold"}, "1 to 5"),
        ({"prompt": "p", "response": "a", "label": True}, {"purpose": "gold"}, "verdict"),
        ({"prompt": "p", "response_1": "a", "response_2": "b", "output_1": "c", "output_2": "d"}, {}, "expected"),
        ([1], {}, "expected an object"),
    ],
)
def test_what_cannot_be_asked_is_named_by_line(tmp_path: Path, row: Any, options: dict, what: str) -> None:
    items, (problem,) = items_of(tmp_path, row, **options)
    assert items == []
    assert what in problem.what and problem.where.endswith("rows.jsonl:1")


def test_a_canonical_table_can_be_imported(tmp_path: Path) -> None:
    from kedge.data.check import survey
    from kedge.data.convert import convert

    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    convert(survey(tmp_path / "p.jsonl"), tmp_path / "p.parquet", to="canonical")
    ((item,), problems) = counted(read_items(tmp_path / "p.parquet", Settings(), purpose="gold"))
    assert (problems, item.prompt, item.responses, item.answer) == ([], "p", ("a", "b"), {"choice": 0})


# Judgments out


@pytest.fixture
def labelled(make_store: Make) -> Store:
    """Two annotators on three pairs: agreed; settled by a lead; a tie beside a both bad that was first another."""
    store = make_store(overlap=2, **PLAIN)
    fill(store, *map(pair, (1, 2, 3)), pair(9, purpose="calibration", answer={"choice": 0}))
    ann, bob = join(store, "Ann", "Bob")
    store.write(lambda c: c.execute(tables.annotators.update().values(passed=True)))
    for now, (person, third) in enumerate(((ann, "tie"), (bob, "both_bad"))):
        task = ask(store, person, now)
        say(store, person, task, choose(task, 1), now, strength=3, reasons=["safer"], active=0.0)
        task = ask(store, person, now)
        say(store, person, task, choose(task, now), now)
        task = ask(store, person, now)
        if person == ann:
            say(store, person, task, choose(task, 0), now)
            take_back(store, person, "undo", now)
        say(store, person, task, {"choice": third}, now)
    (lead,) = join(store, "Lea", role="lead")
    rules, item = store.rules(), store.read(lambda c: item_of(c, 2))
    store.write(lambda c: adjudicate(c, rules, lead, item, "a", {"choice": "right"}, "", 9.0))
    return store


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_exported_pairs_are_what_kedge_reads(labelled: Store, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"pairs{suffix}"
    assert export(labelled, out) == 5
    loaded = load_judgments(out, max_rejected=0.0)
    assert loaded.rejected == ()
    shown = labelled.read(lambda c: {(r.item, r.annotator): r.shown for r in c.execute(select(tables.assignments))})
    found = [(row.prompt, row.annotator, row.chosen, row.strength, row.margin, row.shown) for row in loaded.rows]
    second = "Second answer 1."
    assert found[:2] == [
        ("Question 1?", name, second, 1.0, 3.0, shown[1, who].index(1) + 1) for who, name in ((1, "Ann"), (2, "Bob"))
    ]
    assert [(row[1], row[3], row[5]) for row in found[2:4]] == [("Ann", 0.5, 1), ("Bob", 0.5, 1)]
    assert found[4] == ("Question 2?", "Lea", "Second answer 2.", 1.0, None, 0)


def test_exported_pairs_load_with_datasets(labelled: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for name, kind in (("p.jsonl", "json"), ("p.parquet", "parquet")):
        export(labelled, tmp_path / name)
        table = datasets.load_dataset(
            kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / kind)
        )
        assert len(table) == 5
        assert {"prompt", "chosen", "rejected", "annotator"} <= set(table.column_names)


def test_a_recipe_takes_an_exported_file(labelled: Store, tmp_path: Path) -> None:
    from kedge import recipe

    export(labelled, tmp_path / "p.jsonl")
    built = recipe.build({"world": "files", "data": {"demonstrations": "d"}}, [f"data.preferences={tmp_path}/p.jsonl"])
    assert load_judgments(built.data.preferences, max_rejected=0.0).total == 5


def test_the_majority_with_its_votes(labelled: Store, tmp_path: Path) -> None:
    assert export(labelled, tmp_path / "m.jsonl", shape="majority") == 3
    first, third, second = load_judgments(tmp_path / "m.jsonl", max_rejected=0.0).rows
    assert (first.chosen, first.votes, first.strength) == ("Second answer 1.", (2, 0, 0), 1.0)
    assert (third.votes, third.strength) == ((0, 0, 2), 0.5)
    assert (second.chosen, second.votes, second.strength) == ("Second answer 2.", None, 1.0)


def test_raw_events_are_all_there(labelled: Store, tmp_path: Path) -> None:
    for name in ("raw.jsonl", "raw.parquet"):
        assert export(labelled, tmp_path / name, shape="raw") == 8
    rows = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "raw.parquet").to_pylist() == rows
    assert [row["action"] for row in rows] == ["judge", "judge", "judge", "undo", "judge", "judge", "judge", "judge"]
    assert [row["counts"] for row in rows] == [True, True, False, False, True, True, True, True]
    assert rows[3]["supersedes"] == rows[2]["id"]
    assert (rows[0]["choice"], rows[4]["choice"], rows[7]["choice"]) == ("1", "tie", "both_bad")
    assert rows[0]["at"] == "1970-01-01T00:00:00+00:00"


def test_foreign_shapes_come_back_as_they_went(labelled: Store, tmp_path: Path) -> None:
    for shape in ("argilla", "label-studio"):
        out = tmp_path / f"{shape}.json"
        assert export(labelled, out, shape=shape) == 3
        items, problems = counted(read_items(out, Settings(), purpose="gold"))
        assert problems == []
        answers = {item.prompt: item.answer for item in items}
        assert answers == {"Question 1?": {"choice": 1}, "Question 2?": {"choice": 1}, "Question 3?": {"choice": "tie"}}
    record = json.loads((tmp_path / "argilla.json").read_text())[0]
    assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    assert [set(one) for one in record["responses"]["preference"]] == [{"value", "user_id"}] * 2
    task = json.loads((tmp_path / "label-studio.json").read_text())[0]
    (result,) = task["annotations"][0]["result"]
    assert (result["type"], result["value"]) == ("pairwise", {"selected": "right"})
    assert (result["from_name"], result["to_name"]) == ("preference", "response_a,response_b")


def test_rankings_and_ratings_go_out_and_come_back(sqlite_store: Make, tmp_path: Path) -> None:
    store = sqlite_store(overlap=1, **PLAIN)
    fill(store, NewItem("ranking", TURNS, ("a", "b", "c")), NewItem("rating", "p", ("a",)))
    (ann,) = join(store, "Ann")
    task = ask(store, ann)
    # b best, then a and c alike, wherever they are shown.
    say(store, ann, task, {"ranks": [1 if place == 1 else 3 for place in task.shown]})
    say(store, ann, ask(store, ann), {"rating": 2})
    with pytest.raises(InputError, match="several kinds"):
        export(store, tmp_path / "x.jsonl")
    for kind in ("ranking", "rating"):
        for suffix in (".jsonl", ".parquet"):
            assert export(store, tmp_path / f"{kind}{suffix}", kind=kind) == 1
    for suffix in (".jsonl", ".parquet"):
        (ranking,) = load_judgments(tmp_path / f"ranking{suffix}", max_rejected=0.0).rows
        assert (ranking.responses, ranking.ranks) == (("b", "a", "c"), (0, 1, 1))
        assert [turn.role for turn in ranking.prompt] == ["system", "user"]
        (rating,) = load_judgments(tmp_path / f"rating{suffix}", max_rejected=0.0).rows
        assert (rating.response, rating.rating, rating.annotator) == ("a", 2.0, "Ann")
    for shape in ("argilla", "label-studio"):
        export(store, tmp_path / f"{shape}.json", shape=shape)
        items, problems = counted(read_items(tmp_path / f"{shape}.json", Settings(), purpose="gold"))
        assert problems == []
        ranked, rated = (next(one.answer for one in items if one.kind == kind) for kind in ("ranking", "rating"))
        assert rated == {"rating": 2}
        # Label Studio's ranker has an order, in which equals stand one after the other.
        assert ranked == ({"ranks": [1, 0, 1]} if shape == "argilla" else {"ranks": [1, 0, 2]})


def test_pseudonyms_are_the_same_in_every_export(labelled: Store, tmp_path: Path) -> None:
    export(labelled, tmp_path / "a.jsonl", anonymous=True)
    export(labelled, tmp_path / "r.jsonl", shape="raw", anonymous=True)
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in "ar"]
    names = [{json.loads(line)["annotator"] for line in file} for file in lines]
    rules = labelled.rules()
    assert names[1] == {pseudonym(rules, "Ann"), pseudonym(rules, "Bob")}
    assert names[0] == names[1] | {pseudonym(rules, "Lea")}
    assert "Ann" not in (tmp_path / "a.jsonl").read_text()


def test_what_is_not_exported(labelled: Store, sqlite_store: Make, tmp_path: Path) -> None:
    for name, options, what in (
        ("a.csv", {}, "suffix"),
        ("a.jsonl", {"shape": "argilla"}, "suffix"),
        ("a.jsonl", {"shape": "x"}, "not known"),
        ("a.jsonl", {"kind": "rating"}, "no judgments of kind rating"),
    ):
        with pytest.raises(InputError, match=what):
            export(labelled, tmp_path / name, **options)
    with pytest.raises(InputError, match="no judgments"):
        export(sqlite_store(), tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="nothing to write"):
        export(sqlite_store(), tmp_path / "a.json", shape="argilla")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="overwritten"):
        export(labelled, tmp_path / "a.jsonl")
