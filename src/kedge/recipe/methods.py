"""Which keys of `[policy]` each method reads, what does not go together, and which KL terms hold a policy at all."""

from __future__ import annotations

from collections.abc import Iterator

from kedge.recipe.sections import Kl, Policy, Recipe

CRITIC = ("ppo", "a2c")
ON_POLICY = (*CRITIC, "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_pp")
CLIPPED = ("ppo", "rloo", "grpo", "dr_grpo", "reinforce_pp")
SAMPLING = (*ON_POLICY, "online_dpo", "rejection")
PAIRED = ("dpo", "ipo", "online_dpo")
TRAINING = (*SAMPLING, "dpo", "ipo")
GROUPED = ("rloo", "grpo", "dr_grpo", "online_dpo", "rejection", "best_of_n")

_READ_BY = {
    **dict.fromkeys(("critic", "critic_lr", "critic_warmup", "gamma", "lam", "value_clip", "whiten"), CRITIC),
    **dict.fromkeys(("clip", "clip_high", "dual_clip"), CLIPPED),
    **dict.fromkeys(("epochs", "minibatches"), (*CLIPPED, "dpo", "ipo", "online_dpo", "rejection")),
    **dict.fromkeys(("aggregation", "importance_cap", "entropy_bonus"), ON_POLICY),
    **dict.fromkeys(("pretraining_mix", "reference_every"), SAMPLING),
    **dict.fromkeys(("missing_eos_penalty", "length_penalty", "target_penalty", "overlong_penalty"), SAMPLING),
    **dict.fromkeys(("repetition_penalty", "score_normalisation"), SAMPLING),
    "score_clip": (*SAMPLING, "best_of_n"),
    "label_smoothing": ("dpo", "online_dpo"),
    "samples_per_prompt": (*SAMPLING, "best_of_n"),
    **dict.fromkeys(("steps", "prompts_per_step", "lr", "final_lr", "max_grad_norm", "lora_rank"), TRAINING),
    "reference": TRAINING,
}
_KL_READ_BY = {
    **dict.fromkeys(("place", "estimator", "study"), ON_POLICY),
    **dict.fromkeys(("mode", "budgets"), (*ON_POLICY, "online_dpo")),
    **dict.fromkeys(("limit", "at_limit"), SAMPLING),
    "beta": (*ON_POLICY, *PAIRED),
}
_OF_MODE = {
    "target": ("adaptive", "lagrangian", "pid"),
    "horizon": ("adaptive",),
    "rate": ("lagrangian",),
    **dict.fromkeys(("proportional", "integral", "derivative"), ("pid",)),
}
_LINK = "docs/kl.md says which estimators hold a policy"


