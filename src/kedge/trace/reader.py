"""Reading a run: metrics, rows with their advantages split exactly, probes and samples.

Dimensions: B responses, T response tokens, C channels. Files are opened when asked for, one step at a time.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.trace.advantages import gae
from kedge.trace.jsonl import Record, each_json_line, read_json_lines
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import (
    LATER,
    LATER_SAMPLES,
    METADATA_KEY,
    TOKEN_FLOATS,
    check_version,
    probe_schema,
    sample_schema,
    step_schema,
)

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]
RELATIVE = 1e-3  # of the sum of absolute advantages in the digest
_ROUNDING = 1e-5  # of the sum of absolute parts: float32 sums of terms that cancel
FLOOR = 1e-6
FLOAT32 = 8 * 2.0**-24  # roundings of a token, each of half a unit in the last place


class Series(NamedTuple):
    """One metric over steps: int64 steps and float64 values, nan where the run wrote null."""

    steps: Array
    values: Array


class Part(NamedTuple):
    """One term of the advantage: a channel's reward or critic, or ("whitening", "shift")."""

    channel: str
    source: str

    def __str__(self) -> str:
        return self.channel if self.channel == "whitening" else f"{self.channel} {self.source}"


WHITENING = Part("whitening", "shift")


@dataclass(frozen=True)
class StepTrace:
    """The rows of one policy step, padded on the right with zeros."""

    path: Path
    step: int
    channels: tuple[str, ...]
    gamma: float
    lam: float
    critic: str
    group: Array  # [B]
    prompts: tuple[str | None, ...]
    responses: tuple[str | None, ...]
    response_mask: Array  # [B, T] bool
    ended: Array  # [B] bool
    active: Array  # [B, T] bool
    tokens: Mapping[str, Array]  # names of schema.TOKEN_FLOATS -> [B, T] nats
    rewards: Array  # [B, T, C] channel units
    values: Array  # [B, T, C] channel units
    weights: Array  # [B, C] reward per channel unit
    shift: Array  # [B] reward
    scale: Array  # [B] reward
    advantage_sum: Array  # [B] digest of what training used
    advantage_abs_sum: Array  # [B]
    members: Array  # [B, M] normalised score of each member of a reward model of several, else M = 0
    disagreement: Array  # [B] normalised score, nan where it is not known
    support_distance: Array  # [B] from the reward model's training data, nan where it is not known
    loss_beta: Array  # [B] advantage per nat of a KL term in the loss, nan where it is not known
    learning: Mapping[str, Any]  # what the optimiser was told; empty in older traces
    response_ids: Array | None  # [B, T] token ids, zeros outside the response; None where text is not kept
    absent: frozenset[str] = frozenset()  # of schema.OPTIONAL, what the trainer did not tell; its floats are nan

    def __len__(self) -> int:
        return len(self.ended)

    @property
    def lengths(self) -> Array:
        """[B] tokens the policy produced."""
        return np.asarray(self.response_mask.sum(axis=1))

    @cached_property
    def gae(self) -> Array:
        """[B, T, C] advantage of each channel, in channel units."""
        return gae(self.rewards, self.values, self.response_mask, gamma=self.gamma, lam=self.lam)

    def advantage(self) -> Array:
        """[B, T] the advantage that the policy loss used, zero outside the response mask."""
        total = (self.weights[:, None, :] * self.gae).sum(axis=-1)
        return np.where(self.response_mask, (total - self.shift[:, None]) / self.scale[:, None], 0.0)

    def parts(self) -> dict[Part, Array]:
        """The advantage split by where it came from; the parts [B, T] sum to `advantage()`.

        GAE is linear in rewards and values, so each channel has a reward part (its rewards, values zero) and a critic
        part (its values, rewards zero), both times weight / scale; whitening's shift is the last part.
        """
        nothing = np.zeros_like(self.rewards)
        factor = (self.weights / self.scale[:, None])[:, None, :]
        reward = factor * gae(self.rewards, nothing, self.response_mask, gamma=self.gamma, lam=self.lam)
        critic = factor * gae(nothing, self.values, self.response_mask, gamma=self.gamma, lam=self.lam)
        parts: dict[Part, Array] = {}
        for index, channel in enumerate(self.channels):
            parts[Part(channel, "reward")] = reward[..., index]
            parts[Part(channel, "critic")] = critic[..., index]
        parts[WHITENING] = np.where(self.response_mask, -(self.shift / self.scale)[:, None], 0.0)
        return parts

    @cached_property
    def rounding(self) -> Array:
        """[B] what float32 may lose of the sum of a response's advantages: of the terms before they cancel."""
        mask = self.response_mask[..., None]
        rewards, values = (np.abs(np.where(mask, given, 0.0)) for given in (self.rewards, self.values))
        terms = (np.abs(self.weights) * (rewards.sum(axis=1) + values.max(axis=1, initial=0.0))).sum(axis=1)
        return np.asarray(FLOAT32 * self.lengths * (terms + np.abs(self.shift)) / np.abs(self.scale))

    def check_digest(self) -> None:
        """Raise InputError, naming file and row, unless the derived advantage is the one training used."""
        advantage = self.advantage()
        terms = np.abs(self.weights[:, None, :] * self.gae).sum(axis=(1, 2)) / np.abs(self.scale)
        shifts = np.abs(self.shift / self.scale) * self.lengths
        tolerance = RELATIVE * self.advantage_abs_sum + _ROUNDING * (terms + shifts) + self.rounding + FLOOR
        signed = np.abs(advantage.sum(axis=1) - self.advantage_sum)
        absolute = np.abs(np.abs(advantage).sum(axis=1) - self.advantage_abs_sum)
        within = (signed <= tolerance) & (absolute <= tolerance)  # false for nan
        if not within.all():
            row = int(np.argmin(within))
            what = (
                f"advantages derived from rewards and values sum to {advantage[row].sum():.6g}, "
                f"but training used {self.advantage_sum[row]:.6g}"
            )
            raise InputError(Problem(f"{self.path}: row {row}", what, "the file was changed; take it from a copy"))


