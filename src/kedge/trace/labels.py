"""What auditors say of a run's responses: found again in its trace once, kept beside it without any text.

A row of a file of labels says what it is about by `step` and `row`, by the texts `prompt` and `response` or one of
them, or by their hashes `prompt_hash` and `response_hash` (or `hash`, of the response): 16 hex digits of SHA-256, as a
trace with `trace.text = "hashed"` keeps them. It is about every response that is all it says. Its other columns are
labels. A row that could mean different things, or that another row contradicts, labels nothing and is reported.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.trace.jsonl import cannot_write
from kedge.trace.reader import Run, StepTrace, read_table
from kedge.trace.schema import METADATA_KEY, VERSION, check_version
from kedge.trace.writer import write_table

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]
Row = Mapping[str, Any]
Place = tuple[int, int]  # step and row
FOLDER = "labels"
HASHES = {"hash": "response", "response_hash": "response", "prompt_hash": "prompt"}
KEYS = ("step", "row", "prompt", "response", *HASHES)
MEANT = {"human": (-math.inf, math.inf), "correct": (0.0, 1.0), "confidence": (0.0, 1.0)}  # what checks look for
WORDS = 24  # different words that a column may hold; more are remarks, not verdicts
LONGEST = 40  # characters of a word
_HASH = re.compile("[0-9a-f]{16}")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FLAGS = {"true": 1.0, "false": 0.0}
_TAKE_OUT = "correct the row or take it out"


def digest(text: str) -> str:
    """16 hex digits of SHA-256, as a hashed trace keeps a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def text_key(text: str) -> str:
    """What a text is found by: its hash, as a hashed trace keeps it; a hash stays as it is."""
    if _HASH.fullmatch(text):
        return text
    return digest(text)


@dataclass(frozen=True)
class Joined:
    """A file of labels that has been matched. `columns` hold numbers or words, None where nothing is said."""

    rows: int  # of the file
    places: tuple[Place, ...]  # [N] responses that have a label, in order
    columns: Mapping[str, tuple[Any, ...]]  # [N] each
    left: tuple[Problem, ...]  # rows that label nothing, each with its file and line
    dropped: Mapping[str, str]  # columns that are not kept, and why
    repeated: int  # rows that say what an earlier row said
    ways: Mapping[str, int]  # by what rows found their responses


@dataclass
class _Said:
    """A row of the file: what it is about, what it says, and where it was found."""

    where: str
    about: dict[str, Any]  # of step, row, prompt, response
    labels: dict[str, Any]
    places: set[Place] = field(default_factory=set)
    prompts: set[str | None] = field(default_factory=set)
    contradicted: bool = False  # step and row are there, with other texts

    @property
    def by(self) -> tuple[str, ...]:
        if {"step", "row"} <= set(self.about):
            return ("step", "row")
        return tuple(name for name in ("prompt", "response") if name in self.about)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(self.about[name] for name in self.by)


def match(rows: Iterable[tuple[str, Row | Problem]], run: Run, columns: Mapping[str, str] | None = None) -> Joined:
    """Find what each row is about in the trace of `run`, one step in memory at a time.

    `rows` come with their file and line. `columns` names the labels to take and what to call them; None takes all.
    Raises `InputError` where no row has a label, or a label that checks read is not the number it must be.
    """
    left: list[Problem] = []
    said: list[_Said] = []
    order: dict[str, int] = {}
    for where, row in rows:
        order[where] = len(order)
        found = row if isinstance(row, Problem) else _read(where, row, columns)
        if isinstance(found, Problem):
            left.append(Problem(where, found.what, found.remedy))
        else:
            said.append(found)
    if not order:
        raise InputError(Problem("the file of labels", "holds no row", "give one with a header and rows"))
    dropped = _clean(said)
    dropped |= _without_texts(said, _find(said, run))
    _require_labels(said, dropped)
    kept, repeated = _agreeing(said, left)
    names = dict.fromkeys(name for one in kept for name in one.labels)
    values: dict[Place, dict[str, Any]] = {}
    for one in kept:
        for place in one.places:
            values.setdefault(place, {}).update(one.labels)
    places = tuple(sorted(values))
    ways: dict[str, int] = {}
    for one in kept:
        way = " and ".join(one.by)
        ways[way] = ways.get(way, 0) + 1
    return Joined(
        rows=len(order),
        places=places,
        columns={name: tuple(values[place].get(name) for place in places) for name in names},
        left=tuple(sorted(left, key=lambda problem: order[problem.where])),
        dropped=dropped,
        repeated=repeated,
        ways=ways,
    )


