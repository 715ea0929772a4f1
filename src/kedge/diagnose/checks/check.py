"""What a check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from kedge.diagnose.finding import Finding, not_checked
from kedge.diagnose.needs import in_words, missing
from kedge.diagnose.view import Facts, Reducer, View
from kedge.trace.reader import StepTrace


class Kind(Enum):
    """What a finding says of the run, in the order in which causes are ruled out.

    INTEGRITY: a number is not what it is taken for (units, estimators, masks, who sampled). CAUSE: something pushes the
    policy. SYMPTOM: what has become of the policy, whatever pushed it. BENIGN: a change that is no fault.
    """

    INTEGRITY = 0
    CAUSE = 1
    SYMPTOM = 2
    BENIGN = 3


@dataclass(frozen=True)
class Check:
    """A check: `judge` turns a view into a finding, from the facts that `reduce` takes from every step.

    Where a trace lacks what the check `needs`, it says so and is not asked. `mechanisms` are numbers of
    `kedge.diagnose.mechanisms`. `validated` is false until faults and healthy runs that
    were not seen while it was written have tried it; such a check never ranks first.
    """

    name: str
    title: str  # in a few words, for people
    kind: Kind
    mechanisms: tuple[str, ...]
    judge: Callable[[View], Finding]
    reduce: Reducer | None = None
    needs: tuple[str, ...] = ()  # sources of `kedge.diagnose.needs`; `a | b` where either will do
    validated: bool = False

    def __call__(self, view: View) -> Finding:
        """What the check finds; it carries whether the check has been validated."""
        lacking = missing(self.needs, view.absent)
        found = not_checked(self.name, f"the trace lacks {in_words(lacking)}") if lacking else self.judge(view)
        return replace(found, validated=self.validated)

    def facts(self, step: StepTrace) -> Facts:
        """What `reduce` takes from a step; nothing where the step lacks what the check needs."""
        return {} if self.reduce is None or missing(self.needs, step.absent) else self.reduce(step)
