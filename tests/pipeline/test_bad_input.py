"""What goes wrong is said in a line with where and what to do; nothing is overwritten and nothing half done."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import assert_same, kedge, manifest, ran, stage_lines
from user_files import PREFERENCES, PROMPTS, bring, save_family, write

from kedge import cli
from kedge.data.split import is_held_out

BIG = resource.RLIM_INFINITY


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    bring(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The errors on stderr; anything else there must be progress."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def refused(capsys: pytest.CaptureFixture[str], *settings: str, code: int = 2) -> list[str]:
    """The errors of a run that is refused before it begins: its folder stays empty."""
    arguments = ["run", "files.toml", "--out", "run", *(part for setting in settings for part in ("--set", setting))]
    assert cli.main(arguments) == code
    assert not Path("run").exists() or list(Path("run").iterdir()) == []
    found = told(capsys)
    assert found
    assert all(" -> " in line for line in found), "every problem has a remedy"
    return found


# Files


def test_an_empty_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demonstrations", "preferences", "prompts"):
        bring(folder)
        (folder / f"{name}.jsonl").write_text("")
        (line,) = refused(capsys)
        assert f"{name}.jsonl: no rows in it" in line
    (folder / "book.txt").write_text("\n \n")
    bring(folder)
    (line,) = refused(capsys, "data.text=book.txt")
    assert "book.txt: no text in it" in line


def test_wrong_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "demonstrations.jsonl", [{"question": "a", "answer": "b"}] * 3)
    (line,) = refused(capsys)
    assert "demonstrations.jsonl:1: the columns are question, answer; expected prompt and response" in line


@pytest.mark.parametrize("strength", ["NaN", "2", '"many"'])
def test_a_strength_that_is_no_share(strength: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps(row) for row in PREFERENCES]
    rows[6] = rows[6].removesuffix("}") + f', "strength": {strength}}}'
    (folder / "preferences.jsonl").write_text("\n".join(rows))
    first, _ = refused(capsys)
    assert "preferences.jsonl:7: strength is " in first


def test_one_enormous_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any of the files, and before a minute is spent on training."""
    enormous = "refund " * 100_000
    for name, row in {
        "demonstrations": {"prompt": "please say it", "response": enormous},
        "preferences": {"prompt": "please say it", "chosen": "it", "rejected": enormous},
        "prompts": {"prompt": enormous},
    }.items():
        bring(folder)
        path = folder / f"{name}.jsonl"
        path.write_text(f"{path.read_text()}{json.dumps(row)}\n")
        first, second = refused(capsys)
        assert f"{name}.jsonl:101: " in first
        assert "tokens" in first and "the context is 64" in first
        assert int(first.split(": ")[2].split()[0]) >= 100_000 or name != "prompts"
        assert "1 of 101 rows are rejected" in second and "data.max_rejected=0.01" in second


def test_a_prompt_that_leaves_no_room_for_an_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    rows[2]["prompt"] = "please say " + "q" * 52  # fits the context, but not with the ten tokens to come
    write(folder / "prompts.jsonl", rows)
    first, _ = refused(capsys)
    assert "prompts.jsonl:3: " in first and "with the 10 to come, the context is 64" in first


def test_the_desk_in_a_context_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "desk.toml").write_text("[desk]\ndemonstrations = 50\n[model]\ncontext = 60\n")
    assert cli.main(["run", str(tmp_path / "desk.toml"), "--out", str(tmp_path / "run")]) == 2
    (line,) = told(capsys)
    assert line.startswith("error: model.context: 60 tokens are too few for the desk") and " -> raise it" in line
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_on_one_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "prompts.jsonl", [{"prompt": "please say red red"}])
    first, *_ = refused(capsys)
    assert first.startswith("error: data.holdout: ")
    bring(folder)
    first, *_ = refused(capsys, "data.holdout=0.999999")
    assert "all 100 prompts fall into the held-out share" in first


