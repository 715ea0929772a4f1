"""The parts of the policy loop that are neither an equation nor a model: prompts, statistics, checks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_learner import experience, learner, pool

from kedge.errors import InputError
from kedge.structs import Prompts
from kedge.train.descent import cosine
from kedge.train.policy import (
    PolicySettings,
    _calibrated,
    decayed,
    prompt_batch,
    require_finite_scores,
    require_ratio_one,
    running_variance,
    set_rates,
    trim,
)
from kedge.train.schedule import batches, seed_of, seeded


def drawn_prompts(size: int, per_step: int, steps: int, samples: int = 1, seed: int = 0) -> list[list[int]]:
    given = pool(size)
    return [prompt_batch(given, per_step, samples, seed, step).group_id.tolist() for step in range(steps)]


def test_an_epoch_holds_every_prompt_once() -> None:
    order = [group for step in drawn_prompts(20, 6, 10) for group in step]
    for epoch in range(3):
        assert sorted(order[epoch * 20 : (epoch + 1) * 20]) == list(range(20))
    assert order[:20] != order[20:40] != list(range(20)), "in another order"


def test_prompts_of_a_step_depend_on_nothing_before_it() -> None:
    assert prompt_batch(pool(20), 6, 1, 0, 7).group_id.tolist() == drawn_prompts(20, 6, 8)[7]
    assert drawn_prompts(20, 6, 3, seed=1) != drawn_prompts(20, 6, 3)


def test_samples_of_a_prompt_stand_together() -> None:
    (step,) = drawn_prompts(20, 3, 1, samples=4)
    assert len(step) == 12 and len(set(step)) == 3
    assert step == [group for group in step[::4] for _ in range(4)]


def test_fewer_prompts_than_a_step_takes_come_again() -> None:
    (step,) = drawn_prompts(4, 10, 1)
    assert sorted(step[:4]) == sorted(step[4:8]) == [0, 1, 2, 3]


def test_padding_that_no_row_needs_is_cut_off() -> None:
    mask = torch.tensor([[False, False, True], [False, True, True]])
    cut = trim(Prompts(torch.tensor([[0, 0, 5], [0, 6, 7]]), mask, torch.arange(2)))
    assert cut.ids.tolist() == [[0, 5], [6, 7]] and cut.mask.tolist() == [[False, True], [True, True]]


# Statistics of returns


def test_the_variance_of_returns_is_averaged_over_steps() -> None:
    batch = experience(learner())
    first = running_variance(None, batch)
    mask = batch.scored.rollouts.response_mask
    for head, name in enumerate(batch.channels):
        expected = batch.returns[..., head][mask].var(correction=0).clamp(min=1e-3)
        torch.testing.assert_close(first[head], expected, msg=name)
    second = running_variance(torch.full_like(first, 2.0), batch)
    torch.testing.assert_close(second, 0.9 * 2 + 0.1 * first)


def test_a_return_that_never_varies_has_a_floor() -> None:
    batch = experience(learner())
    flat = replace(batch, returns=torch.zeros_like(batch.returns))
    torch.testing.assert_close(running_variance(None, flat), torch.full((4,), 1e-3))


SETTINGS = PolicySettings(1, None, None, {}, 1.0, 0.95, True, 0, 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("scalar", [False, True])
def test_the_critic_starts_in_the_unit_of_the_first_returns(scalar: bool) -> None:
    of = learner(scalar)
    first = experience(of)
    scored, fitted = first.scored, _calibrated(of.critic, first, SETTINGS)
    mask = scored.rollouts.response_mask
    names = of.critic.names
    for head, name in enumerate(names):
        if name == "score":
            torch.testing.assert_close(fitted.values[..., head], scored.values[..., head])
            continue
        values = fitted.values[..., head][mask]
        assert float(values.std()) == pytest.approx(0, abs=1e-6), "an untrained head says the same everywhere"
        assert float(values.mean()) == pytest.approx(float(of.critic.shift[head]), abs=1e-6)
    if not scalar:
        lengths = scored.rollouts.lengths
        left = [float(n - t) for n in lengths.tolist() for t in range(n)]
        assert float(of.critic.shift[names.index("length")]) == pytest.approx(sum(left) / len(left), rel=1e-5)
    again = experience(of, scored.rollouts).scored
    torch.testing.assert_close(again.values, fitted.values, atol=1e-5, rtol=1e-5)


# Checks


def test_a_score_that_is_not_finite_is_named() -> None:
    scored = experience(learner()).scored
    require_finite_scores(scored, 3)
    score = scored.scores["score"].clone()
    score[5] = float("nan")
    with pytest.raises(InputError, match=r"policy step 3: channel score: the reward is nan for 1 of 32 .*row 5"):
        require_finite_scores(replace(scored, scores={"score": score}), 3)


def test_a_ratio_away_from_one_is_refused() -> None:
    from kedge.train.update import UpdateSettings, update

    of = learner()
    batch = experience(of)
    variance = running_variance(None, batch)
    stats = update(of, batch, UpdateSettings(1, 1, 0.2), torch.Generator(), return_variance=variance)
    require_ratio_one(stats, 2)
    with pytest.raises(InputError, match="policy step 2"):
        require_ratio_one(replace(stats, ratio_error=stats.ratio_error + 0.01), 2)


# Seeds and orders


def test_every_purpose_and_step_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(4, generator=seeded(1, "a", 2)), torch.rand(4, generator=seeded(1, "a", 2)))


def test_batches_cover_every_row_in_each_epoch() -> None:
    lengths = torch.randint(1, 40, (50,), generator=seeded(0, "lengths"))
    found = list(batches(lengths, 8, 14, seeded(0, "order")))
    for epoch in (found[:7], found[7:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(50))
    assert max(map(len, found)) == 8
    spread = [float(lengths[part].float().std()) for part in found if len(part) == 8]
    assert sum(spread) / len(spread) < float(lengths.float().std()) / 2, "rows of similar length share a batch"
    assert [part.tolist() for part in found[:7]] != [part.tolist() for part in found[7:]]


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine(optimizer, 20, 4)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert all(earlier >= later for earlier, later in pairwise(rates[4:]))
    assert 0.1 <= rates[-1] < 0.15


def test_rates_fall_in_a_straight_line_and_do_not_depend_on_the_steps_before() -> None:
    assert [decayed(0.2, 5, step) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert decayed(0.2, 1, 0) == 1.0
    assert {decayed(1.0, 5, step) for step in range(5)} == {1.0}
    of = learner(lr=3e-3)
    for share in (0.5, 0.25):  # of the rate it was made with, not of the one before
        set_rates(of, share)
        assert [o.param_groups[0]["lr"] for o in (of.optimizer, of.critic_optimizer)] == [3e-3 * share] * 2
