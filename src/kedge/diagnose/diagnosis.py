"""A run's findings put in order: the most likely cause first, each symptom under the causes that explain it.

Order says what to look at first, not how probable a cause is. Integrity comes before causes, because a number that is
not what it is taken for makes every other statistic say something else; causes come before what they lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedge.diagnose.account import account
from kedge.diagnose.checks import Check, all_checks, reducers, run_checks
from kedge.diagnose.checks.check import Kind
from kedge.diagnose.finding import Finding, Status, worst
from kedge.diagnose.labels import labelled
from kedge.diagnose.ledger import reference_length
from kedge.diagnose.view import Facts, Reducer, View, view_of
from kedge.errors import InputError, Problem
from kedge.trace.labels import read_labels
from kedge.trace.reader import Run, StepTrace
from kedge.trace.run_dir import RunDir

SHOWN = 5  # numbers of steps in a note
CLOSE = 0.8  # of the first cause's strength: what is as strong as that cannot be told apart from it
ALARMS: tuple[Status, ...] = ("fail", "warn")

_HACKED = ("exploit", "feature_reward", "length_reward", "heavy_tail", "reward_unit")
_LOOSE = ("beta", "controller", "kl_estimator", "reference", "sampler", "length_normalised")
EXPLAINS: Mapping[str, tuple[str, ...]] = {
    "runaway_length": (
        *("length_reward", "token_constant", "discount", "ending", "brief_prompts", "prompt_offset"),
        *("critic", "whitening", "reward_unit", "unscaled_reward", "exploit"),
        *_LOOSE,
    ),
    "mode_collapse": (
        "exploit",
        "feature_reward",
        "heavy_tail",
        "unscaled_reward",
        "step_size",
        "reward_unit",
        *_LOOSE,
    ),
    "refusals": ("feature_reward", "exploit", "heavy_tail", *_LOOSE),
    "overconfidence": ("feature_reward", "exploit", *_LOOSE),
    "capability": ("step_size", "unscaled_reward", "entropy_bonus", "wasted_kl", *_HACKED, *_LOOSE),
    "reward_hacking": (*_HACKED, *_LOOSE),
    "human_gap": _HACKED,
}
"""Which causes explain a symptom. A cause that is not named here stands beside it."""


@dataclass(frozen=True)
class Diagnosis:
    """What all checks found in one run."""

    run: str
    steps: tuple[int, int] | None  # first and last policy step looked at
    findings: tuple[Finding, ...]  # most likely cause first, not_checked last
    likely: tuple[str, ...]  # checks that name the cause; several that cannot be told apart; empty where none does
    explained: Mapping[str, tuple[str, ...]]  # symptom -> causes found that explain it
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst status of all."""
        return worst(self.findings)

    @property
    def failed(self) -> bool:
        """Whether any check fails."""
        return self.status == "fail"

    def of(self, *statuses: Status) -> tuple[Finding, ...]:
        """The findings of these statuses, in order."""
        return tuple(finding for finding in self.findings if finding.status in statuses)

    def alone(self) -> tuple[Finding, ...]:
        """Alarms that no other alarm explains."""
        return tuple(finding for finding in self.of(*ALARMS) if not self.explained.get(finding.check))

    def symptoms_of(self, cause: str) -> tuple[Finding, ...]:
        """The symptoms that a cause explains."""
        return tuple(one for one in self.of(*ALARMS) if cause in self.explained.get(one.check, ()))

    @property
    def first_alarm(self) -> Finding | None:
        """The alarm that would have spoken first, of those that know when."""
        known = [one for one in self.of(*ALARMS) if one.onset is not None]
        return min(known, key=lambda one: (one.onset, not one.validated), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "status": self.status,
            "steps": None if self.steps is None else list(self.steps),
            "likely": list(self.likely),
            "findings": [
                finding.to_dict()
                | _about(finding.check)
                | {"explained_by": list(self.explained.get(finding.check, ()))}
                for finding in self.findings
            ],
            "notes": list(self.notes),
        }


def diagnose(view: View, names: frozenset[str] | None = None) -> Diagnosis:
    """All checks, or those named, put to a view, and their findings in order."""
    findings = rank(run_checks(view, names))
    steps = view.steps
    return Diagnosis(
        run=view.name,
        steps=(int(steps[0]), int(steps[-1])) if len(steps) else None,
        findings=findings,
        likely=likely(findings),
        explained=explained(findings),
    )


