"""Marks that look at what the score does not see: the anchor and the reward model, sick, healthy and missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.diagnose.health import Mark, marks
from kedge.trace.jsonl import append_json
from kedge.trace.reader import read_run
from kedge.trace.run_dir import RunDir

ANCHOR, REWARD_MODEL, CLIP = "anchor loss over its start", "reward model, held-out accuracy", "clip fraction"


def marked(tmp_path: Path, *lines: dict[str, object]) -> dict[str, Mark]:
    run = RunDir.create(tmp_path / "run")
    for line in lines:
        append_json(run.metrics, line)
    return {mark.name: mark for mark in marks(read_run(run.path))}


@pytest.mark.parametrize(("last", "status"), [(1.5, "ok"), (1.64, "ok"), (1.66, "look"), (2.9, "look"), (3.1, "bad")])
def test_language_that_falls_apart_is_marked(last: float, status: str, tmp_path: Path) -> None:
    line = {"stage": "evaluation", "step": 0, "evaluation/anchor_loss": 1.5}
    mark = marked(tmp_path, line, {**line, "step": 9, "evaluation/anchor_loss": last})[ANCHOR]
    assert mark.status == status
    assert mark.value == pytest.approx(last / 1.5)


@pytest.mark.parametrize(
    ("accuracy", "length", "status"),
    [(0.7, 0.6, "ok"), (0.7, 0.7, "look"), (0.56, 0.5, "ok"), (0.52, 0.4, "look"), (0.48, 0.4, "bad")],
)
def test_a_reward_model_at_chance_or_below_length_is_marked(
    accuracy: float, length: float, status: str, tmp_path: Path
) -> None:
    line = {"stage": "reward", "step": 3, "heldout/accuracy": accuracy, "heldout/length_only_accuracy": length}
    assert marked(tmp_path, line)[REWARD_MODEL].status == status


def test_late_steps_that_are_small_on_purpose_are_not_marked(tmp_path: Path) -> None:
    shares = [0.02] * 20 + [0.0001] * 10
    lines = [{"stage": "policy", "step": n, "policy/clip_fraction": share} for n, share in enumerate(shares)]
    assert marked(tmp_path, *lines)[CLIP].status == "ok"


def test_without_data_nothing_is_said_to_be_fine(tmp_path: Path) -> None:
    assert {mark.status for mark in marked(tmp_path).values()} == {"missing"}
