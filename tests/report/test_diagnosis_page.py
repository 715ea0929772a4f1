"""The page of a diagnosis: it holds what it says, runs nothing, loads nothing, and trusts no text of a model."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import World, make_run, sample_record

from kedge.diagnose.diagnosis import Diagnosis, diagnose, read_view
from kedge.diagnose.finding import Evidence, Finding, Remedy
from kedge.diagnose.prose import prose
from kedge.diagnose.trials import read_trials
from kedge.report.diagnosis_page import write_diagnosis
from kedge.report.html import write_report
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import TraceWriter

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too'"


class Page(HTMLParser):
    """Tags, attributes and text of a page; unclosed or crossed elements are errors."""

    VOID = ("meta", "br", "img", "link", "path", "circle", "rect", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def failing(summary: str = "It pays.") -> Finding:
    return Finding(
        "length_reward",
        "fail",
        summary,
        evidence=(Evidence("net margin", 1.25, "reward", "late", "trace/probes"),),
        strength=2.5,
        onset=4,
        mechanism="The score pays for length.",
        refuted_by="padding changes no score",
        remedies=(Remedy(("policy.kl.beta=0.2",), "a nat costs more", "slower"),),
    )


def page_of(run: Path, *findings: Finding, notes: tuple[str, ...] = ()) -> Page:
    view, _ = read_view(run)
    found = diagnose(view)
    if findings:
        found = Diagnosis(found.run, found.steps, findings, (findings[0].check,), {}, notes)
    out = write_diagnosis(run, view, found, prose(view, found, read_trials(run)), run / "diagnosis.html")
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", World(steps=12))


def test_it_has_what_a_meeting_needs(run: Path) -> None:
    page = page_of(run, failing(), Finding("critic", "not_checked", "no critic"))
    for words in (
        "What is happening", "First alarm: policy step 4", "Net margin of the verbose answer", "reference longest",
        "What would change it", "policy.kl.beta=0.15", "It costs:", "Six answers", "Why the KL penalty did not stop it",
        "most likely first", "What would speak against it: padding changes no score", "1.25 reward",
        "nothing is changed", "no critic", "not checked",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("article") >= 6 + 2, "six answers and two changes"
    assert ("id", "length_reward") in page.attributes and ("href", "#length_reward") in page.attributes


def test_it_runs_and_loads_nothing(run: Path) -> None:
    page = page_of(run, failing())
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    links = [value for name, value in page.attributes if name == "href"]
    assert all(value is not None and (value.startswith("#") or ":" not in value) for value in links)
    text = (run / "diagnosis.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert any(value is not None and value.startswith("default-src 'none'") for _, value in page.attributes)


def test_text_of_models_and_names_is_inert(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=6))
    RunDir(run).update_manifest(name=HOSTILE)
    with TraceWriter(RunDir(run)) as writer:
        writer.write_samples(sample_record(6, response=HOSTILE, prompt=HOSTILE))
    (run / "trials").mkdir()
    row = {"figure": HOSTILE, "unit": HOSTILE, "null": 1.0, "changed": 2.0, "difference": 1.0}
    arm = {"changes": ["policy.kl.beta=0.2"], "rows": [row], "sentences": [HOSTILE]}
    (run / "trials" / "x.json").write_text(json.dumps({"from": 1, "steps": 2, "seeds": 2, "arms": [arm]}))
    page = page_of(run, failing(HOSTILE), notes=(HOSTILE,))
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    write_report(run)
    assert "script" not in Page((run / "report.html").read_text(encoding="utf-8")).tags


def test_trials_are_shown_with_their_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=6))
    (run / "trials").mkdir()
    row = {
        "figure": "net_margin", "unit": "reward", "null": 1.0, "changed": -0.5, "difference": -1.5,
        "over_seeds": {"low": -2.25, "high": -0.75}, "over_prompts": {"low": -1.6, "high": -1.4}, "caused": True,
    }  # fmt: skip
    gold = {**row, "figure": "gold", "over_seeds": None, "over_prompts": None, "truth": True}
    arm = {"changes": ["policy.kl.beta=0.2"], "rows": [row, gold], "sentences": ["It caused the margin to fall."]}
    (run / "trials" / "x.json").write_text(json.dumps({"from": 4, "steps": 2, "seeds": 3, "arms": [arm]}))
    text = page_of(run, failing()).text
    assert "2 steps from step 4, 3 pairs of forks" in text and "of twenty figures that nothing moved" in text
    assert "net margin 1 −0.5 −1.50 −2.25 to −0.75 (seeds) yes reward" in text, "the wider of the two intervals"
    assert "gold (known to the built-in world alone) 1 −0.5 −1.50 – yes" in text


@pytest.mark.parametrize("state", ["begun", "no text", "nothing"])
def test_little_to_show(state: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=3), finished=False)
    for path in (run / "trace").iterdir():
        if state == "nothing" or path.name.startswith("samples"):
            path.unlink()
    if state == "no text":
        with TraceWriter(RunDir(run), text="none") as writer:
            writer.write_samples(sample_record(3))
    page = page_of(run)
    assert "All checks" in page.text and "Six answers" not in page.text


def test_the_report_of_the_run_speaks_of_it(run: Path, tmp_path: Path) -> None:
    (run / "diagnosis.html").unlink(missing_ok=True)
    elsewhere = write_report(run, tmp_path / "other.html")
    assert not (run / "diagnosis.html").exists(), "a report elsewhere writes nothing into the run"
    assert "kedge diagnose" in Page(elsewhere.read_text(encoding="utf-8")).text
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Findings" in page.text and ("href", "diagnosis.html") in page.attributes
    assert (run / "diagnosis.html").exists()


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    page_of(run)
    before = (run / "diagnosis.html").read_bytes()
    page_of(run)
    assert (run / "diagnosis.html").read_bytes() == before
    assert not re.search(rb"20\d\d-\d\d-\d\d", before), "no date"
