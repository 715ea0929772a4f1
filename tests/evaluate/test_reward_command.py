"""`kedge reward evaluate` from the command line: text, JSON, page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reward_data import pairs

from kedge import cli
from kedge.data.records import Preference


def written(path: Path, rows: list[Preference]) -> Path:
    lines = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(0, 60, longer_wins=0.8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A reward model's folder, untrained."""
    from kedge.data.tokenise import train_tokenizer
    from kedge.models.load import scratch_policy
    from kedge.models.reward import finished, new_member, reward_model, save_reward_model

    folder = tmp_path_factory.mktemp("models") / "reward"
    tokenizer = train_tokenizer([data.read_text(encoding="utf-8")], vocab=300)
    policy = scratch_policy(tokenizer, family="llama", hidden=16, layers=1, heads=2, context=256, seed=0)
    save_reward_model(reward_model([finished(new_member(policy, seed, heads=1)) for seed in (0, 1)]), tokenizer, folder)
    return folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["reward", "evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = asked(capsys, *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_a_built_in_judge_in_text(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    code, out, _ = asked(capsys, "length", data)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for words in ("length-balanced", "It decides as length does", "climb this", "Not checked", "calibration: this"):
        assert words in " ".join(out.split()), words


def test_a_folder_in_json(capsys: pytest.CaptureFixture[str], data: Path, model: Path) -> None:
    found = figures(capsys, model, data)
    assert found["counts"]["decided"] == 60 and found["counts"]["unread"] == 0
    assert 0 <= found["accuracy"]["all"]["accuracy"]["value"] <= 1
    assert len(found["ensemble"]["members"]) == 2
    assert found["length"]["token"]["median"] > 10
    assert found["padding"]["doses"][1]["sentences"] == 4
    assert found["distance"]["not_checked"]
    assert found["grid"] == {"not_checked": "no grid was given"}


def test_a_folder_scores_as_the_library_does(data: Path, model: Path) -> None:
    import torch

    from kedge.data.tokenise import encode_prompt, encode_response
    from kedge.evaluate.reward.answers import judged
    from kedge.evaluate.reward.folder import folder_judge
    from kedge.models.load import load_tokenizer
    from kedge.models.reward import load_reward_model
    from kedge.progress import Progress

    answers = judged(pairs(0, 60, longer_wins=0.8)).answers
    reading = folder_judge(model, Progress(quiet=True)).read(answers)
    tokenizer, members = load_tokenizer(model / "member-0"), load_reward_model(model).models
    for row in (0, 1, 57):
        prompt, text = answers[row]
        ids = torch.tensor([encode_prompt(tokenizer, prompt) + encode_response(tokenizer, text)])
        with torch.no_grad():
            states = [member.base_model(input_ids=ids).last_hidden_state[0, -1] for member in members]
            one, other = (float(m.score(state)) for m, state in zip(members, states, strict=True))
        assert reading.score[row] == pytest.approx((one + other) / 2, abs=1e-5)


def test_answers_past_the_context_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    rows = pairs(0, 40)
    rows[0] = Preference("question 0", "alder " * 2000, "birch")
    found = figures(capsys, model, written(tmp_path / "long.jsonl", rows))
    assert (found["counts"]["unread"], found["counts"]["decided"]) == (1, 39)


def test_linear_with_a_grid_padding_and_a_page(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    styles = ["alder", "alder birch cedar", "**alder** birch cedar dogwood"]
    rows = [{"prompt": f"<b>{at}</b>", "chosen": styles, "rejected": styles[::-1]} for at in range(40)]
    grid, padding, page = tmp_path / "grid.jsonl", tmp_path / "padding.txt", tmp_path / "page.html"
    grid.write_text("".join(json.dumps(row | {"domain": "<i>x</i>"}) + "\n" for row in rows), encoding="utf-8")
    padding.write_text("So it is.\n", encoding="utf-8")
    found = figures(capsys, "linear", data, "--grid", grid, "--padding", padding, "--html", page)
    assert found["report"] == str(page)
    assert [dose["sentences"] for dose in found["padding"]["doses"]] == [1]
    assert found["grid"]["judge"]["rows"] == 40
    text = page.read_text(encoding="utf-8")
    assert "Reliability" in text and "&lt;i&gt;x&lt;/i&gt;" in text
    assert "<i>x</i>" not in text and "<script" not in text and 'http-equiv="Content-Security-Policy"' in text


def test_only_held_out_prompts(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    from kedge.data.split import is_held_out

    found = figures(capsys, "length", data, "--holdout", 0.5)
    assert found["rows"] == sum(is_held_out(row.prompt, 0.5) for row in pairs(0, 60, longer_wins=0.8))


def test_malformed_rows_are_counted(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    file = tmp_path / "torn.jsonl"
    file.write_text(data.read_text(encoding="utf-8") + '{"prompt": 3}\n{"pro', encoding="utf-8")
    assert figures(capsys, "length", file)["rejected"] == 2
    assert "2 of 62 rows left out" in asked(capsys, "length", file)[1]


@pytest.mark.parametrize(
    ("model_name", "options", "what"),
    [
        ("no-such-model", [], "there is no such folder"),
        ("pairs.jsonl", [], "a file, not a folder"),
        ("length", ["--html", "page.txt"], "end it in .html"),
        ("length", ["--html", "nowhere/else/page.html"], "its folder is not there"),
        ("length", ["--grid", "nothing.jsonl"], "no such file"),
        ("length", ["--grid", "pairs.jsonl"], "chosen is not 3 texts"),
        ("length", ["--padding", "nothing.txt"], "cannot be read"),
        ("length", ["--holdout", "0"], "none of its 60 rows"),
        ("length", ["--holdout", "2"], "--holdout"),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    model_name: str,
    options: list[str],
    what: str,
) -> None:
    monkeypatch.chdir(data.parent)
    code, _, err = asked(capsys, model_name, "pairs.jsonl", *options)
    assert code == 2
    assert what in err and "Traceback" not in err


@pytest.mark.parametrize("content", ["", "{}\n", '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'])
def test_hardly_any_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text(content, encoding="utf-8")
    code, out, err = asked(capsys, "length", file)
    assert "Traceback" not in err and code == (0 if "chosen" in content else 2)
    assert ("1 decided comparisons, 30 are needed" in out) == (code == 0)
