"""`kedge replay` and `kedge compare` as a user calls them, on runs made of numpy alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kedge.cli import main

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("cli") / "drift", World(steps=4))


def test_a_replay_is_told_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["replay", str(run), "--set", "policy.kl.beta=0.2", "--set", "policy.length_penalty=0.5"])
    out = capsys.readouterr().out
    assert code == 0
    assert "changed: policy.kl.beta=0.2, policy.length_penalty=0.5" in out
    assert "under the change length is predicted to fall" in out
    assert "one step only" in out and "exact: " in out
    assert "matched net margin" in out


def test_a_replay_is_one_json_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["replay", str(run), "--from", "1", "--to", "2", "--feature", "regex:[02468]$", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["steps"] == [1, 2] and found["responses"] == 48
    assert "[02468]$" in found["effects"] and "length" in found["effects"]
    assert found["effects"]["length"]["ratio"] == pytest.approx(1)
    assert sum(both["changed"] for both in found["length_shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "policy.kl.betta=1.0"], "did you mean policy.kl.beta"),
        (["--set", "policy.lr=1.0"], "how far a step goes"),
        (["--set", "score=lenght"], "known: residual_length"),
        (["--reward", "nowhere"], "there is no such folder"),
        (["--from", "3", "--to", "1"], "comes after"),
        (["--from", "99"], "no policy steps"),
        (["--feature", "lenght"], "there is no such feature"),
    ],
)
def test_mistakes_are_explained(run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_no_run_is_no_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("not a Kedge run") == 2


def test_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "held", World(steps=4, beta=0.3, last_ratio=1.0))
    assert main(["compare", str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert "policy.kl.beta" in out and "held less drift" in out
    assert main(["compare", str(run), str(other), "--at", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [side["step"] for side in found["runs"]] == [3, 3]
    assert found["settings"] == {"policy.kl.beta": [0.05, 0.3]}
    assert main(["compare", str(run)]) == 2
