"""Which two answers to a prompt annotators compare: sampled, searched for, or the best of several against another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kedge.data.records import Prompt
from kedge.pipeline.context import Context
from kedge.rollout.beam import beam_candidates
from kedge.structs import Rollouts, Sampling
from kedge.train.schedule import seeded, seeded_numpy

Pair = tuple[Prompt, str, str]
"""A prompt and two different answers to it, in the order in which annotators see them."""

Score = Callable[[Rollouts], Tensor]
"""[B] how much a reward model likes each response; only the order within a prompt is used."""

PROMPTS_AT_ONCE = 256  # searched between two looks at whether to stop


def candidates(
    context: Context, policy: Any, texts: Sequence[Prompt], index: int, score: Score | None = None
) -> list[Pair]:
    """A pair for each of `texts` from `policy`, the `index`-th checkpoint that answers, as `pairs.method` says.

    Prompts with only one answer drop out. Until there is a `score`, `best_of` samples plainly.
    """
    if not texts:
        return []
    match context.recipe.pairs.method:
        case "beam":
            return beam_pairs(context, policy, texts, index)
        case "best_of" if score is not None:
            return best_of_candidates(context, policy, texts, score, index)
        case _:
            return sampled_candidates(context, policy, texts, index)


def sampled_candidates(context: Context, policy: Any, texts: Sequence[Prompt], index: int) -> list[Pair]:
    """The first two different ones of `pairs.candidates` samples."""
    return _first_two(texts, _rows(context, context.text(_samples(context, policy, texts, index))))


def beam_pairs(context: Context, policy: Any, texts: Sequence[Prompt], index: int) -> list[Pair]:
    """The two likeliest different ones of `pairs.candidates` beams; a coin decides which is shown first."""
    found: list[Pair] = []
    for start in range(0, len(texts), PROMPTS_AT_ONCE):
        context.interrupt.check("searching pairs")
        part = texts[start : start + PROMPTS_AT_ONCE]
        prompts = context.encode_prompts(part)
        beams = context.recipe.pairs.candidates
        answers = beam_candidates(policy, prompts, _sampling(context), beams, context.eos_id, context.pad_id)
        found += _first_two(part, _rows(context, context.text(answers)))
    return _shuffled(context, found, index)


def best_of_candidates(context: Context, policy: Any, texts: Sequence[Prompt], score: Score, index: int) -> list[Pair]:
    """Of `pairs.candidates` samples the one that `score` likes best, and one drawn from those that differ from it.

    A coin decides which of the two is shown first. The samples are those of `sampled_candidates`.
    """
    samples = _samples(context, policy, texts, index)
    scores = _rows(context, score(samples).tolist())
    draw = seeded_numpy(context.recipe.seed, "best of", index)
    found = []
    for text, answers, liked in zip(texts, _rows(context, context.text(samples)), scores, strict=True):
        best = answers[max(range(len(answers)), key=liked.__getitem__)]
        others = [answer for answer in answers if answer != best]
        if others:
            found.append((text, best, others[draw.integers(len(others))]))
    return _shuffled(context, found, index)


def diversity(pairs: Sequence[Pair], asked: int) -> dict[str, float]:
    """How far apart the answers are that labels compare.

    `two_answers` is the share of the prompts asked that have a pair, `log_length_ratio` the mean absolute log ratio of
    the two lengths in characters, `word_distance` the mean of 1 - |words in both| / |words in either|. The last two
    are left out where there is no pair.
    """
    if not pairs:
        return {"two_answers": 0.0}
    ratios = [abs(math.log(max(1, len(one)) / max(1, len(other)))) for _, one, other in pairs]
    distances = [_distance(set(one.split()), set(other.split())) for _, one, other in pairs]
    return {
        "two_answers": len(pairs) / asked,
        "log_length_ratio": math.fsum(ratios) / len(pairs),
        "word_distance": math.fsum(distances) / len(pairs),
    }


def _distance(one: set[str], other: set[str]) -> float:
    either = one | other
    return 1 - len(one & other) / len(either) if either else 0.0


def _samples(context: Context, policy: Any, texts: Sequence[Prompt], index: int) -> Rollouts:
    """`pairs.candidates` samples per prompt, those of a prompt side by side."""
    prompts = context.encode_prompts(texts)
    repeated = prompts.rows(torch.arange(len(prompts)).repeat_interleave(context.recipe.pairs.candidates))
    generator = seeded(context.recipe.seed, "pairs", index)
    return context.engine.generate(policy, repeated, _sampling(context), generator)


def _sampling(context: Context) -> Sampling:
    pairs = context.recipe.pairs
    return Sampling(context.sampling.max_new_tokens, pairs.temperature, pairs.top_p)


def _rows(context: Context, values: list[Any]) -> list[list[Any]]:
    """What belongs to each prompt, from one list for all responses."""
    count = context.recipe.pairs.candidates
    return [values[start : start + count] for start in range(0, len(values), count)]


def _first_two(texts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Pair]:
    """The first two different answers of each prompt that has two."""
    distinct = ((text, list(dict.fromkeys(own))) for text, own in zip(texts, answers, strict=True))
    return [(text, own[0], own[1]) for text, own in distinct if len(own) > 1]


def _shuffled(context: Context, pairs: list[Pair], index: int) -> list[Pair]:
    """Each pair as it is or turned round: annotators who favour a place must not thereby favour the likelier answer."""
    turned = seeded_numpy(context.recipe.seed, "pair order", index).random(len(pairs)) < 0.5
    return [
        (text, second, first) if turn else (text, first, second)
        for (text, first, second), turn in zip(pairs, turned, strict=True)
    ]
