"""`kedge import`: recognising, asking, writing, refusing; and what the other commands say of files not yet imported."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from imported import imported, refused
from rollout_files import ANSWERS, completions, generic_step, verl_records, write_lines, write_trl

from kedge import cli
from kedge.importers import Format, all_formats
from kedge.importers.recognise import recognised
from kedge.trace.reader import read_run


@pytest.fixture
def trl(tmp_path: Path) -> Path:
    for step in range(1, 4):
        write_trl(tmp_path / "trl", step)
    return tmp_path / "trl"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(one) for one in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_a_trl_folder_becomes_a_run(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "imported"
    code, printed, _ = said(capsys, "import", trl, "--out", out, "--answer", "beta=0")
    assert code == 0
    for line in (
        f"{out}: 12 rows in 3 steps (1 to 3), from {trl}",
        "format: TRL GRPO completions (trl-grpo)",
        "KL: not charged, coefficient 0",
        "estimator: unknown",
        "unit of the trainer's KL: per token",
        "score position: on the last position of a response",
        "positions: words; lengths and sums over a response are in words",
        "rows read: 12",
        f"next: kedge diagnose {out}",
    ):
        assert line in printed.splitlines()
    possible, _, impossible = printed.partition("not possible:")
    assert "length_reward" in possible and "prompt_mix" in possible
    assert "sampler: without log-probabilities of the sampler" in impossible
    run = read_run(out)
    assert (run.manifest["status"], run.manifest["positions"]) == ("finished", "words")
    step = run.step(1)
    assert step.responses == tuple(f"{words} 1" for words in ANSWERS)
    assert step.lengths.tolist() == [2, 3, 4, 6]
    assert {"reference_logprob", "ended"} <= step.absent
    code, printed, _ = said(capsys, "diagnose", out, "--no-html")
    assert code in (0, 1) and "sampler: the trace lacks" in printed


def test_the_result_as_json(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    write_trl(trl, 4, completions(3) | {"step": [4] * 4})  # repeats the file before
    run, found = imported(capsys, trl, tmp_path / "run")
    assert (found["format"], found["rows"], found["written"], found["steps"]) == ("trl-grpo", 16, 12, [1, 2, 3])
    ((reason, left),) = found["left_out"].items()
    assert "repeated" in reason and left["rows"] == 4 and left["first"].endswith("completions_00004.parquet:1")
    assert found["answers"] == {
        "rewards": "accuracy_reward",
        "weights": "1",
        "scale_rewards": "group",
        "beta": "unknown",
        "use_bias_correction_kl": "unknown",
    }
    assert {"score", "group", "advantage", "prompts"} <= set(found["present"])
    checks = {one["name"]: one for one in found["checks"]}
    assert checks["length_reward"]["possible"] and checks["ending"]["lacks"] == ["ended"]
    assert run.name == "run"


def test_the_generic_schema_with_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [row for step in range(3) for row in generic_step(step)])
    answers = ("kl=reward", "kl_estimator=k1", "beta=0.1")
    run, found = imported(capsys, path, tmp_path / "run", *(f"--answer={one}" for one in answers))
    assert found["format"] == "generic" and run.manifest["positions"] == "tokens"
    step = run.step(1)
    kl = step.channels.index("kl")
    assert step.rewards[3, :, kl].tolist() == pytest.approx([0.25] * 4)  # k1: old - reference
    assert step.weights[:, kl].tolist() == pytest.approx([-0.1] * 4)
    assert run.settings["policy"]["kl"]["beta"] == 0.1


def test_text_may_be_hashed_or_left_out(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    hashed, _ = imported(capsys, trl, tmp_path / "hashed", "--text", "hashed")
    assert all(len(text) == 16 for text in hashed.step(1).responses)
    left, _ = imported(capsys, trl, tmp_path / "none", "--text", "none")
    assert set(left.step(1).responses) == {None}
    assert "use full, hashed, none" in refused(capsys, trl, tmp_path / "other", "--text", "some")


def test_neither_torch_nor_the_trainers_are_needed(trl: Path, tmp_path: Path) -> None:
    """Importing and diagnosing, in a process in which they are not installed."""
    program = """
import sys
for name in ("torch", "transformers", "tokenizers", "trl"):
    sys.modules[name] = None
