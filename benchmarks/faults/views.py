"""From the traces of the study to views, which are all that scoring reads, and what the truth says beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desk_runs import ROOT, lines, side_by_side

from faults.faults import TUNING_SEEDS
from faults.runs import DONE, Case

if TYPE_CHECKING:
    from kedge.diagnose.view import View


def write_views(wanted: Sequence[Case], workers: int, *, again: bool) -> None:
    """Views of the runs that are made, where there is none yet, or of all of them `again`."""
    made = [case for case in wanted if (case.folder / DONE).exists()]
    if made:
        made[0].view.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(write_view, [case for case in made if again or not beside(case).exists()], workers)


def write_view(case: Case) -> None:
    """The view of one run with what every check wants to know, and the end of the truth."""
    from kedge.diagnose.checks import reducers
    from kedge.diagnose.view import save, view_of
    from kedge.trace.reader import read_run

    save(view_of(read_run(case.folder), reducers()), case.view)
    beside(case).write_text(json.dumps(known(case), indent=1) + "\n", encoding="utf-8")


def beside(case: Case) -> Path:
    """What no check may read, next to the view."""
    return case.view.with_name(f"{case}.truth.json")


def known(case: Case) -> dict[str, Any]:
    """Why the run ended early, if it did; gold, score, length and KL before the onset and at the end."""
    truth = {line["step"]: line["gold"] for line in lines(case.folder / "truth/evaluation.jsonl")}
    found = {line["step"]: line for line in lines(case.folder / "metrics.jsonl") if line["stage"] == "evaluation"}
    steps = sorted(set(truth) & set(found))
    first = max(step for step in steps if step <= case.onset)

    def at(step: int) -> dict[str, float]:
        names = {"score": "score", "length": "length", "kl": "kl_per_sequence"}
        return {"step": step, "gold": truth[step]} | {
            short: found[step][f"evaluation/{name}"] for short, name in names.items()
        }

    ended = json.loads((case.folder / DONE).read_text(encoding="utf-8"))["ended"]
    return {"ended": ended, "before": at(first), "end": at(steps[-1])}


FIXTURES = ROOT / "tests/diagnose/fixtures"
BULKY = ("probes", "pairs", "samples")  # of a view: rows of texts, not series over steps
DIGITS = 4  # of their numbers in a fixture, which has to be small


def write_fixtures(wanted: Sequence[Case]) -> None:
    """Views of the tuning split, rounded, for the tests of the checks; the test split stays unseen."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for case in wanted:
        if case.seed not in TUNING_SEEDS:
            raise SystemExit(f"{case}: seed {case.seed} is of the test split")
        record = json.loads(gzip.decompress(case.view.read_bytes()))
        record |= {name: rounded(record[name]) for name in BULKY}
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        (FIXTURES / case.view.name).write_bytes(gzip.compress(text.encode(), mtime=0))


def rounded(value: Any) -> Any:
    """The same with `DIGITS` digits of every number that has a fraction."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return value


def until(view: View, steps: int) -> View:
    """The view as it was after `steps` policy steps."""
    from kedge.trace.reader import Series

    def earlier(found: Any, last: int) -> dict[str, Any]:
        kept = {name: one.steps <= last for name, one in found.items()}
        return {name: Series(one.steps[kept[name]], one.values[kept[name]]) for name, one in found.items()}

    metrics = {
        stage: found if stage == "reward" else earlier(found, steps if stage == "evaluation" else steps - 1)
        for stage, found in view.metrics.items()
    }
    looks = {
        name: tuple(one for one in getattr(view, name) if one.step <= steps)
        for name in ("probes", "pairs", "phrases")
        if hasattr(view, name)
    }
    samples = tuple(one for one in view.samples if one["step"] <= steps)
    return replace(view, facts=earlier(view.facts, steps - 1), metrics=metrics, samples=samples, **looks)
