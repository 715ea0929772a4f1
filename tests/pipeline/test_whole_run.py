"""A whole run: what it leaves behind, and that everything in it fits together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import assert_same, contents, lines, manifest, ran, stage_lines

from kedge.trace.reader import WHITENING, read_run

STEPS, EVERY = 5, 2
EVALUATED = [0, 2, 4, 5]


def test_every_file_is_there(whole: Path) -> None:
    trace = {f"trace/step-{step:06d}.parquet" for step in range(STEPS)}
    trace |= {f"trace/probes-{step:06d}.parquet" for step in EVALUATED}
    trace |= {f"trace/samples-{step:06d}.parquet" for step in EVALUATED}
    checkpoints = {
        f"checkpoints/step-{step:06d}/{name}" for step in (4, STEPS) for name in ("state.json", "state.safetensors")
    }
    models = {
        f"models/{stage}/{name}"
        for stage in ("sft-1", "sft", "reward", "policy")
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    models |= {f"models/{stage}/generation_config.json" for stage in ("sft-1", "sft", "policy")}
    models.add("models/reward/support.safetensors")
    plain = {"recipe.toml", "recipe.json", "manifest.json", "metrics.jsonl", "timings.jsonl", "pairs.jsonl"}
    pages = {"report.html", "diagnosis.html"}
    assert contents(whole).names == trace | checkpoints | models | plain | {"truth/evaluation.jsonl"} | pages


def test_the_manifest(whole: Path) -> None:
    found = manifest(whole)
    assert found["status"] == "finished"
    assert found["stages"] == {"sft": "done", "reward": "done", "policy": "done"}
    assert (found["schema"], found["name"], found["seed"], found["world"]) == (1, "tiny", 0, "desk")
    assert found["channels"] == ["score", "kl", "length", "missing_eos"]
    assert (found["gamma"], found["lam"], found["critic"]) == (1.0, 1.0, "channels")
    assert {"torch", "transformers", "python"} <= found["versions"].keys()


def test_lines_come_in_order_and_once(whole: Path) -> None:
    found = [(line["stage"], line["step"]) for line in lines(whole / "metrics.jsonl")]
    policy = [("evaluation", 0), ("policy", 0), ("policy", 1), ("evaluation", 2), ("policy", 2), ("policy", 3)]
    policy += [("evaluation", 4), ("policy", 4), ("evaluation", 5)]
    reward = [("reward", 0), ("reward", 0), ("reward", 3), ("reward", 4)]  # the pairs before the training
    assert found == [("sft", 0), ("sft", 10), ("sft", 11), *reward, *policy]
    assert [line["step"] for line in lines(whole / "truth" / "evaluation.jsonl")] == EVALUATED
    assert [line["step"] for line in lines(whole / "timings.jsonl")] == list(range(STEPS))


def test_timings_add_up(whole: Path) -> None:
    for line in lines(whole / "timings.jsonl"):
        parts = sum(line[name] for name in ("generate_s", "score_s", "update_s"))
        assert line["step_s"] == pytest.approx(parts)
        assert line["trace_s"] >= 0


def test_every_step_passes_the_digest_and_its_parts_sum_to_the_advantage(whole: Path) -> None:
    run = read_run(whole)
    assert run.steps() == tuple(range(STEPS))
    for step in run.traces():  # each checked against the digest of what training used
        parts = step.parts()
        assert {str(part) for part in parts} >= {"score reward", "score critic", "kl reward", str(WHITENING)}
        advantage = step.advantage()
        np.testing.assert_allclose(sum(parts.values()), advantage, atol=1e-9)
        assert advantage[step.response_mask].std() == pytest.approx(1, abs=1e-3)
        assert advantage[step.response_mask].mean() == pytest.approx(0, abs=1e-3)


def test_metrics_agree_with_the_trace(whole: Path) -> None:
    run = read_run(whole)
    for step, line in zip(run.traces(), stage_lines(whole, "policy"), strict=True):
        kl = (step.tokens["old_logprob"] - step.tokens["reference_logprob"]).sum(axis=1)
        score = step.rewards[..., step.channels.index("score")].sum(axis=1)
        assert line["kl/reference_per_sequence"] == pytest.approx(kl.mean(), abs=1e-5)
        assert line["score/mean"] == pytest.approx(score.mean(), abs=1e-5)
        assert line["length/mean"] == pytest.approx(step.lengths.mean(), abs=1e-5)
        assert line["weight/kl"] == pytest.approx(-line["kl/beta"])
        assert step.weights[0, step.channels.index("kl")] == pytest.approx(-line["kl/beta"])
        assert line["weight/missing_eos"] == -0.5
        ended = step.rewards[..., step.channels.index("missing_eos")].sum(axis=1)
        np.testing.assert_array_equal(ended, 1.0 - step.ended)


def test_the_first_minibatch_finds_the_policy_as_it_was_scored(whole: Path) -> None:
    found = stage_lines(whole, "policy")
    assert len(found) == STEPS
    for line in found:
        assert line["policy/first_ratio_error"] < 1e-5
        assert line["kl/sampler_gap"] < 1e-5
        assert line["policy/ratio_max"] > 1, "later minibatches see a policy that has moved"


def test_the_reference_is_the_policy_before_the_first_step(whole: Path) -> None:
    first, *later = stage_lines(whole, "evaluation")
    assert first["evaluation/kl_per_sequence"] == 0
    assert all(abs(line["evaluation/kl_per_sequence"]) > 0 for line in later)
    for step in read_run(whole).traces():
        apart = np.abs(step.tokens["old_logprob"] - step.tokens["reference_logprob"]).max()
        assert (apart == 0) == (step.step == 0)


def test_the_adaptive_controller_follows_its_equation(whole: Path) -> None:
    before = 0.05
    for line in stage_lines(whole, "policy"):
        assert line["kl/beta"] == pytest.approx(before)
        error = min(0.2, max(-0.2, line["kl/reference_per_sequence"] / 0.1 - 1))
        before *= 1 + error * 8 / 40
    assert before != pytest.approx(0.05)


def test_another_process_writes_the_same_bytes(whole: Path, apart: tuple[Path, str, str]) -> None:
    assert_same(apart[0], whole)


def test_json_is_all_of_stdout_and_nothing_else_is_said(apart: tuple[Path, str, str]) -> None:
    run, out, err = apart
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["run_dir"] == str(run)
    assert Path(found["report"]).is_file()
    assert all(len(found[name]) == 3 for name in ("proxy", "gold", "kl_per_sequence", "length"))
    assert err == "", "warnings of libraries included"


def test_another_seed_gives_another_run(whole: Path, recipe: Path, tmp_path: Path) -> None:
    ran(tmp_path, "run", recipe, "--out", tmp_path / "run", "--set", "seed=1")
    one, other = (stage_lines(run, "policy") for run in (whole, tmp_path / "run"))
    assert all(a["score/mean"] != b["score/mean"] for a, b in zip(one, other, strict=True))


def test_stages_one_by_one_make_the_same_run(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran(tmp_path, "sft", recipe, "--out", run)
    assert (manifest(run)["stages"], manifest(run)["status"]) == ({"sft": "done"}, "partial")
    assert not (run / "models" / "reward").exists()
    ran(tmp_path, "reward", recipe, "--out", run, "--resume")
    assert not (run / "models" / "policy").exists()
    done = ran(tmp_path, "policy", recipe, "--out", run, "--resume")
    assert "report: " in done.stdout
    assert_same(run, whole)


def test_a_finished_run_is_left_as_it_is(whole: Path, recipe: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    expected = contents(whole)
    ran(tmp_path, "run", recipe, "--out", whole, "--resume")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before
    assert contents(whole) == expected


def test_progress_is_on_stderr_and_figures_on_stdout(whole: Path) -> None:
    folder = whole.parent
    shown = (folder / "0.stderr").read_text()
    for stage in ("sft", "pairs", "reward", "policy"):
        assert any(line.startswith(stage) for line in shown.splitlines()), shown
    assert "Warning" not in shown
    assert "report: " in (folder / "0.stdout").read_text()
