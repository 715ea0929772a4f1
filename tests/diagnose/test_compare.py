"""Runs side by side: settings, figures, paired differences, and what is not compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import HEALTHY, World, make_run, sample_record

from kedge.diagnose.compare import compare, gaussian_efficiency
from kedge.errors import InputError
from kedge.trace.jsonl import append_json
from kedge.trace.reader import Run, read_run
from kedge.trace.writer import TraceWriter


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("pair")
    drift, healthy = make_run(folder / "drift", World()), make_run(folder / "healthy", HEALTHY)
    settings = {"name": "other", "policy": {"kl": {"beta": 0.2}, "method": "ppo"}}
    (healthy / "recipe.json").write_text(json.dumps(settings))
    return read_run(drift), read_run(healthy)


def resampled(run: Run, **changes: object) -> None:
    """Other answers at the last evaluation."""
    record = sample_record(12)
    with TraceWriter(run.dir) as writer:
        writer.write_samples(replace(record, **changes))


def test_settings_that_differ_are_named_with_both_values(pair: tuple[Run, Run]) -> None:
    found = compare(pair)
    assert found.settings == {"policy.kl.beta": (0.05, 0.2), "policy.method": (None, "ppo")}


def test_figures_are_those_of_the_last_evaluation(pair: tuple[Run, Run]) -> None:
    drift, healthy = compare(pair).sides
    assert drift.step == healthy.step == 12
    assert drift.figures["length"] == pytest.approx(25) and healthy.figures["length"] == pytest.approx(10)
    assert drift.figures["score"] == pytest.approx(1.5)
    assert drift.margin is not None and drift.margin.step == 12
    assert compare(pair, at=5).sides[0].step == 3
    assert math.isnan(drift.efficiency)  # this trace does not hold the spread of the reference's scores


def test_differences_are_taken_prompt_by_prompt(tmp_path: Path) -> None:
    one, other = (read_run(make_run(tmp_path / name)) for name in ("one", "other"))
    rng = np.random.default_rng(0)
    level, gaps = 10 * rng.normal(size=9), rng.uniform(0.8, 1.2, 9)
    resampled(one, score=level.tolist())
    resampled(other, score=(level + gaps).tolist(), length=[9] * 9)
    side = compare((one, other)).sides[1]
    found = {difference.figure: difference for difference in side.paired}
    assert found["score"].value == pytest.approx(gaps.mean(), abs=1e-5)
    assert 0.8 < found["score"].low < found["score"].value < found["score"].high < 1.2  # not as wide as the levels
    assert found["score"].clear and found["length"].clear and not found["kl"].clear
    assert found["length"].value == pytest.approx(9 - len(["yes", ",", "you", "can", "."]))
    assert side.unpaired == ()


def test_other_prompts_and_other_judges_are_not_compared(tmp_path: Path) -> None:
    one, prompts, judge = (read_run(make_run(tmp_path / name)) for name in ("one", "prompts", "judge"))
    resampled(prompts, prompt=[f"another {number}" for number in range(9)])
    resampled(judge, reference_score=[0.7] * 9)
    _, other, third = compare((one, prompts, judge)).sides
    assert other.paired == () and "prompts differ" in other.unpaired[0]
    assert {difference.figure for difference in third.paired} == {"kl", "length"}
    assert "reward models" in third.unpaired[0]


def test_the_frontier_of_normal_scores_by_quadrature() -> None:
    """Tilting a normal score of deviation s by exp(r / b): the gain over s sqrt(2 KL) is 1."""
    grid = np.linspace(-14, 14, 40001)
    spread = 0.7
    usual = np.exp(-(grid**2) / (2 * spread**2))
    usual /= usual.sum()
    for pressure in (0.5, 1.5, 3.0):
        tilted = usual * np.exp(pressure * grid)
        tilted /= tilted.sum()
        kept = tilted > 0
        kl = float((tilted[kept] * np.log(tilted[kept] / usual[kept])).sum())
        assert gaussian_efficiency(float(tilted @ grid), kl, spread) == pytest.approx(1, rel=1e-6)
    assert math.isnan(gaussian_efficiency(0.1, 0.01, spread)) and math.isnan(gaussian_efficiency(1, 2, 0))


def test_efficiency_is_read_from_the_run(tmp_path: Path) -> None:
    one, other = (read_run(make_run(tmp_path / name)) for name in ("one", "other"))
    line = {"stage": "evaluation", "step": 13, "evaluation/score": 1.0, "evaluation/score_reference": 0.0}
    append_json(one.dir.metrics, line | {"evaluation/kl_per_sequence": 2.0, "evaluation/score_reference_within": 0.5})
    found = compare((read_run(one.path), other)).sides[0]
    assert found.step == 13 and found.efficiency == pytest.approx(1.0)
    assert found.margin is not None and found.margin.step == 12


def test_lines_and_json_hold_the_same(pair: tuple[Run, Run]) -> None:
    found = compare(pair)
    text = "\n".join(found.lines())
    assert "policy.kl.beta" in text and "drift" in text and "healthy less drift" in text
    record = found.to_dict()
    assert [side["name"] for side in record["runs"]] == ["drift", "healthy"]
    assert all(len(values) == 2 for values in record["findings"].values())


def test_what_is_nothing_to_compare_is_refused(pair: tuple[Run, Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two runs or more"):
        compare(pair[:1])
    bare = make_run(tmp_path / "bare", World(steps=1))
    (bare / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no evaluation"):
        compare((pair[0], read_run(bare)))


def test_it_needs_no_torch() -> None:
    program = "import sys, kedge.diagnose.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
