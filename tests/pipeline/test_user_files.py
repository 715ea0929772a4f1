"""The same pipeline on files and model folders that a user brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import lines, manifest, stage_lines
from user_files import DEMONSTRATIONS, PREFERENCES, PROMPTS, bring, conversation, save_family, write

from kedge import cli
from kedge.trace.reader import read_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    bring(tmp_path)
    return tmp_path


def carried_out(folder: Path, *settings: str) -> Path:
    arguments = ["run", "files.toml", "--out", "run", *(part for setting in settings for part in ("--set", setting))]
    assert cli.main(arguments) == 0
    run = folder / "run"
    assert manifest(run)["status"] == "finished"
    assert (run / "report.html").is_file()
    assert not (run / "truth").exists(), "nobody knows the truth about a user's files"
    assert [line["step"] for line in stage_lines(run, "evaluation")] == [0, 2]
    for step in read_run(run).traces():
        assert len(step) == 8
    for line in stage_lines(run, "policy"):
        assert line["policy/first_ratio_error"] < 1e-5
        assert line["kl/sampler_gap"] < 1e-5
    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_model_from_scratch(suffix: str, folder: Path) -> None:
    write(folder / f"d{suffix}", DEMONSTRATIONS)
    write(folder / f"p{suffix}", PREFERENCES)
    write(folder / f"q{suffix}", [{"prompt": prompt} for prompt in PROMPTS])
    names = {"demonstrations": "d", "preferences": "p", "prompts": "q"}
    run = carried_out(folder, *(f"data.{key}={name}{suffix}" for key, name in names.items()))
    first, second, last = stage_lines(run, "sft")
    assert second["loss"] < first["loss"]
    assert last["heldout/perplexity"] > 1 and last["heldout/trigram_perplexity"] > 1
    last = stage_lines(run, "reward")[-1]
    assert 0 <= last["heldout/accuracy"] <= 1
    assert last["heldout/length_only_accuracy"] == 0, "the shorter answer always wins here"
    shown = {prompt for step in read_run(run).traces() for prompt in step.prompts}
    measured = set(read_run(run).samples()["prompt"].to_pylist())
    assert shown <= set(PROMPTS) and measured <= set(PROMPTS)
    assert not shown & measured, "no prompt is both trained on and measured with"


def test_formats_do_not_matter(folder: Path) -> None:
    one = (carried_out(folder) / "metrics.jsonl").read_bytes()
    write(folder / "d.parquet", DEMONSTRATIONS)
    assert cli.main(["run", "files.toml", "--out", "other", "--set", "data.demonstrations=d.parquet"]) == 0
    assert (folder / "other" / "metrics.jsonl").read_bytes() == one


def test_conversations(folder: Path) -> None:
    rows = [{"messages": conversation(row["prompt"], row["response"])} for row in DEMONSTRATIONS]
    write(folder / "demonstrations.jsonl", rows)
    rows = [{name: conversation(row["prompt"], row[name]) for name in ("chosen", "rejected")} for row in PREFERENCES]
    write(folder / "preferences.jsonl", rows)
    write(folder / "prompts.jsonl", [{"prompt": conversation(prompt)} for prompt in PROMPTS])
    run = carried_out(folder)
    (prompt, *_) = read_run(run).step(0).prompts
    assert prompt is not None and prompt.startswith("system: you are a clerk\nuser: please say ")


def test_prompts_come_from_the_demonstrations_where_none_are_given(folder: Path) -> None:
    text = (folder / "files.toml").read_text().replace('prompts = "prompts.jsonl"\n', "")
    (folder / "files.toml").write_text(text)
    assert set(read_run(carried_out(folder)).step(0).prompts) <= set(PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_folder(family: str, folder: Path) -> None:
    save_family(family, folder / "model")
    before = (folder / "model" / "model.safetensors").read_bytes()
    run = carried_out(folder, "model.init=model")
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    # EOS pads here; a reward model needs padding of its own, or plain transformers would score another token.
    for stage, vocab in {"sft": 257, "reward": 258, "policy": 257}.items():
        config = json.loads((run / "models" / stage / "config.json").read_text())
        assert config["model_type"] == family
        assert config["vocab_size"] == vocab
    assert (run / "models" / "policy" / "model.safetensors").stat().st_size > 1000


def test_a_model_folder_without_demonstrations_passes_as_it_is(folder: Path) -> None:
    from safetensors.torch import load_file

    save_family("llama", folder / "model")
    text = (folder / "files.toml").read_text().replace('demonstrations = "demonstrations.jsonl"\n', "")
    (folder / "files.toml").write_text(text)
    run = carried_out(folder, "model.init=model")
    assert stage_lines(run, "sft") == []
    one, other = (load_file(place / "model.safetensors") for place in (folder / "model", run / "models" / "sft"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    assert "evaluation/anchor_loss" not in stage_lines(run, "evaluation")[0]


def test_plain_text_anchors_capability(folder: Path) -> None:
    (folder / "book.txt").write_text("the shop is open <eos> and the order is late\n" * 200)
    run = carried_out(folder, "data.text=book.txt")
    first, last = stage_lines(run, "evaluation")
    assert first["evaluation/anchor_loss"] > 0
    assert first["evaluation/anchor_loss"] != last["evaluation/anchor_loss"]


def test_rows_that_do_not_fit_are_left_out_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*DEMONSTRATIONS, {"prompt": "please say it", "response": "it " * 200}]
    write(folder / "demonstrations.jsonl", rows)
    run = carried_out(folder, "data.max_rejected=0.05")
    (event,) = [line for line in lines(run / "events.jsonl") if line["event"] == "rejected_rows"]
    assert "1 of 101 rows left out" in event["message"]
    assert "demonstrations.jsonl:101: " in event["message"]
    assert event["message"] in capsys.readouterr().err
