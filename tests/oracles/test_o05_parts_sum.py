"""O5: the parts of every advantage sum to the advantage that training uses, by the written-out decomposition.

With n true positions, i the rank of a token among them and x = gamma lam:
score part x^(n-1-i) s; per-token part sum_l x^l c_(i+l); critic part
-V_i + gamma (1 - lam) sum_(l>=1) x^(l-1) V_(i+l); whitening part -mean / deviation. Nothing here uses the recursion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kedge.structs import Experience, Rollouts, ScoredRollouts, TokenScores
from kedge.train.experience import make_experience

WEIGHTS = {"score": 1.0, "verifier": 0.4, "kl": -0.07, "length": -0.02, "missing_eos": -1.0}
CHANNELS = tuple(WEIGHTS)


def random_scored(seed: int, dtype: torch.dtype, heads: int | None, batch: int = 24, length: int = 9) -> ScoredRollouts:
    """Responses with holes, padding, truncation and two terminal scores; a critic with `heads` heads."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((batch, length), dtype=bool)
    for b in range(batch):
        end = int(rng.integers(1, length + 1))
        mask[b, :end] = rng.random(end) < 0.75
        mask[b, end - 1] = True
    true = torch.from_numpy(mask)

    def token_scores() -> TokenScores:
        logprobs = torch.from_numpy(-rng.exponential(size=(batch, length))).to(dtype) * true
        return TokenScores(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs))

    rollouts = Rollouts(
        prompt_ids=torch.ones(batch, 2, dtype=torch.long),
        prompt_mask=torch.ones(batch, 2, dtype=torch.bool),
        response_ids=torch.from_numpy(rng.integers(0, 9, (batch, length))),
        response_mask=true,
        ended=torch.from_numpy(rng.random(batch) < 0.5),
        group_id=torch.arange(batch),
        behaviour_logprobs=torch.zeros(batch, length, dtype=dtype),
    )
    values = None if heads is None else torch.from_numpy(rng.normal(size=(batch, length, heads))).to(dtype)
    return ScoredRollouts(
        rollouts=rollouts,
        old=token_scores(),
        reference=token_scores(),
        scores={name: torch.from_numpy(rng.normal(1.5, 1, batch)).to(dtype) for name in ("score", "verifier")},
        values=None if values is None else values * true.unsqueeze(-1),
    )


class Parts:
    """The reward and critic part of each channel at every true position of every response, in Python floats."""

    def __init__(self, scored: ScoredRollouts, gamma: float, lam: float) -> None:
        self.scored, self.gamma, self.lam = scored, gamma, lam
        self.mask = scored.rollouts.response_mask

    def positions(self, b: int) -> list[int]:
        return [t for t, true in enumerate(self.mask[b].tolist()) if true]

    def rewards(self, b: int) -> dict[str, list[float]]:
        scored, kept = self.scored, self.positions(b)
        final = [0.0] * (len(kept) - 1)
        old, reference = scored.old.logprobs[b].tolist(), scored.reference.logprobs[b].tolist()
        return {
            "score": [*final, scored.scores["score"][b].item()],
            "verifier": [*final, scored.scores["verifier"][b].item()],
            "kl": [old[t] - reference[t] for t in kept],
            "length": [1.0] * len(kept),
            "missing_eos": [*final, 0.0 if scored.rollouts.ended[b] else 1.0],
        }

    def reward_part(self, costs: Sequence[float], i: int) -> float:
        return math.fsum((self.gamma * self.lam) ** l * cost for l, cost in enumerate(costs[i:]))  # noqa: E741

    def critic_part(self, values: Sequence[float], i: int) -> float:
        later = math.fsum((self.gamma * self.lam) ** l * v for l, v in enumerate(values[i + 1 :]))  # noqa: E741
        return -values[i] + self.gamma * (1 - self.lam) * later


def expected_parts(scored: ScoredRollouts, weights: Tensor, gamma: float, lam: float) -> Tensor:
    """[B, T, C + heads] weighted parts: one column a reward channel, one a critic head; float64, by loops."""
    parts = Parts(scored, gamma, lam)
    heads = 0 if scored.values is None else scored.values.shape[-1]
    columns = torch.zeros(*parts.mask.shape, len(CHANNELS) + heads, dtype=torch.float64)
    for b in range(len(scored.rollouts)):
        kept, rewards = parts.positions(b), parts.rewards(b)
        for i, t in enumerate(kept):
            for c, name in enumerate(CHANNELS):
                columns[b, t, c] = weights[b, c].item() * parts.reward_part(rewards[name], i)
            for h in range(heads):
                assert scored.values is not None
                weight = 1.0 if heads == 1 else weights[b, h].item()
                own = [scored.values[b, u, h].item() for u in kept]
                columns[b, t, len(CHANNELS) + h] = weight * parts.critic_part(own, i)
    return columns


def weight_matrix(batch: int) -> Tensor:
    return torch.tensor(list(WEIGHTS.values()), dtype=torch.float64).expand(batch, -1)


def made(scored: ScoredRollouts, whiten: bool, weights: Mapping[str, float] | Tensor = WEIGHTS) -> Experience:
    return make_experience(scored, weights=weights, gamma=0.98, lam=0.9, whiten=whiten)


