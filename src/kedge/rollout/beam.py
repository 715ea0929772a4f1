"""The likeliest answers to a prompt, by the beam search that transformers brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from kedge.ops.logprobs import next_token_logprobs
from kedge.rollout.engine import through_end
from kedge.rollout.score import token_scores
from kedge.structs import Prompts, Rollouts, Sampling

ROWS = 512  # sequences searched at a time


@torch.no_grad()
def beam_candidates(
    policy: Any, prompts: Prompts, sampling: Sampling, beams: int, eos_id: int, pad_id: int
) -> Rollouts:
    """The `beams` likeliest answers found to each prompt, [B * beams], those of a prompt side by side, best first.

    Likely is what has a high total log-probability at the sampling temperature, whatever its length. Nothing is drawn,
    so `top_p` is not used; behaviour log-probabilities are the policy's. Where there are fewer answers than `beams`,
    some come twice.
    """
    policy.eval()
    rows = torch.arange(len(prompts))
    with _plain_settings(policy):
        parts = [
            _search(policy, prompts.rows(part), sampling, beams, eos_id, pad_id)
            for part in rows.split(max(1, ROWS // beams))
        ]
    # Only a part whose answers all ended is narrower than another.
    width = max(part.shape[1] for part in parts)
    ids = torch.cat([pad(part, (0, width - part.shape[1]), value=eos_id) for part in parts])
    mask = through_end(ids, eos_id)
    length = int(mask.sum(dim=1).max())
    asked = prompts.rows(rows.repeat_interleave(beams))
    found = Rollouts(
        prompt_ids=asked.ids,
        prompt_mask=asked.mask,
        response_ids=ids.masked_fill(~mask, pad_id)[:, :length],
        response_mask=mask[:, :length],
        ended=(ids == eos_id).any(dim=1),
        group_id=asked.group_id,
        behaviour_logprobs=torch.zeros(len(ids), length),
    )
    scores = token_scores(policy, found, temperature=sampling.temperature, eos_id=eos_id)
    return replace(found, behaviour_logprobs=scores.logprobs)


def _search(policy: Any, prompts: Prompts, sampling: Sampling, beams: int, eos_id: int, pad_id: int) -> Tensor:
    """[B * beams, T] token ids; what follows the end token is padding of some kind."""

    def tempered(_: Tensor, logprobs: Tensor) -> Tensor:
        return next_token_logprobs(logprobs, sampling.temperature)

    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=0.0,  # ranks by the sum of log-probabilities, and stops where none can be beaten any more
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    found: Tensor = policy.generate(
        inputs=prompts.ids,
        attention_mask=prompts.mask.long(),
        generation_config=settings,
        logits_processor=[tempered],
    )
    return found[:, prompts.ids.shape[1] :]


@contextmanager
def _plain_settings(policy: Any) -> Iterator[None]:
    """Without the settings that a model folder brings: its repetition penalty is no part of the policy."""
    own = policy.generation_config
    policy.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.generation_config = own