def _empty(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _read(where: str, row: Row, columns: Mapping[str, str] | None) -> _Said | Problem:
    """What a row is about and what it says."""
    about: dict[str, Any] = {}
    for name in KEYS:
        value = row.get(name)
        if _empty(value):
            continue
        if name in ("step", "row"):
            number = _number(value)
            if number is None or not number.is_integer() or number < 0:
                return Problem(where, f"{name} is no whole number from 0", _TAKE_OUT)
            about[name] = int(number)
        else:
            key = text_key(str(value))
            side = HASHES.get(name, name)
            if about.setdefault(side, key) != key:
                return Problem(where, f"{side} and {name} are of different texts", _TAKE_OUT)
    one = _Said(where, about, {})
    if not one.by:
        return Problem(where, "says nowhere which response it is about", "add step and row, texts or hashes")
    taken = {name: name for name in row if name not in KEYS} if columns is None else columns
    one.labels = {taken[name]: row[name] for name in taken if not _empty(row.get(name))}
    return one if one.labels else Problem(where, "holds no label", "fill it in or take it out")


def _number(value: object) -> float | None:
    """A finite number, however it is written; true is 1 and false 0."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        if not _NUMBER.fullmatch(text):
            return None
        value = text
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _clean(said: Sequence[_Said]) -> dict[str, str]:
    """Turn labels into numbers where a whole column is; take out columns that are no verdicts, and say why."""
    dropped: dict[str, str] = {}
    for name in dict.fromkeys(name for one in said for name in one.labels):
        numbers = [(one, _number(one.labels[name])) for one in said if name in one.labels]
        if name in MEANT:
            _require_meant(name, numbers)
        if all(number is not None for _, number in numbers):
            for one, number in numbers:
                one.labels[name] = number
            continue
        why = _no_verdict([one.labels[name] for one, _ in numbers])
        if why:
            dropped[name] = why
        for one, _ in numbers:
            if why:
                del one.labels[name]
            else:
                one.labels[name] = str(one.labels[name]).strip()
    return dropped


def _require_labels(said: Sequence[_Said], dropped: Mapping[str, str]) -> None:
    if said and not any(one.labels for one in said):
        reasons = "; ".join(f"{name}: {why}" for name, why in dropped.items())
        what = f"no column can be a label ({reasons})"
        raise InputError(Problem(said[0].where.rpartition(":")[0], what, "add a column of numbers or of a few words"))


def _require_meant(name: str, numbers: Sequence[tuple[_Said, float | None]]) -> None:
    low, high = MEANT[name]
    wrong = [one.where for one, number in numbers if number is None or not low <= number <= high]
    if wrong:
        meant = "a number" if low == -math.inf else "a number from 0 to 1"
        remedy = "checks read this column: write numbers, or take it under another name with --column"
        raise InputError([Problem(where, f"{name} is not {meant}", remedy) for where in wrong[:20]])


def _no_verdict(values: Sequence[Any]) -> str:
    """Why a column of words is none of verdicts; empty if it is one."""
    if not all(isinstance(value, (str, int, float, bool)) for value in values):
        return "holds lists or objects"
    words = {str(value).strip() for value in values}
    if len(words) > WORDS:
        return f"holds {len(words)} different texts, more than {WORDS}"
    return f"holds texts of more than {LONGEST} characters" if any(len(word) > LONGEST for word in words) else ""


def _find(said: Sequence[_Said], run: Run) -> set[str]:
    """Put the places of each row of the file into it; returns those of its words that are a text of the run, hashed."""
    words = {text_key(value) for one in said for value in one.labels.values() if isinstance(value, str)}
    texts: set[str] = set()
    by: dict[tuple[str, ...], dict[tuple[Any, ...], list[_Said]]] = {}
    for one in said:
        by.setdefault(one.by, {}).setdefault(one.key, []).append(one)
    for number in run.steps():
        for row, (prompt, response) in enumerate(_texts(run, number)):
            texts |= words & {prompt, response}
            here: dict[str, Any] = {"step": number, "row": row, "prompt": prompt, "response": response}
            for names, known in by.items():
                for one in known.get(tuple(here[name] for name in names), ()):
                    _note(one, here)
    return texts


def _without_texts(said: Sequence[_Said], texts: set[str]) -> dict[str, str]:
    """Take out columns that hold a text of the run, under whatever name."""
    holding = {
        name
        for one in said
        for name, value in one.labels.items()
        if isinstance(value, str) and text_key(value) in texts
    }
    for one in said:
        one.labels = {name: value for name, value in one.labels.items() if name not in holding}
    return dict.fromkeys(sorted(holding), "holds a prompt or a response of the run")


def _texts(run: Run, number: int) -> Iterator[tuple[str | None, str | None]]:
    """Prompt and response of each row of a step, as `text_key` finds them."""
    table = read_table(run.dir.step_file(number), ("prompt", "response"))
    sides = (table.column(name).to_pylist() for name in ("prompt", "response"))
    yield from ((p if p is None else text_key(p), r if r is None else text_key(r)) for p, r in zip(*sides, strict=True))


def _note(one: _Said, here: Mapping[str, Any]) -> None:
    """Put a place into a row, if it is all that the row says."""
    for name, value in one.about.items():
        if here[name] != value and not (here[name] is None and name in ("prompt", "response")):
            one.contradicted = True
            return
    one.places.add((here["step"], here["row"]))
    one.prompts.add(here["prompt"])


def _agreeing(said: Sequence[_Said], left: list[Problem]) -> tuple[list[_Said], int]:
    """The rows whose responses are known and which no other row contradicts, and how many say what one said before."""
    found = []
    for one in said:
        why = _why_not(one)
        if why is not None:
            left.append(why)
        elif one.labels:
            found.append(one)
        else:
            left.append(Problem(one.where, "holds no label but what is not kept", "give numbers or a few words"))
    against = _contradicted(found)
    left.extend(against.values())
    kept = [one for one in found if id(one) not in against]
    told: set[tuple[Place, str]] = set()
    repeated = 0
    for one in kept:
        says = {(place, name) for place in one.places for name in one.labels}
        repeated += says <= told
        told |= says
    return kept, repeated


def _contradicted(found: Sequence[_Said]) -> dict[int, Problem]:
    """By the identity of each row that another one contradicts, what to tell of it."""
    about: dict[tuple[Place, str], list[_Said]] = {}
    for one in found:
        for place in one.places:
            for name in one.labels:
                about.setdefault((place, name), []).append(one)
    against: dict[int, Problem] = {}
    for (_, name), rows in about.items():
        first = rows[0]
        second = next((row for row in rows if row.labels[name] != first.labels[name]), None)
        if second is None:
            continue
        for one in rows:
            other = second if one.labels[name] == first.labels[name] else first
            what = f"{name} is not what {other.where} says of the same response"
            against.setdefault(id(one), Problem(one.where, what, "settle it, and join the file again"))
    return against


def _why_not(one: _Said) -> Problem | None:
    """Why a row labels nothing, if it does not."""
    if not one.places:
        if one.contradicted:
            return Problem(one.where, "other things it says do not fit what was found", _TAKE_OUT)
        what = "no such step and row in the trace" if one.by == ("step", "row") else "no such text in the trace"
        return Problem(one.where, what, "write it as the trace holds it; where that keeps no text, give step and row")
    if one.by == ("response",) and len(one.places) > 1 and (len(one.prompts) > 1 or None in one.prompts):
        what = f"ambiguous: {len(one.places)} responses to different or unknown prompts have this text"
        return Problem(one.where, what, "add the prompt, or step and row")
    return None


# In the run's folder


def require_name(name: str) -> str:
    """The name, if labels can be kept under it; raises `InputError`."""
    if not _NAME.fullmatch(name):
        raise InputError(Problem(f"--name {name}", "is no name for labels", "use letters, digits, - and _"))
    return name


def place_of(run: Run, name: str) -> Path:
    """Where labels of this name are kept."""
    return run.path / FOLDER / f"{require_name(name)}.parquet"


def refuse_taken(run: Run, name: str) -> None:
    """Raise `InputError` if the run holds labels of this name."""
    if place_of(run, name).exists():
        what = "the run holds labels of this name; nothing was overwritten"
        raise InputError(Problem(str(place_of(run, name)), what, "choose another with --name, or give --replace"))


def store(run: Run, name: str, joined: Joined, source: Path) -> Path:
    """Write `labels/<name>.parquet` at once: step, row and the labels; whence and when in its metadata."""
    import pyarrow as pa

    path = place_of(run, name)
    columns: dict[str, pa.Array] = {
        "step": pa.array([step for step, _ in joined.places], pa.int32()),
        "row": pa.array([row for _, row in joined.places], pa.int32()),
    }
    for column, values in joined.columns.items():
        words = any(isinstance(value, str) for value in values)
        columns[column] = pa.array(values, pa.string() if words else pa.float64())
    about = {
        "schema": VERSION,
        "name": name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "joined": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": joined.rows,
        "left": len(joined.left),
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about, sort_keys=True)})
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    write_table(table, path)
    return path


@dataclass(frozen=True)
class LabelSet:
    """The labels of one file, as the run keeps them."""

    name: str
    about: Mapping[str, Any]  # sha256, joined, rows, left
    columns: Mapping[str, Mapping[Place, Any]]  # without places that say nothing

    @cached_property
    def places(self) -> frozenset[Place]:
        """The responses that have a label."""
        return frozenset(place for known in self.columns.values() for place in known)


class Labels:
    """All labels of a run.

    A label is named by its column, and is then what all sets say, nothing where they contradict each other; by set and
    column ("audit.grade"); or by its set where that has one column.
    """

    def __init__(self, sets: Iterable[LabelSet]) -> None:
        self.sets = tuple(sets)
        self._known: dict[str, Mapping[Place, Any]] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        return tuple(dict.fromkeys(column for one in self.sets for column in one.columns))

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that a label can be asked for by."""
        single = [one.name for one in self.sets if len(one.columns) == 1]
        full = [f"{one.name}.{column}" for one in self.sets for column in one.columns]
        return tuple(dict.fromkeys([*self.columns, *single, *full]))

    def known(self, name: str) -> Mapping[Place, Any]:
        """What is said, by response. Raises `InputError` where there is no such label."""
        if name not in self._known:
            self._known[name] = self._resolved(name)
        return self._known[name]

    def of(self, step: StepTrace, name: str) -> list[Any]:
        """[B] the label of each row of a step, None where there is none."""
        known = self.known(name)
        return [known.get((step.step, row)) for row in range(len(step))]

    def numbers(self, step: StepTrace, name: str) -> Array:
        """[B] the same as float64, nan where there is none. Raises `InputError` where a label is no number."""
        found = self.of(step, name)
        if any(isinstance(value, str) for value in found):
            raise InputError(Problem(f"label:{name}", "holds words, not numbers", "group by it with --by"))
        return np.array([np.nan if value is None else value for value in found], dtype=np.float64)

    def _resolved(self, name: str) -> Mapping[Place, Any]:
        found = [one.columns[name] for one in self.sets if name in one.columns]
        if found:
            return _together(found)
        for one in self.sets:
            if one.name == name and len(one.columns) == 1:
                return next(iter(one.columns.values()))
            for column, known in one.columns.items():
                if name == f"{one.name}.{column}":
                    return known
        have = ", ".join(self.names) or "none"
        raise InputError(Problem(f"label:{name}", "the run has no such label", f"it has {have}"))


def _together(given: Sequence[Mapping[Place, Any]]) -> Mapping[Place, Any]:
    """What several say, without what they contradict each other in."""
    together: dict[Place, Any] = {}
    for known in given:
        for place, value in known.items():
            together[place] = value if together.get(place, value) == value else None
    return {place: value for place, value in together.items() if value is not None}


def label_files(folder: Path) -> list[Path]:
    """The files of labels of a run, by name."""
    return sorted((folder / FOLDER).glob("*.parquet"))


def read_labels(run: Run) -> Labels | None:
    """The labels of a run, None where it has none. Raises `InputError` where a file is damaged."""
    sets = [_read_set(path) for path in label_files(run.path)]
    return Labels(sets) if sets else None


def _read_set(path: Path) -> LabelSet:
    table = read_table(path)
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    if raw is None or not {"step", "row"} <= set(table.column_names):
        raise InputError(Problem(str(path), "holds no labels of Kedge's", "write it with kedge label join"))
    about = json.loads(raw)
    check_version(about.get("schema"), str(path))
    places = list(zip(*(table.column(name).to_pylist() for name in ("step", "row")), strict=True))
    columns = {
        name: {place: value for place, value in zip(places, table.column(name).to_pylist(), strict=True)
               if value is not None}
        for name in table.column_names
        if name not in ("step", "row")
    }  # fmt: skip
    return LabelSet(path.stem, about, columns)
