"""One pass over a file of judgments into compact tables; texts are dropped as soon as they are hashed and measured."""

from __future__ import annotations

import struct
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from kedge.data import columns
from kedge.data.audit.extent import expected_rows
from kedge.data.audit.format import marks_of
from kedge.data.audit.sample import Sample, text_hash
from kedge.data.audit.tables import PAIR, ROW, SINGLE, Array, Domain, Tables
from kedge.data.files import read_rows
from kedge.data.records import Judgment, Preference, Ranking, Rating, Verdict, prompt_text
from kedge.errors import InputError, Interrupted, Problem
from kedge.progress import Interrupt, Progress, Stage

SAMPLED = 20_000  # distinct prompts, and distinct responses, whose texts are kept
LONGEST_RANKING = 32  # responses of a ranking whose pairs are all taken
LARGEST = 1e100  # ratings beyond are taken as this: their squares must be finite
SHOWN = 5  # rejected rows that are told
VALUES = 64  # a column with more values is no domain
COLUMNS = 32  # columns that are looked at
_EVERY = 500  # rows between looks at the clock

# Columns that are the judgment itself, or were made from it: they predict the label by construction.
_JUDGED = (
    "id prompt prompt_id messages instruction input output response responses completion completions answers "
    "candidates label good rating score scores reward rank ranks tie margin worker"
)
JUDGED = frozenset(_JUDGED.split())
STEMS = ("chosen", "rejected", "winner", "vote", "label", "prefer", "annotat", "strength", "judg")

_ROW, _PAIR, _SINGLE = struct.Struct("<QB"), struct.Struct("<IQQQIIfiHHHBHH"), struct.Struct("<IQQIdiH")


def gather(
    path: str | Path, *, progress: Progress | None = None, interrupt: Interrupt | None = None, name: str = "reading"
) -> Tables:
    """The tables of a file. Raises InputError where it cannot be read, its columns are not known or no row is usable.

    Memory: about 70 bytes a pair, and the texts of the samples. Progress tells rows a second and the time left.
    """
    path = Path(path)
    progress = Progress(quiet=True) if progress is None else progress
    expected = expected_rows(path)
    builder = _Builder()
    with progress.stage(name, expected or 1) as stage:
        clock = _Clock(progress, stage, expected)
        for index, (number, row) in enumerate(read_rows(path)):
            builder.add(row, f"{path}:{number}")
            if index % _EVERY == 0:
                clock.tick(index)
                stop_if_asked(interrupt, f"{path}:{number}")
        clock.done(builder.total)
    return builder.tables(path)


def stop_if_asked(interrupt: Interrupt | None, where: str) -> None:
    """Raise Interrupted if the user asked to stop; nothing is kept of an audit."""
    if interrupt is not None and interrupt.requested:
        raise Interrupted(where, "run the command again")


class _Clock:
    """Tells how fast rows are read and, once that is known, how long all of them will take."""

    def __init__(self, progress: Progress, stage: Stage, expected: int | None) -> None:
        self.progress, self.stage, self.expected = progress, stage, expected
        self.began, self.told = time.monotonic(), False

    def tick(self, index: int) -> None:
        taken = time.monotonic() - self.began
        if taken < 2.0:
            return
        rate = (index + 1) / taken
        if not self.told:
            self.told = True
            if self.expected:
                told = f"about {self.expected:,} rows: reading them takes about {self.expected / rate:,.0f} s"
            else:
                told = "how many rows there are is not known before they are read"
            self.progress.note(f"{self.stage.name:<10} {rate:,.0f} rows/s, {told}")
        self.stage.total = max(self.stage.total, index + 2)
        self.stage.advance(index, **{"rows/s": rate})

    def done(self, total: int) -> None:
        if self.told:
            self.stage.total = total
            self.stage.advance(total - 1, **{"rows/s": total / (time.monotonic() - self.began)})


