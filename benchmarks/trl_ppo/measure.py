"""What both sides measure of the responses of a step, by the same code. Needs torch and nothing of either side."""

from __future__ import annotations

from typing import Any

import torch
from task import EOS, PAD
from torch import Tensor


@torch.no_grad()
def figures(policy: Any, reference: Any, reward_model: Any, prompts: Tensor, responses: Tensor) -> dict[str, float]:
    """Means over responses that `policy` has just sampled, at temperature 1.

    `prompts` [B, P] are padded on the left, `responses` [B, T] with anything after EOS. Score: of the reward model,
    raw, at the last token, without the penalty for a missing EOS. KL: k1, nats, summed over the response. Length:
    tokens with EOS. Entropy: of the next-token distribution, nats per token. Ended: share with EOS.
    """
    ended = responses == EOS
    mask = (ended.cumsum(dim=1) - ended.long()) == 0
    lengths = mask.sum(dim=1)
    ids = torch.cat([prompts, responses.masked_fill(~mask, PAD)], dim=1)
    attention = torch.cat([prompts != PAD, mask], dim=1).long()
    given = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0)}
    width = prompts.shape[1]
    own, usual = (model(**given).logits[:, width - 1 : -1].log_softmax(dim=-1) for model in (policy, reference))
    said = ids[:, width:].unsqueeze(-1)
    k1 = (own - usual).gather(-1, said).squeeze(-1)
    hidden = reward_model.base_model(**given).last_hidden_state
    last = hidden[torch.arange(len(ids)), width + lengths - 1]
    entropy = -(own.exp() * own).sum(dim=-1)
    return {
        "score": float(reward_model.score(last).mean()),
        "kl": float((k1 * mask).sum(dim=1).mean()),
        "length": float(lengths.float().mean()),
        "entropy": float((entropy * mask).sum() / mask.sum()),
        "ended": float(ended.any(dim=1).float().mean()),
        "padding_said": float(((responses == PAD) & mask).sum()),
    }
