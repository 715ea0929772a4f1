"""Responses that were not sampled here (demonstrations, labelled pairs, probe answers) as rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kedge.structs import Prompts, Rollouts

Ids = Sequence[int]


def padded(rows: Sequence[Ids], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of token ids as [B, S] with their mask, padded on `side` ("left" or "right")."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tensors], True, False, padding_side=side)
    return ids, mask


def as_prompts(rows: Sequence[Ids], pad_id: int) -> Prompts:
    """Prompts numbered in the order given."""
    ids, mask = padded(rows, pad_id, "left")
    return Prompts(ids, mask, torch.arange(len(rows)))


def as_rollouts(prompts: Sequence[Ids], responses: Sequence[Ids], pad_id: int) -> Rollouts:
    """Given responses as rollouts that all ended; their behaviour log-probabilities are unknown and set to 0."""
    prompt_ids, prompt_mask = padded(prompts, pad_id, "left")
    response_ids, response_mask = padded(responses, pad_id, "right")
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        ended=torch.ones(len(responses), dtype=torch.bool),
        group_id=torch.arange(len(prompts)),
        behaviour_logprobs=torch.zeros(response_ids.shape),
    )
