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

USUAL = ("score", "win_rate", "length", "kl", "net_margin")
SHOWN = 7
MANY = "Intervals are 95% each: of twenty figures that nothing moved, one is expected to exclude 0."


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

    @property
    def forks(self) -> int:
        """Steps that forks with the change went, over all seeds: how much the trial can know."""
        return self.seeds * self.steps


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


def trial_of(changes: Sequence[str], trials: Sequence[Tried], in_force: Sequence[str] = ()) -> Tried | None:
    """The trial of exactly these changes with the most forks, if there is one; what is in force is no change."""
    wanted = set(changes) - set(in_force)
    same = [one for one in trials if set(one.changes) - set(in_force) == wanted]
    return max(same, key=lambda one: (one.forks, one.step), default=None)


def conclusions(tried: Tried, subject: str = "") -> tuple[str, ...]:
    """What was tried, and a line a figure: the finding's subject first, the usual ones, what else was caused."""
    said = f"Tried: {tried.steps} steps from step {tried.step}, {_pairs(tried.seeds)}, changed against unchanged."
    rows = [one for one in tried.effects if one.figure == subject]
    rows += [one for one in tried.effects if one.figure in USUAL and one not in rows]
    rows += [one for one in tried.effects if one.caused and not one.truth and one not in rows]
    rows = [*rows[:SHOWN], *(one for one in tried.effects if one.truth)]
    if not any(one.caused for one in rows):
        said += " No figure is shown to have moved."
    return (said, *(effect_line(one) for one in rows))


def effect_line(one: Effect) -> str:
    """A figure without and with the change, the difference with its interval, and whether the change caused it."""
    mark = " (known to the built-in world alone)" if one.truth else ""
    span, over = (one.over_seeds, "seeds") if one.over_seeds else (one.over_prompts, "prompts")
    interval = "" if span is None else f" [95% {span[0]:+.2g} to {span[1]:+.2g} over {over}]"
    caused = ": caused" if one.caused else ""
    name = one.figure.replace("_", " ")
    return f"{name}{mark} {one.null:.3g} to {one.changed:.3g}, {one.difference:+.2g}{interval}{caused}"


def trial_command(run: Path, arms: Sequence[Sequence[str]], onset: int | None) -> str | None:
    """The command that tries these changes from the last checkpoint before `onset`; None where there is none to try,
    or no checkpoint."""
    saved = [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/state.json")]
    before = [step for step in saved if onset is None or step <= onset]
    if not arms or not saved:
        return None
    step = max(before, default=0)
    listed = " ".join(f'--arm "{" ".join(arm)}"' for arm in arms)
    return f"kedge trial {run} --from {step} {listed}"


def _pairs(seeds: int) -> str:
    return "one pair of forks" if seeds == 1 else f"{seeds} pairs of forks"


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
