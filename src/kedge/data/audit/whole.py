"""The whole audit of a file: one pass, then every question, then the findings and the JSON that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedge.data.audit import words
from kedge.data.audit.agreement import Agreement, agreement, label_counts
from kedge.data.audit.annotators import Annotator, Drift, annotators, drifts
from kedge.data.audit.cycles import Cycles, find_cycles
from kedge.data.audit.domain import DomainMix, domain_mix
from kedge.data.audit.duplicates import Duplicates, find_duplicates
from kedge.data.audit.findings import Finding, worst_first
from kedge.data.audit.format import MarkEffect, format_bias
from kedge.data.audit.gather import gather, stop_if_asked
from kedge.data.audit.leakage import Leakage, PromptUse, find_leakage, prompt_use
from kedge.data.audit.length import LabelLength, LengthBias, label_length, length_bias
from kedge.data.audit.noise import Noise, label_noise
from kedge.data.audit.position import PositionBias, position_bias
from kedge.data.audit.shift import Shift, find_shift, read_deployed
from kedge.data.audit.tables import Tables, outcome
from kedge.progress import Interrupt, Progress

QUESTIONS = 9
_UNKNOWN_LENGTH = dict.fromkeys(("longer_wins", "slope", "slope_ci", "length_only_accuracy"))


@dataclass(frozen=True)
class Audit:
    """Every answer about a file; None is what the file, or what was given beside it, cannot answer."""

    tables: Tables
    duplicates: Duplicates
    cycles: Cycles | None
    length: LengthBias | None
    label_length: LabelLength | None
    format: tuple[MarkEffect, ...]
    position: PositionBias | None
    agreement: tuple[Agreement, ...]
    noise: tuple[Noise, ...]
    annotators: tuple[Annotator, ...]
    drifts: tuple[Drift, ...]
    domains: tuple[DomainMix, ...]
    prompts: PromptUse
    leakage: Leakage | None
    shift: Shift | None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Worst first."""
        tables, rows, pairs = self.tables, len(self.tables.rows), self.tables.pairs
        if len(pairs) == 0:
            why = "Needs pairs or rankings; the rows are single responses."
        elif not outcome(pairs).any():
            why = "No pair has a winner."
        else:
            why = "Too few decided pairs differ."
        order = "No pair says at which place its winner was shown." if len(pairs) else why
        mixed = (bool(len(pairs)) and bool(len(tables.singles))) or {"ratings", "verdicts"} <= tables.kinds.keys()
        return worst_first(
            [
                *([words.mixed_kinds(tables)] if mixed else []),
                words.length_bias(self.length, self.label_length, why),
                words.position_bias(self.position, order),
                words.format_bias(self.format, why),
                words.domain(self.domains),
                words.label_noise(self.noise),
                words.agreement(self.agreement),
                words.annotators(self.annotators, len(tables.annotators)),
                words.drift(self.drifts),
                words.contradictory(self.duplicates),
                words.cycles(self.cycles, tuple(tables.kinds)),
                words.duplicates(self.duplicates, rows),
                words.near_duplicates(self.duplicates),
                words.identical(self.duplicates, len(pairs)),
                words.empty(self.duplicates, rows),
                words.rejected(tables),
                words.leakage(self.leakage, self.prompts),
                words.shift(self.shift),
            ]
        )


def audit(
    path: str | Path,
    *,
    evaluation: str | Path | None = None,
    against: str | Path | None = None,
    progress: Progress | None = None,
    interrupt: Interrupt | None = None,
) -> Audit:
    """Audit a file of judgments, beside the file that measures and the prompts one deploys on where they are given.

    Raises InputError where a file cannot be read or has no usable row. The same file gives the same figures.
    """
    progress = Progress(quiet=True) if progress is None else progress
    tables = gather(path, progress=progress, interrupt=interrupt)
    measured = gather(evaluation, progress=progress, interrupt=interrupt, name="evaluation") if evaluation else None
    deployed = read_deployed(against, progress=progress, interrupt=interrupt) if against else None
    counts = label_counts(tables)
    pairs, singles = tables.pairs, tables.singles
    kind = "verdict" if "verdicts" in tables.kinds else "rating"
    with progress.stage("checking", QUESTIONS) as stage:
        asked = 0

        def ask(question: Callable[[], Any]) -> Any:
            nonlocal asked
            stop_if_asked(interrupt, str(path))
            answer = question()
            stage.advance(asked)
            asked += 1
            return answer

        return Audit(
            tables=tables,
            duplicates=ask(lambda: find_duplicates(tables)),
            cycles=ask(lambda: find_cycles(pairs)),
            length=ask(lambda: length_bias(pairs)),
            label_length=label_length(singles, kind),
            format=ask(lambda: format_bias(pairs)),
            position=ask(lambda: position_bias(pairs)),
            agreement=tuple(agreement(found) for found in counts),
            noise=tuple(found for found in map(label_noise, counts) if found is not None),
            annotators=ask(lambda: annotators(tables)),
            drifts=ask(lambda: drifts(tables)),
            domains=ask(lambda: domain_mix(tables)),
            prompts=prompt_use(tables),
            leakage=find_leakage(tables, measured) if measured is not None else None,
            shift=ask(lambda: find_shift(tables.prompts, deployed) if deployed is not None else None),
        )


def as_json(found: Audit) -> dict[str, Any]:
    """Everything but texts, ready for JSON."""
    tables = found.tables
    return {
        "file": tables.path,
        "rows": tables.total,
        "rejected": tables.rejected_count,
        "kinds": tables.kinds,
        "pairs": len(tables.pairs),
        "ties": int((outcome(tables.pairs) == 0).sum()),
        "prompts": found.prompts.prompts,
        "duplicates": found.duplicates.duplicates,
        "identical": found.duplicates.identical,
        "identical_decided": found.duplicates.identical_decided,
        "empty": found.duplicates.empty,
        "repeated": found.duplicates.repeated,
        "contradictory": found.duplicates.contradictory,
        "near_duplicates": {
            name: asdict(near) | {"share": near.share}
            for name, near in (
                ("prompts", found.duplicates.near_prompts),
                ("responses", found.duplicates.near_responses),
            )
        },
        "cycles": None if found.cycles is None else asdict(found.cycles) | {"share": found.cycles.share},
        "length_bias": _UNKNOWN_LENGTH if found.length is None else _without(found.length, "wide"),
        "label_length": _without(found.label_length, "wide"),
        "format_bias": {effect.mark: asdict(effect) for effect in found.format},
        "position_bias": {"first_wins": None, "ci": None}
        if found.position is None
        else _without(found.position, "wide"),
        "agreement": {one.source: asdict(one) for one in found.agreement},
        "label_noise": {one.source: asdict(one) for one in found.noise},
        "annotators": [asdict(one) for one in found.annotators],
        "drift": [asdict(one) for one in found.drifts[:20]],
        "domains": {one.column: asdict(one) for one in found.domains},
        "leakage": None if found.leakage is None else asdict(found.leakage),
        "shift": None if found.shift is None else asdict(found.shift),
        "rankings_thinned": tables.thinned,
        "problems": [str(problem) for problem in tables.rejected],
        "findings": [asdict(finding) for finding in found.findings],
    }


def _without(answer: Any, *names: str) -> Mapping[str, Any] | None:
    """An answer's fields but those that only decide the status."""
    return None if answer is None else {key: value for key, value in asdict(answer).items() if key not in names}
