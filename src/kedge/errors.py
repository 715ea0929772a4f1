"""What goes wrong, said once: what, where, why, and what to do about it.

Exit codes: 0 done; 1 a bug in Kedge; 2 the input or the settings; 3 the training diverged; 4 a guard stopped it;
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    `where` is `file:line`, a recipe key or a path; `what` says what is wrong and what was expected;
    `remedy` says what to do.
    """

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.what}{remedy}"


class KedgeError(Exception):
    """Base of every error that Kedge raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class InputError(KedgeError):
    """The input or the settings cannot be used. Holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[tuple[Problem, ...]]]:
        """Between processes an exception travels as its arguments; these are the problems, not their text."""
        return type(self), (self.problems,)


class DivergenceError(KedgeError):
    """Training produced a number that is not finite; the last good checkpoint is kept."""

    exit_code = 3


class StoppedByGuard(KedgeError):
    """A guard that the recipe names ended the policy stage; what was trained until then is kept."""

    exit_code = 4

    def __init__(self, where: str, what: str) -> None:
        self.where, self.what = where, what
        self.problems = (Problem(where, what, "kedge diagnose says why; begin again with settings that differ"),)
        super().__init__(str(self.problems[0]))

    def __reduce__(self) -> tuple[type[StoppedByGuard], tuple[str, str]]:
        """Between processes an exception travels as its arguments."""
        return type(self), (self.where, self.what)


class Interrupted(KedgeError):
    """The user asked the run to stop; everything up to the last checkpoint is kept."""

    exit_code = 130

    def __init__(self, where: str, remedy: str = "run the same command with --resume to go on") -> None:
        self.problems = (Problem(where, "stopped on request", remedy),)
        super().__init__(str(self.problems[0]))
