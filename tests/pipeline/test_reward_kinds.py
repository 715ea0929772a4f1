"""Reward models from every kind of judgment and by every choice of the recipe, from a file to a folder that scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from user_files import PREFERENCES, bring, write

from kedge import cli
from kedge.models.reward import load_reward_model
from kedge.pipeline import reward
from kedge.trace.jsonl import read_json_lines

RANKINGS = [
    {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"], "no"], "ranks": [1, 0, 2]}
    for row in PREFERENCES
]
RATINGS = [
    {"prompt": row["prompt"], "response": row[side], "rating": rating}
    for row in PREFERENCES
    for side, rating in (("chosen", 4), ("rejected", 2))
]
VERDICTS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PREFERENCES
    for side in ("chosen", "rejected")
]
TIES = [{**row, "strength": 0.5 if number % 5 == 0 else 1.0, "margin": 1.0} for number, row in enumerate(PREFERENCES)]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        *[(PREFERENCES, [f"reward.loss={loss}"]) for loss in ("smoothed", "robust", "flip_aware")],
        *[(TIES, [f"reward.loss={loss}"]) for loss in ("davidson", "margin")],
        *[(RANKINGS, [f"reward.rankings={way}"]) for way in ("plackett_luce", "all_pairs", "tournament")],
        *[(RATINGS, [f"reward.ratings={way}"]) for way in ("regression", "ordinal")],
        (VERDICTS, []),
        *[
            (PREFERENCES, [f"reward.length={way}"])
            for way in ("residual", "two_head", "product", "padded_residual", "padded_pairs")
        ],
        (PREFERENCES, ["reward.members=2", "reward.aggregate=worst"]),
        (RANKINGS, ["reward.members=2", "reward.trunk=shared", "reward.aggregate=mean_minus_variance"]),
        (VERDICTS, ["reward.members=2", "reward.trunk=lora", "reward.lora_rank=2"]),
        (RATINGS, ["reward.length=padded_residual", "reward.length_share=1.5", "reward.members=2"]),
    ],
    ids=lambda value: ", ".join(value) if value and isinstance(value[0], str) else None,
)
def test_a_reward_model_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], settings: list[str]
) -> None:
    monkeypatch.chdir(bring(tmp_path).parent)
    write(tmp_path / "preferences.jsonl", rows)
    command = ["files.toml", "--out", "run", "--json"]
    for setting in settings:
        command += ["--set", setting]
    assert cli.main(["sft", *command]) == 0
    assert cli.main(["reward", *command, "--resume"]) == 0
    model = load_reward_model(tmp_path / "run/models/reward")
    assert model.members == (2 if "reward.members=2" in settings else 1)
    figures = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "heldout/accuracy" in line][-1]
    assert 0 <= figures["heldout/accuracy"] <= 1


def test_padding_is_compared_in_pairs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bring(tmp_path).parent)
    write(tmp_path / "preferences.jsonl", VERDICTS)
    assert cli.main(["run", "files.toml", "--out", "run", "--set", "reward.length=padded_pairs"]) == 2
    assert 'set it to "padded_residual"' in capsys.readouterr().err


def test_it_can_begin_as_another_model_than_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bring(tmp_path).parent)
    assert cli.main(["sft", "files.toml", "--out", "narrow", "--set", "model.hidden=8"]) == 0
    given = ["files.toml", "--set", "reward.init=narrow/models/sft", "--out", "wide"]
    assert cli.main(["sft", *given]) == 0
    assert cli.main(["reward", *given, "--resume"]) == 0
    assert load_reward_model(tmp_path / "wide/models/reward").models[0].config.hidden_size == 8
    other = ["sft", "files.toml", "--out", "other", "--set", "model.vocab=280"]
    assert cli.main(other) == 0
    capsys.readouterr()
    assert "give a model of this run's tokenizer as reward.init" in refused(capsys, "reward.init=other/models/sft")


def refused(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    command = ["run", "files.toml", "--out", "run"]
    for setting in settings:
        command += ["--set", setting]
    assert cli.main(command) == 2
    return capsys.readouterr().err


def test_padding_takes_the_sentences_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bring(tmp_path).parent)
    named = ("reward.length=padded_pairs", "data.neutral=neutral.txt")
    assert "there is no" in refused(capsys, *named)
    (tmp_path / "neutral.txt").write_text("\n\n")
    assert "no sentences in it" in refused(capsys, *named)
    (tmp_path / "neutral.txt").write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in refused(capsys, *named)
    given: list[Sequence[str]] = []
    monkeypatch.setattr(reward, "padded_pairs", lambda pairs, sentences, rng: given.append(sentences) or [])
    (tmp_path / "neutral.txt").write_text("so it is .\nwell .\n")
    for stage in ("sft", "reward"):
        command = [stage, "files.toml", "--out", "run", "--resume"]
        assert cli.main([*command, "--set", named[0], "--set", named[1]]) == 0
    assert given == [("so it is .", "well .")]


@pytest.mark.parametrize("way", ["padded_residual", "padded_pairs"])
def test_padding_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """GPT-2 has no more positions than its context; what is longer would not run."""
    monkeypatch.chdir(bring(tmp_path).parent)
    (tmp_path / "neutral.txt").write_text("so it is " * 30)
    settings = (f"reward.length={way}", "data.neutral=neutral.txt", "model.family=gpt2", "model.context=64")
    if way == "padded_residual":
        assert "none has room for padding" in refused(capsys, *settings)
        return
    for stage in ("sft", "reward"):
        command = [stage, "files.toml", "--out", "run", "--resume"]
        for setting in settings:
            command += ["--set", setting]
        assert cli.main(command) == 0


def test_an_interim_reward_model_leaves_no_metrics(tmp_path: Path, recipe: Path) -> None:
    command = [
        str(recipe),
        "--out",
        str(tmp_path / "run"),
        "--set",
        "pairs.method=best_of",
        "--set",
        "pairs.candidates=3",
    ]
    assert cli.main(["sft", *command]) == 0
    assert cli.main(["reward", *command, "--resume"]) == 0
    found = {line["stage"] for line in read_json_lines(tmp_path / "run/metrics.jsonl")}
    assert found == {"sft", "reward"}, "a stage that nothing drops would be there twice after a kill"
