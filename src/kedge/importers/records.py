"""Records of JSONL and Parquet files, each with its place; a file that is torn or mixed up is refused by name.

Shared by the formats. Nothing is unpickled, and no message holds text of a record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.data.files import read_rows
from kedge.errors import InputError, Problem

Array = NDArray[Any]
Record = Mapping[str, Any]
_FIRST = 16 * 2**20  # bytes: a first line that is longer is not looked at


def records(path: Path, required: Iterable[str] = ()) -> Iterator[tuple[str, Record]]:
    """Each record of a .jsonl or .parquet file with its `file:line` (for Parquet its row, from 1).

    Raises InputError naming file and line where the file is torn, a line is no JSON object, a record lacks one of
    `required`, or has other fields than the first one.
    """
    first: set[str] | None = None
    need = set(required)
    for line, record in read_rows(path):
        where = f"{path}:{line}"
        if isinstance(record, Problem):
            raise InputError(Problem(where, record.what, "the file is torn or mixed up; copy it again"))
        names = set(record)
        if need - names:
            what = f"the record lacks {', '.join(sorted(need - names))}"
            raise InputError(Problem(where, what, "is this file of another trainer, or two files in one?"))
        if first is None:
            first = names
        elif names != first:
            other = ", ".join(sorted(names ^ first))
            raise InputError(Problem(where, f"other fields than the first record: {other}", "one format per file"))
        yield where, record


def first_record(path: Path) -> Record | None:
    """The first record of a .jsonl file, or the columns of a .parquet file: empty lists and None stand for values.

    None where there is none or it cannot be read; raises nothing.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
            return {one.name: [] if any(is_a(one.type) for is_a in lists) else None for one in pq.read_schema(path)}
        if path.suffix == ".jsonl":
            with path.open("rb") as stream:
                found = json.loads(stream.readline(_FIRST))
            return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):  # pyarrow's own errors are among them
        return None
    return None


def numbered(path: Path, pattern: str) -> list[tuple[int, Path]]:
    """Files whose name, or path under the folder, fits `pattern` (its first group is a number), in order of it.

    `path` is the folder, or one such file. Raises nothing.
    """
    try:
        paths = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        return []
    matches = ((re.fullmatch(pattern, one.name), one) for one in paths)
    return sorted((int(match[1]), one) for match, one in matches if match)


def groups(keys: Sequence[Any]) -> Array:
    """[B] one number for each different key, in order of appearance."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def finite(value: Any) -> bool:
    """True for a number that is finite; text and booleans are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
