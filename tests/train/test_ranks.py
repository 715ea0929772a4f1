"""Statistics over two processes are those of the whole batch in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_learner import drawn, experience, learner, policy
from torch import Tensor

from kedge.ops.masked import itself, masked_mean, masked_variance, whitening
from kedge.structs import Experience, Rollouts
from kedge.train.normalise import RunningScore
from kedge.train.ranks import across_ranks

RANKS = 2
ROWS = (slice(0, 11), slice(11, 32))  # unequal shares of the batch


def statistics(values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What depends on the whole batch, over however many processes there are."""
    reduce = across_ranks()
    shift, scale = whitening(values, mask, reduce=reduce)
    running = RunningScore().observe(values.sum(dim=1), reduce).observe(values[:, 0], reduce)
    return {
        "mean": masked_mean(values, mask, reduce=reduce),
        "variance": masked_variance(values, mask, reduce=reduce),
        "shift": shift,
        "scale": scale,
        "running": torch.tensor(list(running.record().values()), dtype=torch.float64),
    }


def numbers() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = 5 + torch.randn(32, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.randint(1, 8, (32, 1), generator=generator)
    return values.masked_fill(~mask, float("nan")).nan_to_num(1e6), mask


def step(rollouts: Rollouts) -> Experience:
    """The part of a policy step that sees the whole batch, through the production functions."""
    return experience(learner(), rollouts)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    try:
        rows = torch.arange(32)[ROWS[rank]]
        values, mask = numbers()
        found = statistics(values[rows], mask[rows])
        made = step(drawn(policy()).rows(rows))
        found |= {f"step/{name}": getattr(made, name) for name in ("shift", "scale")}
        found["step/advantage"] = made.advantage()[made.scored.rollouts.response_mask]
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_in_one_process_a_sum_is_its_own() -> None:
    assert across_ranks() is itself


@pytest.mark.parametrize("name", ["mean", "variance", "shift", "scale", "running"])
def test_two_ranks_have_the_statistics_of_the_whole_batch(found: list[dict[str, Tensor]], name: str) -> None:
    whole = statistics(*numbers())[name]
    assert torch.equal(found[0][name], found[1][name]), "the ranks agree to the last bit"
    torch.testing.assert_close(found[0][name], whole, rtol=1e-12, atol=1e-12)


def test_a_rank_alone_would_have_others() -> None:
    values, mask = numbers()
    alone = [whitening(values[rows], mask[rows])[0].item() for rows in ROWS]
    assert abs(alone[0] - alone[1]) > 0.01


def test_a_policy_step_whitens_over_the_ranks(found: list[dict[str, Tensor]]) -> None:
    """Each rank's advantages are the rows it would have had of the whole batch."""
    whole = step(drawn(policy()))
    mask = whole.scored.rollouts.response_mask
    for rank, rows in enumerate(ROWS):
        for name in ("shift", "scale"):
            torch.testing.assert_close(found[rank][f"step/{name}"], getattr(whole, name)[rows], rtol=1e-5, atol=1e-6)
        expected = whole.advantage()[rows][mask[rows]]
        torch.testing.assert_close(found[rank]["step/advantage"], expected, rtol=1e-4, atol=1e-5)


def test_the_ranks_differ_enough_for_the_step_to_show_it() -> None:
    parts = [step(drawn(policy()).rows(torch.arange(32)[rows])) for rows in ROWS]
    assert abs(float(parts[0].shift[0] - parts[1].shift[0])) > 1e-3
