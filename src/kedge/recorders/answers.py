"""The policy's answers to the same prompts again and again, beside the reference's, drawn without disturbing training.

Dimensions: N prompts, P prompt tokens, T response tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.trace.foreign import padded
from kedge.trace.writer import SampleRecord

Array = NDArray[Any]
Ids = Sequence[Sequence[int]]
_SEEDS = {"reference": 20_001, "policy": 20_002}  # of the draws; the same at every look, so that looks compare


class Source(Protocol):
    """What a trainer is asked for. `reference` asks the reference; where there is none, None comes back."""

    def generate(self, prompts: Ids, *, reference: bool) -> list[list[int]] | None:
        """A response to each prompt as token ids, EOS included, sampled as training samples."""

    def logprobs(self, prompts: Ids, responses: Ids, *, reference: bool) -> list[Array] | None:
        """[T] of each response: nats of its tokens, at the sampling temperature."""

    def scores(self, responses: Ids) -> Array:
        """[N] reward of the responses to the prompts, KL left out, in the trainer's own unit."""

    def texts(self, responses: Ids) -> list[str]:
        """Responses as text, special tokens left out."""

    def tokens(self, response: Sequence[int]) -> list[str]:
        """Each token of a response as text."""


@dataclass
class _Reference:
    """What the reference answered at the first look."""

    ids: list[list[int]]
    texts: list[str]
    logprobs: list[Array]


class Answers:
    """Samples answers to `prompts` [N] at a look, scores them, and remembers what the reference answered.

    Where the trainer keeps no reference model, the policy at the first look stands for it.
    """

    def __init__(self, prompts: Ids, texts: Sequence[str]) -> None:
        self.prompts, self._texts = prompts, list(texts)
        self._reference: _Reference | None = None

    def look(self, source: Source, step: int) -> SampleRecord:
        """The answers after `step` updates. Leaves all random generators as they were."""
        with undisturbed(_SEEDS["reference"]):
            known = self._reference = self._reference or self._first(source)
        with undisturbed(_SEEDS["policy"]):
            own = source.generate(self.prompts, reference=False)
            assert own is not None  # a policy always answers
            scores, reference_scores = source.scores(own), source.scores(known.ids)
            now = _sure(source.logprobs(self.prompts, own, reference=False))
            there = source.logprobs(self.prompts, own, reference=True)
            reference_now = _sure(source.logprobs(self.prompts, known.ids, reference=False))
        lengths = [len(ids) for ids in known.ids]
        return SampleRecord(
            step=step,
            prompt=self._texts,
            response=source.texts(own),
            reference_response=known.texts,
            response_tokens=[source.tokens(ids) for ids in own],
            token_kl=[_gap(one, None if there is None else there[row]).tolist() for row, one in enumerate(now)],
            score=scores.tolist(),
            reference_score=reference_scores.tolist(),
            reference_kl=[
                float(_gap(one, other).sum()) for one, other in zip(reference_now, known.logprobs, strict=True)
            ],
            length=[len(ids) for ids in own],
            reference_tokens=lengths,
            reference_length=[float(length) for length in lengths],
            tercile=terciles(np.array(lengths)).tolist(),
        )

    def _first(self, source: Source) -> _Reference:
        ids = source.generate(self.prompts, reference=True) or source.generate(self.prompts, reference=False)
        assert ids is not None
        logprobs = source.logprobs(self.prompts, ids, reference=True)
        return _Reference(
            ids, source.texts(ids), logprobs or _sure(source.logprobs(self.prompts, ids, reference=False))
        )


def _sure(found: list[Array] | None) -> list[Array]:
    assert found is not None
    return found


def _gap(policy: Array, reference: Array | None) -> Array:
    """k1 of each token, nats; nan where the reference is not known."""
    if reference is None:
        return np.full(len(policy), np.nan)
    return policy.astype(np.float64) - reference


def terciles(lengths: Array) -> Array:
    """[N] 0, 1 or 2: the third of the lengths that each belongs to, the briefest first."""
    if not len(lengths):
        return np.zeros(0, dtype=np.int64)
    return np.searchsorted(np.quantile(lengths, [1 / 3, 2 / 3]), lengths, side="left")


def left_padded(prompts: Ids, pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """[N, P] ids with padding on the left, and the attention mask."""
    ids = torch.as_tensor(padded(prompts, fill=pad, left=True), dtype=torch.long, device=device)
    mask = torch.as_tensor(padded([[1] * len(one) for one in prompts], left=True), dtype=torch.long, device=device)
    return ids, mask


def right_padded(responses: Ids, pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """[N, T] ids with padding on the right, and the attention mask."""
    ids = torch.as_tensor(padded(responses, fill=pad), dtype=torch.long, device=device)
    mask = torch.as_tensor(padded([[1] * len(one) for one in responses]), dtype=torch.long, device=device)
    return ids, mask


def until_end(rows: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Token ids of each row through its first end token, the end token included."""
    found = []
    for ids in rows.tolist():
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
        found.append(ids[: stop + 1])
    return found


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Seeds every random generator and puts their states back at the end; no gradients within."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Puts models into evaluation mode and back into the mode of each of their modules."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
