"""Which settings a replay can change: the recipe's own keys, and why it must refuse the others.

A replay knows what the trace holds: the responses that were drawn, their log-probabilities, rewards and values. It does
not know what another policy would have drawn, what another critic would have learnt, or how far a step goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kedge import recipe as recipes
from kedge.errors import InputError, Problem
from kedge.recipe import Recipe
from kedge.recipe.methods import CRITIC, GROUPED, ON_POLICY

ScoreTransform = Literal["residual_length"]
SCORE = "score"
TRANSFORMS: tuple[ScoreTransform, ...] = ("residual_length",)

# What a changed key changes of how a step is computed: fields of `setting.Setting`.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "policy.method": ("method", "aggregation", "clip"),
    "policy.gamma": ("gamma",),
    "policy.lam": ("lam",),
    "policy.whiten": ("whiten",),
    "policy.clip": ("clip",),
    "policy.clip_high": ("clip_high",),
    "policy.dual_clip": ("dual_clip",),
    "policy.aggregation": ("aggregation",),
    "policy.importance_cap": ("importance_cap",),
    "policy.entropy_bonus": ("entropy_bonus",),
    "policy.score_clip": ("score_clip",),
    "policy.kl.place": ("place", "estimator"),
    "policy.kl.estimator": ("estimator",),
    "policy.kl.study": (),
    "policy.overlong_buffer": (),
}
PENALTIES: Mapping[str, str] = {  # key -> channel, whose weight is minus the penalty
    "policy.length_penalty": "length",
    "policy.missing_eos_penalty": "missing_eos",
    "policy.overlong_penalty": "overlong",
    "policy.target_penalty": "over_target",
    "policy.repetition_penalty": "repetition",
}
BETA = tuple(
    f"policy.kl.{name}"
    for name in ("beta", "mode", "target", "horizon", "rate", "proportional", "integral", "derivative")
)
CLIPS = ("policy.clip", "policy.clip_high", "policy.dual_clip")  # they act from the second minibatch on

_DRAWS = "decides what is drawn, and a replay has only what was drawn"
_PACE = "decides how far a step goes; a replay knows what a step pushes on, not how far it goes"
_CRITIC = "decides what the critic learns, and a replay has only what it had learnt"
_MODELS = "was settled before the policy stage"
_AFTER = "acts on the policy after an update, which a replay does not have"
_NO_PART = "has no part in the update"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("policy.samples_per_prompt", "policy.prompts_per_step", "policy.max_new_tokens", "policy.temperature"), _DRAWS
    ),
    "policy.branch": _DRAWS,
    **dict.fromkeys(
        (
            *("policy.steps", "policy.epochs", "policy.minibatches", "policy.lr", "policy.final_lr"),
            *("policy.max_grad_norm", "policy.lora_rank"),
        ),
        _PACE,
    ),
    **dict.fromkeys(("policy.critic", "policy.critic_lr", "policy.critic_warmup", "policy.value_clip"), _CRITIC),
    **dict.fromkeys(("policy.kl.limit", "policy.kl.at_limit"), _AFTER),
    "policy.kl.budgets": "needs each prompt's group of the reference's length, which the trace does not hold",
    **dict.fromkeys(("policy.reference", "policy.reference_every"), "needs the log-probabilities of another reference"),
    "policy.pretraining_mix": "needs the gradient of the demonstrations, which the trace does not hold",
    "policy.score_normalisation": "needs scores that the trace does not hold: of the reference's answers, or unscaled",
    "policy.label_smoothing": "is read by no method with advantages",
    "policy.microbatch": _NO_PART,
}
_SECTIONS: Mapping[str, str] = {
    **dict.fromkeys(("seed", "world", "desk", "data", "model", "sft", "pairs"), _MODELS),
    "reward": "trains another reward model, which a replay does not do",
    **dict.fromkeys(("name", "threads", "evaluate", "trace", "checkpoint"), _NO_PART),
    "guard": _AFTER,
}
_TRIAL = "`kedge trial` carries it out"
_REMEDIES: Mapping[str, str] = {
    _NO_PART: "leave it out",
    _MODELS: "change it in a run of its own",
    _SECTIONS["reward"]: "train one and give its folder with --reward, or let `kedge trial` do it",
}


@dataclass(frozen=True)
class Plan:
    """What a replay changes: the recipe before and after, the keys that were named, and what else judges."""

    before: Recipe
    after: Recipe
    keys: frozenset[str]  # of the recipe
    changes: tuple[str, ...]  # as the user wrote them
    transform: ScoreTransform | None = None
    reward: Path | None = None  # another reward model
    known: bool = True  # False where the run holds no recipe
    rules: tuple[str, ...] = ()  # channels whose rule is asked again

    @property
    def changes_return(self) -> bool:
        """Whether what a response earns as a whole is another, and not only how it is spread over tokens."""
        paid = {*BETA, *PENALTIES, "policy.score_clip", "policy.kl.place", "policy.kl.estimator", "policy.gamma"}
        ruled = any(key.startswith("rewards.") for key in self.keys)
        return bool(self.keys & paid) or ruled or self.transform is not None or self.reward is not None


def plan_of(settings: Mapping[str, Any], changes: Sequence[str] = (), *, reward: Path | None = None) -> Plan:
    """The plan for a run with these `settings`. Raises `InputError` for mistakes and for what cannot be replayed."""
    transform, overrides = _transform(changes)
    _require_whole_names(overrides)
    before = recipes.build(settings, source="recipe.json")
    _require_advantages(before)
    _require_groups(before, overrides)
    after = recipes.build(settings, overrides, source="recipe.json")
    keys = frozenset(override.partition("=")[0].strip() for override in overrides)
    problems = [
        Problem(f"--set {override}", f"{key} {reason}", _REMEDIES.get(reason, _TRIAL))
        for override in overrides
        if (reason := refusal(key := override.partition("=")[0].strip())) is not None
    ]
    problems += _of_this_run(before, after, keys, reward)
    if problems:
        raise InputError(problems)
    rules = {key.split(".")[1] for key in keys if key.startswith("rewards.") and not key.endswith(".weight")}
    return Plan(before, after, keys, tuple(changes), transform, reward, bool(settings), tuple(sorted(rules)))


def refusal(key: str) -> str | None:
    """Why a replay cannot change `key` of the recipe; None where it can."""
    if key in FIELDS or key in PENALTIES or key in BETA or key.startswith("rewards."):
        return None
    return _REFUSED.get(key) or _SECTIONS.get(key.split(".")[0]) or "is not in the trace"


def _transform(changes: Sequence[str]) -> tuple[ScoreTransform | None, list[str]]:
    """The score's transform, and the changes that are the recipe's."""
    transform: ScoreTransform | None = None
    rest: list[str] = []
    for change in changes:
        key, equals, value = change.partition("=")
        if key.strip() != SCORE or not equals:
            rest.append(change)
            continue
        found = next((one for one in TRANSFORMS if one == value.strip()), None)
        if found is None:
            near = difflib.get_close_matches(value.strip(), TRANSFORMS, n=1, cutoff=0.5)
            remedy = f"did you mean {SCORE}={near[0]}?" if near else f"known: {', '.join(TRANSFORMS)}"
            raise InputError(Problem(f"--set {change}", f"there is no transform {value.strip()!r}", remedy))
        transform = found
    return transform, rest


def _require_whole_names(overrides: Sequence[str]) -> None:
    """`kl.beta` is called policy.kl.beta in a recipe; the recipe's own error would not find it."""
    known = recipes.keys()
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in known and (whole := f"policy.{key}") in known:
            raise InputError(Problem(f"--set {override}", f"there is no key {key}", f"did you mean {whole}?"))


