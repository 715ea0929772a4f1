"""Which format a path holds, and what to say where it holds none."""

from __future__ import annotations

from pathlib import Path

from kedge.errors import InputError, Problem
from kedge.importers import Format, all_formats
from kedge.importers.records import first_record

PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth")
REMEDY = "give files of one of these formats, or write the generic schema of docs/import.md"
_LOOKED_AT = 50  # files of a folder that names no format


def recognised(path: Path) -> tuple[Format, ...]:
    """Every format that `path` may be. Raises nothing."""
    return tuple(one for one in all_formats() if one.recognises(path))


def format_of(path: Path, name: str | None = None) -> Format:
    """The format of `path`, or the one called `name`. Raises InputError that says what was expected."""
    if not path.exists():
        raise InputError(Problem(str(path), "there is no such file or folder", "check the path"))
    if name is not None:
        return _named(name)
    if (path / "manifest.json").is_file():
        raise InputError(Problem(str(path), "is a Kedge run already", f"run `kedge diagnose {path}`"))
    found = recognised(path)
    if len(found) > 1:  # a trainer's own fields say more than the schema that anybody may write
        found = tuple(one for one in found if one.name != "generic")
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(one.name for one in found)
        raise InputError(Problem(str(path), f"may be {names}", f"say which with --format {found[0].name}"))
    raise InputError(_unknown(path))


def _named(name: str) -> Format:
    formats = {one.name: one for one in all_formats()}
    if name not in formats:
        raise InputError(Problem(f"--format {name}", "is not known", f"use {', '.join(formats)}"))
    return formats[name]


def _unknown(path: Path) -> list[Problem]:
    """What was found, and what the formats that came near expect; all of them where none did."""
    files = _files(path)
    if files and all(one.suffix in PICKLES for one in files):
        what = (
            f"{files[0].name} is a pickle, which could run any code, and is not one of a format that can be restricted"
        )
        return [Problem(str(path), what, REMEDY), *_all_expected()]
    seen = [(one, set(record)) for one in files if (record := first_record(one))]
    near = sorted(
        ((len(set(known.fields) & names), known, one, names) for one, names in seen for known in all_formats()),
        key=lambda entry: -entry[0],
    )
    near = [entry for entry in near if entry[0] >= 2][:3]
    if not near:
        return [Problem(str(path), f"not recognised: {_held(path, files, seen)}", REMEDY), *_all_expected()]
    return [_missed(known, one, names) for _, known, one, names in near]


def _missed(known: Format, file: Path, names: set[str]) -> Problem:
    lacking = [name for name in known.fields if name not in names]
    what = f"like {known.title}, but without {', '.join(lacking)}" if lacking else f"like {known.title}, but misnamed"
    return Problem(str(file), what, f"expected {known.expected}")


def _held(path: Path, files: list[Path], seen: list[tuple[Path, set[str]]]) -> str:
    if not files:
        return "an empty folder" if path.is_dir() else "not a regular file"
    if not seen:
        return f"no record could be read in {files[0].name}"
    one, names = seen[0]
    return f"{one.name} has the fields {', '.join(sorted(names)[:12])}"


def _all_expected() -> list[Problem]:
    return [Problem(f"--format {one.name}", f"expects {one.expected}") for one in all_formats()]


def _files(path: Path) -> list[Path]:
    """Some of the files at `path`, those that can be read first."""
    try:
        held = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    except OSError:
        return []
    return sorted(held, key=lambda one: one.suffix not in (".jsonl", ".parquet"))[:_LOOKED_AT]
