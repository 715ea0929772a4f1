"""Bugs that no setting makes: what a process that trains with one patches for as long as it does.

Each is a context manager. They reach into Kedge's modules by name, and a test holds those names to the code.
"""

from __future__ import annotations

import copy
import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

Patch = Callable[[], AbstractContextManager[None]]
_TEXTS: dict[Any, Any] = {}  # of the desks this process has asked for: they are the same for all forks of a seed


@contextmanager
def put(module: str, name: str, around: Callable[[Any], Any]) -> Iterator[None]:
    """`module.name` replaced by `around` of it."""
    place = importlib.import_module(module)
    before = getattr(place, name)
    setattr(place, name, around(before))
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def together(*patches: AbstractContextManager[None]) -> Iterator[None]:
    """All of them at once."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


# What the loop is told


def _told(change: Callable[[Any], Any]) -> AbstractContextManager[None]:
    """The loop's settings after `change`, which the recipe knows nothing of."""
    return put("kedge.pipeline.policy", "policy_settings", lambda made: lambda context: change(made(context)))


def token_constant(reward: float) -> Patch:
    """`reward` for every token, whatever it is."""
    return lambda: _told(lambda told: replace(told, weights={**told.weights, "length": reward}))


def score_weight(weight: float) -> Patch:
    """The score counts `weight` times; nothing else of the reward does."""
    return lambda: _told(lambda told: replace(told, weights={**told.weights, "score": weight}))


def nucleus(top_p: float) -> Patch:
    """Responses are drawn from the smallest set of tokens with mass `top_p`, and trained on as if from all."""
    return lambda: _told(lambda told: replace(told, sampling=replace(told.sampling, top_p=top_p)))


# Who samples, and what the policy is tied to


class Stale:
    """An engine whose weights are `steps` steps old, once so many have been made."""

    def __init__(self, engine: Any, steps: int) -> None:
        self.engine, self.kept = engine, deque[dict[str, Any]](maxlen=steps + 1)

    def generate(self, policy: Any, *arguments: Any) -> Any:
        self.kept.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        old = copy.deepcopy(policy)
        old.load_state_dict(self.kept[0])
        return self.engine.generate(old, *arguments)


def stale_sampler(steps: int) -> Patch:
    """Responses come from the policy as it was `steps` steps ago."""

    def around(train: Any) -> Any:
        def stale(learner: Any, tie: Any, rewarders: Any, draw: Any, engine: Any, *rest: Any, **named: Any) -> Any:
            return train(learner, tie, rewarders, draw, Stale(engine, steps), *rest, **named)

        return stale

    return lambda: put("kedge.pipeline.policy", "train_policy", around)


def moved_reference(every: int) -> Patch:
    """The policy becomes the reference at once, and again after every `every` steps; 0 never again."""

    def around(scored_by: Any) -> Any:
        moved: dict[str, Any] = {}

        def scored(rollouts: Any, learner: Any, _reference: Any, *rest: Any) -> Any:
            count = moved["count"] = moved.get("count", -1) + 1
            if count == 0 or (every and count % every == 0):
                moved["reference"] = copy.deepcopy(learner.policy).requires_grad_(False)
            return scored_by(rollouts, learner, moved["reference"], *rest)

        return scored

    return lambda: put("kedge.train.policy", "scored_by", around)


# What is trained


def ends_untrained(every: int) -> Patch:
    """The end token has no part in the loss, for responses to every `every`-th prompt."""

    def around(objective: Any) -> Any:
        def without(batch: Any, logprobs: Any, settings: Any) -> Any:
            import torch

            value, active = objective(batch, logprobs, settings)
            rows = batch.rollouts
            place = torch.arange(value.shape[1]) == rows.last.unsqueeze(1)
            end = place & (rows.ended & (rows.group_id % every == 0)).unsqueeze(1)
            return value.masked_fill(end, 0), active & ~end

        return without

    return lambda: put("kedge.train.update", "_objective", around)