class Run:
    """A run on disk, read lazily. Works on a run in progress: what is not there yet is empty."""

    def __init__(self, run_dir: RunDir, manifest: Record) -> None:
        self.dir, self.manifest = run_dir, manifest

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.dir.path

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.manifest.get("name") or self.path.name)

    @cached_property
    def settings(self) -> Record:
        """The resolved recipe, empty when the run holds none."""
        try:
            settings = json.loads(self.dir.recipe_json.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            where = str(self.dir.recipe_json)
            raise InputError(Problem(where, f"cannot be read: {error}", "take it from a copy")) from None
        return settings if isinstance(settings, dict) else {}

    @cached_property
    def _metrics(self) -> dict[str, dict[str, Series]]:
        """Every stage's metrics, as series: the lines themselves would take many times the memory."""
        stages: dict[str, _Lines] = {}
        for line in each_json_line(self.dir.metrics):
            if isinstance(line.get("stage"), str):
                stages.setdefault(line["stage"], _Lines()).add(line)
        return {stage: found.series() for stage, found in stages.items()}

    def metrics(self, stage: str) -> dict[str, Series]:
        """Every metric of `stage` by name; empty when the stage has not begun."""
        return self._metrics.get(stage, {})

    def timings(self, stage: str = "policy") -> dict[str, Series]:
        """Every timing of `stage` by name, in seconds."""
        return series(line for line in read_json_lines(self.dir.timings) if line.get("stage") == stage)

    def events(self) -> list[Record]:
        """What happened besides steps: interruptions, resumptions, checkpoints."""
        return read_json_lines(self.dir.events)

    def steps(self) -> tuple[int, ...]:
        """Policy steps whose rows are on disk."""
        return tuple(step for step, _ in self.dir.files("step"))

    def step(self, number: int) -> StepTrace:
        """The rows of policy step `number`, checked against the digest.

        Raises InputError when there is no such file, it is damaged, or the digest does not fit.
        """
        trace = read_step(self.dir.step_file(number))
        trace.check_digest()
        return trace

    def traces(self) -> Iterator[StepTrace]:
        """The rows of every policy step in order, one step in memory at a time."""
        return (self.step(number) for number in self.steps())

    def probe_steps(self) -> tuple[int, ...]:
        """Update counts after which the probes were scored."""
        return tuple(step for step, _ in self.dir.files("probes"))

    def probes(self, step: int | None = None) -> pa.Table:
        """Probe answers after `step` updates, or all; columns of `schema.probe_schema`."""
        return _tables(self._files("probes", step), probe_schema())

    def sample_steps(self) -> tuple[int, ...]:
        """Update counts after which evaluation samples were kept."""
        return tuple(step for step, _ in self.dir.files("samples"))

    def samples(self, step: int | None = None) -> pa.Table:
        """Evaluation samples after `step` updates, or all; columns of `schema.sample_schema`."""
        return _tables(self._files("samples", step), sample_schema())

    def _files(self, kind: str, step: int | None) -> list[Path]:
        """All files of a kind, or that of one step; listing a long run's folder for each step would take for ever."""
        if step is None:
            return [path for _, path in self.dir.files(kind)]
        path = self.dir.probes_file(step) if kind == "probes" else self.dir.samples_file(step)
        return [path] if path.exists() else []


def read_run(path: Path | str) -> Run:
    """The run in folder `path`. Raises InputError when it is not a Kedge run or its schema is newer than this one."""
    run_dir = RunDir(path)
    return Run(run_dir, run_dir.read_manifest())


def series(lines: Iterator[Record]) -> dict[str, Series]:
    """JSON lines turned into one series per numeric key, in order of lines."""
    found = _Lines()
    for line in lines:
        found.add(line)
    return found.series()


class _Lines:
    """Series of JSON lines, 16 bytes a number."""

    def __init__(self) -> None:
        self._lines = 0
        self._found: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, line: Record) -> None:
        step = int(line.get("step", self._lines))
        self._lines += 1
        for name, value in line.items():
            if name == "step" or isinstance(value, str | bool):
                continue
            if value is None or isinstance(value, int | float):
                steps, values = self._found.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(float("nan") if value is None else float(value))

    def series(self) -> dict[str, Series]:
        return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in self._found.items()}


