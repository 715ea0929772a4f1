"""What policy, reference, critic and reward model say about rollouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kedge.ops.logprobs import entropy, next_token_logprobs, taken
from kedge.structs import Opinion, Rollouts, ScoredRollouts, TokenScores

Rewarder = Callable[[Rollouts], Tensor | Opinion]
"""A terminal reward: rollouts to [B] scores in the channel's own unit, or to these with what they rest on."""


def inputs(rollouts: Rollouts) -> dict[str, Tensor]:
    """Model inputs for prompt and response together, [B, P + T]; padding is masked and positions skip it."""
    attention = torch.cat([rollouts.prompt_mask, rollouts.context_mask], dim=1).long()
    return {
        "input_ids": torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0),
    }


def response_logprobs(model: Any, rollouts: Rollouts, temperature: float) -> Tensor:
    """[B, T, V] log-probabilities of the next token before each response token, in nats."""
    length = rollouts.response_ids.shape[1]
    logits = model(**inputs(rollouts), use_cache=False, logits_to_keep=length + 1).logits[:, -length - 1 : -1]
    return next_token_logprobs(logits, temperature)


@torch.no_grad()
def token_scores(
    model: Any, rollouts: Rollouts, *, temperature: float, eos_id: int, microbatch: int = 256
) -> TokenScores:
    """The model's log-probabilities and entropy on every response token; zero outside the mask."""

    def score(part: Rollouts) -> Tensor:
        logprobs = response_logprobs(model, part, temperature)
        return torch.stack([taken(logprobs, part.response_ids), logprobs[..., eos_id], entropy(logprobs)], dim=-1)

    model.eval()
    stacked = torch.where(rollouts.response_mask.unsqueeze(-1), by_length(rollouts, score, microbatch), 0)
    return TokenScores(*stacked.unbind(dim=-1))


def token_values(critic: Any, rollouts: Rollouts) -> Tensor:
    """[B, T, heads] the critic's value before each response token, in channel units; zero outside the mask."""
    length = rollouts.response_ids.shape[1]
    values: Tensor = critic(**inputs(rollouts))[:, -length - 1 : -1]
    return values * rollouts.response_mask.unsqueeze(-1)


def score_rollouts(
    rollouts: Rollouts,
    policy: Any,
    reference: Any,
    critic: Any | None,
    rewarders: dict[str, Rewarder],
    *,
    temperature: float,
    eos_id: int,
    microbatch: int = 256,
) -> ScoredRollouts:
    """One pass of each model over the rollouts; log-probabilities at the sampling temperature throughout."""
    found = {name: rewarder(rollouts) for name, rewarder in rewarders.items()}
    return ScoredRollouts(
        rollouts=rollouts,
        old=token_scores(policy, rollouts, temperature=temperature, eos_id=eos_id, microbatch=microbatch),
        reference=token_scores(reference, rollouts, temperature=temperature, eos_id=eos_id, microbatch=microbatch),
        values=None if critic is None else _values(critic, rollouts, microbatch),
        scores={name: one.score if isinstance(one, Opinion) else one for name, one in found.items()},
        opinions={name: one for name, one in found.items() if isinstance(one, Opinion)},
    )


@torch.no_grad()
def _values(critic: Any, rollouts: Rollouts, microbatch: int) -> Tensor:
    return by_length(rollouts, lambda part: token_values(critic, part), microbatch)


def last_token_logits(model: Any, rollouts: Rollouts) -> Tensor:
    """[B] raw output of a one-label sequence classifier at each row's last real token."""
    return head_scores(model, rollouts).squeeze(-1)


def head_scores(model: Any, rollouts: Rollouts) -> Tensor:
    """[B, heads] raw output of each head of a sequence classifier at each row's last real token."""
    scores: Tensor = model.score(last_states(model, rollouts))
    return scores


def last_states(model: Any, rollouts: Rollouts) -> Tensor:
    """[B, width] what the heads of a sequence classifier read: the hidden state of each row's last real token."""
    hidden: Tensor = model.base_model(**inputs(rollouts), use_cache=False).last_hidden_state
    last = rollouts.prompt_ids.shape[1] + rollouts.last
    return hidden[torch.arange(len(rollouts)), last]


def by_length(rollouts: Rollouts, score: Callable[[Rollouts], Tensor], microbatch: int) -> Tensor:
    """`score` over micro-batches of similar length, put back in order and padded with zeros to T.

    Short rows then do not pay for the longest. `score` returns [b, t, ...] per response token or [b, ...].
    """
    order = rollouts.last.argsort(stable=True)
    pieces = []
    for index in order.split(microbatch):
        part = rollouts.rows(index)
        piece = score(part)
        missing = rollouts.response_ids.shape[1] - piece.shape[1]
        if piece.shape[1] == part.response_ids.shape[1] and missing and piece.ndim > 2:
            piece = torch.cat([piece, piece.new_zeros(len(index), missing, *piece.shape[2:])], dim=1)
        pieces.append(piece)
    return torch.cat(pieces)[order.argsort()]
