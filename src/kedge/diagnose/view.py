"""What checks look at: a run as series over steps, small enough to keep for runs of any length.

One pass over the trace turns the rows of each step into numbers (*facts*), by the functions that the checks bring. What
is kept grows with the steps, not with the tokens. A view can be written to JSON and read again, so that checks can be
tried on runs whose traces are gone.
"""

from __future__ import annotations

import gzip
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.margin import Pairs, probe_pairs
from kedge.diagnose.texts import Phrase, answer_columns, features_of, phrases_of
from kedge.trace.reader import Run, Series, StepTrace

Array = NDArray[Any]
Facts = Mapping[str, float]
Reducer = Callable[[StepTrace], Facts]
"""The numbers of one step that a check wants, by name: `<check>/<fact>`; nan where the rows do not tell."""

STAGES = ("policy", "evaluation", "reward")
LOOKS = 256  # evaluations and scorings of the probes that a view holds; of more, as many at even distances


@dataclass(frozen=True)
class Probes:
    """All probe answers after `step` updates: fixed texts, whose score changes only if what scores them does. [N]."""

    step: int
    beta: float  # reward per nat
    probe: Array  # number of the prompt
    variant: Array  # "brief", "verbose" or "reference"
    length: Array  # tokens
    score: Array  # normalised
    kl: Array  # log policy - log reference, nats
    tercile: Array
    response: tuple[str | None, ...]
    features: Mapping[str, Array] = field(default_factory=dict)  # of the texts; empty where they could not be read


@dataclass(frozen=True)
class View:
    """A run as checks see it. Series may be empty; `settings` is empty where the recipe must not be read."""

    name: str
    facts: Mapping[str, Series]
    metrics: Mapping[str, Mapping[str, Series]]  # by stage
    probes: tuple[Probes, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()  # evaluations: step, and a list per column
    phrases: tuple[Phrase, ...] = ()  # of each evaluation, those that account for most of the score's gain
    settings: Mapping[str, Any] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()  # columns that no step holds, of schema.OPTIONAL

    def fact(self, name: str) -> Series | None:
        """The series of a fact without the steps at which it is not known; None where it is known at no step."""
        return _known(self.facts.get(name))

    def metric(self, name: str, stage: str = "policy") -> Series | None:
        """The same of a metric."""
        return _known(self.metrics.get(stage, {}).get(name))

    @property
    def steps(self) -> Array:
        """Policy steps whose rows or metrics are there."""
        found = [*self.facts.values(), *self.metrics.get("policy", {}).values()]
        return np.unique(np.concatenate([one.steps for one in found])) if found else np.zeros(0, dtype=np.int64)

    @property
    def lacks(self) -> frozenset[str]:
        """Sources beside the columns of steps, named as in `kedge.diagnose.needs`, that the run has nothing of."""
        there = {
            "prompts": "prompt_mix/prompts" in self.facts,
            "samples": bool(self.samples),
            "probes": bool(self.probes),
            "evaluations": bool(self.metrics.get("evaluation")),
            "labels": any(name.startswith("labels/") for name in self.facts),
            "members": any(name.startswith("reward_hacking/") for name in self.facts),
        }
        return frozenset(name for name, known in there.items() if not known)

    def since(self, step: int) -> View:
        """What came after `step` updates, with what was before left out."""

        def later(found: Mapping[str, Series]) -> dict[str, Series]:
            return {
                name: Series(one.steps[one.steps >= step], one.values[one.steps >= step]) for name, one in found.items()
            }

        return replace(
            self,
            facts=later(self.facts),
            metrics={stage: later(found) if stage != "reward" else found for stage, found in self.metrics.items()},
            probes=tuple(one for one in self.probes if one.step >= step),
            pairs=tuple(one for one in self.pairs if one.step >= step),
            samples=tuple(one for one in self.samples if one["step"] >= step),
            phrases=tuple(one for one in self.phrases if one.step >= step),
        )

    def without_settings(self) -> View:
        """The same run as if its recipe were unknown."""
        return replace(self, settings={})


def view_of(run: Run, reducers: Iterable[Reducer], *, after: View | None = None) -> View:
    """The view of a run, one step in memory at a time.

    With `after`, an earlier view of the same run, only what it lacks is read.
    """
    before = {} if after is None else after.facts
    done = set() if after is None else {int(step) for one in before.values() for step in one.steps}
    reduce = tuple(reducers)
    lines: dict[str, tuple[array[int], array[float]]] = {
        name: (array("q", one.steps.tolist()), array("d", one.values.tolist())) for name, one in before.items()
    }
    absent = None if after is None or not done else after.absent
    for number in run.steps() if reduce else ():
        if number in done:
            continue
        step = run.step(number)
        absent = step.absent if absent is None else absent & step.absent
        for reducer in reduce:
            for name, value in reducer(step).items():
                steps, values = lines.setdefault(name, (array("q"), array("d")))
                steps.append(number)
                values.append(float(value))
    facts = {name: Series(np.array(steps, dtype=np.int64), np.array(values)) for name, (steps, values) in lines.items()}
    samples = tuple(_samples(run, _some(run.sample_steps()), () if after is None else after.samples))
    scored = _some(run.probe_steps())
    return View(
        name=run.name,
        facts=facts,
        metrics={stage: run.metrics(stage) for stage in STAGES},
        probes=tuple(_probes(run, scored, () if after is None else after.probes)),
        pairs=tuple(probe_pairs(run, scored)),
        samples=samples,
        phrases=tuple(phrases_of(samples)),
        settings=run.settings,
        absent=absent or frozenset(),
    )


def save(view: View, path: Path) -> None:
    """Write a view as compressed JSON, texts left out; numbers keep seven digits."""

    def series(found: Mapping[str, Series]) -> dict[str, Any]:
        return {name: [one.steps.tolist(), _short(one.values)] for name, one in found.items()}

    record = {
        "name": view.name,
        "facts": series(view.facts),
        "metrics": {stage: series(found) for stage, found in view.metrics.items()},
        "probes": [_columns(one, skip=("response",)) for one in view.probes],
        "pairs": [_columns(one) for one in view.pairs],
        "samples": [
            {name: _short(column) if name != "step" else column for name, column in one.items() if name not in _TEXTS}
            for one in view.samples
        ],
        "phrases": [_plain(one) for one in view.phrases],
        "settings": view.settings,
        "absent": sorted(view.absent),
    }
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(path: Path) -> View:
    """A view that `save` wrote."""
    record = json.loads(gzip.decompress(path.read_bytes()))

    def series(found: Mapping[str, Any]) -> dict[str, Series]:
        return {name: Series(np.array(steps, dtype=np.int64), _long(values)) for name, (steps, values) in found.items()}

    return View(
        name=record["name"],
        facts=series(record["facts"]),
        metrics={stage: series(found) for stage, found in record["metrics"].items()},
        probes=tuple(Probes(**_arrays(one), response=(None,) * len(one["score"])) for one in record["probes"]),
        pairs=tuple(Pairs(**_arrays(one)) for one in record["pairs"]),
        samples=tuple(
            {name: _long(column) if name != "step" else column for name, column in one.items()}
            for one in record["samples"]
        ),
        phrases=tuple(_phrase(one) for one in record["phrases"]),
        settings=record["settings"],
        absent=frozenset(record.get("absent", ())),
    )


_TEXTS = ("prompt", "response", "reference_response")
_LENGTHS = ("length", "reference_tokens", "reference_length")
_SAMPLES = ("score", "reference_score", "kl", "reference_kl", *_LENGTHS, "tercile", *_TEXTS)


def _known(series: Series | None) -> Series | None:
    if series is None:
        return None
    here = np.isfinite(series.values)
    return Series(series.steps[here], series.values[here]) if here.any() else None


def _some(steps: Sequence[int]) -> list[int]:
    """All steps, or `LOOKS` of them at even distances with both ends."""
    if len(steps) <= LOOKS:
        return list(steps)
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, LOOKS)]


