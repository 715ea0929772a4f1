"""A view: written and read again, cut at a step, and grown step by step as one made at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import World, make_run

from kedge.diagnose.checks import reducers, run_checks
from kedge.diagnose.view import View, load, save, view_of
from kedge.trace.jsonl import keep_json_lines
from kedge.trace.reader import Run, Series, StepTrace, read_run
from kedge.trace.run_dir import RunDir


def halves(step: StepTrace) -> dict[str, float]:
    return {"made/length": float(step.lengths.mean()), **({"made/even": 1.0} if step.step % 2 == 0 else {})}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("view") / "run", World(steps=9, batch=8))


def same(one: View, other: View) -> None:
    """Equal but for texts, numbers to seven digits."""
    assert (one.name, one.settings) == (other.name, other.settings)
    assert set(one.facts) == set(other.facts)
    for name, series in one.facts.items():
        same_series(series, other.facts[name])
    assert {stage: set(found) for stage, found in one.metrics.items()} == {
        stage: set(found) for stage, found in other.metrics.items()
    }
    for stage, found in one.metrics.items():
        for name, series in found.items():
            same_series(series, other.metrics[stage][name])
    assert [probes.step for probes in one.probes] == [probes.step for probes in other.probes]
    for mine, theirs in zip(one.probes, other.probes, strict=True):
        for column in ("probe", "variant", "length", "tercile"):
            assert np.array_equal(getattr(mine, column), getattr(theirs, column))
        np.testing.assert_allclose(mine.score, theirs.score, rtol=1e-6)
        np.testing.assert_allclose(mine.kl, theirs.kl, rtol=1e-6, atol=1e-9)
    for first, second in zip(one.pairs, other.pairs, strict=True):
        np.testing.assert_allclose(first.score, second.score, rtol=1e-6)
        assert (first.step, first.beta) == (second.step, pytest.approx(second.beta))
    assert [sample["step"] for sample in one.samples] == [sample["step"] for sample in other.samples]
    for mine_, theirs_ in zip(one.samples, other.samples, strict=True):
        np.testing.assert_allclose(mine_["score"], theirs_["score"], rtol=1e-6)


def same_series(one: Series, other: Series) -> None:
    assert np.array_equal(one.steps, other.steps)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-6, atol=1e-12)


def test_a_view_holds_facts_of_every_step(path: Path) -> None:
    run = read_run(path)
    view = view_of(run, [halves])
    length = view.fact("made/length")
    assert length is not None and length.steps.tolist() == list(run.steps())
    assert length.values.tolist() == [float(trace.lengths.mean()) for trace in run.traces()]
    even = view.fact("made/even")
    assert even is not None and even.steps.tolist() == [0, 2, 4, 6, 8]
    assert view.fact("made/other") is None and view.metric("no/such") is None
    assert view.steps.tolist() == list(range(9))
    assert view.settings["policy"]["kl"]["beta"] == 0.05 and view.without_settings().settings == {}


def test_what_is_not_known_is_left_out_of_a_series(path: Path) -> None:
    view = view_of(read_run(path), [lambda step: {"made/odd": float("nan") if step.step % 2 else 1.0}])
    odd = view.fact("made/odd")
    assert odd is not None and odd.steps.tolist() == [0, 2, 4, 6, 8]
    assert view_of(read_run(path), [lambda _: {"made/no": float("nan")}]).fact("made/no") is None


def test_written_and_read_again(path: Path, tmp_path: Path) -> None:
    view = view_of(read_run(path), [halves])
    save(view, tmp_path / "view.json.gz")
    read = load(tmp_path / "view.json.gz")
    same(view, read)
    assert all(text is None for probes in read.probes for text in probes.response)
    save(read, tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "view.json.gz").read_bytes()


def test_numbers_that_are_not_finite_survive_writing(tmp_path: Path) -> None:
    series = Series(np.array([0, 1]), np.array([np.nan, 2.0]))
    save(View("made", {"made/fact": series}, {"policy": {"score/mean": series}}), tmp_path / "view.json.gz")
    read = load(tmp_path / "view.json.gz")
    assert np.isnan(read.facts["made/fact"].values[0]) and read.facts["made/fact"].values[1] == 2.0


def grown(path: Path, place: Path, steps: int) -> Run:
    """The run as it was on disk after `steps` policy steps."""
    run = RunDir(make_run(place, World(steps=9, batch=8)))
    for kind in ("step", "probes", "samples"):
        for step, file in run.files(kind):
            if step >= steps:
                file.unlink()
    for file in (run.metrics, run.timings):
        keep_json_lines(file, lambda line: int(line["step"]) < steps)
    return read_run(run.path)


def test_a_view_that_grew_is_one_made_at_once(path: Path, tmp_path: Path) -> None:
    whole = view_of(read_run(path), [halves])
    early = view_of(grown(path, tmp_path / "run", 4), [halves])
    assert early.steps.tolist() == [0, 1, 2, 3]
    seen: list[int] = []

    def watched(step: StepTrace) -> dict[str, float]:
        seen.append(step.step)
        return halves(step)

    later = view_of(read_run(path), [watched], after=early)
    assert seen == [4, 5, 6, 7, 8]
    same(later, whole)


def test_since_leaves_out_what_was_before(path: Path) -> None:
    view = view_of(read_run(path), [halves]).since(4)
    assert view.facts["made/length"].steps.tolist() == [4, 5, 6, 7, 8]
    assert view.metrics["policy"]["score/mean"].steps.min() == 4
    assert all(one.step >= 4 for one in (*view.probes, *view.pairs))
    assert all(one["step"] >= 4 for one in view.samples)
    assert view_of(read_run(path), [halves]).since(0).steps.tolist() == list(range(9))


def test_every_check_judges_runs_of_any_length_with_and_without_their_recipe(path: Path, tmp_path: Path) -> None:
    view = view_of(read_run(path), reducers())
    for one in (view, view.without_settings(), view.since(7), view.since(99), View("empty", {}, {})):
        findings = run_checks(one)
        assert len({finding.check for finding in findings}) == len(findings)
        assert all(np.isfinite(finding.strength) for finding in findings)
    assert {finding.status for finding in run_checks(View("empty", {}, {}))} == {"not_checked"}
    assert {finding.status for finding in run_checks(view.since(99))} <= {"not_checked", "ok"}


def test_what_a_check_says_of_a_step_rests_on_what_came_before(path: Path) -> None:
    """An onset within the first steps is the same when the later ones are not there yet."""
    view = view_of(read_run(path), reducers())
    cut = {name: Series(one.steps[one.steps < 8], one.values[one.steps < 8]) for name, one in view.facts.items()}
    early = {finding.check: finding for finding in run_checks(replace(view, facts=cut))}
    for finding in run_checks(view):
        if early[finding.check].onset is not None and early[finding.check].status == "fail":
            assert finding.onset == early[finding.check].onset