@pytest.mark.parametrize("heads", [None, 1, len(CHANNELS)])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parts_sum_to_the_training_advantage(
    heads: int | None, whiten: bool, dtype: torch.dtype, tolerance: float
) -> None:
    scored = random_scored(3, dtype, heads)
    mask = scored.rollouts.response_mask
    columns = expected_parts(scored, weight_matrix(len(mask)), 0.98, 0.9)
    total = columns.sum(-1)[mask]
    mean, deviation = (total.mean(), (total.var(correction=0) + 1e-8).sqrt()) if whiten else (0.0, 1.0)
    experience = made(scored, whiten)
    expected = (total - mean) / deviation
    got = experience.advantage()
    assert got.dtype == dtype
    assert (got[mask] - expected).abs().max() < tolerance * expected.std()
    assert not got[~mask].any()


@pytest.mark.parametrize("heads", [None, 1, len(CHANNELS)])
def test_each_channel_is_its_own_part(heads: int | None) -> None:
    """Channel by channel, not only in sum: reward part plus the part of the head that predicts it."""
    scored = random_scored(5, torch.float64, heads)
    columns = expected_parts(scored, weight_matrix(len(scored.rollouts)), 0.98, 0.9)
    experience = made(scored, whiten=False)
    weighted = experience.weights[:, None, :] * experience.advantages
    count = len(CHANNELS)
    expected = columns if heads == 1 else columns[..., :count] + (columns[..., count:] if heads else 0)
    assert experience.channels == (CHANNELS if heads != 1 else (*CHANNELS, "critic"))
    assert (weighted - expected).abs().max() < 1e-12


def test_channels_stay_in_their_own_unit_whatever_the_weights() -> None:
    scored = random_scored(7, torch.float64, len(CHANNELS))
    one, other = made(scored, False), made(scored, True, dict.fromkeys(CHANNELS, 3.0))
    assert torch.equal(one.advantages, other.advantages)
    assert torch.equal(one.returns, other.returns)
    nats = (scored.old.logprobs - scored.reference.logprobs).sum(dim=1)
    assert (one.channel("kl") - nats).abs().max() < 1e-12
    assert torch.equal(one.channel("length"), scored.rollouts.lengths.double())
    assert torch.equal(one.channel("score"), scored.scores["score"])
    assert torch.equal(one.channel("missing_eos"), (~scored.rollouts.ended).double())


def test_weights_may_differ_between_responses() -> None:
    scored = random_scored(9, torch.float64, len(CHANNELS))
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(len(scored.rollouts), len(CHANNELS))))
    experience = made(scored, False, weights)
    assert (experience.advantage() - expected_parts(scored, weights, 0.98, 0.9).sum(-1)).abs().max() < 1e-12


def test_returns_are_what_each_head_should_have_said() -> None:
    """At lambda 1 the return is the discounted reward to go of the channel, or of the weighted sum."""
    for heads in (1, len(CHANNELS)):
        scored = random_scored(11, torch.float64, heads)
        experience = make_experience(scored, weights=WEIGHTS, gamma=0.98, lam=1.0, whiten=True)
        parts = Parts(scored, 0.98, 1.0)
        for b in range(len(scored.rollouts)):
            rewards = parts.rewards(b)
            for i, t in enumerate(parts.positions(b)):
                to_go = [parts.reward_part(rewards[name], i) for name in CHANNELS]
                if heads == 1:
                    to_go = [sum(WEIGHTS[name] * part for name, part in zip(CHANNELS, to_go, strict=True))]
                np.testing.assert_allclose(experience.returns[b, t].numpy(), to_go, atol=1e-12)
        assert not experience.returns[~scored.rollouts.response_mask].any()


def test_a_channel_critic_and_a_scalar_critic_with_its_weighted_values_agree() -> None:
    """Channel heads whose weighted sum is the scalar head give the PPO advantage of that scalar head."""
    scored = random_scored(13, torch.float32, len(CHANNELS))
    assert scored.values is not None
    weighted = (weight_matrix(len(scored.rollouts)).float()[:, None] * scored.values).sum(-1, keepdim=True)
    scalar = ScoredRollouts(scored.rollouts, scored.old, scored.reference, scored.scores, weighted)
    one, other = made(scored, True).advantage(), made(scalar, True).advantage()
    mask = scored.rollouts.response_mask
    assert (one - other)[mask].abs().max() < 1e-5 * one[mask].std()


def test_a_missing_weight_is_named() -> None:
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "verifier"}
    with pytest.raises(ValueError, match="verifier"):
        made(random_scored(1, torch.float64, None), False, weights)


def test_nan_in_a_hole_reaches_neither_rewards_nor_advantages() -> None:
    clean = random_scored(15, torch.float64, len(CHANNELS))
    hole = ~clean.rollouts.response_mask
    nan = torch.tensor(math.nan, dtype=torch.float64)
    assert clean.values is not None
    dirty = ScoredRollouts(
        rollouts=clean.rollouts,
        old=TokenScores(torch.where(hole, nan, clean.old.logprobs), clean.old.eos_logprobs, clean.old.entropy),
        reference=clean.reference,
        scores=clean.scores,
        values=torch.where(hole.unsqueeze(-1), nan, clean.values),
    )
    assert torch.equal(made(clean, True).advantage(), made(dirty, True).advantage())
    assert torch.equal(made(clean, True).returns, made(dirty, True).returns)
