"""The best of n answers: which are drawn, which is kept, and how often."""

from __future__ import annotations

import pytest
import torch
from small_models import BUDGET, EOS, PAD, language_model, prompts
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, TableModel, random_table
from kedge.rollout.best_of import BestOf
from kedge.rollout.engine import TorchEngine
from kedge.structs import Prompts, Rollouts, Sampling


def count_fours(rollouts: Rollouts) -> Tensor:
    return ((rollouts.response_ids == 4) & rollouts.response_mask).sum(dim=1).float()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_best_of_each_prompts_answers_is_kept() -> None:
    policy, asked, n = language_model("llama"), prompts(10), 5
    engine = TorchEngine(EOS, PAD)
    kept = BestOf(engine, n, count_fours).generate(policy, asked, Sampling(BUDGET), seeded(), 7)
    rows = torch.arange(10).repeat_interleave(n)
    drawn = engine.generate(policy, asked.rows(rows), Sampling(BUDGET), seeded(), 7)
    worth = count_fours(drawn).view(10, n)
    assert count_fours(kept).tolist() == worth.max(dim=1).values.tolist()
    assert kept.group_id.tolist() == asked.group_id.tolist() and kept.policy_version == 7
    for row in range(10):
        first = row * n + int((worth[row] == worth[row].max()).nonzero()[0])
        length = int(drawn.lengths[first])
        assert kept.response_ids[row, :length].tolist() == drawn.response_ids[first, :length].tolist()
        assert int(kept.lengths[row]) == length and bool(kept.ended[row]) == bool(drawn.ended[first])
        torch.testing.assert_close(kept.behaviour_logprobs[row, :length], drawn.behaviour_logprobs[first, :length])


def test_the_best_of_one_is_the_plain_engine() -> None:
    policy, asked = language_model("llama"), prompts(6)
    kept = BestOf(TorchEngine(EOS, PAD), 1, count_fours).generate(policy, asked, Sampling(BUDGET), seeded())
    plain = TorchEngine(EOS, PAD).generate(policy, asked, Sampling(BUDGET), seeded())
    assert torch.equal(kept.response_ids, plain.response_ids)


@pytest.mark.parametrize("n", [2, 4])
def test_answers_are_kept_as_often_as_the_law_of_the_maximum_says(n: int) -> None:
    """All answers of a tiny model, ranked at random: F(y)^n - F(y - 1)^n each."""
    space, draws = Space(letters=2, budget=2), 20_000
    table = random_table(space, 1)
    rank = torch.randperm(len(space.sequences), generator=torch.Generator().manual_seed(0))

    def score(rollouts: Rollouts) -> Tensor:
        return rank[space.index_of(rollouts.response_ids, rollouts.response_mask)].float()

    ids, mask = space.prompt_ids(torch.zeros(draws, dtype=torch.long))
    asked = Prompts(ids, mask, torch.zeros(draws, dtype=torch.long))
    kept = BestOf(TorchEngine(2, 0, batch=40_000), n, score).generate(
        TableModel(space, table), asked, Sampling(space.budget), seeded()
    )
    found = torch.bincount(space.index_of(kept.response_ids, kept.response_mask), minlength=len(rank)) / draws
    order = rank.argsort()
    above = space.sequence_logprobs(table)[0].exp()[order].cumsum(dim=0) ** n
    exact = torch.zeros(len(rank), dtype=torch.float64)
    exact[order] = above.diff(prepend=above.new_zeros(1))
    error = (exact * (1 - exact) / draws).sqrt()
    assert ((found - exact).abs() < 4 * error + 1e-4).all()


def test_the_best_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="best of 0"):
        BestOf(TorchEngine(EOS, PAD), 0, count_fours)
