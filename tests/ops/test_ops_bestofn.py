"""The best of n answers against enumeration: every distribution small enough to list, in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples

from kedge.ops.bestofn import best_of_n_mean, bon_kl_bound, bon_kl_estimate

seeds = st.integers(0, 2**32 - 1)


def best_of(probabilities: list[float], n: int) -> list[float]:
    """pi_n where answers are listed from the worst to the best: F(y)^n - F(y - 1)^n."""
    below = [0.0, *itertools.accumulate(probabilities)]
    return [high**n - low**n for low, high in itertools.pairwise(below)]


def exact_kl(probabilities: list[float], n: int) -> float:
    kept = best_of(probabilities, n)
    return math.fsum(q * math.log(q / p) for p, q in zip(probabilities, kept, strict=True) if q > 0)


def estimated_kl(probabilities: list[float], n: int) -> float:
    """The mean of the production function's terms over answers of pi_n."""
    terms = bon_kl_estimate(torch.tensor(probabilities, dtype=torch.float64).log(), n).tolist()
    return math.fsum(q * term for q, term in zip(best_of(probabilities, n), terms, strict=True))


def drawn(seed: int, count: int = 10, spread: float = 1.0) -> list[float]:
    weights = np.exp(spread * np.random.default_rng(seed).normal(size=count))
    return list(weights / weights.sum())


def test_best_of_is_the_law_of_the_maximum() -> None:
    probabilities, n = [0.5, 0.2, 0.3], 3
    kept = [0.0] * 3
    for draw in itertools.product(range(3), repeat=n):
        kept[max(draw)] += math.prod(probabilities[y] for y in draw)
    assert best_of(probabilities, n) == pytest.approx(kept)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_close_where_the_bound_is_far(seed: int, n: int) -> None:
    probabilities = drawn(seed)
    exact = exact_kl(probabilities, n)
    assert exact <= bon_kl_bound(n) + 1e-12
    # Between one and a few chances of the likeliest answers it is least sure.
    assert estimated_kl(probabilities, n) == pytest.approx(exact, abs=0.03 if n in (1, 64) else 0.15)


def test_ten_answers_and_sixty_four_draws() -> None:
    """The best answer is all but sure to be among 64, so the divergence is that of always giving it."""
    rest = drawn(0, 9)
    best = math.exp(-1.918)
    probabilities = [*((1 - best) * p for p in rest), best]
    assert exact_kl(probabilities, 64) == pytest.approx(1.918, abs=2e-3)
    assert bon_kl_bound(64) == pytest.approx(3.175, abs=1e-3)
    assert estimated_kl(probabilities, 64) == pytest.approx(1.918, abs=2e-3)


@pytest.mark.parametrize("n", [2, 16, 64])
def test_among_answers_that_never_come_twice_bound_and_estimate_are_exact(n: int) -> None:
    probabilities = [1e-5] * 100_000
    assert exact_kl(probabilities, n) == pytest.approx(bon_kl_bound(n), rel=1e-3)
    assert estimated_kl(probabilities, n) == pytest.approx(bon_kl_bound(n), rel=1e-3)
    for unlikely in (-40.0, -300.0, -2000.0):
        assert bon_kl_estimate(torch.tensor(unlikely), n).item() == pytest.approx(bon_kl_bound(n), rel=1e-9)


@examples
@given(e=st.floats(1e-6, 0.999), n=st.integers(1, 200))
def test_the_estimate_is_the_formula(e: float, n: int) -> None:
    missed = (1 - e) ** n
    expected = missed * (math.log(n) + (n - 1) * math.log1p(-e) - (n - 1) / n)
    expected += (1 - missed) * math.log((1 - missed) / e)
    assert bon_kl_estimate(torch.tensor(math.log(e), dtype=torch.float64), n).item() == pytest.approx(
        expected, abs=1e-8
    )


def test_an_answer_that_is_sure_and_a_single_draw_cost_nothing() -> None:
    assert bon_kl_estimate(torch.zeros(2), 64).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    at = torch.tensor([-0.1, -3.0, -50.0])
    assert bon_kl_estimate(at, 1).tolist() == pytest.approx([0.0] * 3, abs=1e-9)
    assert bon_kl_bound(1) == 0


@examples
@given(seed=seeds, drawn_answers=st.integers(1, 7), data=st.data())
def test_the_mean_is_over_all_subsets(seed: int, drawn_answers: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, drawn_answers))
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(2, drawn_answers))
    quantity = generator.normal(size=(2, drawn_answers))
    for of in (scores, quantity):
        found = best_of_n_mean(torch.from_numpy(scores), torch.from_numpy(of), n)
        for row in range(2):
            subsets = list(itertools.combinations(range(drawn_answers), n))
            best = [of[row, max(subset, key=lambda i, row=row: scores[row, i])] for subset in subsets]
            assert found[row].item() == pytest.approx(math.fsum(best) / len(subsets), abs=1e-9)


def test_the_mean_is_unbiased() -> None:
    """Its mean over every way to draw N answers is what the best of n is worth."""
    probabilities, worth, n, answers = [0.5, 0.2, 0.3], [0.0, 1.0, 3.0], 2, 4
    length = [7.0, 2.0, 5.0]
    for of in (worth, length):
        exact = math.fsum(q * x for q, x in zip(best_of(probabilities, n), of, strict=True))
        mean = 0.0
        for draw in itertools.product(range(3), repeat=answers):
            scores, quantity = (torch.tensor([x[y] for y in draw], dtype=torch.float64) for x in (worth, of))
            mean += math.prod(probabilities[y] for y in draw) * best_of_n_mean(scores, quantity, n).item()
        assert mean == pytest.approx(exact, abs=1e-9)


def test_thousands_of_answers_do_not_overflow() -> None:
    scores = torch.arange(5000.0)
    assert best_of_n_mean(scores, scores, 1).item() == pytest.approx(4999 / 2)
    assert best_of_n_mean(scores, scores, 5000).item() == pytest.approx(4999)
    # The largest of n out of 0 ... N - 1 is on average n (N + 1) / (n + 1) - 1.
    assert best_of_n_mean(scores, scores, 64).item() == pytest.approx(64 * 5001 / 65 - 1)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_were_drawn_cannot_be_told(n: int) -> None:
    with pytest.raises(ValueError, match=f"best of {n} cannot be told from 3"):
        best_of_n_mean(torch.zeros(3), torch.zeros(3), n)
