"""Writing the trace off the hot path: the loop hands over padded arrays, a thread turns them into Parquet.

Dimensions: B responses, P prompt tokens, T response tokens, C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kedge.trace.jsonl import cannot_write, temporary_name
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import (
    METADATA_KEY,
    OPTIONAL,
    TOKEN_FLOATS,
    TRUST,
    VERSION,
    probe_schema,
    sample_schema,
    step_schema,
)

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]
TextMode = Literal["full", "hashed", "none"]
Texts = Sequence[str] | None
_QUEUE = 4  # tables waiting to be written; a loop that is further ahead waits, so memory stays bounded


@dataclass(frozen=True)
class StepRecord:
    """Everything one policy step leaves behind, as padded numpy arrays.

    Prompts are padded on the left, responses on the right. `response_mask` may have holes. `advantage` is the one
    training used, `(sum_c weights * GAE_c - shift) / scale`; only its sums are stored, as a digest.
    """

    step: int
    policy_version: int
    channels: tuple[str, ...]
    gamma: float
    lam: float
    critic: str  # "channels", "scalar", or "none" where values are a baseline
    group: Array  # [B]
    prompt_ids: Array | None  # [B, P]; None where ids are not known
    prompt_mask: Array | None  # [B, P] bool
    response_ids: Array | None  # [B, T]
    response_mask: Array  # [B, T] bool
    ended: Array  # [B] bool
    behaviour_logprob: Array  # [B, T] nats
    old_logprob: Array  # [B, T] nats
    reference_logprob: Array  # [B, T] nats
    new_logprob: Array  # [B, T] nats, last epoch
    active: Array  # [B, T] bool, last epoch: the clip let the gradient through
    old_eos_logprob: Array  # [B, T] nats
    reference_eos_logprob: Array  # [B, T] nats
    entropy: Array  # [B, T] nats
    rewards: Array  # [B, T, C] channel units
    values: Array  # [B, T, C] channel units
    weights: Array  # [B, C] reward per channel unit
    shift: Array  # [B] reward
    scale: Array  # [B] reward
    advantage: Array  # [B, T]
    loss_beta: Array  # [B] advantage per nat, of a KL term in the loss
    learning: Mapping[str, Any]  # what the optimiser was told: clip, epochs, aggregation, coefficients of its loss
    prompts: Texts = None  # [B] texts
    responses: Texts = None  # [B] texts
    members: Array | None = None  # [B, M] normalised scores of a reward model's members, where it has several
    disagreement: Array | None = None  # [B] normalised score; nan where it is not known
    support_distance: Array | None = None  # [B] Mahalanobis
    absent: frozenset[str] = frozenset()  # of schema.OPTIONAL, what the trainer does not tell; its floats are nan

    def __post_init__(self) -> None:
        if unknown := self.absent - set(OPTIONAL):
            raise ValueError(f"{sorted(unknown)} cannot be absent")
        batch, length = self.response_mask.shape
        width = len(self.channels)
        shapes = {
            **dict.fromkeys(("response_ids", "active", "advantage", *TOKEN_FLOATS), (batch, length)),
            **dict.fromkeys(("rewards", "values"), (batch, length, width)),
            **dict.fromkeys(("group", "ended", "shift", "scale", "loss_beta"), (batch,)),
            "weights": (batch, width),
            "prompt_mask": None if self.prompt_ids is None else self.prompt_ids.shape,
            "members": (batch, self.member_count),
            **dict.fromkeys(TRUST, (batch,)),
        }
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} has shape {given.shape}, expected {shape}")

    @property
    def member_count(self) -> int:
        """How many members of a reward model have scores of their own."""
        return 0 if self.members is None else self.members.shape[-1]


@dataclass(frozen=True)
class ProbeRecord:
    """Scores of the fixed probe answers after `step` updates; one entry per probe prompt and variant."""

    step: int
    beta: float  # reward per nat, in force
    probe: Sequence[int]
    variant: Sequence[str]  # "brief", "verbose" or "reference"
    length: Sequence[int]  # tokens
    score: Sequence[float]  # normalised
    logprob: Sequence[float]  # nats, sum over the response
    reference_logprob: Sequence[float]  # nats, sum over the response
    reference_length: Sequence[float]  # tokens, mean of the reference's samples on the prompt
    tercile: Sequence[int]
    prompt: Texts = None
    response: Texts = None


@dataclass(frozen=True)
class SampleRecord:
    """Answers of one evaluation, the policy's beside the reference's; one entry per evaluation prompt."""

    step: int
    prompt: Texts
    response: Texts
    reference_response: Texts
    response_tokens: Sequence[Sequence[str]] | None
    token_kl: Sequence[Sequence[float]]  # k1 nats, one per response token
    score: Sequence[float]
    reference_score: Sequence[float]
    reference_kl: Sequence[float]  # nats, of the policy on the reference's answer
    length: Sequence[int]
    reference_tokens: Sequence[int]  # of the reference's answer
    reference_length: Sequence[float]  # that the reference usually takes
    tercile: Sequence[int]


class TraceWriter:
    """Writes Parquet files of a run in a thread of its own.

    `text` says what is kept of prompts and responses: "full"; "hashed" (16 hex digits of SHA-256, so that equal texts
    stay equal); "none". Token ids and token strings spell the text out, so only "full" keeps them. `keep` newest step
    files stay, 0 keeps all.

    A failure in the thread is raised by the next call, or by `flush` or `close`: InputError with path and remedy when
    the disk is at fault. Arrays handed over must not be changed afterwards.
    """

    def __init__(self, run: RunDir, *, text: TextMode = "full", keep: int = 0) -> None:
        self._run, self._text, self._keep = run, text, keep
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=_QUEUE)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kedge-trace", daemon=True)
        self._thread.start()

    def write_step(self, record: StepRecord) -> None:
        """Queue the rows of one policy step."""
        self._put(lambda: self.store(record))

    def write_probes(self, record: ProbeRecord) -> None:
        """Queue the probe answers after `record.step` updates."""
        self._put(lambda: write_table(probe_table(record, self._text), self._run.probes_file(record.step)))

    def write_samples(self, record: SampleRecord) -> None:
        """Queue the evaluation samples after `record.step` updates."""
        self._put(lambda: write_table(sample_table(record, self._text), self._run.samples_file(record.step)))

    def run(self, job: Callable[[], None]) -> None:
        """Queue other work of the trace: it keeps its place among the files, and a failure is raised like theirs."""
        self._put(job)

    def flush(self) -> None:
        """Wait until everything queued is on disk. Call it before a checkpoint: what the checkpoint says is done
        must survive a kill."""
        self._jobs.join()
        self._raise()

    def close(self) -> None:
        """Write what is queued and end the thread; safe to call twice."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._raise()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # an error on its way out must not be replaced
                raise

    def _put(self, job: Callable[[], None]) -> None:
        self._raise()
        if not self._thread.is_alive():
            raise ValueError("the trace writer is closed")
        self._jobs.put(job)

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                if self._failure is None:
                    job()
            except BaseException as error:  # handed to the caller
                self._failure = error
            finally:
                self._jobs.task_done()

    def store(self, record: StepRecord) -> None:
        """Write the rows of one policy step here and now; for jobs that `run` queues."""
        write_table(step_table(record, self._text), self._run.step_file(record.step))
        if self._keep:
            for _, path in self._run.files("step")[: -self._keep]:
                path.unlink()


