"""Training on an enumerable task with the functions that train any policy, in their production order.

`generate` -> `score_rollouts` -> `make_experience` -> `update`, under Adam whose rate falls to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableCritic, TableModel, Task
from kedge.ops.kl import k1
from kedge.ops.masked import masked_variance
from kedge.ops.rewards import Estimator
from kedge.rollout.engine import TorchEngine
from kedge.rollout.score import score_rollouts
from kedge.structs import Experience, Prompts, Rollouts, Sampling, ScoredRollouts
from kedge.train.experience import make_experience
from kedge.train.methods import PPO, Method
from kedge.train.update import Learner, UpdateSettings, update

FREE = 1e9  # a gradient norm that nothing exceeds
VARIANCE_FLOOR = 1e-4  # of the returns of a channel that never pays


@dataclass(frozen=True)
class OnPolicy:
    """The settings of an on-policy training.

    `heads` of the critic: None trains without one. `group` responses share a prompt; None puts all responses to a
    prompt in one group. `beta` None takes the task's; it stands in the loss where `kl_loss` names an estimator, else in
    the reward.
    """

    method: Method = PPO
    steps: int = 120
    batch: int = 512
    lr: float = 0.1
    epochs: int = 2
    minibatches: int = 1
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = False
    heads: int | None = None
    group: int | None = None
    beta: float | None = None
    kl_reward: Estimator = k1
    kl_loss: str | None = None
    length: float = 0.0  # reward per token
    seed: int = 0
    double: bool = True

    def update_settings(self, space: Space) -> UpdateSettings:
        return UpdateSettings(
            epochs=self.epochs,
            minibatches=self.minibatches,
            clip=0.2 if self.method.clipped else math.inf,
            aggregation=self.method.aggregation,
            budget=space.budget,
            kl_loss=self.kl_loss,
            max_grad_norm=FREE,
            microbatch=self.batch,
        )


def train(
    task: Task,
    settings: OnPolicy,
    start: Tensor | None = None,
    experience_of: Callable[..., Experience] = make_experience,
) -> Tensor:
    """The policy's table after training from `start`, or from the reference; where it diverges, as it was before."""
    policy = TableModel(task.space, task.reference if start is None else start)
    if not settings.double:
        policy = policy.float()
    learner = _learner(policy, settings)
    reference = TableModel(task.space, task.reference.to(policy.table.dtype))
    generator = torch.Generator().manual_seed(settings.seed)
    beta = task.beta if settings.beta is None else settings.beta
    in_loss = settings.kl_loss is not None
    weights = weights_for(0.0 if in_loss else beta) | {"length": settings.length}
    for step in range(settings.steps):
        cooled(learner, settings.lr, step / settings.steps)
        rollouts = generate(task.space, policy, settings.batch, generator, settings.group)
        experience = experience_of(
            score(rollouts, policy, task, learner.critic),
            weights=weights,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten=settings.whiten,
            method=settings.method,
            kl_estimator=settings.kl_reward,
            loss_beta=beta if in_loss else 0.0,
        )
        try:
            update(
                learner,
                experience,
                settings.update_settings(task.space),
                generator,
                return_variance=variance_of(experience),
                reference=reference,
            )
        except DivergenceError:
            break
    return policy.table.detach()


def _learner(policy: TableModel, settings: OnPolicy) -> Learner:
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.lr)
    if settings.heads is None:
        return Learner(policy, optimizer)
    shape = (*policy.table.shape[:2], settings.heads)
    critic = TableCritic(policy.space, torch.zeros(shape, dtype=policy.table.dtype))
    return Learner(policy, optimizer, critic, torch.optim.Adam(critic.parameters(), lr=settings.lr))


def cooled(learner: Learner, lr: float, share: float) -> None:
    """Learning rates after a `share` of the training: half a cosine from `lr` to zero."""
    for optimizer in (learner.optimizer, learner.critic_optimizer):
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * share)) / 2


def prompts_of(space: Space, batch: int, group: int | None = None) -> Prompts:
    """`batch` prompts, `group` rows of each in turn; the group modulo the number of prompts is the prompt's number."""
    row = torch.arange(batch)
    group_id = row % space.prompts if group is None else row // group
    ids, mask = space.prompt_ids(group_id % space.prompts)
    return Prompts(ids, mask, group_id)


def every_response(space: Space, prompts: Sequence[int]) -> Rollouts:
    """Every response to each of `prompts` once, in the order of `space.sequences`."""
    count = len(space.sequences)
    prompt = torch.tensor(prompts).repeat_interleave(count)
    sequence = torch.arange(count).repeat(len(prompts))
    ids, mask = space.prompt_ids(prompt)
    return Rollouts(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=space.response_ids(sequence),
        response_mask=space.mask[sequence],
        ended=space.ended[sequence],
        group_id=prompt,
        behaviour_logprobs=torch.zeros(len(prompt), space.budget, dtype=torch.float64),
    )


def generate(
    space: Space, policy: TableModel, batch: int, generator: torch.Generator, group: int | None = None
) -> Rollouts:
    engine = TorchEngine(eos_id=EOS, pad_id=PAD, batch=batch)
    return engine.generate(policy, prompts_of(space, batch, group), Sampling(space.budget), generator)


def score(rollouts: Rollouts, policy: TableModel, task: Task, critic: TableCritic | None = None) -> ScoredRollouts:
    """One pass of policy, reference and critic, all at temperature 1, and the task's reward."""
    return score_rollouts(
        rollouts,
        policy,
        TableModel(task.space, task.reference.to(policy.table.dtype)),
        critic,
        {"score": score_of(task)},
        temperature=1.0,
        eos_id=EOS,
        microbatch=len(rollouts),
    )


def score_of(task: Task) -> Callable[[Rollouts], Tensor]:
    """The task's reward as a terminal score."""
    return lambda r: task.reward[r.group_id % task.space.prompts, task.space.index_of(r.response_ids, r.response_mask)]


def weights_for(beta: float) -> dict[str, float]:
    """Reward per unit of each channel: the score and the KL."""
    return {"score": 1.0, "kl": -beta, "length": 0.0, "missing_eos": 0.0}


def variance_of(experience: Experience) -> Tensor:
    """[heads] variance of the returns over the batch, with a floor for heads that never see a reward."""
    mask = experience.scored.rollouts.response_mask
    found = [masked_variance(head, mask) for head in experience.returns.unbind(-1)]
    return torch.stack(found).clamp(min=VARIANCE_FLOOR)
