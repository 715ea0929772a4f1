"""A step on disk with columns that it lacked: a foreign trace after its models have read it again.

The advantage stays the trainer's own. Only its split changes: what the new columns explain leaves the channel `rest`.
Dimensions: B responses, T response tokens, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.arrays import padded
from kedge.trace.conventions import Conventions
from kedge.trace.explained import CRITIC, KL, REST, Parts, explain
from kedge.trace.figures import policy_figures
from kedge.trace.foreign import SCORE, Rows, as_record, derivable
from kedge.trace.reader import StepTrace, read_step, read_table
from kedge.trace.schema import METADATA_KEY, TOKEN_FLOATS
from kedge.trace.writer import StepRecord

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """A step's file, with what a diagnosis has no use for."""

    trace: StepTrace
    prompt_ids: tuple[Any, ...] | None  # of each response; None where ids were left out
    policy_version: int


def read_stored(path: Path) -> Stored:
    """The step in one `step-*.parquet`. Raises InputError when it is damaged, or its digest does not fit."""
    trace = read_step(path)
    trace.check_digest()
    table = read_table(path, ["prompt_ids", "policy_version"])
    ids = table.column("prompt_ids")
    prompts = None if ids.null_count else tuple(np.array(row, dtype=np.int64) for row in ids.to_pylist())
    return Stored(trace, prompts, int(table.column("policy_version")[0].as_py()))


def absent_in(path: Path) -> frozenset[str]:
    """What a step's file says is not known, without its rows."""
    return frozenset(_about(path).get("absent", ()))


def channels_in(path: Path) -> tuple[str, ...]:
    """The channels of a step's file, without its rows."""
    return tuple(str(name) for name in _about(path)["channels"])


def _about(path: Path) -> dict[str, Any]:
    metadata = read_table(path, ["step"]).schema.metadata or {}
    return dict(json.loads(metadata.get(METADATA_KEY, b"{}")))


def filled(
    stored: Stored,
    conventions: Conventions,
    columns: Mapping[str, Array],
    *,
    advantage: Array | None,
) -> StepRecord:
    """The step with `columns` in it: names of `schema.TOKEN_FLOATS` [B, T] in nats, and `score` [B] in its own unit.

    A column that the step has is replaced. `conventions` hold this step's beta; `advantage` [B, T] is the trainer's,
    None where it is to be derived or is not known. Outside the response mask columns are not looked at.
    """
    trace, prompt_ids = stored.trace, stored.prompt_ids
    mask = trace.response_mask
    tokens = {name: trace.tokens[name] for name in TOKEN_FLOATS}
    tokens |= {name: np.where(mask, values, 0.0) for name, values in columns.items() if name in tokens}
    gone = trace.absent - set(columns)
    kl = _kl(trace, conventions, tokens, gone)
    parts = _parts(trace, kl, columns.get(SCORE))
    group = None if "group" in gone else trace.group
    found = explain(parts, conventions, group, advantage)
    rows = _known(trace, tokens, parts, gone)
    here: list[Any] = [np.ones(len(ids), dtype=bool) for ids in prompt_ids or ()]
    return StepRecord(
        step=trace.step,
        policy_version=stored.policy_version,
        channels=found.parts.names,
        gamma=trace.gamma,
        lam=trace.lam,
        critic=trace.critic,
        group=trace.group,
        prompt_ids=None if prompt_ids is None else padded(prompt_ids, left=True),
        prompt_mask=None if prompt_ids is None else padded(here, fill=False, left=True),
        response_ids=trace.response_ids,
        response_mask=mask,
        ended=trace.ended,
        active=trace.active,
        **tokens,
        rewards=found.parts.rewards,
        values=found.parts.values,
        weights=found.parts.weights,
        shift=found.shift,
        scale=found.scale,
        advantage=found.advantage() if advantage is None else advantage,
        loss_beta=trace.loss_beta,
        learning=trace.learning,
        prompts=_texts(trace.prompts),
        responses=_texts(trace.responses),
        members=trace.members if trace.members.shape[1] else None,
        disagreement=trace.disagreement,
        support_distance=trace.support_distance,
        absent=_absent(gone, conventions, known=advantage is not None, derived=derivable(rows, conventions)),
    )


def _kl(
    trace: StepTrace, conventions: Conventions, tokens: Mapping[str, Array], gone: frozenset[str]
) -> StepRecord | None:
    """A record whose only channel is `kl`, as a recorder would have written it."""
    if {"old_logprob", "reference_logprob"} & gone:
        return None
    given: dict[str, Any] = {name: tokens[name] for name in ("old_logprob", "reference_logprob")}
    return as_record(Rows(trace.step, trace.response_mask, {}, **given), replace(conventions, normalisation="none"))


