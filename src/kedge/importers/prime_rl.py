"""prime-rl's token exports: `trainer.enable_token_export` writes what the trainer's forward pass saw, per token.

Read in PrimeIntellect-ai/prime-rl: `src/prime_rl/trainer/rl/token_export.py` @ d2f82fa6 and @ 004274ec (schema version
1), `shift_tensor_right` and `compute_loss` of `src/prime_rl/trainer/rl/loss.py`:

- `token_exports/step_{n}/rank_{r}.jsonl`; the marker STABLE appears when every rank has written the step.
- A record is one packed sequence of prompts and responses. `position_ids` begin again at 0 where another starts.
- The log-probability of token t stands at position t (shifted right after the forward pass). `trainer_logprobs` are of
  the policy that is being updated, `inference_logprobs` of the sampler; the loss takes the ratio of the two.
- `loss_mask` is true on the policy's tokens. Where `rl_weights` are given they scale the advantage, and a token with 0
  belongs to another part of the loss.
- `is_masked` is true on tokens that the loss left out because policy and sampler were too far apart.
- Numbers that are not finite are null. Exports hold no reward (later ones may: `rewards`, repeated on each token), no
  text, and no number of the prompt: responses to the same prompt tokens are a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import KL, conventions_from
from kedge.importers.records import first_record, numbered, records
from kedge.importers.sequences import (
    NO_TOKEN,
    Malformed,
    Sampled,
    cut,
    flags,
    nothing_found,
    numbers,
    rows_of,
    token_ids,
    told_normalisation,
)
from kedge.trace.foreign import Conventions, Rows

STEP = r"step_(\d+)"
FILE = r"rank_(\d+)\.jsonl"
STABLE = "STABLE"
VERSION = 1
FIELDS = ("schema_version", "step", "token_ids", "position_ids", "loss_mask", "inference_logprobs", "trainer_logprobs")
COLUMNS: Mapping[str, str] = {
    "inference_logprobs": "behaviour_logprob",
    "trainer_logprobs": "old_logprob",
    "entropy": "entropy",
    "advantages": "advantage",
}


def recognises(path: Path) -> bool:
    """True for a folder with token_exports, one of its steps, or one rank's file."""
    found = [file for _, folder in _steps(path) for _, file in numbered(folder, FILE)]
    record = first_record(found[0]) if found else None
    return record is not None and set(FIELDS) <= set(record)


def conventions(path: Path, answers: Answers) -> Conventions:
    """A KL to a reference, where there is one, is a part of the loss with a weight per token, not a beta.

    What made the advantage is known only where rewards are exported, and then the first step shows it.
    """
    first = next(read(path, {}, Intake()), None)
    shown = {} if first is None else told_normalisation(first)
    return conventions_from(
        {"normalisation": "unknown", **answers, **shown},
        trainer="prime-rl",
        kl_unit="per token",
        score_position="last",
        critic=False,
    )


def told(path: Path) -> Answers:
    """Whether the first record has a KL to a reference."""
    found = [file for _, folder in _steps(path) for _, file in numbered(folder, FILE)]
    record = first_record(found[0]) if found else None
    weights = (record or {}).get("ref_kl_weights")
    return {"kl": "loss" if any(weights) else "none"} if isinstance(weights, list) else {}


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """One step per folder; the files of all ranks are one step. Steps still being written are left out and told."""
    found = _steps(path)
    if not found:
        raise nothing_found(path, "holds no token_exports/step_{n}", FORMAT.expected)
    written = [(step, folder) for step, folder in found if (folder / STABLE).exists()]
    for step, _ in found:
        if step not in dict(written):
            intake.note(f"step {step} has no {STABLE} marker: it is still being written, and was left out")
    if not written:
        what = f"no step has the marker {STABLE}: all are still being written"
        raise InputError(Problem(str(path), what, "wait for the trainer, or copy the folder with its markers"))
    folders = {folder: step for step, folder in written}
    for folder in intake.files(list(folders)):
        sampled = [row for _, file in numbered(folder, FILE) for row in _file(file, folders[folder], intake)]
        if sampled:
            yield rows_of(folders[folder], sampled, intake)


