"""Written and read again: arrays come back, the split is exact, damage is named."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import World, make_run, probe_record, sample_record, step_record

from kedge.errors import InputError
from kedge.trace import writer as writer_module
from kedge.trace.advantages import gae
from kedge.trace.reader import WHITENING, Part, read_run, read_step
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import METADATA_KEY
from kedge.trace.writer import TraceWriter, step_table

WORLD = World(batch=8)


def loop_gae(rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float) -> list[float]:
    """The definition as a double sum in Python floats: A_t = sum_l (gamma lam)^l delta_{t+l} over true positions."""
    kept = [t for t, true in enumerate(mask) if true]
    values_next = [values[t] for t in kept[1:]] + [0.0]
    deltas = [rewards[t] + gamma * after - values[t] for t, after in zip(kept, values_next, strict=True)]
    result = [0.0] * len(mask)
    for place, t in enumerate(kept):
        result[t] = sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[place:]))
    return result


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_equals_the_double_sum(seed: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 3, 6, 2))
    mask = rng.random((3, 6)) < 0.7
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(3):
        for c in range(2):
            want = loop_gae(rewards[b, :, c].tolist(), values[b, :, c].tolist(), mask[b].tolist(), gamma, lam)
            np.testing.assert_allclose(got[b, :, c], want, atol=1e-12)


@pytest.mark.parametrize("critic", ["channels", "scalar"])
def test_a_step_comes_back_and_splits_exactly(tmp_path: Path, critic: str) -> None:
    run = RunDir.create(tmp_path)
    record = step_record(replace(WORLD, critic=critic), 3, np.random.default_rng(1))
    with TraceWriter(run) as trace:
        trace.write_step(record)
    step = read_run(tmp_path).step(3)
    longest = int(record.response_mask.sum(1).max())
    width = step.response_mask.shape[1]
    assert longest <= width <= record.response_mask.shape[1]
    np.testing.assert_array_equal(step.response_mask, record.response_mask[:, :width])
    assert (step.channels, step.critic, step.lengths.tolist()) == (
        record.channels,
        critic,
        record.response_mask.sum(1).tolist(),
    )
    np.testing.assert_allclose(step.advantage(), record.advantage[:, :width], atol=1e-5)
    parts = step.parts()
    np.testing.assert_allclose(sum(parts.values()), step.advantage(), atol=1e-12)
    scale, shift = float(record.scale[0]), float(record.shift[0])
    for b in range(len(step)):
        mask = record.response_mask[b, :width].tolist()
        for c, channel in enumerate(step.channels):
            rewards, values = (array[b, :width, c].tolist() for array in (record.rewards, record.values))
            nothing = [0.0] * width
            weight = float(record.weights[b, c])
            reward = np.array(loop_gae(rewards, nothing, mask, 1.0, 0.95)) * weight / scale
            critic_part = np.array(loop_gae(nothing, values, mask, 1.0, 0.95)) * weight / scale
            np.testing.assert_allclose(parts[Part(channel, "reward")][b], reward, atol=1e-5)
            np.testing.assert_allclose(parts[Part(channel, "critic")][b], critic_part, atol=1e-5)
        np.testing.assert_allclose(parts[WHITENING][b], np.where(mask, -shift / scale, 0), atol=1e-5)
    assert step.prompts[0] == "prompt 0"
    np.testing.assert_allclose(
        step.tokens["reference_logprob"][step.response_mask],
        record.reference_logprob[:, :width][step.response_mask],
        atol=1e-6,
    )


def test_rows_are_stored_as_lists_through_the_last_token(tmp_path: Path) -> None:
    record = step_record(WORLD, 0, np.random.default_rng(2))
    table = step_table(record)
    mask = record.response_mask
    last = [int(np.flatnonzero(row)[-1]) + 1 for row in mask]
    assert [len(ids) for ids in table["response_ids"].to_pylist()] == last
    assert table["response_mask"].to_pylist() == [mask[b, :stop].tolist() for b, stop in enumerate(last)]
    prompts = [record.prompt_ids[b][record.prompt_mask[b]].tolist() for b in range(len(mask))]
    assert table["prompt_ids"].to_pylist() == prompts


def test_a_changed_reward_is_found(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    record = step_record(WORLD, 0, np.random.default_rng(3))
    with TraceWriter(run) as trace:
        trace.write_step(record)
    path = run.step_file(0)
    table = pq.ParquetFile(path).read()
    rewards = table["reward.score"].to_pylist()
    rewards[5][-1] += 0.05
    index = table.column_names.index("reward.score")
    pq.write_table(table.set_column(index, "reward.score", pa.array(rewards, pa.list_(pa.float32()))), path)
    with pytest.raises(InputError, match=r"step-000000\.parquet: row 5: advantages derived"):
        read_run(tmp_path).step(0)


def test_nan_does_not_pass_the_digest(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    record = step_record(WORLD, 0, np.random.default_rng(3))
    record.rewards[2, 0, 0] = np.nan
    with TraceWriter(run) as trace:
        trace.write_step(record)
    with pytest.raises(InputError, match="row 2"):
        read_run(tmp_path).step(0)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "newer", "column"])
def test_damaged_step_files(tmp_path: Path, damage: str) -> None:
    run = RunDir.create(tmp_path)
    with TraceWriter(run) as trace:
        trace.write_step(step_record(WORLD, 0, np.random.default_rng(0)))
    path = run.step_file(0)
    table = pq.ParquetFile(path).read()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif damage == "newer":
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: b'{"schema": 9}'}), path)
    else:
        pq.write_table(table.drop_columns(["entropy"]), path)
    message = {
        "truncated": "truncated",
        "foreign": "no Kedge metadata",
        "newer": "newer Kedge",
        "column": "missing: entropy",
    }
    with pytest.raises(InputError, match=message[damage]):
        read_step(path)
    with pytest.raises(InputError, match="no such trace file"):
        read_run(tmp_path).step(7)


@pytest.mark.parametrize("mode", ["hashed", "none"])
def test_text_can_be_left_out(tmp_path: Path, mode: writer_module.TextMode) -> None:
    run = RunDir.create(tmp_path)
    with TraceWriter(run, text=mode) as trace:
        trace.write_step(step_record(WORLD, 0, np.random.default_rng(0)))
        trace.write_probes(probe_record(WORLD, 0, np.random.default_rng(0)))
        trace.write_samples(sample_record(0, response="my name is Hildegard"))
    read = read_run(tmp_path)
    step = read.step(0)
    if mode == "hashed":
        assert len(step.prompts[0] or "") == 16
        assert step.prompts[0] == step.prompts[1] != step.prompts[2]
    else:
        assert set(step.prompts) == {None}
    table = pq.ParquetFile(run.step_file(0)).read()
    assert table["response_ids"].null_count == table["prompt_ids"].null_count == WORLD.batch
    assert read.samples()["response_tokens"].null_count == 9
    everything = b"".join(path.read_bytes() for path in run.trace.iterdir())
    assert b"Hildegard" not in everything and b"brief answer" not in everything


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    with TraceWriter(run, keep=2) as trace:
        for number in range(5):
            trace.write_step(step_record(replace(WORLD, batch=2), number, np.random.default_rng(0)))
    assert read_run(tmp_path).steps() == (3, 4)


def test_a_full_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDir.create(tmp_path)
    trace = TraceWriter(run)
    record = step_record(WORLD, 0, np.random.default_rng(0))
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        for _ in range(8):  # more than the queue holds: a failed thread must not block the loop
            try:
                trace.write_step(record)
            except InputError:
                break
        with pytest.raises(InputError, match=r"step-000000\.parquet: cannot be written: No space left.*--resume"):
            trace.write_step(record)
            trace.flush()
            trace.flush()
    trace.close()
    trace.close()
    assert list(run.trace.glob(".*.tmp")) == []
    with pytest.raises(ValueError, match="closed"):
        trace.write_step(record)


def test_an_error_on_its_way_out_is_not_replaced(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    with pytest.raises(KeyError), TraceWriter(run) as trace:
        (tmp_path / "trace").rmdir()
        trace.write_step(step_record(WORLD, 0, np.random.default_rng(0)))
        raise KeyError("the loop's own")


def test_wrong_shapes_are_refused_at_once() -> None:
    record = step_record(WORLD, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="weights has shape"):
        replace(record, weights=record.weights[:, :1])


def test_a_whole_run_and_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", World(steps=6, batch=4, probes=8)))
    assert run.steps() == tuple(range(6))
    assert run.probe_steps() == (0, 3, 6)
    assert run.probes().num_rows == 3 * 8 * 3
    assert run.samples(6).num_rows == 9 and run.samples().num_rows == 18
    assert run.metrics("evaluation")["evaluation/length"].steps.tolist() == [0, 3, 6]
    assert run.timings()["step_s"].values.sum() == 6
    assert run.settings["policy"]["kl"]["beta"] == 0.05
    assert [len(trace) for trace in run.traces()] == [4] * 6
    RunDir.create(tmp_path / "empty")
    begun = read_run(tmp_path / "empty")
    assert (begun.steps(), begun.metrics("policy"), begun.events(), begun.settings) == ((), {}, [], {})
    assert begun.probes().num_rows == begun.samples().num_rows == 0
    assert begun.name == "empty"


def test_looking_imports_no_torch() -> None:
    code = """
