"""The models of the policy stage: what is trained, and what it is tied to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kedge.models.heads import Critic
from kedge.models.lora import WithoutAdapters, adapted_policy
from kedge.pipeline.context import Context
from kedge.train.schedule import seed_of
from kedge.train.update import Learner

ADAM_EPSILON = 1e-5  # as in the original implementations; 1e-8 makes the first steps erratic


def trainable_policy(context: Context) -> Any:
    """The supervised policy as this run trains it: its weights, or adapters on them."""
    policy, rank = context.policy(context.run.models / "sft"), context.recipe.policy.lora_rank
    return adapted_policy(policy, rank, seed_of(context.recipe.seed, "policy adapters")) if rank else policy


def references(context: Context, policy: Any) -> tuple[Any, Any]:
    """What the policy is tied to, and the supervised policy it began as: one model where they are the same."""
    settings, sft = context.recipe.policy, context.run.models / "sft"
    if settings.lora_rank:
        original = WithoutAdapters(policy)
    else:
        original = context.policy(sft).requires_grad_(False)
    if settings.reference != "sft":
        return context.policy(Path(settings.reference)).requires_grad_(False), original
    if settings.reference_every:
        return context.policy(sft).requires_grad_(False), original
    return original, original


def learner_of(context: Context, policy: Any, reference: Any = None, critic: Critic | None = None) -> Learner:
    """The models that learn, each with an optimiser of its own, and the reference if it is one that moves."""
    settings = context.recipe.policy
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr, eps=ADAM_EPSILON)
    moving = reference if settings.reference_every else None
    if critic is None:
        return Learner(policy, optimizer, reference=moving)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=settings.critic_lr, eps=ADAM_EPSILON)
    return Learner(policy, optimizer, critic, critic_optimizer, moving)
