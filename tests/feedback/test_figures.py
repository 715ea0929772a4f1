"""What a lead is told, against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable

import krippendorff
import numpy as np
import pytest
from people_at_work import ask, choose, fill, join, pair, say, take_back

from kedge.feedback.figures import overview
from kedge.feedback.items import NewItem
from kedge.feedback.store import Store

Make = Callable[..., Store]


def test_the_figures_of_a_job(sqlite_store: Make) -> None:
    """Ann always takes the left side, Bob always the longer response; they disagree where these differ."""
    store = sqlite_store(overlap=2, gold_share=0, repeat_share=0)
    fill(store, *map(pair, range(40)), pair(99, purpose="gold", answer={"choice": 0}))
    ann, bob, _ = join(store, "Ann", "Bob", "Cem")
    chosen: dict[str, list[int]] = {"Ann": [], "Bob": []}
    for number in range(40):
        task = ask(store, ann, 60.0 * number)
        chosen["Ann"].append(task.shown[0])
        say(store, ann, task, {"choice": "left"}, 60.0 * number + 10, flagged=number == 0)
        task = ask(store, bob, 60.0 * number)
        chosen["Bob"].append(1)
        say(store, bob, task, choose(task, 1), 60.0 * number + 30)
    take_back(store, bob, "u", 2400.0)
    rules = store.rules()
    found = store.read(lambda c: overview(c, rules, 2400.0))
    counts = found.counts
    assert (counts.items, counts.asked, counts.judged, counts.held, counts.finished) == (40, 80, 79, 1, 39)
    assert (counts.gold, counts.calibration, counts.flagged, counts.settled) == (1, 0, 1, 0)
    assert counts.split == sum(a != b for a, b in zip(chosen["Ann"][:39], chosen["Bob"][:39], strict=True))
    one, two, three = found.annotators
    assert [person.name for person in found.annotators] == ["Ann", "Bob", "Cem"]
    assert (one.judged, two.judged, three.judged) == (40, 39, 0)
    assert (one.seconds, two.seconds, three.seconds) == (10.0, 30.0, None)
    assert (one.last_hour, two.undone) == (40, 1)
    assert one.position.first_wins == 1.0
    assert one.position.wilson[0] == pytest.approx(0.9124, abs=2e-4)  # 40 of 40: 1 / (1 + 1.96^2 / 40)
    assert two.length.longer_wins == 1.0
    assert two.position.first_wins < 0.9
    assert three.position is None and three.gold.interval is None
    (agreement,) = found.agreements
    expected = krippendorff.alpha(
        reliability_data=np.array([chosen["Ann"], [*chosen["Bob"][:39], np.nan]]), level_of_measurement="nominal"
    )
    assert agreement.units == 39
    assert agreement.alpha == pytest.approx(expected)


def test_gold_and_repeats_are_counted_per_annotator(sqlite_store: Make) -> None:
    store = sqlite_store(overlap=1, gold_share=1, repeat_share=0, repeat_gap=1)
    fill(store, *map(pair, range(5)), *(pair(n, purpose="gold", answer={"choice": 0}) for n in (20, 21, 22)))
    (ann,) = join(store, "Ann")
    now, gold, again = 0.0, 0, 0
    while (task := ask(store, ann, now)) is not None:
        now += 1
        if now == 5:
            store.change(store.rules().settings.model_copy(update={"gold_share": 0.0, "repeat_share": 1.0}))
        gold += task.purpose == "gold"
        again += task.purpose == "repeat"
        say(store, ann, task, {"choice": "left"} if task.purpose == "repeat" else choose(task, 0), now)
    rules = store.rules()
    (one,) = store.read(lambda c: overview(c, rules, now)).annotators
    assert (gold, again) == (3, 4), "the last item is too young to come again"
    assert (one.gold.count, one.gold.of) == (gold, gold)
    assert one.repeats.of == again
    assert one.judged == 5


def test_rankings_ratings_and_drift(sqlite_store: Make) -> None:
    """Cem takes the left side of 55 in 60 pairs, then the right side of 55 in 60."""
    store = sqlite_store(overlap=1, gold_share=0, repeat_share=0)
    ranking = NewItem("ranking", "Rank.", ("a", "bb", "ccc"), overlap=2)
    fill(store, ranking, *map(pair, range(120)))
    cem, dan = join(store, "Cem", "Dan")
    for person in (cem, dan):
        task = ask(store, person)
        say(store, person, task, {"ranks": [place + 1 for place in task.shown]})
    for number in range(120):
        task = ask(store, cem)
        left = (number < 60) != (number % 12 == 0)
        say(store, cem, task, {"choice": "left" if left else "right"})
    rules = store.rules()
    found = store.read(lambda c: overview(c, rules, 0.0))
    drift = next(one for one in found.drifts if one.who == "Cem" and one.what == "first shown wins")
    assert (drift.before, drift.after) == (55 / 60, 5 / 60)
    rated = sqlite_store(overlap=2, gold_share=0, repeat_share=0)
    fill(rated, *(NewItem("rating", f"Rate {n}.", (f"x{n}",)) for n in range(3)))
    people = join(rated, "Cem", "Dan")
    said = {"Cem": [1, 3, 5], "Dan": [2, 3, 4]}
    for person in people:
        for rating in said[person.name]:
            say(rated, person, ask(rated, person), {"rating": rating})
    rules = rated.rules()
    (agreement,) = rated.read(lambda c: overview(c, rules, 0.0)).agreements
    expected = krippendorff.alpha(reliability_data=[said["Cem"], said["Dan"]], level_of_measurement="interval")
    assert agreement.alpha == pytest.approx(expected)


def test_an_empty_store_has_figures(sqlite_store: Make) -> None:
    store = sqlite_store()
    rules = store.rules()
    found = store.read(lambda c: overview(c, rules, 0.0))
    assert (found.counts.items, found.agreements, found.annotators, found.drifts) == (0, (), (), ())
