"""The generic schema: JSONL or Parquet, one row per response, for any trainer; described in docs/import.md.

Columns are named as `Rows` names its fields, and one row holds one response: a list where `Rows` has [B, T], a number
where it has [B]. A folder is read file by file, in order of names. `conventions.json` beside the files holds what they
cannot tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import (
    BETA,
    GAMMA,
    KL,
    KL_ESTIMATOR,
    KL_UNIT,
    LAM,
    NORMALISATION,
    SCORE_POSITION,
    conventions_from,
)
from kedge.importers.records import Array, finite, first_record, groups, records
from kedge.importers.texts import positions, text_of
from kedge.trace.foreign import Conventions, Rows, padded

SIDECAR = "conventions.json"
ASKS = (NORMALISATION, KL, KL_ESTIMATOR, KL_UNIT, BETA, SCORE_POSITION, GAMMA, LAM)

TOKEN_FLOATS = (
    "behaviour_logprob",
    "old_logprob",
    "reference_logprob",
    "new_logprob",
    "old_eos_logprob",
    "reference_eos_logprob",
    "entropy",
    "values",
)
LISTS = ("response_ids", "response_mask", "active", *TOKEN_FLOATS)  # each with one entry per response position
SINGLE = ("prompt", "response", "prompt_ids", "group", "ended", "advantage", "beta", "policy_version")
COLUMNS = {"step", "row", *LISTS, *SINGLE}

Row = Mapping[str, Any]


def recognises(path: Path) -> bool:
    """True where the first file has `step`, a score and something that says which positions a response has."""
    files = _files(path)
    record = first_record(files[0]) if files else None
    return record is not None and _fits(record)


def text_only(path: Path) -> bool:
    """True where no column has an entry per position."""
    record = first_record(_files(path)[0]) or {}
    return not (set(LISTS) & set(record) or any(isinstance(record[name], list) for name in _measured(record)))


def told(path: Path) -> Answers:
    """The answers in `conventions.json`, and the position of the score where it comes per token.

    Raises InputError where that file cannot be read or holds something else.
    """
    record = first_record(_files(path)[0]) or {}
    per_token = any(isinstance(record[name], list) for name in _channels(record).values())
    known = {key: _answer(value) for key, value in _sidecar(path).items() if key != "trainer"}
    return ({"score_position": "token"} if per_token else {}) | known


def conventions(path: Path, answers: Answers) -> Conventions:
    """What was answered; the trainer's name is that of `conventions.json`."""
    return conventions_from(answers, trainer=str(_sidecar(path).get("trainer", "generic")))


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:
    """One step after the other; steps have to rise from row to row and from file to file."""
    step: _Step | None = None
    columns: set[str] | None = None
    files = _files(path)
    _refuse_copies(files)
    for file in intake.files(files):
        for where, record in records(file, ("step",)):
            intake.rows += 1
            columns = _same_columns(where, record, columns, intake)
            number = _step_of(where, record)
            if step is not None and number < step.number:
                what = f"step {number} comes after step {step.number}"
                raise InputError(Problem(where, what, "sort the rows by step, and name files so that they sort"))
            if step is None or number > step.number:
                if step is not None and step.rows:
                    yield step.finished(answers, intake)
                step = _Step(number)
            step.add(where, record, intake)
    if step is not None and step.rows:
        yield step.finished(answers, intake)


