"""What the stages train on: prompts, demonstrations, judgments of four kinds, and the report of reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kedge.errors import Problem

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is usually system, user, assistant or tool."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt and who preferred which.

    `strength` is the share of votes for `chosen`, in [0, 1]: 1 is unanimous, 0.5 a tie; `votes` are those for chosen,
    for rejected and for neither, where they were counted. `margin` says how much better, in the annotators' own grades.
    `shown` is the place, 1 or 2, at which the annotator saw `chosen`; 0 where nobody knows.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    strength: float = 1.0
    margin: float | None = None
    votes: tuple[int, int, int] | None = None
    annotator: str | None = None
    shown: int = 0


@dataclass(frozen=True)
class Ranking:
    """Two or more responses to one prompt, best first; `ranks` starts at 0 and never falls, equal ranks are ties."""

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str | None = None


@dataclass(frozen=True)
class Rating:
    """One response and the number an annotator gave it; higher is better."""

    prompt: Prompt
    response: str
    rating: float
    annotator: str | None = None


@dataclass(frozen=True)
class Verdict:
    """One response, called good or bad."""

    prompt: Prompt
    response: str
    good: bool
    annotator: str | None = None


Judgment = Preference | Ranking | Rating | Verdict
"""What an annotator can say of responses; a file holds one kind."""


def graded(judgment: Judgment) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The judged responses, best first, and what was said of each; higher is better.

    Shares of votes for a pair, minus the rank for a ranking, the rating, 1 or 0 for a verdict.
    """
    match judgment:
        case Preference():
            return (judgment.chosen, judgment.rejected), (judgment.strength, 1 - judgment.strength)
        case Ranking():
            return judgment.responses, tuple(-float(rank) for rank in judgment.ranks)
        case Rating():
            return (judgment.response,), (judgment.rating,)
        case Verdict():
            return (judgment.response,), (float(judgment.good),)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The usable rows of a file beside the ones that were left out and why.

    `lines[i]` is the "file:line" of `rows[i]`. `total` counts all rows of the file, rejected ones included.
    """

    rows: tuple[T, ...]
    lines: tuple[str, ...]
    rejected: tuple[Problem, ...]
    total: int

    @classmethod
    def of(cls, rows: Iterable[T], origin: str) -> Loaded[T]:
        """Rows that were made here, not read; `origin` stands for the file."""
        kept = tuple(rows)
        return cls(kept, tuple(f"{origin}:{number}" for number in range(1, len(kept) + 1)), (), len(kept))

    def where(self, keep: Callable[[T], bool]) -> Loaded[T]:
        """The usable rows that `keep` accepts, without the rejected ones."""
        pairs = [(row, line) for row, line in zip(self.rows, self.lines, strict=True) if keep(row)]
        return Loaded(tuple(row for row, _ in pairs), tuple(line for _, line in pairs), (), len(pairs))

    def map(self, change: Callable[[T], U]) -> Loaded[U]:
        """The same lines with changed rows."""
        return Loaded(tuple(change(row) for row in self.rows), self.lines, self.rejected, self.total)


def prompt_text(prompt: Prompt) -> str:
    """The prompt as plain text, one "role: content" per message; what is hashed, held out and shown."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
