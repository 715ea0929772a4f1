"""SkyRL's dumps are pickles: refused without being opened; the script that the message gives does the rest.

The script is run with a stand-in for SkyRL's batch class, which has SkyRL's way of pickling it. The batch:
prompt 7 8 with 20 21 (padded on the left), prompt 5 6 with 30 31 32 of which 31 is an environment's, and one copy of
the first row that filled the batch up.
"""

from __future__ import annotations

import json
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import imported, refused

from kedge.importers import skyrl

PAGE = Path(__file__).parents[2] / "docs" / "frameworks" / "skyrl.md"

BATCH = """
import numpy, torch

def rebuild(cls, state):
    batch = dict.__new__(cls)
    for key, blob in state["batch_dict"].items():
        array = None if blob is None else numpy.frombuffer(blob["data"], blob["dtype"]).reshape(blob["shape"])
        batch[key] = None if array is None else torch.from_numpy(array.copy())
    batch.batch_size, batch.metadata = state["batch_size"], state["metadata"]
    return batch

class TrainingInputBatch(dict):
    def __reduce__(self):
        blobs = {key: None if value is None else {"data": value.numpy().tobytes(), "shape": value.numpy().shape,
                 "dtype": str(value.numpy().dtype)} for key, value in self.items()}
        return rebuild, (type(self), {"batch_dict": blobs, "batch_size": self.batch_size, "metadata": self.metadata})
"""

MAKE = """
import pickle, sys, torch
from skyrl_stand_in import TrainingInputBatch

first = {
    "sequences": [0, 7, 8, 20, 21], "attention_mask": [0, 1, 1, 1, 1], "response_mask": [0, 1, 1],
    "loss_mask": [0, 1, 1], "rollout_logprobs": [9, -0.1, -0.2], "action_log_probs": [9, -0.15, -0.25],
    "base_action_log_probs": [9, -0.3, -0.4], "advantages": [9, 1.0, 1.0],
}
second = {
    "sequences": [5, 6, 30, 31, 32], "attention_mask": [1] * 5, "response_mask": [1, 1, 1],
    "loss_mask": [1, 0, 1], "rollout_logprobs": [-0.3, 0, -0.4], "action_log_probs": [-0.35, 0, -0.45],
    "base_action_log_probs": [-0.5, 0, -0.6], "advantages": [-1.0, -1.0, -1.0],
}
for step in (2, 10):
    batch = TrainingInputBatch({key: torch.tensor([first[key], second[key], first[key]]) for key in first})
    batch["values"] = None
    batch.batch_size, batch.metadata = 3, {"pad_size": 1, "response_length": 3}
    with open(f"{sys.argv[1]}/global_step_{step}_training_input.pkl", "wb") as file:
        pickle.dump(batch, file)
"""


class Touch:
    """Its pickle, loaded carelessly, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.fixture
def dumped(tmp_path: Path) -> Path:
    folder = tmp_path / "exports" / "dumped_data"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "level", ["exports", "exports/dumped_data", "exports/dumped_data/global_step_4_training_input.pkl"]
)
def test_a_pickle_is_refused_unopened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dumped: Path, level: str
) -> None:
    proof = tmp_path / "was-run"
    (dumped / "global_step_4_training_input.pkl").write_bytes(pickle.dumps(Touch(proof)))
    message = refused(capsys, tmp_path / level, tmp_path / "run")
    assert not proof.exists()
    assert "a SkyRL dump is a pickle" in message and "Kedge opens none" in message
    assert f"python skyrl_to_kedge.py {dumped} OUT" in message and skyrl.SCRIPT.strip() in message


def test_the_page_has_the_same_script() -> None:
    assert f"```python\n{skyrl.SCRIPT}```" in PAGE.read_text(encoding="utf-8")


def test_the_script_writes_what_the_import_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dumped: Path
) -> None:
    pytest.importorskip("torch")
    written = tmp_path / "written"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "skyrl_stand_in.py").write_text(BATCH)
    for name, program, arguments in (
        ("make.py", MAKE, [dumped]),
        ("skyrl_to_kedge.py", skyrl.SCRIPT, [dumped, written]),
    ):
        (tmp_path / name).write_text(program)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(tmp_path / name))
    assert len((written / "step-000010.jsonl").read_text().splitlines()) == 2  # the copy that fills up is left out
    assert json.loads((written / "conventions.json").read_text())["trainer"] == "SkyRL"

    run, _ = imported(capsys, written, tmp_path / "run")

    assert run.steps() == (2, 10) and run.manifest["conventions"]["trainer"] == "SkyRL"
    step = run.step(10)
    mask = step.response_mask
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, True]])
    np.testing.assert_array_equal(step.response_ids, [[20, 21, 0], [30, 31, 32]])
    expected = {
        "behaviour_logprob": [-0.1, -0.2, -0.3, -0.4],
        "old_logprob": [-0.15, -0.25, -0.35, -0.45],
        "reference_logprob": [-0.3, -0.4, -0.5, -0.6],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(step.tokens[name][mask], values, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(step.advantage()[mask], [1, 1, -1, -1], atol=1e-4)
    assert {"values", "score", "ended"} <= step.absent
