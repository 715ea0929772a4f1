"""The site in a real browser: keys and mouse, undo, a lead who settles, phone width, no scripts, and text that attacks.

With KEDGE_SCREENSHOTS set to a folder, the pages that the documentation shows are written there (tools/screenshots.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from people_at_work import pair
from served import Served
from site_kit import begin
from sqlalchemy import select

from kedge.feedback import tables
from kedge.feedback.items import NewItem
from kedge.feedback.settings import Settings
from kedge.feedback.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHROMIUM = "/usr/bin/chromium"
PATIENCE = 120_000  # milliseconds; a busy machine may be slow
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
SHOTS = os.environ.get("KEDGE_SCREENSHOTS")
PLAIN = {"gold_share": 0, "repeat_share": 0}
ATTACK = "<script>window.hit = 1; alert(1)</script>"
HOSTILE = (
    ATTACK,
    '<img src=x onerror="window.hit = 2; alert(2)">',
    "[click me](javascript:window.hit=3) ![x](http://example.com/x.png) <a href='javascript:alert(3)'>x</a>",
    "\u202e\u05e9\u05dc\u05d5\u05dd override \u202c and \u0645\u0631\u062d\u0628\u0627",
    "long text " * 5_000,
    "",
)
ANSWERS = (
    "Your parcel left our depot in Leeds this morning. It should reach you on Thursday between 9 and 12. You can "
    "follow it with the number in your confirmation mail.",
    "Thank you so much for reaching out to us today! Parcels can sometimes take a while. We appreciate your patience "
    "and truly value you as a customer.",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"Chromium is not installed at {CHROMIUM}")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield launched
        launched.close()


class Visitor:
    """Somebody in a browser of their own, who counts dialogs, errors and requests to elsewhere."""

    def __init__(self, browser: Any, url: str, token: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1180, "height": 800}} | options)
        self.page, self.url = self.context.new_page(), url
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("request", lambda one: one.url.startswith(url) or self.complaints.append(one.url))
        self.page.goto(f"{url}/login")
        self.page.get_by_label("Your token").fill(token)
        self.page.get_by_role("button", name="Log in").click()
        if "/guidelines" in self.page.url:
            self.page.get_by_role("button", name="I have read them").click()

    def press(self, *keys: str) -> None:
        """Press keys; the last one is expected to lead to another page."""
        for key in keys[:-1]:
            self.page.keyboard.press(key)
        with self.page.expect_navigation():
            self.page.keyboard.press(keys[-1])

    def click(self, role: str, name: str) -> None:
        with self.page.expect_navigation():
            self.page.get_by_role(role, name=name).click()

    def shot(self, name: str) -> None:
        if SHOTS:
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def site(folder: Path, *items: NewItem, names: tuple[str, ...] = ("Ann",), **settings: Any) -> tuple:
    store = Store.create(folder / "labels.db", Settings(**PLAIN | settings))
    return store, begin(store, *items, names=names), Served(str(folder / "labels.db"))


def judged(store: Store) -> list:
    return store.read(lambda c: list(c.execute(select(tables.judgments).order_by(tables.judgments.c.id))))


def test_a_day_at_the_site(browser: Any, tmp_path: Path) -> None:
    """Two annotators by keyboard and by mouse, an undo, and a lead who settles what they disagree on."""
    questions = ("Where is my parcel?", "Can I return shoes that I wore?", "Do you ship to Norway?")
    items = [NewItem("pair", text, (ANSWERS[0], ANSWERS[1] + f" ({place})")) for place, text in enumerate(questions)]
    store, tokens, served = site(tmp_path, *items, names=("Ann", "Bob"), name="Support answers")
    with served:
        url = f"http://127.0.0.1:{served.port}"
        ann = Visitor(browser, url, tokens["Ann"])
        assert "Where is my parcel?" in ann.page.inner_text("main")
        ann.page.keyboard.press("1")
        assert ann.page.get_by_label("Left is better").is_checked()
        assert "Enter saves" in ann.page.inner_text("#status")
        ann.page.keyboard.press("w")
        ann.page.get_by_label("more helpful").check()
        ann.shot("labelling-pair")
        ann.press("Enter")
        ann.press("2", "2")  # the same key twice saves as well
        assert "Norway" in ann.page.inner_text("main")
        ann.press("u")
        assert "shoes" in ann.page.inner_text("main"), "undone, and back again"
        ann.press("3", "Enter")
        ann.page.keyboard.press("f")
        assert ann.page.get_by_label("Flag for the lead").is_checked()
        ann.press("s")
        assert "Nothing is left" in ann.page.inner_text("main")
        ann.press("Backspace")
        assert "Norway" in ann.page.inner_text("main")
        ann.press("4", "Enter")

        bob = Visitor(browser, url, tokens["Bob"])
        # By mouse, and against whatever Ann preferred.
        first = judged(store)[0]
        loser = ANSWERS[1 - first.value["choice"]][:30]
        side = "Left" if loser in bob.page.get_by_label("Left response").inner_text() else "Right"
        bob.page.get_by_label(f"{side} is better").check()
        bob.page.get_by_label("far better").check()
        bob.click("button", "Save Enter")
        bob.page.get_by_label("Tie").check()
        bob.click("button", "Save Enter")
        bob.click("button", "Skip s")

        lead = Visitor(browser, url, tokens["Lea"])
        assert "Krippendorff" in lead.page.inner_text("main")
        lead.shot("labelling-figures")
        lead.click("link", "disagreements open")
        lead.click("link", "Item 1")
        lead.page.get_by_label("A is better").check()
        lead.page.get_by_label("Why (kept with the item)").fill("It answers the question.")
        lead.shot("labelling-settle")
        lead.click("button", "Settle and go on")
        assert "Nothing waits" in lead.page.inner_text("main")
        assert ann.complaints + bob.complaints + lead.complaints == []
    actions = [row.action for row in judged(store)]
    assert actions == ["judge", "judge", "undo", "judge", "skip", "undo", "judge", "judge", "judge", "skip"]
    strong = judged(store)[0]
    assert (strong.strength, strong.reasons) == (2, ["more helpful"])
    assert 0 < strong.active <= strong.seconds
    (settled,) = store.read(lambda c: list(c.execute(select(tables.adjudications))))
    assert (settled.value, settled.note) == ({"choice": 0}, "It answers the question.")


@pytest.mark.parametrize("scripts", [True, False], ids=["with-scripts", "without-scripts"])
def test_hostile_responses_are_inert_text(browser: Any, tmp_path: Path, scripts: bool) -> None:
    items = [NewItem("pair", f"{ATTACK} {place}", (text, f"other {place}")) for place, text in enumerate(HOSTILE)]
    store, tokens, served = site(tmp_path, *items, name=ATTACK, overlap=1)
    with served:
        visitor = Visitor(browser, f"http://127.0.0.1:{served.port}", tokens["Ann"], java_script_enabled=scripts)
        page = visitor.page
        for place, text in enumerate(HOSTILE):
            blocks = [block.text_content() for block in page.locator("pre.text").all()]
            assert blocks.count(f"{ATTACK} {place}") == 1
            assert (text in blocks) == bool(text)
            assert page.get_by_text("response is empty").count() == (0 if text else 1)
            assert page.locator("main img, main iframe, main pre *").count() == 0
            assert page.locator("main section a").count() == 0
            wide = page.locator("main").bounding_box()["width"]
            assert all(box.bounding_box()["width"] < wide / 2 for box in page.locator(".side").all())
            # The page around the text keeps its direction.
            assert page.locator("fieldset legend").first.bounding_box()["x"] < 200
            if scripts:
                assert page.evaluate("window.hit") is None
                visitor.press("1", "1")
            else:
                page.get_by_label("Left is better").check()
                visitor.click("button", "Save Enter")
        assert visitor.complaints == []
    assert len(judged(store)) == len(HOSTILE)


def test_the_policy_stops_a_script_that_got_in(browser: Any, tmp_path: Path) -> None:
    """The second wall: markup that were in the page all the same would not run."""
    _, tokens, served = site(tmp_path, pair(1))
    with served:
        visitor = Visitor(browser, f"http://127.0.0.1:{served.port}", tokens["Ann"])
        visitor.page.evaluate(
            """() => { const box = document.createElement("div");
            box.innerHTML = "<img src=x onerror='window.hit = 1'>"; document.body.append(box);
            const script = document.createElement("script"); script.textContent = "window.hit = 2";
            document.body.append(script); }"""
        )
        visitor.page.wait_for_timeout(300)
        assert visitor.page.evaluate("window.hit") is None
        assert any("Content Security Policy" in complaint for complaint in visitor.complaints)


def test_at_phone_width_and_for_a_screen_reader(browser: Any, tmp_path: Path) -> None:
    ranking = NewItem("ranking", "Rank these.", ("one", "two", "three"))
    items = (NewItem("pair", "Where is my parcel?", ANSWERS), ranking, NewItem("rating", "Rate this.", ("one",)))
    store, tokens, served = site(tmp_path, *items, overlap=1, name="Support answers")
    with served:
        phone = {"viewport": {"width": 375, "height": 740}, "device_scale_factor": 1, "has_touch": True}
        visitor = Visitor(browser, f"http://127.0.0.1:{served.port}", tokens["Ann"], **phone)
        page = visitor.page

        def fits() -> bool:
            return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

        def unnamed() -> list[str]:
            """Controls that a screen reader could not name."""
            script = """() => [...document.querySelectorAll("input:not([type=hidden]), select, textarea, button")]
                .filter(one => !(one.labels && one.labels.length) && !one.textContent.trim()
                               && !one.getAttribute("aria-label")).map(one => one.outerHTML)"""
            return list(page.evaluate(script))

        left, right = (page.get_by_role("region", name=f"{side} response").bounding_box() for side in ("Left", "Right"))
        assert right["y"] > left["y"] + left["height"] - 1, "below each other"
        assert fits() and unnamed() == []
        heads = [head.inner_text() for head in page.get_by_role("heading").all()]
        assert heads == ["Compare two responses", "Left", "Right"]
        assert page.get_by_role("radio").count() == 4
        assert all(box.bounding_box()["height"] >= 40 for box in page.locator("label.choice:visible").all())
        visitor.shot("labelling-phone")
        page.get_by_label("Both bad").tap()
        visitor.click("button", "Save Enter")
        assert fits() and unnamed() == []
        visitor.press("3", "1", "2", "Enter")
        assert fits() and unnamed() == []
        visitor.press("4", "4")
    pair_said, ranks_said, rating_said = judged(store)
    assert pair_said.value == {"choice": "both_bad"}
    placed = [ranks_said.value["ranks"][place] for place in ranks_said.shown]
    assert placed == [1, 2, 0], "the third response on the screen was pressed first"
    assert rating_said.value == {"rating": 4}


def test_shortcuts_can_be_turned_off_and_leave_typing_alone(browser: Any, tmp_path: Path) -> None:
    store, tokens, served = site(tmp_path, pair(1), pair(2), reasons=(), strength=False, overlap=1)
    with served:
        visitor = Visitor(browser, f"http://127.0.0.1:{served.port}", tokens["Ann"])
        page = visitor.page
        page.get_by_label("Keyboard shortcuts").uncheck()
        page.locator("main").press("1")
        page.wait_for_timeout(200)
        assert judged(store) == []
        page.reload()
        assert not page.get_by_label("Keyboard shortcuts").is_checked()
        page.get_by_label("Keyboard shortcuts").check()
        page.locator("main").click(position={"x": 5, "y": 5})
        visitor.press("1")  # nothing more is asked, so the choice is the answer
        assert len(judged(store)) == 1
