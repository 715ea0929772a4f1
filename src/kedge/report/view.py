"""Everything a report shows of one run, gathered once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kedge.diagnose.correction import Proposal, propose
from kedge.diagnose.health import Mark, marks
from kedge.diagnose.ledger import Ledger, ledger
from kedge.diagnose.margin import TERCILES, Margin, margins
from kedge.report.truth import read_truth
from kedge.trace.reader import Run, Series, read_run

BUILT_IN = ("score", "kl", "length", "missing_eos")  # channels; what else a run has are rules


@dataclass(frozen=True)
class View:
    """One run, read and diagnosed. What the run does not hold is empty or None and named in `missing`."""

    run: Run
    policy: Mapping[str, Series]
    evaluation: Mapping[str, Series]
    truth: Mapping[str, Series]
    margins: tuple[Margin, ...]
    tercile_margins: tuple[tuple[Margin, ...], ...]
    ledger: Ledger | None
    proposal: Proposal
    marks: tuple[Mark, ...]
    missing: tuple[str, ...]

    def first(self, name: str) -> float | None:
        """First value of an evaluation or truth metric."""
        found = self._series(name)
        return None if found is None else float(found.values[0])

    def last(self, name: str) -> float | None:
        """Last value of an evaluation or truth metric."""
        found = self._series(name)
        return None if found is None else float(found.values[-1])

    def at(self, name: str, step: int) -> float | None:
        """Value of an evaluation or truth metric after `step` updates."""
        found = self._series(name)
        if found is None or step not in found.steps:
            return None
        return float(found.values[np.flatnonzero(found.steps == step)[-1]])

    @property
    def best_gold(self) -> int | None:
        """Updates after which gold was highest, or None where nobody knows gold."""
        gold = self.truth.get("gold")
        if gold is None or not np.isfinite(gold.values).any():
            return None
        return int(gold.steps[np.nanargmax(gold.values)])

    @property
    def best_of(self) -> int | None:
        """How many answers the best was kept of, where nothing was trained; else None."""
        return _best_of(self.run)

    @property
    def updates(self) -> int:
        """Policy updates so far."""
        steps = [int(found.steps[-1]) + 1 for found in self.policy.values()]
        return max(steps, default=0)

    def _series(self, name: str) -> Series | None:
        return self.evaluation.get(name) or self.truth.get(name)


def read_view(path: Path) -> View:
    """The run at `path` with its diagnosis. Raises InputError when it is not a run or its trace is damaged."""
    run = read_run(path)
    policy, evaluation, truth = run.metrics("policy"), run.metrics("evaluation"), read_truth(run)
    account = ledger(run)
    return View(
        run=run,
        policy=policy,
        evaluation=evaluation,
        truth=truth,
        margins=margins(run),
        tercile_margins=tuple(margins(run, tercile) for tercile in TERCILES),
        ledger=account,
        proposal=propose(run),
        marks=marks(run),
        missing=tuple(_missing(run, policy, evaluation, truth, account)),
    )


def _missing(
    run: Run,
    policy: Mapping[str, Series],
    evaluation: Mapping[str, Series],
    truth: Mapping[str, Series],
    account: Ledger | None,
) -> list[str]:
    status = run.manifest.get("status")
    found = [f"The run is {status}: this shows what is on disk so far."] if status != "finished" else []
    if (count := _best_of(run)) is not None:
        what = f"the last evaluation is of the best of {count} answers of the supervised policy"
        found.append(f"Nothing was trained: {what}, and its KL is an estimate.")
    elif not policy:
        found.append("The policy stage has not begun.")
    if not evaluation:
        found.append("No evaluation is on disk, so there are no curves on fixed prompts.")
    if not truth:
        found.append("Nobody knows the gold utility of this run's answers, so the report shows none.")
    if not run.probe_steps():
        found.append("No probe answers are on disk, so there is no matched margin and no verdict.")
    if rules := [str(name) for name in run.manifest.get("channels", ()) if name not in BUILT_IN]:
        found.append(f"Probes are not put to the rules: matched margin and verdict leave out {', '.join(rules)}.")
    if account is None:
        pairs = "direct/chosen" in policy  # and yet no answers of the policy's own
        why = "The policy learnt from judged pairs" if pairs else "No rows of policy steps are on disk"
        found.append(f"{why}, so there is no ledger.")
    if not run.sample_steps():
        found.append("No evaluation samples are on disk.")
    return found


def _best_of(run: Run) -> int | None:
    policy = run.settings.get("policy", {})
    return int(policy["samples_per_prompt"]) if policy.get("method") == "best_of_n" else None