import importlib, pkgutil, sys
for package in ("kedge.trace", "kedge.diagnose", "kedge.report"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
heavy = {"torch", "transformers"} & set(sys.modules)
late = {"pyarrow", "scipy", "pydantic"} & set(sys.modules)
assert not heavy and not late, (heavy, late)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_members_and_what_tells_how_far_to_trust_them_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    members, far = rng.normal(size=(2, 8, 3)).astype(np.float32)
    doubtful = np.array([0.1, np.nan, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    record = replace(
        step_record(WORLD, 0, rng),
        members=members,
        disagreement=doubtful,
        support_distance=far[:, 0].astype(np.float64),
    )
    table = step_table(record)
    assert table["disagreement"].to_pylist()[1] is None and table["disagreement"].null_count == 1
    assert json.loads(table.schema.metadata[METADATA_KEY])["members"] == 3
    run = RunDir.create(tmp_path)
    with TraceWriter(run) as trace:
        trace.write_step(record)
    step = read_run(tmp_path).step(0)
    np.testing.assert_array_equal(step.members, members)
    np.testing.assert_allclose(step.disagreement, doubtful, rtol=1e-6)
    np.testing.assert_allclose(step.support_distance, far[:, 0])


@pytest.mark.parametrize("older", [False, True])
def test_a_single_member_has_no_columns_and_older_traces_lack_them_all(tmp_path: Path, older: bool) -> None:
    run = RunDir.create(tmp_path)
    with TraceWriter(run) as trace:
        trace.write_step(step_record(WORLD, 0, np.random.default_rng(4)))
    path = run.step_file(0)
    table = pq.ParquetFile(path).read()
    assert not [name for name in table.column_names if name.startswith("member.")]
    assert table["disagreement"].null_count == table["support_distance"].null_count == 8
    if older:
        about = json.loads(table.schema.metadata[METADATA_KEY])
        del about["members"]
        table = table.drop_columns(["disagreement", "support_distance"])
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), path)
    step = read_run(tmp_path).step(0)
    assert step.members.shape == (8, 0)
    assert np.isnan(step.disagreement).all() and np.isnan(step.support_distance).all()


def test_a_member_that_the_file_promises_must_be_there(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    record = replace(step_record(WORLD, 0, np.random.default_rng(4)), members=np.zeros((8, 2)))
    with TraceWriter(run) as trace:
        trace.write_step(record)
    path = run.step_file(0)
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["member.1"]), path)
    with pytest.raises(InputError, match=r"columns missing: member\.1"):
        read_run(tmp_path).step(0)
    with pytest.raises(ValueError, match=r"disagreement has shape \(3,\), expected \(8,\)"):
        replace(record, disagreement=np.zeros(3))
