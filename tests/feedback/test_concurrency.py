"""Nobody gets more than their share: overlap, leases and counters under random and under concurrent use."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people_at_work import ask, choose, fill, join, pair, say, take_back
from sqlalchemy import StaticPool, create_engine, event, select

from kedge.feedback import tables
from kedge.feedback.judge import Refused
from kedge.feedback.settings import Settings
from kedge.feedback.store import Store, prepared

Make = Callable[..., Store]
PLAIN = {"gold_share": 0, "repeat_share": 0}


def held(store: Store) -> tuple[Counter[int], Counter[int]]:
    """Of each item how many annotators hold or have judged it, by the assignments and by the item's own counter."""
    own = tables.assignments
    live = store.read(
        lambda c: (
            c.execute(select(own.c.item).where(own.c.purpose == "task", own.c.state.in_(("leased", "judged"))))
            .scalars()
            .all()
        )
    )
    rows = store.read(lambda c: c.execute(select(tables.items)).all())
    return Counter(live), Counter({row.id: row.live for row in rows if row.live})


def in_memory() -> Store:
    """A store that is made quickly; one connection, so one thread."""
    store = Store(prepared(create_engine("sqlite://", poolclass=StaticPool)), "memory")
    store.make(Settings(**PLAIN))
    return store


ACTIONS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["ask", "judge", "skip", "undo", "wait", "late"])), max_size=25
)


@settings(max_examples=25)
@given(overlaps=st.lists(st.integers(1, 3), min_size=1, max_size=4), actions=ACTIONS)
def test_no_item_is_ever_with_more_annotators_than_its_overlap(overlaps: list[int], actions: list) -> None:
    """Against a model: sets of who holds and who judged what."""
    store = in_memory()
    fill(store, *(pair(number, overlap=overlap) for number, overlap in enumerate(overlaps)))
    people = join(store, *"abcd")
    limits = {row.id: row.overlap for row in store.read(lambda c: c.execute(select(tables.items)).all())}
    now, last = 0.0, {}
    answered: dict[int, list[tuple[int, str]]] = {person.id: [] for person in people}
    for key, (who, action) in enumerate(actions):
        person = people[who]
        now += 1.0
        try:
            if action == "wait":
                now += 31 * 60
            elif action == "undo":
                take_back(store, person, f"u{key}", now)
                answered[person.id].pop()
            elif action == "late" and person.id in last:
                say(store, person, last[person.id], choose(last[person.id], 0), now)
                answered[person.id].append((last[person.id].item.id, "judge"))
            elif (task := ask(store, person, now)) is not None:
                last[person.id] = task
                if action in ("judge", "skip"):
                    say(store, person, task, choose(task, 0) if action == "judge" else None, now)
                    answered[person.id].append((task.item.id, action))
        except Refused:
            pass
        by_assignment, by_counter = held(store)
        assert by_assignment == by_counter
        assert all(count <= limits[item] for item, count in by_assignment.items())
    judged = [(item, person) for person, said in answered.items() for item, action in said if action == "judge"]
    assert len(set(judged)) == len(judged), "nobody judges an item twice"
    by_item = Counter(item for item, _ in judged)
    assert all(count <= limits[item] for item, count in by_item.items())
    counted = select(tables.assignments).where(tables.assignments.c.state == "judged")
    kept = store.read(lambda c: {(row.item, row.annotator) for row in c.execute(counted)})
    assert kept == set(judged), "every answer that was taken is there"


def label(store: Store, person, answered: list, wait: threading.Barrier, seed: int) -> None:
    rng = random.Random(seed)
    wait.wait()
    while (task := ask(store, person)) is not None:
        given = None if rng.random() < 0.1 else choose(task, rng.randrange(2))
        say(store, person, task, given, key=f"{person.id}-{len(answered)}")
        answered.append((task.item.id, given is not None))


def check(store: Store, overlap: int, judged: list[int], items: int) -> None:
    by_assignment, by_counter = held(store)
    assert by_assignment == by_counter == Counter(judged)
    assert max(by_assignment.values()) <= overlap
    assert len(by_assignment) == items


def test_threads_share_items(make_store: Make) -> None:
    store = make_store(overlap=2, **PLAIN)
    fill(store, *map(pair, range(25)))
    people = join(store, *(f"annotator {number}" for number in range(8)))
    barrier, answered = threading.Barrier(8), [[] for _ in people]
    threads = [
        threading.Thread(target=label, args=(store, person, answered[place], barrier, place))
        for place, person in enumerate(people)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(store, 2, [item for said in answered for item, kept in said if kept], 25)
    said = store.read(lambda c: c.execute(select(tables.judgments)).all())
    assert len(said) == sum(map(len, answered))


def test_writers_that_wait_share_a_commit_and_fail_alone(sqlite_store: Make) -> None:
    store = sqlite_store()
    commits: list[int] = []
    event.listen(store.engine, "commit", lambda connection: commits.append(1))
    outcome: dict[int, object] = {}
    first, go = threading.Event(), threading.Event()

    def slow(connection: object) -> None:
        first.set()
        go.wait()

    def one(number: int) -> None:
        def work(connection) -> int:
            connection.execute(tables.settings.insert().values(key=f"k{number}", value=number))
            if number == 3:
                raise ValueError("three")
            return number

        try:
            outcome[number] = store.write(work)
        except ValueError as error:
            outcome[number] = str(error)

    threads = [threading.Thread(target=lambda: store.write(slow))]
    threads[0].start()
    first.wait()
    threads += [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads[1:]:
        thread.start()
    while len(store._waiting) < 6:
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert outcome == {0: 0, 1: 1, 2: 2, 3: "three", 4: 4, 5: 5}
    assert len(commits) == 2
    kept = store.read(lambda c: c.execute(select(tables.settings.c.key)).scalars().all())
    assert {key for key in kept if key.startswith("k")} == {f"k{number}" for number in (0, 1, 2, 4, 5)}


def work(place: str, name: str, out: multiprocessing.Queue) -> None:
    store = Store.open(place)
    from kedge.feedback import people

    person = next(one for one in store.read(people.people) if one.name == name)
    answered: list = []
    label(store, person, answered, threading.Barrier(1), person.id)
    out.put([item for item, kept in answered if kept])


@pytest.mark.slow
def test_processes_share_items(make_store: Make, new_place: Callable[[], str]) -> None:
    store = make_store(overlap=1, **PLAIN)
    fill(store, *map(pair, range(20)))
    names = ["Ann", "Bob", "Cem"]
    join(store, *names)
    place = store.engine.url.render_as_string(hide_password=False)
    place = place.removeprefix("sqlite:///") if Path(place.removeprefix("sqlite:///")).exists() else place
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=work, args=(place, name, out)) for name in names]
    for worker in workers:
        worker.start()
    judged = [item for _ in workers for item in out.get(timeout=60)]
    for worker in workers:
        worker.join()
    check(store, 1, judged, 20)
