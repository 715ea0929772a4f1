"""What a check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from kedge.diagnose.finding import Finding
from kedge.diagnose.view import Reducer, View


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

    `mechanisms` are numbers of `kedge.diagnose.mechanisms`. `validated` is false until faults and healthy runs that
    were not seen while it was written have tried it; such a check never ranks first.
    """

    name: str
    title: str  # in a few words, for people
    kind: Kind
    mechanisms: tuple[str, ...]
    judge: Callable[[View], Finding]
    reduce: Reducer | None = None
    validated: bool = False

    def __call__(self, view: View) -> Finding:
        """What the check finds; it carries whether the check has been validated."""
        return replace(self.judge(view), validated=self.validated)