def _steps(path: Path) -> list[tuple[int, Path]]:
    """Step folders under an output folder, a token_exports folder, or the one that is, or holds, `path`."""
    try:
        if path.is_file():
            path = path.parent
        if match := re.fullmatch(STEP, path.name):
            return [(int(match[1]), path)] if numbered(path, FILE) else []
        inside = path / "token_exports"
        return [(step, one) for step, one in _numbered_folders(inside if inside.is_dir() else path)]
    except OSError:
        return []


def _numbered_folders(path: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(STEP, one.name), one) for one in (path.iterdir() if path.is_dir() else ()))
    return sorted((int(match[1]), one) for match, one in matches if match and numbered(one, FILE))


def _file(file: Path, step: int, intake: Intake) -> Iterator[Sampled]:
    for where, record in records(file, FIELDS):
        _expect(where, record, step)
        try:
            sampled = _unpacked(record, intake)
        except Malformed as fault:
            intake.rows += 1
            intake.leave_out(where, str(fault))
        else:
            intake.rows += len(sampled)
            yield from sampled


def _expect(where: str, record: Mapping[str, Any], step: int) -> None:
    """Raise InputError for another schema version, or a record of another step."""
    if record["schema_version"] != VERSION:
        what = f"schema version {record['schema_version']!r}; this Kedge reads {VERSION}"
        raise InputError(Problem(where, what, "install a newer Kedge"))
    own = record.get("export_step", record["step"])
    if own != step:
        what = f"its step is {own!r}, the folder's name says {step}"
        raise InputError(Problem(where, what, "files of two steps or runs were put together; take them from a copy"))


def _unpacked(record: Mapping[str, Any], intake: Intake) -> list[Sampled]:
    """The sequences that the record packs. One without a trained token is padding, unless it is the only one."""
    ids = token_ids(record["token_ids"], "token_ids")
    length = len(ids)
    mask = flags(record["loss_mask"], "loss_mask", length)
    columns = {
        column: numbers(record[name], name, length)
        for name, column in COLUMNS.items()
        if not _all_null(record.get(name))
    }
    if not _all_null(record.get("is_masked")):
        columns["active"] = mask & ~flags(record["is_masked"], "is_masked", length)
    if not _all_null(record.get("rl_weights")):
        weights = numbers(record["rl_weights"], "rl_weights", length)
        mask = mask & (weights != 0)
        if "advantage" in columns:
            columns["advantage"] = columns["advantage"] * weights
    if not _all_null(record.get("rewards")):
        columns["reward"] = numbers(record["rewards"], "rewards", length)
    if any(record.get("ref_kl_weights") or ()):
        intake.note("there are ref_kl_weights: a KL to a reference was in the loss, with a weight for each token")
    starts = np.flatnonzero(numbers(record["position_ids"], "position_ids", length) == 0)
    edges = [0, *starts[starts > 0].tolist(), length]
    pieces = [slice(*edge) for edge in pairwise(edges) if mask[slice(*edge)].any()]
    if not pieces:
        raise Malformed(NO_TOKEN)
    return [_piece(ids[at], mask[at], {name: values[at] for name, values in columns.items()}) for at in pieces]


def _piece(ids: NDArray[Any], mask: NDArray[Any], columns: dict[str, NDArray[Any]]) -> Sampled:
    """One sequence; its score is the reward that its tokens repeat."""
    repeated = columns.pop("reward", np.full(len(ids), np.nan))[mask]
    score = float(repeated[0]) if np.ptp(repeated) == 0 else None
    return cut(ids, mask, columns, score=score)


def _all_null(value: Any) -> bool:
    """True for null and for a list of nothing but nulls, which is how an optional column is left out."""
    return value is None or (isinstance(value, list) and all(one is None for one in value))


FORMAT = Format(
    name="prime-rl",
    title="prime-rl token exports",
    recognises=recognises,
    expected="token_exports/step_{n}/rank_{r}.jsonl and STABLE, with token_ids, position_ids, loss_mask, "
    "inference_logprobs, trainer_logprobs",
    asks=(KL,),
    read=read,
    conventions=conventions,
    fields=FIELDS,
    told=told,
)
