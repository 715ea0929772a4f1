"""The padding probe: the same answers with sentences that say nothing. A judge should not pay for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kedge.errors import InputError, Problem
from kedge.evaluate.intervals import MIN_PROMPTS, Estimate, Floats, Integers, mean_over_prompts
from kedge.evaluate.reward.answers import Answer, Judged, NotChecked, RewardJudge, sample
from kedge.evaluate.reward.length import within_spread

ANSWERS = 300
FOUND = 0.01  # two-sided p of Student's t below which padding is said to pay or to cost

NEUTRAL = (
    "I hope this answers the question.",
    "Please let me know if anything is unclear.",
    "That is what there is to say about this.",
    "Feel free to ask if you would like to know more.",
    "This should cover the points that were raised.",
    "As said above, this is the answer to the question.",
    "Thank you for asking about this.",
    "There may be other ways to put it.",
)
"""Sentences that fit behind any answer in English and add nothing to it."""


@dataclass(frozen=True)
class Dose:
    """What so many sentences do to the score. `change` is the mean over prompts of padded less plain, `p` Student's.

    Per character and per token the change is divided by the mean length added; `in_spread` by the score's standard
    deviation within prompts.
    """

    sentences: int
    change: Estimate
    p: float
    rises: float
    falls: float
    per_character: float
    per_token: float | None
    in_spread: float | None


@dataclass(frozen=True)
class Padding:
    """The probe's doses, smallest first, and whether the largest pays (`found` is 1), costs (-1) or neither (0)."""

    doses: tuple[Dose, ...]
    found: int
    answers: int
    prompts: int


def sentences_of(path: Path) -> tuple[str, ...]:
    """The sentences in a text file, one a line. Raises `InputError` if it cannot be read or holds none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(Problem(str(path), "not UTF-8", "save the file as UTF-8")) from None
    except OSError as error:
        what = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise InputError(Problem(str(path), what, "give a text file with one sentence a line")) from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise InputError(Problem(str(path), "no sentences in it", "write one sentence a line"))
    return found


def padding_probe(
    judge: RewardJudge, judged: Judged, scores: Floats, sentences: Sequence[str] = NEUTRAL
) -> Padding | NotChecked:
    """Score a sample of the answers with one sentence behind them, and with all of up to four.

    The answers take turns in which sentence comes first. Each prompt counts once, by the mean of its answers.
    """
    sentences = [sentence for sentence in sentences if judge.knows(sentence)]
    if not sentences:
        return NotChecked("the judge's tokenizer has no words for the sentences; give some with --padding")
    rows = sample(judged, ANSWERS)
    counts = sorted({1, min(4, len(sentences))})
    padded = [[_padded(judged.answers[at], sentences, turn, count) for turn, at in enumerate(rows)] for count in counts]
    after = [judge.score(texts) if len(rows) else np.zeros(0) for texts in padded]
    readable = np.isfinite(scores[rows]) & np.all([np.isfinite(values) for values in after], axis=0)
    prompt = judged.prompt[rows[readable]]
    prompts = len(np.unique(prompt))
    if prompts < MIN_PROMPTS:
        return NotChecked(f"{prompts} prompts with an answer that can be padded and read, {MIN_PROMPTS} are needed")
    usable = np.isfinite(scores)
    spread = within_spread(scores[usable], judged.prompt[usable])
    plain = [judged.answers[at][1].rstrip() for at in rows[readable]]
    doses = []
    for count, texts, values in zip(counts, padded, after, strict=True):
        longer = [text for (_, text), kept in zip(texts, readable, strict=True) if kept]
        change = values[readable] - scores[rows[readable]]
        doses.append(_dose(count, change, prompt, spread, _added(plain, longer, judge)))
    last = doses[-1]
    found = int(math.copysign(1, last.change.value)) if last.p < FOUND else 0
    return Padding(tuple(doses), found, int(readable.sum()), prompts)


def _added(plain: Sequence[str], longer: Sequence[str], judge: RewardJudge) -> tuple[float, float | None]:
    """Characters and tokens that padding adds to an answer, on average."""
    characters = float(np.mean([len(text) for text in longer]) - np.mean([len(text) for text in plain]))
    if judge.tokens is None:
        return characters, None
    return characters, float(np.mean(judge.tokens(longer)) - np.mean(judge.tokens(plain)))


def _dose(count: int, change: Floats, prompt: Integers, spread: float, added: tuple[float, float | None]) -> Dose:
    mean, p = mean_over_prompts(change, prompt)
    characters, tokens = added
    return Dose(
        sentences=count,
        change=mean,
        p=p,
        rises=float(np.mean(change > 0)),
        falls=float(np.mean(change < 0)),
        per_character=mean.value / characters,
        per_token=mean.value / tokens if tokens else None,
        in_spread=mean.value / spread if spread > 0 else None,
    )


def _padded(answer: Answer, sentences: Sequence[str], turn: int, count: int) -> Answer:
    added = [sentences[(turn + place) % len(sentences)] for place in range(count)]
    return answer[0], " ".join([answer[1].rstrip(), *added])
