"""NeMo-RL's `train_data_step{N}.jsonl`: what a GRPO (or asynchronous PPO) step trained on, one line a sample.

Read in NVIDIA-NeMo/RL: `nemo_rl/algorithms/grpo.py` (`log_data`, written by `Logger.log_batched_dict_as_jsonl` of
`nemo_rl/utils/logger.py` @ 0e535486), `get_logprobs` of the policy workers, `nemo_rl/experience/rollouts.py`:

- Every value is a list of one, because the logger slices a batch of one sample; `idx` is not.
- Token arrays are padded on the right to the batch's longest; `input_lengths` says how much is real.
- The log-probability of token t stands at position t; that of the first token is 0. `prev_logprobs` are of the policy
  before the update, `generation_logprobs` of the inference engine. With `loss_fn.force_on_policy_ratio` the former are
  not computed and written as zeros.
- `token_loss_mask` is 1 on every assistant message. An environment's message follows each, after the last one too.
- With dynamic sampling `rewards` are those of the whole batch before it was filtered, sliced like the rest: they belong
  to other samples. `filtered_rewards` belong to the rows.
- Neither roles nor the number of the prompt are written: responses to the same prompt tokens are a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Intake
from kedge.importers.questions import BETA, KL, KL_ESTIMATOR, NORMALISATION, conventions_from
from kedge.importers.records import first_record, numbered, records
from kedge.importers.sequences import (
    DISCOUNTS,
    Malformed,
    Sampled,
    count,
    cut,
    flags,
    nothing_found,
    number,
    numbers,
    rows_of,
    token_ids,
    told_normalisation,
)
from kedge.trace.foreign import Conventions, Rows

FILE = r"train_data_step(\d+)\.jsonl"
FIELDS = ("rewards", "input_lengths", "token_ids", "token_loss_mask")
COLUMNS: Mapping[str, str] = {
    "generation_logprobs": "behaviour_logprob",
    "prev_logprobs": "old_logprob",
    "reference_policy_logprobs": "reference_logprob",  # not written as NeMo-RL comes; docs/frameworks/nemo-rl.md
    "values": "values",  # nor this
    "advantages": "advantage",
}
EPSILON = 1e-6  # normalize_advantages_with_epsilon of grpo.py


def recognises(path: Path) -> bool:
    """True for a train_data_step file with token ids, or a folder that holds one, itself or in exp_NNN."""
    found = [file for folder in _folders(path) for _, file in numbered(folder, FILE)]
    record = first_record(found[0]) if found else None
    return record is not None and set(FIELDS) <= set(record)


def conventions(path: Path, answers: Answers) -> Conventions:  # noqa: ARG001 (the shape of Format)
    """NeMo-RL puts the score on the last response token; its KL metrics are means over tokens."""
    return conventions_from(answers, trainer="NeMo-RL", kl_unit="per token", score_position="last", epsilon=EPSILON)


def told(path: Path) -> Answers:
    """What the first step shows of the advantage. Raises InputError where it cannot be read."""
    first = next(read(path, {}, Intake()), None)
    return {} if first is None else told_normalisation(first)


def read(path: Path, answers: Answers, intake: Intake) -> Iterator[Rows]:  # noqa: ARG001 (the shape of Format)
    """One step per file, in order of the steps in their names."""
    found = numbered(_run(path), FILE)
    if not found:
        raise nothing_found(path, "holds no train_data_step{N}.jsonl", FORMAT.expected)
    steps = {file: step for step, file in found}
    for file in intake.files(list(steps)):
        sampled = []
        for where, record in records(file, FIELDS):
            intake.rows += 1
            try:
                sampled.append(_sampled(record, intake))
            except Malformed as fault:
                intake.leave_out(where, str(fault))
        if sampled:
            yield rows_of(steps[file], sampled, intake)


def _folders(path: Path) -> list[Path]:
    """The path itself, or the exp_NNN folders in it where it holds some."""
    try:
        inside = sorted(one for one in path.iterdir() if re.fullmatch(r"exp_\d+", one.name)) if path.is_dir() else []
    except OSError:
        inside = []
    return inside or [path]


def _run(path: Path) -> Path:
    """The one folder of a run under `path`. Raises InputError where there is more than one."""
    folders = [folder for folder in _folders(path) if numbered(folder, FILE)]
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise InputError(Problem(str(path), f"holds more than one run: {names}", "give one of these folders"))
    return folders[0] if folders else path


def _sampled(record: Mapping[str, Any], intake: Intake) -> Sampled:
    values = {name: _unwrapped(value) for name, value in record.items()}
    padded_ids = token_ids(values["token_ids"], "token_ids")
    length = count(values["input_lengths"], "input_lengths")
    if length > len(padded_ids):
        raise Malformed("input_lengths is more than there are token_ids")

    def real(name: str) -> NDArray[Any]:
        return numbers(values[name], name, len(padded_ids))[:length]

    mask = flags(values["token_loss_mask"], "token_loss_mask", len(padded_ids))[:length]
    columns = {column: real(name) for name, column in COLUMNS.items() if values.get(name) is not None}
    if values.get("sample_loss_mask") is not None and not number(values["sample_loss_mask"], "sample_loss_mask"):
        intake.note("samples with sample_loss_mask 0 count nothing in the loss: their advantage is written as 0")
        columns["advantage"] = np.zeros(length)
    if "filtered_rewards" in values:
        intake.note("dynamic sampling: `rewards` belong to samples before filtering; filtered_rewards are read")
    score = number(values["filtered_rewards" if "filtered_rewards" in values else "rewards"], "the reward")
    prompt, response = _texts(values.get("content"), mask)
    return cut(padded_ids[:length], mask, columns, score=score, prompt=prompt, response=response)


def _unwrapped(value: Any) -> Any:
    """The only element of a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _texts(content: Any, mask: NDArray[Any]) -> tuple[str | None, str | None]:
    """Prompt and response of a conversation with one answer; of a longer one only a tokenizer tells which is which."""
    turns = int(mask[0]) + int((np.diff(mask.astype(int)) == 1).sum()) if len(mask) else 0
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content) or turns != 1:
        return None, None
    messages = [one for one in content if one]
    answer = len(messages) - (1 if mask[-1] else 2)  # an environment's message may follow it
    return ("".join(messages[:answer]), messages[answer]) if answer >= 1 else (None, None)


FORMAT = Format(
    name="nemo-rl",
    title="NeMo-RL train data",
    recognises=recognises,
    expected="train_data_step{N}.jsonl with rewards, input_lengths, token_ids, token_loss_mask "
    "(and advantages, generation_logprobs, prev_logprobs)",
    asks=(KL, KL_ESTIMATOR, BETA, NORMALISATION, *DISCOUNTS),
    read=read,
    conventions=conventions,
    fields=FIELDS,
    told=told,
)
