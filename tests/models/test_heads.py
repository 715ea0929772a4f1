"""The critic's heads and the normalisation of the score."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedge.data.tokenise import train_tokenizer
from kedge.errors import DivergenceError, InputError
from kedge.models.heads import Critic, score_normalisation, set_score_normalisation
from kedge.models.load import load_classifier, reward_model_from, save_model, scratch_policy
from kedge.models.reward import reward_model

HEADS = ("score", "kl", "length")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the desk is open until six"] * 5, vocab=280)


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tokenizer):
    policy = scratch_policy(tokenizer, family=request.param, hidden=32, layers=2, heads=4, context=48, seed=1)
    model = reward_model_from(policy, seed=2)
    set_score_normalisation(model, 0.7, 1.6)
    return model


def columns(lengths=(9, 4, 6)):
    """Left-padded inputs of the given lengths."""
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    ids = torch.randint(7, 280, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


def test_the_score_head_starts_as_the_normalised_reward_model(model):
    critic = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    inputs = columns()
    values = critic(**inputs)
    assert values.shape == (3, 9, 3)
    raw = model(**inputs).logits[:, 0]
    torch.testing.assert_close(values[:, -1, 0], (raw - 0.7) / 1.6)
    torch.testing.assert_close(values[:, -1, 0], reward_model([model]).normalised(raw[:, None])[:, 0])
    assert (values[..., 1:] == 0).all()


def test_calibrated_heads_start_at_the_mean_and_move_in_its_unit(model):
    critic = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    before = critic(**columns())
    critic.calibrate(torch.tensor([9.0, 4.0, 20.0]), torch.tensor([9.0, 2.0, 0.0]))
    after = critic(**columns())
    assert torch.equal(after[..., 0], before[..., 0])
    assert (after[..., 1] == 4).all() and (after[..., 2] == 20).all()
    with torch.no_grad():
        critic.heads.bias.add_(1)
    moved = critic(**columns()) - after
    torch.testing.assert_close(moved.mean(dim=(0, 1)), torch.tensor([1 / 1.6, 2.0, 1.0]))


def test_a_critic_without_a_score_head_starts_flat(model):
    critic = Critic.from_reward_model(reward_model([model]), ("critic",), None)
    critic.calibrate(torch.tensor([3.0]), torch.tensor([2.0]))
    assert (critic(**columns()) == 3).all()
    with pytest.raises(ValueError, match="score_index 1 is outside the 1 heads"):
        Critic.from_reward_model(reward_model([model]), ("critic",), 1)


def test_the_trunk_is_its_own(model):
    critic = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    expected = model(**columns()).logits
    critic(**columns()).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for name, parameter in critic.named_parameters() if "wte" not in name)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1)
    assert torch.equal(model(**columns()).logits, expected)


def test_padding_in_front_changes_no_value(model):
    critic = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    padded = columns((5, 9))
    alone = {name: value[:1, 4:] for name, value in padded.items()}
    torch.testing.assert_close(critic(**padded)[:1, 4:], critic(**alone), atol=1e-5, rtol=1e-5)


def test_the_state_dict_carries_everything_through_safetensors(model, tmp_path):
    critic = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    critic.calibrate(torch.tensor([9.0, 4.0, 20.0]), torch.tensor([9.0, 2.0, 5.0]))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(1.1).add_(0.01)
    save_file(critic.state_dict(), tmp_path / "critic.safetensors")
    again = Critic.from_reward_model(reward_model([model]), HEADS, 0)
    again.load_state_dict(load_file(tmp_path / "critic.safetensors"))
    assert torch.equal(again(**columns()), critic(**columns()))


def test_the_normalisation_is_saved_with_the_reward_model(model, tokenizer, tmp_path):
    save_model(model, tokenizer, tmp_path / "reward")
    again = load_classifier(tmp_path / "reward")
    assert score_normalisation(again) == (0.7, 1.6)
    raw = torch.tensor([[0.7], [2.3]])
    torch.testing.assert_close(reward_model([again]).normalised(raw), torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(
        Critic.from_reward_model(reward_model([again]), HEADS, 0).scale[0], torch.tensor(1 / 1.6)
    )


def test_a_model_never_normalised_returns_the_raw_score(tokenizer):
    policy = scratch_policy(tokenizer, family="llama", hidden=16, layers=1, heads=2, context=8, seed=1)
    raw = torch.tensor([[0.5], [-2.0]])
    assert torch.equal(reward_model([reward_model_from(policy, seed=1)]).normalised(raw), raw)


def test_normalisations_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match="do not vary"):
        set_score_normalisation(model, 0.0, 0.0)
    for mean, scale in ((float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(DivergenceError, match="not finite"):
            set_score_normalisation(model, mean, scale)
    assert score_normalisation(model) == (0.7, 1.6)
