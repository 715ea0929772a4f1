"""What a trace lacks is said, not guessed: without a column no check speaks up that was quiet with it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import World, step_record

from kedge.diagnose.checks import all_checks, possible, reducers, run_checks
from kedge.diagnose.needs import SOURCES, alternatives, in_words, missing
from kedge.diagnose.view import load, save, view_of
from kedge.trace.reader import read_run
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import OPTIONAL, TOKEN_FLOATS
from kedge.trace.writer import StepRecord, TraceWriter

STEPS = 30
SEVERITY = {"not_checked": 0, "ok": 1, "warn": 2, "fail": 3}


def without(record: StepRecord, absent: frozenset[str]) -> StepRecord:
    unknown = {name: np.full(record.response_mask.shape, np.nan) for name in absent & set(TOKEN_FLOATS)}
    if "active" in absent:
        unknown["active"] = np.zeros(record.response_mask.shape, dtype=bool)
    if "ended" in absent:
        unknown["ended"] = np.zeros(len(record.ended), dtype=bool)
    return replace(record, absent=absent, **unknown)


def write(path: Path, absent: frozenset[str]) -> Path:
    run = RunDir.create(path)
    run.update_manifest(name="foreign", status="finished")
    rng = np.random.default_rng(0)
    with TraceWriter(run) as writer:
        for step in range(STEPS):
            writer.write_step(without(step_record(World(), step, rng), absent))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "run", frozenset())


@cache
def statuses(path: Path) -> dict[str, str]:
    return {finding.check: finding.status for finding in run_checks(view_of(read_run(path), reducers()))}


def test_every_check_names_sources_that_exist() -> None:
    assert set(OPTIONAL) < set(SOURCES)
    for check in all_checks():
        assert check.needs, check.name
        assert {one for need in check.needs for one in alternatives(need)} <= set(SOURCES), check.name


@pytest.mark.parametrize("column", OPTIONAL)
def test_without_a_column(column: str, whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "run", frozenset({column}))
    step = read_run(path).step(0)
    assert step.absent == {column}
    if column in TOKEN_FLOATS:
        assert np.isnan(step.tokens[column]).all()
    before, after = statuses(whole), statuses(path)
    for check in all_checks():
        if column in check.needs:
            assert after[check.name] == "not_checked"
        else:
            assert SEVERITY[after[check.name]] <= SEVERITY[before[check.name]], check.name


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    view = view_of(read_run(write(tmp_path / "run", frozenset({"reference_logprob"}))), reducers())
    finding = next(one for one in run_checks(view) if one.check == "beta")
    assert "log-probabilities of the reference" in finding.summary
    save(view, tmp_path / "view.json.gz")
    assert load(tmp_path / "view.json.gz").absent == view.absent == {"reference_logprob"}
    lacking = {check.name: lacks for check, lacks in possible(view)}
    assert lacking["beta"] == ("reference_logprob",)
    assert lacking["sampler"] == ()
    assert lacking["human_gap"] == ("labels",)
    assert lacking["feature_reward"] == ("probes | samples",)


def test_columns_that_come_later_count(tmp_path: Path) -> None:
    path = write(tmp_path / "run", frozenset({"entropy"}))
    run = RunDir(path)
    early = view_of(read_run(path), reducers())
    with TraceWriter(run) as writer:
        writer.write_step(step_record(World(), STEPS, np.random.default_rng(1)))
    assert early.absent == {"entropy"}
    assert view_of(read_run(path), reducers(), after=early).absent == frozenset()


def test_alternatives() -> None:
    assert missing(("score", "probes | samples"), {"probes"}) == ()
    assert missing(("score", "probes | samples"), {"probes", "samples", "score"}) == ("score", "probes | samples")
    assert in_words(("score", "members | labels")) == "scores, a second reward model or joined labels"
    assert in_words(()) == ""


def test_only_known_columns_can_be_absent() -> None:
    with pytest.raises(ValueError, match="cannot be absent"):
        without(step_record(World(), 0, np.random.default_rng(0)), frozenset({"made_up"}))
