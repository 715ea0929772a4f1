"""JSON lines: appended deterministically, read with the line number of what is wrong, repaired after a kill."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kedge.errors import InputError, Problem

Record = dict[str, Any]


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line with sorted keys. Numbers that are not finite become null; numpy scalars are fine.

    Raises InputError when the file cannot be written.
    """
    line = json.dumps(_plain(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise cannot_write(path, error) from error


def _plain(value: Any) -> Any:
    """`value` as strict JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: Path) -> list[Record]:
    """The records of `path`, empty when there is no such file.

    A last line without its line end that does not parse is a write that a kill cut short; it is left out. Any other
    line that is not a JSON object raises InputError with file and line.
    """
    return [record for record, _ in _lines(path)]


def each_json_line(path: Path) -> Iterator[Record]:
    """The same one by one, for files of which not every record should be in memory at once."""
    return (record for record, _ in _lines(path))


def keep_json_lines(path: Path, keep: Callable[[Record], bool]) -> None:
    """Rewrite `path` with the lines that `keep` accepts, their bytes unchanged; a torn last line goes."""
    if not path.exists():
        return
    kept = b"".join(line for record, line in _lines(path) if keep(record))
    write_atomically(path, kept)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` at once: readers see the old content or the new, never half of it."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of the failure itself, the same disk's
            temporary.unlink()
        raise cannot_write(path, error) from error


def temporary_name(path: Path) -> Path:
    """The hidden name beside `path` under which its next version is written."""
    return path.with_name(f".{path.name}.tmp")


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to tell the user when `path` cannot be written."""
    remedy = "free some space or choose another --out, then go on with --resume"
    return InputError(Problem(str(path), f"cannot be written: {error.strerror or error}", remedy))


def _lines(path: Path) -> Iterator[tuple[Record, bytes]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise InputError(Problem(str(path), what, "check the file's permissions")) from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise _not_a_record(path, number) from None
        if not isinstance(record, dict):
            raise _not_a_record(path, number)
        yield record, line if line.endswith(b"\n") else line + b"\n"


def _not_a_record(path: Path, number: int) -> InputError:
    remedy = "the file was changed or damaged; remove the line or take the run from a copy"
    return InputError(Problem(f"{path}:{number}", "not a JSON object", remedy))
