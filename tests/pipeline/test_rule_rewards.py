"""Runs whose reward is not the model's alone: channels, metrics and trace of rules; refusals; going on after a kill."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from processes import Stop, assert_same, kedge, manifest, ran, stage_lines

from kedge.diagnose.ledger import ledger
from kedge.trace.reader import Part, read_run
from kedge.trace.schema import describe

RULES = """
[rewards.digits]
kind = "regex"
pattern = '\\d'
weight = 2.0

[rewards.digits_again]
kind = "regex"
pattern = '\\d'
weight = -0.5
clip = 0.25

[rewards.words]
kind = "python"
function = "judge.py:words"
weight = 0.1
clip = 4
"""
JUDGE = """
def words(prompts, responses):
    assert all("?" in prompt or prompt for prompt in prompts)
    return [len(text.split()) for text in responses]
"""
TERMINAL = ("score", "digits", "digits_again", "words")


@pytest.fixture(scope="module")
def ruled(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with three rules."""
    folder = tmp_path_factory.mktemp("ruled")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "ruled.toml").write_text(recipe.read_text() + RULES)
    return folder / "ruled.toml"


@pytest.fixture(scope="module")
def judged(ruled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    ran(folder, "run", ruled, "--out", folder / "run")
    return folder / "run"


def errors(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_every_rule_is_a_channel_of_its_own(judged: Path) -> None:
    channels = (*TERMINAL, "kl", "length", "missing_eos")
    assert manifest(judged)["channels"] == list(channels)
    for step in read_run(judged).traces():
        assert step.channels == channels
        found = {name: step.rewards[..., channels.index(name)].sum(axis=1) for name in channels}
        digits = [float(re.search(r"\d", text) is not None) for text in step.responses or ()]
        assert found["digits"].tolist() == digits
        assert found["digits_again"].tolist() == [0.25 * value for value in digits]
        assert found["words"].tolist() == [float(min(4, len(text.split()))) for text in step.responses or ()]
        weights = {name: float(step.weights[0, channels.index(name)]) for name in TERMINAL}
        assert weights == pytest.approx({"score": 1.0, "digits": 2.0, "digits_again": -0.5, "words": 0.1})
        np.testing.assert_allclose(sum(step.parts().values()), step.advantage(), atol=1e-9)
        assert np.abs(step.values[..., channels.index("words")]).max() > 0, "it has a critic head of its own"


def test_metrics_of_rules(judged: Path) -> None:
    for step, line in zip(read_run(judged).traces(), stage_lines(judged, "policy"), strict=True):
        for name in TERMINAL[1:]:
            reward = step.rewards[..., step.channels.index(name)].sum(axis=1)
            assert line[f"rewards/{name}/mean"] == pytest.approx(reward.mean(), abs=1e-6)
            assert line[f"rewards/{name}/std"] == pytest.approx(reward.std(), abs=1e-6)
            assert f"value/loss.{name}" in line and f"weight/{name}" in line
        assert "rewards/score/mean" not in line
        assert line["rewards/digits_again/mean"] == pytest.approx(line["rewards/digits/mean"] / 4)
    for stage in ("policy", "evaluation"):
        for line in stage_lines(judged, stage):
            assert [name for name in line if name not in ("stage", "step") and not describe(name, stage)] == []
    for line in stage_lines(judged, "evaluation"):
        assert 0 <= line["evaluation/rewards/digits"] <= 1
        assert 0 <= line["evaluation/rewards/words"] <= 4


def test_diagnosis_and_report_show_them(judged: Path) -> None:
    found = ledger(read_run(judged))
    assert found is not None and found.residual < 1e-6
    names = {row.part for row in found.rows()}
    assert {Part(name, source) for name in TERMINAL for source in ("reward", "critic")} <= names
    report = (judged / "report.html").read_text()
    for name in TERMINAL[1:]:
        shown = name.replace("_", " ")
        assert f"{shown} reward" in report and f"{shown} critic" in report
    assert "matched margin and verdict leave out digits, digits_again, words." in report


def test_a_run_without_rules_knows_nothing_of_them(whole: Path) -> None:
    assert manifest(whole)["channels"] == ["score", "kl", "length", "missing_eos"]
    assert "rewards" not in (whole / "metrics.jsonl").read_text()


def test_killed_and_resumed_with_rules(judged: Path, ruled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed = kedge(tmp_path, "run", ruled, "--out", run, stop=Stop(run, "/metrics.jsonl", 14))
    assert killed.wait() == -signal.SIGKILL
    ran(tmp_path, "run", ruled, "--out", run, "--resume")
    assert_same(run, judged)


def test_a_scalar_critic_learns_the_sum(ruled: Path, tmp_path: Path) -> None:
    ran(tmp_path, "run", ruled, "--out", tmp_path / "run", "--set", "policy.critic=scalar")
    for step in read_run(tmp_path / "run").traces():
        assert step.channels == (*TERMINAL, "kl", "length", "missing_eos", "critic")
        np.testing.assert_allclose(sum(step.parts().values()), step.advantage(), atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "key"),
    [("rewards.digits.weight=3.0", "rewards.digits.weight"), ("rewards.digits.pattern=x", "rewards.digits.pattern")],
)
def test_a_changed_rule_is_refused(setting: str, key: str, judged: Path, ruled: Path, tmp_path: Path) -> None:
    refused = kedge(tmp_path, "run", ruled, "--out", judged, "--resume", "--set", setting)
    assert refused.wait() == 2
    assert f"{key}: was " in errors(refused.stderr)[0]


def test_a_rule_that_is_gone_is_a_change(judged: Path, recipe: Path, tmp_path: Path) -> None:
    refused = kedge(tmp_path, "run", recipe, "--out", judged, "--resume")
    assert refused.wait() == 2
    assert "rewards.words.function: was " in refused.stderr


# Refusals


def refused(folder: Path, recipe: Path, rules: str, *, begun: bool) -> str:
    """The error of a run whose recipe has `rules`; whether the run had begun when it was found."""
    path = folder / "own.toml"
    path.write_text(recipe.read_text() + rules)
    command = kedge(folder, "run", path, "--out", folder / "run")
    assert command.wait() == 2, command.stderr
    assert ((folder / "run").exists() and any((folder / "run").iterdir())) == begun
    (line,) = errors(command.stderr)
    return line


def test_a_function_that_is_not_there(recipe: Path, tmp_path: Path) -> None:
    rule = "[rewards.mine]\nkind = 'python'\nfunction = 'judge.py:words'\n"
    assert "rewards.mine.function: there is no" in refused(tmp_path, recipe, rule, begun=False)
    (tmp_path / "judge.py").write_text("x = 1\ny = z\n")
    assert "judge.py:2: channel mine: NameError" in refused(tmp_path, recipe, rule, begun=False)


def test_a_function_that_fails_in_training(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def f(prompts, responses):\n    return [1 / 0 for _ in prompts]\n")
    line = refused(tmp_path, recipe, "[rewards.mine]\nkind = 'python'\nfunction = 'judge.py:f'\n", begun=True)
    assert f"{tmp_path / 'judge.py'}:2: channel mine: ZeroDivisionError" in line
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_function_that_gives_no_number(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def f(prompts, responses):\n    return [float('nan') for _ in prompts]\n")
    line = refused(tmp_path, recipe, "[rewards.mine]\nkind = 'python'\nfunction = 'judge.py:f'\n", begun=True)
    assert "channel mine returned nan for row 0 of 16, not a finite number" in line


# A service


@pytest.fixture
def service() -> Iterator[str]:
    """Pays for each character of prompt and response."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            pairs = zip(asked["prompts"], asked["responses"], strict=True)
            body = json.dumps({"rewards": [len(prompt) + len(response) / 100 for prompt, response in pairs]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_sees_each_prompt_with_its_response(service: str, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(recipe.read_text() + f"[rewards.service]\nkind = 'http'\nurl = '{service}'\nclip = 1000\n")
    ran(tmp_path, "run", path, "--out", tmp_path / "run", "--set", "policy.samples_per_prompt=2")
    for step in read_run(tmp_path / "run").traces():
        found = step.rewards[..., step.channels.index("service")].sum(axis=1)
        pairs = zip(step.prompts or (), step.responses or (), strict=True)
        assert found == pytest.approx([len(prompt) + len(response) / 100 for prompt, response in pairs], rel=1e-5)
