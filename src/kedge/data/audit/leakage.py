"""What a file that measures shares with the file that trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.data.audit.near import Near, near_another
from kedge.data.audit.tables import Array, Tables


@dataclass(frozen=True)
class Leakage:
    """Shares of the evaluation file's distinct prompts and responses that also occur in the training file.

    `near_prompts` compares the samples of both files, without those that are shared exactly.
    """

    prompts: int
    shared_prompts: float
    near_prompts: Near
    responses: int
    shared_responses: float


@dataclass(frozen=True)
class PromptUse:
    """Rows beside distinct prompts: with `shared` of rows on a prompt of several rows, a split by row leaks."""

    prompts: int
    shared: float


def find_leakage(train: Tables, evaluation: Tables) -> Leakage:
    prompts, responses = _prompts(evaluation), _responses(evaluation)
    known = np.unique(_prompts(train))
    fresh = ~np.isin(evaluation.prompts.hashes, known)
    texts = [text for text, new in zip(evaluation.prompts.texts, fresh, strict=True) if new]
    distinct = np.unique(prompts)
    distinct_responses = np.unique(responses)
    return Leakage(
        prompts=len(distinct),
        shared_prompts=float(np.isin(distinct, known).mean()),
        near_prompts=near_another(texts, train.prompts, evaluation.prompts.total),
        responses=len(distinct_responses),
        shared_responses=float(np.isin(distinct_responses, _responses(train)).mean()),
    )


def prompt_use(tables: Tables) -> PromptUse:
    table = tables.singles if len(tables.singles) else tables.pairs
    first = np.unique(table["row"], return_index=True)[1]
    _, code, counts = np.unique(table["prompt"][first], return_inverse=True, return_counts=True)
    return PromptUse(len(counts), float(np.mean(counts[code] > 1)))


def _prompts(tables: Tables) -> Array:
    return np.concatenate([tables.pairs["prompt"], tables.singles["prompt"]])


def _responses(tables: Tables) -> Array:
    return np.concatenate([tables.pairs["chosen"], tables.pairs["rejected"], tables.singles["response"]])