def step_table(record: StepRecord, text: TextMode = "full") -> pa.Table:
    """The rows of `trace/step-*.parquet`, with the metadata a reader needs to derive advantages."""
    import pyarrow as pa

    batch = len(record.ended)
    mask = record.response_mask.astype(bool)
    context = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    advantage = np.where(mask, record.advantage, 0).astype(np.float64)
    full = text == "full"
    columns: dict[str, Any] = {
        "step": np.full(batch, record.step),
        "row": np.arange(batch),
        "group": record.group,
        "policy_version": np.full(batch, record.policy_version),
        "prompt": _texts(record.prompts, text, batch),
        "response": _texts(record.responses, text, batch),
        "prompt_ids": _ids(record.prompt_ids, record.prompt_mask) if full else None,
        "response_ids": _ids(record.response_ids, context) if full else None,
        "response_mask": _ragged(mask, context, pa.bool_()),
        "ended": record.ended.astype(bool),
        "active": _ragged(record.active.astype(bool), context, pa.bool_()),
        **{
            name: None if name in record.absent else _ragged(getattr(record, name), context, pa.float32())
            for name in TOKEN_FLOATS
        },
        "shift": record.shift,
        "scale": record.scale,
        "loss_beta": record.loss_beta,
        "advantage_sum": advantage.sum(axis=1),
        "advantage_abs_sum": np.abs(advantage).sum(axis=1),
        **{name: _nullable(getattr(record, name)) for name in TRUST},
    }
    for index, channel in enumerate(record.channels):
        columns[f"reward.{channel}"] = _ragged(record.rewards[..., index], context, pa.float32())
        columns[f"value.{channel}"] = _ragged(record.values[..., index], context, pa.float32())
        columns[f"weight.{channel}"] = record.weights[:, index]
    if record.members is not None:
        columns |= {f"member.{member}": scores for member, scores in enumerate(record.members.T)}
    table = _table(columns, step_schema(record.channels, record.member_count), batch)
    about = {name: getattr(record, name) for name in ("step", "channels", "gamma", "lam", "critic")}
    about |= {"members": record.member_count, "learning": dict(record.learning)}
    if record.absent:
        about["absent"] = sorted(record.absent)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({"schema": VERSION, **about}, sort_keys=True)})


