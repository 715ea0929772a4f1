"""Tiny models of two families with random weights, and prompts of unequal length for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from kedge.rollout.given import as_prompts
from kedge.structs import Prompts

VOCABULARY, EOS, PAD, BUDGET = 12, 1, 0, 14
FAMILIES = ("llama", "gpt2")


def config_of(family: str) -> Any:
    shared = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    if family == "gpt2":
        rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=48, **rates, **shared)
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        tie_word_embeddings=False,
        **shared,
    )


def language_model(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return (GPT2LMHeadModel if family == "gpt2" else LlamaForCausalLM)(config_of(family)).eval()


def classifier(family: str, seed: int = 0) -> Any:
    config = config_of(family)
    config.num_labels = 1
    torch.manual_seed(seed)
    kind = GPT2ForSequenceClassification if family == "gpt2" else LlamaForSequenceClassification
    return kind(config).eval()


def prompts(count: int = 24, seed: int = 0) -> Prompts:
    """Prompts of one to nine tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return as_prompts([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], PAD)
