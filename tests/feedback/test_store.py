"""Handing out and taking answers, in SQLite and in PostgreSQL: leases, sides, idempotence, undo, calibration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from people_at_work import again, ask, choose, fill, join, pair, say, take_back
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from kedge.errors import InputError
from kedge.feedback import people, tables
from kedge.feedback.assign import gate
from kedge.feedback.items import Item, NewItem, Unfit, agree, item_of, normalised, side_order
from kedge.feedback.judge import Refused, adjudicate, counted
from kedge.feedback.settings import Settings, parse
from kedge.feedback.store import Store

Make = Callable[..., Store]
PLAIN = {"gold_share": 0, "repeat_share": 0}
MINUTE = 60.0


def rows(store: Store, table: tables.Table) -> list:
    return store.read(lambda c: list(c.execute(select(table).order_by(table.c.id))))


# Handing out


def test_an_item_goes_to_as_many_as_its_overlap_says(make_store: Make) -> None:
    store = make_store(overlap=2, **PLAIN)
    fill(store, pair(1), pair(2, overlap=1))
    ann, bob, cem = join(store, "Ann", "Bob", "Cem")
    first = [ask(store, person) for person in (ann, bob, cem)]
    assert [task.item.prompt for task in first if task] == ["Question 1?", "Question 1?", "Question 2?"]
    say(store, ann, first[0], choose(first[0], 0))
    assert ask(store, ann) is None, "the second item is with Cem, and one annotator is enough"
    assert [row.live for row in rows(store, tables.items)] == [2, 1]


def test_who_asks_again_gets_the_same_item(make_store: Make) -> None:
    store = make_store(**PLAIN)
    fill(store, pair(1), pair(2))
    (ann,) = join(store, "Ann")
    assert ask(store, ann, 0.0) == ask(store, ann, 5.0)


def test_a_lease_ends_and_others_may_have_the_item(make_store: Make) -> None:
    store = make_store(overlap=1, lease_minutes=30, **PLAIN)
    fill(store, pair(1))
    ann, bob = join(store, "Ann", "Bob")
    held = ask(store, ann, 0.0)
    assert ask(store, bob, 29 * MINUTE) is None
    mine = ask(store, bob, 31 * MINUTE)
    assert mine is not None and mine.item.id == held.item.id
    with pytest.raises(Refused, match="too long"):
        say(store, ann, held, choose(held, 0), 32 * MINUTE)
    say(store, bob, mine, choose(mine, 0), 32 * MINUTE)
    assert len(rows(store, tables.judgments)) == 1


def test_a_late_answer_counts_where_nobody_else_came(make_store: Make) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, pair(1))
    ann, bob = join(store, "Ann", "Bob")
    held = ask(store, ann, 0.0)
    other = ask(store, bob, 40 * MINUTE)
    say(store, bob, other, None, 41 * MINUTE)  # Bob skips: there is room again
    say(store, ann, held, choose(held, 1), 42 * MINUTE)
    (item,) = rows(store, tables.items)
    assert item.live == 1
    assert store.read(lambda c: counted(c, item.id)) == [{"choice": 1}]


def test_whose_lease_ended_may_have_the_item_again(make_store: Make) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, pair(1))
    (ann,) = join(store, "Ann")
    first, second = ask(store, ann, 0.0), ask(store, ann, 31 * MINUTE)
    assert second.assignment == first.assignment
    assert second.handed == 31 * MINUTE
    assert [row.live for row in rows(store, tables.items)] == [1]


def test_the_table_itself_refuses_more_than_the_overlap(make_store: Make) -> None:
    store = make_store(overlap=1)
    fill(store, pair(1))
    with pytest.raises(IntegrityError):
        store.write(lambda c: c.execute(tables.items.update().values(live=2)))


def test_the_same_item_is_added_once(make_store: Make) -> None:
    store = make_store()
    fill(store, pair(1), pair(1), pair(2))
    swapped = NewItem("pair", "Question 1?", ("Second answer 1.", "First 1."))
    fill(store, swapped, pair(3))
    assert len(rows(store, tables.items)) == 3


def test_sides_are_a_keyed_hash_of_item_and_annotator(make_store: Make) -> None:
    secret = b"k" * 32
    orders = [side_order(secret, f"item {item}", who, 2) for item in range(100) for who in range(10)]
    assert orders == [side_order(secret, f"item {item}", who, 2) for item in range(100) for who in range(10)]
    # 1000 fair coins: 500 heads, standard deviation 15.8; five of them either way.
    assert abs(sum(order == [0, 1] for order in orders) - 500) < 80
    assert orders != [side_order(b"l" * 32, f"item {item}", who, 2) for item in range(100) for who in range(10)]
    store = make_store(**PLAIN)
    fill(store, pair(1))
    (ann,) = join(store, "Ann")
    task = ask(store, ann)
    assert list(task.shown) == side_order(store.rules().secret, task.item.key, ann.id, 2)
    say(store, ann, task, {"choice": "left"})
    (said,) = rows(store, tables.judgments)
    assert said.shown == list(task.shown)
    assert said.value == {"choice": task.shown[0]}


# Answers


def test_the_same_submission_is_stored_once(make_store: Make) -> None:
    store = make_store(**PLAIN)
    fill(store, pair(1), pair(2))
    ann, bob = join(store, "Ann", "Bob")
    task = ask(store, ann)
    first = say(store, ann, task, choose(task, 0), key="same")
    second = say(store, ann, task, choose(task, 1), key="same")
    assert (second.judgment, first.again, second.again) == (first.judgment, False, True)
    (said,) = rows(store, tables.judgments)
    assert said.value == {"choice": 0}
    with pytest.raises(Refused, match="not yours"):
        say(store, bob, ask(store, bob), {"choice": "left"}, key="same")


def test_another_window_answers_in_vain(make_store: Make) -> None:
    store = make_store(**PLAIN)
    fill(store, pair(1))
    ann, bob = join(store, "Ann", "Bob")
    task = ask(store, ann)
    say(store, ann, task, choose(task, 0))
    with pytest.raises(Refused, match="already"):
        say(store, ann, task, choose(task, 0))
    with pytest.raises(Refused, match="not yours"):
        say(store, bob, task, choose(task, 0))


def test_what_is_stored_of_an_answer(make_store: Make) -> None:
    store = make_store(reasons=("safer", "shorter"), **PLAIN)
    fill(store, pair(1))
    (ann,) = join(store, "Ann")
    task = ask(store, ann, 100.0)
    more = {"strength": 2, "reasons": ["safer", "made up"], "note": " a note\0 ", "flagged": True, "active": 500.0}
    say(store, ann, task, choose(task, 1), 112.0, **more)
    (said,) = rows(store, tables.judgments)
    assert (said.value, said.strength, said.reasons, said.note) == ({"choice": 1}, 2, ["safer"], "a note\0")
    assert said.flagged
    assert (said.seconds, said.active, said.guidelines, said.at) == (12.0, 12.0, 1, 112.0), "seen no longer than out"


@pytest.mark.parametrize("given", [{}, {"choice": "0"}, {"choice": "LEFT"}, {"ranks": [1, 2]}])
def test_an_answer_must_fit(sqlite_store: Make, given: dict) -> None:
    store = sqlite_store(**PLAIN)
    fill(store, pair(1))
    (ann,) = join(store, "Ann")
    with pytest.raises(Unfit):
        say(store, ann, ask(store, ann), given)
    assert rows(store, tables.judgments) == []


def test_skipping_frees_the_place(make_store: Make) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, pair(1))
    ann, bob = join(store, "Ann", "Bob")
    say(store, ann, ask(store, ann), None)
    assert ask(store, ann) is None
    assert ask(store, bob) is not None


# Undo


def test_undo_takes_back_one_after_another(make_store: Make) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, pair(1), pair(2), pair(3))
    (ann,) = join(store, "Ann")
    for now in (1.0, 2.0):
        task = ask(store, ann, now)
        say(store, ann, task, choose(task, 0), now)
    third = ask(store, ann, 3.0)
    take_back(store, ann, "u1", 4.0)
    assert ask(store, ann, 4.0).item.prompt == "Question 2?"
    take_back(store, ann, "u2", 5.0)
    first = ask(store, ann, 5.0)
    assert first.item.prompt == "Question 1?"
    say(store, ann, first, choose(first, 1), 6.0)
    assert store.read(lambda c: counted(c, first.item.id)) == [{"choice": 1}]
    assert ask(store, ann, 6.0).item.prompt == "Question 2?", "what was taken back comes before what was handed out"
    assert third.item.prompt == "Question 3?"
    assert [row.action for row in rows(store, tables.judgments)] == ["judge", "judge", "undo", "undo", "judge"]
    assert [row.supersedes for row in rows(store, tables.judgments)] == [None, None, 2, 1, None]


def test_the_same_undo_is_done_once(make_store: Make) -> None:
    store = make_store(**PLAIN)
    fill(store, pair(1), pair(2))
    (ann,) = join(store, "Ann")
    for _ in range(2):
        task = ask(store, ann)
        say(store, ann, task, choose(task, 0))
    take_back(store, ann, "u")
    take_back(store, ann, "u")
    assert [row.action for row in rows(store, tables.judgments)] == ["judge", "judge", "undo"]


def test_what_cannot_be_undone(make_store: Make) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, pair(1))
    ann, bob = join(store, "Ann", "Bob")
    with pytest.raises(Refused, match="nothing"):
        take_back(store, ann, "u1")
    say(store, ann, ask(store, ann), None)
    task = ask(store, bob)
    with pytest.raises(Refused, match="gone to others"):
        take_back(store, ann, "u2")
    say(store, bob, task, choose(task, 0))
    (lead,) = join(store, "Lea", role="lead")
    rules = store.rules()
    store.write(lambda c: adjudicate(c, rules, lead, task.item, "a1", {"choice": "right"}, "clear", 9.0))
    store.write(lambda c: adjudicate(c, rules, lead, task.item, "a1", {"choice": "left"}, "again", 9.0))
    (settled,) = rows(store, tables.adjudications)
    assert (settled.value, settled.note) == ({"choice": 1}, "clear"), "a lead sees the item's own order; stored once"
    with pytest.raises(Refused, match="settled"):
        take_back(store, bob, "u3")


# Agreement


def test_an_item_is_split_where_judgments_disagree(make_store: Make) -> None:
    store = make_store(overlap=3, **PLAIN)
    fill(store, pair(1))
    ann, bob, cem = join(store, "Ann", "Bob", "Cem")
    marks = []
    for person, given in ((ann, {"choice": "tie"}), (bob, {"choice": "both_bad"}), (cem, None)):
        task = ask(store, person)
        say(store, person, task, given or choose(task, 0))
        marks.append(rows(store, tables.items)[0].split)
    assert marks == [False, False, True], "neither draw takes a side"
    take_back(store, cem, "u")
    assert not rows(store, tables.items)[0].split


def test_which_judgments_agree() -> None:
    settings = Settings()
    assert agree("pair", {"choice": "tie"}, {"choice": "both_bad"}, settings)
    assert not agree("pair", {"choice": 0}, {"choice": "tie"}, settings)
    assert agree("ranking", {"ranks": [0, 1, 1]}, {"ranks": [0, 2, 1]}, settings), "a tie is on nobody's side"
    assert not agree("ranking", {"ranks": [0, 1, 2]}, {"ranks": [0, 2, 1]}, settings)
    assert agree("rating", {"rating": 3}, {"rating": 4}, settings)
    assert not agree("rating", {"rating": 2}, {"rating": 4}, settings)


def test_rankings_and_ratings_in_the_items_own_order() -> None:
    settings = Settings(lowest=0, highest=4)
    ranked = Item(1, "k", "ranking", "task", "p", ("a", "b", "c"), None, None, None, {})
    # On the screen stand c, a, b; the annotator puts the first last and calls the others equal.
    assert normalised(ranked, [2, 0, 1], {"ranks": [3, 1, 1]}, settings) == {"ranks": [0, 0, 1]}
    for ranks in ([1, 2], [0, 1, 2], [1, 2, 4], ["1", "2", "3"]):
        with pytest.raises(Unfit):
            normalised(ranked, [2, 0, 1], {"ranks": ranks}, settings)
    rated = Item(1, "k", "rating", "task", "p", ("a",), None, None, None, {})
    assert normalised(rated, [0], {"rating": 0}, settings) == {"rating": 0}
    with pytest.raises(Unfit, match="0 to 4"):
        normalised(rated, [0], {"rating": 5}, settings)


# Gold, repeats, calibration


def test_a_repeat_is_an_own_item_with_its_sides_swapped(make_store: Make) -> None:
    store = make_store(overlap=1, gold_share=0, repeat_share=1, repeat_gap=2)
    fill(store, *map(pair, range(3)))
    (ann,) = join(store, "Ann")
    seen = []
    for now in range(5):
        task = ask(store, ann, float(now))
        if task is None:
            break
        seen.append(task)
        say(store, ann, task, choose(task, 0), float(now))
    # Two judgments lie between an item and its repeat, so the third may be followed by the first again.
    assert [task.purpose for task in seen[:4]] == ["task", "task", "task", "repeat"]
    assert seen[3].item.id == seen[0].item.id
    assert seen[3].shown == seen[0].shown[::-1]
    (first, *_) = rows(store, tables.items)
    assert (first.live, first.overlap) == (1, 1), "a repeat takes nobody's place"
    assert store.read(lambda c: counted(c, first.id)) == [{"choice": 0}]


def test_gold_comes_to_everybody_once(make_store: Make) -> None:
    store = make_store(overlap=1, gold_share=1, repeat_share=0)
    fill(store, pair(1), pair(2), pair(9, purpose="gold", answer={"choice": 0}))
    ann, bob = join(store, "Ann", "Bob")
    for person in (ann, bob):
        purposes = []
        while (task := ask(store, person)) is not None and len(purposes) < 2:
            purposes.append(task.purpose)
            say(store, person, task, choose(task, 0))
        assert purposes[0] == "gold" and "gold" not in purposes[1:]


def test_the_guidelines_and_the_calibration_come_first(make_store: Make) -> None:
    store = make_store(threshold=0.6, attempts=2, **PLAIN)
    trials = [pair(n, purpose="calibration", answer={"choice": 0}, why="First is true.") for n in (7, 8)]
    fill(store, pair(1), *trials)
    (ann,) = join(store, "Ann")
    rules = store.rules()
    gates = lambda: store.read(lambda c: gate(c, rules, again(store, ann)))  # noqa: E731
    assert gates() == "guidelines"
    store.write(lambda c: c.execute(tables.readings.insert().values(annotator=ann.id, version=1, at=0.0)))
    assert gates() == "calibration"

    def attempt(*places: int) -> list[bool | None]:
        ended = []
        for place in places:
            task = ask(store, ann)
            assert task.purpose == "calibration"
            ended.append(say(store, ann, task, choose(task, place)).calibrated)
        return ended

    task = ask(store, ann)
    with pytest.raises(Unfit, match="skipped"):
        say(store, ann, task, None)
    assert attempt(0, 1) == [None, False], "half is less than 0.6"
    with pytest.raises(Refused, match="nothing"):
        take_back(store, ann, "u")
    assert attempt(1, 1) == [None, False]
    assert gates() == "shut"
    assert ask(store, ann) is None
    store.write(lambda c: people.calibrate_again(c, ann.id))
    assert gates() == "calibration"
    assert attempt(0, 0) == [None, True]
    assert gates() == "open"
    assert ask(store, ann).purpose == "task"
    store.write(lambda c: c.execute(tables.guidelines.insert().values(version=2, text="New.", at=1.0)))
    assert gates() == "guidelines"


# People


def test_tokens_are_told_once_and_stored_as_hashes(make_store: Make) -> None:
    store = make_store()
    token = store.write(lambda c: people.add(c, " Ann  Lee ", "annotator", 0.0))
    with pytest.raises(InputError, match="already there"):
        store.write(lambda c: people.add(c, "Ann Lee", "lead", 0.0))
    person, session = store.write(lambda c: people.log_in(c, token + " ", 0.0))
    held = str([*store.read(lambda c: c.execute(select(tables.annotators)).all())])
    held += str(store.read(lambda c: c.execute(select(tables.sessions)).all()))
    assert token not in held and session not in held
    assert store.read(lambda c: people.who(c, session, 1.0)) == person
    assert store.read(lambda c: people.who(c, session, people.SESSION_SECONDS + 1)) is None
    assert store.read(lambda c: people.who(c, token, 1.0)) is None
    assert store.write(lambda c: people.log_in(c, session, 0.0)) is None
    fresh = store.write(lambda c: people.new_token(c, "Ann Lee"))
    assert store.read(lambda c: people.who(c, session, 1.0)) is None
    assert store.write(lambda c: people.log_in(c, token, 0.0)) is None
    _, session = store.write(lambda c: people.log_in(c, fresh, 0.0))
    store.write(lambda c: people.set_active(c, person.id, active=False))
    assert store.read(lambda c: people.who(c, session, 1.0)) is None
    assert store.write(lambda c: people.log_in(c, fresh, 0.0)) is None


@pytest.mark.parametrize("name", ["", " ", "x" * 101, "tab\x07"])
def test_names_that_cannot_be(sqlite_store: Make, name: str) -> None:
    with pytest.raises(InputError):
        sqlite_store().write(lambda c: people.add(c, name, "annotator", 0.0))


# Settings


def test_settings_are_checked_and_kept(make_store: Make) -> None:
    settings = parse(["overlap=3", "reasons=safer, shorter", "gold_share=0.1", "strength=false"])
    assert (settings.overlap, settings.reasons, settings.strength) == (3, ("safer", "shorter"), False)
    store = make_store()
    store.change(settings)
    assert store.rules().settings == settings
    with pytest.raises(InputError) as caught:
        parse(["overlp=3", "threshold"])
    assert caught.value.problems[0].remedy == "did you mean overlap?"
    with pytest.raises(InputError, match="threshold"):
        parse(["threshold=2"])
    with pytest.raises(InputError, match="highest"):
        parse(["highest=1"])


def test_text_of_every_kind_comes_back_as_it_was(make_store: Make) -> None:
    store = make_store()
    texts = ("nul \0 and \u202e bidi", "\U0001f600 'quotes' \"and\" \\ %s :name", "")
    fill(store, NewItem("ranking", [{"role": "user", "content": "?\0"}], texts))
    (row,) = rows(store, tables.items)
    assert tuple(row.responses) == texts
    assert store.read(lambda c: item_of(c, row.id)).turns == [{"role": "user", "content": "?\0"}]
    assert store.read(lambda c: c.execute(select(func.count()).select_from(tables.items)).scalar()) == 1
