"""Sampled sequences of prompt and response tokens, as trainers pad and pack them, made into `Rows`.

Shared by the formats that hold token ids. Everywhere position t of a column belongs to token t; a format whose trainer
writes it otherwise shifts before it comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Intake
from kedge.importers.questions import GAMMA, LAM
from kedge.importers.records import groups
from kedge.trace.foreign import Rows, padded

Array = NDArray[Any]
LOGPROBS = ("behaviour_logprob", "old_logprob", "reference_logprob")
NO_TOKEN = "the loss took none of its tokens"
TOLERANCE = 1e-4  # of a recorded advantage, in its own unit; trainers compute in float32


class Malformed(ValueError):
    """A record is not as its format says. The message holds nothing of the row's text."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One response with its prompt: T positions, from the policy's first token through its last."""

    prompt_ids: Array  # [P]
    response_ids: Array  # [T]
    mask: Array  # [T] bool, true on the policy's tokens
    columns: Mapping[str, Array] = field(default_factory=dict)  # [T] each, under the names that Rows has
    score: float | None = None
    ended: bool | None = None
    group: Any = None  # what responses to one prompt share; None: the prompt's tokens
    prompt: str | None = None
    response: str | None = None


def cut(ids: Array, mask: Array, columns: Mapping[str, Array], **known: Any) -> Sampled:
    """The response of a sequence of N tokens: from the first to the last that `mask` [N] marks; before it, the prompt.

    What follows the policy's last token is dropped, whether it is padding or an environment's words. Raises Malformed
    where the mask marks nothing.
    """
    marked = np.flatnonzero(mask)
    if not len(marked):
        raise Malformed(NO_TOKEN)
    start, stop = int(marked[0]), int(marked[-1]) + 1
    return Sampled(
        prompt_ids=ids[:start],
        response_ids=ids[start:stop],
        mask=mask[start:stop],
        columns={name: values[start:stop] for name, values in columns.items()},
        **known,
    )


def rows_of(step: int, sampled: Sequence[Sampled], intake: Intake) -> Rows:
    """Rows of one step. A column that only some rows have is absent, and so are log-probabilities that are all zero:
    trainers write zeros for what they did not compute."""
    columns: dict[str, Any] = {name: _column(name, sampled) for name in _shared(sampled, intake)}
    for name in LOGPROBS:
        if name in columns and not any(row.columns[name][row.mask].any() for row in sampled):
            columns.pop(name)
            intake.note(
                f"{name} is zero on every token of a step: the trainer did not compute it, so it is absent there"
            )
    scores = [row.score for row in sampled]
    ended = [row.ended for row in sampled]
    return Rows(
        step=step,
        response_mask=_padded([row.mask for row in sampled], False),
        scores={} if None in scores else {"score": np.array(scores, dtype=float)},
        group=groups([row.prompt_ids.tobytes() if row.group is None else row.group for row in sampled]),
        prompts=_texts([row.prompt for row in sampled]),
        responses=_texts([row.response for row in sampled]),
        prompt_ids=_padded([row.prompt_ids for row in sampled], 0, left=True),
        prompt_mask=_padded([np.ones(len(row.prompt_ids), bool) for row in sampled], False, left=True),
        response_ids=_padded([row.response_ids for row in sampled], 0),
        ended=None if None in ended else np.array(ended, dtype=bool),
        **columns,
    )


def _shared(sampled: Sequence[Sampled], intake: Intake) -> list[str]:
    """Names of the columns that every row has."""
    names = dict.fromkeys(name for row in sampled for name in row.columns)
    everywhere = [name for name in names if all(name in row.columns for row in sampled)]
    for name in names:
        if name not in everywhere:
            intake.note(f"{name} is missing from some rows of a step, so it is absent there")
    return everywhere


def _column(name: str, sampled: Sequence[Sampled]) -> Array:
    return _padded([row.columns[name] for row in sampled], False if name == "active" else 0.0)


def _padded(lists: list[Any], fill: Any, *, left: bool = False) -> Array:
    return padded(lists, fill=fill, left=left)


def _texts(texts: Sequence[str | None]) -> list[str] | None:
    known = [text for text in texts if text is not None]
    return known if len(known) == len(texts) else None


# Values of a record


def token_ids(value: Any, name: str) -> Array:
    """[N] token ids. Raises Malformed for anything else."""
    ids = _array(value)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") or not ((ids >= 0) & (ids < 2**31)).all():
        raise Malformed(f"{name} is no list of token ids")
    return ids.astype(np.int64)


def numbers(value: Any, name: str, length: int) -> Array:
    """[length] numbers; null is nan. Raises Malformed for anything else."""
    given = _array(value)
    if given.dtype.kind == "O" and all(one is None or _number(one) for one in given.flat):
        given = given.astype(float)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iuf"):
        raise Malformed(f"{name} is no list of numbers")
    return _of_length(given.astype(float), name, length)


def flags(value: Any, name: str, length: int) -> Array:
    """[length] booleans, from booleans or from 0 and 1. Raises Malformed for anything else."""
    given = _array(value)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "biuf") or not np.isin(given, (0, 1)).all():
        raise Malformed(f"{name} is no list of 0 and 1")
    return _of_length(given.astype(bool), name, length)


def _array(value: Any) -> Array:
    """A list as an array; one without dimensions for everything else, lists of lists of unequal length included."""
    try:
        return np.asarray(value) if isinstance(value, list | np.ndarray) else np.asarray("")
    except ValueError:
        return np.asarray("")


def number(value: Any, name: str) -> float:
    """One finite number. Raises Malformed for anything else."""
    if not _number(value) or not np.isfinite(value):
        raise Malformed(f"{name} is not a finite number")
    return float(value)


def count(value: Any, name: str) -> int:
    """One whole number of at least 0. Raises Malformed for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"{name} is no whole number of at least 0")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _of_length(given: Array, name: str, length: int) -> Array:
    if len(given) != length:
        raise Malformed(f"{name} has {len(given)} entries, expected {length}")
    return given


