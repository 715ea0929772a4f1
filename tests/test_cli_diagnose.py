"""`kedge diagnose` and `kedge checks`: what they print, where they write, how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kedge import cli
from kedge.diagnose import checks
from kedge.diagnose.checks import all_checks
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Finding
from kedge.diagnose.view import View

sys.path.insert(0, str(Path(__file__).parent / "trace"))
from synthetic_run import World, make_run

Judge = Callable[[View], Finding]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("cli") / "run", World(steps=9))


def only(monkeypatch: pytest.MonkeyPatch, *found: Check) -> None:
    """Let these be all the checks there are."""
    import kedge.diagnose.diagnosis as diagnosis
    import kedge.diagnose.prose as prose
    import kedge.report.diagnosis_page as page

    for module in (checks, diagnosis, prose, page):
        monkeypatch.setattr(module, "all_checks", lambda: found)


def check(name: str, judge: Judge, *, validated: bool = True) -> Check:
    return Check(name, name.replace("_", " "), Kind.CAUSE, ("M1",), judge, validated=validated)


def saying(status: str, **more: object) -> Judge:
    return lambda view: Finding("one", status, f"It is {status}.", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1), ("not_checked", 0)])
def test_how_it_ends(
    status: str, code: int, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, check("one", saying(status)))
    assert cli.main(["diagnose", str(made), "--no-html"]) == code
    assert f"It is {status}." in capsys.readouterr().out or status == "ok"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{run}/nowhere"], "there is no such run"),
        (["{run}", "--check", "samplr"], "did you mean sampler?"),
        (["{run}", "--since", "99"], "the last policy step is 8"),
        (["{run}", "--html", "page.txt"], "not the name of an HTML file"),
        (["{run}", "--html", "{run}/no/folder/page.html"], "its folder is not there"),
        (["{run}", "--html", "page.html", "--no-html"], "contradict"),
        (["{run}", "--since", "-1"], "--since"),
    ],
)
def test_mistakes(arguments: list[str], what: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", *(one.format(run=made) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert what in error and "Traceback" not in error


def test_json_has_the_most_likely_cause_first(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        check("doubted", lambda _: Finding("doubted", "fail", "x", strength=9), validated=False),
        check("missing", lambda _: Finding("missing", "not_checked", "no rows")),
        check("weak", lambda _: Finding("weak", "fail", "x", strength=1)),
        check("strong", lambda _: Finding("strong", "fail", "x", strength=3, onset=2)),
    ]
    only(monkeypatch, *found)
    assert cli.main(["diagnose", str(made), "--json", "--no-html"]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["check"] for one in record["findings"]] == ["strong", "weak", "doubted", "missing"]
    assert record["likely"] == ["strong"] and record["status"] == "fail"
    assert record["findings"][-1]["summary"] == "no rows"
    assert not record["findings"][2]["validated"]
    assert cli.main(["diagnose", str(made), "--no-html"]) == 1
    text = capsys.readouterr().out
    assert text.index("FAIL  strong") < text.index("FAIL  weak") < text.index("FAIL  doubted") < text.index("no rows")
    assert "Not validated" in text


def test_the_page(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", str(made)]) in (0, 1)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {made / 'diagnosis.html'}"
    (made / "diagnosis.html").unlink()
    page = tmp_path / "mine.html"
    assert cli.main(["diagnose", str(made), "--html", str(page), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"] == str(page)
    assert page.exists() and not (made / "diagnosis.html").exists()
    assert cli.main(["diagnose", str(made), "--no-html"]) in (0, 1)
    assert not (made / "diagnosis.html").exists()


def test_a_folder_that_cannot_be_written(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert cli.main(["diagnose", str(made)]) in (0, 1)
    assert "report:" not in capsys.readouterr().out and not (made / "diagnosis.html").exists()


def test_what_checks_are_shown(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[View] = []

    def judge(view: View) -> Finding:
        seen.append(view)
        return Finding("one", "ok", "fine")

    only(monkeypatch, check("one", judge), check("two", saying("fail")))
    assert cli.main(["diagnose", str(made), "--no-html", "--check", "one", "--since", "4", "--ignore-recipe"]) == 0
    (view,) = seen
    assert view.settings == {} and view.steps[0] == 4 and view.steps[-1] == 8
    assert cli.main(["diagnose", str(made), "--no-html", "--check", "one", "--check", "two"]) == 1
    assert seen[-1].settings != {} and seen[-1].steps[0] == 0


def test_a_list_of_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [one.name for one in all_checks()]
    assert cli.main(["checks", "sampler"]) == 0
    text = capsys.readouterr().out
    assert "**What.**" in text and "M4" in text and "**References.**" in text
    assert cli.main(["checks", "--json"]) == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)["checks"]} == {one.name for one in all_checks()}
    assert cli.main(["checks", "nothing_like_it"]) == 2
    assert "there is no such check" in capsys.readouterr().err


def test_it_needs_no_torch(made: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["safetensors"] = sys.modules["tokenizers"] = None
from kedge import cli
code = cli.main(["diagnose", {str(made)!r}, "--json"])
assert code in (0, 1), code
sys.exit(cli.main(["checks"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["run"] == "synthetic"


def test_progress_after_a_second_and_on_stderr(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, check("one", saying("ok")))
    assert cli.main(["diagnose", str(made), "--no-html"]) == 0
    assert "diagnose" not in capsys.readouterr().err, "nine steps take less"
    monkeypatch.setattr(sys.modules["kedge.cli.diagnose"], "SOON", -1.0)  # the package's name is the command
    assert cli.main(["diagnose", str(made), "--no-html"]) == 0
    streams = capsys.readouterr()
    assert "9/9" in streams.err and "9/9" not in streams.out


def test_a_stop_is_heard(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import kedge.progress as progress

    original = progress.Interrupt

    class Asked(original):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.requested = True

    import kedge.cli.output as output

    monkeypatch.setattr(output, "Interrupt", Asked)
    assert cli.main(["diagnose", str(made), "--no-html"]) == 130
    assert "Traceback" not in capsys.readouterr().err
