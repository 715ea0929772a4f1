"""What a response pays beside its score, against loops over its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, ragged_mask

from kedge.ops.shaping import beyond_target, repeated_share, soft_overlong

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 12)


def overlong(length: int, ended: bool, budget: int, buffer: int) -> float:
    """The three cases of the paper, one by one."""
    if not ended:
        return 1.0
    if length <= budget - buffer:
        return 0.0
    return 1.0 if length > budget else (length - (budget - buffer)) / buffer


def repeated(tokens: list[int], true: list[bool], n: int) -> float:
    """Windows in order; one counts as repeated if the same tokens stood in an earlier one."""
    before: list[list[int]] = []
    again = 0
    for start in range(len(tokens) - n + 1):
        if all(true[start : start + n]):
            gram = tokens[start : start + n]
            again += gram in before
            before.append(gram)
    return again / len(before) if before else 0.0


@examples
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), budget=st.integers(1, 60), data=st.data())
def test_overlong_is_the_papers_three_cases(lengths: list[int], budget: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, budget))
    ended = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    found = soft_overlong(torch.tensor(lengths), torch.tensor(ended), budget=budget, buffer=buffer)
    expected = [overlong(n, e, budget, buffer) for n, e in zip(lengths, ended, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_overlong_rises_over_the_buffer_by_hand() -> None:
    lengths, ended = torch.tensor([16, 17, 18, 20, 20, 3]), torch.tensor([True, True, True, True, False, False])
    found = soft_overlong(lengths, ended, budget=20, buffer=4)
    assert found.tolist() == [0, 0.25, 0.5, 1, 1, 1]


@examples
@given(pairs=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=8))
def test_beyond_the_target_every_token_counts_and_below_it_none(pairs: list[tuple[int, int]]) -> None:
    lengths, targets = torch.tensor(pairs).T
    assert beyond_target(lengths, targets).tolist() == [float(len(range(goal, n))) for n, goal in pairs]


@examples
@given(seed=seeds, batch=st.integers(1, 5), length=st.integers(1, 16), letters=st.integers(1, 4), n=st.integers(1, 5))
def test_repetition_is_the_share_of_windows_seen_before(
    seed: int, batch: int, length: int, letters: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    ids, mask = torch.from_numpy(rng.integers(0, letters, (batch, length))), ragged_mask(rng, batch, length)
    found = repeated_share(ids, mask, n=n)
    expected = [repeated(row.tolist(), true.tolist(), n) for row, true in zip(ids, mask, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@examples
@given(seed=seeds, length=st.integers(1, 16), padding=st.integers(0, 6), shift=st.integers(0, 90))
def test_neither_padding_nor_other_rows_nor_the_names_of_tokens_matter(
    seed: int, length: int, padding: int, shift: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 3, (2, length + padding)))
    mask = torch.arange(length + padding).expand(2, -1) < length
    alone = torch.cat([repeated_share(ids[row : row + 1, :length], mask[row : row + 1, :length]) for row in (0, 1)])
    assert torch.equal(repeated_share(ids + shift, mask), alone)
    assert torch.equal(repeated_share(ids[:1].expand(2, -1), mask), alone[:1].expand(2))


def test_repetition_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8]])
    mask = torch.ones(3, 8, dtype=torch.bool)
    assert repeated_share(ids, mask).tolist() == pytest.approx([1 / 5, 4 / 5, 0])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_response_too_short_for_a_window_repeats_nothing(length: int) -> None:
    ids = torch.full((2, length), 5)
    assert repeated_share(ids, torch.ones_like(ids, dtype=torch.bool)).tolist() == [0, 0]
    long = torch.full((2, 9), 5)
    assert repeated_share(long, torch.arange(9).expand(2, -1) < length).tolist() == [0, 0]


def test_a_window_over_a_hole_is_nobodys() -> None:
    """A tool's words stand between: the policy did not write the four tokens in a row."""
    ids = torch.tensor([[7, 7, 7, 7, 7, 7, 7, 7, 7]])
    mask = torch.tensor([[True] * 4 + [False] + [True] * 4])
    assert repeated_share(ids, mask).tolist() == [0.5]
    assert repeated_share(ids, mask & (torch.arange(9) != 8)).tolist() == [0]
