"""The trigram model against a brute-force one written from the equations with dictionaries."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.evaluate.ngram import Trigram

CORPUS = [[0, 1, 2, 3], [0, 1, 2, 0, 1], [4, 1, 2, 3, 3, 3], [0, 1], [2, 2, 2, 2], [5]]
VOCAB = 7  # 6 is never seen


class BruteForce:
    """Interpolated Kneser-Ney straight from Chen & Goodman, one token at a time."""

    def __init__(self, corpus: Sequence[Sequence[int]], vocab: int) -> None:
        self.vocab = vocab
        padded = [["^", "^", *sequence] for sequence in corpus]
        self.counts = Counter((s[i - 2], s[i - 1], s[i]) for s in padded for i in range(2, len(s)))
        before = defaultdict(set)
        for u, v, w in self.counts:
            before[v, w].add(u)
        self.bigrams = {pair: len(tokens) for pair, tokens in before.items()}
        self.unigrams = Counter(w for _, w in self.bigrams)
        self.discounts = [self.discount(t.values()) for t in (self.unigrams, self.bigrams, self.counts)]

    @staticmethod
    def discount(counts) -> float:
        counts = list(counts)
        once, twice = counts.count(1), counts.count(2)
        return once / (once + 2 * twice) if once and twice else 0.5

    @staticmethod
    def interpolate(after: dict[int, int], w: int, discount: float, lower: float) -> float:
        if not after:
            return lower
        total = sum(after.values())
        return max(after.get(w, 0) - discount, 0) / total + discount * len(after) / total * lower

    def probability(self, u, v, w: int) -> float:
        p = self.interpolate(dict(self.unigrams), w, self.discounts[0], 1 / self.vocab)
        p = self.interpolate({y: c for (x, y), c in self.bigrams.items() if x == v}, w, self.discounts[1], p)
        seen = {z: c for (x, y, z), c in self.counts.items() if (x, y) == (u, v)}
        return self.interpolate(seen, w, self.discounts[2], p)

    def nats(self, sequence: Sequence[int], first: int = 0) -> list[float]:
        padded = ["^", "^", *sequence]
        return [-math.log(self.probability(*padded[i - 2 : i + 1])) for i in range(2 + first, len(padded))]


@pytest.mark.parametrize(
    "sequence",
    [[0, 1, 2, 3], [6, 6, 6], [3, 0, 1, 2], [5, 0], [1, 2, 2], [2, 6, 1]],
    ids=lambda s: "-".join(map(str, s)),
)
def test_agrees_with_brute_force(sequence):
    model, oracle = Trigram.fit(CORPUS, VOCAB), BruteForce(CORPUS, VOCAB)
    assert model.nats_per_token([sequence]) == pytest.approx(np.mean(oracle.nats(sequence)), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=8).filter(any),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_agrees_with_brute_force_on_any_corpus(corpus, sequence):
    model, oracle = Trigram.fit(corpus, 5), BruteForce(corpus, 5)
    assert model.nats_per_token([sequence]) == pytest.approx(np.mean(oracle.nats(sequence)), rel=1e-12)


@pytest.mark.parametrize("context", [[], [0], [6], [0, 1], [2, 2], [6, 6], [1, 6], [6, 1]])
def test_probabilities_sum_to_one_over_the_vocabulary(context):
    model = Trigram.fit(CORPUS, VOCAB)
    nats = [model.nats_per_token([[*context, token]], first=[len(context)]) for token in range(VOCAB)]
    assert math.fsum(math.exp(-value) for value in nats) == pytest.approx(1, abs=1e-12)


def test_counts_only_tokens_from_the_first_position_on():
    model, oracle = Trigram.fit(CORPUS, VOCAB), BruteForce(CORPUS, VOCAB)
    expected = np.mean(oracle.nats([0, 1, 2, 3], 2) + oracle.nats([2, 2, 1], 1))
    assert model.nats_per_token([[0, 1, 2, 3], [2, 2, 1]], first=[2, 1]) == pytest.approx(expected, rel=1e-12)


def test_learns_only_from_the_first_position_on():
    """Of [0, 1, 2, 3] from 2 on, only (0 1) -> 2 and (1 2) -> 3 are counted: the prompt is context."""
    model = Trigram.fit([[0, 1, 2, 3], [4, 2, 3]], VOCAB, first=[2, 2])
    oracle = BruteForce([], VOCAB)
    oracle.counts.update([(0, 1, 2), (1, 2, 3), (4, 2, 3)])
    oracle.bigrams = {(1, 2): 1, (2, 3): 2}
    oracle.unigrams.update([2, 3])
    oracle.discounts = [oracle.discount(table.values()) for table in (oracle.unigrams, oracle.bigrams, oracle.counts)]
    assert model.nats_per_token([[0, 1, 2, 3]]) == pytest.approx(np.mean(oracle.nats([0, 1, 2, 3])), rel=1e-12)


def test_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="at least one token"):
        Trigram.fit([[], []], 5)
    with pytest.raises(ValueError, match=r"token id 5 is outside \[0, 5\)"):
        Trigram.fit([[0, 5]], 5)
    model = Trigram.fit(CORPUS, VOCAB)
    with pytest.raises(ValueError, match="no token to predict"):
        model.nats_per_token([[0, 1]], first=[2])
    with pytest.raises(ValueError, match="1 first positions for 2 sequences"):
        model.nats_per_token([[0], [1]], first=[0])


def test_recovers_the_entropy_of_a_second_order_source_and_stays_fast():
    """Tokens depend on the two before them: with enough text the model comes close to the source's entropy."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(8, 0.3), size=(8, 8))
    cumulative, draws, ids = table.cumsum(axis=-1), rng.random(120_000), [0, 0]
    for draw in draws:
        ids.append(min(int(np.searchsorted(cumulative[ids[-2], ids[-1]], draw)), 7))
    tokens = np.array(ids)
    train, test = tokens[:100_000].reshape(-1, 50), tokens[100_000:]
    entropy = -np.log(table[test[:-2], test[1:-1], test[2:]]).mean()
    start = time.process_time()
    loss = Trigram.fit(train, 8).nats_per_token([test], first=[2])
    assert time.process_time() - start < 2
    assert entropy < loss < entropy + 0.02
