"""Kedge's side: PPO on the prepared task, one curve a seed. `README.md` has the command."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import figures
from task import EOS, PAD, Numbers, load_prompts

from kedge.models.heads import Critic
from kedge.models.load import load_classifier, load_policy, save_model
from kedge.models.reward import reward_model
from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_prompts
from kedge.rollout.reward import scores
from kedge.structs import Prompts, Rollouts, Sampling
from kedge.train.checkpoint import State
from kedge.train.controller import Controllers, Fixed
from kedge.train.experience import SCALAR_CRITIC, channel_names
from kedge.train.policy import PolicySettings, Tie, prompt_batch, train_policy
from kedge.train.update import Learner, UpdateSettings


@dataclass(frozen=True)
class Variant:
    """What of Kedge's own is switched on beside the shared numbers."""

    heads: tuple[str, ...]
    max_grad_norm: float = math.inf  # TRL's PPO never clips gradients
    value_clip: float | None = None  # standard deviations of the return; None: the shared number
    trl_epsilon: bool = False  # the critic's Adam moves as if its loss were weighed as TRL's


CHANNELS = channel_names(("score",))
VARIANTS = {
    "scalar": Variant((SCALAR_CRITIC,)),
    "scalar-epsilon": Variant((SCALAR_CRITIC,), trl_epsilon=True),
    "channels": Variant(CHANNELS),
    "own": Variant(CHANNELS, max_grad_norm=1.0, value_clip=1.0),
}


class Watched:
    """An engine that measures what it has drawn."""

    def __init__(self, reference: Any, judge: Any) -> None:
        self.engine, self.reference, self.judge = TorchEngine(EOS, PAD), reference, judge
        self.curve: list[dict[str, float]] = []

    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts:
        """As the engine does."""
        rollouts = self.engine.generate(policy, prompts, sampling, generator, policy_version)
        self.curve.append(figures(policy, self.reference, self.judge, rollouts.prompt_ids, rollouts.response_ids))
        return rollouts


def curve(task: Path, variant: Variant, seed: int, out: Path | None = None) -> Iterator[dict[str, float]]:
    """The figures of each step as it is done; the policy is saved to `out` at the end."""
    numbers = Numbers.load(task)
    policy, tokenizer = load_policy(task / "policy")
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge = load_classifier(task / "reward").requires_grad_(False)
    judged = reward_model([judge])
    # The score's head starts as the reward model's, trunk and head; with a scalar critic that head is the only one.
    critic = Critic.from_reward_model(judged, variant.heads, 0)
    # Dividing a loss by c and multiplying Adam's epsilon by it are the same. Kedge divides by the return's variance,
    # TRL multiplies by a coefficient, so that its epsilon weighs more against the gradient.
    heavier = 1 / (numbers.value_coefficient * numbers.return_variance) if variant.trl_epsilon else 1.0
    learner = Learner(policy, _adam(policy, numbers), critic, _adam(critic, numbers, heavier))
    settings = PolicySettings(
        steps=numbers.steps,
        sampling=Sampling(numbers.budget, temperature=numbers.temperature),
        update=UpdateSettings(
            epochs=numbers.epochs,
            minibatches=numbers.minibatches,
            clip=numbers.clip,
            value_clip=numbers.value_clip if variant.value_clip is None else variant.value_clip,
            max_grad_norm=variant.max_grad_norm,
            temperature=numbers.temperature,
        ),
        weights={"score": 1.0, "length": 0.0, "missing_eos": -numbers.missing_eos_penalty},
        gamma=numbers.gamma,
        lam=numbers.lam,
        whiten=True,
        critic_warmup=0,
        seed=seed,
        eos_id=EOS,
    )
    pool = as_prompts(load_prompts(task), PAD)
    engine = Watched(reference, judge)
    steps = train_policy(
        learner,
        Tie(reference),
        {"score": lambda rollouts: scores(judged, rollouts)},
        lambda step: prompt_batch(pool, numbers.batch, 1, seed, step),
        engine,
        settings,
        State(0, Controllers.of(Fixed(numbers.beta))),
    )
    for step in steps:
        variance = step.state.return_variance
        assert variance is not None
        yield engine.curve[-1] | {"return_deviation": float(variance[0].sqrt())}
    if out is not None:
        save_model(policy, tokenizer, out)


def _adam(model: Any, numbers: Numbers, heavier: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=numbers.lr, eps=numbers.adam_epsilon * heavier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="scalar")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        file = arguments.out / f"{seed}.json"
        if file.exists():
            continue
        began = time.process_time()
        rows = list(curve(arguments.task, VARIANTS[arguments.variant], seed, arguments.out / f"policy-{seed}"))
        found = {"seconds": time.process_time() - began, "curve": rows}
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
