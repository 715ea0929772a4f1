"""Probe answers: matched pairs that stay the same through a run, only the policy's view of them moves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from kedge.pipeline.probes import VARIANTS, _contrast
from kedge.trace.reader import read_run


def test_each_prompt_has_its_variants_and_only_log_probabilities_move(whole: Path) -> None:
    rows = read_run(whole).probes().to_pylist()
    by_step = defaultdict(list)
    for row in rows:
        by_step[row["step"]].append(row)
    first = by_step[min(by_step)]
    assert len(by_step) > 1
    for step, found in by_step.items():
        for then, now in zip(first, found, strict=True):
            same = ("probe", "variant", "prompt", "response", "length", "score", "reference_logprob", "tercile")
            assert [then[key] for key in same] == [now[key] for key in same]
            assert now["kl"] == pytest.approx(now["logprob"] - now["reference_logprob"], abs=1e-5)
            if step == 0:
                assert now["kl"] == pytest.approx(0, abs=1e-4), "before the first update the policy is the reference"
    assert any(abs(row["kl"]) > 1e-3 for row in by_step[max(by_step)])
    probes = defaultdict(dict)
    for row in first:
        probes[row["probe"]][row["variant"]] = row
    for pair in probes.values():
        assert set(pair) == set(VARIANTS)
        assert pair["brief"]["length"] < pair["verbose"]["length"]


@pytest.mark.parametrize(
    ("lengths", "ended", "expected"),
    [
        ([4, 9, 6], [True, True, True], ("a", "b")),
        ([4, 9, 6], [True, False, True], ("a", "c")),  # an answer cut off is no verbose answer
        ([4, 5, 5], [True, True, True], None),  # too much alike
        ([4, 9, 6], [False, True, False], None),
        ([4, 6, 5], [True, True, True], ("a", "b")),  # exactly half as long again
    ],
)
def test_sampled_pairs_are_the_shortest_and_the_longest_that_ended(
    lengths: list[int], ended: list[bool], expected: tuple[str, str] | None
) -> None:
    assert _contrast(["a", "b", "c"], torch.tensor(lengths).float(), torch.tensor(ended)) == expected
