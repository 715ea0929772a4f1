"""What must be the same update: A2C and PPO's first pass, and channels with a scalar critic and textbook PPO."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lab import FREE, Ppo, generate, score, train, weights_for
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, TableCritic, TableModel, random_table, random_task
from kedge.structs import ScoredRollouts
from kedge.train.experience import make_experience
from kedge.train.methods import METHODS
from kedge.train.update import Learner, UpdateSettings, update

SPACE = Space(3, 3, prompts=2)
TASK = random_task(SPACE, seed=7)
WEIGHTS = {**weights_for(TASK.beta), "length": -0.03, "missing_eos": -0.4}
ROUNDS, EPOCHS, CLIP, LAM = 4, 3, 0.2, 0.95


@pytest.mark.parametrize("clip", ["free", "clipped"])
def test_a2c_is_ppo_with_one_epoch_and_one_minibatch_bit_for_bit(clip: str) -> None:
    """On a first pass the ratio is 1, so that it does not even matter whether PPO clips."""
    once = Ppo(METHODS["a2c"], steps=20, epochs=1, lam=LAM, whiten=True, heads=4)
    method = METHODS["ppo"] if clip == "clipped" else replace(METHODS["ppo"], clipped=False)
    assert torch.equal(train(TASK, once), train(TASK, replace(once, method=method)))
    assert not torch.equal(train(TASK, once), train(TASK, replace(once, method=METHODS["ppo"], epochs=2)))


def drawn(learner: Learner, seed: int) -> ScoredRollouts:
    rollouts = generate(SPACE, learner.policy, 64, torch.Generator().manual_seed(seed))
    return score(rollouts, learner.policy, TASK, learner.critic)


def learner() -> Learner:
    policy = TableModel(SPACE, TASK.reference + random_table(SPACE, 3, scale=0.4))
    critic = TableCritic(SPACE, random_table(SPACE, 4, width=1))
    return Learner(
        policy, torch.optim.Adam(policy.parameters(), lr=0.1), critic, torch.optim.Adam(critic.parameters(), lr=0.1)
    )


def textbook(found: Learner, scored: ScoredRollouts) -> None:
    """Plain PPO on one reward per token: loops for the advantages, tables read by state, one loss for each model."""
    rollouts = scored.rollouts
    mask, rows = rollouts.response_mask, len(rollouts)
    index = SPACE.index_of(rollouts.response_ids, mask)
    states, actions = SPACE.path[0][index][:, : mask.shape[1]], SPACE.path[1][index][:, : mask.shape[1]]
    prompt = rollouts.group_id
    old = found.policy.table.detach().log_softmax(-1)
    usual = TASK.reference.log_softmax(-1)
    values = found.critic.table.detach()[..., 0]
    advantages, returns = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(rows):
        p, end = int(prompt[b]), int(mask[b].sum()) - 1
        following, running = 0.0, 0.0
        for t in range(end, -1, -1):
            s, a = int(states[b, t]), int(actions[b, t])
            reward = -TASK.beta * float(old[p, s, a] - usual[p, s, a]) - 0.03
            if t == end:
                reward += float(TASK.reward[p, index[b]]) - (0.0 if rollouts.ended[b] else 0.4)
            value = float(values[p, s])
            running = reward + following - value + LAM * running
            following = value
            advantages[b, t], returns[b, t] = running, running + value
    chosen = advantages[mask]
    whitened = (advantages - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt()
    where = prompt[:, None], states, actions
    for _ in range(EPOCHS):
        ratio = torch.exp(found.policy.table.log_softmax(-1)[where] - old[where])
        held = ratio.clamp(1 - CLIP, 1 + CLIP)
        _step(found.optimizer, -torch.minimum(ratio * whitened, held * whitened)[mask].mean())
        error = found.critic.table[prompt[:, None], states, 0] - returns
        _step(found.critic_optimizer, (error[mask] ** 2).mean() / 2)


def _step(optimizer: torch.optim.Optimizer | None, loss: Tensor) -> None:
    assert optimizer is not None
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_channels_with_a_scalar_critic_are_textbook_ppo() -> None:
    """Rounds of sampling and several epochs each, with every channel of the reward in use."""
    settings = UpdateSettings(EPOCHS, 1, clip=CLIP, value_clip=math.inf, max_grad_norm=FREE)
    ours, plain = learner(), learner()
    start = ours.policy.table.detach().clone()
    for number in range(ROUNDS):
        experience = make_experience(drawn(ours, number), weights=WEIGHTS, gamma=1.0, lam=LAM, whiten=True)
        assert experience.channels[-1] == "critic"
        one = torch.ones(1, dtype=torch.float64)
        update(ours, experience, settings, torch.Generator(), return_variance=one)
        textbook(plain, drawn(plain, number))
        assert torch.allclose(ours.policy.table, plain.policy.table, atol=1e-9)
        assert torch.allclose(ours.critic.table, plain.critic.table, atol=1e-9)
    assert (ours.policy.table - start).abs().max() > 0.3