@dataclass
class _Step:
    """The rows of one step, as far as they are read."""

    number: int
    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # 0: to be counted in the text
    seen: dict[int, str] = field(default_factory=dict)

    def add(self, where: str, record: Row, intake: Intake) -> None:
        """Take a row, or count why not. Raises InputError where the file is not what it says."""
        row = record.get("row")
        if row is not None:
            if not isinstance(row, int):
                raise InputError(Problem(where, "row is not a whole number", "number the rows of a step"))
            if row in self.seen:
                what = f"row {row} of step {self.number} is there already, at {self.seen[row]}"
                raise InputError(Problem(where, what, "remove the copy"))
            self.seen[row] = where
        length = _length(where, record)
        if length is None and text_of(record.get("response")) is None:
            intake.leave_out(where, "neither a list per position nor the text of the response")
        elif length == 0:
            intake.leave_out(where, "the response has no position")
        else:
            self.rows.append(record)
            self.places.append(where)
            self.lengths.append(length or 0)

    def finished(self, answers: Answers, intake: Intake) -> Rows:
        """The step as padded arrays."""
        has = self._columns()
        prompts, responses = (self._texts(name) if name in has else None for name in ("prompt", "response"))
        mask, ids = self._positions(has, responses, intake)
        names = _channels(has)
        single = {name: self._constant(name) for name in ("beta", "policy_version") if name in has}
        weighted = [label for label in names if f"weight.{label}" in has]
        version = single.get("policy_version")
        return Rows(
            step=self.number,
            response_mask=mask,
            scores={label: self._scores(name, answers) for label, name in names.items()},
            weights={label: self._constant(f"weight.{label}") for label in weighted},
            group=self._groups() if "group" in has else None,
            prompts=prompts,
            responses=responses,
            response_ids=ids,
            ended=np.array([self._flag(row, "ended") for row in range(len(self.rows))]) if "ended" in has else None,
            active=self._lists("active", False, bool) if "active" in has else None,
            advantage=self._advantage() if "advantage" in has else None,
            beta=single.get("beta"),
            policy_version=None if version is None else int(version),
            **self._prompt_ids(has),
            **{name: self._lists(name, np.nan, float) for name in TOKEN_FLOATS if name in has},
        )

    def _columns(self) -> set[str]:
        """Columns that every row has. One that only some have is refused, since half a column would mislead."""
        has = {name for row in self.rows for name, value in row.items() if value is not None}
        for name in sorted(has & COLUMNS):
            lacking = next((at for at, row in enumerate(self.rows) if row[name] is None), None)
            if lacking is not None:
                what = f"{name} is null here, but not in other rows of step {self.number}"
                raise InputError(Problem(self.places[lacking], what, "give it for all rows of a step, or for none"))
        return has

    def _positions(self, has: set[str], responses: list[str] | None, intake: Intake) -> tuple[Array, Array | None]:
        """The response mask [B, T], and the response's token ids where they are known."""
        if not any(self.lengths) and responses is not None:
            if lists := sorted(set(LISTS) & set(self.rows[0])):
                what = f"{lists[0]} is null in all rows of step {self.number}"
                raise InputError(Problem(self.places[0], what, "leave such columns away"))
            return positions(responses, intake)
        if not all(self.lengths):
            where = self.places[self.lengths.index(0)]
            what = f"no list per position here, but in other rows of step {self.number}"
            raise InputError(Problem(where, what, "give the same columns for all rows"))
        if "response_mask" in has:
            mask = self._lists("response_mask", False, bool)
        else:
            mask = padded([[True] * length for length in self.lengths], fill=False)
        return mask, self._lists("response_ids", 0, np.int64) if "response_ids" in has else None

    def _lists(self, name: str, fill: Any, kind: Any) -> Array:
        """[B, T] of a column of lists; null in a list of floats is nan."""
        lists = [row[name] for row in self.rows]
        if kind is float:
            lists = [[np.nan if value is None else value for value in values] for values in lists]
        right = (bool,) if kind is bool else (int,) if kind is np.int64 else (int, float)
        for where, values in zip(self.places, lists, strict=True):
            if not all(isinstance(value, right) for value in values):
                raise InputError(Problem(where, f"{name} holds something else than it should", _SAYS[kind]))
        return padded(lists, fill=fill)

    def _scores(self, name: str, answers: Answers) -> Array:
        """[B] or [B, T] of a channel; null is not scored."""
        values = [row[name] for row in self.rows]
        per_token = isinstance(next(value for value in values if value is not None), list)
        if per_token != (answers["score_position"] == "token"):
            what = f"{name} is {'a list' if per_token else 'one number'} for each response"
            remedy = f"say --answer score_position={'token' if per_token else 'last'}"
            raise InputError(Problem(self.places[0], what, remedy))
        if per_token:
            return self._lists(name, np.nan, float)
        return np.array([self._number(row, name) for row in range(len(values))])

    def _number(self, row: int, name: str) -> float:
        value = self.rows[row][name]
        if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool)):
            raise InputError(Problem(self.places[row], f"{name} is not a number", "one number, or null"))
        return np.nan if value is None else float(value)

    def _advantage(self) -> Array:
        if isinstance(self.rows[0]["advantage"], list):
            return self._lists("advantage", np.nan, float)
        return np.array([self._number(row, "advantage") for row in range(len(self.rows))])

    def _flag(self, row: int, name: str) -> bool:
        value = self.rows[row][name]
        if not isinstance(value, bool):
            raise InputError(Problem(self.places[row], f"{name} is neither true nor false", "give true or false"))
        return value

    def _groups(self) -> Array:
        for where, row in zip(self.places, self.rows, strict=True):
            if not isinstance(row["group"], int | str):
                raise InputError(Problem(where, "group is neither a number nor text", "name each prompt's group"))
        return groups([row["group"] for row in self.rows])

    def _texts(self, name: str) -> list[str]:
        found = [text_of(row[name]) for row in self.rows]
        for where, text in zip(self.places, found, strict=True):
            if text is None:
                raise InputError(Problem(where, f"{name} is neither text nor a list of messages", "give text"))
        return [str(text) for text in found]

    def _constant(self, name: str) -> float:
        """The one value that a column has in a step."""
        first = self.rows[0][name]
        for where, row in zip(self.places, self.rows, strict=True):
            if not finite(row[name]) or row[name] != first:
                what = f"{name} is not the same number as in the first row of step {self.number}"
                raise InputError(Problem(where, what, "give each step one value"))
        return float(first)

    def _prompt_ids(self, has: set[str]) -> dict[str, Array]:
        """Prompts are padded on the left."""
        if "prompt_ids" not in has:
            return {}
        for where, row in zip(self.places, self.rows, strict=True):
            given = row["prompt_ids"]
            if not isinstance(given, list) or not all(isinstance(one, int) for one in given):
                raise InputError(Problem(where, "prompt_ids is not a list of whole numbers", "give token ids"))
        ids = [row["prompt_ids"] for row in self.rows]
        mask = [[True] * len(one) for one in ids]
        return {"prompt_ids": padded(ids, left=True), "prompt_mask": padded(mask, fill=False, left=True)}