def read_step(path: Path) -> StepTrace:
    """The rows in one `step-*.parquet`, digest unchecked. Raises InputError when the file is missing or damaged."""

    table = read_table(path)
    about = _about(table, path)
    channels = tuple(str(channel) for channel in about["channels"])
    members = int(about.get("members", 0))
    table = _with_later(table, LATER)
    _expect_columns(table, step_schema(channels, members), path)
    column = {name: table.column(name).combine_chunks() for name in table.column_names}
    counts = np.diff(column["response_mask"].offsets.to_numpy())

    absent = frozenset(str(name) for name in about.get("absent", ()))

    def padded(name: str) -> Array:
        if name in absent and name in TOKEN_FLOATS:
            return np.full((len(counts), int(counts.max(initial=1))), np.nan, np.float32)
        return _padded(column[name], counts, path, name)

    def stacked(prefix: str) -> Array:
        return np.stack([padded(f"{prefix}.{channel}") for channel in channels], axis=-1)

    def flat(name: str) -> Array:
        values = column[name].to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64 if values.dtype == np.float32 else values.dtype)

    return StepTrace(
        path=path,
        step=int(about["step"]),
        channels=channels,
        gamma=float(about["gamma"]),
        lam=float(about["lam"]),
        critic=str(about["critic"]),
        group=flat("group"),
        prompts=tuple(column["prompt"].to_pylist()),
        responses=tuple(column["response"].to_pylist()),
        response_mask=padded("response_mask"),
        ended=flat("ended"),
        active=padded("active"),
        tokens={name: padded(name) for name in TOKEN_FLOATS},
        rewards=stacked("reward"),
        values=stacked("value"),
        weights=np.stack([flat(f"weight.{channel}") for channel in channels], axis=-1),
        shift=flat("shift"),
        scale=flat("scale"),
        advantage_sum=flat("advantage_sum"),
        advantage_abs_sum=flat("advantage_abs_sum"),
        members=np.array([flat(f"member.{member}") for member in range(members)]).reshape(members, len(counts)).T,
        disagreement=flat("disagreement"),
        support_distance=flat("support_distance"),
        loss_beta=flat("loss_beta"),
        learning=dict(about.get("learning", {})),
        response_ids=None if column["response_ids"].null_count else padded("response_ids"),
        absent=absent,
    )


def _with_later(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table with nulls for what a trace did not hold when it was written."""
    import pyarrow as pa

    for name in sorted(set(names) - set(table.column_names)):
        table = table.append_column(name, pa.nulls(len(table), pa.float32()))
    return table


def _padded(lists: Any, counts: Array, path: Path, name: str) -> Array:
    """[B, T] from a list column, zeros (false) on the right."""
    if lists.null_count or not np.array_equal(np.diff(lists.offsets.to_numpy()), counts):
        what = f"column {name!r} has other list lengths than response_mask"
        raise InputError(Problem(str(path), what, "the file was changed; take it from a copy"))
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    longest = int(counts.max(initial=1))
    dense: Array = np.zeros((len(counts), longest), dtype=flat.dtype)
    dense[np.arange(longest) < counts[:, None]] = flat
    return dense


def _about(table: pa.Table, path: Path) -> Record:
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise InputError(Problem(str(path), "holds no Kedge metadata", "is this file from a Kedge run?"))
    about = json.loads(raw)
    check_version(about.get("schema"), str(path))
    return dict(about)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of a run as it is, or only `columns`. Raises InputError when it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table: pa.Table = file.read(columns=None if columns is None else list(columns))
            return table
    except FileNotFoundError:
        remedy = "see trace.keep in the recipe: old steps may have been removed"
        raise InputError(Problem(str(path), "there is no such trace file", remedy)) from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        remedy = "the file is truncated or not Parquet; remove it or take it from a copy"
        raise InputError(Problem(str(path), f"cannot be read: {reason}", remedy)) from None


def _expect_columns(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    missing = [field.name for field in schema if field.name not in table.column_names]
    if missing:
        raise InputError(Problem(str(path), f"columns missing: {', '.join(missing)}", "take the file from a copy"))


def _tables(paths: list[Path], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    tables = []
    for path in paths:
        table = read_table(path)
        if set(LATER_SAMPLES) <= set(schema.names):
            table = _with_later(table, LATER_SAMPLES)
        _expect_columns(table, schema, path)
        tables.append(table.select(schema.names).cast(schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()
