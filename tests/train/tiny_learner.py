"""A tiny policy, its reference and its critic, with a batch of experience for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from kedge.models.heads import Critic
from kedge.models.reward import RewardModel
from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_prompts
from kedge.rollout.score import score_rollouts
from kedge.structs import Experience, Prompts, Rollouts, Sampling
from kedge.train.experience import channel_names, make_experience
from kedge.train.update import Learner

VOCABULARY, EOS, PAD, BUDGET = 12, 1, 0, 10
WEIGHTS = {"score": 1.0, "kl": -0.1, "length": -0.02, "missing_eos": -0.5}


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.2,
    )


def policy(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()


def reward_model(seed: int = 3, heads: int = 1) -> Any:
    settings = config()
    settings.num_labels = heads
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(settings).eval()


def learner(scalar: bool = False, lr: float = 1e-3, seed: int = 0) -> Learner:
    heads = ("critic",) if scalar else channel_names(("score",))
    judge = RewardModel((reward_model(),), means=(0.0,), scales=(1.0,))
    critic = Critic.from_reward_model(judge, heads, None if scalar else 0)
    model = policy(seed)
    return Learner(
        model,
        torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5),
        critic,
        torch.optim.Adam(critic.parameters(), lr=lr, eps=1e-5),
    )


def pool(count: int = 32) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    return as_prompts([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], PAD)


def likes_fours(rollouts: Rollouts) -> torch.Tensor:
    """A score that a policy can learn to raise."""
    return ((rollouts.response_ids == 4) & rollouts.response_mask).sum(dim=1).float()


def drawn(of: Any, count: int = 32, sampling: Sampling | None = None) -> Rollouts:
    generator = torch.Generator().manual_seed(1)
    return TorchEngine(EOS, PAD).generate(of, pool(count), sampling or Sampling(BUDGET), generator)


def experience(
    of: Learner, rollouts: Rollouts | None = None, *, whiten: bool = True, temperature: float = 1.0
) -> Experience:
    rollouts = drawn(of.policy) if rollouts is None else rollouts
    reference = policy(seed=9)
    rewarders = {"score": likes_fours}
    scored = score_rollouts(rollouts, of.policy, reference, of.critic, rewarders, temperature=temperature, eos_id=EOS)
    return make_experience(scored, weights=WEIGHTS, gamma=1.0, lam=0.95, whiten=whiten)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())
