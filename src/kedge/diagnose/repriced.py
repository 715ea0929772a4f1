"""Fixed texts whose scores changed between two looks: what scores them has changed, and for what it now pays.

Probe answers and the reference's answers to the evaluation prompts stay the same through a run, so their scores do,
too, unless the reward model is another one. A change in scores is split by least squares among length and the features
of the texts. N texts, F regressors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.texts import NAMES, UNCHANGED, column, slope
from kedge.diagnose.view import Probes, View

Array = NDArray[Any]
RESCALED = 1e-3  # share of the new scores' variance that another scale and offset may leave unexplained
FEWEST = 30  # texts


@dataclass(frozen=True)
class Price:
    """What a unit of a feature came to be worth, with everything else known of the texts held fixed."""

    value: float  # score per unit
    error: float  # standard error
    explained: float  # share of the change's variance that this feature alone accounts for


@dataclass(frozen=True)
class Repricing:
    """A change of the scores of fixed texts, first seen after `step` updates and not yet after `before`."""

    step: int
    before: int
    source: str
    texts: int
    deviation: float  # of the change over the texts, score
    untouched: float  # share of the texts whose score stayed the same
    moved: float  # mean change of the others, score
    rescaled: bool  # another scale and offset account for it
    explained: float  # share of the change's variance that length and all features account for together
    prices: Mapping[str, Price]  # length, and features where the texts were read


def repricings(view: View) -> tuple[Repricing, ...]:
    """Every change of the scores of fixed texts in the run, in order of steps."""
    return tuple(sorted((*_of_probes(view), *_of_answers(view)), key=lambda one: one.step))


def _of_probes(view: View) -> Iterator[Repricing]:
    for old, new in zip(view.probes, view.probes[1:], strict=False):
        if _same_probes(old, new):
            features = {"length": new.length.astype(np.float64), **new.features}
            yield from _compared(old.step, new.step, "the probe answers", old.score, new.score, features)


def _same_probes(old: Probes, new: Probes) -> bool:
    return all(np.array_equal(getattr(old, name), getattr(new, name)) for name in ("probe", "variant", "length"))


def _of_answers(view: View) -> Iterator[Repricing]:
    for old, new in zip(view.samples, view.samples[1:], strict=False):
        lengths = [column(one, "length", reference=True) for one in (old, new)]
        if lengths[0] is None or lengths[1] is None or not np.array_equal(lengths[0], lengths[1]):
            continue
        known = {name: column(new, name, reference=True) for name in NAMES}
        features = {"length": lengths[1], **{name: values for name, values in known.items() if values is not None}}
        before, after = (np.asarray(one["reference_score"], dtype=np.float64) for one in (old, new))
        yield from _compared(old["step"], new["step"], "the reference's answers", before, after, features)


def _compared(
    before: int, step: int, source: str, old: Array, new: Array, features: Mapping[str, Array]
) -> Iterator[Repricing]:
    known = np.isfinite(old) & np.isfinite(new)
    if known.sum() < FEWEST:
        return
    old, new = old[known].astype(np.float64), new[known].astype(np.float64)
    change, features = new - old, {name: values[known] for name, values in features.items()}
    touched = np.abs(change) > UNCHANGED
    if not touched.any():
        return
    yield Repricing(
        step=int(step),
        before=int(before),
        source=source,
        texts=len(change),
        deviation=float(change.std()),
        untouched=float(1 - touched.mean()),
        moved=float(change[touched].mean()),
        rescaled=_rescaled(old, new),
        explained=_together(change, features),
        prices=_prices(change, features),
    )


def _rescaled(old: Array, new: Array) -> bool:
    scale, _ = slope(new, old)
    if not math.isfinite(scale):
        return bool(np.ptp(new) == 0)
    left = new - new.mean() - scale * (old - old.mean())
    return bool(left @ left <= RESCALED * ((new - new.mean()) @ (new - new.mean())))


def _prices(change: Array, features: Mapping[str, Array]) -> dict[str, Price]:
    """The multiple regression's slopes, and by how much its explained share falls without each."""
    whole = float(((change - change.mean()) ** 2).sum())
    prices = {}
    for name, values in features.items():
        rest = [other for other in features if other != name]
        others = np.stack([features[other] for other in rest], axis=1) if rest else None
        value, error = slope(change, values, others)
        if math.isfinite(value) and whole > 0:
            prices[name] = Price(value, error, value**2 * _alone(values, others) / whole)
    return prices


def _together(change: Array, features: Mapping[str, Array]) -> float:
    """Coefficient of determination of the multiple regression; 0 where the change is the same for all."""
    whole = float(((change - change.mean()) ** 2).sum())
    return 1 - _alone(change, np.stack(list(features.values()), axis=1)) / whole if whole > 0 else 0.0


def _alone(values: Array, others: Array | None) -> float:
    """Sum of squares of what an intercept and `others` leave of `values`."""
    design = np.ones((len(values), 1)) if others is None else np.column_stack([np.ones(len(values)), others])
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum())
