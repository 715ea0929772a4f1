"""Rollout files as the published field lists of TRL and veRL have them, and the generic schema; all numbers by hand.

GRPO's advantage of rewards (1, 3) is (1 - 2, 3 - 2) / (sqrt(2) + 1e-4), and of (0, 4) it is twice the deviation:
(-2, 2) / (2 sqrt(2) + 1e-4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT2 = 2.0**0.5
GRPO = [-1 / (ROOT2 + 1e-4), 1 / (ROOT2 + 1e-4), -2 / (2 * ROOT2 + 1e-4), 2 / (2 * ROOT2 + 1e-4)]
REWARDS = [1.0, 3.0, 0.0, 4.0]
ANSWERS = ["one", "two words", "it has three", "and this has four words"]


def completions(step: int, **columns: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The columns of one TRL file: two prompts with two completions each."""
    told = {
        "step": [step] * 4,
        "prompt": ["first?", "first?", "second?", "second?"],
        "completion": [f"{words} {step}" for words in ANSWERS],
        "accuracy_reward": REWARDS,
        "advantage": GRPO,
    }
    return told | columns


def write_trl(folder: Path, step: int, columns: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """`completions_{step:05d}.parquet` in `folder/completions`."""
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(completions(step) if columns is None else columns)), path)
    return path


def verl_records(step: int, **fields: Any) -> list[dict[str, Any]]:
    """The records of one veRL file: two prompts with two responses each."""
    return [
        {
            "input": f"question {prompt}",
            "output": f"{answer} {step}",
            "gts": "42",
            "score": score,
            "step": step,
            **fields,
        }
        for prompt, answer, score in zip((0, 0, 1, 1), ANSWERS, REWARDS, strict=True)
    ]


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def generic_record(step: int, row: int, length: int, **fields: Any) -> dict[str, Any]:
    """A response of `length` tokens with everything that the generic schema holds per token."""
    old = [-0.5 - 0.1 * at for at in range(length)]
    return {
        "step": step,
        "row": row,
        "group": f"p{row // 2}",
        "prompt": f"prompt {row // 2}",
        "response": " ".join(["word"] * length),
        "prompt_ids": [7] * (row // 2 + 1),
        "response_ids": list(range(10, 10 + length)),
        "response_mask": [True] * length,
        "ended": row % 2 == 0,
        "score": float(row),
        "old_logprob": old,
        "reference_logprob": [value - 0.25 for value in old],
        "advantage": [0.5 * row] * length,
    } | fields


def generic_step(step: int, **fields: Any) -> list[dict[str, Any]]:
    """Four responses of 1, 2, 3 and 4 tokens."""
    return [generic_record(step, row, row + 1, **fields) for row in range(4)]
