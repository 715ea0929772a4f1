"""How a step of training turned rollouts into update weights, as numbers: what it was told, and what a plan changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.experiment.replay.keys import BETA, FIELDS, PENALTIES, Plan
from kedge.recipe import Recipe
from kedge.trace.reader import Run, StepTrace
from kedge.train.methods import METHODS, Method

Array = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """The numbers with which a step's rewards become weights of tokens."""

    method: Method
    gamma: float
    lam: float
    whiten: bool
    place: str  # of the KL: "reward" or "loss"
    estimator: str  # of the KL
    clip: float
    clip_high: float | None
    dual_clip: float | None
    aggregation: str
    importance_cap: float | None
    entropy_bonus: float
    score_clip: float
    budget: int  # tokens a response may have
    beta: Array  # [B] reward per nat
    weights: Mapping[str, Array]  # [B] reward per unit of each channel but `kl`

    def learning(self) -> dict[str, Any]:
        """What a trace says of the optimiser, as far as it is known here."""
        kept = ("clip_high", "dual_clip", "aggregation", "importance_cap", "entropy_bonus", "budget")
        clip = None if math.isinf(self.clip) else self.clip
        in_loss = self.estimator if self.place == "loss" else None
        return {"clip": clip, "kl_loss": in_loss, **{name: getattr(self, name) for name in kept}}


def logged_setting(step: StepTrace, recipe: Recipe) -> Setting:
    """What training was told at this step: from its rows where they say it, else from the recipe."""
    told, learnt = _told(recipe), dict(step.learning)
    if learnt:
        told["place"] = "reward" if learnt.get("kl_loss") is None else "loss"
        told["estimator"] = learnt.get("kl_loss") or told["estimator"]
        told["clip"] = math.inf if learnt.get("clip", 0) is None else learnt.get("clip", told["clip"])
        for name in ("clip_high", "dual_clip", "aggregation", "importance_cap", "entropy_bonus", "budget"):
            told[name] = learnt.get(name, told[name])
    told |= {"gamma": step.gamma, "lam": step.lam, "score_clip": math.inf}  # what is logged has been clipped
    whitened = bool((step.shift != 0).any() or (step.scale != 1).any())
    method: Method = told["method"]
    if method.baseline is None:
        told["whiten"] = whitened
    weights = {name: step.weights[:, index] for index, name in enumerate(step.channels) if name != "kl"}
    return Setting(**told, beta=_logged_beta(step, told["place"], method, whitened), weights=weights)


def changed_setting(logged: Setting, plan: Plan, betas: Betas, step: StepTrace) -> Setting:
    """The same step as the plan has it: what its keys name is changed, everything else stays as it was logged."""
    told = _told(plan.after)
    named = {name: told[name] for key in plan.keys for name in FIELDS.get(key, ())}
    weights = dict(logged.weights)
    count = len(step)
    for key in plan.keys:
        if key in PENALTIES:
            weights[PENALTIES[key]] = np.full(count, -_value(plan.after, key), np.float32)
    for name in {key.split(".")[1] for key in plan.keys if key.startswith("rewards.")}:
        weights[name] = np.full(count, plan.after.rewards[name].weight, np.float32)
    return replace(logged, **named, beta=betas.at(step.step, logged.beta), weights=weights)


class Betas:
    """The KL coefficient of each step under a plan.

    A fixed one is the plan's. A steered one follows the divergences that were logged, from the first step on: what the
    controller would have answered to them, not what it would have brought about.
    """

    def __init__(self, plan: Plan, run: Run | None) -> None:
        self._changed = bool(plan.keys & set(BETA))
        self._before, self._after = plan.before.policy.kl, plan.after.policy.kl
        self._path: dict[int, float] = {}
        if self.steered:
            self._path = _steered(plan, run)

    @property
    def steered(self) -> bool:
        """Whether a controller sets the changed coefficient."""
        return self._changed and self._after.mode != "fixed"

    def at(self, step: int, logged: Array) -> Array:
        """[B] reward per nat at policy step `step`, whose responses were under `logged` [B]."""
        if not self._changed:
            return logged
        if self.steered:
            return np.full(len(logged), self._path[step])
        if self._after.budgets is None:
            return np.full(len(logged), self._after.beta)
        if not self._before.beta or self._before.mode != "fixed":
            what = "each prompt's share of beta is not in the trace"
            raise InputError(Problem("policy.kl.beta", what, "`kedge trial` carries it out"))
        return logged * (self._after.beta / self._before.beta)


def _steered(plan: Plan, run: Run | None) -> dict[int, float]:
    from kedge.pipeline.policy import controllers  # it brings the models' libraries, which nothing else here needs

    series = None if run is None else run.metrics("policy").get("kl/reference_per_sequence")
    if series is None or list(series.steps) != list(range(len(series.steps))):
        what = "a steered beta follows the divergence of every step from the first, and not all are logged"
        raise InputError(Problem("policy.kl.mode", what, 'replay policy.kl.mode="fixed" with a beta'))
    policy = plan.before.policy
    controller, episodes = (
        controllers(plan.after.policy.kl).groups[0],
        policy.prompts_per_step * policy.samples_per_prompt,
    )
    path: dict[int, float] = {}
    for step, kl in zip(series.steps.tolist(), series.values.tolist(), strict=True):
        path[int(step)] = controller.beta
        controller = controller.observe(kl, episodes)
    return path


def _logged_beta(step: StepTrace, place: str, method: Method, whitened: bool) -> Array:
    """[B] reward per nat, whether it was paid in the reward or in the loss."""
    if place == "reward":
        return np.asarray(-step.weights[:, step.channels.index("kl")])
    if not np.isfinite(step.loss_beta).all():
        what = "the coefficient of the KL in the loss is not in this older trace"
        raise InputError(Problem(str(step.path), what, "run it again with this version of Kedge"))
    batch = method.normalise == "batch" and whitened
    return np.asarray(step.loss_beta * (step.scale if batch else 1.0))


def _told(recipe: Recipe) -> dict[str, Any]:
    """The fields of a `Setting` that a recipe gives, but for weights and beta."""
    policy, kl = recipe.policy, recipe.policy.kl
    method = METHODS[policy.method]
    told: dict[str, Any] = {
        "method": method,
        "place": kl.place,
        "estimator": kl.estimator or ("k1" if kl.place == "reward" else "k2"),
        "clip": policy.clip if method.clipped else math.inf,
        "aggregation": policy.aggregation or method.aggregation,
        "budget": policy.max_new_tokens,
    }
    plain = {field.name for field in fields(Setting)} - {*told, "beta", "weights"}
    return told | {name: getattr(policy, name) for name in plain}


def _value(recipe: Recipe, key: str) -> float:
    return float(getattr(recipe.policy, key.rpartition(".")[2]))
