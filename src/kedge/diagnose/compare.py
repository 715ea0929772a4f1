"""Runs side by side: settings that differ, figures of the last evaluation, and differences on the same prompts.

Where two runs were evaluated on the same prompts, their answers are compared prompt by prompt, with intervals over
resampled prompts. That is noise of the evaluation alone: two runs that differ in nothing but their draws differ, too,
and only several seeds tell by how much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.diagnosis import Diagnosis, diagnose, read_view
from kedge.diagnose.margin import Margin, bootstrap_interval, margins
from kedge.errors import InputError, Problem
from kedge.trace.reader import Run

Array = NDArray[Any]
Answers = Mapping[str, Array]
PAIRED = {"score": "normalised score", "kl": "nats per response", "length": "tokens"}
LITTLE = 0.05  # nats: nearer to the reference an efficiency is noise over noise
FIGURES = {  # name -> metric of the evaluation, unit
    "score": ("evaluation/score", "normalised score"),
    "score of the reference": ("evaluation/score_reference", "normalised score"),
    "win rate": ("evaluation/win_rate", "share"),
    "KL": ("evaluation/kl_per_sequence", "nats per response"),
    "length": ("evaluation/length", "tokens"),
    "length of the reference": ("evaluation/length_reference", "tokens"),
    "entropy": ("evaluation/entropy", "nats per token"),
    "ended": ("evaluation/ended", "share"),
}
_NAMES = ("name",)  # settings that say nothing about a run


@dataclass(frozen=True)
class Difference:
    """The mean over shared evaluation prompts of a run's figure less the first run's, with a 95% interval."""

    figure: str
    unit: str
    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Side:
    """One run of a comparison. `paired` is against the first run; `unpaired` says why a figure is not in it."""

    name: str
    path: str
    step: int | None  # updates before the evaluation that is shown
    figures: Mapping[str, float]
    efficiency: float  # score gained over what a normal score allows at this KL; nan where it is not known
    margin: Margin | None  # of the last probes up to that evaluation
    status: str
    failing: tuple[str, ...]  # checks
    paired: tuple[Difference, ...] = ()
    unpaired: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two or more runs side by side."""

    sides: tuple[Side, ...]
    settings: Mapping[str, tuple[Any, ...]]  # keys of the recipe that differ, with each run's value; None: not there

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [asdict(side) for side in self.sides],
            "settings": {name: list(values) for name, values in self.settings.items()},
            "findings": {name: list(here) for name, here in self.findings().items()},
        }

    def findings(self) -> dict[str, tuple[bool, ...]]:
        """Checks that fail in some runs and not in others: whether they fail in each."""
        names = sorted({name for side in self.sides for name in side.failing})
        found = {name: tuple(name in side.failing for side in self.sides) for name in names}
        return {name: here for name, here in found.items() if not all(here)}

    def lines(self) -> list[str]:
        """For people."""
        return list(_lines(self))


def compare(runs: Sequence[Run], *, at: int | None = None) -> Comparison:
    """The runs side by side, at their last evaluations or at the last one up to `at` updates.

    Raises `InputError` for fewer than two runs and for one that holds no evaluation.
    """
    if len(runs) < 2:
        raise InputError(Problem("kedge compare", f"{len(runs)} run is nothing to compare", "give two runs or more"))
    sides = [_side(run, at) for run in runs]
    answers = [_answers(run, side.step) for run, side in zip(runs, sides, strict=True)]
    others = []
    for side, mine in zip(sides[1:], answers[1:], strict=True):
        differences, reasons = _paired(answers[0], mine)
        others.append(replace(side, paired=differences, unpaired=reasons))
    return Comparison((sides[0], *others), _settings(runs))


def gaussian_efficiency(gain: float, kl: float, within: float) -> float:
    """The score gained over `within` sqrt(2 KL), the frontier where scores are normal within a prompt.

    `within` is the standard deviation of the reference's scores within a prompt. nan near the reference.
    """
    return gain / (within * math.sqrt(2 * kl)) if kl > LITTLE and within > 0 else math.nan


