"""Ways to cut a run's tokens into groups: style, tercile, position, time, a feature, a label that the user joins.

A grouping gives every response, or every token, of a step the number of its group, -1 where it belongs to none. It is
made from the run before the steps are read, so that one pass over them is enough.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.features import Feature, feature_named
from kedge.diagnose.ledger import POSITIONS, STYLES, VERBOSE_RATIO, position_names, reference_length, styles
from kedge.errors import InputError, Problem
from kedge.trace.labels import Labels, text_key
from kedge.trace.reader import Run, StepTrace

Array = NDArray[Any]
NAMES = ("style", "tercile", "position", "time", "feature:NAME", "label:NAME")
TERCILES = ("briefest reference", "middle reference", "longest reference")
WINDOWS = 4
SAMPLE = 16  # steps, spread over the run, from which a feature's thirds are cut
CELLS = 200  # groups at most, of several groupings crossed
VALUES = 24  # labels of a column that get a group of their own
OTHER = "(other)"
FLAG = ["no", "yes"]


@dataclass(frozen=True)
class Grouping:
    """`of(step)` gives [B] or [B, T] numbers of `labels`, -1 for none; `note` says how they were made, or why not."""

    name: str
    labels: tuple[str, ...]
    of: Callable[[StepTrace], Array]
    note: str = ""


def grouping_named(spec: str, run: Run, steps: Sequence[int], labels: Labels | None = None) -> Grouping:
    """The grouping that a user means by one of NAMES. Raises `InputError`."""
    kind, _, rest = spec.partition(":")
    simple: Mapping[str, Callable[[], Grouping]] = {
        "style": lambda: by_style(run),
        "tercile": lambda: by_tercile(run),
        "position": by_position,
        "time": lambda: by_time(steps),
    }
    if spec in simple:
        return simple[spec]()
    if kind == "feature" and rest:
        return by_feature(feature_named(rest), run, steps)
    if kind == "label" and rest:
        if labels is None:
            raise InputError(Problem(f"--by {spec}", "the run has no labels", "kedge label join RUN FILE"))
        return by_label(rest, labels)
    close = difflib.get_close_matches(kind, [name.partition(":")[0] for name in (*NAMES, "phrase")], n=1)
    remedy = f"did you mean {close[0]}?" if close else f"take one of {', '.join(NAMES)}, phrase"
    raise InputError(Problem(f"--by {spec}", "is not a way to group", remedy))


def everything() -> Grouping:
    """One group of all."""
    return Grouping("all", ("all",), lambda step: np.zeros(len(step), dtype=np.int64))


def by_style(run: Run) -> Grouping:
    """Concise, between, verbose: against the mean length of the reference's samples among the probes."""
    usual = reference_length(run)
    if usual is None:
        return _unknown("style", "no probe holds a sample of the reference, whose mean length divides styles")
    note = f"concise: up to {usual:.1f} tokens, the reference's mean; verbose: more than {VERBOSE_RATIO * usual:.1f}"
    return Grouping("style", STYLES, lambda step: styles(step.lengths, usual), note)


def by_position() -> Grouping:
    """Buckets of the policy's tokens, counted from 1; holes are not counted."""

    def of(step: StepTrace) -> Array:
        place = np.maximum(np.cumsum(step.response_mask, axis=1) - 1, 0)
        return np.asarray(np.searchsorted(POSITIONS, place, side="right") - 1)

    return Grouping("position", tuple(f"token {name}" for name in position_names()), of)


def by_time(steps: Sequence[int], windows: int = WINDOWS) -> Grouping:
    """Stretches of the run with about the same number of steps each."""
    spans = [span for span in np.array_split(np.array(steps), min(windows, len(steps))) if len(span)]
    firsts = np.array([span[0] for span in spans])
    labels = tuple(f"steps {span[0]}–{span[-1]}" for span in spans)

    def of(step: StepTrace) -> Array:
        return np.full(len(step), int(np.searchsorted(firsts, step.step, side="right")) - 1)

    return Grouping("time", labels, of)


def by_tercile(run: Run) -> Grouping:
    """Thirds of the prompts by the reference's mean length, where probes or evaluation samples know the prompt."""
    known: dict[str, int] = {}
    for table in (run.probes(), run.samples()):
        prompts, terciles = table.column("prompt").to_pylist(), table.column("tercile").to_pylist()
        known |= {text_key(p): int(t) for p, t in zip(prompts, terciles, strict=True) if p is not None}
    if not known:
        return _unknown("tercile", "no probe or evaluation sample holds a prompt's text with the reference's length")

    def of(step: StepTrace) -> Array:
        return np.array([-1 if p is None else known.get(text_key(p), -1) for p in step.prompts], dtype=np.int64)

    note = f"of the reference's mean length on {len(known)} prompts of probes and evaluations; other prompts have none"
    return Grouping("tercile", TERCILES, of, note)


