"""Two answers to the same prompt that differ in what a finding is about, and what stands between them.

A finding about length sets the verbose answer against the brief one; one about refusals an answer that declines against
one that does not; one about the policy as a whole its answers against the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.behaviour import PRESENT, length_ratio
from kedge.diagnose.finding import Finding
from kedge.diagnose.margin import Margin, Pairs, margin, sampled_pairs
from kedge.diagnose.texts import column, readable
from kedge.diagnose.view import View

Array = NDArray[Any]
FEWEST = 8  # pairs; fewer say nothing
LONGER = 1.15  # times the reference's length, from where verbose against brief is what to look at
LENGTH, WHOLE = "length", ""
_PHRASE = "phrase: "


@dataclass(frozen=True)
class Contrast:
    """What `more` of the subject is called, what its opposite, and their pairs at every look that has enough."""

    subject: str  # a feature, "phrase: ..." or "" for answers as a whole
    more: str
    less: str
    being: str
    pairs: tuple[Pairs, ...]
    source: str  # where the pairs come from, a sentence; empty for probes

    @property
    def margins(self) -> tuple[Margin, ...]:
        """The matched margin of every look."""
        return tuple(one for one in map(margin, self.pairs) if one is not None)


def subject_of(found: Sequence[Finding], view: View) -> str:
    """What to set against what: the subject of the first finding that has one, else length where answers are longer
    than the reference's, else the answers as a whole."""
    named = next((one.subject for one in found if one.subject), None)
    if named is not None:
        return named
    ratio = length_ratio(view)
    looks = bool(view.samples) and "reference_kl" in view.samples[-1]
    return WHOLE if ratio is not None and ratio.values[-1] < LONGER and looks else LENGTH


def contrast_of(view: View, subject: str) -> Contrast:
    """The pairs of a subject; where the run's answers do not differ in it at any look, those of length."""
    if subject == LENGTH:
        return _of_length(view)
    pairs = _sampled(view, subject)
    if not pairs:
        return _of_length(view)
    if subject == WHOLE:
        source = "The policy's answers stand against the reference's to the same prompts."
        return Contrast(
            subject, "the policy's answer", "the reference's", "answering as the policy does", pairs, source
        )
    words = _words(subject)
    source = (
        f"Among the policy's and the reference's answers to the same prompts, one with {words} stands against one "
        "without."
    )
    return Contrast(subject, f"the answer with {words}", "the one without", f"an answer with {words}", pairs, source)


def phrase_subject(words: str) -> str:
    """The subject of a finding about a phrase."""
    return f"{_PHRASE}{words}"


def matched_pairs(view: View) -> tuple[Pairs, ...]:
    """Verbose against brief answers of the same prompts, at every look that has at least `FEWEST` of them.

    Probe pairs where the run has them; else the policy's answer against the reference's, the longer one first.
    """
    return tuple(one for one in view.pairs if len(one.score)) or _sampled(view, LENGTH)


def _of_length(view: View) -> Contrast:
    probes = any(len(one.score) for one in view.pairs)
    source = (
        ""
        if probes
        else "The run keeps no probe pairs. In their place stand the policy's and the reference's answer to the same "
        "prompt, the longer of the two for the verbose one."
    )
    return Contrast(LENGTH, "the verbose answer", "the brief one", "being verbose", matched_pairs(view), source)


def _sampled(view: View, subject: str) -> tuple[Pairs, ...]:
    found = (_of_sample(view, sample, subject) for sample in view.samples)
    return tuple(one for one in found if one is not None and len(one.score) >= FEWEST)


def _of_sample(view: View, sample: Mapping[str, Any], subject: str) -> Pairs | None:
    beta, penalty = view.metric("kl/beta"), view.metric("weight/length")
    both = _both(sample, subject)
    if beta is None or both is None or not {"reference_tokens", "reference_kl"} <= set(sample):
        return None

    def at(series: Any) -> float:
        """In force at the evaluation: after k updates, at policy step k or the last there is."""
        return float(series.values[min(np.searchsorted(series.steps, sample["step"]), len(series.steps) - 1)])

    return sampled_pairs(sample, *both, beta=at(beta), penalty=0.0 if penalty is None else -at(penalty) + 0.0)


def _both(sample: Mapping[str, Any], subject: str) -> tuple[Array, Array] | None:
    """[N] the subject in the policy's answers, and in the reference's; None where it is not known."""
    if subject == WHOLE:  # answers that are the same have the same log-ratio
        other = np.asarray(sample.get("reference_kl", np.zeros(0)), dtype=np.float64)
        return (np.asarray(sample["kl"], dtype=np.float64) != other).astype(np.float64), np.zeros(len(other))
    if subject.startswith(_PHRASE):
        sides = (sample.get("response", ()), sample.get("reference_response", ()))
        if not all(readable(texts) for texts in sides):
            return None
        own, usual = (_holding(texts, subject.removeprefix(_PHRASE)) for texts in sides)
        return own, usual
    found = [column(sample, subject, reference=reference) for reference in (False, True)]
    if found[0] is None or found[1] is None:
        return None
    if subject == LENGTH:
        return found[0], found[1]
    limit = PRESENT.get(subject, 0.0)
    return (found[0] > limit).astype(np.float64), (found[1] > limit).astype(np.float64)


def _holding(texts: Sequence[str], phrase: str) -> Array:
    """[N] 1 where the words stand in a text one after the other."""
    return np.array([float(f" {phrase} " in f" {' '.join(text.lower().split())} ") for text in texts])


def _words(subject: str) -> str:
    return f'"{subject.removeprefix(_PHRASE)}"' if subject.startswith(_PHRASE) else subject
