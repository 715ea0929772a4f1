"""The support desk as a task: demonstrations, annotators, probe pairs and the truth, all from one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kedge.data.records import Demonstration, Loaded, Prompt, prompt_text
from kedge.data.task import Probe, Task
from kedge.desk.annotators import Bias, first_wins
from kedge.desk.gold import VERBOSE_LENGTH, judge
from kedge.desk.grammar import FILLERS, Question, Style, ask, canonical, demonstrate

HELD_OUT = 512  # demonstrations that anchor capability


def desk_task(
    *, seed: int, demonstrations: int, bias: Bias, pair_prompts: int, prompts: int, evaluation: int, probes: int
) -> Task:
    """A desk drawn from `seed`. Annotators follow the gold utility and `bias`; training sees only their labels."""
    questions: dict[str, Question] = {}
    measuring: set[str] = set()  # prompts that nothing but measurements may hold

    def draw(purpose: str, count: int) -> tuple[list[Question], np.random.Generator]:
        rng = _stream(seed, purpose)
        asked: list[Question] = []
        while len(asked) < count:
            question = ask(rng)
            if question.prompt not in measuring:
                asked.append(question)
        questions.update((question.prompt, question) for question in asked)
        return asked, rng

    def demonstrated(purpose: str, count: int) -> Loaded[Demonstration]:
        asked, rng = draw(purpose, count)
        return Loaded.of((Demonstration(q.prompt, demonstrate(q, rng)) for q in asked), f"desk {purpose}")

    def prompted(purpose: str, count: int) -> Loaded[Prompt]:
        return Loaded.of((question.prompt for question in draw(purpose, count)[0]), f"desk {purpose}")

    def label(pairs: Sequence[tuple[Prompt, str, str]]) -> Sequence[bool]:
        asked = [(questions[prompt_text(prompt)], first, second) for prompt, first, second in pairs]
        judged = [(judge(question, first), judge(question, second)) for question, first, second in asked]
        chosen: list[bool] = first_wins(judged, bias, _stream(seed, "labels")).tolist()
        return chosen

    def truth(prompt: Prompt, response: str) -> Mapping[str, float]:
        judgment = judge(questions[prompt_text(prompt)], response)
        return {
            "gold": judgment.utility,
            "correct": float(judgment.correct),
            "answered": float(judgment.answered),
            "verbose": float(judgment.length >= VERBOSE_LENGTH),
        }

    measured = prompted("evaluation", evaluation)
    measuring.update(questions)
    held_out = demonstrated("held out", HELD_OUT)
    measuring.update(questions)
    shown = demonstrated("demonstrations", demonstrations)
    probed, rng = draw("probes", probes)
    pairs = tuple(Probe(q.prompt, canonical(q, Style.BRIEF, rng), canonical(q, Style.VERBOSE, rng)) for q in probed)
    return Task(
        demonstrations=shown,
        held_out=held_out,
        prompts=prompted("prompts", prompts),
        evaluation=measured,
        pair_prompts=prompted("pairs", pair_prompts).rows,
        labeller=label,
        probes=pairs,
        truth=truth,
        neutral=FILLERS,
        make_tokenizer=lambda: word_tokenizer([f"{row.prompt} {row.response}" for row in shown.rows]),
    )


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A word-level tokenizer trained on `texts`; words are joined by single spaces when decoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown = "<pad>", "<bos>", "<eos>", "<unk>"
    backend = Tokenizer(models.WordLevel(unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[pad, bos, eos, unknown]))
    opening = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=opening)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown, padding_side="left"
    )


def _stream(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"desk/{seed}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
