"""slime's training dumps: every number where it belongs, and files that would run code, are torn or foreign.

The step: prompt 7 8 with the answers 20 21 (raw reward 3) and 30 90 31, of which 90 is a tool's (raw reward 1), and a
prompt 5 with 50, which was truncated (raw reward 2).
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import imported, refused

from kedge.errors import InputError
from kedge.importers import Intake, slime

torch = pytest.importorskip("torch")


def floats(*numbers: float) -> Any:
    return torch.tensor(numbers, dtype=torch.float32)


def samples() -> list[dict[str, Any]]:
    return [
        {
            "data_parallel_rank": 0,
            "sample_index": 0,
            "rollout_position": 0,
            "tokens": torch.tensor([7, 8, 20, 21]),
            "response_lengths": 2,
            "rewards": 1.0,
            "truncated": 0,
            "loss_masks": torch.tensor([1, 1]),
            "rollout_log_probs": floats(-0.1, -0.2),
            "log_probs": floats(-0.15, -0.25),
            "ref_log_probs": floats(-0.3, -0.4),
            "values": floats(0.5, 0.6),
            "advantages": floats(1.0, 1.0),
            "returns": floats(1.0, 1.0),
            "kl": floats(0.0, 0.0),
            "entropy": floats(1.0, 1.1),
        },
        {
            "data_parallel_rank": 1,
            "sample_index": 1,
            "rollout_position": 1,
            "tokens": [7, 8, 30, 90, 31],
            "response_lengths": 3,
            "rewards": -1.0,
            "truncated": 0,
            "loss_masks": [1, 0, 1],
            "rollout_log_probs": [-0.3, 0.0, -0.4],
            "log_probs": torch.tensor([-0.375, -9.0, -0.5], dtype=torch.bfloat16),
            "ref_log_probs": floats(-0.5, -9.0, -0.6),
            "values": floats(0.7, 0.0, 0.8),
            "advantages": floats(-1.0, -1.0, -1.0),
            "returns": floats(-1.0, -1.0, -1.0),
            "kl": floats(0.0, 0.0, 0.0),
            "entropy": floats(1.2, 0.0, 1.3),
        },
        {
            "data_parallel_rank": 0,
            "sample_index": 2,
            "rollout_position": 2,
            "tokens": torch.tensor([5, 50]),
            "response_lengths": 1,
            "rewards": 0.0,
            "truncated": 1,
            "loss_masks": torch.tensor([1]),
            "rollout_log_probs": floats(-0.5),
            "log_probs": floats(-0.55),
            "ref_log_probs": floats(-0.7),
            "values": floats(0.9),
            "advantages": floats(0.0),
            "returns": floats(0.0),
            "kl": floats(0.0),
            "entropy": floats(1.4),
        },
    ]


def dump(folder: Path, number: int = 3, **changes: Any) -> Path:
    """A train dump in `folder`/train_data."""
    whole = {
        "format_version": 2,
        "rollout_id": number,
        "rank": 0,
        "samples": samples(),
        "dp_shards": [{"rank": 0, "sample_indices": [0, 2]}, {"rank": 1, "sample_indices": [1]}],
        "raw_reward": [3.0, 1.0, 2.0],
    } | changes
    return saved(folder / "train_data" / f"{number}.pt", whole)


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def details(tmp_path: Path) -> Path:
    return tmp_path / "details"


def test_every_number_is_where_it_belongs(capsys: pytest.CaptureFixture[str], details: Path, out: Path) -> None:
    dump(details, 3)
    dump(details, 12)
    run, said = imported(
        capsys, details, out, "--answer", "kl=loss", "--answer", "kl_estimator=k3", "--answer", "beta=0.01"
    )
    assert run.steps() == (3, 12) and said["format"] == "slime" and said["rows"] == 6
    step = run.step(12)
    mask = step.response_mask
    np.testing.assert_array_equal(step.response_ids, [[20, 21, 0], [30, 90, 31], [50, 0, 0]])
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, True], [True, False, False]])
    expected = {
        "behaviour_logprob": [-0.1, -0.2, -0.3, -0.4, -0.5],
        "old_logprob": [-0.15, -0.25, -0.375, -0.5, -0.55],
        "reference_logprob": [-0.3, -0.4, -0.5, -0.6, -0.7],
        "entropy": [1.0, 1.1, 1.2, 1.3, 1.4],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(step.tokens[name][mask], values, rtol=1e-6, err_msg=name)
    channel = step.channels.index
    np.testing.assert_allclose(step.values[..., channel("critic")][mask], [0.5, 0.6, 0.7, 0.8, 0.9], rtol=1e-6)
    np.testing.assert_allclose(step.rewards[..., channel("score")].sum(axis=1), [3, 1, 2])
    np.testing.assert_allclose(
        step.rewards[..., channel("kl")][mask], [0.15, 0.15, 0.125, 0.1, 0.15], atol=1e-6
    )  # old less reference
    np.testing.assert_allclose(step.advantage()[mask], [1, 1, -1, -1, 0], atol=1e-4)
    np.testing.assert_allclose(step.loss_beta, 0.01, rtol=1e-6)
    assert step.ended.tolist() == [True, True, False] and step.group.tolist() == [0, 0, 1]


def test_rollout_data_beside_it_has_text_group_and_status(
    capsys: pytest.CaptureFixture[str], details: Path, out: Path
) -> None:
    dump(details)
    beside = [
        {"tokens": [7, 8, 20, 21], "group_index": 4, "prompt": "p", "response": "a", "status": "completed"},
        {"tokens": [7, 8, 30, 90, 31], "group_index": 4, "prompt": "p", "response": "b", "status": "aborted"},
        {"tokens": [5, 50], "group_index": 9, "prompt": "q", "response": "c", "status": "truncated"},
    ]
    saved(details / "rollout_data" / "3.pt", {"rollout_id": 3, "samples": beside})
    run, _ = imported(capsys, details, out)
    step = run.step(3)
    assert step.prompts == ("p", "p", "q") and step.responses == ("a", "b", "c")
    assert step.ended.tolist() == [True, False, False] and step.group.tolist() == [0, 0, 1]

    beside[1]["tokens"] = [1, 2, 3]  # of another rollout: then nothing of it is used
    saved(details / "rollout_data" / "3.pt", {"rollout_id": 3, "samples": beside})
    run, _ = imported(capsys, details, out.with_name("run2"))
    assert run.step(3).responses == (None,) * 3 and run.step(3).ended.tolist() == [True, True, False]


def test_a_score_needs_to_be_somebodys(capsys: pytest.CaptureFixture[str], details: Path, out: Path) -> None:
    dump(details, raw_reward=[3.0, 1.0])
    run, said = imported(capsys, details, out)
    assert "score" in run.step(3).absent and any("raw_reward" in note for note in said["notes"])

    shuffled = [sample | {"rollout_position": 2 - place} for place, sample in enumerate(samples())]
    dump(details, samples=shuffled)
    run, said = imported(capsys, details, out.with_name("run2"))
    assert "score" in run.step(3).absent and any("no known order" in note for note in said["notes"])


def test_what_is_not_computed_is_absent(capsys: pytest.CaptureFixture[str], details: Path, out: Path) -> None:
    left = ("ref_log_probs", "values", "entropy", "rollout_log_probs", "truncated")
    dump(details, samples=[{key: one[key] for key in one if key not in left} for one in samples()])
    run, _ = imported(capsys, details / "train_data" / "3.pt", out)
    assert {"reference_logprob", "values", "entropy", "behaviour_logprob", "ended"} <= run.step(3).absent
    assert "old_logprob" not in run.step(3).absent


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"log_probs": floats(-1.0)}, "log_probs has 1 entries, expected 2"),
        ({"loss_masks": torch.zeros(2)}, "the loss took none of its tokens"),
        ({"response_lengths": 9}, "response_lengths does not fit the tokens"),
        ({"tokens": None}, "tokens is no list of token ids"),
        ({"advantages": torch.zeros(2, 2)}, "advantages is no list of numbers"),
    ],
)
def test_malformed_samples_are_counted(
    capsys: pytest.CaptureFixture[str], details: Path, out: Path, changes: dict[str, Any], reason: str
) -> None:
    rows = samples()
    file = dump(details, samples=[rows[0] | changes, *rows[1:]])
    run, said = imported(capsys, details, out)
    assert said["rows"] == 3 and len(run.step(3)) == 2
    np.testing.assert_allclose(run.step(3).rewards[..., 0].sum(axis=1), [1, 2])  # scores stay with their rows
    assert said["left_out"] == {reason: {"rows": 1, "first": f"{file}:1"}}


# Nothing of a file is run


class Touch:
    """Its pickle, loaded carelessly, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("place", ["top", "sample", "raw pickle", "rollout_data"])
