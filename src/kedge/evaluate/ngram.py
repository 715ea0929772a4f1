"""A trigram model with interpolated Kneser-Ney smoothing: the yardstick a neural language model has to beat.

Equations: Chen & Goodman (1998), "An Empirical Study of Smoothing Techniques for Language Modeling", section 2.7,
with one absolute discount per order, D = n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order, keyed by integers: an n-gram's key is its context's key times `base` plus its last token."""

    base: int
    keys: Integers  # [N] sorted keys of the n-grams seen
    counts: Integers  # [N] how often, or for lower orders after how many different tokens
    contexts: Integers  # [C] sorted keys of the contexts seen
    totals: Integers  # [C] sum of counts after the context
    followers: Integers  # [C] number of different tokens after the context
    discount: float

    @classmethod
    def of(cls, base: int, keys: Integers, counts: Integers) -> _Order:
        contexts, first, followers = np.unique(keys // base, return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # The estimate is undefined without n-grams seen once or twice; half a count leaves room for the unseen.
        discount = once / (once + 2 * twice) if once and twice else 0.5
        return cls(base, keys, counts, contexts, np.add.reduceat(counts, first), followers, discount)

    def probability(self, context: Integers, token: Integers, lower: Floats) -> Floats:
        """p(token | context), interpolated with the next lower order's; that one alone after an unseen context."""
        at, known = _find(self.contexts, context)
        where, seen = _find(self.keys, context * self.base + token)
        count = np.where(seen, self.counts[where], 0)
        total = np.where(known, self.totals[at], 1)
        spare = np.where(known, self.discount * self.followers[at], 1.0)
        probability: Floats = (np.maximum(count - self.discount, 0.0) + spare * lower) / total
        return probability


@dataclass(frozen=True)
class Trigram:
    """p(token | two tokens before) over `vocab` ids; sequences open with two marks that are never predicted."""

    vocab: int
    orders: tuple[_Order, _Order, _Order]  # unigrams, bigrams, trigrams

    @classmethod
    def fit(cls, sequences: Iterable[Sequence[int]], vocab: int, first: Sequence[int] | None = None) -> Trigram:
        """Count the tokens of `sequences`, ids in [0, vocab), from position `first[i]` on, or all.

        A fair yardstick learns from the tokens that the neural model learns from: `first` leaves out the prompts,
        which in dialogues repeat the responses of other rows. Raises `ValueError` if no token is left.
        """
        before, last, token, position = _grams(sequences, vocab, first)
        counted = position >= 0
        if not counted.any():
            raise ValueError("a trigram model needs at least one token")
        before, last, token = before[counted], last[counted], token[counted]
        base = vocab + 1
        trigrams, counts = np.unique((before * base + last) * base + token, return_counts=True)
        bigrams, before_bigram = np.unique(trigrams % base**2, return_counts=True)
        unigrams, before_unigram = np.unique(bigrams % base, return_counts=True)
        levels = ((unigrams, before_unigram), (bigrams, before_bigram), (trigrams, counts))
        one, two, three = (_Order.of(base, keys, number.astype(np.int64)) for keys, number in levels)
        return cls(vocab, (one, two, three))

    def nats_per_token(self, sequences: Iterable[Sequence[int]], first: Sequence[int] | None = None) -> float:
        """Mean negative log-probability, in nats, of the tokens of each sequence from position `first[i]` on.

        Tokens before that are context only; without `first` all are counted. Raises `ValueError` if none is.
        """
        before, last, token, position = _grams(sequences, self.vocab, first)
        counted = position >= 0
        if not counted.any():
            raise ValueError("no token to predict")
        return float(-np.log(self._probability(before[counted], last[counted], token[counted])).mean())

    def _probability(self, first: Integers, second: Integers, token: Integers) -> Floats:
        """p(token | first, second), elementwise."""
        base = self.vocab + 1
        probability: Floats = np.full(len(token), 1 / self.vocab)
        for order, context in zip(self.orders, (np.zeros_like(token), second, first * base + second), strict=True):
            probability = order.probability(context, token, probability)
        return probability


def _grams(
    sequences: Iterable[Sequence[int]], vocab: int, first: Sequence[int] | None = None
) -> tuple[Integers, Integers, Integers, Integers]:
    """Every token with the two before it, `vocab` standing for the opening, and its position counted from `first`."""
    parts = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    starts = np.zeros(len(parts), dtype=np.int64) if first is None else np.asarray(first, dtype=np.int64)
    if len(starts) != len(parts):
        raise ValueError(f"{len(starts)} first positions for {len(parts)} sequences")
    opening = np.full(2, vocab, dtype=np.int64)
    empty: list[Any] = [np.zeros(0, dtype=np.int64)]
    flat = np.concatenate(empty + [piece for part in parts for piece in (opening, part)])
    position = np.concatenate(
        empty + [np.arange(-2, len(part)) - start for part, start in zip(parts, starts, strict=True)]
    )
    index = np.concatenate(empty + [np.arange(-2, len(part)) for part in parts])
    real = np.flatnonzero(index >= 0)
    outside = (flat[real] < 0) | (flat[real] >= vocab)
    if outside.any():
        raise ValueError(f"token id {flat[real][outside][0]} is outside [0, {vocab})")
    return flat[real - 2], flat[real - 1], flat[real], position[real]


def _find(keys: Integers, wanted: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """Where each wanted key is in the sorted `keys`, and whether it is there at all."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
