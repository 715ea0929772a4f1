"""One step of any trainer as rows of a Kedge trace. What the trainer does not tell stays absent.

Dimensions: B responses, P prompt tokens, T response tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.trace.arrays import padded, to_array
from kedge.trace.conventions import UNKNOWN, Conventions
from kedge.trace.explained import CRITIC, KL, REST, Parts, explain
from kedge.trace.schema import TOKEN_FLOATS
from kedge.trace.writer import StepRecord

__all__ = ["Conventions", "Rows", "as_record", "checked", "padded", "to_array"]

Array = NDArray[Any]
SCORE = "score"
PENALTIES = ("missing_eos", "length")  # channels that Kedge has itself
RESERVED = (KL, CRITIC, REST, "whitening")  # parts of the advantage that are no score
ESTIMATES: Mapping[str, Callable[[Array], Array]] = {
    "k1": lambda k1: k1,
    "k2": lambda k1: k1**2 / 2,
    "k3": lambda k1: np.expm1(-k1) + k1,
    "abs": np.abs,
}
"""KL per token from k1 = log policy - log reference, in nats; Schulman (2020)."""
_PER_TOKEN = ("response_ids", "active", "values", *TOKEN_FLOATS)


@dataclass(frozen=True)
class Rows:
    """One step of a foreign run; None where the trainer does not tell.

    Arrays may be anything that `to_array` takes. Prompts are padded on the left, responses on the right;
    `response_mask` may have holes. Entries outside the mask are not looked at, but for the value after the last token
    where scores lie there.
    """

    step: int
    response_mask: Any  # [B, T] bool
    scores: Mapping[str, Any]  # [B] per response, or [B, T] per token, in the score's own unit; nan: not scored
    weights: Mapping[str, float] = field(default_factory=dict)  # reward per unit of a score, 1 where not named
    group: Any | None = None  # [B] responses to one prompt share a number or a name
    prompts: Sequence[str] | None = None  # [B] texts
    responses: Sequence[str] | None = None  # [B] texts
    prompt_ids: Any | None = None  # [B, P]
    prompt_mask: Any | None = None  # [B, P] bool
    response_ids: Any | None = None  # [B, T]
    ended: Any | None = None  # [B] bool: closed with EOS within the budget
    behaviour_logprob: Any | None = None  # [B, T] nats, of the sampler
    old_logprob: Any | None = None  # [B, T] nats, of the policy before the update
    reference_logprob: Any | None = None  # [B, T] nats
    new_logprob: Any | None = None  # [B, T] nats, of the policy as the update last saw it
    old_eos_logprob: Any | None = None  # [B, T] nats, of ending here instead
    reference_eos_logprob: Any | None = None  # [B, T] nats
    entropy: Any | None = None  # [B, T] nats, of the distribution before the token
    active: Any | None = None  # [B, T] bool: the clip let the token's gradient through
    values: Any | None = None  # [B, T] reward; a scalar critic, before the token
    advantage: Any | None = None  # [B] or [B, T] as the loss used it
    beta: float | None = None  # of this step, where it moves
    policy_version: int | None = None  # updates behind the sampling weights


def checked(rows: Rows, *, copy: bool = False) -> Rows:
    """The rows as NumPy arrays with the shapes that belong together; with `copy` none is shared with the caller.

    Raises `InputError` that names every field whose shape or content cannot be used.
    """
    problems: list[str] = []

    def array(name: str, given: Any) -> Array | None:
        try:
            found = to_array(given)
            if found.dtype.kind not in "biuf" and name != "group":
                found = found.astype(np.float64)  # None becomes nan
            return np.array(found) if copy else found
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"{name} cannot be read as an array: {str(error).splitlines()[0]}")
            return None

    given = {name: getattr(rows, name) for name in _ARRAYS}
    arrays: dict[str, Any] = {name: None if one is None else array(name, one) for name, one in given.items()}
    for name in ("prompts", "responses"):
        texts = getattr(rows, name)
        arrays[name] = list(texts) if copy and texts is not None and not isinstance(texts, str) else texts
    scores = {str(name): array(f"scores[{name!r}]", one) for name, one in rows.scores.items()}
    if not problems:
        found = replace(rows, **arrays, scores=scores, weights=dict(rows.weights))
        problems += _problems(found)
    if problems:
        remedy = "see Rows in docs/recording.md"
        raise InputError([Problem(f"step {rows.step}", problem, remedy) for problem in problems])
    return replace(found, response_mask=found.response_mask.astype(bool))


def as_record(rows: Rows, conventions: Conventions) -> StepRecord:
    """The rows as a trace holds them: channels whose parts sum to the advantage that the trainer used.

    Channels are the scores (a single one is called "score"), `kl` with -beta where it is charged in the reward and 0
    where it is not, `critic` for the values of a scalar critic, and `rest` where the advantage is not what these give
    under the conventions. Without an advantage it is derived where the conventions are enough for that, else absent.
    Raises `InputError` where shapes do not fit, or values stand beside a group's baseline.
    """
    rows, conventions = checked(rows), in_force(conventions, rows)
    if rows.values is not None and conventions.baseline:
        what = f"there are values of a critic, but the advantage is said to be {conventions.normalisation!r}"
        raise InputError(Problem(f"step {rows.step}", what, "state one of them in Conventions"))
    mask, group = rows.response_mask, _group(rows)
    advantage = _advantage(rows)
    absent = _absent(rows, conventions, group, known=advantage is not None)
    stated = replace(conventions, normalisation=UNKNOWN) if "advantage" in absent else conventions
    found = explain(_parts(rows, conventions), stated, group, advantage)
    parts, batch = found.parts, len(mask)
    unknown = np.full(mask.shape, np.nan, dtype=np.float32)
    tokens = {name: unknown if name in absent else getattr(rows, name) for name in TOKEN_FLOATS}
    prompt_mask = rows.prompt_mask
    if rows.prompt_ids is not None and prompt_mask is None:
        prompt_mask = np.ones(rows.prompt_ids.shape, dtype=bool)
    return StepRecord(
        step=int(rows.step),
        policy_version=-1 if rows.policy_version is None else int(rows.policy_version),
        channels=parts.names,
        gamma=parts.gamma,
        lam=parts.lam,
        critic="none" if rows.values is None else "scalar",
        group=np.arange(batch) if group is None else group,
        prompt_ids=rows.prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=rows.response_ids,
        response_mask=mask,
        ended=np.zeros(batch, dtype=bool) if rows.ended is None else rows.ended.astype(bool),
        active=np.zeros(mask.shape, dtype=bool) if rows.active is None else rows.active.astype(bool),
        **tokens,
        rewards=parts.rewards,
        values=parts.values,
        weights=parts.weights,
        shift=found.shift,
        scale=found.scale,
        advantage=found.advantage() if advantage is None else advantage,
        loss_beta=np.full(batch, _loss_beta(conventions)),
        learning=conventions.learning(),
        prompts=rows.prompts,
        responses=rows.responses,
        absent=absent,
    )


def in_force(conventions: Conventions, rows: Rows) -> Conventions:
    """The conventions with the step's own beta, where it has one."""
    return conventions if rows.beta is None else replace(conventions, beta=float(rows.beta))