class _Builder:
    """Rows in, tables out."""

    def __init__(self) -> None:
        self.total = self.usable = self.rejected_count = self.unknown = self.thinned = 0
        self.rejected: list[Problem] = []
        self.kinds: Counter[str] = Counter()
        self.rows, self.pairs, self.singles = bytearray(), bytearray(), bytearray()
        self.annotators: dict[str, int] = {}
        self.domains = _Domains()
        self.prompts, self.responses = Sample(SAMPLED), Sample(SAMPLED)

    def add(self, row: Mapping[str, Any] | Problem, where: str) -> None:
        """Take a row, or remember why it cannot be used."""
        self.total += 1
        if isinstance(row, Problem):
            self._reject(row)
            return
        try:
            judged = columns.judgment(row)
        except columns.Unusable as error:
            self.unknown += isinstance(error, columns.UnknownColumns)
            self._reject(Problem(where, error.what, error.remedy))
            return
        self._take(judged)
        self.domains.add(row, self.usable)
        self.usable += 1

    def tables(self, path: Path) -> Tables:
        if self.usable == 0:
            count = Problem(str(path), f"all {self.total} rows are rejected", "fix them")
            raise InputError(self.rejected[0] if self.unknown == self.total else [*self.rejected, count])
        pairs, singles = np.frombuffer(self.pairs, PAIR), np.frombuffer(self.singles, SINGLE)
        prompts = _distinct(pairs["prompt"], singles["prompt"])
        responses = _distinct(pairs["chosen"], pairs["rejected"], singles["response"])
        return Tables(
            path=str(path),
            total=self.total,
            rejected=tuple(self.rejected),
            rejected_count=self.rejected_count,
            kinds=dict(self.kinds),
            rows=np.frombuffer(self.rows, ROW),
            pairs=pairs,
            singles=singles,
            annotators=tuple(self.annotators),
            domains=self.domains.found(self.usable),
            prompts=self.prompts.texts(prompts),
            responses=self.responses.texts(responses),
            thinned=self.thinned,
        )

    def _reject(self, problem: Problem) -> None:
        self.rejected_count += 1
        if len(self.rejected) < SHOWN:
            self.rejected.append(problem)

    def _take(self, judged: Judgment) -> None:
        text = prompt_text(judged.prompt)
        prompt = text_hash(text)
        self.prompts.offer(prompt, text)
        coder = -1
        if judged.annotator is not None:
            coder = self.annotators.setdefault(judged.annotator, len(self.annotators))
        if isinstance(judged, Preference):
            self._preference(judged, prompt, coder)
        elif isinstance(judged, Ranking):
            self._ranking(judged, prompt, coder)
        else:
            self._single(judged, prompt, coder)

    def _preference(self, judged: Preference, prompt: int, coder: int) -> None:
        sides = [self._response(text) for text in (judged.chosen, judged.rejected)]
        strength, tie = judged.strength, judged.strength == 0.5
        self._row("pairs", (prompt, sides[0][0], sides[1][0], tie, coder), (judged.chosen, judged.rejected))
        votes = [min(65535, count) for count in judged.votes or (0, 0, 0)]
        self._pair(prompt, sides[0], sides[1], strength, coder, votes, judged.shown)

    def _ranking(self, judged: Ranking, prompt: int, coder: int) -> None:
        sides = [self._response(text) for text in judged.responses]
        self._row("rankings", (prompt, *(side[0] for side in sides), *judged.ranks, coder), judged.responses)
        order: Sequence[int] = range(len(sides))
        if len(sides) > LONGEST_RANKING:
            self.thinned += 1
            order = [int(at) for at in np.linspace(0, len(sides) - 1, LONGEST_RANKING)]
        for better, worse in combinations(order, 2):
            strength = 1.0 if judged.ranks[better] < judged.ranks[worse] else 0.5
            self._pair(prompt, sides[better], sides[worse], strength, coder, (0, 0, 0), 0)

    def _single(self, judged: Rating | Verdict, prompt: int, coder: int) -> None:
        key, length, marks = self._response(judged.response)
        label = float(judged.good) if isinstance(judged, Verdict) else min(LARGEST, max(-LARGEST, judged.rating))
        name = "verdicts" if isinstance(judged, Verdict) else "ratings"
        row = len(self.rows) // ROW.itemsize
        self._row(name, (prompt, key, label, coder), (judged.response,))
        self.singles += _SINGLE.pack(row, prompt, key, length, label, coder, marks)

    def _pair(
        self,
        prompt: int,
        chosen: tuple[int, int, int],
        rejected: tuple[int, int, int],
        strength: float,
        coder: int,
        votes: Sequence[int],
        shown: int,
    ) -> None:
        row = len(self.rows) // ROW.itemsize - 1
        self.pairs += _PAIR.pack(
            row, prompt, chosen[0], rejected[0], chosen[1], rejected[1], strength, coder, *votes, shown,
            chosen[2], rejected[2],
        )  # fmt: skip

    def _row(self, kind: str, key: tuple[Any, ...], responses: Sequence[str]) -> None:
        """A row is the same as another where prompt, responses in their order, winner or label and annotator are."""
        self.kinds[kind] += 1
        self.rows += _ROW.pack(text_hash(repr(key)), sum(not text.strip() for text in responses))

    def _response(self, text: str) -> tuple[int, int, int]:
        """Hash, characters and marks."""
        key = text_hash(text)
        self.responses.offer(key, text)
        return key, len(text), marks_of(text)


class _Domains:
    """Extra string columns that so far hold few values."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, int]] = {}
        self.codes: dict[str, array[int]] = {}
        self.refused: set[str] = set()

    def add(self, row: Mapping[str, Any], index: int) -> None:
        for name, value in row.items():
            if name in self.refused:
                continue
            if name not in self.codes and not self._admits(name):
                continue
            if value is None or value == "":
                continue
            if not isinstance(value, str) or len(value) > 100:
                self._refuse(name)
                continue
            values, codes = self.values[name], self.codes[name]
            code = values.setdefault(value, len(values))
            if code >= VALUES:
                self._refuse(name)
                continue
            codes.extend([-1] * (index - len(codes)))
            codes.append(code)

    def found(self, rows: int) -> tuple[Domain, ...]:
        """Columns of at least two values."""
        return tuple(
            Domain(name, tuple(self.values[name]), np.array([*codes, *[-1] * (rows - len(codes))], np.int8))
            for name, codes in self.codes.items()
            if len(self.values[name]) > 1
        )

    def _admits(self, name: str) -> bool:
        judged = name.lower() in JUDGED or any(stem in name.lower() for stem in STEMS)
        if judged or len(self.codes) >= COLUMNS:
            self._refuse(name)
            return False
        self.values[name], self.codes[name] = {}, array("b")
        return True

    def _refuse(self, name: str) -> None:
        self.refused.add(name)
        self.values.pop(name, None)
        self.codes.pop(name, None)


def _distinct(*hashes: Array) -> int:
    return len(np.unique(np.concatenate(hashes)))
