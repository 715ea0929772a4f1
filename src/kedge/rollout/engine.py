"""Drawing responses from a policy: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kedge.ops.logprobs import next_token_logprobs, taken
from kedge.structs import Prompts, Rollouts, Sampling


class RolloutEngine(Protocol):
    """Whatever can draw responses; log-probabilities are of the distribution that was sampled from."""

    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts: ...


class TorchEngine:
    """In-process sampling from any causal language model with the transformers call convention and a KV cache."""

    def __init__(self, eos_id: int, pad_id: int, batch: int = 1024) -> None:
        self.eos_id, self.pad_id, self.batch = eos_id, pad_id, batch

    @torch.no_grad()
    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts:
        """One response per row of `prompts`, at most `sampling.max_new_tokens` tokens including EOS."""
        policy.eval()
        rows = torch.arange(len(prompts))
        parts = [self._draw(policy, prompts.rows(part), sampling, generator) for part in rows.split(self.batch)]
        ids, logprobs = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        mask = through_end(ids, self.eos_id)
        length = int(mask.sum(dim=1).max())
        ids = ids.masked_fill(~mask, self.pad_id)
        return Rollouts(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            response_ids=ids[:, :length],
            response_mask=mask[:, :length],
            ended=(ids == self.eos_id).any(dim=1),
            group_id=prompts.group_id,
            behaviour_logprobs=logprobs.masked_fill(~mask, 0)[:, :length],
            policy_version=policy_version,
        )

    def _draw(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities [B, max_new_tokens], EOS-filled after the end.

        Rows that ended leave the batch, and the cache with them, once an eighth of it is done.
        """
        count, budget = len(prompts), sampling.max_new_tokens
        ids = torch.full((count, budget), self.eos_id)
        logprobs = torch.zeros(count, budget, dtype=torch.float64 if _is_double(policy) else torch.float32)
        alive = torch.arange(count)  # rows still in the batch, in batch order
        attention, step_ids, cache = prompts.mask.long(), prompts.ids, None
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        running = torch.ones(count, dtype=torch.bool)
        for t in range(budget):
            output = policy(
                input_ids=step_ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            distribution = truncate(next_token_logprobs(output.logits[:, -1], sampling.temperature), sampling.top_p)
            drawn = torch.multinomial(distribution.exp(), 1, generator=generator).squeeze(1)
            drawn = torch.where(running, drawn, self.eos_id)
            ids[alive, t], logprobs[alive, t] = drawn, taken(distribution, drawn).to(logprobs.dtype)
            running = running & (drawn != self.eos_id)
            if not running.any():
                break
            if (~running).sum() * 8 >= len(running):
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, attention, positions, drawn, running = (
                    x[keep] for x in (alive, attention, positions, drawn, running)
                )
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
            positions = positions[:, -1:] + 1
            step_ids = drawn.unsqueeze(1)
        return ids, logprobs


def through_end(ids: Tensor, eos_id: int) -> Tensor:
    """[B, T] bool: true through the first end token of each row, or everywhere where there is none."""
    is_eos = ids == eos_id
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0


def truncate(logprobs: Tensor, top_p: float) -> Tensor:
    """[B, V] log-probabilities of nucleus sampling: the smallest set of mass `top_p`, renormalised.

    Holtzman et al. (2020). The likeliest token always stays.
    """
    if top_p >= 1:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    outside = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logprobs.masked_fill(outside, float("-inf")).log_softmax(dim=-1)


def _is_double(policy: Any) -> bool:
    return bool(next(policy.parameters()).dtype == torch.float64)
