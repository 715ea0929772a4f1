"""The frontier against enumeration, closed forms and loops; what samples make of it; and that no policy passes it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kedge.evaluate.frontier import Frontier, efficiency, frontier, least_efficiency, shortfall
from kedge.experiment.verify.enumerable import Space, Task, random_table, random_task

TASK = random_task(Space(letters=3, budget=3, prompts=3), seed=4, spread=1.0)


def exact(task: Task) -> Frontier:
    return frontier(task.reward, task.reference_logprobs)


def gain_and_kl(task: Task, logprobs: torch.Tensor) -> tuple[float, float]:
    """Of a policy with sequence log-probabilities [prompts, N], over the prompts."""
    gain = (logprobs.exp() - task.reference_logprobs.exp()) * task.reward
    return float(gain.sum(dim=-1).mean()), float(task.kl(logprobs).mean())


def samples(task: Task, count: int, seed: int) -> np.ndarray:
    """[prompts, count] rewards of the reference's own answers."""
    rng = np.random.default_rng(seed)
    rows = zip(task.reward.numpy(), task.reference_logprobs.exp().numpy(), strict=True)
    return np.array([rng.choice(reward, size=count, p=shares / shares.sum()) for reward, shares in rows])


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0, 10.0])
def test_the_optimum_of_every_beta_lies_on_the_frontier(beta: float) -> None:
    gain, kl = gain_and_kl(TASK, Task(TASK.space, TASK.reference, TASK.reward, beta).optimum)
    assert float(exact(TASK).gain(kl)) == pytest.approx(gain, rel=1e-4)
    assert float(efficiency(gain, kl, exact(TASK))) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_no_policy_passes_the_frontier(seed: int) -> None:
    """Random policies, and ones near the optimum, which come near it."""
    generator = torch.Generator().manual_seed(seed)
    anywhere = TASK.space.sequence_logprobs(random_table(TASK.space, seed, scale=2.0))
    noise = torch.randn(TASK.optimum.shape, generator=generator, dtype=torch.float64)
    nearby = (TASK.optimum + 0.3 * noise).log_softmax(dim=-1)
    shares = [float(efficiency(*gain_and_kl(TASK, policy), exact(TASK))) for policy in (anywhere, nearby)]
    assert max(shares) < 1
    assert shares[1] > 0.8


def test_one_b_for_all_prompts_beats_budgets_of_their_own() -> None:
    """The same mean KL spent as the tilt with a b of its own for every prompt gains less."""
    betas = (0.2, 0.5, 2.0)
    own = torch.stack(
        [Task(TASK.space, TASK.reference, TASK.reward, beta).optimum[row] for row, beta in enumerate(betas)]
    )
    assert float(efficiency(*gain_and_kl(TASK, own), exact(TASK))) < 0.99


def test_a_point_by_loops() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 40))
    found = frontier(scores)
    k = len(found.kl) // 2
    kl = gain = effective = 0.0
    for row in scores:
        weights = [math.exp(found.pressure[k] * score) for score in row]
        shares = [weight / sum(weights) for weight in weights]
        kl += sum(share * math.log(len(row) * share) for share in shares) / 3
        gain += (sum(share * score for share, score in zip(shares, row, strict=True)) - sum(row) / len(row)) / 3
        effective += 1 / sum(share**2 for share in shares) / 3
    assert (found.kl[k], found.score[k], found.effective[k]) == pytest.approx((kl, gain, effective), rel=1e-9)


def test_two_answers_by_hand() -> None:
    """Equally likely, worth 0 and 1: at share p of the better one p - 1/2 is gained for log 2 - entropy(p) nats."""
    found = frontier(np.array([[0.0, 1.0]]), np.log([[0.5, 0.5]]))
    for p in (0.55, 0.7, 0.9, 0.99):
        kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
        assert float(found.gain(kl)) == pytest.approx(p - 0.5, abs=1e-4)


def test_normal_scores_gain_the_root_of_twice_the_kl() -> None:
    """Reference sheet O9: the tilt of N(0, 1) is N(delta, 1), which costs delta^2 / 2."""
    x = np.linspace(-12, 12, 4001)
    density = -0.5 * x**2
    found = frontier(x[None], (density - np.log(np.exp(density).sum()))[None])
    kl = np.array([0.02, 0.5, 2.0, 8.0])
    np.testing.assert_allclose(found.gain(kl), np.sqrt(2 * kl), rtol=1e-5)