def derivable(rows: Rows, conventions: Conventions) -> bool:
    """Whether the stated conventions and what is recorded give the advantage without the trainer's own."""
    if not rows.scores or conventions.normalisation == UNKNOWN or not conventions.charged:
        return False
    if conventions.kl == "reward" and (rows.old_logprob is None or rows.reference_logprob is None):
        return False
    if conventions.baseline:
        return any(one is not None for one in (rows.group, rows.prompts, rows.prompt_ids))
    return rows.values is not None or conventions.critic is False


_ARRAYS = ("response_mask", "group", "prompt_ids", "prompt_mask", "ended", "advantage", *_PER_TOKEN)


def _problems(rows: Rows) -> Iterator[str]:
    """What is wrong with arrays that could be read."""
    if isinstance(rows.step, bool) or int(rows.step) != rows.step or rows.step < 0:
        yield f"step {rows.step!r} is not a whole number from 0 on"
    mask = rows.response_mask
    if mask is None or mask.ndim != 2 or not len(mask):
        yield f"response_mask has shape {None if mask is None else mask.shape}, expected [B, T] with at least one row"
        return
    batch, length = mask.shape
    per_row, per_token = ((batch,),), ((batch, length),)
    expected = {
        **dict.fromkeys(("group", "ended"), per_row),
        **dict.fromkeys(_PER_TOKEN, per_token),
        "advantage": per_row + per_token,
        "prompt_mask": () if rows.prompt_ids is None else (rows.prompt_ids.shape,),
    }
    given = {name: getattr(rows, name) for name in expected}
    for name, score in rows.scores.items():
        expected[f"scores[{name!r}]"], given[f"scores[{name!r}]"] = per_row + per_token, score
    for name, shapes in expected.items():
        if given[name] is not None and given[name].shape not in shapes:
            wanted = " or ".join(map(str, shapes)) or "prompt_ids beside it"
            yield f"{name} has shape {given[name].shape}, expected {wanted}"
    if rows.prompt_ids is not None and (rows.prompt_ids.ndim != 2 or len(rows.prompt_ids) != batch):
        yield f"prompt_ids has shape {rows.prompt_ids.shape}, expected [{batch}, P]"
    for name in ("prompts", "responses"):
        texts = getattr(rows, name)
        if isinstance(texts, str) or (texts is not None and len(texts) != batch):
            yield f"{name} holds {1 if isinstance(texts, str) else len(texts)} texts for {batch} responses"
        elif texts is not None and not all(isinstance(text, str) for text in texts):
            yield f"{name} holds something that is not text"
    for name in sorted(set(rows.weights) - set(rows.scores)):
        yield f"weights names {name!r}, which is not among the scores"
    for name, weight in rows.weights.items():
        if not math.isfinite(weight):
            yield f"the weight of {name!r} is {weight}"


