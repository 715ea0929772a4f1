"""Taking the words out of a run on disk: texts become hashes or go, token ids and token strings go, numbers stay.

In place, files are replaced one by one, each at once; the same command takes up a redaction that was cut short.
What this module does not know how to redact is removed where Kedge can make it again, and refused otherwise.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kedge.errors import InputError, Problem
from kedge.trace.jsonl import Record, cannot_write, read_json_lines, write_atomically
from kedge.trace.labels import FOLDER as LABELS
from kedge.trace.labels import digest
from kedge.trace.reader import read_table
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import METADATA_KEY
from kedge.trace.writer import write_table

if TYPE_CHECKING:
    import pyarrow as pa

Mode = Literal["hashed", "none"]
Change = Callable[[str | None], str | None]
TEXTS = ("prompt", "response", "reference_response")
SPELT = ("prompt_ids", "response_ids", "response_tokens")  # they spell the text out
STRICTNESS = ("full", "hashed", "none")
MODELS = ("models", "checkpoints")
NUMBERS = (
    *("recipe.toml", "recipe.json", "manifest.json", "metrics.jsonl", "timings.jsonl", "events.jsonl"),
    *("rollback.json", "truth/evaluation.jsonl", "branch.json"),
)
PAIRS = ("prompt", "chosen", "rejected")
_HASH = re.compile("[0-9a-f]{16}")
_TRACE = re.compile(r"(step|probes|samples)-\d{6,}\.parquet")
_BRANCH = re.compile(r"branches/\d+/(.+)")
_PAGE = re.compile(r"<title>[^<]*· Kedge</title>")


@dataclass
class Redaction:
    """What was done; paths are relative to the run."""

    text: str | None  # what stays of texts; None where nothing was asked of them
    rewritten: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)  # they held no more than was asked for
    removed: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)  # not in the new folder
    models: list[str] = field(default_factory=list)  # folders that were not touched: weights may remember texts


def redact(path: Path, *, text: Mode | None, keep: int | None = None, out: Path | None = None) -> Redaction:
    """Take texts out of the run in folder `path`, and old steps where `keep` says how many newest stay.

    With `out` the redacted run is a new folder and the old one stays as it is. Raises `InputError` where the folder is
    no run, a run under way, or holds files that may hold text and are not Kedge's.
    """
    source = RunDir(path)
    manifest = source.read_manifest()
    if out is None and manifest.get("status") == "running" and text is not None:
        what = "the run is under way, or was killed; what it writes next would hold text again"
        raise InputError(Problem(str(path), what, "stop it first (Ctrl-C ends it in order), or give --out for a copy"))
    sorted_files = _Sorted.of(path)
    if out is None and sorted_files.unknown and text is not None:
        what = "may hold text, and Kedge does not know this file"
        remedy = "move it away or remove it, or give --out: a new folder leaves it behind"
        raise InputError([Problem(str(path / name), what, remedy) for name in sorted_files.unknown])
    done = Redaction(None if text is None else _stricter(manifest.get("text"), text), models=sorted_files.models)
    place = path if out is None else _new_folder(out)
    gone = {str(file.relative_to(path)) for _, file in source.files("step")[:-keep]} if keep else set()
    _mark(place, manifest, text, "under way")
    if out is None and text is not None:
        _remove(path, [*sorted_files.hidden, *sorted_files.pages], done)
    if out is None:
        _remove(path, sorted(gone), done)
    else:
        done.left_behind = [*sorted_files.unknown, *sorted_files.pages, *sorted_files.models, *sorted(gone)]
    for name in sorted_files.known if text is not None or out is not None else ():
        if name not in gone and name != "manifest.json":
            _redact_file(path, place, name, text, done)
    if keep:
        _forget_labels(place, done)
    _mark(place, manifest, text, "done")
    return done


def _mark(place: Path, manifest: Record, text: Mode | None, status: str) -> None:
    """Say in the manifest what the run keeps of texts: while a redaction is under way, and when it is done."""
    changes: dict[str, Any] = {}
    if text is not None:
        changes = {"text": _stricter(manifest.get("text"), text), "redaction": status}
    RunDir(place).write_manifest({**manifest, **changes})


def _stricter(before: object, text: Mode) -> str:
    """What is left of texts after both."""
    known = str(before) if before in STRICTNESS else "full"
    return max(known, text, key=STRICTNESS.index)


def _new_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except OSError as error:
        raise cannot_write(out, error) from error
    if occupied:
        what = "the folder is not empty; nothing was overwritten"
        raise InputError(Problem(f"--out {out}", what, "choose another, or remove what a redaction left half done"))
    return out


@dataclass(frozen=True)
class _Sorted:
    """The files of a run by what is done with them; names are relative."""

    known: list[str]
    pages: list[str]  # Kedge makes them again
    hidden: list[str]  # half-written files of a process that was killed
    models: list[str]
    unknown: list[str]

    @classmethod
    def of(cls, path: Path) -> _Sorted:
        found = cls([], [], [], [], [])
        found.models.extend(name for name in MODELS if any((path / name).glob("*")))
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if name.split("/")[0] in MODELS or (file.is_dir() and not file.is_symlink()):
                continue
            found._list_for(file, name).append(name)
        return found

    def _list_for(self, file: Path, name: str) -> list[str]:
        within = _BRANCH.fullmatch(name)
        inner = within[1] if within else name
        if any(part.startswith(".") and part.endswith(".tmp") for part in name.split("/")):
            return self.hidden
        if file.is_symlink():
            return self.unknown
        if inner in (*NUMBERS, "pairs.jsonl") or re.fullmatch(r"trials/[^/]+\.json", name):
            return self.known
        if re.fullmatch(rf"{LABELS}/[^/]+\.parquet", name):
            return self.known
        if inner.startswith("trace/") and _TRACE.fullmatch(file.name) and inner.count("/") == 1:
            return self.known
        return self.pages if inner in ("report.html", "diagnosis.html") or _is_page(file) else self.unknown


def _is_page(file: Path) -> bool:
    """Whether Kedge wrote this page."""
    if file.suffix.lower() not in (".html", ".htm"):
        return False
    with file.open(encoding="utf-8", errors="replace") as stream:
        return _PAGE.search(stream.read(4096)) is not None


def _remove(path: Path, names: list[str], done: Redaction) -> None:
    for name in names:
        (path / name).unlink(missing_ok=True)
        done.removed.append(name)


def _redact_file(source: Path, place: Path, name: str, text: Mode | None, done: Redaction) -> None:
    """One file from `source` to `place`, which may be the same folder."""
    target = place / name
    target.parent.mkdir(parents=True, exist_ok=True)
    content: bytes | pa.Table | None = None
    if text is not None:
        if _TRACE.fullmatch(target.name):
            content = _table(source / name, text)
        elif target.name == "pairs.jsonl":
            content = _pairs(source / name, text)
        elif target.name == "events.jsonl":
            content = _events(source / name)
        elif name == "recipe.json":
            content = _recipe(source / name, text)
    if content is None:
        done.already.append(name)
        if place != source:
            _copy(source / name, target)
        return
    done.rewritten.append(name)
    if isinstance(content, bytes):
        write_atomically(target, content)
    else:
        write_table(content, target)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise cannot_write(target, error) from error


def _table(path: Path, text: Mode) -> pa.Table | None:
    """The table without its texts, all other columns as they were; None where it holds no more than is asked for."""
    import pyarrow as pa

    table = read_table(path)
    before = _kept(table)
    if STRICTNESS.index(before) >= STRICTNESS.index(text):
        return None
    change = _change(text, hashed=before == "hashed")
    for name in TEXTS:
        if name in table.column_names:
            values = [change(value) for value in table.column(name).to_pylist()]
            table = table.set_column(table.column_names.index(name), table.field(name), pa.array(values, pa.string()))
    for name in SPELT:
        if name in table.column_names:
            at = table.column_names.index(name)
            table = table.set_column(at, table.field(name), pa.nulls(len(table), table.field(name).type))
    metadata = dict(table.schema.metadata or {})
    about = json.loads(metadata.get(METADATA_KEY, b"{}")) | {"text": text}
    return table.replace_schema_metadata({**metadata, METADATA_KEY: json.dumps(about, sort_keys=True)})


def _kept(table: pa.Table) -> str:
    """What a file keeps of texts: as it says, or as it looks. A file that spells a text out keeps it in full."""
    columns = [table.column(name) for name in TEXTS if name in table.column_names]
    if any(table.column(name).null_count < len(table) for name in SPELT if name in table.column_names):
        return "full"
    said = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}")).get("text")
    if said in STRICTNESS:
        return str(said)
    known = [value for column in columns for value in column.to_pylist() if value is not None]
    if not known:
        return "none"
    return "hashed" if all(_HASH.fullmatch(value) for value in known) else "full"


def _change(text: Mode, *, hashed: bool = False) -> Change:
    """What becomes of a text; a hash stays one."""
    if text == "none":
        return lambda _: None
    if hashed:
        return lambda value: value
    return lambda value: None if value is None else digest(value)


def _pairs(path: Path, text: Mode) -> bytes | None:
    """`pairs.jsonl` with its prompts, which may be conversations, and its answers as hashes, or nothing."""
    lines = read_json_lines(path)
    said = {line.get("text", "full") for line in lines}
    if said <= set(STRICTNESS[STRICTNESS.index(text) :]):
        return None
    return "".join(_pair(line, text) + "\n" for line in lines).encode()


def _pair(line: Mapping[str, Any], text: Mode) -> str:
    before = line.get("text", "full")
    if STRICTNESS.index(before) >= STRICTNESS.index(text):
        return json.dumps(line)
    change = _change(text, hashed=before == "hashed")

    def of(value: Any) -> str | None:
        return change(value if isinstance(value, str) or value is None else json.dumps(value, sort_keys=True))

    return json.dumps({name: of(line.get(name)) for name in PAIRS} | {"text": text})


def _events(path: Path) -> bytes | None:
    """What happened, without what a row that was left out held."""
    lines = read_json_lines(path)
    changed = [
        {**line, "message": str(line.get("message")).partition("; first:")[0]}
        if line.get("event") == "rejected_rows"
        else line
        for line in lines
    ]
    if changed == lines:
        return None
    return "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in changed).encode()


def _recipe(path: Path, text: Mode) -> bytes | None:
    """The resolved recipe, by which a run goes on: it must not write texts again."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    trace = settings.get("trace") if isinstance(settings, dict) else None
    if not isinstance(trace, dict) or _stricter(trace.get("text"), text) == trace.get("text"):
        return None
    trace["text"] = text
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _forget_labels(place: Path, done: Redaction) -> None:
    """Drop labels of steps that are gone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    there = pa.array([step for step, _ in RunDir(place).files("step")], pa.int32())
    for file in sorted((place / LABELS).glob("*.parquet")):
        table = read_table(file)
        kept = table.filter(pc.is_in(table.column("step"), value_set=there))
        if len(kept) < len(table):
            write_table(kept, file)
            done.rewritten.append(file.relative_to(place).as_posix())
