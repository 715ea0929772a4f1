"""What no single key of a recipe shows to be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kedge.recipe.sections import Data, Desk, Recipe

RESERVED = ("score", "kl", "length", "missing_eos", "critic")


def inconsistent(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """What no single key shows to be wrong: the key, what is wrong with it, what to do."""
    yield from _bad_sizes(recipe)
    yield from _bad_world(recipe)
    yield from _bad_reward(recipe)
    episodes = recipe.policy.prompts_per_step * recipe.policy.samples_per_prompt
    if recipe.policy.kl.mode == "adaptive" and recipe.policy.kl.horizon <= 0.2 * episodes:
        what = f"{recipe.policy.kl.horizon:g} is too short for {episodes} responses a step: beta would turn negative"
        yield "policy.kl.horizon", what, f"use more than {0.2 * episodes:g}, such as 10000"
    if recipe.policy.kl.mode == "adaptive" and recipe.policy.kl.beta == 0:
        what = "0 stays 0 in adaptive mode, which multiplies it"
        yield "policy.kl.beta", what, "start above 0, such as 0.05"


def _bad_sizes(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    model, policy = recipe.model, recipe.policy
    if model.init == "scratch":
        # A Llama turns pairs of coordinates in each head, so a head's width is even.
        step = model.heads * (2 if model.family == "llama" else 1)
        if model.hidden % step:
            nearest = math.ceil(model.hidden / step) * step
            what = f"{model.hidden} is not a multiple of {step} (model.heads = {model.heads}, {model.family})"
            yield "model.hidden", what, f"such as {nearest}"
        if policy.max_new_tokens >= model.context:
            what = f"{policy.max_new_tokens} leaves no room for a prompt in model.context = {model.context}"
            yield "policy.max_new_tokens", what, "lower it or raise model.context"
    batch = policy.prompts_per_step * policy.samples_per_prompt
    if policy.minibatches > batch:
        yield "policy.minibatches", f"{policy.minibatches} is more than the {batch} responses of a step", "lower it"
    if recipe.pairs.checkpoints > recipe.sft.steps:
        what = f"{recipe.pairs.checkpoints} is more than sft.steps = {recipe.sft.steps}"
        yield "pairs.checkpoints", what, "lower it"


def _bad_world(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    data = recipe.data
    if recipe.world == "desk":
        for name, value in data:
            if value != Data.model_fields[name].default:
                yield f"data.{name}", "is not read: the run takes the built-in desk", 'set world = "files"'
        return
    if recipe.desk != Desk():
        yield "desk", "is not read: the run takes the files in [data]", 'remove it, or set world = "desk"'
    if data.preferences is None:
        what = 'is missing: world = "files" needs human preferences, no annotator is built in for it'
        yield "data.preferences", what, "name a file with prompt, chosen and rejected columns"
    if data.demonstrations is None and recipe.model.init == "scratch":
        what = "is missing: a model from scratch has to learn from demonstrations first"
        yield "data.demonstrations", what, "name a file of prompts and responses, or a model folder in model.init"


def _bad_reward(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    reward = recipe.reward
    if reward.trunk == "shared" and reward.length == "two_head":
        what = "a length head of its own and heads that share a trunk do not go together"
        yield "reward.length", what, 'set reward.trunk = "separate" or another reward.length'
    for name, rule in recipe.rewards.items():
        needed = {"python": "function", "regex": "pattern", "http": "url"}[rule.kind]
        if not getattr(rule, needed):
            yield f"rewards.{name}.{needed}", f"is missing: a {rule.kind} reward needs it", f"write {needed} = ..."
        if name in RESERVED:
            yield f"rewards.{name}", "is the name of a built-in channel", "choose another name"
