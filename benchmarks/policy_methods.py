"""Every policy optimiser and every way to hold the KL, on the same work in the built-in desk, where gold is known.

All rows of a seed start from one supervised policy and one reward model, which learnt from annotators without a bias:
what scores well is good. Every optimiser draws (or, offline, learns from) the same number of responses.
Writes docs/results/policy-methods.json and .md. From the repository root:

    python benchmarks/policy_methods.py --out runs/policy-methods --workers 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from policy_runs import Row, Settings, along, of, options, shares, spread, table

COMMAND = "python benchmarks/policy_methods.py"
WORLD = ("desk.annotators.length=0",)
STEPS, RESPONSES = 40, 96
COMMON = (
    f"policy.steps={STEPS}",
    f"policy.prompts_per_step={RESPONSES}",
    "policy.lr=3e-4",
    "policy.lam=1.0",
    "evaluate.every=4",
    "trace.text=none",
)
GROUP = 4


def _grouped(method: str, *settings: str, size: int = GROUP) -> Settings:
    """As many responses, several per prompt."""
    sizes = (f"policy.prompts_per_step={RESPONSES // size}", f"policy.samples_per_prompt={size}")
    return (*COMMON, "policy.kl.beta=0.3", f"policy.method={method}", *sizes, *settings)


def _single(method: str, *settings: str) -> Settings:
    return (*COMMON, "policy.kl.beta=0.3", f"policy.method={method}", *settings)


def _held(*settings: str) -> Settings:
    """PPO with another KL control."""
    return (*COMMON, *(f"policy.kl.{setting}" for setting in settings))


def _steered(mode: str, *settings: str) -> Settings:
    """PPO whose KL a controller steers, over a longer run."""
    longer = (f"policy.steps={STEERED_STEPS}", "evaluate.every=10", "policy.final_lr=0.5")
    return (*_held(f"mode={mode}", *STEERED, *settings), *longer)


# One optimiser step a batch, where the others make four.
ONE_STEP = ("policy.lr=1e-3",)
# A pair is two responses: half as many pairs are as many responses.
PAIRS = f"policy.prompts_per_step={RESPONSES // 2}"
OPTIMISERS: dict[str, Settings] = {
    "ppo": _single("ppo"),
    "a2c": _single("a2c", *ONE_STEP),
    "reinforce": _single("reinforce", *ONE_STEP),
    "rloo": _grouped("rloo"),
    "grpo": _grouped("grpo"),
    "dr_grpo": _grouped("dr_grpo"),
    "reinforce_pp": _single("reinforce_pp"),
    "dpo": _single("dpo", PAIRS),
    "ipo": _single("ipo", PAIRS, "policy.kl.beta=0.1"),  # tau is in preference probability, not in score
    "online_dpo": _grouped("online_dpo", "policy.kl.beta=1.0", "policy.label_smoothing=0.1", size=2),
    "online_dpo, beta 0.3, labels as they are": _grouped("online_dpo", size=2),
    "rejection": _grouped("rejection", "policy.epochs=1", "policy.minibatches=1"),
    "rejection, two epochs of two": _grouped("rejection"),
    "best_of_n": (*COMMON, "policy.method=best_of_n", "policy.samples_per_prompt=8"),
}
# A controller needs time to settle after the policy has come to the target.
STEERED_STEPS, TARGET, LIMIT = 100, 1.0, 1.5
STEERED = ("beta=0.3", f"target={TARGET}")
HORIZON = f"horizon={STEERED_STEPS * RESPONSES // 20}"
LIMITED = ("beta=0.05", f"limit={LIMIT}")
CONTROLS: dict[str, Settings] = {
    "beta 0.05": _held("beta=0.05"),
    "beta 0.15": _held("beta=0.15"),
    "beta 0.6": _held("beta=0.6"),
    # The horizon is scaled to the run: a twentieth of its responses.
    "adaptive": _steered("adaptive", HORIZON),
    "lagrangian": _steered("lagrangian"),
    "pid": _steered("pid"),
    "loss, k2": _held("place=loss", "estimator=k2", "beta=0.3"),
    "loss, full": _held("place=loss", "estimator=full", "beta=0.3"),
    "limit, stop": _held("at_limit=stop", *LIMITED),
    "limit, reject": _held("at_limit=reject", *LIMITED),
    "limit, rollback": (*_held("at_limit=rollback", *LIMITED), "checkpoint.every=5"),
    "budgets": _steered("adaptive", HORIZON, "budgets=[0.5, 1.0, 1.5]"),
}
ROWS = OPTIMISERS | CONTROLS
SCORE_CLEAR, GOLD_CLEAR = 0.15, 0.25  # three standard errors of a difference over 512 prompts


def learns(row: Row) -> bool:
    """Whether score or gold ends clearly above the reference's."""
    return bool(row["score"] > SCORE_CLEAR or row["gold"] > GOLD_CLEAR)


