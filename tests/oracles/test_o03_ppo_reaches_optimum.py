"""O3: PPO through the production functions reaches pi* = reference exp(r / beta) / Z; wrong configurations do not.

The optimum is the same for every choice of lambda, critic, whitening, minibatches and precision: at pi* every
advantage is zero, so none of them can move it.
"""

from __future__ import annotations

import pytest
import torch
from lab import Ppo, train, with_advantage, with_kl_in_loss, with_rewards
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, Task, random_task
from kedge.ops.kl import absolute, k2, k3
from kedge.structs import Experience
from kedge.train.methods import METHODS

TASK = random_task(Space(3, 3))
TWO_PROMPTS = random_task(Space(2, 3, prompts=2), seed=4)
DEFAULTS = Ppo(lam=0.95, whiten=True, heads=4)


def shortfall(task: Task, table: Tensor) -> float:
    """Share of the possible gain in J that was left behind."""
    best, start = task.objective(task.optimum), task.objective(task.reference_logprobs)
    reached = task.objective(task.space.sequence_logprobs(table.double()))
    return float((best - reached) / (best - start))


RIGHT = {
    "lambda 1 without critic": (TASK, Ppo(batch=4096, steps=120)),
    "lambda 1 with channel critic": (TASK, Ppo(heads=4)),
    "lambda .95, channel critic, whitening": (TASK, DEFAULTS),
    "lambda .95, scalar critic, whitening": (TASK, Ppo(lam=0.95, whiten=True, heads=1)),
    "four minibatches": (TASK, Ppo(lam=0.95, whiten=True, heads=4, steps=80, epochs=1, minibatches=4)),
    "two prompts of unequal length": (TWO_PROMPTS, DEFAULTS),
    "A2C": (TASK, Ppo(METHODS["a2c"], lam=0.95, whiten=True, heads=4, epochs=1)),
    "RLOO": (TWO_PROMPTS, Ppo(METHODS["rloo"], group=4, epochs=1)),
    "GRPO": (TWO_PROMPTS, Ppo(METHODS["grpo"], group=4, epochs=1)),
    "Dr. GRPO": (TWO_PROMPTS, Ppo(METHODS["dr_grpo"], group=4)),
    "REINFORCE++": (TWO_PROMPTS, Ppo(METHODS["reinforce_pp"], batch=2048, epochs=1)),
    "k2 of the sequence in the loss": (TWO_PROMPTS, Ppo(METHODS["rloo"], kl_loss="k2", batch=4096, lr=0.06)),
    "single precision": (TASK, Ppo(lam=0.95, whiten=True, heads=4, double=False)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_sampled_ppo_reaches_the_optimum(name: str) -> None:
    task, ppo = RIGHT[name]
    assert task.distance(task.reference) > 0.2
    table = train(task, ppo)
    assert task.distance(table) < 0.01
    assert shortfall(task, table) < 0.01


@pytest.mark.slow
def test_sampled_ppo_reaches_the_optimum_of_the_largest_space() -> None:
    task = random_task(Space(3, 4), seed=2)
    table = train(task, Ppo(lam=0.95, whiten=True, heads=4, steps=300, batch=2048))
    assert task.distance(table) < 0.01
    assert shortfall(task, table) < 0.01


def score_one_token_early(experience: Experience, ppo: Ppo) -> Experience:
    """The score arrives before the last token, which then never hears of it."""
    rewards = experience.rewards.clone()
    column = experience.channels.index("score")
    rewards[..., column] = torch.nn.functional.pad(rewards[:, 1:, column], (0, 1))
    return with_rewards(experience, rewards, ppo)


def gradient_like_grpo(experience: Experience, ppo: Ppo) -> Experience:
    """Scores standardised over the batch, k3 in the loss, each response averaged over its own tokens."""
    rollouts, scored = experience.scored.rollouts, experience.scored
    score = scored.scores["score"]
    score = ((score - score.mean()) / score.std()).unsqueeze(1)
    saturating = 1 - torch.exp(scored.reference.logprobs - scored.old.logprobs)
    per_response = (rollouts.lengths.double().mean() / rollouts.lengths).unsqueeze(1)
    return with_advantage(experience, (score - TASK.beta * saturating) * per_response * rollouts.response_mask)


def token_k2_with_response_means(experience: Experience, ppo: Ppo) -> Experience:
    """k2 per token in the loss, each response averaged over its own tokens."""
    wrong = with_kl_in_loss(lambda k: k, TASK.beta)(experience, ppo)
    rollouts = experience.scored.rollouts
    return with_advantage(wrong, wrong.advantage() * (rollouts.lengths.double().mean() / rollouts.lengths).unsqueeze(1))


PLAIN = {"lam": 0.95, "heads": 4, "steps": 80, "epochs": 1, "lr": 0.15}
WRONG = {
    "KL dropped": Ppo(**PLAIN, beta=0.0),
    "KL with the wrong sign": Ppo(**PLAIN, beta=-TASK.beta),
    "k2 in the reward": Ppo(**PLAIN, kl_reward=k2),
    "k3 in the reward": Ppo(**PLAIN, kl_reward=k3),
    "absolute k1 in the reward": Ppo(**PLAIN, kl_reward=absolute),
    "k1 as a loss": Ppo(**PLAIN, kl_loss="k1"),
    "token k2 as a loss": Ppo(**PLAIN, tamper=with_kl_in_loss(lambda k: k, TASK.beta)),
    "token k3 as a loss": Ppo(**PLAIN, kl_loss="k3"),
    "token k2 as a loss, response means": Ppo(**PLAIN, tamper=token_k2_with_response_means),
    "GRPO's gradient": Ppo(**PLAIN, tamper=gradient_like_grpo),
    "score one token early": Ppo(**PLAIN, tamper=score_one_token_early),
}


def test_the_setting_of_the_wrong_configurations_is_itself_right() -> None:
    table = train(TASK, Ppo(**PLAIN))
    assert TASK.distance(table) < 0.01 and shortfall(TASK, table) < 0.01


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations_miss_the_optimum(name: str) -> None:
    table = train(TASK, WRONG[name])
    assert TASK.distance(table) > 0.05
    assert shortfall(TASK, table) > 0.02
