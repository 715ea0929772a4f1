"""The pretraining mix: the likelihood of given text beside the policy's loss, so that the policy keeps what it knew.

Ouyang et al. (2022, PPO-ptx), equation 2: the objective gains weight * E[log pi(text)]; here per token, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.ops.logprobs import taken
from kedge.ops.losses import token_nll
from kedge.rollout.score import response_logprobs
from kedge.structs import Rollouts
from kedge.train.schedule import seeded


@dataclass(frozen=True)
class Mix:
    """Demonstrations or plain text, and how they are dealt out: a batch per optimiser step, every row once a pass.

    A batch is a function of seed, step, epoch and minibatch, so a resumed run sees the same ones.
    """

    rows: Rollouts
    batch_size: int
    epochs: int  # of the policy's update
    minibatches: int  # of the policy's update
    seed: int

    def batch(self, step: int, epoch: int, minibatch: int) -> Rollouts:
        """The next `batch_size` rows of a seeded permutation per pass over all rows."""
        begin = ((step * self.epochs + epoch) * self.minibatches + minibatch) * self.batch_size
        positions, size = range(begin, begin + self.batch_size), len(self.rows)
        passes = range(positions[0] // size, positions[-1] // size + 1)
        orders = {number: torch.randperm(size, generator=seeded(self.seed, "mix", number)) for number in passes}
        return self.rows.rows(torch.stack([orders[p // size][p % size] for p in positions]))

    def at(self, step: int) -> Callable[[int, int], Rollouts]:
        """The batches of a policy step, by epoch and minibatch."""
        return lambda epoch, minibatch: self.batch(step, epoch, minibatch)


def mix_backward(model: Any, batch: Rollouts, weight: float, microbatch: int) -> Tensor:
    """Add the gradient of `weight` times the mean loss of the batch's tokens to the model; [] the mean, in nats.

    At temperature 1, as in supervised fine-tuning: it is the text's likelihood under the model itself. `microbatch`
    changes memory, not the result.
    """
    tokens = float(batch.lengths.sum())
    total = torch.zeros(())
    for index in batch.last.argsort(stable=True).split(microbatch):
        part = batch.rows(index)
        loss = token_nll(taken(response_logprobs(model, part, 1.0), part.response_ids), part.response_mask, tokens)
        (weight * loss).backward()
        total = total + loss.detach()
    return total
