"""O14 from the trace: what a natural-gradient step moves, against the step itself on a model small enough to list.

Every probability of the policy is a multiple of 1/64, so a batch of 64 responses is its distribution, and nothing here
is sampled. The natural gradient of a table of logits adds to each logit the advantage of its action.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from step_traces import step_trace
from torch import Tensor

from kedge.diagnose.push import Measure, Push, Tally
from kedge.diagnose.split import split
from kedge.experiment.verify.enumerable import Space, random_table
from kedge.trace.reader import StepTrace

SPACE = Space(letters=2, budget=3)
STEP = 1e-5
BETA = 0.3
PERMUTATIONS = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5])
TABLE = torch.tensor(
    [[PERMUTATIONS[row % 3] for row in range(len(SPACE.prefixes))]], dtype=torch.float64
).log()  # [1, prefixes, actions]
REFERENCE = random_table(SPACE, 1).log_softmax(dim=-1)
PROBABILITY = SPACE.sequence_logprobs(TABLE)[0].exp()
ROWS = torch.repeat_interleave(torch.arange(len(PROBABILITY)), (PROBABILITY * 64).round().long())
SCORE = torch.randn(len(PROBABILITY), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
FEATURES = {
    "length": SPACE.lengths.double(),
    "ended": SPACE.ended.double(),
    "first action": SPACE.path[1][:, 0].double(),
}


def state_action_mean(worth: Tensor) -> Tensor:
    """[1, prefixes, actions] mean over responses through each action of `worth` [N] under the policy."""
    states, actions = SPACE.path
    total, mass = torch.zeros(2, len(SPACE.prefixes), SPACE.actions, dtype=torch.float64)
    for n in range(len(PROBABILITY)):
        for t in range(int(SPACE.lengths[n])):
            total[states[n, t], actions[n, t]] += PROBABILITY[n] * worth[n]
            mass[states[n, t], actions[n, t]] += PROBABILITY[n]
    return (total / mass).unsqueeze(0)


def token(table: Tensor) -> np.ndarray:
    return SPACE.token_logprobs(table)[0][ROWS].numpy()


def trace(after: Tensor, *, weight: float = -BETA, lam: float = 0.95, seed: int = 0, **given: object) -> StepTrace:
    """The batch as a trace, with a critic that knows nothing but one value of the prompt."""
    mask = SPACE.mask[ROWS].numpy()
    old, reference = token(TABLE), token(REFERENCE)
    rewards = np.zeros((*mask.shape, 2))
    rewards[np.arange(len(mask)), SPACE.lengths[ROWS].numpy() - 1, 0] = SCORE[ROWS].numpy()
    rewards[..., 1] = (old - reference) * mask
    values = np.random.default_rng(seed).normal(size=rewards.shape)
    values[:, 0] = [0.7, 0.0]  # of the prompt, the same for all
    settings: dict[str, object] = {
        "values": values * mask[..., None],
        "weights": np.tile([1.0, weight], (len(mask), 1)),
        "lam": lam,
        "shift": np.full(len(mask), 0.2),
        "scale": np.full(len(mask), 1.7),
        "old": old,
        "reference": reference,
        "new": token(after),
        "entropy": entropies(),
    }
    return step_trace(rewards, mask, **(settings | given))  # type: ignore[arg-type]


def entropies() -> np.ndarray:
    each = -(TABLE.exp() * TABLE).sum(dim=-1)[0]
    return (each[SPACE.path[0]] * SPACE.mask)[ROWS].numpy()


def pushed(step: StepTrace, feature: str) -> Push:
    tally = Tally(Measure(feature, "1", lambda _: FEATURES[feature][ROWS].numpy()))
    tally.add(step, split(step))
    push = tally.result()
    assert push is not None
    return push


def mean_moves(after: Tensor, feature: str) -> float:
    """How far the step moves the feature's mean, exactly."""
    now = SPACE.sequence_logprobs(after)[0].exp()
    return float(((now - PROBABILITY) * FEATURES[feature]).sum())