def bad_policy(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """What does not go together in `[policy]`: the key, what is wrong with it, what to do."""
    policy, kl = recipe.policy, recipe.policy.kl
    yield from _bad_estimator(kl)
    if policy.method in GROUPED and policy.samples_per_prompt < 2:
        what = f"{policy.samples_per_prompt} is too few: {policy.method} compares responses to the same prompt"
        remedy = "such as 4, with a quarter of policy.prompts_per_step for the same work"
        yield "policy.samples_per_prompt", what, remedy
    if policy.lora_rank and policy.reference_every:
        what = "adapters share their weights with the reference, which therefore cannot move"
        yield "policy.reference_every", what, "set it to 0, or train the weights with policy.lora_rank = 0"
    if policy.overlong_penalty and policy.overlong_buffer > policy.max_new_tokens:
        what = f"{policy.overlong_buffer} is more than policy.max_new_tokens = {policy.max_new_tokens}"
        yield "policy.overlong_buffer", what, "lower it"
    episodes = policy.prompts_per_step * policy.samples_per_prompt
    if kl.mode == "adaptive" and kl.horizon <= 0.2 * episodes:
        what = f"{kl.horizon:g} is too short for {episodes} responses a step: beta would turn negative"
        yield "policy.kl.horizon", what, f"use more than {0.2 * episodes:g}, such as 10000"
    if kl.mode in ("adaptive", "lagrangian") and kl.beta == 0:
        yield "policy.kl.beta", f"0 stays 0 in {kl.mode} mode, which multiplies it", "start above 0, such as 0.05"
    if kl.mode == "pid" and kl.integral == 0:
        yield "policy.kl.integral", "without it a beta settles away from its target", "such as 0.02"


def unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that were changed though nothing looks at them here: the key, and why. No mistake, but worth a word."""
    policy, kl = recipe.policy, recipe.policy.kl
    for start, section, readers in (("policy", policy, _READ_BY), ("policy.kl", kl, _KL_READ_BY)):
        for key, methods in readers.items():
            if policy.method not in methods and _changed(section, key):
                yield f"{start}.{key}", f"is not read by {policy.method}"
    for key, modes in _OF_MODE.items():
        if policy.method in ON_POLICY and kl.mode not in modes and _changed(kl, key):
            yield f"policy.kl.{key}", f'is not read where policy.kl.mode = "{kl.mode}"'
    if kl.limit is None and _changed(kl, "at_limit"):
        yield "policy.kl.at_limit", "is not read without a policy.kl.limit"
    if not policy.overlong_penalty and _changed(policy, "overlong_buffer"):
        yield "policy.overlong_buffer", "is not read where policy.overlong_penalty is 0"


_ESTIMATES = {
    ("reward", "k1"): "log policy - log reference on each token",
    ("reward", "k2"): "half the squared log-ratio of each token",
    ("reward", "k3"): "exp(-k) - 1 + k of each token's log-ratio k",
    ("reward", "abs"): "the absolute log-ratio of each token",
    ("loss", "k1"): "the log-ratio of each token",
    ("loss", "k2"): "half the squared log-ratio of each response",
    ("loss", "k3"): "exp(-k) - 1 + k of each token's log-ratio k",
    ("loss", "full"): "the exact KL of each next token with that of the tokens after it",
}


def kl_in_words(kl: Kl) -> str:
    """Where the divergence counts, what estimates it, how much it counts and what limits it, with units."""
    estimator = kl.estimator or ("k1" if kl.place == "reward" else "k2")
    strength = f"beta {kl.beta:g} reward per nat"
    if kl.mode != "fixed":
        strength = f"beta from {kl.beta:g} reward per nat, {kl.mode} towards {kl.target:g} nats per sequence"
    if kl.budgets is not None:
        shares = ", ".join(f"{share:g}" for share in kl.budgets)
        strength += f", budgets {shares} by the reference's length"
    held = "" if kl.limit is None else f"; at {kl.limit:g} nats per sequence: {kl.at_limit}"
    return (
        f"KL(policy || reference) in the {kl.place}, {estimator}: {_ESTIMATES[kl.place, estimator]}; {strength}{held}"
    )


def _bad_estimator(kl: Kl) -> Iterator[tuple[str, str, str]]:
    offered = {"reward": ("k1", "k2", "k3", "abs"), "loss": ("k1", "k2", "k3", "full")}[kl.place]
    right = {"reward": ("k1",), "loss": ("k2", "k3", "full")}[kl.place]
    if kl.estimator is None:
        return
    if kl.estimator not in offered:
        what = f"{kl.estimator} is not offered in the {kl.place}"
        yield "policy.kl.estimator", what, f"use one of {', '.join(right)}"
    elif kl.estimator not in right and not kl.study:
        yield "policy.kl.estimator", _WHY[kl.place].format(kl.estimator), f"use {right[0]}; {_LINK}"


_WHY = {
    "reward": "{} in the reward has no restoring force: its gradient is not that of the KL, and the policy drifts off",
    "loss": "{} in the loss has no gradient on average: nothing ties the policy",
}


def _changed(section: Policy | Kl, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)
