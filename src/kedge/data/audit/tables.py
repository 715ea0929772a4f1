"""The tables that one pass leaves: hashes, lengths, labels and marks of every row, and texts of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import Problem

Array = NDArray[Any]

ROW = np.dtype([("hash", "<u8"), ("empty", "u1")])
PAIR = np.dtype(
    [
        ("row", "<u4"),
        ("prompt", "<u8"),
        ("chosen", "<u8"),
        ("rejected", "<u8"),
        ("chosen_length", "<u4"),
        ("rejected_length", "<u4"),
        ("strength", "<f4"),
        ("annotator", "<i4"),
        ("votes", "<u2", (3,)),
        ("shown", "u1"),
        ("chosen_marks", "<u2"),
        ("rejected_marks", "<u2"),
    ]
)
SINGLE = np.dtype(
    [
        ("row", "<u4"),
        ("prompt", "<u8"),
        ("response", "<u8"),
        ("length", "<u4"),
        ("label", "<f8"),
        ("annotator", "<i4"),
        ("marks", "<u2"),
    ]
)


@dataclass(frozen=True)
class Texts:
    """Distinct texts, cut to a stated length, with their hashes; `total` says how many distinct ones were offered."""

    hashes: Array
    texts: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class Domain:
    """An extra column of few values: one code per usable row, -1 where it is missing."""

    name: str
    values: tuple[str, ...]
    codes: Array


@dataclass(frozen=True)
class Tables:
    """A file of judgments, gathered.

    `rows` is a ROW for every usable row. `pairs` is a PAIR for every preference and every pair of a ranking, `singles`
    a SINGLE for every rating and verdict; their `row` points into `rows`. Lengths are in characters, `strength` is the
    share of votes for `chosen` (a tie is 0.5), `annotator` indexes `annotators` or is -1. `kinds` counts rows by kind.
    """

    path: str
    total: int
    rejected: tuple[Problem, ...]  # the first few
    rejected_count: int
    kinds: Mapping[str, int]
    rows: Array
    pairs: Array
    singles: Array
    annotators: tuple[str, ...]
    domains: tuple[Domain, ...]
    prompts: Texts
    responses: Texts
    thinned: int  # rankings so long that not all their pairs were taken


def outcome(pairs: Array) -> Array:
    """Who won each pair: 1 chosen, -1 rejected, 0 neither."""
    return np.sign(pairs["strength"] - np.float32(0.5)).astype(np.int8)


def log_ratio(pairs: Array) -> Array:
    """log(characters of the winner / those of the loser), 0 for ties; an empty response counts as one character."""
    chosen, rejected = (np.maximum(pairs[name], 1).astype(np.float64) for name in ("chosen_length", "rejected_length"))
    signed: Array = outcome(pairs) * np.log(chosen / rejected)
    return signed


def longer(pairs: Array) -> Array:
    """1 where the longer response won, -1 where the shorter did, 0 for ties and equal lengths."""
    return outcome(pairs) * np.sign(pairs["chosen_length"].astype(np.int64) - pairs["rejected_length"].astype(np.int64))


def mixed(*parts: Array) -> Array:
    """One 64-bit hash from several columns of 64-bit hashes (splitmix64's finaliser); their order matters."""
    total = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        total = (total ^ part.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
        total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total = total ^ (total >> np.uint64(31))
    return total
