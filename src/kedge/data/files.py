"""Rows of JSONL, JSON, Parquet and CSV files and of folders saved by `datasets`, each with its line.

A row that cannot be read is a `Problem` among the others; a file that cannot be read raises `InputError`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kedge.errors import InputError, Problem

Row = tuple[int, Mapping[str, Any] | Problem]

ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" leaves of a byte that is not UTF-8
FORMATS = ".jsonl, .json, .csv (each also with .gz), .parquet or a folder saved by `datasets`"


def read_rows(path: str | Path) -> Iterator[Row]:
    """Each row of the file with its number: the line it starts on, for Parquet and folders the row, from 1.

    Parquet is streamed by batches, JSONL and CSV by lines; a JSON array is read whole. Raises `InputError` for a file
    that is missing, empty, torn or of an unknown kind.
    """
    path = Path(path)
    reader = _reader(path)
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(Problem(str(path), f"the gzip stream is damaged: {error}", "copy the file again")) from None
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise InputError(Problem(str(path), what, "check the file and its permissions")) from None
    if empty:
        raise InputError(Problem(str(path), "no rows in it", "give a file with at least one row"))


def refuse_taken(path: Path) -> None:
    """Raise `InputError` if `path` is already there, or its folder is not."""
    if path.exists():
        raise InputError(Problem(str(path), "is already there, and nothing is overwritten", "choose another name"))
    if not path.parent.is_dir():
        raise InputError(Problem(str(path.parent), "there is no such folder", "make it or choose another"))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end; nothing is left there if the block fails."""
    refuse_taken(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lines_at_most(path: str | Path) -> int:
    """How far the numbers of `read_rows` may go: the rows of Parquet, the lines of text; 0 where nobody knows.

    Reads through a text file once without parsing it. Raises nothing: what is wrong shows when rows are read.
    """
    import pyarrow.parquet as parquet

    path = Path(path)
    try:
        if path.suffix.lower() == ".parquet":
            rows: int = parquet.read_metadata(path).num_rows
            return rows
        if path.is_dir():
            from datasets import load_from_disk

            rows = load_from_disk(str(path)).num_rows
            return rows if isinstance(rows, int) else 0  # of several splits it is a dictionary
        opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rb") as stream:
            lines: int = 1 + sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))
            return lines
    except (ImportError, OSError, EOFError, ValueError, zlib.error):
        return 0


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    if path.is_dir():
        return _saved_dataset
    if not path.exists():
        raise InputError(Problem(str(path), "there is no such file", "check the path; it is relative to the recipe"))
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and suffixes[:-1] else (suffixes or [""])[-1]
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if kind not in readers:
        raise InputError(Problem(str(path), f"the suffix {kind!r} is not known", f"use {FORMATS}"))
    return readers[kind]


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unzipped; UTF-16, which spreadsheets write, is refused by name."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(Problem(str(path), "UTF-16 text, expected UTF-8", "save it as UTF-8"))
    whole: IO[bytes] = opener(path, "rb")
    return whole


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _json_row(line, f"{path}:{number}")


