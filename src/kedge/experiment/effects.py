"""What a change did: figures of forks with it and without it, compared seed by seed and prompt by prompt.

Dimensions: K forks of an arm, N evaluation prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.features import FEATURES
from kedge.diagnose.margin import probe_pairs
from kedge.errors import InputError, Problem
from kedge.evaluate.intervals import mean_over_prompts
from kedge.trace.jsonl import read_json_lines
from kedge.trace.reader import read_run

Floats = NDArray[np.float64]

UNITS = {
    "score": "normalised score",
    "win_rate": "share",
    "kl": "nats per sequence",
    "length": "tokens",
    "entropy": "nats per token",
    "net_margin": "reward",
    **{name: feature.unit for name, feature in FEATURES.items() if name != "length"},
}
FIXED = "score", "win_rate"  # figures of a reward model, comparable between arms only if one judges both
_SAME = 1e-12  # differences nearer than this are equal


@dataclass(frozen=True)
class Measured:
    """Figures of one fork at its end; `by_prompt` and `reference` have one entry per evaluation prompt [N]."""

    by_prompt: Mapping[str, Floats]
    reference: Mapping[str, Floats]  # of the reference's own answers
    whole: Mapping[str, float]  # what is measured over all prompts at once
    margins: Floats  # net margin by probe prompt; empty without probes
    truth: Mapping[str, float] = field(default_factory=dict)  # what the built-in world knows

    def rescored(self, score: Floats) -> Measured:
        """The same answers under another reward model, compared with the reference's under the same if that is known.

        `score` [N] is that of the answers. The reference's answers have none, so that wins are left out.
        """
        found = {name: values for name, values in self.by_prompt.items() if name != "win_rate"}
        usual = {name: values for name, values in self.reference.items() if name != "score"}
        return replace(self, by_prompt={**found, "score": score}, reference=usual)


def measured(folder: Path, step: int) -> Measured:
    """The fork in `folder` as its evaluation after `step` updates found it. Raises `InputError` where there is none."""
    run = read_run(folder)
    if step not in run.sample_steps():
        raise InputError(Problem(str(folder), f"no evaluation after step {step}", "remove the folder and fork again"))
    table = run.samples(step)
    column = {name: table.column(name).to_pylist() for name in ("response", "reference_response")}
    number = {
        name: table.column(name).to_numpy().astype(np.float64)
        for name in ("score", "reference_score", "kl", "length", "reference_length")
    }
    won = (number["score"] > number["reference_score"]) + 0.5 * (number["score"] == number["reference_score"])
    kinds = {name: feature for name, feature in FEATURES.items() if name != "length"}
    usual_length = number["reference_length"]
    by_prompt = {name: number[name] for name in ("score", "kl", "length")} | {"win_rate": won.astype(np.float64)}
    by_prompt |= {name: feature(column["response"], number["length"]) for name, feature in kinds.items()}
    reference = {"score": number["reference_score"], "length": usual_length}
    reference |= {name: feature(column["reference_response"], usual_length) for name, feature in kinds.items()}
    metrics = run.metrics("evaluation")
    entropy = metrics["evaluation/entropy"]
    pairs = [one.net for one in probe_pairs(run) if one.step == step]
    known = [line for line in read_json_lines(run.dir.truth) if line["step"] == step]
    return Measured(
        by_prompt={name: values for name, values in by_prompt.items() if np.isfinite(values).all()},
        reference={name: values for name, values in reference.items() if np.isfinite(values).all()},
        whole={"entropy": float(entropy.values[entropy.steps == step][-1])},
        margins=pairs[-1] if pairs else np.zeros(0),
        truth={
            name: float(value)
            for name, value in (known[-1] if known else {}).items()
            if name != "step" and "/" not in name and not name.endswith("_reference")
        },
    )


def compared(nulls: Sequence[Measured], changed: Sequence[Measured], *, anew: bool = False) -> list[dict[str, Any]]:
    """A row per figure, those of the truth last; see docs/trial.md. With `anew` the arms have reward models of their
    own, and scores and wins in `changed` are already those of the null forks' reward model."""
    if anew:
        changed = [_wins(one, null) for one, null in zip(changed, nulls, strict=True)]
    rows = []
    for figure in UNITS:
        if figure == "net_margin":
            rows += _margin_row(nulls, changed, anew=anew)
        elif figure in nulls[0].whole:
            pair = [(one.whole[figure], other.whole[figure]) for one, other in zip(nulls, changed, strict=True)]
            rows.append(_row(figure, UNITS[figure], np.array(pair)))
        elif all(figure in one.by_prompt for one in (*nulls, *changed)):
            note = "by the run's own reward model" if anew and figure in FIXED else ""
            rows.append(_prompt_row(figure, nulls, changed, note))
    for name in nulls[0].truth:
        pair = [(one.truth[name], other.truth[name]) for one, other in zip(nulls, changed, strict=True)]
        rows.append({**_row(name, "known to the built-in world", np.array(pair)), "truth": True})
    return rows