def render(found: list[Row]) -> str:
    """The page; every number in it comes from `found`."""
    seeds = len({row["seed"] for row in found})
    page = [
        "# Policy optimisers and KL controls",
        "",
        f"Made by `{COMMAND}`; raw figures in `policy-methods.json`.",
        "",
    ]
    page += [
        f"{seeds} seeds; {STEPS} steps of {RESPONSES} responses; one supervised policy and one reward model per seed,",
        "from annotators without a bias. Score (standard deviations) and gold are gains over the supervised policy on",
        "512 evaluation prompts, KL is k1 in nats per sequence, length is over the supervised policy's; means of the",
        "last three evaluations, in brackets lowest and highest seed. *Learns*: in how many seeds score or gold ends",
        f"clearly above the start (by more than {SCORE_CLEAR} or {GOLD_CLEAR}, three standard errors).",
        "",
        "*Efficiency* is the score gained over the most that any policy can gain at the same KL, in the first and the",
        "middle third of the run and at its end; with ≥ it is a lower bound, past what the answers of the supervised",
        f"policy support ({spread([row['support'] for row in found], 1)} nats).",
        "",
        "## Optimisers",
        "",
        *_optimisers(found),
        "",
        "## KL controls",
        "",
        f"All are PPO. Steered betas aim at {TARGET} nats, over {STEERED_STEPS} steps whose learning rates halve;",
        f"limits are at {LIMIT} nats with beta 0.05. *Over target*:",
        "mean KL of the training batches in the last half of the run, over the target. *Not done*: optimiser steps",
        "left out; updates undone; returns to a checkpoint.",
        "",
        *_controls(found),
        "",
        "## Reading",
        "",
        *_reading(found),
    ]
    return "\n".join([*page, ""])


def _optimisers(found: Sequence[Row]) -> list[str]:
    heads = ["optimiser", "learns", "score", "gold", "correct", "KL", "length"]
    heads += ["efficiency: first third", "middle third", "end"]
    names = [name for name in OPTIMISERS if of(found, name)]
    return table(heads, [[name, *_figures(of(found, name)), *_efficiencies(of(found, name))] for name in names])


def _controls(found: Sequence[Row]) -> list[str]:
    heads = ["control", "learns", "score", "gold", "correct", "KL", "length", "efficiency at the end"]
    heads += ["over target", "largest KL of a batch", "beta at the end", "not done"]
    rows = []
    for name in ["ppo", *CONTROLS]:
        mine = of(found, name)
        if not mine:
            continue
        aimed = [_over_target(row) for row in mine]
        cells = [spread(aimed), spread([row["largest_kl"] for row in mine]), spread([row["beta"] for row in mine])]
        title = "beta 0.3" if name == "ppo" else name
        end = shares([row["efficiency"] for row in mine])
        rows.append([title, *_figures(mine), end, *cells, _not_done(name, mine)])
    return table(heads, rows)


def _figures(mine: Sequence[Row]) -> list[str]:
    names = ("score", "gold", "correct", "kl", "length_ratio")
    learnt = f"{sum(map(learns, mine))} of {len(mine)}"
    return [learnt, *(spread([row[name] for row in mine]) for name in names)]


def _efficiencies(mine: Sequence[Row]) -> list[str]:
    parts = [shares([along(row["curve"], *part) for row in mine]) for part in ((0, 1 / 3), (1 / 3, 2 / 3))]
    return [*parts, shares([row["efficiency"] for row in mine])]


def _over_target(row: Row) -> float | None:
    """The mean KL of the last half over the target; nothing where no controller steers."""
    steered = any(setting.startswith("policy.kl.mode=") for setting in row["settings"])
    return row["last_half_kl"] / TARGET if steered and row["last_half_kl"] is not None else None


def _not_done(name: str, mine: Sequence[Row]) -> str:
    column = {"limit, stop": "left_out", "limit, reject": "rejected", "limit, rollback": "returns"}.get(name)
    return "–" if column is None else spread([row[column] for row in mine], 0)


def _reading(found: Sequence[Row]) -> list[str]:
    """What the tables say; which rows are named depends on the figures alone."""
    rows = {name: of(found, name) for name in ROWS if of(found, name)}
    learnt = [name for name in rows if all(map(learns, rows[name]))]
    failed = [name for name in rows if name not in learnt]
    ranked = sorted((name for name in OPTIMISERS if name in rows), key=lambda name: -_mean_efficiency(rows[name]))
    ranking = ", ".join(f"{name} {_mean_efficiency(rows[name]):.2f}" for name in ranked)
    steered = {name: [_over_target(row) for row in mine] for name, mine in rows.items() if _over_target(mine[0])}
    held = [name for name, aims in steered.items() if all(abs((one or 0) - 1) <= 0.1 for one in aims)]
    reading = [
        f"- Learns in every seed: {len(learnt)} of {len(rows)} rows; not: {', '.join(failed) or 'none'}.",
        f"- Optimisers by mean efficiency at the end: {ranking}.",
    ]
    if steered:
        named = ", ".join(steered)
        reading.append(f"- Within 10% of the target in every seed, of {named}: {', '.join(held) or 'none'}.")
    limited = {name: rows[name] for name in rows if name.startswith("limit")}
    if limited:
        largest = ", ".join(
            f"{name.removeprefix('limit, ')} {max(_largest_evaluation(row) for row in mine):.2f}"
            for name, mine in limited.items()
        )
        reading.append(
            f"- Limit of {LIMIT} nats: the largest KL at any evaluation of any seed is {largest}; its standard error, "
            "over 512 answers, is near 0.08. The mean of a training batch, over 96, has more noise."
        )
    return reading


def _largest_evaluation(row: Row) -> float:
    return max(float(point["kl"]) for point in row["curve"])


def _mean_efficiency(mine: Sequence[Row]) -> float:
    known = [row["efficiency"]["value"] for row in mine if row["efficiency"]["value"] is not None]
    return sum(known) / len(known) if known else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser, "runs/policy-methods")("policy-methods", ROWS, WORLD, render=render)


if __name__ == "__main__":
    main()