def rank(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings, the most likely cause first; what could not be checked comes last."""
    return tuple(sorted(findings, key=_place))


def _place(finding: Finding) -> tuple[object, ...]:
    """What has been validated before what has not, worse before better, integrity before causes before symptoms, then
    the strongest."""
    return (
        finding.status == "not_checked",
        not finding.validated,
        ("fail", "warn", "ok", "not_checked").index(finding.status),
        _kind(finding.check).value,
        -finding.strength,
        finding.check,
    )


def likely(ranked: Sequence[Finding]) -> tuple[str, ...]:
    """The first alarm that names a cause, with those of its status and kind that are about as strong."""
    causes = [
        one
        for one in ranked
        if one.status in ALARMS and one.validated and _kind(one.check) in (Kind.INTEGRITY, Kind.CAUSE)
    ]
    if not causes:
        return ()
    first = causes[0]
    return tuple(
        one.check
        for one in causes
        if one.status == first.status
        and _kind(one.check) == _kind(first.check)
        and one.strength >= CLOSE * first.strength
    )


def explained(findings: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
    """For each symptom found, the causes found that explain it, in the order of `findings`."""
    alarms = [one.check for one in findings if one.status in ALARMS]
    causes = {name: tuple(one for one in alarms if one in EXPLAINS.get(name, ())) for name in alarms}
    return {name: found for name, found in causes.items() if found}


def read_view(
    path: Path, names: frozenset[str] | None = None, *, watch: Callable[[int, int], None] | None = None
) -> tuple[View, tuple[str, ...]]:
    """The view of the run in folder `path` for all checks, or those named, and notes on what was left out.

    Works on a run under way: a last file that is not complete yet is left out. `watch(done, all)` is called after each
    step. Raises `InputError` where the folder is no run or an earlier file is damaged.
    """
    folder = _Growing(path)
    run = Run(folder, folder.read_manifest())
    wanted = list(reducers()) if names is None else [one.reduce for one in _named(names) if one.reduce is not None]
    total, done = len(run.steps()), 0

    def count(step: StepTrace) -> Facts:  # noqa: ARG001 - a reducer without facts
        nonlocal done
        done += 1
        if watch is not None:
            watch(done, total)
        return {}

    labels = read_labels(run)
    said = [] if labels is None else [labelled(labels)]
    counted: list[Reducer] = [*wanted, *said, account(reference_length(run)), count]
    view = view_of(run, counted)
    return view, (*folder.notes, *_holes(run))


def _holes(run: Run) -> Iterator[str]:
    """What a run under way or pruned by `trace.keep` never lacks: steps in between, and metrics of its last steps."""
    steps = run.steps()
    if not steps:
        return
    lost = sorted(set(range(steps[0], steps[-1] + 1)) - set(steps))
    if lost:
        yield f"trace/ lacks policy steps {', '.join(map(str, lost[:SHOWN]))}{' ...' if len(lost) > SHOWN else ''}."
    told = run.metrics("policy").get("length/mean")
    last = -1 if told is None else int(told.steps[-1])
    if last < steps[-1] - 1:  # a step's rows may be there a moment before its metrics
        yield f"metrics.jsonl ends at policy step {last}, trace/ at {steps[-1]}: the later metrics are missing."


def with_notes(found: Diagnosis, notes: tuple[str, ...]) -> Diagnosis:
    """The diagnosis with what its reader should know about the run's files."""
    return replace(found, notes=notes)


def _named(names: frozenset[str]) -> list[Check]:
    return [check for check in all_checks() if check.name in names]


class _Growing(RunDir):
    """A run's folder whose last file of each kind is left out while it cannot be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._torn: dict[Path, str] = {}
        for kind in ("step", "probes", "samples"):
            files = super().files(kind)
            if files and not _readable(files[-1][1]):
                name = files[-1][1].name
                self._torn[files[-1][1]] = f"trace/{name} cannot be read (yet) and is left out."

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out."""
        return tuple(self._torn.values())

    def files(self, kind: str) -> list[tuple[int, Path]]:
        """Trace files of `kind` with their step; the torn one is none of them."""
        return [(step, path) for step, path in super().files(kind) if path not in self._torn]


def _readable(path: Path) -> bool:
    """Whether the file has a Parquet footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return False
    return True


def _kind(name: str) -> Kind:
    return next((check.kind for check in all_checks() if check.name == name), Kind.CAUSE)


def _about(name: str) -> dict[str, Any]:
    check = next((one for one in all_checks() if one.name == name), None)
    if check is None:
        return {}
    return {"title": check.title, "kind": check.kind.name.lower(), "mechanisms": list(check.mechanisms)}


def require_checks(names: Iterable[str]) -> frozenset[str]:
    """The names, each of a check; raises `InputError` for others."""
    import difflib

    known = [check.name for check in all_checks()]
    problems = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "kedge checks lists them"
            problems.append(Problem(f"check {name}", "there is no such check", remedy))
    if problems:
        raise InputError(problems)
    return frozenset(names)
