"""Models that read a finished run's token ids again: loaded, checked against the run, timed.

Dimensions: B responses, T response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.models.load import disable_dropout, load_policy, load_tokenizer
from kedge.models.reward import RewardModel, load_reward_model
from kedge.rollout.reward import scores
from kedge.rollout.score import by_length, token_scores
from kedge.structs import Rollouts, TokenScores
from kedge.trace.reader import StepTrace

Array = NDArray[Any]

BATCH_BYTES = 2**29  # of one forward pass's log-probabilities over the vocabulary
COPIES = 3  # logits, log-probabilities and the entropy's product stand beside each other
JUDGED = 32  # responses that a reward model reads at a time
AGREEING = 0.1  # nats per token: float32 and the bfloat16 of a training run differ by a few hundredths
COMPARED = 16  # responses whose text is compared with what the tokenizer makes of their ids
ALIKE = 0.5  # share of them that must be alike, special tokens and spaces at the ends left aside


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer."""

    folder: str
    model: Any
    tokenizer: Any

    @property
    def rows(self) -> int:
        """Token ids that it has an embedding for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def context(self) -> int:
        """Tokens of prompt and response that it can read."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    @property
    def parameter_bytes(self) -> int:
        """What its weights take in memory."""
        return _bytes(self.model)

    def microbatch(self, rollouts: Rollouts) -> int:
        """Responses of one forward pass whose log-probabilities fit into `BATCH_BYTES`."""
        return max(1, BATCH_BYTES // self._table_bytes(rollouts))

    def batch_bytes(self, rollouts: Rollouts, microbatch: int | None = None) -> int:
        """What a forward pass's log-probabilities over the vocabulary take in memory."""
        size = self.microbatch(rollouts) if microbatch is None else microbatch
        return min(size, len(rollouts)) * self._table_bytes(rollouts)

    def scores(self, rollouts: Rollouts, *, temperature: float, microbatch: int | None = None) -> TokenScores:
        """[B, T] log-probability of each response token, of EOS in its place, and the entropy, in nats."""
        size = self.microbatch(rollouts) if microbatch is None else microbatch
        eos = int(self.tokenizer.eos_token_id)
        return token_scores(self.model, rollouts, temperature=temperature, eos_id=eos, microbatch=size)

    def _table_bytes(self, rollouts: Rollouts) -> int:
        return (rollouts.response_ids.shape[1] + 1) * self.rows * 4 * COPIES


@dataclass(frozen=True)
class Judge:
    """A reward model and its tokenizer."""

    folder: str
    model: RewardModel
    tokenizer: Any

    @property
    def rows(self) -> int:
        """Token ids that every member has an embedding for."""
        return min(int(part.get_input_embeddings().num_embeddings) for part in self.model.models)

    @property
    def context(self) -> int:
        """Tokens of prompt and response that every member can read."""
        return min(getattr(part.config, "max_position_embeddings", None) or 2**31 for part in self.model.models)

    @property
    def parameter_bytes(self) -> int:
        """What its weights take in memory."""
        return sum(_bytes(part) for part in self.model.models)

    @torch.no_grad()
    def scores(self, rollouts: Rollouts, *, microbatch: int | None = None) -> Tensor:
        """[B] scores in the unit of the reward model's folder: normalised where it says how, else as they come."""
        each = by_length(rollouts, lambda part: scores(self.model, part).unsqueeze(-1), microbatch or JUDGED)
        return each.squeeze(-1)


Reader = LanguageModel | Judge


def language_model(folder: Path) -> LanguageModel:
    """The model in a folder, without dropout. Raises InputError for whatever is missing, damaged or unsafe."""
    _expect_folder(folder)
    model, tokenizer = load_policy(folder)
    return LanguageModel(str(folder), disable_dropout(model).requires_grad_(False), tokenizer)


def judge_in(folder: Path) -> Judge:
    """The reward model in a folder, with the tokenizer in it or in that of its first member."""
    _expect_folder(folder)
    first = folder / "member-0"
    return Judge(str(folder), load_reward_model(folder), load_tokenizer(first if first.is_dir() else folder))


def rollouts_of(trace: StepTrace, prompt_ids: Sequence[Array]) -> Rollouts:
    """A step's responses as models read them; `prompt_ids` are those of each response.

    Raises InputError where a prompt has no tokens: nothing then predicts the first token of the response.
    """
    if trace.response_ids is None:
        raise InputError(Problem(str(trace.path), "its token ids were left out", "keep them: trace.text = 'full'"))
    empty = next((row for row, ids in enumerate(prompt_ids) if not len(ids)), None)
    if empty is not None:
        raise InputError(Problem(str(trace.path), f"row {empty} has a prompt without tokens", "leave it out"))
    width = max(len(ids) for ids in prompt_ids)
    prompts = np.zeros((len(prompt_ids), width), dtype=np.int64)
    mask = np.zeros(prompts.shape, dtype=bool)
    for row, ids in enumerate(prompt_ids):
        prompts[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
    return Rollouts(
        prompt_ids=torch.from_numpy(prompts),
        prompt_mask=torch.from_numpy(mask),
        response_ids=torch.from_numpy(trace.response_ids.astype(np.int64)),
        response_mask=torch.from_numpy(trace.response_mask),
        ended=torch.from_numpy(trace.ended),
        group_id=torch.from_numpy(trace.group.astype(np.int64)),
        behaviour_logprobs=torch.zeros(trace.response_mask.shape),
    )


def check_fit(reader: Reader, trace: StepTrace, rollouts: Rollouts) -> None:
    """Raise InputError where a model cannot have read these token ids, or its tokenizer makes other texts of them."""
    highest = int(max(rollouts.prompt_ids.max(), rollouts.response_ids.max()))
    if highest >= reader.rows:
        what = f"{trace.path.name} holds token id {highest}, the model knows {reader.rows}: another vocabulary"
        raise InputError(Problem(reader.folder, what, "give a model with the tokenizer that the run was trained with"))
    longest = int((rollouts.prompt_mask.sum(dim=1) + rollouts.context_mask.sum(dim=1)).max())
    if longest > reader.context:
        what = f"{trace.path.name} holds {longest} tokens of prompt and response, the model reads {reader.context}"
        raise InputError(Problem(reader.folder, what, "give a model with a context as long as the run's"))
    compared, alike = _alike(reader.tokenizer, trace, rollouts)
    if compared and alike < ALIKE * compared:
        what = f"its tokenizer reads {compared - alike} of {compared} responses of {trace.path.name} as other texts"
        remedy = "another tokenizer made these ids: give a model with the run's"
        raise InputError(Problem(reader.folder, what, remedy))


def check_agreement(folder: str, computed: Array, recorded: Array, trace: StepTrace, temperature: float) -> None:
    """Raise InputError where a model's log-probabilities are not those that the trainer recorded of it."""
    mask = trace.response_mask & np.isfinite(recorded)
    if not mask.any():
        return
    gap = float(np.abs(computed - recorded)[mask].mean())
    if not gap <= AGREEING:
        what = (
            f"its log-probabilities differ from the recorded ones of {trace.path.name} by {gap:.2f} nats per token "
            f"at temperature {temperature:g}"
        )
        raise InputError(Problem(folder, what, "another model, or another --temperature"))


def seconds_per_token(work: Callable[[Rollouts], object], rollouts: Rollouts, microbatch: int) -> float:
    """How long one batch takes for each of its tokens, prompts included."""
    part = rollouts.rows(torch.arange(min(microbatch, len(rollouts))))
    began = time.perf_counter()
    work(part)
    return (time.perf_counter() - began) / tokens_of(part)


def tokens_of(rollouts: Rollouts) -> int:
    """Tokens of prompts and responses, padding left out."""
    return int(rollouts.prompt_mask.sum() + rollouts.context_mask.sum())


def _alike(tokenizer: Any, trace: StepTrace, rollouts: Rollouts) -> tuple[int, int]:
    """How many responses have a text, and of how many the tokenizer's is the same."""
    compared = alike = 0
    for row, text in enumerate(trace.responses[:COMPARED]):
        if text is None or not text.strip():
            continue
        ids = rollouts.response_ids[row, rollouts.context_mask[row]].tolist()
        readings = {tokenizer.decode(ids, skip_special_tokens=skip).strip() for skip in (True, False)}
        compared += 1
        alike += text.strip() in readings
    return compared, alike


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _expect_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(Problem(str(folder), what, "give the folder of a Hugging Face model"))
