"""The layout of a run on disk: names, the manifest, and what a resumed run must drop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kedge.errors import InputError, Problem
from kedge.trace.jsonl import Record, cannot_write, keep_json_lines, write_atomically
from kedge.trace.schema import VERSION, check_version

_STEP_FILE = re.compile(r"(step|probes|samples)-(\d{6,})\.parquet")


class NotARun(InputError):
    """A path that holds no Kedge run; `path` may hold what another trainer wrote."""

    def __init__(self, path: Path, problem: Problem) -> None:
        self.path = path
        super().__init__(problem)

    def __reduce__(self) -> tuple[type[NotARun], tuple[Path, Problem]]:  # type: ignore[override]
        """Between processes an exception travels as its arguments."""
        return type(self), (self.path, self.problems[0])


class RunDir:
    """Paths of one run. Making the object touches nothing; `create` makes the folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe_toml = self.path / "recipe.toml"
        self.recipe_json = self.path / "recipe.json"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timings = self.path / "timings.jsonl"
        self.events = self.path / "events.jsonl"
        self.trace = self.path / "trace"
        self.checkpoints = self.path / "checkpoints"
        self.models = self.path / "models"
        self.truth = self.path / "truth" / "evaluation.jsonl"
        self.report = self.path / "report.html"

    @classmethod
    def create(cls, path: Path | str, *, resume: bool = False) -> RunDir:
        """Make the folder of a new run, or take up an existing one with `resume`.

        A fresh folder gets a manifest with the schema version and status "running" at once, so that a run killed
        before its first step can be resumed. Raises InputError when the folder holds something and `resume` is false,
        when it holds something that is not a Kedge run, or when it cannot be written.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            occupied = any(not entry.name.endswith(".tmp") for entry in run.path.iterdir())
            if occupied and not resume:
                remedy = "choose another --out, or go on with --resume"
                raise InputError(Problem(str(run.path), "the folder is not empty; nothing was overwritten", remedy))
            if occupied:
                run.read_manifest()
            run.update_manifest(schema=VERSION, status="running")  # first: with it, the folder is a run to resume
            for folder in (run.trace, run.checkpoints, run.models):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(run.path, error) from error
        return run

    def step_file(self, step: int) -> Path:
        """Rows of policy step `step`, counted from 0."""
        return self.trace / f"step-{step:06d}.parquet"

    def probes_file(self, step: int) -> Path:
        """Probe answers after `step` updates."""
        return self.trace / f"probes-{step:06d}.parquet"

    def samples_file(self, step: int) -> Path:
        """Evaluation samples after `step` updates."""
        return self.trace / f"samples-{step:06d}.parquet"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint from which policy step `step` goes on."""
        return self.checkpoints / f"step-{step:06d}"

    def files(self, kind: str) -> list[tuple[int, Path]]:
        """Trace files of `kind` ("step", "probes" or "samples") with their step, in order of step."""
        found = []
        for path in self.trace.iterdir() if self.trace.is_dir() else ():
            match = _STEP_FILE.fullmatch(path.name)
            if match and match[1] == kind:
                found.append((int(match[2]), path))
        return sorted(found)

    def read_manifest(self) -> Record:
        """The manifest. Raises InputError when there is none, it is damaged, or its schema is too new."""
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            what = "no manifest.json: not a Kedge run" if self.path.exists() else "there is no such run"
            remedy = "give the folder that `kedge run`, `kedge demo` or `kedge import` wrote"
            raise NotARun(self.path, Problem(str(self.path), what, remedy)) from None
        except (ValueError, OSError) as error:
            raise InputError(Problem(str(self.manifest), f"cannot be read: {error}", "take it from a copy")) from None
        if not isinstance(manifest, dict) or "schema" not in manifest:
            raise InputError(Problem(str(self.manifest), "has no schema version", "is this a Kedge run?"))
        check_version(manifest["schema"], str(self.manifest))
        return manifest

    def write_manifest(self, manifest: Record) -> None:
        """Replace the manifest at once."""
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        write_atomically(self.manifest, (text + "\n").encode())

    def update_manifest(self, **changes: Any) -> Record:
        """Write the manifest with `changes` to its top-level keys; returns the new one."""
        manifest = {**(self.read_manifest() if self.manifest.exists() else {}), **changes}
        self.write_manifest(manifest)
        return manifest

    def truncate(self, step: int) -> None:
        """Forget what came after the state from which policy step `step` goes on, so that a resumed run equals one
        that was never interrupted.

        Policy metrics, timings and rows of steps >= `step` go. Evaluations, probes and samples are numbered by the
        updates before them: those of more than `step` updates go. Half-written files go.
        """

        def keep(record: Record) -> bool:
            at = int(record.get("step", 0))
            return {"policy": at < step, "evaluation": at <= step}.get(str(record.get("stage")), True)

        keep_json_lines(self.metrics, keep)
        keep_json_lines(self.timings, keep)
        keep_json_lines(self.truth, lambda record: int(record.get("step", 0)) <= step)
        keep_json_lines(self.events, lambda _: True)
        for kind, first_dropped in (("step", step), ("probes", step + 1), ("samples", step + 1)):
            for at, path in self.files(kind):
                if at >= first_dropped:
                    path.unlink()
        self._remove_half_written()

    def drop_stages(self, *stages: str) -> None:
        """Forget the metrics and timings of stages that will run again from their start."""
        for path in (self.metrics, self.timings):
            keep_json_lines(path, lambda record: record.get("stage") not in stages)
        keep_json_lines(self.events, lambda _: True)
        self._remove_half_written()

    def _remove_half_written(self) -> None:
        for folder in (self.path, self.trace):
            for path in folder.glob(".*.tmp"):
                path.unlink()
