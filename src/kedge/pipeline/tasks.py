"""From a recipe to its texts and tokenizer: the built-in desk, or the user's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kedge.data.records import Demonstration, Judgment, Loaded, Prompt, graded, prompt_text
from kedge.data.split import is_held_out
from kedge.data.task import Task
from kedge.data.tokenise import train_tokenizer, within_context
from kedge.data.validate import load_demonstrations, load_judgments, load_prompts
from kedge.desk.annotators import Bias
from kedge.desk.world import desk_task
from kedge.errors import InputError, Problem
from kedge.evaluate.reward.padding import NEUTRAL, sentences_of
from kedge.models.load import load_policy
from kedge.recipe import Recipe

T = TypeVar("T")

DESK_PROMPTS = 4096  # prompts of the policy stage; more than a run uses twice
TEXT_PIECE = 400  # characters of plain text that make one held-out piece


@dataclass(frozen=True)
class Inputs:
    """The texts of a run, every one of which fits the context, and the policy's tokenizer.

    `left_out` says in a line per file which rows were not used.
    """

    task: Task
    tokenizer: Any
    left_out: tuple[str, ...] = ()


def inputs_of(recipe: Recipe) -> Inputs:
    """What a run reads, checked before anything is written. Raises `InputError` for what cannot be used."""
    return _from_desk(recipe) if recipe.world == "desk" else _from_files(recipe)


def _from_desk(recipe: Recipe) -> Inputs:
    task = desk_task(
        seed=recipe.seed,
        demonstrations=recipe.desk.demonstrations,
        bias=Bias(**recipe.desk.annotators.model_dump()),
        pair_prompts=recipe.pairs.prompts,
        prompts=DESK_PROMPTS,
        evaluation=recipe.evaluate.prompts,
        probes=recipe.trace.probes,
    )
    assert task.make_tokenizer is not None
    tokenizer = _tokenizer(recipe, task.make_tokenizer)
    longest = _longest(task, tokenizer, recipe.policy.max_new_tokens)
    if longest > recipe.model.context:
        what = f"{recipe.model.context} tokens are too few for the desk: prompt and answer take up to {longest}"
        raise InputError(Problem("model.context", what, "raise it, or lower policy.max_new_tokens"))
    return Inputs(task, tokenizer)


def _longest(task: Task, tokenizer: Any, budget: int) -> int:
    """Tokens of the longest sequence that any text of the desk turns into; its texts are plain, so one call does."""

    def tokens(texts: Sequence[Prompt], *, opening: bool) -> list[int]:
        ids = tokenizer([prompt_text(text) for text in texts], add_special_tokens=opening)["input_ids"]
        return [len(row) for row in ids]

    rows = (*task.demonstrations.rows, *task.held_out.rows)
    shown = [(row.prompt, row.response) for row in rows] + [(probe.prompt, probe.verbose) for probe in task.probes]
    prompts, answers = ([text for text, _ in shown], [text for _, text in shown])
    given = zip(tokens(prompts, opening=True), tokens(answers, opening=False), strict=True)
    asked = [*task.prompts.rows, *task.evaluation.rows, *task.pair_prompts, *(probe.prompt for probe in task.probes)]
    return max(max(map(sum, given)) + 1, max(tokens(asked, opening=True)) + budget)


def _from_files(recipe: Recipe) -> Inputs:
    """Prompts are on the training or the held-out side by the hash of their text, in every file alike."""
    data = recipe.data
    demonstrations: Loaded[Demonstration] = Loaded.of((), "data.demonstrations")
    if data.demonstrations is not None:
        demonstrations = load_demonstrations(data.demonstrations, max_rejected=data.max_rejected)
    judgments: Loaded[Judgment] = Loaded.of((), "data.preferences")
    if data.preferences is not None:
        judgments = load_judgments(data.preferences, max_rejected=data.max_rejected)
    own = load_prompts(data.prompts, max_rejected=data.max_rejected) if data.prompts is not None else None
    text = _pieces(data.text) if data.text is not None else ()

    def shown(prompt: Prompt) -> bool:
        return not is_held_out(prompt, data.holdout)

    def learnable() -> list[str]:
        return _seen_texts(recipe, demonstrations.where(lambda row: shown(row.prompt)), judgments)

    tokenizer = _tokenizer(recipe, lambda: train_tokenizer(learnable(), vocab=recipe.model.vocab))

    def fitting(loaded: Loaded[T], budget: int = 0) -> Loaded[T]:
        context, tolerance = recipe.model.context, data.max_rejected
        return within_context(tokenizer, loaded, context=context, max_rejected=tolerance, max_new_tokens=budget)

    demonstrations, judgments = fitting(demonstrations), fitting(judgments)
    derived = demonstrations.map(_prompt_of) if demonstrations.rows else judgments.map(_prompt_of)
    prompts = fitting(derived if own is None else own, recipe.policy.max_new_tokens)
    distinct = _distinct(prompts)
    task = Task(
        demonstrations=demonstrations.where(lambda row: shown(row.prompt)),
        held_out=demonstrations.where(lambda row: not shown(row.prompt)),
        prompts=distinct.where(shown),
        evaluation=_first(distinct.where(lambda prompt: not shown(prompt)), recipe.evaluate.prompts),
        judgments=judgments,
        text=text,
        neutral=sentences_of(data.neutral) if data.neutral is not None else NEUTRAL,
    )
    _require_both_sides(task, len(distinct.rows), len(demonstrations.rows))
    lines = [_left_out(loaded) for loaded in (demonstrations, judgments, prompts) if loaded.rejected]
    return Inputs(task, tokenizer, tuple(dict.fromkeys(lines)))


def _tokenizer(recipe: Recipe, train: Callable[[], Any]) -> Any:
    """The tokenizer of the model folder, which is checked as a whole, or one that `train` makes."""
    model = recipe.model
    if model.init == "scratch":
        return train()
    policy, tokenizer = load_policy(model.init, trust_remote_code=model.trust_remote_code)
    positions = getattr(policy.config, "max_position_embeddings", None)
    if positions is not None and positions < model.context:
        what = f"{model.context} tokens are more than the {positions} positions of {model.init}"
        raise InputError(Problem("model.context", what, f"lower it to {positions}"))
    return tokenizer


def _require_both_sides(task: Task, prompts: int, demonstrations: int) -> None:
    """Raise `InputError` unless there is something to train on and something to measure with."""
    problems = []
    if not task.evaluation.rows:
        what = f"none of the {prompts} prompts falls into the held-out share"
        problems.append(Problem("data.holdout", what, "give more prompts or raise data.holdout"))
    if not task.prompts.rows:
        what = f"all {prompts} prompts fall into the held-out share"
        problems.append(Problem("data.holdout", what, "give more prompts or lower data.holdout"))
    if demonstrations and not task.demonstrations.rows:
        what = f"all {demonstrations} demonstrations fall into the held-out share"
        problems.append(Problem("data.holdout", what, "give more demonstrations or lower data.holdout"))
    if problems:
        raise InputError(problems)


def _left_out(loaded: Loaded[Any]) -> str:
    return f"{len(loaded.rejected)} of {loaded.total} rows left out; first: {loaded.rejected[0]}"


def _prompt_of(row: Demonstration | Judgment) -> Prompt:
    return row.prompt


def _distinct(prompts: Loaded[Prompt]) -> Loaded[Prompt]:
    seen: set[str] = set()

    def new(prompt: Prompt) -> bool:
        text = prompt_text(prompt)
        fresh = text not in seen
        seen.add(text)
        return fresh

    return prompts.where(new)


def _first(prompts: Loaded[Prompt], count: int) -> Loaded[Prompt]:
    return Loaded(prompts.rows[:count], prompts.lines[:count], (), min(count, prompts.total))


def _seen_texts(recipe: Recipe, shown: Loaded[Demonstration], judgments: Loaded[Judgment]) -> list[str]:
    """What a tokenizer may learn from: every text that training sees, none that only measures."""
    texts = [text for row in shown.rows for text in (*_contents(row.prompt), row.response)]
    for row in judgments.rows:
        if not is_held_out(row.prompt, max(recipe.reward.holdout, recipe.data.holdout)):
            texts += [*_contents(row.prompt), *graded(row)[0]]
    return texts


def _contents(prompt: Prompt) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else tuple(message.content for message in prompt)


def _pieces(path: Path) -> tuple[str, ...]:
    """A plain text file in pieces of whole lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(str(path), f"not readable as UTF-8 text: {error}", "give a plain text file")) from None
    pieces, current = [], ""
    for line in lines:
        current += line
        if len(current) >= TEXT_PIECE:
            pieces.append(current)
            current = ""
    found = tuple(piece for piece in (*pieces, current) if piece.strip())
    if not found:
        raise InputError(Problem(str(path), "no text in it", "give a plain text file, or leave data.text out"))
    return found