def _parts(trace: StepTrace, kl: StepRecord | None, score: Array | None) -> Parts:
    """The channels before any baseline: scores, `kl` and `critic`; `rest` is found again."""
    mask = trace.response_mask
    names, rewards, weights = [], [], []

    def add(name: str, reward: Array, weight: Array | float) -> None:
        names.append(name)
        rewards.append(reward.astype(np.float32))
        weights.append(np.broadcast_to(np.asarray(weight, dtype=np.float64), len(mask)))

    for index, name in enumerate(trace.channels):
        if name not in (KL, CRITIC, REST) and not (name == SCORE and score is not None):
            add(name, trace.rewards[..., index], trace.weights[:, index])
    if score is not None:
        add(SCORE, _at_last(score, mask), 1.0)
    if kl is not None:
        add(KL, kl.rewards[..., 0], kl.weights[:, 0])
    values = np.zeros((*mask.shape, len(names)), dtype=np.float32)
    if CRITIC in trace.channels:
        index = trace.channels.index(CRITIC)
        add(CRITIC, trace.rewards[..., index], trace.weights[:, index])
        values = np.concatenate([values, trace.values[..., index : index + 1].astype(np.float32)], axis=-1)
    stacked = np.stack(rewards, axis=-1) if names else np.zeros((*mask.shape, 0), np.float32)
    return Parts(
        names=tuple(names),
        mask=mask,
        rewards=stacked,
        values=values,
        weights=(np.stack(weights, axis=-1) if names else np.zeros((len(mask), 0))).astype(np.float32),
        outcome=stacked.astype(np.float64).sum(axis=1),
        gamma=trace.gamma,
        lam=trace.lam,
    )


def _at_last(score: Array, mask: Array) -> Array:
    """[B, T] the score on the last token of each response."""
    placed = np.zeros(mask.shape)
    placed[np.arange(len(mask)), mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)] = score
    return placed


def _known(trace: StepTrace, tokens: Mapping[str, Array], parts: Parts, gone: frozenset[str]) -> Rows:
    """Which inputs of an advantage there are; their content does not matter here."""
    scores = {name: trace.ended for name in parts.names if name not in (KL, CRITIC)}
    given: dict[str, Any] = {
        name: None if name in gone else tokens[name] for name in ("old_logprob", "reference_logprob")
    }
    values = trace.response_mask if CRITIC in parts.names else None
    group = None if "group" in gone else trace.group
    return Rows(trace.step, trace.response_mask, scores, group=group, values=values, **given)


def _absent(gone: frozenset[str], conventions: Conventions, *, known: bool, derived: bool) -> frozenset[str]:
    without = {"advantage": not (known or derived), "beta": not conventions.charged}
    kept = gone - set(without)
    return frozenset(kept | {name for name, lacking in without.items() if lacking})


def _texts(texts: Sequence[str | None]) -> list[str] | None:
    """None where any is missing: a trace keeps them all or none."""
    kept = [text for text in texts if text is not None]
    return kept if len(kept) == len(texts) else None


def figures(record: StepRecord, conventions: Conventions) -> dict[str, float]:
    """The metrics of stage "policy" that follow from a filled step."""
    totals = record.rewards.astype(np.float64).sum(axis=1)
    names = [name for name in record.channels if name not in (KL, CRITIC, REST)]
    scores = {name: totals[:, record.channels.index(name)] for name in names}
    return policy_figures(record, Rows(record.step, record.response_mask, scores), conventions)


def charged_beta(trace: StepTrace, conventions: Conventions) -> float:
    """What a nat cost in this step, nan where the step does not tell: reward, or advantage of a KL in the loss."""
    if conventions.kl == "loss":
        return float(trace.loss_beta[0])
    weight = float(trace.weights[0, trace.channels.index(KL)]) if KL in trace.channels else 0.0
    return -weight if conventions.kl == "reward" and weight else math.nan


def conventions_in(manifest: Mapping[str, Any]) -> Conventions | None:
    """What a recorder or an importer wrote of its conventions; None in the manifest of a run of Kedge's own."""
    told = manifest.get("conventions")
    if not isinstance(told, Mapping):
        return None
    names = {field.name for field in fields(Conventions)}
    given: dict[str, Any] = {name: told[name] for name in told if name in names}
    if given.get("beta") is None:
        given["beta"] = math.nan
    if given.get("clip") is not None:
        given["clip"] = tuple(given["clip"])
    return Conventions(**given)
