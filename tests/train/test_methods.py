"""Every method's advantage against the sentence that defines it, in plain Python."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kedge.recipe import methods as rules
from kedge.structs import Experience, Rollouts, ScoredRollouts, TokenScores
from kedge.train.experience import GROUP_EPSILON, make_experience
from kedge.train.methods import METHODS

WEIGHTS = {"score": 1.0, "rule": 0.5, "kl": -0.2, "length": -0.03, "missing_eos": -1.0}
GROUPS = 4


def scored(seed: int, batch: int = 16, width: int = 7) -> ScoredRollouts:
    """Responses with holes, four to a prompt, some cut off."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((batch, width), dtype=bool)
    for row in mask:
        end = int(rng.integers(1, width + 1))
        row[:end] = rng.random(end) < 0.8
        row[end - 1] = True
    true = torch.from_numpy(mask)

    def tokens() -> TokenScores:
        logprobs = torch.from_numpy(-rng.exponential(size=mask.shape)) * true
        return TokenScores(logprobs, logprobs, logprobs)

    rollouts = Rollouts(
        prompt_ids=torch.ones(batch, 1, dtype=torch.long),
        prompt_mask=torch.ones(batch, 1, dtype=torch.bool),
        response_ids=torch.ones(mask.shape, dtype=torch.long),
        response_mask=true,
        ended=torch.from_numpy(rng.random(batch) < 0.7),
        group_id=torch.from_numpy(np.repeat(np.arange(batch // GROUPS), GROUPS)[rng.permutation(batch)]),
        behaviour_logprobs=torch.zeros(mask.shape, dtype=torch.float64),
    )
    scores = {name: torch.from_numpy(rng.normal(1, 2, batch)) for name in ("score", "rule")}
    return ScoredRollouts(rollouts, tokens(), tokens(), scores)


class ByHand:
    """Weighted rewards of every token, and the statistics of whole responses, as Python numbers."""

    def __init__(self, of: ScoredRollouts) -> None:
        rollouts = of.rollouts
        self.kept = [[t for t, true in enumerate(row) if true] for row in rollouts.response_mask.tolist()]
        self.group = rollouts.group_id.tolist()
        self.rewards = []
        for b, kept in enumerate(self.kept):
            row = {}
            for t in kept:
                gap = of.old.logprobs[b, t].item() - of.reference.logprobs[b, t].item()
                row[t] = WEIGHTS["kl"] * gap + WEIGHTS["length"]
            row[kept[-1]] += sum(WEIGHTS[name] * score[b].item() for name, score in of.scores.items())
            row[kept[-1]] += 0.0 if rollouts.ended[b] else WEIGHTS["missing_eos"]
            self.rewards.append(row)
        self.total = [math.fsum(row.values()) for row in self.rewards]

    def to_go(self, b: int, t: int) -> float:
        return math.fsum(reward for u, reward in self.rewards[b].items() if u >= t)

    def others(self, b: int, *, everywhere: bool = False) -> list[float]:
        rows = range(len(self.total))
        return [self.total[j] for j in rows if j != b and (everywhere or self.group[j] == self.group[b])]


def experience_of(name: str, of: ScoredRollouts) -> Experience:
    return make_experience(of, weights=WEIGHTS, gamma=0.9, lam=0.8, method=METHODS[name])


def assert_tokens(found: Tensor, by_hand: ByHand, expected) -> None:
    assert not found[~torch.tensor(_mask(by_hand, found))].any()
    for b, kept in enumerate(by_hand.kept):
        for t in kept:
            assert found[b, t].item() == pytest.approx(expected(b, t), abs=1e-9)


def _mask(by_hand: ByHand, like: Tensor) -> list[list[bool]]:
    return [[t in kept for t in range(like.shape[1])] for kept in by_hand.kept]


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_and_rloo_leave_one_out(seed: int) -> None:
    of = scored(seed)
    hand = ByHand(of)
    mean = statistics.fmean
    found = experience_of("reinforce", of).advantage()
    assert_tokens(found, hand, lambda b, _t: hand.total[b] - mean(hand.others(b, everywhere=True)))
    found = experience_of("rloo", of).advantage()
    assert_tokens(found, hand, lambda b, _t: hand.total[b] - mean(hand.others(b)))


@pytest.mark.parametrize("seed", range(3))
def test_grpo_divides_by_the_groups_deviation_and_dr_grpo_does_not(seed: int) -> None:
    of = scored(seed)
    hand = ByHand(of)

    def centred(b: int, _t: int) -> float:
        return hand.total[b] - statistics.fmean([hand.total[b], *hand.others(b)])

    def standardised(b: int, t: int) -> float:
        return centred(b, t) / (statistics.stdev([hand.total[b], *hand.others(b)]) + GROUP_EPSILON)

    assert_tokens(experience_of("dr_grpo", of).advantage(), hand, centred)
    assert_tokens(experience_of("grpo", of).advantage(), hand, standardised)


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_pp_whitens_the_reward_to_go(seed: int) -> None:
    of = scored(seed)
    hand = ByHand(of)
    flat = [hand.to_go(b, t) for b, kept in enumerate(hand.kept) for t in kept]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    found = experience_of("reinforce_pp", of).advantage()
    assert_tokens(found, hand, lambda b, t: (hand.to_go(b, t) - mean) / math.sqrt(deviation**2 + 1e-8))


def test_whitening_is_a_choice_only_with_a_critic() -> None:
    of = scored(5)
    found = {name: make_experience(of, weights=WEIGHTS, whiten=False, method=METHODS[name]) for name in METHODS}
    assert {name for name, batch in found.items() if (batch.scale != 1).any()} == {"grpo", "reinforce_pp"}


@pytest.mark.parametrize("name", METHODS)
def test_the_parts_of_every_method_sum_to_its_advantage(name: str) -> None:
    """Channel by channel: weight times (reward to go less value), over the scale, less the shift; in any method."""
    found = experience_of(name, scored(7))
    mask = found.scored.rollouts.response_mask
    total = torch.zeros(mask.shape, dtype=torch.float64)
    for c in range(len(found.channels)):
        weight = found.weights[:, c]
        total += weight[:, None] * found.advantages[..., c]
    total = (total - found.shift[:, None]) / found.scale[:, None] * mask
    torch.testing.assert_close(found.advantage(), total, atol=1e-12, rtol=0)
    if METHODS[name].baseline is not None:
        assert (found.gamma, found.lam) == (1.0, 1.0)


def test_a_constant_on_every_response_changes_no_method_with_a_baseline() -> None:
    of = scored(1)
    moved = replace(of, scores={**of.scores, "score": of.scores["score"] + 5.0})
    for name in ("reinforce", "rloo", "grpo", "dr_grpo", "reinforce_pp"):
        one, other = experience_of(name, of).advantage(), experience_of(name, moved).advantage()
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_group_whose_rewards_are_equal_teaches_nothing() -> None:
    of = scored(2)
    same = TokenScores(*(torch.zeros_like(of.old.logprobs),) * 3)
    equal = replace(of, old=same, reference=same, scores=dict.fromkeys(of.scores, torch.ones(16, dtype=torch.float64)))
    equal = replace(equal, rollouts=replace(equal.rollouts, ended=torch.ones(16, dtype=torch.bool)))
    weights = WEIGHTS | {"length": 0.0}
    for name in ("rloo", "grpo", "dr_grpo"):
        found = make_experience(equal, weights=weights, method=METHODS[name]).advantage()
        assert found.abs().max() < 1e-9


def test_beta_in_the_loss_is_in_the_advantages_unit_except_for_grpo() -> None:
    of = scored(3)
    beta = torch.linspace(0.1, 0.5, 16, dtype=torch.float64)
    free = WEIGHTS | {"kl": 0.0}
    for name in METHODS:
        found = make_experience(of, weights=free, method=METHODS[name], loss_beta=beta)
        unit = found.scale if name in ("ppo", "a2c", "reinforce_pp") else torch.ones(16, dtype=torch.float64)
        torch.testing.assert_close(found.loss_beta, beta / unit)


def test_weights_may_differ_by_response() -> None:
    of = scored(4)
    beta = torch.linspace(0.1, 0.5, 16, dtype=torch.float64)
    each = make_experience(of, weights=WEIGHTS | {"kl": -beta}, method=METHODS["rloo"])
    for b in (0, 9):
        alone = make_experience(of, weights=WEIGHTS | {"kl": -float(beta[b])}, method=METHODS["rloo"])
        torch.testing.assert_close(each.weights[b], alone.weights[b])


def test_recipes_and_loops_agree_on_the_methods() -> None:
    assert tuple(METHODS) == rules.ON_POLICY
    assert tuple(name for name, method in METHODS.items() if method.baseline is None) == rules.CRITIC
    assert tuple(name for name, method in METHODS.items() if method.clipped) == rules.CLIPPED
    assert {name for name, method in METHODS.items() if method.groups} <= set(rules.GROUPED)