def test_a_malicious_file_runs_nothing(
    capsys: pytest.CaptureFixture[str], details: Path, tmp_path: Path, out: Path, place: str
) -> None:
    proof = tmp_path / "was-run"
    file = dump(details)
    if place == "top":
        saved(file, Touch(proof))
    elif place == "sample":
        dump(details, samples=[samples()[0] | {"metadata": Touch(proof)}])
    elif place == "raw pickle":
        file.write_bytes(pickle.dumps({"format_version": 2, "samples": [Touch(proof)]}))
    else:
        saved(details / "rollout_data" / "3.pt", {"samples": [Touch(proof)] * 3})

    if place == "rollout_data":  # the train dump is sound; the other is left alone
        run, said = imported(capsys, details, out)
        assert any("cannot be loaded safely" in note for note in said["notes"]) and run.step(3).responses == (None,) * 3
    else:
        message = refused(capsys, details, out)
        assert str(file) in message and "nothing in it was run" in message
    assert not proof.exists()
    assert b"was-run" in payload(details, place)  # it is there, and a careless reader would have run it


def payload(details: Path, place: str) -> bytes:
    """The bytes of the pickle that a reader would have run."""
    file = details / ("rollout_data" if place == "rollout_data" else "train_data") / "3.pt"
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def test_torn_mixed_and_foreign_files(capsys: pytest.CaptureFixture[str], details: Path, out: Path) -> None:
    file = dump(details)
    whole = file.read_bytes()
    for size in (len(whole) - 200, len(whole) // 2, 30):
        file.write_bytes(whole[:size])
        assert f"{file}: is truncated, or no torch file" in refused(capsys, details, out)

    file.write_bytes(b"PK\x03\x04" + b"not a zip" * 10)
    assert "is truncated, or no torch file" in refused(capsys, details, out)

    file.write_bytes(b"just text")
    assert "truncated" in refused(capsys, details, out, "--format", "slime")

    saved(file, {"model": {"weight": torch.zeros(2)}})
    message = refused(capsys, details, out)
    assert "not a train dump of format version 2" in message and "loss_masks" in message

    dump(details, format_version=3)
    assert "not a train dump of format version 2" in refused(capsys, details, out)

    saved(file, {"rollout_id": 3, "samples": [{"tokens": [1]}]})
    assert "a rollout dump, or of an older slime" in refused(capsys, details, out)

    dump(details, rollout_id=9)
    assert "its rollout_id is 9, the file's name says 3" in refused(capsys, details, out)

    saved(file, torch.zeros(3))
    assert "not a train dump" in refused(capsys, details, out)

    assert "holds no train_data/{rollout_id}.pt" in refused(capsys, details / "..", out, "--format", "slime")


def test_without_torch_it_says_what_to_install(details: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(details)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert slime.recognises(details)
    with pytest.raises(InputError, match=r"torch is not installed -> pip install 'kedge\[train\]'"):
        next(slime.read(details, {}, Intake()))