def _probes(run: Run, steps: Iterable[int], known: Iterable[Probes]) -> Iterator[Probes]:
    before = {one.step: one for one in known}
    for step in steps:
        if step in before:
            yield before[step]
            continue
        table = run.probes(step)
        if not len(table):
            continue
        column = {name: table.column(name).to_numpy() for name in table.column_names if name != "prompt"}
        yield Probes(
            step=step,
            beta=float(column["beta"][0]),
            **{name: column[name] for name in ("probe", "variant", "length", "score", "kl", "tercile")},
            response=tuple(column["response"].tolist()),
            features=features_of(column["response"].tolist()),
        )


def _samples(run: Run, steps: Iterable[int], known: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    before = {one["step"]: one for one in known}
    for step in steps:
        if step in before:
            yield before[step]
            continue
        table = run.samples(step).select(_SAMPLES)
        texts = {name: table.column(name).to_pylist() for name in _TEXTS}
        numbers = {name: table.column(name).to_numpy() for name in _SAMPLES if name not in _TEXTS}
        yield {"step": step, **texts, **numbers, **answer_columns(texts)}


def _short(values: Sequence[float] | Array) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in np.asarray(values, float).tolist()]


def _long(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _columns(one: Any, skip: Sequence[str] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(one).items():
        if name in skip:
            continue
        if isinstance(value, Mapping):
            found[name] = {inner: _short(column) for inner, column in value.items()}
        elif not isinstance(value, np.ndarray):
            found[name] = value
        else:
            found[name] = value.tolist() if value.dtype.kind in "iuOU" else _short(value)
    return found


def _arrays(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _array(value) for name, value in record.items()}


def _array(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _long(column) for name, column in value.items()}
    if not isinstance(value, list):
        return value
    return np.array(value) if _whole(value) else _long(value)


def _plain(one: Any) -> dict[str, Any]:
    found = asdict(one)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def _phrase(record: Mapping[str, Any]) -> Phrase:
    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
    return Phrase(**known)


def _whole(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, str)) for value in values)