def _parts(rows: Rows, conventions: Conventions) -> Parts:
    """The channels before any baseline."""
    mask = rows.response_mask
    after = _slot_after(mask) if conventions.score_position == "after" else np.zeros(len(mask), dtype=bool)
    factor = np.where(after, conventions.gamma * conventions.lam, 1.0)  # one step of GAE later than the last token
    names: list[str] = []
    rewards: list[Array] = []
    weights: list[Array] = []
    outcome: list[Array] = []

    def add(name: str, reward: Array, weight: Array | float, earned: Array | None = None) -> None:
        names.append(name)
        rewards.append(reward)
        weights.append(np.broadcast_to(np.asarray(weight, dtype=np.float64), len(mask)))
        outcome.append(reward.astype(np.float64).sum(axis=1) if earned is None else earned)

    for name, score in rows.scores.items():
        finite = _finite(score)
        weight = float(rows.weights.get(name, 1.0))
        called = _called(name, rows.scores)
        if score.ndim == 2:
            add(called, np.where(mask, finite, np.float32(0)), weight)
        else:
            add(called, _at_last(finite, mask), weight * factor, finite.astype(np.float64))
    if rows.old_logprob is not None and rows.reference_logprob is not None:
        add(KL, _kl(rows, conventions), _kl_weight(conventions))
    values = np.zeros((*mask.shape, len(names) + (rows.values is not None)), dtype=np.float32)
    if rows.values is not None:
        values[..., -1] = np.where(mask, _finite(rows.values), 0)
        following = conventions.gamma * (1 - conventions.lam) * _value_after(rows.values, mask)
        add(CRITIC, _at_last(np.where(after, following, 0.0).astype(np.float32), mask), 1.0)
    return Parts(
        names=tuple(names),
        mask=mask,
        rewards=np.stack(rewards, axis=-1) if names else np.zeros((*mask.shape, 0), np.float32),
        values=values,
        weights=(np.stack(weights, axis=-1) if names else np.zeros((len(mask), 0))).astype(np.float32),
        outcome=np.stack(outcome, axis=-1) if names else np.zeros((len(mask), 0)),
        gamma=conventions.gamma,
        lam=conventions.lam,
    )


def _called(name: str, scores: Mapping[str, Any]) -> str:
    """The channel of a score: "score" if it is the only one beside penalties, else a name that no other part has."""
    if name not in PENALTIES and not set(scores) - {name, *PENALTIES}:
        return SCORE
    called = name
    while called in RESERVED or (called != name and called in scores):
        called += "_score"
    return called