def test_all_pairs_on_one_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known only once the pairs are there; the supervised policy is kept."""
    rows = [row for row in PREFERENCES if not is_held_out(row["prompt"], 0.2)]
    write(folder / "preferences.jsonl", rows)
    assert cli.main(["run", "files.toml", "--out", "run"]) == 2
    (line,) = told(capsys)
    assert line.startswith(f"error: reward.holdout: 0 of {len(rows)} judgments are on held-out prompts")
    assert manifest(Path("run"))["stages"] == {"sft": "done"}


def test_wrong_keys_are_all_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "files.toml").read_text() + "probez = 3\n"
    (folder / "files.toml").write_text(text)
    found = refused(capsys, "policy.kl.betta=1", "sft.steps=-1")
    assert any("files.toml:" in line and "no key trace.probez -> did you mean trace.probes?" in line for line in found)
    assert any("did you mean policy.kl.beta?" in line for line in found)
    assert any("sft.steps" in line and "-1 is not allowed" in line for line in found)


# Model folders


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def with_nan(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_tokenizer, "no tokenizer in it"),
        (with_nan, "not finite"),
        (empty, "no config.json"),
        (without_weights, "no weights"),
    ],
)
def test_a_model_folder_that_cannot_be_used(
    damage: Callable[[Path], None], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family("llama", folder / "model")
    damage(model)
    (line,) = refused(capsys, "model.init=model")
    assert line.startswith("error: model: ") and said in line


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_with_fewer_positions_than_the_context(
    family: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_family(family, folder / "model")
    (line,) = refused(capsys, "model.init=model", "model.context=65")
    assert "model.context: 65 tokens are more than the 64 positions of " in line and "-> lower it to 64" in line


# Places to write


def test_a_place_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("mine")
    for out in ("file", "file/run", "/sys/run-of-kedge"):  # the last is refused to root as well
        assert cli.main(["run", "files.toml", "--out", out]) == 2
        (line,) = told(capsys)
        assert line.startswith(f"error: {out}: ")
        assert " -> choose another" in line or " -> choose a path" in line or " -> change its permissions" in line
    assert (folder / "file").read_text() == "mine"


def test_a_folder_that_holds_something_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")
    for options in ([], ["--resume"]):
        assert cli.main(["run", "files.toml", "--out", "run", *options]) == 2
        (line,) = told(capsys)
        assert "choose another --out" in line
    assert [path.name for path in (folder / "run").iterdir()] == ["thesis.tex"]
    assert (folder / "run" / "thesis.tex").read_text() == "mine"


def full(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where", ["kedge.train.checkpoint.save_file", "pyarrow.parquet.write_table", "pathlib.Path.open"]
)
def test_a_full_disk(where: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "files.toml", "--out", "whole"]) == 0
    assert cli.main(["sft", "files.toml", "--out", "run"]) == 0
    assert cli.main(["reward", "files.toml", "--out", "run", "--resume"]) == 0
    told(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, full)
        assert cli.main(["policy", "files.toml", "--out", "run", "--resume"]) == 2
    (line,) = told(capsys)
    assert "no space left on device" in line.lower() and "free some space" in line
    assert cli.main(["policy", "files.toml", "--out", "run", "--resume"]) == 0
    assert_same(Path("run"), Path("whole"))


class Limited:
    """A process that may write no file of more than `size` bytes: a small disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, BIG))


@pytest.mark.parametrize("size", [500, 9000, 30_000])
def test_a_file_that_may_not_grow(size: int, whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = kedge(tmp_path, "run", recipe, "--out", run, prepare=Limited(size))
    assert stopped.wait() == 2, stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert " -> " in line and "Traceback" not in stopped.stderr
    ran(tmp_path, "run", recipe, "--out", run, "--resume")
    assert_same(run, whole)


# Numbers


def test_a_score_that_is_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kedge.pipeline import policy

    judge = policy.judge

    def broken(value: float) -> Callable[..., Any]:
        def opinion(model: Any, rollouts: Any) -> Any:
            found = judge(model, rollouts)
            if rollouts.policy_version == 3:
                found.score[2] = value
            return found

        return opinion

    settings = ["--set", "policy.steps=5", "--set", "checkpoint.every=2"]
    assert cli.main(["run", "files.toml", "--out", "whole", *settings]) == 0
    told(capsys)
    for number, value in enumerate((float("nan"), float("inf"))):
        out = f"run{number}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "judge", broken(value))
            assert cli.main(["run", "files.toml", "--out", out, *settings]) == 2
        (line,) = told(capsys)
        assert f"policy step 3: channel score: the reward is {value} for 1 of 8 responses (first: row 2)" in line
        assert "--resume" in line
        assert manifest(Path(out))["status"] == "failed"
        assert len(stage_lines(Path(out), "policy")) == 3
        assert cli.main(["run", "files.toml", "--out", out, *settings, "--resume"]) == 0
        assert_same(Path(out), Path("whole"))


@pytest.mark.parametrize("part", ["ppo_objective", "value_loss"])
def test_a_loss_that_is_not_finite(part: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kedge.train import update

    equation, calls = getattr(update, part), []

    def poisoned(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        found = equation(*arguments, **named)
        factor = float("nan") if len(calls) == 14 else 1.0  # in the fourth step of four minibatches
        return (found[0] * factor, found[1]) if isinstance(found, tuple) else found * factor

    settings = ["--set", "policy.steps=5", "--set", "checkpoint.every=3"]
    assert cli.main(["run", "files.toml", "--out", "whole", *settings]) == 0
    told(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, part, poisoned)
        assert cli.main(["run", "files.toml", "--out", "run", *settings]) == 3
    (line,) = told(capsys)
    assert "policy step 3: the update is not finite" in line and "--resume" in line
    assert manifest(Path("run"))["status"] == "failed"
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-000003"]
    assert cli.main(["run", "files.toml", "--out", "run", *settings, "--resume"]) == 0
    assert_same(Path("run"), Path("whole"))


@pytest.mark.parametrize(("stage", "setting"), [("sft", "sft.lr=1e30"), ("reward", "reward.lr=1e30")])
def test_a_stage_that_diverges(stage: str, setting: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "files.toml", "--out", "run", "--set", setting]) == 3
    (line,) = told(capsys)
    assert f"lower {stage}.lr" in line
    assert manifest(Path("run"))["status"] == "failed"
    assert not (Path("run") / "models" / stage).exists()


def test_a_model_that_is_random_when_trained_is_found_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kedge.train import update

    logprobs = update.response_logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "response_logprobs", lambda model, *rest: logprobs(model, *rest) - 0.01)
        assert cli.main(["run", "files.toml", "--out", "run"]) == 2
    (line,) = told(capsys)
    assert "policy step 0" in line and "|ratio - 1| = 0.01" in line and "dropout" in line
