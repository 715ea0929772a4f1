"""Judgments of tiny responses: token 5 repeated, or 7 for the second side of a pair."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_learner import PAD

from kedge.rollout.given import as_rollouts
from kedge.structs import Judgments, Rollouts


def answers(lengths: list[int], token: int = 5) -> Rollouts:
    return as_rollouts([[3]] * len(lengths), [[token] * length for length in lengths], PAD)


def judged(
    index: list[list[int]], grades: list[list[float]], responses: Rollouts, margin: list[float] | None = None
) -> Judgments:
    """Items of several widths, padded."""
    width = max(map(len, index))
    return Judgments(
        responses,
        torch.tensor([[*row, *[-1] * (width - len(row))] for row in index]),
        torch.tensor([[*row, *[0.0] * (width - len(row))] for row in grades]),
        torch.tensor(margin or [0.0] * len(index)),
    )


def pairs(strength: list[float], first: list[int], second: list[int], margin: list[float] | None = None) -> Judgments:
    """Pair i on a prompt of its own: tokens 5 of length `first[i]` against tokens 7 of length `second[i]`."""
    count = len(strength)
    both = as_rollouts(
        [[3]] * (2 * count), [*([5] * length for length in first), *([7] * length for length in second)], PAD
    )
    both = replace(both, group_id=torch.arange(count).repeat(2))
    rows = [[row, count + row] for row in range(count)]
    return judged(rows, [[share, 1 - share] for share in strength], both, margin)
