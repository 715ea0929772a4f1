"""open-instruct's rollouts: `--save_traces --rollouts_save_path D`, one line a response, 10,000 to a shard.

Read in allenai/open-instruct: `RolloutRecord` and `_save_rollouts` of `open_instruct/rl_utils.py` @ 00feb3a5,
`advantage_normalization_type` of `open_instruct/data_loader.py`:

- `{run}_rollouts_{shard:06d}.jsonl` and `{run}_metadata.jsonl` (run name, commit, model, time).
- `logprobs` are vLLM's, of the response tokens alone and one for each: position t is token t.
- Two threads append to the shards, so steps may interleave, and a step may go on in the next shard.
- A run that was restarted from a checkpoint appends the same steps again: the later ones are what it went on from.
- `prompt_idx` counts within a step. `reward` is before normalisation; the KL term is in the loss and not here.
- What tools wrote into a response is not marked: `request_info.tool_calleds` tells that there is some.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import BETA, KL, KL_ESTIMATOR, NORMALISATION, conventions_from
from kedge.importers.records import first_record, records
from kedge.importers.sequences import (
    Malformed,
    Sampled,
    cut,
    nothing_found,
    number,
    numbers,
    rows_of,
    token_ids,
    told_normalisation,
)
from kedge.trace.foreign import Conventions, Rows

FILE = r"(.+)_rollouts_(\d{6,})\.jsonl"
FIELDS = (
    "step",
    "sample_idx",
    "prompt_idx",
    "prompt_tokens",
    "response_tokens",
    "reward",
    "advantage",
    "finish_reason",
)
EPSILON = 1e-8
STOP = "stop"  # vLLM's finish_reason for EOS and stop strings; "length" is the budget


@dataclass
class _Index:
    """Where the lines of each step are: (file, number of the line, first byte), the last one for each sample."""

    steps: dict[int, dict[int, tuple[Path, int, int]]] = field(default_factory=dict)
    again: int = 0  # lines that a later one replaces


def recognises(path: Path) -> bool:
    """True for a rollout shard, or a folder of them."""
    found = _shards(path)
    record = first_record(found[0][2]) if found else None
    return record is not None and set(FIELDS) <= set(record)


def conventions(path: Path, answers: Answers) -> Conventions:
    """The KL of open-instruct's GRPO is a term of the loss; its metric is a mean over tokens."""
    return conventions_from(
        answers,
        trainer=" ".join(("open-instruct", *_about(path))),
        kl_unit="per token",
        score_position="last",
        epsilon=EPSILON,
        critic=False,
    )


def told(path: Path) -> Answers:
    """What the first step of the first shard shows of the advantage. Raises InputError where it cannot be read."""
    shards = [shard for _, _, shard in _shards(path)]
    first = next(_steps(_indexed(shards[:1]), Intake()), None)
    return {} if first is None else told_normalisation(first)


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """The steps in order, wherever their lines are. Reads the shards twice: once for the places, once for the rows."""
    found = _shards(path)
    if not found:
        raise nothing_found(path, "holds no {run}_rollouts_{shard}.jsonl", FORMAT.expected)
    if len(runs := sorted({run for run, _, _ in found})) > 1:
        what = f"holds rollouts of {len(runs)} runs: {', '.join(runs)}"
        raise InputError(Problem(str(path), what, "put the files of one run into a folder of their own"))
    index = _indexed(list(intake.files([shard for _, _, shard in found])))
    if index.again:
        intake.note(f"{index.again} rows were written again after a restart; the later ones are read")
    yield from _steps(index, intake)


def _shards(path: Path) -> list[tuple[str, int, Path]]:
    """Run, number and path of each shard under `path`, or of the one that it is. Raises nothing."""
    try:
        paths = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
    except OSError:
        return []
    matches = ((re.fullmatch(FILE, one.name), one) for one in paths)
    return sorted((match[1], int(match[2]), one) for match, one in matches if match)


def _about(path: Path) -> tuple[str, ...]:
    """Commit and model, where the metadata file is there."""
    found = _shards(path)
    if not found:
        return ()
    run, _, shard = found[0]
    about = first_record(shard.with_name(f"{run}_metadata.jsonl")) or {}
    named = {"git_commit": "commit", "model_name": "model"}
    return tuple(f"{word} {about[key]}" for key, word in named.items() if isinstance(about.get(key), str))


def _indexed(shards: list[Path]) -> _Index:
    """Places of all lines. Raises InputError for a torn line and for one of another format."""
    index = _Index()
    for shard in shards:
        offsets = _line_starts(shard)
        for where, record in records(shard, FIELDS):
            line = int(where.rpartition(":")[2])
            step, sample = record["step"], record["sample_idx"]
            if not isinstance(step, int) or not isinstance(sample, int):
                raise InputError(
                    Problem(where, "step and sample_idx are whole numbers", f"expected: {FORMAT.expected}")
                )
            places = index.steps.setdefault(step, {})
            index.again += sample in places
            places[sample] = (shard, line, offsets[line - 1])
    return index


def _line_starts(shard: Path) -> list[int]:
    with shard.open("rb") as stream:
        starts = [0]
        starts.extend(starts[-1] + len(line) for line in stream)
    return starts


def _steps(index: _Index, intake: Intake) -> Iterator[Rows]:
    for step in sorted(index.steps):
        sampled = []
        for where, record in _lines(index.steps[step]):
            intake.rows += 1
            try:
                sampled.append(_sampled(record, intake))
            except Malformed as fault:
                intake.leave_out(where, str(fault))
        if sampled:
            yield rows_of(step, sampled, intake)


def _lines(places: Mapping[int, tuple[Path, int, int]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of one step in order of the samples."""
    for shard, line, start in (places[sample] for sample in sorted(places)):
        with shard.open("rb") as stream:
            stream.seek(start)
            yield f"{shard}:{line}", json.loads(stream.readline())


def _sampled(record: Mapping[str, Any], intake: Intake) -> Sampled:
    prompt = token_ids(record["prompt_tokens"], "prompt_tokens")
    response = token_ids(record["response_tokens"], "response_tokens")
    ids = np.concatenate((prompt, response))
    columns = {"advantage": np.full(len(ids), number(record["advantage"], "advantage"))}
    if record.get("logprobs") is not None:
        sampler = numbers(record["logprobs"], "logprobs", len(response))
        columns["behaviour_logprob"] = np.concatenate((np.full(len(prompt), np.nan), sampler))
    if (record.get("request_info") or {}).get("tool_calleds"):
        intake.note("some responses hold what a tool wrote; the file does not mark it, so it counts as the policy's")
    return cut(
        ids,
        np.arange(len(ids)) >= len(prompt),
        columns,
        score=number(record["reward"], "reward"),
        ended=record["finish_reason"] == STOP,
        group=record["prompt_idx"],
    )


FORMAT = Format(
    name="open-instruct",
    title="open-instruct rollouts",
    recognises=recognises,
    expected="{run}_rollouts_{shard}.jsonl with step, sample_idx, prompt_idx, prompt_tokens, response_tokens, reward, "
    "advantage, finish_reason (and logprobs)",
    asks=(KL, KL_ESTIMATOR, BETA, NORMALISATION),
    read=read,
    conventions=conventions,
    fields=FIELDS,
    told=told,
)
