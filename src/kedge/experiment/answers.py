"""Answers of anybody's policy to anybody's prompts, with the scores of one or more reward models.

Dimensions: P prompts, N answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kedge.data.records import Prompt, prompt_text
from kedge.data.tokenise import decode, encode_prompt
from kedge.data.validate import load_prompts
from kedge.diagnose.features import FEATURES, Feature, feature_named, function_named
from kedge.errors import InputError, Problem
from kedge.evaluate.reward.folder import folder_judge
from kedge.models.load import disable_dropout, load_policy, load_tokenizer
from kedge.models.reward import load_reward_model
from kedge.progress import Interrupt, Progress
from kedge.rollout.engine import TorchEngine
from kedge.rollout.given import as_prompts
from kedge.rollout.reward import scores as scores_of
from kedge.structs import Rollouts, Sampling
from kedge.train.schedule import seeded

Floats = NDArray[np.float64]
AskedFeature = Callable[[Sequence[str], Sequence[str]], Floats]
"""Prompts and answers to a number each, [B]."""

ROWS_AT_ONCE = 2048  # answers between two looks at whether to stop
SHOWN = 5  # prompts left out that are named


@dataclass(frozen=True)
class Asked:
    """Prompts that can be asked, as they were given and as token ids, and what was left out, in a line each."""

    prompts: tuple[Prompt, ...]
    ids: tuple[list[int], ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """N answers of a policy to each prompt."""

    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]  # [P][N]
    lengths: Floats  # [P, N] tokens, EOS included
    ended: Floats  # [P, N] 1 where the answer closed within the budget
    scores: Mapping[str, Floats]  # [P, N] by reward model
    notes: tuple[str, ...] = ()

    def features(self, named: Sequence[str] = ()) -> dict[str, Floats]:
        """[P, N] each feature of `diagnose.features`, and those that are named."""
        flat = [text for row in self.texts for text in row]
        found = {name: self._of(feature, flat) for name, feature in FEATURES.items()}
        for name in named:
            found[name] = self._own(name, flat)
        return found

    def _of(self, feature: Feature, flat: Sequence[str]) -> Floats:
        return np.asarray(feature(flat, self.lengths.ravel()), dtype=np.float64).reshape(self.lengths.shape)

    def _own(self, name: str, flat: Sequence[str]) -> Floats:
        """A feature of the answer, or a function of prompt and answer."""
        function = None if name in FEATURES or name.startswith("regex:") else _of_two(name)
        if function is None:
            return self._of(feature_named(name), flat)
        asked = [prompt for prompt, row in zip(self.prompts, self.texts, strict=True) for _ in row]
        try:
            values = [float(function(prompt, text)) for prompt, text in zip(asked, flat, strict=True)]
        except Exception as error:
            what = f"failed on an answer: {type(error).__name__}: {error}"
            remedy = "it takes a prompt and a response and returns a number"
            raise InputError(Problem(f"--feature {name}", what, remedy)) from None
        found = np.array(values, dtype=np.float64)
        if not np.isfinite(found).all():
            raise InputError(Problem(f"--feature {name}", "returned a number that is not finite", "return numbers"))
        return found.reshape(self.lengths.shape)


def _of_two(name: str) -> Callable[[str, str], Any] | None:
    """The function that a name means, if it takes a prompt and a response."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        return None
    function = function_named(name)
    try:
        wanted = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        return None
    return function if len(wanted) == 2 else None


def prompts_in(path: Path, tokenizer: Any, *, context: int, max_new_tokens: int, most: int) -> Asked:
    """The prompts of a file that the policy can answer, at most `most` of them, evenly spaced; malformed rows, and
    those too long for it, are left out and named. Raises `InputError` where none is left."""
    loaded = load_prompts(path, max_rejected=1.0)
    left_out = [str(problem) for problem in loaded.rejected]
    kept: list[tuple[Prompt, list[int]]] = []
    for prompt, where in zip(loaded.rows, loaded.lines, strict=True):
        try:
            ids = encode_prompt(tokenizer, prompt)
        except InputError as error:
            left_out.append(f"{where}: {error.problems[0].what}")
            continue
        if len(ids) + max_new_tokens > context:
            left_out.append(f"{where}: {len(ids)} tokens and {max_new_tokens} to come, the context is {context}")
        else:
            kept.append((prompt, ids))
    if not kept:
        problems = [Problem(str(path), one) for one in left_out[:SHOWN]]
        raise InputError([*problems, Problem(str(path), f"all {loaded.total} rows are left out", "give other prompts")])
    return _spaced([prompt for prompt, _ in kept], [ids for _, ids in kept], most, tuple(left_out))


