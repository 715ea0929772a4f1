"""The recipe's guard: checks that look at the trace after a policy step, and what follows when one of them fails.

What it decides is a function of the recipe and of what is on disk; what it has done is part of the checkpoint. A run
that was killed therefore decides the same again. A return to an earlier checkpoint is first written down, then carried
out: a kill in between leaves a note, and whoever takes up the run ends what it says.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kedge.diagnose.checks import check_named
from kedge.diagnose.diagnosis import rank
from kedge.diagnose.finding import Finding
from kedge.diagnose.view import View, view_of
from kedge.pipeline.context import Context
from kedge.recipe.sections import Guard
from kedge.trace.jsonl import append_json, read_json_lines, write_atomically
from kedge.trace.reader import read_run
from kedge.trace.run_dir import RunDir
from kedge.train import checkpoint
from kedge.train.checkpoint import State, Watched
from kedge.train.controller import Controllers

NOTE = "rollback.json"  # in the run's folder, while a return is under way
KEEP_ALL = 10**9  # checkpoints


@dataclass(frozen=True)
class Ruling:
    """What follows from a look: the state to go on from, and whether the loop must be entered again to do so."""

    state: State
    enter_again: bool = False
    returned: bool = False  # the folder is that of an earlier step; the learner is not yet


class LiveGuard:
    """The checks that a recipe names, put to the run as it grows."""

    def __init__(self, context: Context) -> None:
        self.settings: Guard = context.recipe.guard
        self._context = context
        self._checks = [check_named(name) for name in self.settings.checks]
        self._view: View | None = None
        for check in self._checks:
            if not check.validated:
                context.event("policy", 0, "guard", f"guard: the check {check.name} has not been validated")

    @property
    def keep(self) -> int:
        """Checkpoints to keep while the stage goes on: all, where the guard may go back to any of them."""
        return KEEP_ALL if self.settings.action == "roll_back" else self._context.recipe.checkpoint.keep

    def look(self, state: State) -> Ruling:
        """After a policy step whose metrics and rows are on disk: judge it, act, and say how to go on."""
        if state.step % self.settings.every:
            return Ruling(state)
        watched, alarm = judged(self.settings, state.guard, self._findings())
        if alarm is None:
            return Ruling(replace(state, guard=watched))
        found = f"guard: {alarm.check} failed at {self.settings.patience} looks in a row. {alarm.summary}"
        if self.settings.action == "warn" or watched.acted >= self.settings.actions:
            self._say(state, "warn", found)
            return Ruling(replace(state, guard=watched))
        watched = replace(watched, acted=watched.acted + 1)
        if self.settings.action == "raise_beta":
            return self._raised(replace(state, guard=watched), found)
        if self.settings.action == "stop":
            self._say(state, "stop", f"{found} The stage ends here.")
            return Ruling(replace(state, guard=replace(watched, stopped=found)))
        return self._returned(replace(state, guard=watched), alarm, found)

    def _findings(self) -> list[Finding]:
        reducers = [check.reduce for check in self._checks if check.reduce is not None]
        self._view = view_of(read_run(self._context.run.path), reducers, after=self._view)
        return [check(self._view) for check in self._checks]

    def _raised(self, state: State, found: str) -> Ruling:
        controller = state.controller.times(self.settings.beta_factor)
        beta = f"Beta goes from {state.controller.mean_beta:.3g} to {controller.mean_beta:.3g} reward per nat."
        self._say(state, "raise_beta", f"{found} {beta}")
        return Ruling(replace(state, controller=controller), enter_again=True)

    def _returned(self, state: State, alarm: Finding, found: str) -> Ruling:
        looks = self.settings.patience * self.settings.every
        onset = max(0, state.step - looks) if alarm.onset is None else alarm.onset
        to = healthy_checkpoint(self._context.run, onset, self._context.recipe.checkpoint.every)
        if to is None:
            self._say(state, "warn", f"{found} There is no checkpoint to go back to.")
            return Ruling(state)
        watched = replace(state.guard, branch=state.guard.branch + 1)
        record = json.loads((self._context.run.checkpoint(to) / "state.json").read_text(encoding="utf-8"))
        before = Controllers.from_record(record["controller"])
        after = before.times(self.settings.beta_factor)
        self._say(
            state,
            "roll_back",
            f"{found} Back to the checkpoint of step {to}, before its onset at step {onset}: branch {watched.branch} "
            f"draws other prompts and responses, and beta goes from {before.mean_beta:.3g} to {after.mean_beta:.3g}.",
        )
        note = {
            "left": state.guard.branch,
            "at": state.step,
            "to": to,
            "onset": onset,
            "check": alarm.check,
            "summary": alarm.summary,
            "controller": after.record(),
            "guard": asdict(watched),
        }
        write_atomically(self._context.run.path / NOTE, _json(note))
        finish_return(self._context.run)
        self._view = None
        return Ruling(replace(state, guard=watched), enter_again=True, returned=True)

    def _say(self, state: State, action: str, message: str) -> None:
        self._context.event("policy", state.step, f"guard_{action}", message)


def judged(settings: Guard, watched: Watched, findings: Iterable[Finding]) -> tuple[Watched, Finding | None]:
    """The count of alarms after a look, and the finding that has now failed often enough; the count then starts anew.

    Of several the one that ranks first.
    """
    failed = [finding for finding in rank(findings) if finding.status == "fail"]
    alarms = {finding.check: watched.alarms.get(finding.check, 0) + 1 for finding in failed}
    alarm = next((finding for finding in failed if alarms[finding.check] >= settings.patience), None)
    return replace(watched, alarms={} if alarm is not None else alarms), alarm


def healthy_checkpoint(run: RunDir, onset: int, every: int) -> int | None:
    """The newest checkpoint before policy step `onset`, else the oldest there is; None without any.

    Those that an interruption left beside the regular ones do not count: a run without it has none of them.
    """
    found = checkpoint.steps(run.checkpoints)
    regular = [step for step in found if step % every == 0] or found
    return max((step for step in regular if step < onset), default=min(regular, default=None))


def finish_return(run: RunDir) -> None:
    """Carry out what a note about a return says, or what is left of it: the folder is then one to resume from.

    What is undone is kept under `branches/`, by the number of the branch that is left.
    """
    path = run.path / NOTE
    if not path.exists():
        return
    note = json.loads(path.read_text(encoding="utf-8"))
    kept = run.path / "branches" / f"{note['left']:03d}"
    if not kept.exists():
        _set_aside(run, note, kept)
    checkpoint.rewrite(run.checkpoint(note["to"]), controller=note["controller"], guard=note["guard"])
    for step in checkpoint.steps(run.checkpoints):
        if step > note["to"]:
            shutil.rmtree(run.checkpoint(step))
    run.update_manifest(branch=note["guard"]["branch"])
    path.unlink()


def _set_aside(run: RunDir, note: Mapping[str, Any], kept: Path) -> None:
    """Metrics lines and trace files of the steps to be undone, complete or not there."""
    partial = kept.with_name(f".{kept.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "trace").mkdir(parents=True)
    to = int(note["to"])
    for line in read_json_lines(run.metrics):
        if (line.get("stage") == "policy" and line["step"] >= to) or (
            line.get("stage") == "evaluation" and line["step"] > to
        ):
            append_json(partial / "metrics.jsonl", line)
    for kind, first in (("step", to), ("probes", to + 1), ("samples", to + 1)):
        for step, path in run.files(kind):
            if step >= first:
                _link(path, partial / "trace" / path.name)
    about = {name: value for name, value in note.items() if name not in ("controller", "guard")}
    write_atomically(partial / "branch.json", _json(about))
    partial.replace(kept)


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a disk without links
        shutil.copy(source, place)


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
