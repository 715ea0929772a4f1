"""The results pages come from the figures beside them, and the audit finds on public sets what is known of them.

The sets are looked for under the folder that the environment variable KEDGE_DATA names; without it their tests are
skipped. Expected figures are those that the sets' own documentation states, as `benchmarks/audit_real.py` lists them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from makers import script

from kedge.data.audit.whole import as_json, audit

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results"
DATA = Path(os.environ.get("KEDGE_DATA") or ROOT / "no-such-folder")
REAL = script("audit_real")
DIRECT = [name for name in REAL.KNOWN if " " not in name and name.endswith("/pairs")]


def test_the_page_comes_from_the_figures() -> None:
    figures = json.loads((RESULTS / "audit-real.json").read_text(encoding="utf-8"))
    assert REAL.render(figures) == (RESULTS / "audit-real.md").read_text(encoding="utf-8")


def test_the_figures_are_those_that_are_known() -> None:
    figures = json.loads((RESULTS / "audit-real.json").read_text(encoding="utf-8"))
    for name, known in REAL.KNOWN.items():
        check(figures[name], known)


def test_the_guide_says_what_was_measured() -> None:
    text = " ".join((ROOT / "docs" / "audit.md").read_text(encoding="utf-8").split())
    speed = json.loads((RESULTS / "audit-speed.json").read_text(encoding="utf-8"))
    assert (speed["rows"], speed["peak_mib"] < 1536) == (2_000_000, True)
    told = f"{speed['rows']:,} made-up pairs ({speed['file_mib']:,} MiB of JSONL) took {speed['seconds']:.0f} s"
    assert told in text and f"{speed['peak_mib']} MiB of memory" in text
    alarms = json.loads((RESULTS / "audit-false-alarms.json").read_text(encoding="utf-8"))
    small, large = (alarms[f"unbiased, {prompts} prompts of 6"] for prompts in (50, 300))
    assert small["seeds"] == large["seeds"] == 200
    length, place, style = (small["alarms"][f"{name}_bias"] for name in ("length", "position", "format"))
    assert f"{length} gave an alarm for length, {place} for place and {style} for format" in text
    length, place, style = (large["alarms"][f"{name}_bias"] for name in ("length", "position", "format"))
    assert f"of 200 with 300 prompts, {length}, {place} and {style}." in text
    assert max(*small["alarms"].values(), *large["alarms"].values()) <= 10  # 5% of 200
    put_in = {"longer": "length_bias", "shorter": "length_bias", "first place": "position_bias", "lists": "format_bias"}
    for name, world in alarms.items():
        if not name.startswith("unbiased"):
            assert world["alarms"][put_in[name.split(",")[0]]] == world["seeds"] == 20, name


@pytest.mark.parametrize("name", DIRECT)
def test_known_figures_are_found_in_the_sets(name: str) -> None:
    path = DATA / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"set KEDGE_DATA to a folder that holds {name}.parquet")
    check(as_json(audit(path)), REAL.KNOWN[name])


def test_a_domain_that_gives_the_label_away_is_flagged_on_a_real_set() -> None:
    path = DATA / "human_taskmaster_reward" / "binary.parquet"
    if not path.is_file():
        pytest.skip("set KEDGE_DATA to a folder that holds human_taskmaster_reward/binary.parquet")
    found = audit(path)
    (domain,) = [one for one in found.findings if one.name == "domain"]
    assert domain.status == "bad" and "86% in 'coffee'" in domain.says


def check(found: dict, known) -> None:
    """Counts exactly, shares to rounding, the slope inside the stated interval."""
    bias, position = found["length_bias"], found["position_bias"]
    if known.longer_wins is not None:
        assert bias["longer_wins"] == pytest.approx(known.longer_wins, abs=0.00051)
    if known.slope is not None:
        point, low, high = known.slope
        assert low <= bias["slope"] <= high and abs(bias["slope"] - point) < 0.025
        assert bias["slope_ci"][0] <= point <= bias["slope_ci"][1]
    for key in ("duplicates", "identical", "identical_decided", "empty", "repeated", "contradictory"):
        if getattr(known, key) is not None:
            assert found[key] == getattr(known, key), key
    if known.triangles is not None:
        cycles = found["cycles"] or {"cyclic": 0, "triangles": 0}
        assert (cycles["cyclic"], cycles["triangles"]) == known.triangles
    if known.first_wins is not None:
        assert position["first_wins"] == pytest.approx(known.first_wins, abs=0.001)