# What a step itself tells

# A group's baseline credits each token with the whole response: then gamma and lambda do nothing, and are not asked.
WITHOUT_BASELINE = ("normalisation", ("none", "unknown"))
DISCOUNTS = (replace(GAMMA, only_if=WITHOUT_BASELINE), replace(LAM, only_if=WITHOUT_BASELINE))


def told_normalisation(rows: Rows) -> Answers:
    """The answer to `normalisation`, where exactly one formula gives the recorded advantages of this step.

    Looks at groups of two and more whose scores differ, and at advantages that are one number over a response, as
    group baselines make them. Deviations over n and over n - 1 are tried. {} where nothing or more than one fits.
    """
    if rows.group is None or rows.advantage is None or "score" not in rows.scores:
        return {}
    advantage = _per_response(np.asarray(rows.advantage), np.asarray(rows.response_mask))
    if advantage is None:
        return {}
    score, group = np.asarray(rows.scores["score"]), np.asarray(rows.group)
    fits = dict.fromkeys(_formulae(score), True)
    looked = 0
    for key in np.unique(group):
        scores, recorded = score[group == key], advantage[group == key]
        if len(scores) > 1 and np.ptp(scores) > 10 * TOLERANCE and np.any(recorded):
            looked += 1
            for name, given in _formulae(scores).items():
                fits[name] &= bool(np.allclose(given, recorded, rtol=1e-3, atol=TOLERANCE))
    answers = {name.partition("/")[0] for name, good in fits.items() if good}
    return {"normalisation": answers.pop()} if looked and len(answers) == 1 else {}


def _formulae(scores: Array) -> dict[str, Array]:
    """Advantages [G] of the scores [G] of one prompt's responses."""
    centred = scores - scores.mean()
    size = len(scores)
    others = max(size - 1, 1)
    return {
        "none": scores,
        "group-mean": centred,
        "leave-one-out": centred * size / others,
        "group-mean-and-deviation/n": centred / max(float(scores.std()), 1e-12),
        "group-mean-and-deviation/n-1": centred / max(float(scores.std() * np.sqrt(size / others)), 1e-12),
    }


def _per_response(advantage: Array, mask: Array) -> Array | None:
    """[B] the advantage of each response, or None where it differs between its tokens."""
    if advantage.ndim == 1:
        return advantage
    means: Array = np.where(mask, advantage, 0.0).sum(axis=1) / mask.sum(axis=1)
    return means if np.allclose(np.where(mask, advantage - means[:, None], 0.0), 0.0, atol=TOLERANCE) else None


# Words


def nothing_found(path: Path, what: str, expected: str) -> InputError:
    """There is nothing of the format under `path`."""
    return InputError(Problem(str(path), what, f"expected: {expected}"))
