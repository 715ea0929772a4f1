"""A file of judgments into the columns that TRL reads, or into the canonical table; in bounded memory.

What the columns cannot hold is left out and counted, never dropped in silence.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kedge.data import columns
from kedge.data.check import Survey
from kedge.data.files import cell_of, new_file
from kedge.data.pairing import group_sizes, paired
from kedge.data.records import Judgment, Message, Preference, Prompt, Verdict
from kedge.data.validate import check_one_kind, outcomes, share_to_allow
from kedge.errors import InputError, Problem

Item = tuple[str, Judgment]
Row = dict[str, Any]
Step = Callable[[int], None]
Watch = Callable[[str], AbstractContextManager[Step | None]]

TARGETS = ("trl", "canonical")
SUFFIXES = (".jsonl", ".parquet", ".csv")
TIE = "a tie, which chosen and rejected cannot say"
LOST = "most votes, or strength, are against chosen"
LOOKS_LIKE_MESSAGES = "text that CSV would give back as a list of messages"


@dataclass(frozen=True)
class Conversion:
    """What was written; `left_out` counts rows by reason, `unsaid` the written rows by the column they had to lose."""

    written: int
    left_out: Mapping[str, int]
    unsaid: Mapping[str, int]


def convert(
    seen: Survey,
    out: Path,
    *,
    to: str = "trl",
    pairs: bool = False,
    max_rejected: float = 0.0,
    watch: Watch = lambda _: nullcontext(),
) -> Conversion:
    """Write the usable rows of the file that `seen` is of to `out`; `pairs` turns other kinds into pairs.

    `max_rejected` is the share of malformed rows to tolerate; `watch` opens each pass over the file, by name, and gives
    what to call with each line number. Raises `InputError` if more rows are malformed, if the kind has no such columns,
    if nothing is left to write, or if `out` is there.
    """
    kind = _kind(seen, max_rejected)
    _check_target(seen, kind, out, to=to, pairs=pairs)
    left_out: Counter[str] = Counter()
    unsaid: Counter[str] = Counter()
    sizes: Counter[bytes] = Counter()
    if pairs and kind in ("rating", "verdict"):
        with watch("group") as step:
            sizes = group_sizes(_judgments(seen.path, step))
    with watch("convert") as step, new_file(out) as temporary:
        items: Iterable[Item] = _judgments(seen.path, step)
        if pairs:
            items = paired(items, sizes, left_out)
        if to == "canonical":
            written = _write_canonical(temporary, items)
        else:
            margin = seen.holds["margin"] == seen.usable if kind == "pair" else kind == "rating"
            rows = _trl_rows(items, left_out, unsaid, with_margin=margin)
            written = _write(temporary, out.suffix.lower(), rows, left_out)
        if not written:
            reasons = "; ".join(f"{rows} rows: {reason}" for reason, rows in left_out.items())
            raise InputError(Problem(str(seen.path), f"nothing is left to write ({reasons})", "use --to canonical"))
    return Conversion(written, dict(left_out), dict(unsaid))


def _kind(seen: Survey, max_rejected: float) -> str:
    """The one kind of the file, if enough of it can be used."""
    path = str(seen.path)
    if not seen.usable or seen.rejected > max_rejected * seen.rows:
        share = share_to_allow(seen.rejected, seen.rows)
        remedy = f"fix them or allow a share with --max-rejected {share}" if seen.usable else "fix them"
        what = f"{seen.rejected} of {seen.rows} rows are rejected"
        raise InputError([*seen.problems, Problem(path, what, remedy)])
    check_one_kind(path, {kind: tally.first for kind, tally in seen.kinds.items()})
    (kind,) = seen.kinds
    return kind


def _check_target(seen: Survey, kind: str, out: Path, *, to: str, pairs: bool) -> None:
    """Raise `InputError` if that kind cannot be written there."""
    suffix = out.suffix.lower()
    allowed = (".parquet",) if to == "canonical" else SUFFIXES
    if suffix not in allowed:
        what = f"the suffix {suffix!r} is not one for --to {to}"
        raise InputError(Problem(str(out), what, f"end the name in {' or '.join(allowed)}"))
    if to == "trl" and kind in ("ranking", "rating") and not pairs:
        remedy = "make pairs of them with --as pairs, or use --to canonical"
        raise InputError(Problem(str(seen.path), f"TRL has no columns for a {kind}", remedy))
    if to == "trl" and len(seen.forms) > 1:
        found = ", ".join(f"{form} first at {tally.first}" for form, tally in seen.forms.items())
        what = f"plain prompts beside conversations ({found}), which one TRL column cannot hold"
        raise InputError(Problem(str(seen.path), what, "split the file, or use --to canonical"))


def _judgments(path: Path, step: Step | None) -> Iterator[Item]:
    """The usable rows."""
    for where, outcome in outcomes(path, columns.judgment):
        if not isinstance(outcome, Problem):
            yield where, outcome
        if step is not None:
            step(int(where.rpartition(":")[2]))


def _trl_rows(
    items: Iterable[Item], left_out: Counter[str], unsaid: Counter[str], *, with_margin: bool
) -> Iterator[Row]:
    """Rows in TRL's columns; a margin only if every pair has one, for TRL cannot read a column with gaps."""
    for _, judgment in items:
        if isinstance(judgment, Verdict):
            prompt, completion = _turns(judgment.prompt, judgment.response)
            unsaid["annotator"] += judgment.annotator is not None
            yield {"prompt": prompt, "completion": completion, "label": judgment.good}
        elif isinstance(judgment, Preference) and judgment.strength <= 0.5:
            left_out[TIE if judgment.strength == 0.5 else LOST] += 1
        elif isinstance(judgment, Preference):
            unsaid.update(_unsaid(judgment, with_margin=with_margin))
            prompt, chosen = _turns(judgment.prompt, judgment.chosen)
            _, rejected = _turns(judgment.prompt, judgment.rejected)
            margin = {"margin": judgment.margin} if with_margin else {}
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected} | margin