def probe_table(record: ProbeRecord, text: TextMode = "full") -> pa.Table:
    """The rows of `trace/probes-*.parquet`."""
    count = len(record.probe)
    columns: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    kl = np.asarray(record.logprob, np.float64) - np.asarray(record.reference_logprob, np.float64)
    columns |= {
        "step": np.full(count, record.step),
        "beta": np.full(count, record.beta),
        "kl": kl,
        "prompt": _texts(record.prompt, text, count),
        "response": _texts(record.response, text, count),
    }
    return _table(columns, probe_schema(), count)


def sample_table(record: SampleRecord, text: TextMode = "full") -> pa.Table:
    """The rows of `trace/samples-*.parquet`."""
    count = len(record.score)
    columns: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    columns |= {
        "step": np.full(count, record.step),
        "kl": np.array([np.sum(values, dtype=np.float64) for values in record.token_kl]),
        **{name: _texts(getattr(record, name), text, count) for name in ("prompt", "response", "reference_response")},
        "response_tokens": record.response_tokens if text == "full" else None,
    }
    return _table(columns, sample_schema(), count)


def _table(columns: dict[str, Any], schema: pa.Schema, count: int) -> pa.Table:
    import pyarrow as pa

    def column(field: pa.Field) -> pa.Array:
        given = columns[field.name]
        if given is None:
            return pa.nulls(count, field.type)
        if isinstance(given, pa.Array):
            return given
        if isinstance(given, np.ndarray):
            return pa.array(given).cast(field.type, safe=False)
        return pa.array([_listed(value) for value in given], field.type)

    return pa.Table.from_arrays([column(field) for field in schema], schema=schema)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _ragged(padded: Array, keep: Array, kind: pa.DataType) -> pa.Array:
    """A list column with, for each row of `padded` [B, T], the entries at which `keep` [B, T] is true."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    flat = np.ascontiguousarray(padded[keep]).astype(kind.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind))


def _ids(padded: Array | None, keep: Array | None) -> pa.Array | None:
    """A list column of token ids, None where they are not known."""
    import pyarrow as pa

    return None if padded is None or keep is None else _ragged(padded, keep.astype(bool), pa.int32())


def _nullable(values: Array | None) -> pa.Array | None:
    """Floats with null for nan."""
    import pyarrow as pa

    return None if values is None else pa.array(values.astype(np.float32), from_pandas=True)


def _texts(texts: Texts, mode: TextMode, count: int) -> pa.Array:
    import pyarrow as pa

    if texts is None or mode == "none":
        return pa.nulls(count, pa.string())
    if mode == "hashed":
        texts = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16] for text in texts]
    return pa.array(list(texts), pa.string())


def write_table(table: pa.Table, path: Path) -> None:
    """Replace a Parquet file of a run at once. Raises InputError when the disk is full or read-only."""
    import pyarrow.parquet as pq

    temporary = temporary_name(path)
    try:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=["prompt", "variant"])
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of the failure itself, the same disk's
            temporary.unlink()
        raise cannot_write(path, error) from error
