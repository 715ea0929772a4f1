"""The faults of the study, the benign changes beside them, and who was tuned on what.

All of this was written before any threshold of a check was set: what is expected of the diagnosis, which other answers
count half, which seeds and faults nobody looks at while thresholds are set. A test freezes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from faults.patches import (
    Patch,
    asked,
    cut_short,
    ends_untrained,
    moved_reference,
    nucleus,
    phrase_bonus,
    score_weight,
    stale_sampler,
    token_constant,
)
from faults.rewards import BETTER, TONE, Change, longer_is_better, scaled, swapped

Severity = Literal["strong", "mild"]
SEVERITIES: tuple[Severity, ...] = ("strong", "mild")
TUNING_SEEDS = (0, 1, 2)
TEST_SEEDS = (10, 11, 12, 13, 14)
STEPS = 40
ONSETS = tuple(range(12, 25, 2))  # policy steps done when a fault sets in


@dataclass(frozen=True)
class Dose:
    """What a run is given at the onset: settings, another reward model, a patch; `branch` is of its draws."""

    settings: tuple[str, ...] = ()
    reward: Change | None = None
    patch: Patch | None = None
    branch: int = 0


@dataclass(frozen=True)
class Fault:
    """One fault in two doses; `expected` is the check that has to come first, `confusable` count half.

    `length` says whether it works by what answers cost or gain by their length. `held_out` faults are made under no
    tuning seed.
    """

    name: str
    what: str
    expected: str
    strong: Dose
    mild: Dose
    confusable: tuple[str, ...] = ()
    length: bool = False
    held_out: bool = False

    def dose(self, severity: Severity) -> Dose:
        return self.strong if severity == "strong" else self.mild


@dataclass(frozen=True)
class Benign:
    """A change that is no fault."""

    name: str
    what: str
    dose: Dose = field(default_factory=Dose)


def _kl(*settings: str) -> Dose:
    return Dose(tuple(f"policy.kl.{setting}" for setting in settings))


def _settings(*settings: str) -> Dose:
    return Dose(tuple(f"policy.{setting}" for setting in settings))


# Annotators who like such answers do not teach a reward model that does: the supervised policy declines almost only
# where that is right, so that a bias of 3 changed 17 of 4,282 labels, and the run against that model was healthy.
DECLINING = ("i do not know", "i can not share")

FAULTS: tuple[Fault, ...] = (
    Fault(
        "length_bonus",
        "the reward model pays 0.15 (0.08) standard deviations per token",
        "length_reward",
        Dose(reward=longer_is_better(0.15)),
        Dose(reward=longer_is_better(0.08)),
        ("beta", "reward_unit"),
        length=True,
    ),
    Fault(
        "beta_low",
        "beta is a tenth (a third) of what it was",
        "beta",
        _kl("beta=0.03"),
        _kl("beta=0.1"),
        ("length_reward", "reward_unit"),
    ),
    Fault(
        "score_scale",
        "all scores times 5 (2.5)",
        "reward_unit",
        Dose(reward=scaled(5)),
        Dose(reward=scaled(2.5)),
        ("beta", "unscaled_reward"),
    ),
    Fault(
        "token_constant",
        "0.15 (0.06) reward for every token",
        "token_constant",
        Dose(patch=token_constant(0.15)),
        Dose(patch=token_constant(0.06)),
        ("length_reward",),
        length=True,
    ),
    Fault(
        "kl_in_reward",
        "the reward counts k3 (k2) in the place of k1",
        "kl_estimator",
        _kl("estimator=k3", "study=true"),
        _kl("estimator=k2", "study=true"),
        ("beta",),
    ),
    Fault(
        "kl_in_loss",
        "the KL is k1 (k3 per token) as a loss",
        "kl_estimator",
        _kl("place=loss", "estimator=k1", "study=true"),
        _kl("place=loss", "estimator=k3", "study=true"),
        ("beta",),
    ),
    Fault(
        "ends_untrained",
        "the end token has no part in the loss, of all (half of the) responses",
        "ending",
        Dose(patch=ends_untrained(1)),
        Dose(patch=ends_untrained(2)),
        ("length_reward",),
        length=True,
    ),
    Fault(
        "cut_short",
        "training draws at most 8 (11) tokens and scores what was cut off as complete",
        "ending",
        Dose(("policy.missing_eos_penalty=0",), patch=cut_short(8)),
        Dose(("policy.missing_eos_penalty=0",), patch=cut_short(11)),
        ("length_reward",),
        length=True,
    ),
    Fault(
        "gamma",
        "gamma is 0.9 (0.97) per token",
        "discount",
        _settings("gamma=0.9"),
        _settings("gamma=0.97"),
        ("critic",),
        length=True,
    ),
    Fault(
        "lambda",
        "lambda is 0.5 (0.8)",
        "discount",
        _settings("lam=0.5"),
        _settings("lam=0.8"),
        ("critic",),
        held_out=True,
    ),
    Fault(
        "critic_rate",
        "the critic learns 100 (30) times as fast",
        "critic",
        _settings("critic_lr=0.1"),
        _settings("critic_lr=0.03"),
        ("whitening",),
    ),
    Fault(
        "controller_unit",
        "beta is steered to 40 (15) nats, a unit that is not this run's",
        "controller",
        _kl("mode=adaptive", "target=40", "horizon=150"),
        _kl("mode=adaptive", "target=15", "horizon=300"),
        ("beta",),
    ),
    Fault(
        "moved_reference",
        "the policy becomes the reference after every 2 steps (once)",
        "reference",
        Dose(patch=moved_reference(2)),
        Dose(patch=moved_reference(0)),
        ("beta",),
    ),
    Fault(
        "nucleus",
        "responses are drawn with top-p 0.9 (0.97) and trained on as if from all",
        "sampler",
        Dose(patch=nucleus(0.9)),
        Dose(patch=nucleus(0.97)),
        ("kl_estimator",),
    ),
    Fault(
        "stale_sampler",
        "the sampler's weights are 6 (2) steps old",
        "sampler",
        Dose(patch=stale_sampler(6)),
        Dose(patch=stale_sampler(2)),
        ("step_size",),
    ),
    Fault(
        "step_size",
        "8 epochs a batch and 5 (2.5) times the learning rate",
        "step_size",
        _settings("epochs=8", "lr=1.5e-3"),
        _settings("epochs=8", "lr=7.5e-4"),
        ("wasted_kl", "beta"),
    ),
    Fault(
        "refusal_reward",
        "2 (1) standard deviations for answers that decline or say that they do not know",
        "feature_reward",
        Dose(patch=phrase_bonus(2.0, *DECLINING)),
        Dose(patch=phrase_bonus(1.0, *DECLINING)),
        ("exploit", "refusals"),
    ),
    Fault(
        "tone_reward",
        "a reward model of annotators who like answers that sound certain (half its weights)",
        "feature_reward",
        Dose(reward=swapped(TONE)),
        Dose(reward=swapped(TONE, 0.5)),
        ("exploit", "overconfidence"),
        held_out=True,
    ),
    Fault(
        "phrase_bonus",
        "3 (1.5) standard deviations for answers with the words 'thanks !'",
        "exploit",
        Dose(patch=phrase_bonus(3.0, "thanks !")),
        Dose(patch=phrase_bonus(1.5, "thanks !")),
        ("feature_reward",),
    ),
    Fault(
        "unscaled",
        "the score counts 20 (8) times and advantages are not whitened",
        "unscaled_reward",
        Dose(("policy.whiten=false",), patch=score_weight(20)),
        Dose(("policy.whiten=false",), patch=score_weight(8)),
        ("reward_unit", "beta"),
    ),
    Fault(
        "entropy",
        "an entropy bonus of 0.5 (0.2) per nat",
        "entropy_bonus",
        _settings("entropy_bonus=0.5"),
        _settings("entropy_bonus=0.2"),
        ("wasted_kl",),
    ),
    Fault(
        "frozen",
        "the learning rate is 1e-12 (1e-6)",
        "frozen",
        _settings("lr=1e-12"),
        _settings("lr=1e-6"),
    ),
)

# Most prompts of these kinds have answers longer than the desk's mean; the order's day is hardest to find.
LONG = r"when does order|how do i reset|what is the \w+ of customer"
HARD = r"when does order|how long"

BENIGN: tuple[Benign, ...] = (
    *(Benign(f"null-{branch}", "other draws, nothing changed", Dose(branch=branch)) for branch in range(1, 8)),
    Benign("long_prompts", "training asks only prompts with long answers", Dose(patch=asked(LONG))),
    Benign("hard_prompts", "training asks only what is hard to look up", Dose(patch=asked(HARD))),
    Benign("batch_64", "64 responses a step in the place of 96", _settings("prompts_per_step=64")),
    Benign("slower", "0.7 times the learning rate", _settings("lr=2.1e-4")),
    Benign("better_reward", "a reward model from nearly twice the labels", Dose(reward=swapped(BETTER))),
)


def onset(name: str, severity: str, seed: int) -> int:
    """The policy step at which a run is changed: drawn by name, the same on every machine."""
    if name.startswith("null-"):  # one null for each onset of a seed's faults, so that each has its own
        return ONSETS[int(name.removeprefix("null-")) - 1]
    digest = hashlib.sha256(f"{name}/{severity}/{seed}".encode()).digest()
    return ONSETS[int.from_bytes(digest[:4], "big") % len(ONSETS)]
