"""From a recipe to its task: the built-in desk, or the user's files."""

from __future__ import annotations

from pathlib import Path

from kedge.data.records import Demonstration, Loaded, Preference, Prompt, prompt_text
from kedge.data.split import is_held_out
from kedge.data.task import Task
from kedge.data.tokenise import train_tokenizer
from kedge.data.validate import load_demonstrations, load_preferences, load_prompts
from kedge.desk.annotators import Bias
from kedge.desk.world import desk_task
from kedge.errors import InputError, Problem
from kedge.recipe import Recipe

DESK_PROMPTS = 4096  # prompts of the policy stage; more than a run uses twice
TEXT_PIECE = 400  # characters of plain text that make one held-out piece


def task_of(recipe: Recipe) -> Task:
    """The texts of a run. Raises `InputError` for files that cannot be used."""
    return _from_desk(recipe) if recipe.world == "desk" else _from_files(recipe)


def _from_desk(recipe: Recipe) -> Task:
    return desk_task(
        seed=recipe.seed,
        demonstrations=recipe.desk.demonstrations,
        bias=Bias(**recipe.desk.annotators.model_dump()),
        pair_prompts=recipe.pairs.prompts,
        prompts=DESK_PROMPTS,
        evaluation=recipe.evaluate.prompts,
        probes=recipe.trace.probes,
    )


def _from_files(recipe: Recipe) -> Task:
    """Prompts are on the training or the held-out side by the hash of their text, in every file alike."""
    data, tolerance = recipe.data, recipe.data.max_rejected
    demonstrations: Loaded[Demonstration] = Loaded.of((), "data.demonstrations")
    if data.demonstrations is not None:
        demonstrations = load_demonstrations(data.demonstrations, max_rejected=tolerance)
    preferences: Loaded[Preference] | None = None
    if data.preferences is not None:
        preferences = load_preferences(data.preferences, max_rejected=tolerance)
    prompts: Loaded[Prompt] = demonstrations.map(lambda row: row.prompt)
    if data.prompts is not None:
        prompts = load_prompts(data.prompts, max_rejected=tolerance)
    elif preferences is not None and not demonstrations.rows:
        prompts = preferences.map(lambda row: row.prompt)
    prompts = _distinct(prompts)

    def held_out(prompt: Prompt) -> bool:
        return is_held_out(prompt, data.holdout)

    evaluation = _first(prompts.where(held_out), recipe.evaluate.prompts)
    if not evaluation.rows:
        what = f"none of the {len(prompts.rows)} prompts falls into the held-out share of {data.holdout}"
        raise InputError(Problem("data.holdout", what, "give more prompts or raise data.holdout"))
    shown = demonstrations.where(lambda row: not held_out(row.prompt))
    return Task(
        demonstrations=shown,
        held_out=demonstrations.where(lambda row: held_out(row.prompt)),
        prompts=prompts.where(lambda prompt: not held_out(prompt)),
        evaluation=evaluation,
        preferences=preferences,
        text=_pieces(data.text) if data.text is not None else (),
        make_tokenizer=lambda: train_tokenizer(_seen_texts(recipe, shown, preferences), vocab=recipe.model.vocab),
    )


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


def _seen_texts(
    recipe: Recipe, shown: Loaded[Demonstration], preferences: Loaded[Preference] | None
) -> list[str]:
    """What a tokenizer may learn from: every text that training sees, none that only measures."""
    texts = [text for row in shown.rows for text in (*_contents(row.prompt), row.response)]
    for pair in preferences.rows if preferences is not None else ():
        if not is_held_out(pair.prompt, recipe.reward.holdout):
            texts += [*_contents(pair.prompt), pair.chosen, pair.rejected]
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
    return tuple(piece for piece in (*pieces, current) if piece.strip())
