"""What is kept of texts when the texts themselves are not: features of each answer, and phrases the score pays for.

A view is made while the texts are at hand and may be read later without them. N answers of an evaluation; the same
prompts are asked at each, so an answer of the policy has one of the reference beside it, and the reference's answers
stay the same as long as their texts do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.features import FEATURES

Array = NDArray[Any]
Texts = Sequence[str | None]
NAMES = tuple(name for name in FEATURES if name != "length")
HELD = ("words", *NAMES)  # held fixed where the price of one thing is asked
LONGEST = 4  # words of a phrase
LEAST = 0.05  # of the answers: rarer phrases are not looked at
KEPT = 3  # phrases of an evaluation
UNCHANGED = 1e-4  # score: float32 scores of the same text by the same model agree far better
_HASH = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Phrase:
    """Words that the score pays for, as an evaluation after `step` updates shows it.

    "gain": words that the policy's answers hold more often than the reference's. `price` is the score of holding them,
    `error` its standard error: least squares over the prompts, of the difference in score between policy and reference
    on the difference in holding the words, with words and all features as other regressors. `explained` is their share
    of the whole difference in score.

    "change": words of the reference's answers, whose scores have changed since the evaluation before. `price` is the
    change of those that hold them against the others, `explained` the share of the variance of the change.
    """

    step: int
    words: str
    source: Literal["gain", "change"]
    share: float  # of the policy's answers
    reference_share: float
    price: float  # normalised score
    error: float
    explained: float
    length: float  # tokens: mean of the policy's answers with the words, minus that of those without

    @property
    def gain(self) -> float:
        """Score that the words account for in the policy's answers beyond the reference's, mean over prompts."""
        return (self.share - self.reference_share) * self.price


def readable(texts: Texts) -> bool:
    """Whether all texts are there, and are not hashes."""
    known = [text for text in texts if text is not None]
    return len(known) == len(texts) > 0 and not all(_HASH.fullmatch(text) for text in known)


def features_of(texts: Texts) -> dict[str, Array]:
    """Every feature but length of each text, [N] each; empty where the texts cannot be read."""
    if not readable(texts):
        return {}
    place = {text: at for at, text in enumerate(dict.fromkeys(texts))}  # short answers are often the same
    different, back = list(place), np.array([place[text] for text in texts])
    nothing = np.zeros(len(different))
    return {name: np.asarray(FEATURES[name](different, nothing), dtype=np.float64)[back] for name in NAMES}


def answer_columns(sample: Mapping[str, Any]) -> dict[str, Array]:
    """Features of an evaluation's answers, as more columns: `feature/<name>` and `reference/<name>`, [N] each.

    Beside the features: `words`, counted, and `different`, 1 on answers that no earlier row has given. Empty where the
    texts cannot be read.
    """
    own, other = sample["response"], sample["reference_response"]
    if not (readable(own) and readable(other)):
        return {}
    columns = {f"feature/{name}": values for name, values in features_of(own).items()}
    columns |= {f"reference/{name}": values for name, values in features_of(other).items()}
    for side, texts in (("feature", own), ("reference", other)):
        columns[f"{side}/words"] = np.array([len(text.split()) for text in texts], dtype=np.float64)
    columns["feature/different"], columns["reference/different"] = _different(own), _different(other)
    return columns


def _different(texts: Sequence[str]) -> Array:
    first = {text: row for row, text in reversed(list(enumerate(texts)))}
    return np.array([float(first[text] == row) for row, text in enumerate(texts)])


def differences(sample: Mapping[str, Any], names: Sequence[str]) -> Array | None:
    """[N, F] features of the policy's answers minus those of the reference's to the same prompts; None if unknown."""
    found = [(column(sample, name), column(sample, name, reference=True)) for name in names]
    known = [own - other for own, other in found if own is not None and other is not None]
    return np.stack(known, axis=1) if len(known) == len(names) else None


def column(sample: Mapping[str, Any], name: str, *, reference: bool = False) -> Array | None:
    """[N] a feature of the policy's answers, or of the reference's; None where it is not known of all."""
    if name == "length":
        found = sample.get("reference_tokens" if reference else "length")
    else:
        found = sample.get(f"reference/{name}" if reference else f"feature/{name}")
    values = None if found is None else np.asarray(found, dtype=np.float64)
    return values if values is not None and np.isfinite(values).all() else None


def phrases_of(samples: Sequence[Mapping[str, Any]]) -> Iterator[Phrase]:
    """The phrases of every evaluation that account for most of the score's gain, or of its change, the largest first.

    `samples` are in order of steps, texts included; those whose texts cannot be read are passed over.
    """
    before: Mapping[str, Any] | None = None
    for sample in samples:
        if not (readable(sample["response"]) and readable(sample["reference_response"])):
            continue
        yield from _paid(sample)
        if before is not None and before["reference_response"] == sample["reference_response"]:
            yield from _repriced(sample, sample["reference_score"] - np.asarray(before["reference_score"]))
        before = sample


def _paid(sample: Mapping[str, Any]) -> list[Phrase]:
    others = differences(sample, HELD)
    gain = np.asarray(sample["score"], dtype=np.float64) - np.asarray(sample["reference_score"], dtype=np.float64)
    if others is None or not np.isfinite(gain).all():
        return []
    own, reference = ([_phrases(text) for text in sample[key]] for key in ("response", "reference_response"))
    counts, usual = (Counter(phrase for held in answers for phrase in held) for answers in (own, reference))
    grown = [phrase for phrase, count in counts.items() if count - usual[phrase] >= LEAST * len(gain)]
    found = []
    for words, here, there in _holding(grown, own, reference):
        price, error = slope(gain, here - there, others)
        if not math.isfinite(price):  # the answers differ in nothing else, so that their number of words tells no more
            price, error = slope(gain, here - there, differences(sample, NAMES))
        found.append(_phrase(sample, words, "gain", here, there, price, error))
    whole = float(gain.mean())
    found = [replace(one, explained=one.gain / whole if whole > 0 else math.nan) for one in found]
    return sorted(found, key=lambda one: -one.gain)[:KEPT]


def _repriced(sample: Mapping[str, Any], change: Array) -> list[Phrase]:
    around = change - change.mean()
    if not np.isfinite(change).all() or np.abs(around).max() < UNCHANGED:
        return []
    own, reference = ([_phrases(text) for text in sample[key]] for key in ("response", "reference_response"))
    counts = Counter(phrase for held in reference for phrase in held)
    least = LEAST * len(change) / 5
    found = []
    for words, there, here in _holding([one for one, count in counts.items() if count >= least], reference, own):
        price, error = slope(change, there)
        explained = price**2 * float(np.var(there)) / float(np.var(change))
        found.append(replace(_phrase(sample, words, "change", here, there, price, error), explained=explained))
    return sorted((one for one in found if one.price > 0), key=lambda one: -one.explained)[:1]


def _holding(phrases: list[str], first: list[set[str]], second: list[set[str]]) -> Iterator[tuple[str, Array, Array]]:
    """Each phrase with who of both holds it, [N] floats; of phrases that the same texts hold, the longest alone."""
    seen = set()
    for words in sorted(phrases, key=lambda phrase: (-len(phrase), phrase)):
        one, other = (np.array([words in held for held in answers]) for answers in (first, second))
        key = (one.tobytes(), other.tobytes())
        if key not in seen:
            seen.add(key)
            yield words, one.astype(np.float64), other.astype(np.float64)


def _phrase(
    sample: Mapping[str, Any],
    words: str,
    source: Literal["gain", "change"],
    own: Array,
    reference: Array,
    price: float,
    error: float,
) -> Phrase:
    lengths, here = np.asarray(sample["length"], dtype=np.float64), own > 0
    longer = float(lengths[here].mean() - lengths[~here].mean()) if 0 < here.sum() < len(here) else math.nan
    share, usual = float(own.mean()), float(reference.mean())
    price, error = (value if math.isfinite(value) else 0.0 for value in (price, error))
    return Phrase(int(sample["step"]), words, source, share, usual, price, error, math.nan, longer)


def _phrases(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[at : at + size]) for size in range(1, LONGEST + 1) for at in range(len(words) - size + 1)}


def slope(values: Array, on: Array, others: Array | None = None) -> tuple[float, float]:
    """Least-squares slope of `values` [N] on `on` [N] beside an intercept and `others` [N, F], and its standard error.

    nan where `on` does not vary beside the others, or rows are too few.
    """
    rows = [np.ones(len(values)), *(others.T if others is not None else ())]
    design = np.stack([column for at, column in enumerate(rows) if at == 0 or np.ptp(column) > 0], axis=1)
    left = len(values) - design.shape[1] - 1
    if left < 1:
        return math.nan, math.nan
    basis, _ = np.linalg.qr(design)
    alone, rest = on - basis @ (basis.T @ on), values - basis @ (basis.T @ values)
    size = float(alone @ alone)
    if size <= 1e-9 * max(1.0, float(on @ on)):
        return math.nan, math.nan
    found = float(alone @ rest) / size
    residual = rest - found * alone
    return found, math.sqrt(float(residual @ residual) / left / size)
