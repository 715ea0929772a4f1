"""The page on real preferences comes from its figures, and these are what the sets give.

The sets are looked for under the folder that the environment variable KEDGE_DATA names; without it those tests are
skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KEDGE_DATA") or ROOT / "no-such-folder")
RAW = ROOT / "docs" / "results" / "real-preferences.json"
# Share of decided comparisons of unequal length in which the longer answer won, as the sets' own documentation states.
LONGER_WINS = {"human_pandalm": 0.675, "human_autoj": 0.716, "human_oasst100": 0.691, "human_ukp_convarg": 0.758}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_preferences", ROOT / "benchmarks" / "real_preferences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RAW.read_text(encoding="utf-8"))
    return found


def test_the_page_comes_from_the_figures_beside_it(script: ModuleType, figures: dict[str, Any]) -> None:
    assert script.render(figures) == RAW.with_suffix(".md").read_text(encoding="utf-8")


def test_the_figures_are_of_this_script(script: ModuleType, figures: dict[str, Any]) -> None:
    assert figures["transformer"] == script.settings()
    for name in script.SETS:
        judges = figures["sets"][name]["judges"]
        assert list(script.NAMES) == sorted(judges, key=list(script.NAMES).index)
        assert len(judges["transformer"]["seeds"]) >= 3
        assert judges["length"]["people_prefer_longer"] == pytest.approx(LONGER_WINS[name], abs=0.0015)


@pytest.mark.parametrize("name", ["human_pandalm", "human_oasst100"])
def test_the_linear_judge_gives_these_figures(script: ModuleType, figures: dict[str, Any], name: str) -> None:
    if not (DATA / name / "pairs.parquet").is_file():
        pytest.skip(f"set KEDGE_DATA to a folder that holds {name}/pairs.parquet")
    from kedge.evaluate.reward.linear import cross_fitted

    table, rejected = script.read(name)
    recorded = figures["sets"][name]
    assert (rejected, int(table.decided.sum())) == (recorded["rejected"], recorded["decided"])
    measured = script.figures(table, [cross_fitted(table).score(table.answers)], 1.0)
    again = measured["parts"]["all"]["accuracy"]
    assert again == pytest.approx(recorded["judges"]["linear"]["parts"]["all"]["accuracy"], abs=2e-3)
