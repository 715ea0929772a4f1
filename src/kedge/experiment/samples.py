"""Many answers of the supervised policy to the evaluation prompts, as one or more reward models score them.

They give what no training is needed for: the frontier of each reward model and the best of n of its answers.
Dimensions: P prompts, N answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kedge.models.reward import load_reward_model
from kedge.pipeline.context import Context
from kedge.pipeline.tasks import inputs_of
from kedge.progress import Interrupt, Progress
from kedge.recipe import Recipe
from kedge.rollout.reward import scores
from kedge.trace.run_dir import RunDir
from kedge.train.schedule import seeded

Floats = NDArray[np.float64]

AT_ONCE = 16  # answers per prompt between two looks at whether to stop


@dataclass(frozen=True)
class Samples:
    """N answers to each evaluation prompt."""

    scores: Mapping[str, Floats]  # [P, N] by reward model, normalised
    logprobs: Floats  # [P, N] of the whole answer under the supervised policy, nats
    lengths: Floats  # [P, N] tokens
    truth: Mapping[str, Floats]  # [P, N] what the world knows: gold, correct, ...; empty without a world

    def save(self, path: Path) -> None:
        """Write an `.npz`; it appears complete or not at all."""
        named = {f"score {name}": values for name, values in self.scores.items()}
        named |= {f"truth {name}": values for name, values in self.truth.items()}
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez_compressed(file, logprobs=self.logprobs, lengths=self.lengths, **named)  # type: ignore[arg-type]
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """What `save` wrote."""
        with np.load(path) as found:
            scores, truth = (
                {name.removeprefix(mark): found[name] for name in found.files if name.startswith(mark)}
                for mark in ("score ", "truth ")
            )
            return cls(scores, found["logprobs"], found["lengths"], truth)


def reference_samples(
    recipe: Recipe, sft: Path, reward_models: Mapping[str, Path], count: int, progress: Progress, interrupt: Interrupt
) -> Samples:
    """`count` answers per evaluation prompt of the supervised policy in the run `sft`, with the scores of each reward
    model; `reward_models` are runs that have one, by name. The draws differ from those of any stage of a run."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    inputs = inputs_of(recipe)
    context = Context(recipe, RunDir(sft), inputs.task, inputs.tokenizer, progress, interrupt)
    policy = context.policy(context.run.models / "sft")
    models = {name: load_reward_model(RunDir(path).models / "reward") for name, path in reward_models.items()}
    texts, truth = inputs.task.evaluation.rows, inputs.task.truth
    prompts = context.encode_prompts(texts)
    parts: list[dict[str, Floats]] = []
    with progress.stage("samples", count) as stage:
        for first in range(0, count, AT_ONCE):
            interrupt.check("sampling the supervised policy")
            few = min(AT_ONCE, count - first)
            rows = torch.arange(len(prompts)).repeat_interleave(few)
            draw = seeded(recipe.seed, "reference samples", first)
            answers = context.engine.generate(policy, prompts.rows(rows), context.sampling, draw)
            found: dict[str, Any] = {f"score {name}": scores(model, answers) for name, model in models.items()}
            found["logprobs"] = answers.behaviour_logprobs.double().sum(dim=1)
            found["lengths"] = answers.lengths
            if truth is not None:
                asked = [texts[row] for row in rows.tolist()]
                known = [truth(prompt, text) for prompt, text in zip(asked, context.text(answers), strict=True)]
                found |= {f"truth {name}": [row[name] for row in known] for name in known[0]}
            parts.append({name: _square(values, few) for name, values in found.items()})
            stage.advance(first + few - 1)
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return Samples(
        scores={name: joined[f"score {name}"] for name in models},
        logprobs=joined["logprobs"],
        lengths=joined["lengths"],
        truth={name.removeprefix("truth "): joined[name] for name in joined if name.startswith("truth ")},
    )


def _square(values: Any, few: int) -> Floats:
    """[P, few] from a row per answer."""
    return np.asarray(values, dtype=np.float64).reshape(-1, few)
