"""Log-probabilities and entropies of next-token distributions, in nats."""

from __future__ import annotations

from torch import Tensor


def next_token_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[..., V] log-softmax of `logits / temperature`, in float32 or better."""
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return (logits / temperature).log_softmax(dim=-1)


def taken(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """[...] log-probability of each taken token from [..., V] log-probabilities."""
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """[...] entropy -sum p log p of [..., V] log-probabilities; tokens of probability zero add nothing."""
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(dim=-1)
