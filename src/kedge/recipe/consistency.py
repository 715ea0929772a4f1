"""What no single key of a recipe shows to be wrong."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from kedge.recipe.methods import SAMPLING, bad_policy
from kedge.recipe.sections import Data, Desk, Recipe, Rule

RESERVED = (
    *("score", "kl", "length", "missing_eos", "critic", "choice", "whitening"),
    *("overlong", "over_target", "repetition"),
)
# The first one is needed.
_KEYS_OF_RULES = {"python": ("function",), "regex": ("pattern",), "http": ("url", "timeout", "retries")}


def inconsistent(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """What no single key shows to be wrong: the key, what is wrong with it, what to do."""
    yield from _bad_sizes(recipe)
    yield from _bad_world(recipe)
    yield from _bad_reward(recipe)
    yield from bad_policy(recipe)
    yield from _bad_guard(recipe)


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
    if recipe.pairs.method == "beam" and recipe.pairs.top_p != 1:
        yield "pairs.top_p", "is not read: a beam search draws nothing", 'leave it at 1, or set pairs.method = "sample"'


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
        if name in RESERVED:
            yield f"rewards.{name}", "is the name of a built-in channel", "choose another name"
        yield from ((f"rewards.{name}.{key}", what, remedy) for key, what, remedy in _bad_rule(rule))


def _bad_guard(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    guard, policy = recipe.guard, recipe.policy
    if not guard.checks:
        return
    from kedge.diagnose.checks import all_checks  # only where a recipe names some

    known = [check.name for check in all_checks()]
    for name in guard.checks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "kedge checks lists them"
            yield "guard.checks", f"there is no check {name!r}", remedy
    if policy.method not in SAMPLING:
        what = f"{policy.method} draws no responses in training, so there is nothing to look at between steps"
        yield "guard.checks", what, "leave it out, or choose a method that samples"
    if recipe.trace.keep:
        what = f"guards read every step, and trace.keep = {recipe.trace.keep} removes some"
        yield "trace.keep", what, "set it to 0"
    if guard.action == "raise_beta":
        if policy.kl.beta == 0:
            yield "policy.kl.beta", "0 stays 0 however often the guard multiplies it", "start above 0, such as 0.05"
        if policy.method == "rejection":
            yield "guard.action", "rejection has no beta", 'choose "warn", "stop" or "roll_back"'
        if guard.beta_factor == 1:
            yield "guard.beta_factor", "1 raises nothing", "such as 2"


def _bad_rule(rule: Rule) -> Iterator[tuple[str, str, str]]:
    own = _KEYS_OF_RULES[rule.kind]
    for key in (key for keys in _KEYS_OF_RULES.values() for key in keys):
        if key not in own and getattr(rule, key) != Rule.model_fields[key].default:
            yield key, f"is not read by a {rule.kind} reward", "remove it, or change the kind"
    if not getattr(rule, own[0]):
        yield own[0], f"is missing: a {rule.kind} reward needs it", f"write {own[0]} = ..."
    elif rule.kind == "python":
        yield from _bad_function(rule.function)
    elif rule.kind == "regex":
        yield from _bad_pattern(rule.pattern)
    else:
        yield from _bad_url(rule.url)


def _bad_function(function: str) -> Iterator[tuple[str, str, str]]:
    source, _, name = function.rpartition(":")
    dotted = source.endswith(".py") or all(part.isidentifier() for part in source.split("."))
    if not (source and dotted and name.isidentifier()):
        what = f"{function!r} names no function"
        yield "function", what, "write file.py:name, from the recipe's folder, or package.module:name"


def _bad_pattern(pattern: str) -> Iterator[tuple[str, str, str]]:
    remedy = "correct it; between '...' TOML leaves backslashes alone"
    try:
        re.compile(pattern)
    except re.error as error:
        yield "pattern", f"is not a regular expression: {error.msg} at position {error.pos}", remedy
    except (OverflowError, RecursionError) as error:
        yield "pattern", f"is not a usable regular expression: {error}", remedy


def _bad_url(url: str) -> Iterator[tuple[str, str, str]]:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        usable = False
    if not usable:
        yield "url", "is not the address of an HTTP service", "write http://host:port/path or https://..."
