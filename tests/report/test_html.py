"""Reports: self-contained, safe against what a model may write, honest about gaps, right in their numbers."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import HEALTHY, World, make_run, sample_record

from kedge.diagnose.correction import propose
from kedge.errors import InputError
from kedge.report import words
from kedge.report.html import write_comparison, write_report
from kedge.report.truth import read_truth
from kedge.report.view import read_view
from kedge.trace.reader import read_run
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import TraceWriter

DRIFT = World(batch=8)
VOID = {"meta", "link", "br", "img", "input", "hr", "col"}
ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
)


class Page(HTMLParser):
    """The tags and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    ]
    assert "@import" not in style[1] and "url(" not in style[1]
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "form", "base"}
        assert not any(name.startswith("on") or name in ("src", "style", "srcset", "xlink:href") for name in attrs)
        assert not re.match(r"[a-z]+:|//", attrs.get("href") or "")


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("acts")
    corrected = replace(HEALTHY, batch=8, beta=0.15, penalty=0.06)
    return make_run(base / "drift", DRIFT), make_run(base / "corrected", corrected)


def test_a_full_report(acts: tuple[Path, Path]) -> None:
    path = write_report(acts[0])
    assert path == acts[0] / "report.html"
    text, page = read(path)
    assert_self_contained(text, page)
    for heading in (
        "In words",
        "Curves",
        "Gold utility",
        "√KL",
        "Matched margins",
        "Channel ledger",
        "Verbose responses",
        "Concise responses",
        "Health marks",
        "Before and after",
        "Settings",
    ):
        assert heading in page.text, heading
    assert "What is not here" not in page.text
    assert "caus" not in page.text.lower()
    assert "accounts for" in page.text
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    names = {attrs["id"] for tag, attrs in page.tags if tag in ("title", "desc") and "id" in attrs}
    assert len(plots) >= 10
    assert all(set((attrs["aria-labelledby"] or "").split()) <= names for attrs in plots)
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "nats" in (attrs.get("title") or "")]
    assert tokens and {(attrs["class"] or "").split()[1] for attrs in tokens} >= {"n1", "k1", "k3"}
    assert not re.search(r"\b(nan|None)\b", page.text)


def test_the_same_run_gives_the_same_bytes(acts: tuple[Path, Path], tmp_path: Path) -> None:
    assert write_report(acts[0], tmp_path / "a").read_bytes() == write_report(acts[0], tmp_path / "b").read_bytes()


def test_words_carry_the_right_numbers(acts: tuple[Path, Path]) -> None:
    view = read_view(acts[0])
    lines = words.summary(view)
    assert len(lines) == 5
    assert "0.00 → +1.50" in lines[0] and "80% of prompts (95% interval 75% to 85%)" in lines[0]
    assert "10 tokens" in lines[1] and "2.5 times" in lines[1]
    assert "8 nats per response, 0.3 per token" in lines[2]
    assert "+0.40 → best +0.62 after 3 updates → −0.35" in lines[3]
    assert lines[4].startswith("Verdict: length drift") and "+1.20" in lines[4]
    happened = words.what_happened(view)
    assert "most where the reference is briefest (10 / 8 / 5.6 by tercile)" in happened
    assert "while the score went on rising" in happened
    accounts = words.what_accounts(view)
    assert "16 prompts" in accounts and "100% of prompts" in accounts and "beta 0.05" in accounts
    healthy = words.summary(read_view(acts[1]))
    assert healthy[4] == "Length drift: none found; the rule against it proposes nothing."


def test_gold_is_read_from_truth_only(acts: tuple[Path, Path]) -> None:
    view = read_view(acts[0])
    gold = read_truth(view.run)["gold"]
    assert view.best_gold == int(gold.steps[gold.values.argmax()])
    assert "gold" not in view.evaluation and not hasattr(view.run, "truth")


def test_a_comparison(acts: tuple[Path, Path], tmp_path: Path) -> None:
    proposal = propose(read_run(acts[0]))
    write_report(acts[0])
    out = acts[0].parent / "report.html"
    assert write_comparison(*acts, out, proposal) == out
    text, page = read(out)
    assert_self_contained(text, page)
    for override in proposal.overrides:
        assert f"--set {override}" in page.text
    assert "Act one: drifting" in page.text and "Act two: corrected" in page.text
    assert "The same prompts, three answers" in page.text
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert "drift/report.html" in links
    assert len(words.comparison_summary(read_view(acts[0]), read_view(acts[1]), proposal)) == 5
    rows = dict(re.findall(r'<th scope="row">(\w+).*?</th>((?:<td>.*?</td>)+)', text))
    assert re.findall(r"<td>(.*?)</td>", rows["Length"]) == ["10.0", "13.8", "25.0", "10.0", "10.0"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_model_writes_stays_text(tmp_path: Path, attack: str) -> None:
    path = make_run(tmp_path / "run", replace(DRIFT, steps=3, batch=4, probes=8))
    run = RunDir(path)
    run.update_manifest(name=attack, world=attack)
    run.recipe_json.write_text('{"name": "x"}')
    with TraceWriter(run) as trace:
        trace.write_samples(sample_record(3, response=f"hello {attack} & more", prompt=attack))
    text, page = read(write_report(path))
    assert_self_contained(text, page)
    assert attack in page.text
    assert ("<" in attack or "'" in attack) != (attack in text)
    comparison = write_comparison(path, path, tmp_path / "two.html", propose(read_run(path)))
    assert_self_contained(*read(comparison))


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run")
    text, page = read(write_report(tmp_path / "run"))
    assert_self_contained(text, page)
    for sentence in ("has not begun", "No evaluation", "no matched margin", "no ledger", "Nobody knows", "No evalua"):
        assert sentence in page.text
    assert "The run is running" in page.text
    write_comparison(tmp_path / "run", tmp_path / "run", tmp_path / "two.html", propose(read_run(tmp_path / "run")))
    assert_self_contained(*read(tmp_path / "two.html"))


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("trace/probes-*", "no verdict"),
        ("trace/samples-*", "No evaluation samples"),
        ("trace/step-*", "no ledger"),
        ("truth/*", "Nobody knows"),
        ("metrics.jsonl", "No evaluation is on disk"),
        ("recipe.json", "finished"),
    ],
)
def test_each_thing_may_be_missing(tmp_path: Path, gone: str, says: str) -> None:
    path = make_run(tmp_path / "run", replace(DRIFT, steps=6, batch=4, probes=8))
    for file in path.glob(gone):
        file.unlink()
    text, page = read(write_report(path))
    assert_self_contained(text, page)
    assert says in page.text


def test_a_run_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", replace(DRIFT, steps=6, batch=4), finished=False)
    with RunDir(path).metrics.open("a") as file:
        file.write('{"stage": "evaluation", "st')
    assert "The run is running" in read(write_report(path))[1].text


def test_samples_without_text_are_said_to_be_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", replace(DRIFT, steps=3, batch=4))
    with TraceWriter(RunDir(path), text="hashed") as trace:
        trace.write_samples(sample_record(3))
    assert "kept without their text" in read(write_report(path))[1].text


def test_damage_and_foreign_folders_are_the_users_problem(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a Kedge run"):
        write_report(tmp_path)
    path = make_run(tmp_path / "run", replace(DRIFT, steps=3, batch=4))
    with pytest.raises(InputError, match="cannot be written"):
        write_report(path, tmp_path / "nowhere" / "report.html")
    (path / "trace" / "step-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="step-000001"):
        write_report(path)