def _wins(one: Measured, null: Measured) -> Measured:
    """Wins against the reference's answers, whose scores by the run's reward model the null fork has."""
    score, usual = one.by_prompt["score"], null.reference["score"]
    won = ((score > usual) + 0.5 * (score == usual)).astype(np.float64)
    return replace(one, by_prompt={**one.by_prompt, "win_rate": won}, reference=null.reference)


def _prompt_row(figure: str, nulls: Sequence[Measured], changed: Sequence[Measured], note: str = "") -> dict[str, Any]:
    without, having = (np.array([one.by_prompt[figure] for one in arm]) for arm in (nulls, changed))  # [K, N]
    usual = nulls[0].reference.get(figure)
    reference = None if usual is None else float(usual.mean())
    means = np.stack([without.mean(axis=1), having.mean(axis=1)], axis=1)
    return _row(figure, UNITS[figure], means, (having - without).mean(axis=0), reference=reference, note=note)


def _margin_row(nulls: Sequence[Measured], changed: Sequence[Measured], *, anew: bool) -> list[dict[str, Any]]:
    if not all(len(one.margins) for one in (*nulls, *changed)):
        return []
    means = np.array([(one.margins.mean(), other.margins.mean()) for one, other in zip(nulls, changed, strict=True)])
    sizes = {len(one.margins) for one in (*nulls, *changed)}
    gaps = [other.margins - one.margins for one, other in zip(nulls, changed, strict=True)] if len(sizes) == 1 else None
    note = "verbose over concise, by the reward in force" + (", each arm's own reward model" if anew else "")
    by_prompt = None if gaps is None else np.mean(gaps, axis=0)
    return [_row("net_margin", UNITS["net_margin"], means, by_prompt, note=note)]


def _row(
    figure: str,
    unit: str,
    means: Floats,
    by_prompt: Floats | None = None,
    *,
    reference: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """`means` [K, 2]: null and changed by seed; `by_prompt` [N]: the difference, mean over seeds."""
    differences = means[:, 1] - means[:, 0]
    seeds = over_seeds(differences)
    prompts = None if by_prompt is None else over_prompts(by_prompt)
    return {
        "figure": figure,
        "unit": unit,
        "reference": reference,
        "null": float(means[:, 0].mean()),
        "changed": float(means[:, 1].mean()),
        "difference": float(differences.mean()),
        "differences": differences.tolist(),
        "over_seeds": seeds,
        "over_prompts": prompts,
        "caused": seeds is not None and _excludes(seeds) and (prompts is None or _excludes(prompts)),
        "truth": False,
        "note": note,
    }


def over_seeds(differences: Floats) -> dict[str, float] | None:
    """Student's 95% interval of the mean of K paired differences; None for fewer than two."""
    from scipy import stats

    count = len(differences)
    if count < 2:
        return None
    half = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    mean = float(differences.mean())
    return {"low": mean - half, "high": mean + half}


def over_prompts(differences: Floats) -> dict[str, float] | None:
    """Student's 95% interval of the mean of N differences, one per prompt; None for too few prompts."""
    estimate, _ = mean_over_prompts(differences, np.arange(len(differences)))
    if estimate.low is None or estimate.high is None:
        return None
    return {"low": estimate.low, "high": estimate.high}


def _excludes(interval: Mapping[str, float]) -> bool:
    """Whether 0 lies outside, by more than rounding."""
    return bool(interval["low"] > _SAME or interval["high"] < -_SAME)


def said(changes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per figure that the change moved, and one of those that it was not seen to move; truth apart."""
    what = " and ".join(changes)
    moved = [row for row in rows if row["caused"]]
    still = [row["figure"] for row in rows if not row["caused"] and not row["truth"]]
    found = [_caused(what, row) for row in moved]
    if still:
        found.append(f"Not shown to move: {', '.join(still)}.")
    return found


def _caused(what: str, row: Mapping[str, Any]) -> str:
    span, mark = row["over_seeds"], " (the built-in world's truth)" if row["truth"] else ""
    verb, sign = ("rise", 1) if row["difference"] > 0 else ("fall", -1)
    low, high = sorted((sign * span["low"], sign * span["high"]))
    unit = "" if row["truth"] else f" {row['unit']}"
    return (
        f"{what} caused {row['figure']}{mark} to {verb} by {abs(row['difference']):.3g}{unit} "
        f"(95% {low:.3g} to {high:.3g} over {len(row['differences'])} seeds), "
        f"from {row['null']:.3g} to {row['changed']:.3g}."
    )
