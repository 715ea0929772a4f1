"""A full trace from any training loop, written beside it."""

from __future__ import annotations

import atexit
import contextlib
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from kedge import __version__
from kedge.errors import InputError, Problem
from kedge.trace.conventions import Conventions
from kedge.trace.figures import evaluation_figures, policy_figures
from kedge.trace.foreign import Rows, as_record, checked, in_force
from kedge.trace.jsonl import append_json, keep_json_lines, read_json_lines, write_atomically
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import TEXT_MODES
from kedge.trace.writer import SampleRecord, StepRecord, TextMode, TraceWriter

_MEANING = ("gamma", "lam", "kl", "kl_estimator", "kl_credit", "score_position", "normalisation", "positions")
_TOLD = ("advantage", "channels", "critic", "absent")  # of the manifest, what only steps tell


class Recorder:
    """Writes a run folder from any training loop, so that every command that looks at a run reads it.

    `step` copies the arrays and returns; channels, metrics and files are made in a thread. `text` and `keep` are those
    of `TraceWriter`. `settings` go to `recipe.json`, in a recipe's shape and only what is known, for example
    `{"policy": {"kl": {"mode": "adaptive", "target": 6.0}}}`. With `resume` an existing run is taken up: what it holds
    from the first step on that is given now is replaced.

    The manifest's status is "running" until `close`, then "finished", or "interrupted" where the `with` block was left
    by an exception. A recorder that nobody closed is closed when the interpreter ends.

    Raises `InputError` when the folder holds something else or cannot be written, and when conventions differ from
    those that a resumed run began with. A failure in the thread is raised by the next call, or by `flush` or `close`.
    """

    def __init__(
        self,
        out: Path | str,
        conventions: Conventions,
        *,
        name: str | None = None,
        text: TextMode = "full",
        keep: int = 0,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        if text not in TEXT_MODES:
            raise InputError(Problem("Recorder", f"text {text!r} is not one of {', '.join(TEXT_MODES)}"))
        before = _before(Path(out), conventions) if resume else {}
        self.run = RunDir.create(out, resume=resume)
        self.conventions = conventions
        self._last: int | None = None  # the step that was given last
        self._resumed = bool(before)
        self._told: dict[str, Any] = {name: before[name] for name in _TOLD if name in before}
        self._evaluated = {int(line["step"]) for line in self._lines("evaluation")} if before else set()
        self._begin(name or before.get("name") or self.run.path.name, text, settings)
        self._writer = TraceWriter(self.run, text=text, keep=keep)
        self._closed = False
        atexit.register(self._abandoned)

    def step(self, rows: Rows, /, **metrics: float) -> None:
        """Record one policy step.

        `metrics` are figures of the trainer's own, by their names in `kedge.trace.schema` where it has one:
        `recorder.step(rows, **{"policy/loss": 0.1})`. They count before those that the rows give.

        Steps must rise. Raises `InputError` that names every array whose shape does not fit.
        """
        rows = checked(rows, copy=True)
        if self._last is not None and rows.step <= self._last:
            what = f"step {rows.step} came after step {self._last}; steps must rise"
            remedy = "join the rows of one step, or number the batches; Recorder(resume=True) goes back to a checkpoint"
            raise InputError(Problem(f"step {rows.step}", what, remedy))
        own = {name: _number(name, value) for name, value in metrics.items()}
        self._take_up(rows.step)
        self._last = rows.step
        self._writer.run(lambda: self._write(rows, own))

    def samples(self, record: SampleRecord, /, **metrics: float) -> None:
        """Record answers of the policy beside the reference's after `record.step` updates, and what they average to.

        `metrics` are further figures, such as `**{"evaluation/ended": 0.97}`; they count before those of the answers.
        """
        own = {name: _number(name, value) for name, value in metrics.items()}
        self._take_up(record.step)
        self._writer.write_samples(record)
        self._writer.run(lambda: self._evaluate(record, own))

    def flush(self) -> None:
        """Wait until all that was given is on disk. Call it before a checkpoint is saved."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is queued, and say in the manifest that the run has finished; safe to call twice."""
        self._end("finished")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._end("finished" if error is None else "interrupted")
        except Exception:
            if error is None:  # an error on its way out must not be replaced
                raise

    def _begin(self, name: str, text: TextMode, settings: Mapping[str, Any] | None) -> None:
        if settings is not None:
            content = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            write_atomically(self.run.recipe_json, (content + "\n").encode())
        self.run.update_manifest(
            kedge=__version__,
            name=name,
            trainer=self.conventions.trainer,
            conventions=self.conventions.to_dict(),
            positions=self.conventions.positions,
            text=text,
            gamma=self.conventions.gamma,
            lam=self.conventions.lam,
            score_unit="the trainer's own",
            versions={"python": platform.python_version(), **{name: version(name) for name in ("numpy", "pyarrow")}},
        )

    def _take_up(self, step: int) -> None:
        """Before the first thing that is recorded after a resumption: forget what the run holds from `step` on."""
        if not self._resumed:
            return
        self._resumed = False
        self.run.truncate(step)
        append_json(self.run.events, {"stage": "policy", "step": step, "event": "resumed"})

    def _write(self, rows: Rows, own: Mapping[str, float]) -> None:
        """In the writer's thread: rows first, so that a step that has metrics has its rows, too."""
        record = as_record(rows, self.conventions)
        self._writer.store(record)
        figures = {**policy_figures(record, rows, in_force(self.conventions, rows)), **own}
        append_json(self.run.metrics, {"stage": "policy", "step": record.step, **figures})
        if rows.advantage is not None and "advantage" in record.absent:
            event = "the advantage is not finite; the rows are kept without it"
            append_json(self.run.events, {"stage": "policy", "step": record.step, "event": event})
        self._tell(record, derived=rows.advantage is None)

    def _evaluate(self, record: SampleRecord, own: Mapping[str, float]) -> None:
        """In the writer's thread: one line for each evaluation, the last that was given."""
        if record.step in self._evaluated:
            keep_json_lines(self.run.metrics, lambda line: (line["stage"], line["step"]) != ("evaluation", record.step))
        self._evaluated.add(record.step)
        figures = {**evaluation_figures(record), **own}
        append_json(self.run.metrics, {"stage": "evaluation", "step": record.step, **figures})

    def _lines(self, stage: str) -> list[dict[str, Any]]:
        return [line for line in read_json_lines(self.run.metrics) if line.get("stage") == stage]

    def _tell(self, record: StepRecord, *, derived: bool) -> None:
        """Keep the manifest true of what the steps hold; it is written only when that changes."""
        source = "absent" if "advantage" in record.absent else "derived" if derived else "recorded"
        before = self._told.get("advantage")
        known = [*dict.fromkeys([*self._told.get("channels", ()), *record.channels])]
        told = {
            "advantage": source if before in (None, source) else "mixed",
            "channels": known,
            "critic": record.critic,
            "absent": sorted(record.absent & set(self._told.get("absent", record.absent))),
        }
        if told != self._told:
            self.run.update_manifest(**told)
            self._told = told

    def _end(self, status: str) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._abandoned)
        try:
            self._writer.close()
        except BaseException:
            self._note("interrupted")
            raise
        self.run.update_manifest(status=status)
        if status != "finished":
            append_json(self.run.events, {"stage": "run", "step": self._last or 0, "event": status})

    def _note(self, status: str) -> None:
        """The status, where the disk still takes it."""
        with contextlib.suppress(InputError):
            self.run.update_manifest(status=status)

    def _abandoned(self) -> None:
        """At the interpreter's end, where nobody hears of errors; one that nobody caught leaves its mark in `sys`."""
        with contextlib.suppress(InputError):
            self._end("interrupted" if getattr(sys, "last_value", None) is not None else "finished")


def _before(path: Path, conventions: Conventions) -> dict[str, Any]:
    """The manifest of the run to be taken up; empty where there is none yet. Raises `InputError` where it differs."""
    if not RunDir(path).manifest.exists():
        return {}
    manifest = RunDir(path).read_manifest()
    known, now = manifest.get("conventions"), conventions.to_dict()
    if not isinstance(known, dict):
        what = "the run was not written by a recorder, so it cannot be taken up by one"
        raise InputError(Problem(str(path), what, "choose another folder"))
    changed = [name for name in _MEANING if known.get(name) != now[name]]
    if changed:
        what = "; ".join(f"{name} was {known.get(name)!r} and is {now[name]!r} now" for name in changed)
        raise InputError(Problem(str(path), what, "rows of one run share their conventions; choose another folder"))
    return manifest


def _number(name: str, value: Any) -> float:
    if name in ("stage", "step"):
        raise InputError(Problem(f"metric {name!r}", "this name is taken", "the step is that of the rows"))
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(Problem(f"metric {name!r}", f"{type(value).__name__} is not a number")) from None