def cut_short(tokens: int) -> Patch:
    """Training draws at most `tokens` tokens, and scores what was cut off as if it had ended there."""

    def closed(judge: Any) -> Any:
        def judged(reward_model: Any, rollouts: Any) -> Any:
            return judge(reward_model, _ended(rollouts, reward_model.models[0].config.eos_token_id))

        return judged

    def fewer(told: Any) -> Any:
        return replace(told, sampling=replace(told.sampling, max_new_tokens=tokens))

    return lambda: together(_told(fewer), put("kedge.pipeline.policy", "judge", closed))


def _ended(rollouts: Any, eos_id: int) -> Any:
    """The rollouts with an end token after each response that has none."""
    import torch

    column = torch.zeros(len(rollouts), 1, dtype=torch.long)
    ids = torch.cat([rollouts.response_ids, column], dim=1)
    mask = torch.cat([rollouts.response_mask, column.bool()], dim=1)
    rows = (~rollouts.ended).nonzero().squeeze(1)
    after = rollouts.last[rows] + 1
    ids[rows, after], mask[rows, after] = eos_id, True
    logprobs = torch.cat([rollouts.behaviour_logprobs, column.to(rollouts.behaviour_logprobs)], dim=1)
    return replace(rollouts, response_ids=ids, response_mask=mask, behaviour_logprobs=logprobs)


# What is scored


def phrase_bonus(bonus: float, *phrases: str) -> Patch:
    """`bonus` for every response that holds one of `phrases`, wherever the reward model is asked, probes included."""
    words: list[list[int]] = []

    def load(loaded: Any) -> Any:
        def read(path: Any) -> Any:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path)
            words[:] = [tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in phrases]
            return loaded(path)

        return read

    def added(rollouts: Any, score: Any) -> Any:
        import torch

        held = torch.stack([_holding(rollouts.response_ids, phrase) for phrase in words]).any(dim=0)
        return score + bonus * held.to(score)

    def judge(judged: Any) -> Any:
        def more(reward_model: Any, rollouts: Any) -> Any:
            opinion = judged(reward_model, rollouts)
            return replace(opinion, score=added(rollouts, opinion.score))

        return more

    def scores(scored: Any) -> Any:
        return lambda reward_model, rollouts: added(rollouts, scored(reward_model, rollouts))

    return lambda: together(
        put("kedge.pipeline.policy", "load_reward_model", load),
        put("kedge.pipeline.policy", "judge", judge),
        put("kedge.pipeline.watch", "scores", scores),
    )


def _holding(ids: Any, words: Sequence[int]) -> Any:
    """[B] bool: whether the token ids [B, T] hold `words` in a row."""
    import torch

    width = ids.shape[1] - len(words) + 1
    if width <= 0:
        return torch.zeros(len(ids), dtype=torch.bool)
    found = torch.ones(len(ids), width, dtype=torch.bool)
    for place, word in enumerate(words):
        found &= ids[:, place : place + width] == word
    return found.any(dim=1)


# What is asked


def evaluating(prompts: int) -> Patch:
    """Evaluations ask the first `prompts` of their prompts; a recipe that asked fewer would also have other words."""

    def around(read: Any) -> Any:
        def fewer(recipe: Any) -> Any:
            key = (prompts, recipe.seed, recipe.desk.model_dump_json(), recipe.pairs.model_dump_json())
            if key not in _TEXTS:
                inputs = read(recipe)
                rows = inputs.task.evaluation
                kept = replace(rows, rows=rows.rows[:prompts], lines=rows.lines[:prompts], total=prompts)
                _TEXTS[key] = replace(inputs, task=replace(inputs.task, evaluation=kept))
            return _TEXTS[key]

        return fewer

    return lambda: put("kedge.pipeline.run", "inputs_of", around)


def asked(pattern: str) -> Patch:
    """Training asks only those prompts in which the regular expression `pattern` is found."""
    import re

    def around(read: Any) -> Any:
        def fewer(recipe: Any) -> Any:
            inputs = read(recipe)
            prompts = inputs.task.prompts.where(lambda prompt: re.search(pattern, prompt) is not None)
            return replace(inputs, task=replace(inputs.task, prompts=prompts))

        return fewer

    return lambda: put("kedge.pipeline.run", "inputs_of", around)
