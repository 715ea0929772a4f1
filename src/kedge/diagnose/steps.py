"""Small statistics of series over steps, which checks share. Nothing here knows what a series means."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import Series

Array = NDArray[Any]
LATE = 1 / 3  # of the steps: they stand for how a run ended


def late(series: Series, share: float = LATE) -> float:
    """Mean over the last `share` of the steps."""
    return float(np.mean(series.values[-max(1, round(len(series.values) * share)) :]))


def first_where(series: Series, here: Array) -> int | None:
    """The first step at which `here` is true."""
    return int(series.steps[np.argmax(here)]) if here.any() else None


def lasting(here: Array, times: int) -> Array:
    """Where `here` has been true for at least `times` entries in a row, this one included."""
    run = np.zeros(len(here), dtype=np.int64)
    for index, value in enumerate(here):
        run[index] = (run[index - 1] if index else 0) + 1 if value else 0
    return run >= times