def _require_advantages(recipe: Recipe) -> None:
    method = recipe.policy.method
    if method not in ON_POLICY:
        what = f"{method} has no advantages to compute again"
        raise InputError(Problem("replay", what, f"replay runs of {', '.join(ON_POLICY)}"))


def _require_groups(before: Recipe, overrides: Sequence[str]) -> None:
    """A method that compares responses needs several to a prompt; more cannot be drawn."""
    for override in overrides:
        key, _, value = override.partition("=")
        method = value.strip().strip("\"'")
        if key.strip() == "policy.method" and method in GROUPED and before.policy.samples_per_prompt < 2:
            what = f"{method} compares responses to the same prompt, and this run drew one for each"
            raise InputError(Problem(f"--set {override}", what, _TRIAL))


def _of_this_run(before: Recipe, after: Recipe, keys: frozenset[str], reward: Path | None) -> list[Problem]:
    """What this run in particular does not hold."""
    problems = []
    policy, kl = after.policy, after.policy.kl
    if policy.method not in ON_POLICY:
        what = f"{policy.method} has no advantages"
        problems.append(Problem(f"policy.method={policy.method}", what, f"choose one of {', '.join(ON_POLICY)}"))
    elif policy.method in CRITIC and before.policy.method not in CRITIC:
        what = f"{before.policy.method} had no critic, and {policy.method} asks one"
        problems.append(Problem(f"policy.method={policy.method}", what, _TRIAL))
    if policy.target_penalty and not before.policy.target_penalty:
        what = "needs the reference's own answer to each prompt, which the trace does not hold"
        problems.append(Problem("policy.target_penalty", what, "try policy.length_penalty, or `kedge trial`"))
    if before.policy.score_normalisation != "frozen" and (reward is not None or "policy.score_clip" in keys):
        where = "--reward" if reward is not None else "policy.score_clip"
        what = f'the score of this run is in units that moved (score_normalisation = "{policy.score_normalisation}")'
        problems.append(Problem(where, what, _TRIAL))
    if kl.budgets is not None and kl.mode != "fixed" and keys & set(BETA):
        problems.append(Problem("policy.kl", "steered budgets need each prompt's group, which the trace lacks", _TRIAL))
    asked = {key.split(".")[1] for key in keys if key.startswith("rewards.") and not key.endswith(".weight")}
    for name in sorted(asked):
        if after.rewards[name].kind == "http":
            what = "would ask the server for every response again"
            problems.append(Problem(f"rewards.{name}", what, "change its weight, or let `kedge trial` ask"))
    return problems
