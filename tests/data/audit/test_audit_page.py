"""The audit's page: self-contained, escaped, and with the charts that the data allow."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from makers import pair, write

from kedge.data.audit.whole import audit
from kedge.report.audit import write_audit

ATTACK = "\"><script>alert(1)</script>' onload=x {{ 7 * 7 }}"


def page(folder: Path, rows: list[dict[str, object]], name: str = "rows.jsonl") -> str:
    return write_audit(audit(write(folder / name, rows)), folder / "page.html").read_text(encoding="utf-8")


def rows() -> list[dict[str, object]]:
    """Labels of three annotators, with the attack wherever a file can hold text."""
    found: list[dict[str, object]] = []
    for number in range(150):
        for coder in ("ann", ATTACK, "cid"):
            flipped = (number % 10 == 0) == (coder == "ann")
            texts = [f"{ATTACK} {'long ' * (number % 7)} {number}", f"short {number}"]
            chosen, rejected = texts[::-1] if flipped else texts
            more = {"annotator": coder, f"column {ATTACK}": f"{ATTACK}{number % 2}", "chosen_pos": 1 + number % 2}
            found.append(pair(f"{ATTACK} {number}", chosen, rejected, **more))
    return [*found, {"prompt": ATTACK, f"{ATTACK}": 1}]


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = page(tmp_path, rows(), "rows <b>&'.jsonl")
    assert "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text
    assert "<script" not in text and "<b>&" not in text and "<b>&amp;" not in text
    assert not re.search(r"<[^>]+\s(?:on\w+|src|style)=", text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy in text.replace("&#39;", "'")


def test_charts_are_there_where_the_data_are(tmp_path: Path) -> None:
    text = page(tmp_path, rows())
    for title in ("The longer response wins", "Reliability of annotators", "logistic fit", "longer wins</figcaption>"):
        assert title in text, title
    assert not re.search(r">None<|\bnan\b", text)


def test_a_page_without_charts(tmp_path: Path) -> None:
    text = page(tmp_path, [pair("p", "a", "b", tie=True)])
    assert "<figure" not in text and "not checked" in text
