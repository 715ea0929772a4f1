"""What people said, brought to one form: distinct answers, and comparisons between two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kedge.data.records import Judgment, Preference, Prompt, Ranking, graded, prompt_text
from kedge.evaluate.intervals import Floats, Integers

Answer = tuple[Prompt, str]

Scorer = Callable[[Sequence[Answer]], ArrayLike]
"""Scores [n] of answers, higher for better; NaN for an answer that cannot be read, such as one past the context."""

MAX_GRADED = 40  # answers of one prompt that are compared with one another where people graded them one by one


@dataclass(frozen=True)
class NotChecked:
    """A figure that could not be had, and why."""

    not_checked: str


@dataclass(frozen=True)
class Reading:
    """What a judge says of n answers, in one go; NaN in every field for an answer that it cannot read."""

    score: Floats  # [n]
    members: Floats | None = None  # [n, M] of an ensemble, each in its own unit
    distance: Floats | None = None  # [n] from what the judge was trained on


@dataclass(frozen=True)
class RewardJudge:
    """Something that scores answers, and what else is known of it.

    A difference of two scores times `log_odds` is meant as the log-odds of being preferred, where that is known.
    `tokens` counts those of responses; `knows` says whether it has words for a text. One in a hundred answers like
    those trained on lies beyond `limit`.
    """

    name: str
    read: Callable[[Sequence[Answer]], Reading]
    log_odds: float | None = None
    tokens: Callable[[Sequence[str]], Floats] | None = None
    knows: Callable[[str], bool] = bool
    limit: float | None = None

    def score(self, answers: Sequence[Answer]) -> Floats:
        """[n] see `Scorer`."""
        return self.read(answers).score

    @classmethod
    def of(cls, name: str, scorer: Scorer, log_odds: float | None = None) -> RewardJudge:
        """A judge of which only scores are known."""
        return cls(name, lambda answers: Reading(np.asarray(scorer(answers), dtype=np.float64)), log_odds)


@dataclass(frozen=True)
class Judged:
    """A distinct answers and N comparisons of two of them, the one that more people preferred first."""

    answers: tuple[Answer, ...]
    prompt: Integers  # [A] number of the answer's prompt
    grade: Floats  # [A] mean rating or verdict; NaN where nobody gave one
    first: Integers  # [N] row of `answers`
    second: Integers  # [N]
    share: Floats  # [N] of the votes for the first, 0.5 to 1
    verdicts: bool  # whether grades are shares of people who called the answer good

    @property
    def decided(self) -> NDArray[np.bool_]:
        """[N] comparisons between different texts that are not tied."""
        return np.asarray((self.share > 0.5) & (self.first != self.second))

    @property
    def pair_prompt(self) -> Integers:
        """[N] number of the comparison's prompt."""
        return np.asarray(self.prompt[self.first])

    @property
    def characters(self) -> Floats:
        """[A] length of each response in characters."""
        return lengths(self.answers)

    def where(self, keep: NDArray[np.bool_]) -> Judged:
        """The comparisons [N] to keep; the answers stay."""
        pairs = self.first[keep], self.second[keep], self.share[keep]
        return Judged(self.answers, self.prompt, self.grade, *pairs, self.verdicts)


def judged(rows: Sequence[Judgment], groups: Sequence[str] | None = None) -> Judged:
    """The rows as comparisons; every two responses of a ranking, and of answers to one prompt graded apart, are one.

    `groups` names for each row what is to be resampled and held out together; the prompt if absent.
    """
    names = [prompt_text(row.prompt) for row in rows] if groups is None else list(groups)
    table = _Table()
    graded_apart = False
    for row, name in zip(rows, names, strict=True):
        if isinstance(row, Preference | Ranking):
            texts, grades = graded(row)
            at = [table.answer(row.prompt, text, name) for text in texts]
            table.compare(at, grades, row.strength if isinstance(row, Preference) else None)
        else:
            graded_apart = True
            table.grade(table.answer(row.prompt, row.response, name), graded(row)[1][0])
    if graded_apart:
        table.compare_graded()
    return table.judged(verdicts=graded_apart and all(grade in (0.0, 1.0) for _, grade in table.grades))


class _Table:
    """Answers and comparisons under way."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], int] = {}
        self.answers: list[Answer] = []
        self.groups: dict[str, int] = {}
        self.prompt: list[int] = []
        self.grades: list[tuple[int, float]] = []
        self.pairs: list[tuple[int, int, float]] = []

    def answer(self, prompt: Prompt, text: str, group: str) -> int:
        key = prompt_text(prompt), text
        if key not in self.rows:
            self.rows[key] = len(self.answers)
            self.answers.append((prompt, text))
            self.prompt.append(self.groups.setdefault(group, len(self.groups)))
        return self.rows[key]

    def compare(self, at: Sequence[int], grades: Sequence[float], strength: float | None) -> None:
        for i, j in combinations(range(len(at)), 2):
            share = strength if strength is not None else 0.5 + 0.5 * float(np.sign(grades[i] - grades[j]))
            pair = (at[i], at[j], share) if share >= 0.5 else (at[j], at[i], 1 - share)
            self.pairs.append(pair)

    def grade(self, at: int, grade: float) -> None:
        self.grades.append((at, grade))

    def compare_graded(self) -> None:
        """Answers to one prompt by their mean grades; of very many, those with the smallest hashes."""
        means = self.means()
        of_prompt: dict[str, list[int]] = {}
        for (prompt, _), at in self.rows.items():
            if np.isfinite(means[at]):
                of_prompt.setdefault(prompt, []).append(at)
        for rows in of_prompt.values():
            kept = sorted(rows, key=lambda at: _digest(self.answers[at]))[:MAX_GRADED]
            self.compare(kept, [float(means[at]) for at in kept], None)

    def means(self) -> Floats:
        at = np.array([row for row, _ in self.grades], dtype=np.int64)
        grades = np.array([grade for _, grade in self.grades], dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return np.asarray(
                np.bincount(at, grades, minlength=len(self.answers)) / np.bincount(at, minlength=len(self.answers))
            )

    def judged(self, *, verdicts: bool) -> Judged:
        columns = list(zip(*self.pairs, strict=True)) if self.pairs else [(), (), ()]
        return Judged(
            answers=tuple(self.answers),
            prompt=np.array(self.prompt, dtype=np.int64),
            grade=self.means(),
            first=np.array(columns[0], dtype=np.int64),
            second=np.array(columns[1], dtype=np.int64),
            share=np.array(columns[2], dtype=np.float64),
            verdicts=verdicts,
        )


def _digest(answer: Answer) -> bytes:
    text = f"{prompt_text(answer[0])}\0{answer[1]}"
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def sample(table: Judged, count: int) -> Integers:
    """About `count` rows of `answers`, spread evenly over prompts and chosen by hash; empty responses left out."""
    of_prompt: dict[int, list[int]] = {}
    order = sorted(range(len(table.answers)), key=lambda at: _digest(table.answers[at]))
    for at in order:
        if table.answers[at][1].strip():
            of_prompt.setdefault(int(table.prompt[at]), []).append(at)
    each = -(-count // max(1, len(of_prompt)))
    kept = [at for rows in list(of_prompt.values())[:count] for at in rows[:each]]
    return np.array(sorted(kept), dtype=np.int64)


def lengths(answers: Sequence[Answer]) -> Floats:
    """[n] characters of the responses: the scores of a judge that prefers the longer one."""
    return np.array([len(text) for _, text in answers], dtype=np.float64)


LENGTH = RewardJudge.of("length", lengths)
