"""What a run trains on and is measured by, whether it comes from files or from the built-in desk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedge.data.records import Demonstration, Judgment, Loaded, Prompt

Labeller = Callable[[Sequence[tuple[Prompt, str, str]]], Sequence[bool]]
"""Annotators: for each (prompt, first, second), whether the first is preferred."""

Truth = Callable[[Prompt, str], Mapping[str, float]]
"""What a built-in world knows of an answer: gold, correct, answered, verbose. Only evaluation files may hold it."""


@dataclass(frozen=True)
class Probe:
    """The same prompt answered briefly and verbosely, to be scored through the run."""

    prompt: Prompt
    brief: str
    verbose: str


@dataclass(frozen=True)
class Task:
    """Texts of every stage. Evaluation prompts and held-out demonstrations occur in no other field."""

    demonstrations: Loaded[Demonstration]
    held_out: Loaded[Demonstration]
    prompts: Loaded[Prompt]  # of the policy stage
    evaluation: Loaded[Prompt]
    judgments: Loaded[Judgment] | None = None  # given ones; None where pairs are sampled and labelled
    pair_prompts: tuple[Prompt, ...] = ()
    labeller: Labeller | None = None
    probes: tuple[Probe, ...] = ()  # empty: the pipeline takes short and long samples of the reference
    text: tuple[str, ...] = ()  # held-out plain text; empty: held-out demonstrations anchor capability
    truth: Truth | None = None
    make_tokenizer: Callable[[], Any] | None = None  # for a model from scratch
    neutral: tuple[str, ...] = ()  # sentences that say nothing
