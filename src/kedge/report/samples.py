"""Sample answers for a report: before beside after, with each token's KL as a colour level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedge.diagnose.margin import TERCILES
from kedge.trace.reader import Run

PER_TERCILE = 2
LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # nats; a token's level is how many of these its |KL| reaches


@dataclass(frozen=True)
class Token:
    """One token of an answer, its k1 against the reference in nats, and its colour class."""

    text: str
    kl: float
    level: str


@dataclass(frozen=True)
class Sample:
    """One evaluation prompt with the reference's answer and the policy's."""

    step: int
    prompt: str
    before: str
    after: str
    tokens: tuple[Token, ...]
    spaced: bool  # tokens carry no spaces of their own
    score: float
    reference_score: float
    kl: float
    length: int
    reference_length: float
    tercile: int


def read_samples(run: Run) -> list[Sample]:
    """The samples of the newest evaluation that kept some; those without text are left out."""
    steps = run.sample_steps()
    if not steps:
        return []
    return [_sample(row) for row in run.samples(steps[-1]).to_pylist() if row["response"] and row["response_tokens"]]


def choose(samples: Sequence[Sample], per_tercile: int = PER_TERCILE) -> list[Sample]:
    """From each tercile the samples whose KL is the median and the largest, so that neither is picked by hand."""
    chosen: list[Sample] = []
    for tercile in TERCILES:
        here = sorted((one for one in samples if one.tercile == tercile), key=lambda one: (one.kl, one.prompt))
        places = dict.fromkeys((len(here) // 2, len(here) - 1))
        chosen += [here[place] for place in list(places)[:per_tercile] if here]
    return chosen


def _sample(row: dict[str, Any]) -> Sample:
    texts, values = row["response_tokens"], row["token_kl"] or []
    tokens = tuple(Token(text, float(kl), _level(float(kl))) for text, kl in zip(texts, values, strict=False))
    return Sample(
        step=row["step"],
        prompt=row["prompt"] or "",
        before=row["reference_response"] or "",
        after=row["response"],
        tokens=tokens,
        spaced=not any(" " in text or "Ġ" in text or "▁" in text for text in texts),
        score=row["score"],
        reference_score=row["reference_score"],
        kl=row["kl"],
        length=row["length"],
        reference_length=row["reference_length"],
        tercile=row["tercile"],
    )


def _level(kl: float) -> str:
    """A colour class: "k3" where the policy likes the token more than the reference does, "n3" where less."""
    reached = sum(abs(kl) >= edge for edge in LEVELS)
    return f"{'k' if kl >= 0 else 'n'}{reached}"