def test_samples_approach_the_frontier_from_below() -> None:
    """The mean estimate rises with the number of samples, stays below the truth, and `shortfall` says how far."""
    kl, truth = 0.6, float(exact(TASK).gain(0.6))
    found, said = [], []
    for count in (8, 32, 128, 512):
        draws = [samples(TASK, count, seed) for seed in range(100)]
        found.append(np.mean([frontier(one, least=0).gain(kl) for one in draws]))
        said.append(np.mean([shortfall(one, kl) for one in draws]))
    missing = truth - np.array(found)
    assert (np.diff(missing) < 0).all() and missing[-1] > -0.002
    assert missing[0] > 20 * abs(missing[-1])
    np.testing.assert_allclose(said[1:3], missing[1:3], rtol=0.35)


def test_the_path_ends_where_the_samples_do() -> None:
    scores = np.random.default_rng(1).normal(size=(50, 64))
    found = frontier(scores)
    assert found.effective[-1] >= 10 and found.end < math.log(64)
    assert np.isnan(found.gain(found.end + 0.01)) and np.isnan(found.gain(-0.01))
    assert frontier(scores, least=20).end < found.end
    few = frontier(scores[:, :9])
    assert few.end == 0 and len(few.effective) == 1 and few.effective[0] == pytest.approx(9)


def test_beyond_the_support_the_ceiling_is_above_the_frontier() -> None:
    scores = np.random.default_rng(2).normal(size=(50, 64))
    found, whole = frontier(scores), frontier(scores, least=0)
    kl = np.linspace(found.end, whole.end, 20)[1:]
    assert (found.ceiling(kl) >= whole.gain(kl)).all()
    assert (least_efficiency(1.0, kl, found) <= efficiency(1.0, kl, whole)).all()
    np.testing.assert_array_equal(found.ceiling([0.1, found.end]), found.gain([0.1, found.end]))


def test_efficiency_is_open_at_the_reference_and_beyond_the_support() -> None:
    found = frontier(np.random.default_rng(3).normal(size=(4, 50)))
    shares = efficiency([0.3, 0.3, 0.3], [0.0, 0.5, found.end + 1], found)
    assert np.isnan(shares).tolist() == [True, False, True]


def test_answers_of_one_worth_leave_nothing_to_gain() -> None:
    found = frontier(np.full((3, 5), 0.1))
    assert found.end == 0 and float(found.gain(0)) == 0
    assert np.isnan(efficiency(0.0, 0.0, found)) and np.isnan(found.ceiling(1.0))


@pytest.mark.parametrize(
    "scores", [np.zeros((2, 1)), np.zeros(3), np.array([[0.0, np.nan]]), np.array([[0.0, np.inf]])]
)
def test_scores_that_cannot_be_used_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        frontier(scores)


SCORES = arrays(np.float64, (3, 12), elements=st.integers(-40, 40).map(lambda value: value / 8))


@given(SCORES)
def test_the_frontier_rises_and_is_concave(scores: np.ndarray) -> None:
    found = frontier(scores, least=0)
    assert (np.diff(found.kl) > 0).all() and (np.diff(found.score) >= -1e-12).all()
    wide = np.diff(found.kl) > 1e-6  # below, rounding shows in the slopes
    slope = np.diff(found.score)[wide] / np.diff(found.kl)[wide]
    assert (np.diff(slope) <= 1e-6 * slope[:-1] + 1e-9).all()
    # The slope at a point is b.
    assert (slope * found.pressure[1:][wide] >= 1 - 1e-6).all()
    assert (slope * found.pressure[:-1][wide] <= 1 + 1e-6).all()


@given(SCORES, st.integers(1, 9), st.permutations(range(12)))
def test_the_unit_of_the_score_its_level_and_the_order_do_not_matter(
    scores: np.ndarray, factor: int, order: list[int]
) -> None:
    levels = np.array([[3.0], [-7.0], [0.5]])
    found, other = frontier(scores, least=0), frontier(factor * (scores + levels)[:, order], least=0)
    kl = np.linspace(0, found.end * 0.999, 7)
    np.testing.assert_allclose(other.gain(kl), factor * found.gain(kl), rtol=1e-6, atol=1e-9)
