"""The shipped files recipe, and the loaders on the real sets that it was tried on.

The sets are looked for under the folder that the environment variable KEDGE_DATA names; without it their tests are
skipped. Expected row counts are those that the sets' own documentation states.
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

from kedge import recipe as recipes
from kedge.data.records import Message, prompt_text
from kedge.data.validate import load_demonstrations, load_preferences, load_prompts
from kedge.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "support-desk.toml"
DATA = Path(os.environ.get("KEDGE_DATA") or ROOT / "no-such-folder")
COFFEE, SERVICES = "sft_taskmaster4/pairs.parquet", "sft_sgd/pairs.parquet"
LABELS = "human_taskmaster_reward/pairs.parquet"


def needs(name: str) -> pytest.MarkDecorator:
    """Skip unless that set is there."""
    reason = f"set KEDGE_DATA to a folder that holds {name}"
    return pytest.mark.skipif(not (DATA / name).is_file(), reason=reason)


@pytest.fixture(scope="module")
def benchmark_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_desk", ROOT / "benchmarks" / "support_desk.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reads_files_beside_it() -> None:
    recipe = recipes.load(RECIPE)
    assert (recipe.world, recipe.model.init) == ("files", "scratch")
    folder = RECIPE.parent / "data"
    named = (recipe.data.demonstrations, recipe.data.preferences)
    assert named == (folder / "demonstrations.parquet", folder / "preferences.parquet")
    assert recipe.data.prompts is None  # a user with two files need not have a third


def test_the_recipe_says_which_files_are_missing() -> None:
    problems = recipes.missing_files(recipes.load(RECIPE), str(RECIPE))
    assert [problem.where.rpartition(": ")[2] for problem in problems] == [
        "data.demonstrations",
        "data.preferences",
    ]


def test_the_page_comes_from_the_figures_beside_it(benchmark_script: ModuleType) -> None:
    figures = json.loads((ROOT / "docs/results/support-desk.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/results/support-desk.md").read_text(encoding="utf-8")
    assert benchmark_script.render(figures) == page


def within(part: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Every key of `part` has the same value in `whole`, section by section."""
    return all(
        within(value, whole[key]) if isinstance(value, dict) else whole[key] == value for key, value in part.items()
    )


def test_the_figures_are_of_the_shipped_recipe() -> None:
    figures = json.loads((ROOT / "docs/results/support-desk.json").read_text(encoding="utf-8"))
    shipped = recipes.load(RECIPE).model_dump(mode="json")
    measured = figures["recipe"]
    for section in ("model", "sft", "reward", "policy", "evaluate"):
        assert within(measured[section], shipped[section]), section  # newer keys are at their defaults


def test_the_policy_learns_more_than_a_trigram_model() -> None:
    figures = json.loads((ROOT / "docs/results/support-desk.json").read_text(encoding="utf-8"))
    for side in ("held_out", "other_dialogues"):
        row = figures["language"][side]
        assert row["policy"] < min(row["3-gram"], row["3-gram with prompts"])


@needs(COFFEE)
def test_coffee_demonstrations_load_whole() -> None:
    loaded = load_demonstrations(DATA / COFFEE, max_rejected=0.0)
    assert (len(loaded.rows), loaded.total, len(loaded.rejected)) == (5853, 5853, 0)
    assert loaded.lines[-1].endswith("pairs.parquet:5853")
    last = [row.prompt[-1] for row in loaded.rows]
    assert {turn.role for turn in last if isinstance(turn, Message)} == {"user"}
    assert all(isinstance(turn, Message) for turn in last)


@needs(SERVICES)
def test_service_prompts_load_whole() -> None:
    loaded = load_prompts(DATA / SERVICES, max_rejected=0.0)
    assert (len(loaded.rows), loaded.total, len(loaded.rejected)) == (19174, 19174, 0)


@needs(LABELS)
def test_human_preferences_load_with_the_known_defects() -> None:
    loaded = load_preferences(DATA / LABELS, max_rejected=0.0)
    assert (len(loaded.rows), loaded.total) == (554, 554)
    assert {row.strength for row in loaded.rows} == {1.0}  # one label each, no ties
    assert sum(row.chosen == row.rejected for row in loaded.rows) == 5  # carry both labels, says the source


@needs(LABELS)
def test_rows_longer_than_the_context_are_named_by_row() -> None:
    from kedge.data.tokenise import train_tokenizer, within_context

    loaded = load_preferences(DATA / LABELS, max_rejected=0.0)
    tokenizer = train_tokenizer([prompt_text(row.prompt) for row in loaded.rows], vocab=400)
    kept = within_context(tokenizer, loaded, context=512, max_rejected=1.0)
    assert len(kept.rows) + len(kept.rejected) == 554
    assert kept.rejected
    with pytest.raises(InputError) as raised:
        within_context(tokenizer, loaded, context=512, max_rejected=0.0)
    assert raised.value.problems[0].where == kept.rejected[0].where
    assert "the context is 512" in raised.value.problems[0].what


@needs(COFFEE)
def test_held_back_dialogues_share_no_opening(benchmark_script: ModuleType, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    files = benchmark_script.split_by_opening(DATA / COFFEE, tmp_path)
    groups = [parquet.read_table(file)["group"].to_pylist() for file in files]
    assert len(groups[0]) + len(groups[1]) == 5853
    assert not set(groups[0]) & set(groups[1])
    assert 0.2 < len(groups[1]) / 5853 < 0.3