def by_feature(feature: Feature, run: Run, steps: Sequence[int]) -> Grouping:
    """Values of their own where a feature has two or three, else none and some, or thirds."""
    values = _sampled(feature, run, steps)
    if not len(values):
        return _unknown(f"feature:{feature.name}", "the trace keeps no text to see it in")
    labels, cut = _cuts(values)
    name = feature.name

    def of(step: StepTrace) -> Array:
        found = feature.of(step)
        return np.where(np.isfinite(found), cut(np.nan_to_num(found)), -1)

    note = "" if labels == FLAG else f"{feature.unit}, cut by its values on {min(SAMPLE, len(steps))} steps"
    return Grouping(f"feature:{name}", tuple(f"{name} {label}" for label in labels), of, note)


def by_label(column: str, labels: Labels) -> Grouping:
    """The values of a label; numbers of many values are cut as a feature is."""
    values = list(labels.known(column).values())
    numbers = [value for value in values if isinstance(value, float)]
    where, shown = f"label:{column}", column.rpartition(".")[2]
    if len(numbers) == len(values) and len(set(numbers)) > VALUES:
        names, cut = _cuts(np.array(numbers, dtype=np.float64))

        def of_number(step: StepTrace) -> Array:
            found = labels.numbers(step, column)
            return np.where(np.isfinite(found), cut(np.nan_to_num(found)), -1)

        return Grouping(where, tuple(f"{shown} {name}" for name in names), of_number)
    counts: dict[str, int] = {}
    for value in values:
        counts[_word(value)] = counts.get(_word(value), 0) + 1
    kept = sorted(sorted(counts, key=lambda value: -counts[value])[:VALUES])
    names = [*kept, OTHER] if len(counts) > VALUES else kept
    number = {value: index for index, value in enumerate(kept)}

    def of(step: StepTrace) -> Array:
        found = labels.of(step, column)
        return np.array([-1 if one is None else number.get(_word(one), len(kept)) for one in found], dtype=np.int64)

    return Grouping(where, tuple(f"{shown} {name}" for name in names), of)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def crossed(groupings: Sequence[Grouping]) -> Grouping:
    """Every combination of groups; a token that is in no group of one of them is in none."""
    if not groupings:
        return everything()
    if len(groupings) == 1:
        return groupings[0]
    cells = int(np.prod([len(one.labels) for one in groupings]))
    if cells > CELLS:
        where = " ".join(f"--by {one.name}" for one in groupings)
        raise InputError(
            Problem(where, f"makes {cells} groups, more than {CELLS}", "cut the run in fewer ways at once")
        )
    labels = [""]
    for one in groupings:
        labels = [f"{before}, {label}".removeprefix(", ") for before in labels for label in one.labels]

    def of(step: StepTrace) -> Array:
        cell, none = np.zeros(step.response_mask.shape, dtype=np.int64), np.zeros(step.response_mask.shape, dtype=bool)
        for one in groupings:
            number = one.of(step)
            number = number[:, None] if number.ndim == 1 else number
            cell, none = cell * len(one.labels) + number, none | (number < 0)
        return np.where(none, -1, cell)

    notes = "; ".join(one.note for one in groupings if one.note)
    return Grouping(" × ".join(one.name for one in groupings), tuple(labels), of, notes)


def _unknown(name: str, why: str) -> Grouping:
    return Grouping(name, (), lambda step: np.full(len(step), -1), f"not known: {why}")


def _sampled(feature: Feature, run: Run, steps: Sequence[int]) -> Array:
    """Known values of a feature on up to SAMPLE steps spread over the run."""
    places = np.linspace(0, len(steps) - 1, min(SAMPLE, len(steps))).round().astype(int)
    found = [feature.of(run.step(steps[index])) for index in np.unique(places)]
    values = np.concatenate(found) if found else np.zeros(0)
    return np.asarray(values[np.isfinite(values)])


def _cuts(values: Array) -> tuple[list[str], Callable[[Array], Array]]:
    """Names of groups of a number, and what turns [B] finite numbers into the groups' numbers."""
    distinct = np.unique(values)
    if len(distinct) == 2 and set(distinct.tolist()) == {0.0, 1.0}:
        return FLAG, lambda given: (given > 0.5).astype(np.int64)
    low, high = np.quantile(values, [1 / 3, 2 / 3], method="lower")
    if low == distinct[0] or low == high:
        edge = distinct[0]
        return [f"{edge:g}", f"above {edge:g}"], lambda given: (given > edge).astype(np.int64)
    names = [f"up to {low:g}", f"to {high:g}", f"above {high:g}"]
    return names, lambda given: np.searchsorted([low, high], given, side="left").astype(np.int64)
