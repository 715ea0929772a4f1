"""Trials of a run: what changed settings did in short forks, against forks in which nothing was changed.

Only a trial says that a change caused something; everything else in a diagnosis accounts for what was logged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.errors import InputError, Problem


@dataclass(frozen=True)
class Effect:
    """What a change did to one figure: the mean difference over seeds and the intervals that were measured."""

    figure: str
    unit: str
    null: float
    changed: float
    difference: float
    over_seeds: tuple[float, float] | None
    over_prompts: tuple[float, float] | None
    caused: bool
    truth: bool  # known to the built-in world alone: shown, never judged by


@dataclass(frozen=True)
class Tried:
    """One change that was tried: where the forks left the run, how long and how many they were, what they found."""

    changes: tuple[str, ...]
    step: int
    steps: int
    seeds: int
    effects: tuple[Effect, ...]
    sentences: tuple[str, ...]


def read_trials(run: Path) -> tuple[Tried, ...]:
    """All trials in the folder of a run, the newest step first; raises `InputError` where a file is damaged."""
    found: list[Tried] = []
    for path in sorted((run / "trials").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found += _tried(record)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            remedy = "carry the trial out again, or remove the file"
            raise InputError(Problem(str(path), f"is no trial: {error}", remedy)) from None
    return tuple(sorted(found, key=lambda one: -one.step))


def trial_of(changes: Sequence[str], trials: Sequence[Tried]) -> Tried | None:
    """The trial of exactly these changes, if there is one."""
    return next((one for one in trials if set(one.changes) == set(changes)), None)


def _tried(record: Mapping[str, Any]) -> list[Tried]:
    return [
        Tried(
            changes=tuple(str(one) for one in arm["changes"]),
            step=int(record["from"]),
            steps=int(record["steps"]),
            seeds=int(record["seeds"]),
            effects=tuple(_effect(row) for row in arm["rows"]),
            sentences=tuple(str(one) for one in arm.get("sentences", ())),
        )
        for arm in record["arms"]
    ]


def _effect(row: Mapping[str, Any]) -> Effect:
    def interval(name: str) -> tuple[float, float] | None:
        found = row.get(name)
        return None if found is None else (float(found["low"]), float(found["high"]))

    return Effect(
        figure=str(row["figure"]),
        unit=str(row.get("unit", "")),
        null=float(row["null"]),
        changed=float(row["changed"]),
        difference=float(row["difference"]),
        over_seeds=interval("over_seeds"),
        over_prompts=interval("over_prompts"),
        caused=bool(row.get("caused", False)),
        truth=bool(row.get("truth", False)),
    )
