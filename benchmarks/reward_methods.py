"""What does each way of learning a reward do to the policy, when the annotators are biased?

In the built-in desk, where gold is known: every method learns from the labels of the same annotators on the same
answers, then PPO runs against its score alone (the demo's settings) and under KL control (beta 0.5).
Writes docs/results/reward-methods.json and .md. From the repository root:

    python benchmarks/reward_methods.py --out runs/reward-methods --workers 2

`--only METHOD` (repeatable) makes the rows of these methods again and keeps the others as they are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from desk_runs import DESK, EXPLOIT, RESULTS, carry_out, figures, lines, reward_figures, side_by_side

WORLDS = {
    "length": ("annotators who like long answers", DESK, (), (0, 1, 2)),
    "certainty": ("annotators who fall for a certain tone", EXPLOIT, ("policy.kl.beta=0.15",), (0,)),
    "refusal": (
        "annotators who like refusals",
        DESK,
        ("desk.annotators.length=0.05", "desk.annotators.refusal=3.0"),
        (0,),
    ),
}
UNBIASED = ("desk.annotators.length=0", "desk.annotators.tone=0", "desk.annotators.refusal=0")
REFRESHED = "refreshed, same annotators"
METHODS: dict[str, tuple[str, ...]] = {
    "unbiased annotators": UNBIASED,
    "plain": (),
    "label smoothing": ("reward.loss=smoothed",),
    "robust": ("reward.loss=robust",),
    "flip-aware": ("reward.loss=flip_aware",),
    "centred": ("reward.centring=0.01",),
    "length residual": ("reward.length=residual",),
    "two heads": ("reward.length=two_head",),
    "product of experts": ("reward.length=product",),
    "length-balanced pairs": ("reward.length=resample",),
    "padded residual, 1.5": ("reward.length=padded_residual", "reward.length_share=1.5"),
    "padded residual, 2": ("reward.length=padded_residual", "reward.length_share=2.0"),
    "padded residual, 1.5, 3 models": (
        "reward.members=3",
        "reward.length=padded_residual",
        "reward.length_share=1.5",
    ),
    "padded pairs": ("reward.length=padded_pairs",),
    "3 models, mean": ("reward.members=3",),
    "3 models, worst": ("reward.members=3", "reward.aggregate=worst"),
    "3 models, less variance": (
        "reward.members=3",
        "reward.aggregate=mean_minus_variance",
        "reward.variance_weight=0.5",
    ),
    "3 heads, worst": ("reward.members=3", "reward.trunk=shared", "reward.aggregate=worst"),
    "3 adapters, worst": ("reward.members=3", "reward.trunk=lora", "reward.aggregate=worst"),
    REFRESHED: (),
}
# One seed in the other worlds, and there the methods that differ most.
ELSEWHERE = ("unbiased annotators", "plain", "padded residual, 1.5", "padded pairs", "3 models, worst")
CONTROL = ("policy.kl.beta=0.5",)
NEAR = 0.25  # a length within this share of the reference's has not drifted
CLOSE = 0.3  # gold
ENOUGH = 0.8  # of the gain in gold that unbiased annotators bring


@dataclass(frozen=True)
class Job:
    """One method in one world under one seed; `out` holds all of them."""

    world: str
    seed: int
    method: str
    out: Path


def carried_out(job: Job) -> dict[str, Any]:
    """Reward model, PPO alone and PPO under KL control; what they came to."""
    _, recipe, world, _ = WORLDS[job.world]
    settings = (f"seed={job.seed}", *world, *METHODS[job.method])
    folder = job.out / f"{job.world}-{job.seed}" / "".join(c if c.isalnum() else "-" for c in job.method)
    alone, held, start = folder / "alone", folder / "held", job.out / f"sft-{job.seed}"
    inputs = None
    if job.method == REFRESHED and not (alone / "reward.done").exists():
        inputs = _refreshed(recipe, settings, folder.parent / "plain" / "alone")
    carry_out("reward", recipe, alone, settings, start=start, inputs=inputs)
    carry_out("policy", recipe, alone, settings)
    carry_out("policy", recipe, held, (*settings, *CONTROL), start=alone)
    figured = {"reward": reward_figures(alone), "alone": figures(alone), "held": figures(held)}
    return {"world": job.world, "seed": job.seed, "method": job.method, **figured}


def _refreshed(recipe: Path, settings: tuple[str, ...], plain: Path) -> Any:
    """The desk with other judgments: the pairs of the run `plain`, and as many of its final policy's answers against
    the reference's, labelled by the same annotators."""
    from kedge import recipe as recipes
    from kedge.data.records import Loaded, Preference
    from kedge.pipeline.context import Context
    from kedge.pipeline.tasks import inputs_of
    from kedge.progress import Interrupt, Progress
    from kedge.trace.run_dir import RunDir
    from kedge.train.schedule import seeded

    given = recipes.load(recipe, settings)
    inputs = inputs_of(given)
    context = Context(given, RunDir(plain), inputs.task, inputs.tokenizer, Progress(quiet=True), Interrupt())
    texts, labeller = inputs.task.pair_prompts, inputs.task.labeller
    assert labeller is not None
    prompts = context.encode_prompts(texts)
    answers = []
    for name in ("policy", "sft"):
        draw = seeded(given.seed, f"refresh {name}")
        model = context.policy(context.run.models / name)
        answers.append(context.text(context.engine.generate(model, prompts, context.sampling, draw)))
    pairs = [(text, a, b) for text, a, b in zip(texts, *answers, strict=True) if a != b]
    fresh = [
        Preference(text, *((a, b) if first else (b, a)))
        for (text, a, b), first in zip(pairs, labeller(pairs), strict=True)
    ]
    old = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in lines(plain / "pairs.jsonl")]
    return replace(inputs, task=replace(inputs.task, judgments=Loaded.of([*old, *fresh], "refreshed pairs")))


