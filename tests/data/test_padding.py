"""Padding adds sentences and nothing else, on both sides, and most readers would rather do without."""

from __future__ import annotations

import numpy as np

from kedge.data.padding import MOST, PLAIN_WINS, padded, padded_pairs
from kedge.data.records import Preference

SENTENCES = ("alpha one .", "beta two .", "gamma three .", "delta four .")


def test_sentences_stand_in_front_and_behind_and_none_comes_twice() -> None:
    rng = np.random.default_rng(0)
    fronts = behinds = 0
    for _ in range(200):
        before, found, after = padded("the answer", SENTENCES, 3, rng).partition("the answer")
        added = [sentence for sentence in SENTENCES if sentence in before or sentence in after]
        assert found and len(added) == 3
        assert sorted(f"{before}{after}".split()) == sorted(" ".join(added).split())
        fronts, behinds = fronts + bool(before), behinds + bool(after)
    assert min(fronts, behinds) > 100


def test_no_more_sentences_than_there_are() -> None:
    assert len(padded("a", SENTENCES[:1], 3, np.random.default_rng(0)).split()) == 4


def test_every_pair_gives_one_of_its_own_responses_padded() -> None:
    pairs = [Preference(f"prompt {n}", f"good {n}", f"bad {n}") for n in range(100)]
    plain = padded_pairs(pairs, SENTENCES, np.random.default_rng(1))
    assert [row.prompt for row in plain] == [pair.prompt for pair in pairs]
    for pair, row in zip(pairs, plain, strict=True):
        assert row.chosen in (pair.chosen, pair.rejected)
        assert row.chosen in row.rejected and len(row.rejected) > len(row.chosen)
        assert 3 <= len(row.rejected.split()) - len(row.chosen.split()) <= 3 * MOST
        assert row.strength == PLAIN_WINS > 0.5
    chosen = sum(row.chosen.startswith("good") for row in plain)
    assert 30 < chosen < 70, "winners and losers alike, or padding would go with quality"


def test_the_same_seed_pads_alike() -> None:
    pairs = [Preference("p", "good", "bad")] * 5
    one, other = (padded_pairs(pairs, SENTENCES, np.random.default_rng(3)) for _ in range(2))
    assert one == other
