"""PPO of Kedge beside PPO of TRL 1.12.0: the same models, data, seeds and hyper-parameters, and what still differs.

Prepares the task, trains every variant with every seed, measures the policies at the end and writes
docs/results/trl-ppo.json, .md and .svg. From the repository root, with TRL in an environment of its own (README.md):

    python benchmarks/trl_ppo/compare.py --trl-python .venv-trl/bin/python

What has been trained under --out is not trained again. `--render` writes the page again from the JSON file alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from page import page
from task import EOS, PAD, Numbers, load_prompts, prepare

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results"
TRL = ("trl", "trl-last-token")
KEDGE = ("scalar", "scalar-epsilon", "channels", "own")
SEEDS = 8
FIGURES = ("score", "kl", "length", "entropy")
FRESH_PROMPTS = 256
SAMPLES = 256  # of the reference, per fresh prompt: what the frontier rests on
LOOKS = 8  # responses of a trained policy per fresh prompt


def train(out: Path, trl_python: Path, seeds: int, workers: int) -> None:
    """Every variant with every seed, `workers` processes at a time."""
    jobs = [(variant, seed) for seed in range(seeds) for variant in (*TRL, *KEDGE)]

    def carry_out(job: tuple[str, int]) -> None:
        variant, seed = job
        if (out / variant / f"{seed}.json").exists():
            return
        side = ("trl_side.py", trl_python) if variant in TRL else ("kedge_side.py", Path(sys.executable))
        command = [str(side[1]), str(HERE / side[0]), "--task", str(out / "task"), "--out", str(out / variant)]
        command += ["--variant", variant, "--seeds", str(seed)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {variant}, seed {seed} failed:\n{done.stderr}")
        print(f"{variant}, seed {seed}: done", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(carry_out, jobs))


def at_the_end(out: Path, seeds: int) -> dict[str, Any]:
    """Reward, KL and KL efficiency of every final policy on fresh prompts, by the same code for both sides.

    Reward is the score less the penalty for a missing EOS: what both sides maximise beside the KL. Its frontier is that
    of the reference's samples.
    """
    import torch

    from kedge.evaluate.frontier import frontier, least_efficiency, shortfall
    from kedge.models.load import load_classifier, load_policy
    from kedge.models.reward import reward_model
    from kedge.rollout.engine import TorchEngine
    from kedge.rollout.given import as_prompts
    from kedge.rollout.reward import scores
    from kedge.structs import Rollouts, Sampling
    from kedge.train.limit import expected_kl
    from kedge.train.schedule import seeded

    torch.set_num_threads(1)
    numbers = Numbers.load(out / "task")
    reference, _ = load_policy(out / "task" / "policy")
    judge = reward_model([load_classifier(out / "task" / "reward")])
    prompts = as_prompts(load_prompts(out / "task", "fresh")[:FRESH_PROMPTS], PAD)

    def drawn(policy: Any, samples: int, seed: int) -> Rollouts:
        repeated = prompts.rows(torch.arange(len(prompts)).repeat_interleave(samples))
        sampling = Sampling(numbers.budget, temperature=numbers.temperature)
        return TorchEngine(EOS, PAD).generate(policy, repeated, sampling, seeded(seed, "comparison"))

    def reward(rollouts: Rollouts) -> NDArray[np.float64]:
        found = scores(judge, rollouts) - numbers.missing_eos_penalty * ~rollouts.ended
        return found.double().numpy()

    usual = reward(drawn(reference, SAMPLES, 0)).reshape(len(prompts), SAMPLES)
    best = frontier(usual)
    found: dict[str, Any] = {"reference": float(usual.mean()), "frontier_end": best.end, "policies": {}}
    for variant in (*TRL, *KEDGE):
        rows = []
        for seed in range(seeds):
            policy, _ = load_policy(out / variant / f"policy-{seed}")
            rollouts = drawn(policy, LOOKS, 1 + seed)
            gain = float(reward(rollouts).mean() - usual.mean())
            kl = float(expected_kl(policy, reference, rollouts, temperature=numbers.temperature).mean())
            rows.append({"gain": gain, "kl": kl, "efficiency": float(least_efficiency(gain, kl, best))})
        found["policies"][variant] = rows
    kl = np.mean([row["kl"] for row in found["policies"]["trl"]])
    found["frontier_at_trl"] = float(best.ceiling(kl))
    found["shortfall_at_trl"] = float(shortfall(usual, min(float(kl), best.end)))
    return found


def gathered(out: Path, trl_python: Path, seeds: int) -> dict[str, Any]:
    """Everything the page shows."""
    curves: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for variant in (*TRL, *KEDGE):
        runs = [json.loads((out / variant / f"{seed}.json").read_text(encoding="utf-8")) for seed in range(seeds)]
        curves[variant] = {
            name: [[round(row[name], 4) for row in run["curve"]] for run in runs] for name in (*FIGURES, "ended")
        }
        rows = [row for run in runs for row in run["curve"]]
        deviations = [row["return_deviation"] for row in rows if "return_deviation" in row]
        other[variant] = {
            "cpu_seconds": sorted(run["seconds"] for run in runs)[seeds // 2],
            "padding_said": sum(row["padding_said"] for row in rows),
            "return_deviation": [min(deviations), max(deviations)] if deviations else None,
        }
    return {
        "numbers": asdict(Numbers.load(out / "task")),
        "versions": versions(trl_python),
        "seeds": seeds,
        "curves": curves,
        "other": other,
        "end": at_the_end(out, seeds),
    }


def versions(trl_python: Path) -> dict[str, dict[str, str]]:
    """Of the packages on both sides."""
    ask = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"

    def of(python: Path, names: tuple[str, ...]) -> dict[str, str]:
        found = subprocess.run([str(python), "-c", ask, *names], check=True, capture_output=True, text=True)
        return dict(json.loads(found.stdout))

    return {
        "trl": of(trl_python, ("trl", "torch", "transformers", "accelerate", "datasets")),
        "kedge": of(Path(sys.executable), ("kedge", "torch", "transformers")),
    }


def write(found: dict[str, Any]) -> None:
    """The three files of the result."""
    text, drawing = page(found)
    RESULTS.joinpath("trl-ppo.md").write_text(text, encoding="utf-8")
    RESULTS.joinpath("trl-ppo.svg").write_text(drawing, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="the Python that has trl 1.12.0")
    parser.add_argument("--out", type=Path, default=Path("runs/trl-ppo"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    file = RESULTS / "trl-ppo.json"
    if not arguments.render:
        if arguments.trl_python is None:
            parser.error("--trl-python PATH is needed, unless --render")
        out: Path = arguments.out
        if not (out / "task" / "numbers.json").exists():
            import torch

            torch.set_num_threads(1)
            prepare(out / "task", Numbers())
        train(out, arguments.trl_python, arguments.seeds, arguments.workers)
        found = gathered(out, arguments.trl_python, arguments.seeds)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    write(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
