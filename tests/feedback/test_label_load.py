"""A small version of benchmarks/label_load.py: answers that were acknowledged survive a killed server, once each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "label_load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["label_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_was_acknowledged_is_lost(load: ModuleType, new_place: Callable[[], str]) -> None:
    found = load.measure(new_place(), load.Plan(annotators=20, seconds=10, kills=2, think=1.0))
    assert found["acknowledged"] > 0
    assert found["odd"] == []
    assert (found["lost"], found["twice"]) == (0, 0)
    assert found["most_on_an_item"] <= 2
    assert len(found["outages_s"]) == 2
    assert load.render({"machine": load.machine(), "runs": {"SQLite": found}}).startswith("# The labelling site under")


def test_what_the_benchmark_would_notice(load: ModuleType, tmp_path: Path) -> None:
    """A store that lost one answer and holds another twice over is told from one that is whole."""
    from people_at_work import ask, choose, fill, join, pair, say

    from kedge.feedback.settings import Settings
    from kedge.feedback.store import Store

    store = Store.create(tmp_path / "labels.db", Settings(gold_share=0, repeat_share=0))
    fill(store, pair(1))
    for person in join(store, "Ann", "Bob"):
        task = ask(store, person)
        say(store, person, task, choose(task, 0), key=person.name)
    store.close()
    seen = load.Seen(acknowledged=["Ann", "Bob", "Cem"])
    assert load.verdict(str(tmp_path / "labels.db"), seen) == {
        "stored": 2, "lost": 1, "twice": 0, "most_on_an_item": 2,
    }  # fmt: skip
    assert load.quantile([0.1, 0.2, 0.3, 0.4], 0.5) == pytest.approx(300)
    assert load.quantile([0.1], 0.95) == pytest.approx(100)
