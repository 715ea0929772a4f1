"""A trained reward model as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.data.records import Prompt
from kedge.data.tokenise import encode_prompt, encode_response
from kedge.errors import InputError, Problem
from kedge.evaluate.intervals import Floats
from kedge.evaluate.reward.answers import Answer, Reading, RewardJudge
from kedge.models.load import load_tokenizer
from kedge.models.reward import RewardModel, load_reward_model
from kedge.progress import Progress
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import judge

BATCH = 128


def folder_judge(folder: Path, progress: Progress) -> RewardJudge:
    """The reward model in a folder, with the tokenizer in it or in that of its first member.

    Raises `InputError` for whatever is missing, damaged or unsafe.
    """
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(Problem(str(folder), what, "give a reward model's folder, or the name length or linear"))
    model = load_reward_model(folder)
    first = folder / "member-0"
    return model_judge(str(folder), model, load_tokenizer(first if first.is_dir() else folder), progress)


def model_judge(name: str, model: RewardModel, tokenizer: Any, progress: Progress) -> RewardJudge:
    """A loaded reward model as a judge; answers past its context, or to prompts that its chat template refuses,
    are not read."""
    context = min(getattr(part.config, "max_position_embeddings", None) or 2**31 for part in model.models)

    def read(answers: Sequence[Answer]) -> Reading:
        asked = {prompt: _prompt_ids(tokenizer, prompt) for prompt in dict.fromkeys(prompt for prompt, _ in answers)}
        rows = [(asked[prompt], encode_response(tokenizer, text)) for prompt, text in answers]
        sizes = np.array([len(ids) + len(said) if ids else 0 for ids, said in rows], dtype=np.int64)
        order = np.argsort(sizes, kind="stable")
        order = order[(sizes[order] > 0) & (sizes[order] <= context)]
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        score = np.full(len(rows), np.nan)
        members = np.full((len(rows), model.members), np.nan)
        distance = None if model.support is None else np.full(len(rows), np.nan)
        with progress.stage("scoring", len(batches)) as stage:
            for number, batch in enumerate(batches):
                ids, responses = zip(*(rows[at] for at in batch), strict=True)
                opinion = judge(model, as_rollouts(ids, responses, 0))
                score[batch] = opinion.score.double().numpy()
                members[batch] = opinion.members.double().numpy()
                if distance is not None and opinion.distance is not None:
                    distance[batch] = opinion.distance.double().numpy()
                stage.advance(number)
        return Reading(score, members, distance)

    def tokens(texts: Sequence[str]) -> Floats:
        return np.array([len(encode_response(tokenizer, text)) for text in texts], dtype=np.float64)

    def knows(text: str) -> bool:
        return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in encode_response(tokenizer, text)

    limit = None if model.support is None else model.support.limit
    # The aggregate is in units of its members' spread, which may differ; their mean turns it back into log-odds.
    log_odds = model.scale * sum(model.scales) / len(model.scales)
    return RewardJudge(name, read, log_odds, tokens, knows, limit)


def _prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """No ids for a prompt that the chat template refuses."""
    try:
        return encode_prompt(tokenizer, prompt)
    except InputError:
        return []