def _side(run: Run, at: int | None) -> Side:
    metrics = run.metrics("evaluation")
    series = metrics.get("evaluation/score")
    steps = [] if series is None else [int(step) for step in series.steps if at is None or step <= at]
    if not steps:
        where = str(run.path) if at is None else f"{run.path}: --at {at}"
        raise InputError(Problem(where, "holds no evaluation to compare", "wait for its first, or choose another run"))
    step = steps[-1]

    def figure(metric: str) -> float:
        found = metrics.get(metric)
        here = None if found is None else found.values[found.steps == step]
        return float(here[-1]) if here is not None and len(here) else math.nan

    gain = figure("evaluation/score") - figure("evaluation/score_reference")
    found: Diagnosis = diagnose(read_view(run.path)[0])
    seen = [one for one in margins(run) if one.step <= step]
    return Side(
        name=run.path.name,
        path=str(run.path),
        step=step,
        figures={name: figure(metric) for name, (metric, _) in FIGURES.items()},
        efficiency=gaussian_efficiency(
            gain, figure("evaluation/kl_per_sequence"), figure("evaluation/score_reference_within")
        ),
        margin=seen[-1] if seen else None,
        status=found.status,
        failing=tuple(one.check for one in found.findings if one.status == "fail"),
    )


def _answers(run: Run, step: int | None) -> Answers | None:
    """The answers of one evaluation, column by column; None where they were not kept."""
    if step is None or step not in run.sample_steps():
        return None
    table = run.samples(step)
    names = ("prompt", "reference_response", "score", "reference_score", "kl", "length")
    return {name: np.array(table.column(name).to_pylist()) for name in names}


def _paired(first: Answers | None, mine: Answers | None) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """Differences of figures on the same prompts, and why some are left out."""
    if first is None or mine is None:
        return (), ("the answers of the evaluation were not kept",)
    known = first["prompt"].dtype.kind == "U" and mine["prompt"].dtype.kind == "U"
    if not known or not np.array_equal(first["prompt"], mine["prompt"]):
        return (), ("the evaluation prompts differ" if known else "the evaluation prompts were not kept",)
    same_answers = np.array_equal(first["reference_response"], mine["reference_response"])
    judged_alike = same_answers and np.allclose(first["reference_score"], mine["reference_score"], atol=1e-3)
    left_out = []
    if not judged_alike:
        reason = "reward models give the reference's answers other scores" if same_answers else "references differ"
        left_out.append(f"score: the {reason}, so that scores cannot be compared")
    found = [
        _difference(name, unit, mine[name].astype(float) - first[name].astype(float))
        for name, unit in PAIRED.items()
        if name != "score" or judged_alike
    ]
    return tuple(found), tuple(left_out)


def _difference(name: str, unit: str, values: Array) -> Difference:
    values = values[np.isfinite(values)]
    if not len(values):
        return Difference(name, unit, math.nan, math.nan, math.nan)
    return Difference(name, unit, float(values.mean()), *bootstrap_interval(values, seed=0))


def _settings(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    flat = [dict(_flat(run.settings)) for run in runs]
    names = [name for name in dict.fromkeys(key for one in flat for key in one) if name not in _NAMES]
    rows = {name: tuple(one.get(name) for one in flat) for name in names}
    return {name: values for name, values in rows.items() if len({json.dumps(one) for one in values}) > 1}


def _flat(settings: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield start + name, value


def _lines(found: Comparison) -> Iterator[str]:
    sides = found.sides
    yield from _table(["", *(side.name for side in sides)], list(_rows(sides)))
    yield ""
    if found.settings:
        yield "settings that differ"
        yield from _table([], [[name, *(_plain(value) for value in values)] for name, values in found.settings.items()])
    else:
        yield "no setting differs"
    for side in sides[1:]:
        yield ""
        yield f"{side.name} less {sides[0].name}, on the same prompts (95% over prompts; draws of training vary, too)"
        for one in side.paired:
            mark = "" if one.clear else "  not clear"
            yield f"  {one.figure:<8} {one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}] {one.unit}{mark}"
        for reason in side.unpaired:
            yield f"  not compared: {reason}"
    if found.findings():
        yield ""
        yield "checks that fail in some and not in others"
        yield from _table(
            [], [[name, *("fail" if one else "-" for one in here)] for name, here in found.findings().items()]
        )


def _rows(sides: Sequence[Side]) -> Iterator[list[str]]:
    yield ["updates", *(str(side.step) for side in sides)]
    for name, (_, unit) in FIGURES.items():
        yield [f"{name} ({unit})", *(_number(side.figures[name]) for side in sides)]
    yield ["KL efficiency (share)", *(_number(side.efficiency) for side in sides)]
    yield ["net margin (reward)", *("-" if side.margin is None else _number(side.margin.net) for side in sides)]
    yield ["diagnosis", *(side.status for side in sides)]


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    table = ([head] if head else []) + rows
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _plain(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