def _unsaid(pair: Preference, *, with_margin: bool) -> list[str]:
    """The columns of a pair that TRL does not read."""
    there = {
        "strength": pair.strength < 1,
        "margin": pair.margin is not None and not with_margin,
        "votes": pair.votes is not None,
        "annotator": pair.annotator is not None,
        "shown": pair.shown,
    }
    return [name for name, holds in there.items() if holds]


def _turns(prompt: Prompt, response: str) -> tuple[Any, Any]:
    """Prompt and response as text, or as messages where the prompt is a conversation."""
    if isinstance(prompt, str):
        return prompt, response
    return [_turn(message) for message in prompt], [_turn(Message("assistant", response))]


def _turn(message: Message) -> Row:
    return {"role": message.role, "content": message.content}


def _write(path: Path, suffix: str, rows: Iterator[Row], left_out: Counter[str]) -> int:
    """Write `rows` in the format of `suffix` and return how many there were."""
    if suffix == ".parquet":
        return _write_parquet(path, rows)
    if suffix == ".csv":
        return _write_csv(path, rows, left_out)
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


def _write_csv(path: Path, rows: Iterator[Row], left_out: Counter[str]) -> int:
    """Messages become JSON, which our reader takes back; text that only looks like it cannot be told from it."""
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            if any(isinstance(cell, str) and not isinstance(cell_of(cell), str) for cell in row.values()):
                left_out[LOOKS_LIKE_MESSAGES] += 1
                continue
            if not written:
                writer.writerow(row)
            cells = (json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in row.values())
            writer.writerow(cells)
            written += 1
    return written


def _write_parquet(path: Path, rows: Iterator[Row]) -> int:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    from kedge.data.table import MESSAGES

    first = next(rows, None)
    if first is None:
        return 0
    types = {list: MESSAGES, str: arrow.string(), bool: arrow.bool_(), float: arrow.float64()}
    schema = arrow.schema([(name, types[type(cell)]) for name, cell in first.items()])
    whole = chain([first], rows)
    written = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(whole, 1024)):
            writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema))
            written += len(batch)
    return written


def _write_canonical(path: Path, items: Iterable[Item]) -> int:
    import pyarrow.parquet as parquet

    from kedge.data.table import SCHEMA, batches

    written = 0
    with parquet.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for batch in batches(items):
            writer.write_batch(batch)
            written += batch.num_rows
    return written
