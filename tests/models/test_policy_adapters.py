"""A policy with adapters, and the reference that is the same weights with the adapters off."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kedge.models.lora import WithoutAdapters, adapted_policy, merged


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


IDS = torch.arange(10).view(2, 5)


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits  # type: ignore[operator]
    return found


@pytest.mark.parametrize("family", [llama, gpt2])
def test_trained_adapters_move_the_policy_and_not_its_reference(family) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    plain = family()
    before = logits(plain)
    policy = adapted_policy(copy.deepcopy(plain), 2, seed=1)
    reference = WithoutAdapters(policy)
    assert torch.equal(logits(policy), before), "adapters start at nothing"
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in policy.parameters()) / 2
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(3):
        loss = policy(input_ids=IDS, labels=IDS).loss
        logits(reference)  # between the forward and the backward pass, as where the loss holds the whole vocabulary
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    assert torch.equal(logits(reference), before)
    after = logits(policy)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged(policy)), after, atol=1e-5, rtol=1e-4)