_SAYS = {
    bool: "give true and false",
    np.int64: "give whole numbers, one for each response position",
    float: "give numbers, or null where one is not known",
}


def _files(path: Path) -> list[Path]:
    try:
        held = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        return []
    return [one for one in held if one.suffix in (".jsonl", ".parquet")]


def _refuse_copies(files: Sequence[Path]) -> None:
    """Raise InputError where two files hold the same bytes; only files of the same size are looked into."""
    sizes = [file.stat().st_size for file in files]
    seen: dict[str, Path] = {}
    for file, size in zip(files, sizes, strict=True):
        if sizes.count(size) < 2:
            continue
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest in seen:
            raise InputError(Problem(str(file), f"is a copy of {seen[digest].name}", "remove one of them"))
        seen[digest] = file


def _sidecar(path: Path) -> dict[str, Any]:
    """What `conventions.json` beside the files says; empty where there is none."""
    place = (path if path.is_dir() else path.parent) / SIDECAR
    if not place.is_file():
        return {}
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(str(place), f"cannot be read: {error}", "write one JSON object")) from None
    keys = ["trainer", *(one.key for one in ASKS)]
    other = sorted(set(known) - set(keys)) if isinstance(known, dict) else ["no object"]
    if other:
        raise InputError(Problem(str(place), f"{other[0]!r} is not known", f"use {', '.join(keys)}"))
    return dict(known)


def _answer(value: Any) -> str:
    return value.replace(" ", "-") if isinstance(value, str) else str(value)


def _fits(names: Iterable[str]) -> bool:
    found = set(names)
    return "step" in found and bool(found & {"response", *LISTS}) and bool(_channels(found) or "advantage" in found)


def _same_columns(where: str, record: Row, before: set[str] | None, intake: Intake) -> set[str]:
    """The columns of a row, which are those of the first file's."""
    names = set(record)
    if before is not None:
        if names != before:
            what = f"other columns than the first file: {', '.join(sorted(names ^ before))}"
            raise InputError(Problem(where, what, "import the files one by one"))
        return before
    if not _fits(names):
        raise InputError(Problem(where, "is not of the generic schema", f"expected {FORMAT.expected}"))
    known = COLUMNS | {name for name in names if name == "score" or name.startswith(("score.", "weight."))}
    if other := sorted(names - known):
        intake.note(f"columns not read: {', '.join(other)}")
    return names


def _step_of(where: str, record: Row) -> int:
    value = record["step"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(Problem(where, "step is not a whole number of at least 0", "number the policy steps"))
    return value


def _channels(names: Iterable[str]) -> dict[str, str]:
    """Each channel's name and its column: `score`, or `score.<channel>`."""
    return {name.removeprefix("score."): name for name in sorted(names) if name == "score" or name.startswith("score.")}


def _measured(names: Iterable[str]) -> list[str]:
    """Columns that hold a number for the response or a list for its positions."""
    found = list(names)
    return [*(["advantage"] if "advantage" in found else []), *_channels(found).values()]


def _length(where: str, record: Row) -> int | None:
    """Positions of the response, the same in every list; None where there is no list."""
    wrong = [name for name in LISTS if record.get(name) is not None and not isinstance(record[name], list)]
    if wrong:
        raise InputError(Problem(where, f"{wrong[0]} is not a list", "give one entry per response position"))
    lists = {name: record.get(name) for name in (*LISTS, *_measured(record))}
    counts = {name: len(value) for name, value in lists.items() if isinstance(value, list)}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        what = f"lists of different lengths: {listed}"
        raise InputError(Problem(where, what, "give every list one entry per response position"))
    return next(iter(counts.values()), None)


FORMAT = Format(
    name="generic",
    title="the generic schema",
    recognises=recognises,
    expected="JSONL or Parquet, one row per response: step, response or lists per token, score (see docs/import.md)",
    asks=ASKS,
    read=read,
    conventions=conventions,
    fields=("step", "response", "score"),
    told=told,
    text_only=text_only,
)
