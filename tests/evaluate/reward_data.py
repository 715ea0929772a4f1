"""Comparisons whose truth is known."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.special import ndtri

from kedge.data.records import Preference
from kedge.evaluate.intervals import Floats
from kedge.evaluate.reward.answers import Answer, Judged, Scorer, judged

WORDS = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "gum", "hazel", "ivy", "juniper")


def text_of(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words)) + f" {rng.integers(10**9)}"


def pairs(seed: int, prompts: int, each: int = 1, *, longer_wins: float = 0.5) -> list[Preference]:
    """Comparisons of random texts; the longer one wins with the chance given."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for _ in range(each):
            short, long = sorted((text_of(rng, int(rng.integers(3, 30))) for _ in range(2)), key=len)
            chosen, rejected = (long, short) if rng.random() < longer_wins else (short, long)
            rows.append(Preference(f"question {prompt}", chosen, rejected))
    return rows


def table(seed: int, prompts: int, each: int = 1, *, longer_wins: float = 0.5) -> Judged:
    return judged(pairs(seed, prompts, each, longer_wins=longer_wins))


def numbers(answers: list[Answer] | tuple[Answer, ...], seed: int) -> Floats:
    """A standard normal number for each text, whatever it says: a judge that sees nothing."""
    digests = [hashlib.blake2b(f"{seed} {text}".encode(), digest_size=6).digest() for _, text in answers]
    return np.asarray(ndtri((np.array([int.from_bytes(digest) for digest in digests]) + 0.5) / 2**48))


def blind(seed: int) -> Scorer:
    return lambda answers: numbers(tuple(answers), seed)
