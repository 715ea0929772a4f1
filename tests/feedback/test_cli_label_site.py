"""`kedge label` from the making of a store to a file for a recipe; and that the core stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from people_at_work import ask, choose, say

from kedge import cli
from kedge.feedback import people
from kedge.feedback.store import Store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Question {n}?", "response_a": "yes", "response_b": f"no {n}"} for n in range(3)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["label", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["label", *arguments]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_from_a_new_store_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("guide.txt").write_text("Be fair.\n")
    made = told(capsys, "init", "labels.db", "--guidelines", "guide.txt", "--set", "overlap=1", "--lead", "Lea")
    assert made["lead"] == "Lea" and len(made["token"]) >= 32
    assert told(capsys, "import", "labels.db", "items.jsonl")["added"] == 3
    assert told(capsys, "import", "labels.db", "items.jsonl") == {
        "added": 0, "there_before": 3, "rejected": [], "kinds": {"pair": 3, "ranking": 0, "rating": 0},
    }  # fmt: skip
    first = told(capsys, "annotator", "add", "labels.db", "Ann")["token"]
    assert told(capsys, "annotator", "add", "labels.db", "Ann", "--renew")["token"] != first
    everybody = told(capsys, "annotator", "list", "labels.db")["people"]
    assert [(one["name"], one["role"]) for one in everybody] == [("Ann", "annotator"), ("Lea", "lead")]
    store = Store.open("labels.db")
    ann = next(one for one in store.read(people.people) if one.name == "Ann")
    task = ask(store, ann)
    say(store, ann, task, choose(task, 0))
    assert told(capsys, "status", "labels.db")["counts"]["judged"] == 1
    assert told(capsys, "export", "labels.db", "pairs.jsonl")["written"] == 1
    assert cli.main(["data", "check", "pairs.jsonl"]) == 0
    assert cli.main(["label", "status", "labels.db"]) == 0
    assert "1 of 3 judgments" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean overlap" in error(capsys, "init", "labels.db", "--set", "overlapp=1")
    assert not Path("labels.db").exists()
    assert cli.main(["label", "init", "labels.db"]) == 0
    capsys.readouterr()
    assert "nothing is overwritten" in error(capsys, "init", "labels.db")
    assert "kedge label init" in error(capsys, "status", "absent.db")
    assert "other machines" in error(capsys, "serve", "labels.db", "--host", "0.0.0.0")
    assert "use task, gold, calibration" in error(capsys, "import", "labels.db", "items.jsonl", "--purpose", "x")
    assert "use pair, ranking, rating" in error(capsys, "import", "labels.db", "items.jsonl", "--as", "x")
    assert "annotator or lead" in error(capsys, "annotator", "add", "labels.db", "Ann", "--role", "x")
    assert "nobody has this name" in error(capsys, "annotator", "add", "labels.db", "Nobody", "--renew")
    Path("bad.jsonl").write_text('{"prompt": "p"}\n{"prompt": "p", "responses": ["a", "b"]}\n')
    text = error(capsys, "import", "labels.db", "bad.jsonl")
    assert "bad.jsonl:1" in text and "nothing is added" in text
    assert cli.main(["label", "import", "labels.db", "bad.jsonl", "--max-rejected", "0.5"]) == 0


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    assert cli.main(["label", "init", "labels.db"]) == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot be listened at" in error(capsys, "serve", "labels.db", "--port", str(port))


def test_without_the_extra_the_command_says_what_to_install() -> None:
    program = "import sys; sys.modules['sqlalchemy'] = None\nfrom kedge.cli import main\nsys.exit(main(%r))"
    for arguments in (["label", "init", "x.db"], ["label", "serve", "x.db"]):
        done = subprocess.run([sys.executable, "-c", program % arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "pip install 'kedge[label]'" in done.stderr


def test_labelling_needs_no_training_stack() -> None:
    program = """
import importlib, pkgutil, sys
import kedge.feedback
for found in pkgutil.walk_packages(kedge.feedback.__path__, "kedge.feedback."):
    importlib.import_module(found.name)
print({"torch", "transformers", "tokenizers", "safetensors", "datasets"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"