def prompts_of(prompts: Sequence[Prompt], tokenizer: Any, most: int) -> Asked:
    """Prompts of a run, at most `most` of them, evenly spaced."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return _spaced(prompts, ids, most, ())


def _spaced(prompts: Sequence[Prompt], ids: Sequence[list[int]], most: int, left_out: tuple[str, ...]) -> Asked:
    count = min(most, len(prompts))
    chosen = [at * len(prompts) // count for at in range(count)]
    return Asked(tuple(prompts[at] for at in chosen), tuple(ids[at] for at in chosen), left_out)


def loaded_policy(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A policy without dropout, and its tokenizer. Raises `InputError`."""
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(Problem(f"--policy {folder}", what, "give a Hugging Face model folder"))
    model, tokenizer = load_policy(folder, trust_remote_code=trust_remote_code)
    return disable_dropout(model), tokenizer


def context_of(policy: Any) -> int:
    """Tokens that prompt and answer may have together."""
    return int(getattr(policy.config, "max_position_embeddings", None) or 2**31)


def drawn(
    policy: Any,
    tokenizer: Any,
    asked: Asked,
    rewards: Mapping[str, Path],
    *,
    count: int,
    sampling: Sampling,
    seed: int,
    progress: Progress,
    interrupt: Interrupt,
) -> Answers:
    """`count` answers per prompt with the scores of each reward model, `rewards` by name.

    A reward model with the policy's tokenizer reads token ids as in training; another reads the text, where an answer
    that did not end looks as if it had. Raises `InputError` for answers that a reward model cannot read.
    """
    engine = TorchEngine(int(tokenizer.eos_token_id), int(tokenizer.pad_token_id))
    judges = {name: _judge(folder, tokenizer) for name, folder in rewards.items()}
    prompts = as_prompts(asked.ids, int(tokenizer.pad_token_id))
    few = max(1, ROWS_AT_ONCE // len(asked.ids))
    texts: list[list[str]] = [[] for _ in asked.ids]
    columns: dict[str, list[Floats]] = {}
    with progress.stage("sampling", count) as stage:
        for first in range(0, count, few):
            interrupt.check(f"{first} of {count} answers to a prompt")
            part = min(few, count - first)
            rows = torch.arange(len(prompts)).repeat_interleave(part)
            answers = engine.generate(policy, prompts.rows(rows), sampling, seeded(seed, "forecast", first))
            said = _texts(tokenizer, answers)
            for row, text in zip(rows.tolist(), said, strict=True):
                texts[row].append(text)
            asked_again = [asked.prompts[row] for row in rows.tolist()]
            found = {name: judge(answers, asked_again, said) for name, judge in judges.items()}
            found = {f"score {name}": values for name, values in found.items()}
            found["lengths"], found["ended"] = answers.lengths.numpy(), answers.ended.numpy()
            for name, values in found.items():
                columns.setdefault(name, []).append(np.asarray(values, dtype=np.float64).reshape(-1, part))
            stage.advance(first + part - 1)
    joined = {name: np.concatenate(parts, axis=1) for name, parts in columns.items()}
    return Answers(
        prompts=tuple(map(prompt_text, asked.prompts)),
        texts=tuple(map(tuple, texts)),
        lengths=joined["lengths"],
        ended=joined["ended"],
        scores={name: joined[f"score {name}"] for name in rewards},
        notes=_notes(joined["ended"]),
    )


def _notes(ended: Floats) -> tuple[str, ...]:
    share = 1 - float(ended.mean())
    if share <= 0.01:
        return ()
    return (f"{share:.0%} of the answers were cut at the token budget: lengths beyond it are not seen.",)


def _texts(tokenizer: Any, answers: Rollouts) -> list[str]:
    rows = zip(answers.response_ids, answers.response_mask, strict=True)
    return [decode(tokenizer, ids[mask].tolist()) for ids, mask in rows]


def _judge(folder: Path, tokenizer: Any) -> Callable[[Rollouts, Sequence[Prompt], Sequence[str]], Floats]:
    """What scores answers: by token ids where the reward model has the policy's tokenizer, else by their text."""
    where = f"--reward {folder}"
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(Problem(where, what, "give a reward model's folder"))
    first = folder / "member-0"
    own = load_tokenizer(first if first.is_dir() else folder)
    if own.get_vocab() == tokenizer.get_vocab():
        model = load_reward_model(folder)

        def by_ids(answers: Rollouts, prompts: Sequence[Prompt], texts: Sequence[str]) -> Floats:  # noqa: ARG001
            return _finite(scores_of(model, answers).double().numpy(), where)

        return by_ids
    judge = folder_judge(folder, Progress(quiet=True))

    def by_text(answers: Rollouts, prompts: Sequence[Prompt], texts: Sequence[str]) -> Floats:  # noqa: ARG001
        return _finite(judge.read(list(zip(prompts, texts, strict=True))).score, where)

    return by_text


def _finite(values: Floats, where: str) -> Floats:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        what = f"{count} of {len(values)} answers have no finite score: they may be longer than its context"
        raise InputError(Problem(where, what, "lower --max-new-tokens, or give another reward model"))
    return values
