"""Recording beside a training run that must not fail because of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kedge.trace.foreign import Conventions, Rows
from kedge.trace.recorder import Recorder
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import TextMode


class Guarded:
    """A recorder that begins with the first step it is given.

    A fault at the first step is raised: whatever is wrong with the set-up is seen before the training has cost much.
    A later one, a full disk say, ends the recording with a warning, and the training goes on.
    """

    def __init__(self, out: Path | str, *, name: str | None, text: TextMode, keep: int, resume: bool) -> None:
        self._out = Path(out)
        self._options: dict[str, Any] = {"name": name, "text": text, "keep": keep, "resume": resume}
        self._recorder: Recorder | None = None
        self._stopped = False

    @property
    def next_step(self) -> int:
        """The number after the last step on disk: where a trainer that does not count goes on."""
        steps = RunDir(self._out).files("step")
        return steps[-1][0] + 1 if steps else 0

    @property
    def text(self) -> TextMode:
        """What is kept of prompts and responses."""
        mode: TextMode = self._options["text"]
        return mode

    def step(
        self,
        rows: Callable[[], Rows | None],
        conventions: Callable[[], Conventions],
        settings: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Record what `rows` gives, None being a step in which nothing was learnt from."""
        if self._stopped:
            return
        if self._recorder is None:
            self._recorder = Recorder(self._out, conventions(), settings=settings(), **self._options)
            self._record(rows)
            self._recorder.flush()  # what goes wrong in the writer's thread is to be seen now, too
            return
        try:
            self._record(rows)
        except Exception as error:
            self._stopped = True
            # InputError names files and what is wrong with them; anything else might quote what it choked on.
            reason = str(error) if hasattr(error, "problems") else type(error).__name__
            warnings.warn(
                f"kedge: the recording in {self._out} ends here, the training goes on: {reason}", stacklevel=2
            )

    def _record(self, rows: Callable[[], Rows | None]) -> None:
        found = rows()
        if found is not None and self._recorder is not None:
            self._recorder.step(found)

    def close(self) -> None:
        """Write what is queued; the manifest then says that the run has finished."""
        if self._recorder is not None:
            self._recorder.close()
