"""The real sets of judgments under the folder that KEDGE_DATA names; skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kedge.data.check import survey
from kedge.data.convert import convert
from kedge.data.records import Preference
from kedge.data.validate import load_judgments

DATA = Path(os.environ.get("KEDGE_DATA") or "no-such-folder")

# What each file holds: its kind, rows, and how many of them cannot be used.
FILES = {
    "human_hh_harmless/pairs.parquet": ("pair", 1947, 0),
    "human_hh_harmless/native.jsonl.gz": ("pair", 1947, 5),  # five diverge before the last turn
    "human_ukp_convarg/pairs.parquet": ("pair", 13959, 0),
    "human_pandalm/pairs.parquet": ("pair", 824, 0),
    "human_autoj/pairs.parquet": ("pair", 1196, 0),
    "human_qa_feedback/pairs.parquet": ("pair", 2610, 0),
    "human_qa_feedback/ranked.parquet": ("ranking", 435, 0),
    "human_oasst100/pairs.parquet": ("pair", 695, 0),
    "human_oasst100/ranked.parquet": ("ranking", 190, 0),
    "human_topicalchat/ranked.parquet": ("ranking", 51, 1),  # two systems gave the same reply
    "human_taskmaster_reward/binary.parquet": ("verdict", 5937, 6),  # the first turn of a dialogue has no prompt
    "human_taskmaster_reward/pairs.parquet": ("pair", 554, 0),
    "eval_llmbar/pairs.parquet": ("pair", 759, 0),
    "eval_hhh/pairs.parquet": ("pair", 163, 0),
    "eval_rm_bench/ranked.parquet": (None, 683, 683),  # three texts a side
    "ai_alpaca_eval/pairs.parquet": (None, 27275, 27275),  # columns of its own
}


@pytest.mark.parametrize("name", FILES)
def test_every_set_loads_or_says_why_not(name: str) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"set KEDGE_DATA to a folder that holds {name}")
    kind, rows, rejected = FILES[name]
    seen = survey(DATA / name, show=1)
    assert (seen.rows, seen.rejected) == (rows, rejected)
    assert list(seen.kinds) == ([kind] if kind else [])
    assert len(seen.reasons) == (rejected > 0)


@pytest.mark.parametrize("name", ["human_ukp_convarg/pairs.parquet", "human_pandalm/pairs.parquet"])
def test_votes_and_places_of_a_real_set_come_back_from_a_canonical_file(name: str, tmp_path: Path) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"set KEDGE_DATA to a folder that holds {name}")
    convert(survey(DATA / name), tmp_path / "out.parquet", to="canonical")
    rows = load_judgments(DATA / name, max_rejected=0.0).rows
    assert load_judgments(tmp_path / "out.parquet", max_rejected=0.0).rows == rows
    assert all(isinstance(row, Preference) and row.votes and row.shown for row in rows)


def test_the_pairs_of_real_rankings_are_those_beside_them(tmp_path: Path) -> None:
    folder = DATA / "human_oasst100"
    if not folder.is_dir():
        pytest.skip("set KEDGE_DATA to a folder that holds human_oasst100")
    convert(survey(folder / "ranked.parquet"), tmp_path / "out.parquet", pairs=True)
    made = load_judgments(tmp_path / "out.parquet", max_rejected=0.0).rows
    assert set(made) == set(load_judgments(folder / "pairs.parquet", max_rejected=0.0).rows)