def judged(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method in the length-biased world: did it hold length in every seed, and how much gold did it keep?"""
    rows = {(row["method"], row["seed"]): row for row in results if row["world"] == "length"}
    seeds = sorted({seed for _, seed in rows})
    verdicts = {}
    for method in METHODS:
        mine = [rows[method, seed] for seed in seeds]
        fair = [rows["unbiased annotators", seed] for seed in seeds]
        gains = [_gain(row["held"]) / _gain(other["held"]) for row, other in zip(mine, fair, strict=True)]
        verdicts[method] = {
            "length_held_alone": [abs(row["alone"]["length_ratio"] - 1) <= NEAR for row in mine],
            "no_longer_alone": [row["alone"]["length_ratio"] <= 1 + NEAR for row in mine],
            "length_held_under_control": [abs(row["held"]["length_ratio"] - 1) <= NEAR for row in mine],
            "share_of_gain_under_control": gains,
        }
    return verdicts


def _gain(run: dict[str, float]) -> float:
    return run["gold"] - run["gold_start"]


def render(results: list[dict[str, Any]], command: str) -> str:
    """The page; every number in it comes from `results`."""
    page = ["# What each reward model does to the policy", ""]
    page += [f"Made by `{command}`; raw figures in `reward-methods.json`.", ""]
    page += [
        "Gold is the mean utility over 512 evaluation prompts after PPO, length is over the reference's, KL is k1 in",
        "nats per sequence. Accuracy and length correlation are the reward model's on held-out pairs, labelled by the",
        "same annotators. *Alone*: beta 0.15, as in the demo; *control*: 0.5. In brackets lowest and highest seed.",
        "",
    ]
    for world, (title, *_) in WORLDS.items():
        rows = [row for row in results if row["world"] == world]
        if not rows:
            continue
        seeds = sorted({row["seed"] for row in rows})
        start = _spread([row["alone"]["gold_start"] for row in rows if row["method"] == "plain"])
        page += [
            f"## {title[0].upper()}{title[1:]}",
            "",
            f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; gold of the supervised policy {start}.",
            "",
        ]
        page += [
            "| method | accuracy | length corr. | alone: gold | correct | length | KL "
            "| control: gold | correct | length | KL |"
        ]
        page += ["|" + "--|" * 11]
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            cells = [_spread([row["reward"][name] for row in mine]) for name in ("accuracy", "length_correlation")]
            for part in ("alone", "held"):
                names = ("gold", "correct", "length_ratio", "kl_per_sequence")
                cells += [_spread([row[part][name] for row in mine]) for name in names]
            page.append("| " + " | ".join([method, *cells]) + " |")
        page.append("")
    page += ["## Against the unbiased control", "", "Length-biased annotators, every seed.", ""]
    page += [
        "| method | alone: at most 1.25x | alone: within 25% | control: within 25% "
        "| control: share of the unbiased gain |"
    ]
    page += ["|" + "--|" * 5]
    for method, verdict in judged(results).items():
        flags = [verdict[name] for name in ("no_longer_alone", "length_held_alone", "length_held_under_control")]
        counts = [f"{sum(flag)} of {len(flag)}" for flag in flags]
        page.append("| " + " | ".join([method, *counts, _spread(verdict["share_of_gain_under_control"])]) + " |")
    return "\n".join([*page, "", *_reading(results), ""])


def _reading(results: list[dict[str, Any]]) -> list[str]:
    """What the tables say, in words; which methods are named depends on the figures alone."""
    verdicts = judged(results)
    methods = [method for method in METHODS if method != "unbiased annotators"]
    held = [method for method in methods if all(verdicts[method]["length_held_alone"])]
    enough = [m for m in held if min(verdicts[m]["share_of_gain_under_control"]) >= ENOUGH]
    nearly = [m for m in held if _mean(verdicts[m]["share_of_gain_under_control"]) >= ENOUGH]
    gold = {
        m: _mean([row["alone"]["gold"] for row in results if (row["world"], row["method"]) == ("length", m)])
        for m in methods
    }
    useless = [m for m in methods if m != "plain" and gold[m] <= gold["plain"] + CLOSE]
    return [
        "## Reading",
        "",
        f"- Length within {NEAR:.0%} of the reference's in every seed, alone: {_named(held)}.",
        f"- Of these, under control at least {ENOUGH:.0%} of the unbiased gain in every seed: {_named(enough)}.",
        f"- The same on average over seeds: {_named(nearly)}.",
        f"- Alone, on average no more than {CLOSE} gold above plain: {_named(useless)}.",
        "  What members and losses have in common with the annotators, they cannot see.",
        "- What is read off the answers there are (residual, two heads, product, balanced pairs) takes the correlation",
        "  with length away and not its price: see [what did not work](../what-did-not-work.md).",
    ]


def _named(methods: list[str]) -> str:
    return "; ".join(methods) or "none"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f}, {max(values):.2f})"


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By world, method and seed, as the tables have them."""
    worlds, methods = list(WORLDS), list(METHODS)
    return sorted(results, key=lambda row: (worlds.index(row["world"]), methods.index(row["method"]), row["seed"]))


def _supervised(out: Path, seed: int) -> None:
    carry_out("sft", DESK, out / f"sft-{seed}", (f"seed={seed}",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reward-methods"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", action="append", choices=METHODS, metavar="METHOD")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for *_, seeds in WORLDS.values() for seed in seeds})
    side_by_side(partial(_supervised, out), seeds, arguments.workers)
    jobs = [Job("length", seed, method, out) for method in METHODS for seed in WORLDS["length"][3]]
    others = [world for world in WORLDS if world != "length"]
    jobs += [Job(world, seed, method, out) for method in ELSEWHERE for world in others for seed in WORLDS[world][3]]
    kept = json.loads(RESULTS.joinpath("reward-methods.json").read_text(encoding="utf-8")) if arguments.only else []
    jobs = [job for job in jobs if not arguments.only or job.method in arguments.only]
    made = {(job.world, job.seed, job.method) for job in jobs}
    results = [row for row in kept if (row["world"], row["seed"], row["method"]) not in made]
    results = in_order(results + side_by_side(carried_out, jobs, arguments.workers))
    command = "python benchmarks/reward_methods.py"
    RESULTS.joinpath("reward-methods.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.joinpath("reward-methods.md").write_text(render(results, command), encoding="utf-8")
    for method, verdict in judged(results).items():
        print(method, verdict)


if __name__ == "__main__":
    main()
