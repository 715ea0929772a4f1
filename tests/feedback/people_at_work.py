"""What the tests of the store have in common: people, items, and an answer given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from kedge.feedback import people
from kedge.feedback.assign import Task, hand_out
from kedge.feedback.items import NewItem, add_items
from kedge.feedback.judge import Answer, Stored, submit, undo
from kedge.feedback.people import Person
from kedge.feedback.store import Store

_keys = itertools.count()


def pair(number: int = 0, **more: Any) -> NewItem:
    return NewItem("pair", f"Question {number}?", (f"First {number}.", f"Second answer {number}."), **more)


def fill(store: Store, *items: NewItem) -> None:
    settings = store.rules().settings
    store.write(lambda c: add_items(c, items, settings))


def join(store: Store, *names: str, role: people.Role = "annotator") -> list[Person]:
    for name in names:
        store.write(lambda c, name=name: people.add(c, name, role, 0.0))
    return [person for name in names for person in store.read(people.people) if person.name == name]


def again(store: Store, person: Person) -> Person:
    """The same person as the store knows them now."""
    return next(one for one in store.read(people.people) if one.id == person.id)


def ask(store: Store, person: Person, now: float = 0.0) -> Task | None:
    rules, who = store.rules(), again(store, person)
    return store.write(lambda c: hand_out(c, rules, who, now))


def say(
    store: Store, person: Person, task: Task, given: Mapping[str, Any] | None, now: float = 0.0, **more: Any
) -> Stored:
    answer = Answer(more.pop("key", f"key-{next(_keys)}"), given, **more)
    rules, who = store.rules(), again(store, person)
    return store.write(lambda c: submit(c, rules, who, task.assignment, answer, now))


def take_back(store: Store, person: Person, key: str, now: float = 0.0) -> Stored:
    rules, who = store.rules(), again(store, person)
    return store.write(lambda c: undo(c, rules, who, key, now))


def choose(task: Task, place: int) -> dict[str, str]:
    """The choice that prefers the item's own response at `place`, wherever it is shown."""
    return {"choice": ("left", "right")[task.shown.index(place)]}