def returns(beta: float) -> Tensor:
    gap = (SPACE.token_logprobs(TABLE) - SPACE.token_logprobs(REFERENCE))[0].sum(dim=1)
    return SCORE - beta * gap


def test_the_batch_is_the_policy() -> None:
    assert len(ROWS) == 64
    assert float(PROBABILITY.sum()) == pytest.approx(1)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_pushed_and_moved_are_the_step(feature: str, lam: float) -> None:
    """Whatever lambda is and the critic says of later tokens."""
    after = (TABLE + STEP * state_action_mean(returns(BETA)) / 1.7).log_softmax(dim=-1)
    push = pushed(trace(after, lam=lam), feature)
    exact = mean_moves(after, feature)
    assert STEP * push.predicted.value == pytest.approx(exact, rel=1e-3)
    assert push.moved.value == pytest.approx(exact, rel=1e-3)
    assert push.rate == pytest.approx(STEP, rel=1e-3)


def test_summed_token_advantages_are_not_the_step() -> None:
    """What a response's tokens share counts once for each: at lambda 1 the sign of the push on length may be wrong."""
    after = (TABLE + STEP * state_action_mean(returns(BETA)) / 1.7).log_softmax(dim=-1)
    push = pushed(trace(after, lam=1.0), "length")
    summed = STEP * sum(push.by_token.values())
    assert abs(summed / mean_moves(after, "length") - 1) > 0.2


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
def test_kl_in_the_loss(kind: str, feature: str) -> None:
    """k2 and the exact KL move the policy as the KL's own gradient does; k1 not at all; k3 as KL(ref || policy)'s."""
    if kind == "k3":
        direction = -BETA * -torch.expm1(REFERENCE - TABLE)
    elif kind == "k1":
        direction = torch.zeros_like(TABLE)
    else:
        direction = state_action_mean(returns(BETA) - SCORE)
    advantage = state_action_mean(SCORE) / 1.7
    after = (TABLE + STEP * (advantage + direction)).log_softmax(dim=-1)
    step = trace(after, weight=0.0, loss_beta=np.full(64, BETA), learning={"kl_loss": kind})
    push = pushed(step, feature)
    assert STEP * push.predicted.value == pytest.approx(mean_moves(after, feature), rel=1e-3)


@pytest.mark.parametrize("feature", FEATURES)
def test_an_entropy_bonus(feature: str) -> None:
    """The natural gradient of the mean over sampled states of the entropy, states as they come."""
    entropy = -(TABLE.exp() * TABLE).sum(dim=-1, keepdim=True)
    after = (TABLE + STEP * (state_action_mean(SCORE) / 1.7 - 0.4 * (TABLE + entropy))).log_softmax(dim=-1)
    push = pushed(trace(after, weight=0.0, learning={"entropy_bonus": 0.4}), feature)
    assert STEP * push.predicted.value == pytest.approx(mean_moves(after, feature), rel=1e-3)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_loss_averaged_over_responses_pushes_short_ones_more(feature: str) -> None:
    weight = float((PROBABILITY * SPACE.lengths).sum()) / SPACE.lengths.double()
    centred = (returns(BETA) - 0.7 - 0.2) / 1.7
    after = (TABLE + STEP * state_action_mean(centred * weight)).log_softmax(dim=-1)
    push = pushed(trace(after, learning={"aggregation": "sequence_mean"}), feature)
    assert STEP * push.predicted.value == pytest.approx(mean_moves(after, feature), rel=1e-3)


def test_the_parts_of_the_push_are_those_of_the_return() -> None:
    push = pushed(trace(TABLE), "length")
    parts = {entry.name: part.value for entry, part in push.parts.items()}
    length = FEATURES["length"] - (PROBABILITY * FEATURES["length"]).sum()
    expected = float((PROBABILITY * length * SCORE).sum()) / 1.7
    assert parts["score reward"] == pytest.approx(expected, rel=1e-9)
    assert parts["score critic"] == pytest.approx(0, abs=1e-12)  # one value for all pushes nothing
    assert parts["whitening"] == pytest.approx(0, abs=1e-12)
    assert math.isclose(sum(push.shares().values()), 1)
