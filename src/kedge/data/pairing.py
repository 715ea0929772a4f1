"""Judgments of other kinds as pairs: every two responses of a ranking, and every two that one annotator graded alike.

Grades are compared only within a prompt and an annotator: what one calls a 3 may be another's 4.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations

from kedge.data.records import Judgment, Preference, Ranking, Rating, Verdict

Item = tuple[str, Judgment]
ALONE = "no other response to the prompt is judged by that annotator"
SAME = "both sides are the same text"


def group_sizes(judgments: Iterable[Item]) -> Counter[bytes]:
    """How many ratings or verdicts each prompt and annotator have, under a short hash of the two."""
    return Counter(_group(judgment) for _, judgment in judgments if isinstance(judgment, Rating | Verdict))


def paired(
    judgments: Iterable[Item], sizes: Counter[bytes], left_out: Counter[str]
) -> Iterator[tuple[str, Preference]]:
    """All pairs, ties included, with the line of the judgment that completed them.

    A group of grades is held until its last one has come, as `sizes` counts them. What makes no pair is counted in
    `left_out`. The margin of two ratings is their difference.
    """
    waiting: dict[bytes, list[Rating | Verdict]] = {}
    for where, judgment in judgments:
        if isinstance(judgment, Preference):
            yield where, judgment
        elif isinstance(judgment, Ranking):
            yield from ((where, pair) for pair in _of_ranking(judgment))
        else:
            key = _group(judgment)
            group = waiting.setdefault(key, [])
            group.append(judgment)
            if len(group) == sizes[key]:
                yield from ((where, pair) for pair in _of_group(waiting.pop(key), left_out))


def _of_ranking(ranking: Ranking) -> Iterator[Preference]:
    ranked = zip(ranking.responses, ranking.ranks, strict=True)
    for (better, above), (worse, below) in combinations(ranked, 2):
        strength = 0.5 if above == below else 1.0
        yield Preference(ranking.prompt, better, worse, strength, annotator=ranking.annotator)


def _of_group(group: list[Rating | Verdict], left_out: Counter[str]) -> Iterator[Preference]:
    if len(group) == 1:
        left_out[ALONE] += 1
    for first, second in combinations(group, 2):
        if first.response == second.response:
            left_out[SAME] += 1
            continue
        better, worse = (first, second) if _grade(first) >= _grade(second) else (second, first)
        strength = 0.5 if _grade(better) == _grade(worse) else 1.0
        margin = _grade(better) - _grade(worse) if isinstance(better, Rating) else None
        yield Preference(better.prompt, better.response, worse.response, strength, margin, annotator=better.annotator)


def _grade(judgment: Rating | Verdict) -> float:
    return judgment.rating if isinstance(judgment, Rating) else float(judgment.good)


def _group(judgment: Rating | Verdict) -> bytes:
    return hashlib.blake2b(repr((judgment.prompt, judgment.annotator)).encode(), digest_size=16).digest()