def _json_row(line: bytes, where: str) -> Mapping[str, Any] | Problem:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Problem(where, f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return Problem(where, f"not readable as JSON: {error}", "write one JSON object a line")
    return _as_row(value, where)


def _as_row(value: object, where: str) -> Mapping[str, Any] | Problem:
    if isinstance(value, dict):
        return value
    return Problem(where, f"a JSON {type(value).__name__}, expected an object", 'write objects such as {"prompt": ...}')


def _json(path: Path) -> Iterator[Row]:
    """Rows of a JSON array, or of JSON lines under the name .json."""
    with _open(path) as stream:
        data = stream.read()
    is_array = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    yield from _json_array(data, path) if is_array else _json_lines(path)


def _json_array(data: bytes, path: Path) -> Iterator[Row]:
    """The elements of a JSON array one by one, so that each has its line and a torn file yields what is whole."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(Problem(f"{path}:{line}", "not UTF-8", "save the file as UTF-8")) from None
    decoder = json.JSONDecoder()
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            what = f"not readable as JSON: {error}"
            raise InputError(Problem(f"{path}:{line}", what, "write an array of objects, or JSON lines")) from None
        yield line, _as_row(value, f"{path}:{line}")
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            what = "the array is not closed here, nor does it go on"
            raise InputError(Problem(f"{path}:{line}", what, "copy the file again, or add the comma"))


def _skip(text: str, at: int) -> int:
    """The first place from `at` on that is not JSON white space."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _csv(path: Path) -> Iterator[Row]:
    """Rows under the header's names; cells that hold a JSON list of messages are parsed."""
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        limit = csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131072 characters
        try:
            reader = csv.reader(text, strict=True)
            header = _header(reader, path)
            while True:
                number = reader.line_num + 1
                where = f"{path}:{number}"
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    row: Mapping[str, Any] | Problem = Problem(
                        where, f"not readable as CSV: {error}", "quote cells and double the quotes"
                    )
                else:
                    if not cells:
                        continue
                    row = _csv_row(header, cells, where)
                yield number, row
                if isinstance(row, Problem):
                    yield from _swallowed(path, number, reader.line_num)
        finally:
            csv.field_size_limit(limit)


def _swallowed(path: Path, first: int, last: int) -> Iterator[Row]:
    """The other lines of an unusable record: a stray quote runs on through rows, and none of them goes unmentioned."""
    for number in range(first + 1, last + 1):
        what = f"part of the unusable row that begins on line {first}"
        yield number, Problem(f"{path}:{number}", what, "close the quotes of that row")


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(Problem(f"{path}:1", f"not readable as CSV: {error}", "start with column names")) from None
    if any(map(ESCAPED_BYTE.search, header)):
        raise InputError(Problem(f"{path}:1", "the header is not UTF-8", "save the file as UTF-8"))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(Problem(f"{path}:1", f"two columns are named {twice[0]!r}", "rename or remove one"))
    return header


def _csv_row(header: list[str], cells: list[str], where: str) -> Mapping[str, Any] | Problem:
    if len(cells) != len(header):
        what = f"{len(cells)} cells, the header has {len(header)}"
        return Problem(where, what, "quote cells that hold commas or line breaks")
    if any(map(ESCAPED_BYTE.search, cells)):
        return Problem(where, "not UTF-8", "save the file as UTF-8")
    return {name: cell_of(cell) for name, cell in zip(header, cells, strict=True)}


def cell_of(cell: str) -> Any:
    """The cell, or the messages written in it as JSON."""
    if cell.startswith("[{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 1
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InputError(Problem(str(path), f"two columns are named {twice[0]!r}", "rename or remove one"))
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch, path, number):
                    yield number, row
                    number += 1
    except (arrow.ArrowException, OSError) as error:
        what = f"not readable as Parquet: {_first_line(error)}"
        raise InputError(Problem(str(path), what, "write the file again")) from None


def _batch_rows(batch: Any, path: Path, first: int) -> Iterator[Mapping[str, Any] | Problem]:
    """The batch's rows; only where one cannot be converted are they converted one by one to find it."""
    try:
        yield from batch.to_pylist()
    except ValueError:
        for offset in range(batch.num_rows):
            try:
                yield batch.slice(offset, 1).to_pylist()[0]
            except ValueError as error:
                yield Problem(f"{path}:{first + offset}", f"not readable: {error}", "write text columns as UTF-8")


def _saved_dataset(path: Path) -> Iterator[Row]:
    """Rows of a folder that `Dataset.save_to_disk` wrote."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        what = "a folder, but not one saved by `datasets`"
        raise InputError(Problem(str(path), what, "save it with save_to_disk, or give a file"))
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        what = "a folder; reading what `datasets` saved needs that package"
        raise InputError(Problem(str(path), what, "pip install kedge[hub], or save it as JSONL")) from None
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        what = f"`datasets` cannot load it: {_first_line(error)}"
        raise InputError(Problem(str(path), what, "save it again with save_to_disk")) from None
    if not isinstance(dataset, Dataset):
        splits = ", ".join(sorted(dataset))
        raise InputError(Problem(str(path), f"several splits: {splits}", "name one, such as FOLDER/train"))
    yield from enumerate(dataset, start=1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
