"""What judges in a replay beside the trace: another reward model, the length slope of the scores, rules asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.experiment.replay.keys import Plan
from kedge.experiment.replay.rows import Rescored, rollouts_with_prompts
from kedge.trace.reader import Run, StepTrace

Array = NDArray[Any]


class Judge:
    """Turns a step into what its scores become under a plan. Makes one pass over the steps where it needs a slope."""

    def __init__(self, plan: Plan, steps: Callable[[], Iterator[StepTrace]], run: Run | None) -> None:
        self._plan = plan
        self._rescore = None if plan.reward is None else _scorer(plan.reward, run)
        self._rules = {name: _rule(name, plan) for name in plan.rules}
        self.slope, self.usual = _length_slope(steps(), self._scores) if plan.transform else (0.0, 0.0)

    def of(self, step: StepTrace) -> Rescored:
        """What the step's scores become."""
        return Rescored(
            scores=None if self._rescore is None else self._rescore(step),
            slope=self.slope,
            usual=self.usual,
            rules=self._rules,
            buffer=self._plan.after.policy.overlong_buffer,
        )

    def _scores(self, step: StepTrace) -> Array:
        """[B] before the slope is taken off."""
        if self._rescore is not None:
            return self._rescore(step)
        return np.asarray(step.rewards[..., step.channels.index("score")].sum(axis=1), np.float64)


def _length_slope(steps: Iterator[StepTrace], scores: Callable[[StepTrace], Array]) -> tuple[float, float]:
    """Score per token: the least-squares line through all responses, each step (or prompt, where it has several
    responses) with a level of its own; and their mean length, at which nothing is taken off."""
    products = squares = tokens = responses = 0.0
    for step in steps:
        lengths, found = step.lengths.astype(np.float64), scores(step)
        _, number, counts = np.unique(step.group, return_inverse=True, return_counts=True)
        if counts.min() < 2:
            number, counts = np.zeros(len(step), np.int64), np.array([len(step)])
        inside = lengths - (np.bincount(number, lengths) / counts)[number]
        products += float(inside @ found)
        squares += float(inside @ inside)
        tokens += float(lengths.sum())
        responses += len(step)
    return products / squares if squares else 0.0, tokens / responses if responses else 0.0


def _rule(name: str, plan: Plan) -> Callable[[StepTrace], Array]:
    """The rule of the recipe, asked about the texts of a step."""
    from kedge.rollout.rules import rule_reward

    rule = rule_reward(name, plan.after.rewards[name])

    def ask(step: StepTrace) -> Array:
        return rule(*(_texts(step, texts, name) for texts in (step.prompts, step.responses))).numpy()

    return ask


def _texts(step: StepTrace, texts: Sequence[str | None], name: str) -> list[str]:
    if step.response_ids is None or None in texts:
        what = 'the rule needs the texts, which are not kept (trace.text is not "full")'
        raise InputError(Problem(f"{step.path}: rewards.{name}", what, "`kedge trial` carries it out"))
    return [text for text in texts if text is not None]


def _scorer(folder: Path, run: Run | None) -> Callable[[StepTrace], Array]:
    """[B] what the reward model in `folder` says of a step's token ids, in its own normalised units."""
    from kedge.models.reward import load_reward_model
    from kedge.rollout.reward import scores

    _require_same_tokens(folder, run)
    model = load_reward_model(folder)
    vocabulary = min(one.get_input_embeddings().num_embeddings for one in model.models)

    def score(step: StepTrace) -> Array:
        rollouts = rollouts_with_prompts(step)
        largest = max(int(rollouts.prompt_ids.max()), int(rollouts.response_ids.max()))
        if largest >= vocabulary:
            what = f"knows {vocabulary} tokens, and the run's responses hold token {largest}"
            raise InputError(Problem(f"--reward {folder}", what, "give a reward model with the run's tokenizer"))
        return scores(model, rollouts).double().numpy()

    return score


def _require_same_tokens(folder: Path, run: Run | None) -> None:
    """Raise `InputError` where both folders hold a tokenizer and the two write other ids."""
    from kedge.models.load import load_tokenizer, require_same_tokens

    own, other = (None if place is None else _tokenizer(place) for place in (_own(run), folder))
    if own is not None and other is not None:
        require_same_tokens(other, load_tokenizer(own), "train one on the run's models: kedge reward --start RUN")


def _own(run: Run | None) -> Path | None:
    return None if run is None else run.dir.models / "reward"


def _tokenizer(folder: Path) -> Path | None:
    """The folder, or that of its first member, which holds a tokenizer."""
    found = sorted(folder.glob("**/tokenizer.json"))
    return found[0].parent if found else None
