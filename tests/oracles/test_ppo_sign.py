"""What the wrong sign rule of the clipped surrogate does to training; `docs/ppo-sign.md` quotes these figures.

Some texts take the greater of the two products where the advantage is negative. On the first pass over a batch the
ratio is 1 and nothing shows; with larger steps nothing pulls back a bad response that became likelier.
"""

from __future__ import annotations

import pytest
import torch
from lab import Ppo, train
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, random_task

TASK = random_task(Space(3, 3))
LARGE_STEPS = Ppo(lam=0.95, whiten=True, heads=4, epochs=6, minibatches=4, lr=0.3, steps=30, batch=1024)


def greater_where_negative(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float, **_: object
) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(logprobs - old_logprobs)
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    value = torch.where(advantages < 0, torch.maximum(free, held), torch.minimum(free, held))
    return value, value == free


def test_the_lesser_product_survives_large_steps() -> None:
    assert TASK.distance(train(TASK, LARGE_STEPS)) < 0.05


def test_the_greater_product_runs_away(monkeypatch: pytest.MonkeyPatch) -> None:
    value, active = greater_where_negative(torch.tensor(1.3).log(), torch.tensor(0.0), torch.tensor(-3.0), clip=0.2)
    assert value.item() == pytest.approx(-3.6) and not active
    monkeypatch.setattr("kedge.train.update.ppo_objective", greater_where_negative)
    table = train(TASK, LARGE_STEPS)
    assert TASK.distance(table) > 0.5
    assert TASK.kl(TASK.space.sequence_logprobs(table)).item() > 2
