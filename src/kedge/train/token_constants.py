"""Whether a channel pays by the token: a constant per token is a reward for length, whatever it was meant for."""

from __future__ import annotations

import torch
from torch import Tensor

from kedge.structs import Experience

SMALL = 1e-6  # reward per token: below it is rounding
RESIDUAL = 1e-4  # of the channel's own spread, left by a straight line in length


def constant_token_rewards(experience: Experience) -> dict[str, float]:
    """Reward per token, weights included, of each channel that pays every token of every response the same.

    That is a channel whose token rewards are one number other than 0, or one that pays at the end of a response and
    whose sums lie on a straight line in its length: the slope is the same reward per token. Two lengths always lie on
    a line, so the second takes at least three different ones.
    """
    mask = experience.scored.rollouts.response_mask
    rewards = experience.weights[:, None, :] * experience.rewards
    found = {}
    for name, channel in zip(experience.channels, rewards.unbind(dim=-1), strict=True):
        constant = _per_token(channel, mask)
        if abs(constant) > SMALL:
            found[name] = constant
    return found


def constant_words(channel: str, constant: float) -> str:
    """What to say at the start of a run of a channel and its reward per token."""
    pays = "pays" if constant > 0 else "takes"
    which = "long" if constant > 0 else "short"
    return (
        f"channel {channel} {pays} {abs(constant):.3g} reward per token, whatever the token: it is a reward for "
        f"{which} responses -> keep it if that is meant, else set its weight to 0 or let it count once per response"
    )


def _per_token(rewards: Tensor, mask: Tensor) -> float:
    """The number that each true entry of `rewards` [B, T] is, or the slope of its row sums in length; else 0."""
    tokens, lengths = rewards[mask].double(), mask.sum(dim=1).double()
    if len(tokens) > len(mask) and float(tokens.max() - tokens.min()) <= SMALL:
        return float(tokens.mean())
    if len(lengths.unique()) < 3:
        return 0.0
    sums = rewards.masked_fill(~mask, 0).sum(dim=1).double()
    sums, lengths = sums - sums.mean(), lengths - lengths.mean()
    slope = (sums * lengths).sum() / (lengths**2).sum()
    rest = torch.linalg.vector_norm(sums - slope * lengths) / torch.linalg.vector_norm(sums).clamp(min=1e-12)
    return float(slope) if float(rest) <= RESIDUAL else 0.0
