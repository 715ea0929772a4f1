"""Phrases by what pushed them: token n-grams with the advantage of their tokens, part by part.

An n-gram's account is the sum over its occurrences of the advantage of all its tokens; overlapping n-grams share
tokens, so these accounts do not add up to the run's. Memory is bounded: where more n-grams are known than fit, those
with the smallest accounts are dropped, and one that comes back begins again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.split import Entry, Split
from kedge.trace.reader import Run, StepTrace

Array = NDArray[Any]
SIZE = 3  # tokens
KEPT = 100_000  # n-grams in memory
SHOWN = 25


@dataclass(frozen=True)
class Phrase:
    """An n-gram: how often it was seen and, by channel, the advantage that its tokens got in all."""

    text: str
    count: int
    advantage: float
    by_channel: Mapping[str, float]  # reward and critic parts together

    @property
    def largest(self) -> str:
        """The channel with the largest absolute sum."""
        return max(self.by_channel, key=lambda channel: abs(self.by_channel[channel]))


class PhraseTally:
    """The n-grams of `size` tokens so far; `words` turns token ids into text, where the run holds a tokenizer."""

    def __init__(self, words: Mapping[int, str] | None = None, *, size: int = SIZE, kept: int = KEPT) -> None:
        self.size, self._kept, self._words = size, kept, words
        self._grams = np.zeros((0, size), dtype=np.int64)
        self._counts: Array = np.zeros(0)
        self._sums = np.zeros((0, 0))
        self._channels: list[str] = []
        self.dropped = 0
        self.unknown_steps = 0  # without token ids

    def add(self, step: StepTrace, rows: Split) -> None:
        """Add the n-grams of a step; one without token ids is counted and left out."""
        if step.response_ids is None:
            self.unknown_steps += 1
            return
        order = np.argsort(~step.response_mask, axis=1, kind="stable")  # holes closed: an n-gram is of the policy's own
        ids = np.take_along_axis(step.response_ids.astype(np.int64), order, axis=1)
        width = ids.shape[1] - self.size + 1
        there = np.arange(max(width, 0)) < (step.lengths - self.size + 1)[:, None]
        if width < 1 or not there.any():
            return
        grams = np.stack([ids[:, at : at + width][there] for at in range(self.size)], axis=-1)
        sums = np.zeros((len(grams), len(self._columns(rows.entries))))
        for index in rows.of_kind("part"):
            tokens = np.take_along_axis(rows.tokens[..., index], order, axis=1)
            run = np.cumsum(np.pad(tokens, ((0, 0), (1, 0))), axis=1)
            column = self._channels.index(rows.entries[index].channel)
            sums[:, column] += (run[:, self.size :] - run[:, : -self.size])[there]
        self._merge(grams, np.ones(len(grams)), sums)

    def result(self, shown: int = SHOWN) -> tuple[Phrase, ...]:
        """The n-grams whose largest channel is largest, first."""
        first = np.argsort(-np.abs(self._sums).max(axis=1, initial=0.0), kind="stable")[:shown]
        return tuple(
            Phrase(
                text=self._text(self._grams[at]),
                count=int(self._counts[at]),
                advantage=float(self._sums[at].sum()),
                by_channel=dict(zip(self._channels, self._sums[at].tolist(), strict=True)),
            )
            for at in first
        )

    def _columns(self, entries: tuple[Entry, ...]) -> list[str]:
        """The channels, grown by those that this step has for the first time."""
        new = [e.channel for e in entries if e.kind == "part" and e.channel not in self._channels]
        self._channels += dict.fromkeys(new)
        missing = len(self._channels) - self._sums.shape[1]
        self._sums = np.concatenate([self._sums, np.zeros((len(self._sums), missing))], axis=1)
        return self._channels

    def _merge(self, grams: Array, counts: Array, sums: Array) -> None:
        grams = np.concatenate([self._grams, grams])
        keys = _keys(grams)
        _, first, place = np.unique(keys, return_index=True, return_inverse=True)
        total = len(first)
        self._grams = grams[first]
        self._counts = np.bincount(place, weights=np.concatenate([self._counts, counts]), minlength=total)
        columns = np.concatenate([self._sums, sums]).T
        self._sums = np.stack([np.bincount(place, weights=column, minlength=total) for column in columns], axis=-1)
        if total > self._kept:
            largest = np.abs(self._sums).max(axis=1)
            keep = np.argpartition(-largest, self._kept // 2)[: self._kept // 2]
            self.dropped += total - len(keep)
            self._grams, self._counts, self._sums = self._grams[keep], self._counts[keep], self._sums[keep]

    def _text(self, gram: Array) -> str:
        if self._words is None:
            return " ".join(f"#{token}" for token in gram.tolist())
        words = self._words
        text = "".join(words.get(token, f" #{token}") for token in gram.tolist())
        return re.sub(r"\s", lambda space: " " if space[0] == " " else repr(space[0])[1:-1], text).strip()


def _keys(grams: Array) -> Array:
    """[N] one number a row of token ids [N, size]; two rows share one by chance about never."""
    key = np.zeros(len(grams), dtype=np.uint64)
    for column in grams.T:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def vocabulary(run: Run) -> dict[int, str] | None:
    """Token ids to text, from the tokenizer.json that the run's models hold; None where there is none to read.

    A space before a word is written as one; tokens of whole words, as word-level tokenizers have, get one, too.
    """
    for folder in ("policy", "sft"):
        path = run.dir.models / folder / "tokenizer.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            model = record["model"]
            given = model["vocab"]
            pieces = given.items() if isinstance(given, dict) else ((piece, at) for at, (piece, _) in enumerate(given))
            marked = model.get("type") == "WordLevel"
            words = {int(at): f" {piece}" if marked else _decoded(piece) for piece, at in pieces}
            words |= {int(one["id"]): f" {one['content']}" for one in record.get("added_tokens", ())}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return words
    return None


def _decoded(piece: str) -> str:
    """The text of a token as byte-level, SentencePiece and WordPiece vocabularies write it."""
    if piece.startswith("##"):
        return piece[2:]
    if "▁" in piece:
        return piece.replace("▁", " ")
    characters = _byte_characters()
    if all(character in characters for character in piece):
        return bytes(characters[character] for character in piece).decode("utf-8", "replace")
    return piece


@cache
def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes; Radford et al. (2019): printable ones stand for
    themselves, the others for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
