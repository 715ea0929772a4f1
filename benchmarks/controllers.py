"""How quickly each rule brings a simulated KL to its target, from a beta far too small and far too large.

The simulated policy has KL = 0.8 / beta nats at rest, goes a fifth of the way there in each step and is seen with 15%
noise. Nothing is trained. Writes docs/results/controllers.json and .md. From the repository root:

    python benchmarks/controllers.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
from desk_runs import RESULTS

from kedge.train.controller import Adaptive, Controller, Lagrangian, Pid

TARGET, EPISODES = 4.0, 64
AT_REST, PACE, NOISE = 0.8, 0.2, 0.15
STEPS, LATE, SEEDS, NEAR = 500, 300, 8, 0.25
STARTS = (0.02, 2.0)


def rules(beta: float) -> dict[str, Controller]:
    """Every rule with its settings, starting at `beta`."""
    return {
        "adaptive, horizon of 4 steps' responses": Adaptive(beta, TARGET, 4 * EPISODES),
        "adaptive, horizon of 10 steps' responses": Adaptive(beta, TARGET, 10 * EPISODES),
        "lagrangian, rate 0.02": Lagrangian(beta, TARGET, 0.02),
        "lagrangian, rate 0.1": Lagrangian(beta, TARGET, 0.1),
        "lagrangian, rate 0.5": Lagrangian(beta, TARGET, 0.5),
        "pid, 0.1, 0.02, 0": Pid(beta, TARGET, 0.1, 0.02, 0.0),
    }


def simulated(controller: Controller, seed: int) -> np.ndarray:
    """[steps] the KL, which starts at 0, under a controller that sees it with noise."""
    rng, kl, path = np.random.default_rng(seed), 0.0, []
    for _ in range(STEPS):
        kl += PACE * (AT_REST / max(controller.beta, 1e-6) - kl)
        path.append(kl)
        controller = controller.observe(kl * (1 + NOISE * rng.normal()), EPISODES)
    return np.array(path)


def figures(controller: Controller) -> dict[str, float]:
    """Means over seeds: the step from which the KL stays near the target, its largest value, and how it varies late."""
    paths = [simulated(controller, seed) for seed in range(SEEDS)]
    return {
        "steps": statistics.fmean(_settled(path) for path in paths),
        "largest": statistics.fmean(float(path.max()) for path in paths),
        "late": statistics.fmean(float(path[LATE:].std()) for path in paths),
    }


def _settled(path: np.ndarray) -> int:
    """The first step from which the KL stays within a quarter of the target."""
    far = np.flatnonzero(np.abs(path / TARGET - 1) > NEAR)
    return int(far[-1]) + 1 if len(far) else 0


def render(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The page; every number in it comes from `found`."""
    low, high = (f"{start:g}" for start in STARTS)
    page = ["# Controllers of beta on simulated policies", "", "Made by `python benchmarks/controllers.py`.", ""]
    page += [
        f"KL = {AT_REST:g}/beta nats at rest, a fifth of the way in each step, seen with 15% noise; target {TARGET:g}",
        f"nats; means over {SEEDS} seeds. *Steps*: from which the KL stays within a quarter of it. *Shakes*:",
        f"standard deviation of the KL after step {LATE}, beta starting at {low}.",
        "",
        f"| rule | from {low}: steps | largest KL | from {high}: steps | largest KL | shakes |",
        "|--|--|--|--|--|--|",
    ]
    for name, starts in found.items():
        cells = [f"{starts[start][part]:.{places}f}" for start in (low, high) for part, places in _COLUMNS]
        page.append("| " + " | ".join([name, *cells, f"{starts[low]['late']:.2f}"]) + " |")
    return "\n".join([*page, ""])


_COLUMNS = (("steps", 0), ("largest", 1))


def main() -> None:
    found: dict[str, dict[str, Any]] = {name: {} for name in rules(1.0)}
    for start in STARTS:
        for name, controller in rules(start).items():
            found[name][f"{start:g}"] = figures(controller)
    RESULTS.joinpath("controllers.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    RESULTS.joinpath("controllers.md").write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
