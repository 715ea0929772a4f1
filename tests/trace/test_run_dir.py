"""The folder of a run: created without harm, cut back exactly, honest about damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import World, make_run

from kedge.errors import InputError
from kedge.trace import schema
from kedge.trace.jsonl import append_json, keep_json_lines, read_json_lines
from kedge.trace.run_dir import RunDir


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_create_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        RunDir.create(tmp_path)
    with pytest.raises(InputError, match="not a Kedge run"):
        RunDir.create(tmp_path, resume=True)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_create_can_be_resumed_at_once_and_keeps_the_manifest(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run").update_manifest(seed=7, status="interrupted")
    (tmp_path / "run" / ".manifest.json.tmp").write_text("{half")
    again = RunDir.create(tmp_path / "run", resume=True).read_manifest()
    assert again == {"schema": 1, "seed": 7, "status": "running"}


def test_create_in_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunDir.create(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"schema": 2}', "newer Kedge"), ("{}", "schema version"), ("{", "cannot be read"), ('{"schema": "x"}', "'x'")],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        RunDir(tmp_path).read_manifest()


def test_manifest_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such run"):
        RunDir(tmp_path / "nothing").read_manifest()


def test_truncate_gives_back_the_state_of_an_earlier_run(tmp_path: Path) -> None:
    """A run of 12 steps cut to 6 holds the bytes that the same run held when step 6 was about to begin."""
    long, short = RunDir(make_run(tmp_path / "long")), RunDir(make_run(tmp_path / "short"))
    full = contents(long.path)
    with long.metrics.open("a") as file:
        file.write('{"stage": "policy", "st')
    (long.trace / ".step-000012.parquet.tmp").write_bytes(b"PAR1")
    long.truncate(6)
    kept = contents(long.path)

    def survives(name: str) -> bool:
        if "step-" in name:
            return int(name[-14:-8]) < 6
        return ("/probes-" not in name and "/samples-" not in name) or int(name[-14:-8]) <= 6

    assert set(kept) == {name for name in full if survives(name)}
    assert all(kept[name] == full[name] for name in kept if name.startswith("trace"))
    for name in ("metrics.jsonl", "timings.jsonl", "truth/evaluation.jsonl"):
        assert full[name].startswith(kept[name])
    steps = [(line["stage"], line["step"]) for line in read_json_lines(long.metrics)]
    assert max(step for stage, step in steps if stage == "policy") == 5
    assert max(step for stage, step in steps if stage == "evaluation") == 6
    assert short.files("probes")[-1][0] == 12


def test_truncate_leaves_other_stages_alone(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    append_json(run.metrics, {"stage": "sft", "step": 399, "loss": 1.0})
    append_json(run.metrics, {"stage": "policy", "step": 0})
    run.truncate(0)
    assert [line["stage"] for line in read_json_lines(run.metrics)] == ["sft"]
    run.drop_stages("sft")
    assert run.metrics.read_bytes() == b""


def test_torn_last_line_is_left_out_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"b": 1, "a": float("nan")})
    assert path.read_text() == '{"a": null, "b": 1}\n'
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert len(read_json_lines(path)) == 1
    keep_json_lines(path, lambda record: True)
    append_json(path, {"a": 3})
    assert [line["a"] for line in read_json_lines(path)] == [None, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_json_lines(path)


def test_every_metric_of_the_synthetic_run_is_described(tmp_path: Path) -> None:
    run = RunDir(make_run(tmp_path, World(steps=3, batch=4)))
    for line in [*read_json_lines(run.metrics), *read_json_lines(run.timings)]:
        stage = "timings" if "step_s" in line else line["stage"]
        for name in set(line) - {"stage", "step"}:
            assert schema.describe(name, stage), name
    assert schema.describe("policy/loss", "sft") is None
    assert schema.unit("weight/kl", "policy") == "reward per channel unit"
    assert len({(metric.stage, metric.name) for metric in schema.METRICS}) == len(schema.METRICS)