def _finite(values: Array) -> Array:
    """As float32, 0 where a number is not finite: what was not scored pays nothing."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, np.float32(0))


def _last(mask: Array) -> Array:
    """[B] position of the last true entry; of rows without one, the last position."""
    return np.asarray(mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1))


def _at_last(values: Array, mask: Array) -> Array:
    """[B, T] `values` [B] on the last token of each response that has one."""
    placed = np.zeros(mask.shape, dtype=np.float32)
    some = mask.any(axis=1)
    if some.any():
        placed[some, _last(mask)[some]] = values[some]
    return placed


def _slot_after(mask: Array) -> Array:
    """[B] whether there is a position behind the last token."""
    if not mask.shape[1]:
        return np.zeros(len(mask), dtype=bool)
    return np.asarray(mask.any(axis=1) & (_last(mask) + 1 < mask.shape[1]))


def _value_after(values: Array, mask: Array) -> Array:
    """[B] the value at the position behind the last token, 0 where there is none."""
    if not mask.shape[1]:
        return np.zeros(len(mask))
    place = np.minimum(_last(mask) + 1, mask.shape[1] - 1)
    found = _finite(values)[np.arange(len(mask)), place]
    return np.where(_slot_after(mask), found, 0.0).astype(np.float64)


def _kl(rows: Rows, conventions: Conventions) -> Array:
    """[B, T] the KL per token as it is charged, k1 where it is not; nats."""
    with np.errstate(all="ignore"):
        k1 = np.asarray(rows.old_logprob, dtype=np.float64) - np.asarray(rows.reference_logprob, dtype=np.float64)
        charged = ESTIMATES[conventions.kl_estimator] if conventions.kl == "reward" and conventions.charged else None
        return np.where(rows.response_mask, _finite(k1 if charged is None else charged(k1)), np.float32(0))


def _kl_weight(conventions: Conventions) -> float:
    charged = conventions.kl == "reward" and conventions.charged
    return -conventions.beta if charged else 0.0


def _loss_beta(conventions: Conventions) -> float:
    """Advantage per nat of a KL term in the loss; nan where it is not known whether there is one."""
    return {"loss": conventions.beta, "reward": 0.0, "none": 0.0}.get(conventions.kl, math.nan)


def _advantage(rows: Rows) -> Array | None:
    """[B, T] the trainer's advantage, zero outside the mask; None where it does not tell, or not in numbers."""
    if rows.advantage is None:
        return None
    given = rows.advantage.astype(np.float64)
    given = np.where(rows.response_mask, given[:, None] if given.ndim == 1 else given, 0.0)
    return given if (np.abs(given) <= np.finfo(np.float32).max).all() else None  # false for nan


def _group(rows: Rows) -> Array | None:
    """[B] numbers of the prompts: as given, else equal prompts are one; None where nothing tells."""
    if rows.group is not None and rows.group.dtype.kind in "iu":
        return np.asarray(rows.group.astype(np.int64))
    keys: Sequence[Any] | None = None
    if rows.group is not None:
        keys = rows.group.tolist()
    elif rows.prompts is not None:
        keys = rows.prompts
    elif rows.prompt_ids is not None:
        kept = rows.prompt_mask.astype(bool) if rows.prompt_mask is not None else np.ones(rows.prompt_ids.shape, bool)
        keys = [tuple(ids[here].tolist()) for ids, here in zip(rows.prompt_ids, kept, strict=True)]
    if keys is None:
        return None
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _absent(rows: Rows, conventions: Conventions, group: Array | None, *, known: bool) -> frozenset[str]:
    """Names of schema.OPTIONAL that are not known."""
    absent = {name for name in (*TOKEN_FLOATS, "active", "ended") if getattr(rows, name) is None}
    without = {
        "values": rows.values is None,  # a group's baseline is in the rows, but is no critic's
        "group": group is None,
        "advantage": not known and not (rows.advantage is None and derivable(rows, conventions)),
        "beta": not conventions.charged,
        "score": not rows.scores,
    }
    return frozenset(absent | {name for name, lacking in without.items() if lacking})
