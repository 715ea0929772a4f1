"""Labels that a user has for responses or prompts of a run, found again in its trace.

A row of labels names what it is about by `step` and `row`, by the texts `prompt` and `response` or one of them, or by
their hashes `prompt_hash` and `response_hash` (or `hash`, of the response): 16 hex digits of SHA-256, as a trace with
`trace.text = "hashed"` keeps them. Every other column is a label.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
Key = tuple[Any, ...]
_HASHES = {"hash": "response", "response_hash": "response", "prompt_hash": "prompt"}
KEYS = ("step", "row", "prompt", "response", *_HASHES)


def text_key(text: str) -> str:
    """What a text is found by: its hash, as a hashed trace keeps it; a hash stays as it is."""
    if re.fullmatch("[0-9a-f]{16}", text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Labels:
    """Rows of labels, by what they are about. `source` is the file's name, for messages.

    Where two rows about the same differ the first counts; `repeated` is how many later ones there were. Raises
    `InputError` where the columns name nothing or no label.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], source: str) -> None:
        self.source = source
        self._rows: dict[Key, Mapping[str, Any]] = {}
        self._matched: set[Key] = set()
        self._by: tuple[str, ...] | None = None
        self.repeated = self.responses = self.responses_matched = 0
        for number, row in enumerate(rows, 1):
            row = {_HASHES.get(name, name): value for name, value in row.items()}
            if self._by is None:
                self._by = self._what_names(row)
            key = self._key(row, number)
            self.repeated += key in self._rows
            self._rows.setdefault(key, {name: value for name, value in row.items() if name not in KEYS})

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(dict.fromkeys(name for row in self._rows.values() for name in row))

    @property
    def unmatched(self) -> int:
        """Labelled prompts or responses that no row of the trace read so far is about."""
        return len(self._rows) - len(self._matched)

    def column(self, name: str) -> list[Any]:
        """The known values of a label. Raises `InputError` where there is no such column."""
        if name not in self.columns:
            have = ", ".join(self.columns) or "none"
            raise InputError(Problem(f"label:{name}", f"{self.source} has no such column", f"its labels are {have}"))
        return [row[name] for row in self._rows.values() if row.get(name) not in (None, "")]

    def match(self, step: StepTrace) -> None:
        """Count which rows of a step have labels, and which labels were found."""
        keys = [key for key in self._keys(step) if key in self._rows]
        self._matched.update(keys)
        self.responses += len(step)
        self.responses_matched += len(keys)

    def of(self, step: StepTrace, name: str) -> list[Any]:
        """[B] the label of each row of a step, None where there is none."""
        found = (self._rows.get(key, {}).get(name) for key in self._keys(step))
        return [None if value == "" else value for value in found]

    def numbers(self, step: StepTrace, name: str) -> Array:
        """[B] the same as float64, nan where there is none. Raises `InputError` where a label is no number."""
        try:
            return np.array([np.nan if one is None else float(one) for one in self.of(step, name)], dtype=np.float64)
        except (TypeError, ValueError) as error:
            what = f"holds what is no number: {error}"
            raise InputError(Problem(f"label:{name}", what, "group by it with --by, or write numbers")) from None

    def _what_names(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        for names in (("step", "row"), ("prompt", "response"), ("response",), ("prompt",)):
            if all(row.get(name) not in (None, "") for name in names):
                if not set(row) - set(KEYS):
                    raise InputError(Problem(self.source, "holds no column with labels", "add one beside the texts"))
                return names
        what = "says nowhere which response a label is about"
        remedy = "add columns step and row, prompt, response, or their hashes"
        raise InputError(Problem(self.source, what, remedy))

    def _key(self, row: Mapping[str, Any], number: int) -> Key:
        assert self._by is not None
        where = f"{self.source}: row {number}"
        missing = [name for name in self._by if row.get(name) in (None, "")]
        if missing:
            raise InputError(Problem(where, f"has no {' and '.join(missing)}", "every row must say what it is about"))
        if self._by == ("step", "row"):
            try:
                return int(row["step"]), int(row["row"])
            except (TypeError, ValueError):
                raise InputError(Problem(where, "step and row are not whole numbers", "count both from 0")) from None
        return tuple(text_key(str(row[name])) for name in self._by)

    def _keys(self, step: StepTrace) -> list[Key]:
        """[B] what each row of a step is found by; a row whose text is not kept is found by nothing."""
        if self._by == ("step", "row"):
            return [(step.step, row) for row in range(len(step))]
        sides = {"prompt": step.prompts, "response": step.responses}
        texts = zip(*(sides[name] for name in self._by or ()), strict=True)
        return [() if None in row else tuple(text_key(str(text)) for text in row) for row in texts]