from kedge.cli import main
code = main(["import", sys.argv[1], "--out", sys.argv[2], "--yes"]) or main(["diagnose", sys.argv[2], "--no-html"])
heavy = [name for name in sys.modules if name.startswith(("kedge.train", "kedge.models", "kedge.recipe"))]
sys.exit(f"{code} {heavy}" if code or heavy else 0)
"""
    command = [sys.executable, "-c", program, str(trl), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What is asked


def test_open_questions_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "verl" / "1.jsonl", verl_records(1))
    code, _, errors = said(capsys, "import", tmp_path / "verl", "--out", tmp_path / "run")
    assert code == 2 and not (tmp_path / "run").exists()
    first, second = errors.splitlines()
    assert first.startswith("error: verl: adv_estimator: Which algorithm.adv_estimator was it?")
    assert "--answer adv_estimator=...: gae: PPO with a critic" in first and "(--yes takes other)" in first
    assert "verl: kl: Where was the KL to the reference charged?" in second  # its estimator and beta may not matter
    code, _, errors = said(
        capsys, "import", tmp_path / "verl", "--out", tmp_path / "run", "--answer", "kl=loss", "--answer",
        "adv_estimator=grpo",
    )  # fmt: skip
    assert code == 2 and "verl: beta:" in errors and "verl: kl_estimator:" in errors
    answers = ("kl=none", "adv_estimator=grpo")
    _, found = imported(capsys, tmp_path / "verl", tmp_path / "run", *(f"--answer={one}" for one in answers))
    assert found["conventions"]["advantage"] == "group mean and deviation"


def test_answers_that_cannot_be_used(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    options = ("--answer", "beta=much", "--answer", "scale_rewards=all", "--answer", "gama=1", "--answer", "beta")
    code, _, errors = said(capsys, "import", trl, "--out", tmp_path / "run", *options)
    assert code == 2
    keys = "rewards, weights, scale_rewards, beta, use_bias_correction_kl"
    assert errors.splitlines() == [
        "error: --answer beta=much: is not a number -> give a number or unknown",
        "error: --answer scale_rewards=all: is not a choice -> use group, none, batch, unknown",
        f"error: --answer gama=1: is not known to trl-grpo -> use {keys}",
        f"error: --answer beta: is not KEY=VALUE -> use {keys}",
    ]


def test_a_terminal_is_asked(
    capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kedge.cli.import_"], "_at_a_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("much\n0.04\nfalse\n"))
    code, printed, errors = said(capsys, "import", trl, "--out", tmp_path / "run")
    assert code == 0
    assert "What was beta?" in errors and "'much' is not a number" in errors
    assert "KL: in the loss, coefficient 0.04" in printed and "estimator: k3" in printed


# What is refused


def test_a_place_that_is_taken(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    code, _, errors = said(capsys, "import", trl, "--out", tmp_path / "run", "--yes")
    assert code == 2 and "is already there, and nothing is overwritten" in errors
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


def test_nothing_is_left_where_reading_fails(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    file = trl / "completions" / "completions_00003.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    assert "completions_00003.parquet: not readable as Parquet" in refused(capsys, trl, tmp_path / "run")


def test_files_of_which_no_row_can_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "verl" / "1.jsonl", verl_records(1, score=None))
    error = refused(capsys, tmp_path / "verl", tmp_path / "run")
    assert "no row of 4 can be used -> the score is not a finite number (first at " in error


def test_pickles_are_never_opened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    marker = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (marker,)

    for name in ("rollouts.pkl", "rollouts.pt", "1.jsonl", "completions_00001.parquet"):
        (tmp_path / "held" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "held" / name).write_bytes(pickle.dumps(Trap()))
        refused(capsys, tmp_path / "held" / name, tmp_path / "run")
    refused(capsys, tmp_path / "held", tmp_path / "run")
    error = refused(capsys, tmp_path / "held" / "rollouts.pkl", tmp_path / "run")
    assert "is a pickle, which could run any code" in error and "error: --format generic: expects JSONL" in error
    assert not marker.exists()


def test_unknown_files_say_what_was_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    near = write_lines(tmp_path / "near.jsonl", [{"input": "q", "output": "a", "step": 1}])
    error = refused(capsys, near, tmp_path / "run")
    assert "near.jsonl: like veRL rollout_data_dir, but without score -> expected trainer.rollout_data_dir" in error
    far = write_lines(tmp_path / "far.jsonl", [{"colour": "red"}])
    error = refused(capsys, far, tmp_path / "run")
    assert "far.jsonl has the fields colour -> give files of one of these formats" in error
    assert "error: --format trl-grpo: expects output_dir/completions" in error
    assert "there is no such file or folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refused(capsys, tmp_path / "empty", tmp_path / "run")
    assert "--format nope: is not known -> use generic" in refused(capsys, far, tmp_path / "run", "--format", "nope")
    assert "far.jsonl:1: the record lacks step" in refused(capsys, far, tmp_path / "run", "--format", "generic")


def test_a_run_is_not_imported_again(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    imported(capsys, trl, tmp_path / "run")
    error = refused(capsys, tmp_path / "run", tmp_path / "again")
    assert "is a Kedge run already -> run `kedge diagnose" in error


@pytest.mark.parametrize("command", ["diagnose", "ledger", "report"])
def test_other_commands_point_here(capsys: pytest.CaptureFixture[str], trl: Path, command: str) -> None:
    code, _, errors = said(capsys, command, trl)
    assert code == 2
    assert f"not a Kedge run, but TRL GRPO completions -> run `kedge import {trl} --out RUN`" in errors


# Formats


def test_every_format_is_complete() -> None:
    formats = all_formats()
    assert {"generic", "trl-grpo", "verl"} <= {one.name for one in formats}
    for one in formats:
        assert one.name and one.title and one.expected, one
        for question in one.asks:
            assert question.text.endswith((")", "?")) and question.why, question.key
            assert question.default is None or not question.choices or question.default in question.choices
            keys = {other.key for other in one.asks}
            assert all(known is None or known[0] in keys for known in (question.only_if, question.unless))


@pytest.mark.parametrize("known", all_formats(), ids=lambda one: one.name)
def test_recognising_never_raises(known: Format, tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "1.jsonl").write_text("[1, 2]\n")
    (tmp_path / "completions_00001.parquet").write_text("PAR1")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "nowhere"):
        assert known.recognises(path) is False


def test_one_format_for_each_fixture(trl: Path, tmp_path: Path) -> None:
    assert [one.name for one in recognised(trl)] == ["trl-grpo"]
    write_lines(tmp_path / "verl" / "1.jsonl", verl_records(1))
    assert [one.name for one in recognised(tmp_path / "verl")] == ["verl"]
    write_lines(tmp_path / "mine.jsonl", generic_step(0))
    assert [one.name for one in recognised(tmp_path / "mine.jsonl")] == ["generic"]


# Tokenizers


def letters(folder: Path) -> Path:
    """A tokenizer of single letters and the space, in a Hugging Face folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz 0123456789")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_counts_tokens(capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path) -> None:
    run, found = imported(capsys, trl, tmp_path / "run", "--tokenizer", str(letters(tmp_path / "policy")))
    step = run.step(2)
    assert run.manifest["positions"] == "tokens"
    assert step.lengths.tolist() == [len(f"{words} 2") for words in ANSWERS]
    assert step.response_ids is not None and step.response_ids[0, :3].tolist() == [15, 14, 5]  # o, n, e
    assert any("tokenised again" in note for note in found["notes"])


def test_token_ids_without_text_are_decoded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    records = [{k: v for k, v in one.items() if k not in ("response", "prompt")} for one in generic_step(0)]
    path = write_lines(tmp_path / "ids.jsonl", records)
    bare, _ = imported(capsys, path, tmp_path / "bare")
    assert set(bare.step(0).responses) == {None}
    run, _ = imported(capsys, path, tmp_path / "run", "--tokenizer", str(letters(tmp_path / "policy")))
    assert run.step(0).responses[2] == "j k l"  # ids 10, 11, 12
    assert run.step(0).prompts[3] == "g g"  # two times 7


def test_tokenizers_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], trl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert "there is no such folder" in refused(capsys, trl, out, "--tokenizer", str(tmp_path / "nowhere"))
    assert "there is no tokenizer.json in it" in refused(capsys, trl, out, "--tokenizer", str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text(json.dumps({"model": 1}))
    assert "tokenizer.json: cannot be read" in refused(capsys, trl, out, "--tokenizer", str(broken))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'kedge[train]'" in refused(capsys, trl, out, "--tokenizer", str(broken))
