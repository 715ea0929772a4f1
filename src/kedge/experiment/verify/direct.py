"""Methods that learn from pairs or from kept answers, on an enumerable task, through their production loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableModel, Task
from kedge.experiment.verify.training import FREE, every_response, prompts_of, score_of
from kedge.rollout.best_of import BestOf
from kedge.rollout.engine import RolloutEngine, TorchEngine
from kedge.rollout.score import Rewarder
from kedge.structs import Judgments, Prompts, Rollouts, Sampling
from kedge.train.checkpoint import State
from kedge.train.controller import Controllers, Fixed
from kedge.train.direct import DirectSettings, train_direct
from kedge.train.online import train_online
from kedge.train.policy import PolicySettings, Tie
from kedge.train.rejection import train_rejection
from kedge.train.update import Learner, UpdateSettings

VOTES = 64  # annotators that judge each pair


@dataclass(frozen=True)
class Direct:
    """Steps of Adam at a rate that falls to zero, on `batch` pairs or answers each."""

    steps: int
    batch: int
    lr: float
    seed: int = 0

    def learner(self, task: Task) -> Learner:
        policy = TableModel(task.space, task.reference)
        return Learner(policy, torch.optim.Adam(policy.parameters(), lr=self.lr))

    def update_settings(self) -> UpdateSettings:
        return UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=FREE, microbatch=4 * self.batch)

    def policy_settings(self, space: Space) -> PolicySettings:
        return PolicySettings(
            steps=self.steps,
            sampling=Sampling(space.budget),
            update=self.update_settings(),
            weights={"score": 1.0, "length": 0.0, "missing_eos": 0.0},
            gamma=1.0,
            lam=1.0,
            whiten=False,
            critic_warmup=0,
            seed=self.seed,
            eos_id=EOS,
            final_lr=0.0,
        )


def from_pairs(
    task: Task, method: Literal["dpo", "ipo"], direct: Direct, strength: float, label_smoothing: float = 0.0
) -> Tensor:
    """The policy's table after DPO of beta `strength`, or IPO of tau `strength`, on the judgments of `population`."""
    learner = direct.learner(task)
    settings = DirectSettings(
        method=method,
        steps=direct.steps,
        pairs_per_step=direct.batch,
        update=direct.update_settings(),
        beta=strength,
        label_smoothing=label_smoothing,
        seed=direct.seed,
        eos_id=EOS,
        final_lr=0.0,
    )
    reference = TableModel(task.space, task.reference)
    return _end(learner, train_direct(learner, reference, population(task), settings, _tied(task)))


def population(task: Task) -> Judgments:
    """Every two responses to a prompt, judged `VOTES` times in the proportions of Bradley and Terry, to half a vote.

    The pairs' sampling distribution mu is thus uniform over the space.
    """
    space = task.space
    count = len(space.sequences)
    first, second = torch.combinations(torch.arange(count)).unbind(dim=1)
    index = []
    for prompt in range(space.prompts):
        votes = (VOTES * torch.sigmoid(task.reward[prompt, first] - task.reward[prompt, second])).round().long()
        for winner, loser, times in ((first, second, votes), (second, first, VOTES - votes)):
            index.append(torch.stack([winner, loser], dim=1).repeat_interleave(times, dim=0) + prompt * count)
    pairs = torch.cat(index)
    grades = torch.tensor([[1.0, 0.0]]).expand(len(pairs), -1)
    return Judgments(every_response(space, range(space.prompts)), pairs, grades, torch.zeros(len(pairs)))


def annotated(task: Task, seed: int) -> Rewarder:
    """The task's reward with Gumbel noise: of two answers the first scores higher with Bradley and Terry's chance."""
    generator = torch.Generator().manual_seed(seed)

    def score(rollouts: Rollouts) -> Tensor:
        chance = torch.rand(len(rollouts), generator=generator, dtype=torch.float64).clamp(min=1e-300)
        return score_of(task)(rollouts) - (-chance.log()).log()

    return score


def from_own_pairs(task: Task, direct: Direct, judge: Rewarder, label_smoothing: float = 0.0) -> Tensor:
    """The policy's table after online DPO: two answers of the policy to each prompt, `judge` says which is better."""
    learner, engine = direct.learner(task), TorchEngine(eos_id=EOS, pad_id=PAD, batch=direct.batch)
    loop = train_online(
        learner,
        Tie(TableModel(task.space, task.reference)),
        {"score": judge},
        lambda _: prompts_of(task.space, direct.batch, 2),
        engine,
        replace(direct.policy_settings(task.space), label_smoothing=label_smoothing),
        _tied(task),
    )
    return _end(learner, loop)


@dataclass(frozen=True)
class Drawn:
    """An engine that draws from one policy, whichever learns: a single round of imitation."""

    engine: RolloutEngine
    policy: Any

    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts:
        del policy
        return self.engine.generate(self.policy, prompts, sampling, generator, policy_version)


def from_kept(task: Task, direct: Direct, n: int) -> Tensor:
    """The policy's table after imitating the best of `n` answers of the reference."""
    learner, reference = direct.learner(task), TableModel(task.space, task.reference)
    loop = train_rejection(
        learner,
        Tie(reference),
        {"score": score_of(task)},
        lambda _: prompts_of(task.space, direct.batch, n),
        Drawn(TorchEngine(eos_id=EOS, pad_id=PAD, batch=direct.batch), reference),
        direct.policy_settings(task.space),
        _tied(task),
    )
    return _end(learner, loop)


def kept(task: Task, n: int, draws: int, seed: int = 0) -> Tensor:
    """[prompts, N] log of the share of each response among `draws` answers that are the best of `n`."""
    space = task.space
    engine = BestOf(TorchEngine(eos_id=EOS, pad_id=PAD, batch=draws), n, score_of(task))
    generator = torch.Generator().manual_seed(seed)
    drawn = engine.generate(
        TableModel(space, task.reference), prompts_of(space, draws), Sampling(space.budget), generator
    )
    index = drawn.group_id * len(space.sequences) + space.index_of(drawn.response_ids, drawn.response_mask)
    counts = torch.bincount(index, minlength=space.prompts * len(space.sequences)).view(space.prompts, -1).double()
    return (counts / counts.sum(dim=1, keepdim=True)).log()


def _end(learner: Learner, loop: Iterator[Any]) -> Tensor:
    for _ in loop:
        pass
    table: Tensor = learner.policy.table.detach()
    return table


def _tied(task: Task) -> State:
    """The state of a loop that begins, its coefficient fixed."""
    return State(0, Controllers.of(Fixed(task.beta)))
