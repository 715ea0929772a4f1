"""The pretraining mix: which rows come when, and what they add to the gradient."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_learner import PAD, VOCABULARY, policy

from kedge.rollout.given import as_rollouts
from kedge.structs import Rollouts
from kedge.train.mix import Mix, mix_backward


def demonstrations(count: int = 13) -> Rollouts:
    generator = torch.Generator().manual_seed(2)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return as_rollouts([ids(6) for _ in range(count)], [ids(9) for _ in range(count)], PAD)


ROWS = demonstrations()


def mix(seed: int = 0, size: int = 4, epochs: int = 2, minibatches: int = 3) -> Mix:
    return Mix(ROWS, size, epochs, minibatches, seed)


@given(size=st.integers(1, 30), epochs=st.integers(1, 3), minibatches=st.integers(1, 4))
def test_every_row_comes_once_before_any_comes_again(size: int, epochs: int, minibatches: int) -> None:
    dealt = mix(0, size, epochs, minibatches)
    seen: list[int] = []
    for step in range(2):
        deal = dealt.at(step)
        for epoch in range(epochs):
            for minibatch in range(minibatches):
                batch = deal(epoch, minibatch)
                assert len(batch) == size
                seen += batch.group_id.tolist()
                assert torch.equal(batch.group_id, dealt.batch(step, epoch, minibatch).group_id)
    for begin in range(0, len(seen), len(ROWS)):
        once = seen[begin : begin + len(ROWS)]
        assert max(Counter(once).values()) == 1


def test_another_seed_and_another_pass_have_another_order() -> None:
    whole = mix(size=len(ROWS), epochs=1, minibatches=2)
    first, second = (whole.batch(0, 0, n).group_id.tolist() for n in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert mix(1, len(ROWS), 1, 2).batch(0, 0, 0).group_id.tolist() != first


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_the_loss_is_the_mean_over_tokens_and_its_gradient_is_added(microbatch: int) -> None:
    """Against a loop over rows and positions that reads log-probabilities one by one."""
    model, batch = policy(), mix().batch(0, 0, 0)
    total, count = torch.zeros(()), 0
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
        response = batch.response_ids[row][batch.response_mask[row]].tolist()
        for place, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:place]])).logits[0, -1]
            total, count = total - logits.log_softmax(dim=-1)[token], count + 1
    before = [torch.full_like(weight, 0.5) for weight in model.parameters()]
    expected = torch.autograd.grad(3.0 * total / count, list(model.parameters()))
    for weight, held in zip(model.parameters(), before, strict=True):
        weight.grad = held.clone()
    found = mix_backward(model, batch, 3.0, microbatch)
    assert found.item() == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert not found.requires_grad
    for weight, held, gradient in zip(model.parameters(), before, expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, held + gradient, rtol=1e-4, atol=1e-6)


def test_descending_it_makes_the_demonstrations_likelier() -> None:
    model, dealt = policy(), mix(size=len(ROWS))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        losses.append(float(mix_backward(model, dealt.batch(step, 0, 0), 1.0, 64)))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert losses[0] < 2 * math.log(VOCABULARY)
