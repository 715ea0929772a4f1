"""Reading the rollouts that other trainers leave on disk, as `Rows` of the trace.

Each module with a `FORMAT` reads one format; nothing in a file is executed, and what a file does not tell is absent or
asked, never guessed. `kedge import` writes what a format reads with `kedge.trace.recorder.Recorder`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kedge.trace.foreign import Conventions, Rows

__all__ = ["Answers", "Format", "Intake", "LeftOut", "Question", "all_formats"]

Answers = Mapping[str, str]  # complete when a reader gets it: every question of the format has a value
Watch = Callable[[int, int], None]  # called with files done and files in all; raises to stop


def _nothing_told(path: Path) -> Answers:  # noqa: ARG001 (the shape of Format.told)
    return {}


def _has_tokens(path: Path) -> bool:  # noqa: ARG001 (the shape of Format.text_only)
    return False


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a file cannot tell.

    `choices` maps each possible answer to what it means; without choices the answer is a number or names of columns.
    """

    key: str
    text: str
    why: str  # what the answer changes
    choices: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["choice", "number", "columns"] = "choice"
    default: str | None = None  # what --yes takes
    only_if: tuple[str, tuple[str, ...]] | None = None  # asked only where that key has one of these answers
    unless: tuple[str, tuple[str, ...]] | None = None  # not asked where that key has one of these answers


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of rollout file or folder."""

    name: str  # "trl-grpo"
    title: str
    recognises: Callable[[Path], bool]  # cheap: looks at names and the first record only; never raises
    expected: str  # one line: which files and fields
    asks: tuple[Question, ...]
    read: Callable[[Path, Answers, Intake], Iterator[Rows]]  # one step in memory at a time where the format allows
    conventions: Callable[[Path, Answers], Conventions]
    fields: tuple[str, ...] = ()  # of a record, without which it is not this format; tells what came near
    told: Callable[[Path], Answers] = _nothing_told  # answers that the files themselves hold, and nobody is asked
    text_only: Callable[[Path], bool] = _has_tokens  # text alone: positions are words, or tokens of a given tokenizer


@dataclass
class LeftOut:
    """Rows left out for one reason."""

    rows: int
    first: str  # file:line of the first


@dataclass
class Intake:
    """What a reader is given besides the file, and where it says what it met."""

    tokenise: Callable[[str], list[int]] | None = None  # for files of text alone; None: positions are words
    watch: Watch | None = None
    rows: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def files(self, paths: list[Path]) -> Iterator[Path]:
        """The files in turn, showing how many are done; the user's wish to stop is heard between them."""
        for number, path in enumerate(paths):
            yield path
            if self.watch is not None and len(paths) > 1:  # of one file, rows are shown
                self.watch(number + 1, len(paths))

    def leave_out(self, where: str, reason: str) -> None:
        """Count a row that is not written. `where` is file:line; `reason` holds nothing of the row's text."""
        known = self.left_out.setdefault(reason, LeftOut(0, where))
        known.rows += 1

    def note(self, text: str) -> None:
        """Say something about the files, once."""
        if text not in self.notes:
            self.notes.append(text)


@cache
def all_formats() -> tuple[Format, ...]:
    """Every format, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    found: list[Format] = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return tuple(sorted(found, key=lambda one: one.name))
