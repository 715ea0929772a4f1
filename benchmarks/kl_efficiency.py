"""Which settings of PPO turn divergence into score? KL efficiency at one number of responses, in the built-in desk.

The reward model is the demo's, of annotators who like long answers; beta 0.35 holds the best policy near 2 nats.
Efficiency is the score gained over the most that any policy can gain at the same KL.
Writes docs/results/kl-efficiency.json and .md. From the repository root:

    python benchmarks/kl_efficiency.py --out runs/kl-efficiency --workers 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from policy_runs import Row, Settings, along, of, options, shares, spread, table

COMMAND = "python benchmarks/kl_efficiency.py"
RESPONSES = 5760  # in all
COMMON = ("policy.kl.beta=0.35", "evaluate.every=5", "trace.text=none")
BASE = {"lr": "1e-3", "lam": "0.95"}  # what the prototype began with; the other keys are the demo's
SMALL = {"lr": "3e-4", "lam": "1.0"}  # and what served it better


def _ppo(batch: int = 96, samples: int = 1, **keys: str) -> Settings:
    """PPO with these keys of [policy], `batch` responses a step, `samples` of them per prompt."""
    sizes = {
        "steps": str(RESPONSES // batch),
        "prompts_per_step": str(batch // samples),
        "samples_per_prompt": str(samples),
    }
    every = max(1, RESPONSES // batch // 15)
    return (*COMMON, *(f"policy.{key}={value}" for key, value in (sizes | keys).items()), f"evaluate.every={every}")


# The likeliest first. Steps that are smaller, fewer or over more responses spend less divergence on noise; lambda 1
# brings the score at the end to the first token undiminished; a better baseline takes noise out of every step.
ROWS: dict[str, Settings] = {
    "lr 3e-4, lambda 1": _ppo(**SMALL),
    "lr 3e-4, lambda 1, final lr 0": _ppo(**SMALL, final_lr="0"),
    "lr 3e-4, lambda 1, critic lr 3e-3": _ppo(**SMALL, critic_lr="3e-3"),
    "lr 3e-4, lambda 1, one epoch": _ppo(**SMALL, epochs="1"),
    "lr 5e-4, lambda 1, 192 a step": _ppo(192, lr="5e-4", lam="1.0"),
    "lr 3e-4, lambda 1, 4 a prompt": _ppo(samples=4, **SMALL),
    "lr 1e-4, lambda 1": _ppo(lr="1e-4", lam="1.0"),
    "lr 3e-4, lambda 0.95": _ppo(lr="3e-4", lam="0.95"),
    "lr 5e-4, lambda 0.95 (the demo)": _ppo(lr="5e-4", lam="0.95"),
    "lr 1e-3, lambda 0.95": _ppo(**BASE),
    "lr 3e-4, lambda 1, no whitening": _ppo(**SMALL, whiten="false"),
    "rloo, 4 a prompt, lr 3e-4": _ppo(samples=4, method="rloo", lr="3e-4"),
}
WINDOWS = ((0.1, 0.2), (0.3, 0.4), (0.85, 1.0))  # shares of the run
AIM = 0.85


def render(found: list[Row]) -> str:
    """The page; every number in it comes from `found`."""
    seeds = len({row["seed"] for row in found})
    page = ["# KL efficiency", "", f"Made by `{COMMAND}`; raw figures in `kl-efficiency.json`.", ""]
    page += [
        f"{seeds} seeds, {RESPONSES} responses a run, beta 0.35, the demo's reward model (annotators who like long",
        "answers); what a row does not name is as in the demo. *Efficiency* is the score gained over the most that any",
        "policy can gain at the same KL to the supervised policy (its tilt by exp(score / b)), mean over evaluations",
        "in a part of the run: 10 to 20%, 30 to 40% and the last 15%. KL (k1, nats per sequence), score (standard",
        "deviations) and gold, both over the supervised policy's, are means of the last three evaluations on 512",
        "prompts. In brackets lowest and highest seed; rows in order of the efficiency at the end.",
        "",
        f"The frontier comes from 256 answers a prompt, up to {_mean(found, 'support'):.1f} nats; at 2 nats it is",
        f"about {_mean(found, 'shortfall'):.3f} too low, of about 1.7. The efficiency at one evaluation has a standard",
        "error of about 0.03.",
        "",
        *_rows(found),
        "",
        "## Reading",
        "",
        *_reading(found),
    ]
    return "\n".join([*page, ""])


def _rows(found: Sequence[Row]) -> list[str]:
    heads = ["settings", "efficiency: 10–20%", "30–40%", "85–100%", "KL", "score", "gold"]
    rows = []
    for name in _ranked(found):
        mine = of(found, name)
        parts = [shares([along(row["curve"], *window) for row in mine]) for window in WINDOWS]
        rows.append([name, *parts, *(spread([row[figure] for row in mine]) for figure in ("kl", "score", "gold"))])
    return table(heads, rows)


def _ranked(found: Sequence[Row]) -> list[str]:
    return sorted((name for name in ROWS if of(found, name)), key=lambda name: -_end(of(found, name)))


def _end(mine: Sequence[Row]) -> float:
    """Mean over seeds of the efficiency at the end; -1 where there is none."""
    known = [value for row in mine if (value := along(row["curve"], *WINDOWS[-1])["value"]) is not None]
    return sum(known) / len(known) if known else -1.0


def _reading(found: Sequence[Row]) -> list[str]:
    """What the table says; which rows are named depends on the figures alone."""
    ranked = _ranked(found)
    above = [name for name in ranked if _end(of(found, name)) >= AIM]
    first, last = (f"{name}, {_end(of(found, name)):.2f}" for name in (ranked[0], ranked[-1]))
    return [
        f"- Highest: {first}; lowest: {last}.",
        f"- At {AIM} or more on average: {'; '.join(above) or 'none'}.",
    ]


def _mean(found: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser, "runs/kl-efficiency")("kl-efficiency", ROWS, (), render=render)


if __name__ == "__main__":
    main()
