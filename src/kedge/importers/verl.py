"""veRL's rollout files: `trainer.rollout_data_dir` writes one `{step}.jsonl` per step, text and scores alone.

v1 adds `uid`, one for each prompt; the older trainer adds `request_id` and what the reward function returned besides.
Text was decoded without special tokens, so that neither EOS nor the length in tokens can be had back.
Source: `_log_rollout_data` of verl-project/verl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake, Question
from kedge.importers.questions import BETA, KL, KL_ESTIMATOR, conventions_from
from kedge.importers.records import finite, first_record, groups, numbered, records
from kedge.importers.texts import NO_TEXT, positions, text_of
from kedge.trace.foreign import Conventions, Rows

FILE = r"(\d+)\.jsonl"
FIELDS = ("input", "output", "score", "step")
KNOWN = {*FIELDS, "gts", "uid", "request_id"}
GRPO_EPSILON = 1e-6

# What `algorithm.adv_estimator` makes of scores, in the words of Conventions, and what it adds to the deviation.
ESTIMATORS: Mapping[str, tuple[str, str, float]] = {
    "gae": ("PPO with a critic, whose values are not in the file", "unknown", 0.0),
    "grpo": (
        "minus the mean of the prompt's responses, over their deviation",
        "group mean and deviation",
        GRPO_EPSILON,
    ),
    "grpo-without-deviation": ("GRPO with norm_adv_by_std_in_grpo=False", "group mean", 0.0),
    "rloo": ("minus the mean of the prompt's other responses", "leave one out", 0.0),
    "reinforce_plus_plus": ("whitened over the batch", "batch", 0.0),
    "other": ("any other, or not known; advantages are then absent", "unknown", 0.0),
}
ESTIMATOR = Question(
    key="adv_estimator",
    text="Which algorithm.adv_estimator was it?",
    why="the files hold no advantage; from some estimators it can be derived",
    choices={name: meaning for name, (meaning, *_) in ESTIMATORS.items()},
    default="other",
)


def recognises(path: Path) -> bool:
    """True for a file of veRL's fields, or a folder of `{step}.jsonl` with them."""
    found = numbered(path, FILE)
    record = first_record(found[0][1]) if found else None
    return record is not None and set(FIELDS) <= set(record)


def conventions(path: Path, answers: Answers) -> Conventions:  # noqa: ARG001 (the shape of Format)
    """veRL puts the score on the last response token and logs its KL as a mean over tokens."""
    name = answers["adv_estimator"]
    _, normalisation, epsilon = ESTIMATORS[name]
    if answers["kl"] not in ("none", "loss"):  # a KL in the reward is part of the advantage, and not in the file
        normalisation, epsilon = "unknown", 0.0
    return conventions_from(
        answers,
        trainer=f"veRL, adv_estimator {name}",
        kl_unit="per token",
        normalisation=normalisation,
        epsilon=epsilon,
        score_position="last",
        critic={"gae": True, "other": None}.get(name, False),
    )


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """One step per file, in order of the steps in their names."""
    found = numbered(path, FILE)
    if not found:
        raise InputError(Problem(str(path), "holds no {step}.jsonl", f"give the folder of {FORMAT.expected}"))
    names = {one: step for step, one in found}
    for file in intake.files([one for _, one in found]):
        rows = _step(file, names[file], intake)
        if rows is not None:
            yield rows


def _step(file: Path, step: int, intake: Intake) -> Rows | None:
    kept: list[Mapping[str, Any]] = []
    texts: list[tuple[str, str]] = []
    for where, record in records(file, FIELDS):
        intake.rows += 1
        if record["step"] != step:
            what = f"its step is {record['step']!r}, the file's name says {step}"
            raise InputError(Problem(where, what, "a file was renamed, or two put together; take it from a copy"))
        prompt, response = text_of(record["input"]), text_of(record["output"])
        if prompt is None or response is None:
            intake.leave_out(where, NO_TEXT)
        elif not finite(record["score"]):
            intake.leave_out(where, "the score is not a finite number")
        else:
            kept.append(record)
            texts.append((prompt, response))
    if not kept:
        return None
    _tell(set(kept[0]), intake)
    prompts, responses = map(list, zip(*texts, strict=True))
    mask, ids = positions(responses, intake)
    return Rows(
        step=step,
        response_mask=mask,
        scores={"score": np.array([record["score"] for record in kept], float)},
        group=groups([record.get("uid", prompt) for record, prompt in zip(kept, prompts, strict=True)]),
        prompts=prompts,
        responses=responses,
        response_ids=ids,
    )


def _tell(names: set[str], intake: Intake) -> None:
    """What the fields of a file say about it."""
    intake.note("special tokens were left out when veRL decoded: EOS, and whether a response ended, are not known")
    if "uid" not in names:
        intake.note("no uid: responses to the same text in a step count as one group")
    if "reward" in names and "uid" not in names:
        intake.note(
            "there is a field `reward`, which veRL writes for validation: rows of validation_data_dir taught nothing; "
            "give rollout_data_dir"
        )
    if extra := sorted(names - KNOWN):
        intake.note(f"not read, what the reward function returned besides the score: {', '.join(extra)}")


FORMAT = Format(
    name="verl",
    title="veRL rollout_data_dir",
    recognises=recognises,
    expected="trainer.rollout_data_dir: {step}.jsonl with input, output, score, step (v1 also uid)",
    asks=(ESTIMATOR, KL, KL_ESTIMATOR, BETA),
    read=read,
    conventions=conventions,
    fields=FIELDS,
    text_only=lambda _: True,
)
