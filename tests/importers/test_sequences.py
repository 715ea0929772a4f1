"""Padding and packing are the trainer's affair: they change nothing of what is read.

Sequences are drawn at random and written as NeMo-RL pads them and as prime-rl packs them. What comes back is compared
with the drawn numbers, row by row.
"""

from __future__ import annotations

import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from imported import write_lines

from kedge.importers import Intake, nemo_rl, prime_rl
from kedge.trace.foreign import Rows

NATS = st.floats(-20, 0, width=32)


@st.composite
def sequence(draw: st.DrawFn) -> dict[str, Any]:
    """A prompt of one to four tokens, a response of one to six, and an environment's words in it and after it."""
    prompt = draw(st.lists(st.integers(1, 99), min_size=1, max_size=4))
    marks = draw(st.lists(st.booleans(), max_size=4))
    mask = [*[False] * len(prompt), True, *marks, *[False] * draw(st.integers(0, 2))]
    size = len(mask)
    ids = prompt + draw(st.lists(st.integers(1, 99), min_size=size - len(prompt), max_size=size - len(prompt)))
    columns = {name: draw(st.lists(NATS, min_size=size, max_size=size)) for name in ("sampler", "policy", "advantage")}
    return {"ids": ids, "mask": mask, **columns}


def expected(one: dict[str, Any]) -> tuple[list[int], list[int], list[bool]]:
    """Prompt ids, response ids and mask, by walking over the marks."""
    first = one["mask"].index(True)
    last = len(one["mask"]) - one["mask"][::-1].index(True)
    return one["ids"][:first], one["ids"][first:last], one["mask"][first:last]


def agree(rows: Rows, drawn: list[dict[str, Any]]) -> None:
    for at, one in enumerate(drawn):
        prompt, response, mask = expected(one)
        kept = rows.prompt_ids[at][rows.prompt_mask[at]]  # type: ignore[index]
        assert kept.tolist() == prompt and rows.response_ids[at][: len(response)].tolist() == response  # type: ignore[index]
        assert rows.response_mask[at].tolist() == mask + [False] * (rows.response_mask.shape[1] - len(mask))
        for name, field in (("sampler", "behaviour_logprob"), ("policy", "old_logprob"), ("advantage", "advantage")):
            given_ = [value for value, marked in zip(one[name], one["mask"], strict=True) if marked]
            column = getattr(rows, field)
            if column is None:  # zero everywhere: a trainer that computed nothing
                assert not any(
                    value for other in drawn for value, on in zip(other[name], other["mask"], strict=True) if on
                )
            else:
                np.testing.assert_array_equal(column[at][rows.response_mask[at]], given_)


@settings(max_examples=40, deadline=None)
@given(st.lists(sequence(), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_changes_nothing(drawn: list[dict[str, Any]], extra: int) -> None:
    width = max(len(one["ids"]) for one in drawn) + extra

    def row(one: dict[str, Any]) -> dict[str, Any]:
        def wide(values: list[Any], fill: Any) -> list[Any]:
            return values + [fill] * (width - len(values))

        return {
            "rewards": [1.0],
            "input_lengths": [len(one["ids"])],
            "token_ids": [wide(one["ids"], 0)],
            "token_loss_mask": [wide([int(on) for on in one["mask"]], 1)],  # what is beyond the length is no token
            "generation_logprobs": [wide(one["sampler"], 7.0)],
            "prev_logprobs": [wide(one["policy"], 7.0)],
            "advantages": [wide(one["advantage"], 7.0)],
        }

    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "train_data_step1.jsonl", [row(one) for one in drawn])
        agree(next(nemo_rl.read(path, {}, Intake())), drawn)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(sequence(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_packing_changes_nothing(packs: list[list[dict[str, Any]]]) -> None:
    def record(pack: list[dict[str, Any]]) -> dict[str, Any]:
        names = {"ids": "token_ids", "mask": "loss_mask", "sampler": "inference_logprobs", "policy": "trainer_logprobs"}
        names["advantage"] = "advantages"
        joined = {field: list(chain.from_iterable(one[name] for one in pack)) for name, field in names.items()}
        places = list(chain.from_iterable(range(len(one["ids"])) for one in pack))
        return {"schema_version": 1, "step": 0, **joined, "position_ids": places}

    with tempfile.TemporaryDirectory() as folder:
        step = Path(folder) / "token_exports" / "step_0"
        write_lines(step / "rank_0.jsonl", [record(pack) for pack in packs])
        (step / "STABLE").touch()
        agree(next(prime_rl.read(Path(folder), {}, Intake())), [one for pack in packs for one in pack])
