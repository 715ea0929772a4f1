"""The whole policy loop on an enumerable task: fixed beta reaches pi*, adaptive beta reaches its KL target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab import FREE, prompts_of, score_of
from torch import Tensor

from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableCritic, TableModel, random_task
from kedge.rollout.engine import TorchEngine
from kedge.structs import Sampling
from kedge.train.checkpoint import State
from kedge.train.controller import Adaptive, Controller, Controllers, Fixed
from kedge.train.policy import PolicySettings, Tie, train_policy
from kedge.train.update import Learner, UpdateSettings

SPACE = Space(3, 3, prompts=2)
TASK = random_task(SPACE, seed=12)
BATCH = 512


class UnitCritic(TableCritic):
    """A table critic that starts in the unit of the returns, as the package's critic does."""

    def __init__(self, space: Space, heads: int) -> None:
        super().__init__(space, torch.zeros(space.prompts, len(space.prefixes), heads, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(heads, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(heads, dtype=torch.float64))

    def calibrate(self, returns_mean: Tensor, returns_std: Tensor) -> None:
        self.shift, self.scale = returns_mean, torch.where(returns_std > 0, returns_std, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: object
    ) -> Tensor:
        return self.shift + self.scale * super().forward(input_ids, attention_mask)


def run(controller: Controller, heads: int, steps: int, lr: float, final_lr: float) -> tuple[Tensor, State]:
    """The policy's table and the loop's state after training from the reference."""
    policy = TableModel(SPACE, TASK.reference)
    critic = UnitCritic(SPACE, heads)
    optimizers = [torch.optim.Adam(module.parameters(), lr=lr) for module in (policy, critic)]
    learner = Learner(policy, optimizers[0], critic, optimizers[1])
    settings = PolicySettings(
        steps=steps,
        sampling=Sampling(SPACE.budget),
        update=UpdateSettings(epochs=2, minibatches=1, clip=0.2, max_grad_norm=FREE, microbatch=BATCH),
        weights={"score": 1.0, "length": 0.0, "missing_eos": 0.0},
        gamma=1.0,
        lam=0.95,
        whiten=True,
        critic_warmup=2,
        seed=0,
        eos_id=EOS,
        final_lr=final_lr / lr,
    )
    state = State(0, Controllers.of(controller))
    engine, tie = TorchEngine(EOS, PAD, batch=BATCH), Tie(TableModel(SPACE, TASK.reference))
    loop = train_policy(
        learner, tie, {"score": score_of(TASK)}, lambda _: prompts_of(SPACE, BATCH), engine, settings, state
    )
    for step in loop:
        state = step.state
        assert step.stats.ratio_error[0, 0] < 1e-9
    return policy.table.detach(), state


@pytest.mark.parametrize("heads", [1, 4])
def test_fixed_beta_reaches_the_optimum(heads: int) -> None:
    table, state = run(Fixed(TASK.beta), heads, 150, lr=0.1, final_lr=0.0)
    assert state.step == 150
    assert state.controller.mean_beta == TASK.beta
    assert TASK.distance(table) < 0.01


@pytest.mark.parametrize("start", [0.4, 1.5])
def test_adaptive_beta_reaches_its_target_in_nats_per_sequence(start: float) -> None:
    target = 0.25
    table, state = run(Adaptive(start, target, horizon=20 * BATCH), 4, 200, lr=0.2, final_lr=0.05)
    assert TASK.kl(SPACE.sequence_logprobs(table)).mean().item() == pytest.approx(target, rel=0.1)
    assert replace(TASK, beta=state.controller.mean_beta).distance(table) < 0.04
