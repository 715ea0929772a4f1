"""Near-duplicates: texts whose sets of three-word shingles have a Jaccard similarity of at least `ALIKE`.

MinHash (Broder 1997) with locality-sensitive bands finds candidates; the similarity of each candidate is then exact.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kedge.data.audit.tables import Array, Texts, mixed

ALIKE = 0.8
BANDS, ROWS = 8, 4  # a text of similarity 0.8 is a candidate with probability 0.985
CANDIDATES = 16  # members of a band that a text is compared with
_WORD = re.compile(r"\w+")
_RNG = np.random.default_rng(20)
_FACTORS = _RNG.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
_SHIFTS = _RNG.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)


@dataclass(frozen=True)
class Near:
    """`alike` of `texts` compared texts are near another; `total` is how many distinct texts there are in all."""

    texts: int
    total: int
    alike: int

    @property
    def share(self) -> float:
        return self.alike / self.texts if self.texts else 0.0


@dataclass(frozen=True)
class Sketch:
    """A text's shingles, sorted, and its band keys."""

    shingles: Array
    bands: tuple[int, ...]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(text.lower())


def word_codes(text: str) -> Array:
    """A 32-bit checksum per word."""
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words(text)], np.uint64)


def sketch(text: str) -> Sketch | None:
    """None for a text without words. A text of fewer than three words is one shingle."""
    codes = word_codes(text)
    if len(codes) == 0:
        return None
    if len(codes) < 3:
        shingles = mixed(*(codes[i : i + 1] for i in range(len(codes))))
    else:
        shingles = np.unique(mixed(codes[:-2], codes[1:-1], codes[2:]))
    least = (shingles[None, :] * _FACTORS[:, None] + _SHIFTS[:, None]).min(axis=1).reshape(BANDS, ROWS)
    keys = mixed(*(least[:, row] for row in range(ROWS)), np.arange(BANDS, dtype=np.uint64))
    return Sketch(shingles, tuple(keys.tolist()))


class Index:
    """Sketches that can be asked for near ones."""

    def __init__(self) -> None:
        self.bands: dict[int, list[int]] = {}
        self.sketches: list[Sketch] = []

    def add(self, found: Sketch) -> int:
        number = len(self.sketches)
        self.sketches.append(found)
        for key in found.bands:
            members = self.bands.setdefault(key, [])
            if len(members) < CANDIDATES:
                members.append(number)
        return number

    def near(self, found: Sketch) -> Iterator[int]:
        """Numbers of the members that are alike."""
        candidates = {number for key in found.bands for number in self.bands.get(key, ())}
        for number in sorted(candidates):
            if similarity(found.shingles, self.sketches[number].shingles) >= ALIKE:
                yield number


def similarity(one: Array, other: Array) -> float:
    """Jaccard similarity of two sorted sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def near_duplicates(texts: Texts) -> Near:
    """How many of the texts are near another of them. They are distinct, so exact copies do not count."""
    index, alike = Index(), set()
    for text in texts.texts:
        found = sketch(text)
        if found is None:
            continue
        close = list(index.near(found))
        number = index.add(found)
        alike.update([*close, number] if close else [])
    return Near(len(texts.texts), texts.total, len(alike))


def near_another(texts: Sequence[str], others: Texts, total: int) -> Near:
    """How many of `texts` are near one of the others."""
    index = Index()
    for text in others.texts:
        found = sketch(text)
        if found is not None:
            index.add(found)
    sketches = (sketch(text) for text in texts)
    alike = sum(found is not None and next(index.near(found), None) is not None for found in sketches)
    return Near(len(texts), total, alike)
