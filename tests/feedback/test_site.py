"""The site without a browser: who may what, forms and their tokens, headers, hostile text, pages of both roles."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from people_at_work import pair
from site_kit import Browser, Clock, begin, open_page
from sqlalchemy import select

from kedge.feedback import tables
from kedge.feedback.items import NewItem
from kedge.feedback.site.security import FAILURES, FAILURES_IN_ALL, WINDOW, Limiter
from kedge.feedback.store import Store

Make = Callable[..., Store]
PLAIN = {"gold_share": 0, "repeat_share": 0}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[a link](javascript:alert(1)) and **bold**",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "</pre></section><form action=/logout>",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "nul \0 escape \x1b[31m",
    "",
    "long " * 10_000,
)
PAGES_OF_LEADS = ("/lead", "/lead/queue", "/lead/guidelines", "/lead/people", "/lead/settings", "/lead/export")


class Elements(HTMLParser):
    """The elements of a page and the text that `pre` shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self._within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "pre":
            self._within = True
            self.shown.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = self._within and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._within:
            self.shown[-1] += data


def said(store: Store) -> list:
    return store.read(lambda c: list(c.execute(select(tables.judgments).order_by(tables.judgments.c.id))))


# Coming in


def test_nobody_sees_anything_without_a_token(sqlite_store: Make) -> None:
    store = sqlite_store()
    begin(store, pair(1))
    browser = Browser(store, Clock())
    for path in ("/", "/guidelines", "/calibration", *PAGES_OF_LEADS, "/lead/item/1", "/lead/export/file"):
        response = browser.get(path)
        assert response.url.path == "/login", path
        assert "Question 1" not in browser.page
    for path in ("/judge", "/undo", "/guidelines", "/lead/item/1", "/lead/people", "/lead/settings"):
        assert browser.post(path, csrf="x").status_code in (403, 200) and "Question" not in browser.page
    assert browser.log_in("wrong").status_code == 403
    assert said(store) == []


def test_roles(sqlite_store: Make) -> None:
    store = sqlite_store(**PLAIN)
    tokens = begin(store, pair(1))
    annotator = open_page(store, tokens["Ann"])
    for path in (*PAGES_OF_LEADS, "/lead/item/1", "/lead/export/file"):
        assert annotator.get(path).status_code == 403, path
    annotator.get("/")
    csrf = re.search(r'name="csrf" value="(\w+)"', annotator.page)[1]
    for path in ("/lead/people", "/lead/people/1", "/lead/settings", "/lead/guidelines", "/lead/item/1"):
        assert annotator.post(path, csrf=csrf, name="x", action="token", choice="left").status_code == 403, path
    lead = open_page(store, tokens["Lea"])
    assert lead.get("/").url.path == "/lead"
    assert lead.get("/guidelines").status_code == 403
    csrf = re.search(r'name="csrf" value="(\w+)"', lead.get("/lead/people").text)[1]
    assert lead.post("/judge", csrf=csrf, assignment="1", choice="left", key="k").status_code == 403
    assert said(store) == []


def test_the_cookie_is_kept_from_scripts_and_other_sites(sqlite_store: Make) -> None:
    store = sqlite_store()
    tokens = begin(store)
    browser = Browser(store, Clock())
    response = browser.client.post("/login", data={"token": tokens["Ann"]}, follow_redirects=False)
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    assert tokens["Ann"] not in cookie
    browser.client.base_url = "https://localhost"
    response = browser.client.post("/login", data={"token": tokens["Ann"]}, follow_redirects=False)
    assert "secure" in response.headers["set-cookie"].lower()


def test_logging_out_ends_the_session(sqlite_store: Make) -> None:
    store = sqlite_store()
    tokens = begin(store, pair(1))
    browser = open_page(store, tokens["Ann"])
    held = dict(browser.client.cookies)
    browser.get("/")
    browser.send("/logout")
    browser.client.cookies.update(held)
    assert browser.get("/").url.path == "/login"


def test_refused_logins_are_limited(sqlite_store: Make) -> None:
    store, clock = sqlite_store(), Clock()
    tokens = begin(store)
    browser = Browser(store, clock)
    for _ in range(FAILURES):
        assert browser.post("/login", token="wrong").status_code == 403
    refused = browser.post("/login", token=tokens["Ann"])
    assert (refused.status_code, refused.headers["retry-after"]) == (429, f"{WINDOW:.0f}")
    clock.now += WINDOW + 1
    assert browser.log_in(tokens["Ann"]).url.path == "/guidelines"


def test_many_addresses_are_limited_together() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    for number in range(FAILURES_IN_ALL):
        assert limiter.wait(f"10.0.0.{number}") == 0
        limiter.failed(f"10.0.0.{number}")
        clock.now += 0.1
    assert limiter.wait("10.9.9.9") > 0
    clock.now += WINDOW
    assert limiter.wait("10.9.9.9") == 0


# Forms


@pytest.mark.parametrize("token", [None, "", "0" * 64, "\u00e9"])
def test_a_form_without_its_token_changes_nothing(sqlite_store: Make, token: str | None) -> None:
    store = sqlite_store(**PLAIN)
    tokens = begin(store, pair(1))
    browser = open_page(store, tokens["Ann"])
    browser.get("/")
    fields = {} if token is None else {"csrf": token}
    assert browser.post("/judge", assignment="1", key="k", choice="left", **fields).status_code == 403
    assert said(store) == []


def test_a_token_of_another_session_does_not_fit(sqlite_store: Make) -> None:
    store = sqlite_store(**PLAIN)
    tokens = begin(store, pair(1), names=("Ann", "Bob"))
    ann, bob = (open_page(store, tokens[name]) for name in ("Ann", "Bob"))
    ann.get("/"), bob.get("/")
    csrf = re.search(r'name="csrf" value="(\w+)"', bob.page)[1]
    assert ann.send("/judge", choice="left", csrf=csrf).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example"}, 421),
        ({"content-length": "2000000"}, 413),
        ({"content-length": "x"}, 413),
    ],
)
def test_what_is_not_answered_at_all(sqlite_store: Make, headers: dict[str, str], status: int) -> None:
    store = sqlite_store()
    begin(store)
    client = Browser(store, Clock()).client
    assert client.post("/login", data={"token": "x"}, headers=headers).status_code == status


def test_a_body_that_does_not_say_its_length_is_cut_off(sqlite_store: Make) -> None:
    client = Browser(sqlite_store(), Clock()).client
    parts = (b"token=" if number == 0 else b"x" * 100_000 for number in range(30))
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/login", content=parts, headers=headers).status_code == 400


def test_other_names_are_answered_where_other_machines_are_allowed(sqlite_store: Make) -> None:
    store = sqlite_store()
    local, remote = (Browser(store, Clock(), any_host=allowed).client for allowed in (False, True))
    for host, answers in (("localhost:1", True), ("127.0.0.1:8765", True), ("[::1]:1", True), ("label.example", False)):
        assert (local.get("/login", headers={"host": host}).status_code == 200) == answers, host
        assert remote.get("/login", headers={"host": host}).status_code == 200


# Headers and hostile text


def test_every_answer_has_the_headers(sqlite_store: Make) -> None:
    store = sqlite_store()
    tokens = begin(store, pair(1))
    browser = open_page(store, tokens["Ann"])
    nonces = set()
    for path in ("/", "/guidelines", "/login", "/nowhere", "/lead", "/static/label.js", "/static/secret"):
        response = browser.client.get(path)
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert re.fullmatch(r"'nonce-[\w-]{20,}'", policy["script-src"]) and policy["form-action"] == "'self'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        nonces.add(policy["script-src"])
        elements = Elements(response.text) if "html" in response.headers["content-type"] else None
        if elements is not None:
            loaded = [attrs for tag, attrs in elements.found if tag in ("script", "link")]
            assert {f"'nonce-{attrs['nonce']}'" for attrs in loaded} == {policy["script-src"]}
            assert not any(name.startswith("on") or name == "style" for _, attrs in elements.found for name in attrs)
    assert len(nonces) == 7, "a nonce is used once"


def test_hostile_text_is_text_everywhere(sqlite_store: Make) -> None:
    store = sqlite_store(overlap=1, name="<b>name</b>", reasons=("<i>reason</i>",), **PLAIN)
    items = [
        NewItem("pair", text or "empty?", (text, f"other {place}"), origin=text[:50])
        for place, text in enumerate(HOSTILE)
    ]
    tokens = begin(store, *items, names=("<u>Ann</u>",))
    browser = open_page(store, tokens["<u>Ann</u>"])
    harmless = None
    for text in HOSTILE:
        browser.get("/")
        elements = Elements(browser.page)
        expected = text.replace("\0", "\u2400").replace("\x1b", "\u241b")
        assert expected.strip() == "" or sum(shown == expected for shown in elements.shown) == 2, text[:40]
        assert ("response is empty" in browser.page) == (text == "")
        tags = [tag for tag, _ in elements.found]
        kinds = {tag: tags.count(tag) for tag in tags if tag not in ("p", "pre")}
        harmless = harmless or kinds
        assert kinds == harmless, "the same elements whatever the text"
        browser.send("/judge", choice="left", reason="<i>reason</i>", note=text[:100], flagged="yes")
    lead = open_page(store, tokens["Lea"])
    for path in (*PAGES_OF_LEADS, *(f"/lead/item/{number + 1}" for number in range(len(HOSTILE)))):
        lead.get(path)
        tags = {tag for tag, _ in Elements(lead.page).found}
        assert not tags & {"b", "i", "u", "img"} and lead.page.count("<script") == 1, path


def test_annotators_learn_nothing_of_who_wrote_what(sqlite_store: Make) -> None:
    store = sqlite_store(**PLAIN)
    known = {"purpose": "gold", "answer": {"choice": 0}}
    hidden = pair(1, extra={"model_a": "secret-model"}, origin="secret-file.jsonl:3", **known)
    store.change(store.rules().settings.model_copy(update={"gold_share": 1.0}))
    tokens = begin(store, hidden)
    browser = open_page(store, tokens["Ann"])
    assert "Question 1?" in browser.page
    assert "secret" not in browser.page and "gold" not in browser.page


# An annotator's way


def test_labelling_with_forms_alone(sqlite_store: Make) -> None:
    store, clock = sqlite_store(overlap=1, **PLAIN), Clock()
    ranking = NewItem("ranking", "Rank.", ("one", "two", "three"))
    tokens = begin(store, pair(1), ranking, NewItem("rating", "Rate.", ("one",)), pair(2))
    browser = open_page(store, tokens["Ann"], clock)
    assert browser.page.index("Question 1?") < browser.page.index("Which response is better?")
    clock.now += 12
    browser.send("/judge", choice="right", strength="3", reason="safer", note="why not", active="9500")
    assert "1 by you, 12 s each" in browser.page
    browser.send("/judge", rank_0="2", rank_1="1", rank_2="2")
    browser.send("/judge", rating="4")
    browser.send("/judge", action="skip")
    assert "Nothing is left for you" in browser.page
    first, second, third, fourth = said(store)
    assert first.value == {"choice": first.shown[1]}
    assert (first.strength, first.reasons, first.note) == (3, ["safer"], "why not")
    assert (first.seconds, first.active) == (12, 9.5)
    assert second.value["ranks"][second.shown[1]] == 0
    assert sorted(second.value["ranks"]) == [0, 1, 1]
    assert (third.value, fourth.action, fourth.value) == ({"rating": 4}, "skip", None)
    browser.send("/undo")
    assert "Question 2?" in browser.page
    clock.now += 1
    browser.send("/undo")
    assert "Rate." in browser.page
    assert [row.action for row in said(store)][-2:] == ["undo", "undo"]


def test_the_same_page_sent_twice_is_one_answer(sqlite_store: Make) -> None:
    store = sqlite_store(overlap=1, **PLAIN)
    tokens = begin(store, pair(1), pair(2))
    browser = open_page(store, tokens["Ann"])
    page = browser.page
    for choice in ("left", "right"):
        browser.page = page
        assert browser.send("/judge", choice=choice).status_code == 200
    (only,) = said(store)
    assert only.value == {"choice": only.shown[0]}
    page = browser.get("/").text
    for _ in range(2):
        browser.page = page
        browser.send("/undo")
    assert [row.action for row in said(store)] == ["judge", "undo"]


def test_what_does_not_fit_is_said_on_the_page(sqlite_store: Make) -> None:
    store = sqlite_store(overlap=1, **PLAIN)
    tokens = begin(store, pair(1))
    browser = open_page(store, tokens["Ann"])
    page = browser.page
    assert browser.send("/judge").status_code == 422
    assert "Choose one of the answers." in browser.page and "Question 1?" in browser.page
    browser.page = page
    assert browser.send("/judge", choice="left", key="").status_code == 400
    browser.page = page
    assert browser.send("/judge", choice="left", assignment="99").status_code == 409
    browser.page = page
    assert browser.send("/undo").status_code == 409 and "nothing to undo" in browser.page
    browser.page = page
    assert browser.send("/undo", key="undo-99-0").status_code == 400


def test_calibration_by_pages(sqlite_store: Make) -> None:
    store = sqlite_store(threshold=1.0, attempts=2, overlap=1, **PLAIN)
    trial = NewItem("pair", "Two and two?", ("Four.", "Five."), "calibration", {"choice": 0}, "Two and two is four.")
    tokens = begin(store, pair(1), trial)
    browser = open_page(store, tokens["Ann"])

    def choose(right: bool) -> None:
        left = browser.page.index("Four.") < browser.page.index("Five.")
        browser.send("/judge", choice="left" if left == right else "right")

    assert "calibration" in browser.page and "/undo" not in browser.page
    choose(right=False)
    assert "attempts left: 1" in browser.page and "Two and two is four." in browser.page
    browser.get("/")
    choose(right=False)
    assert "no attempt is left" in browser.page
    browser.get("/")
    assert "not passed" in browser.page
    lead = open_page(store, tokens["Lea"])
    lead.get("/lead/people")
    lead.send(f"/lead/people/{1}", action="calibrate")
    browser.get("/")
    choose(right=True)
    assert "You passed" in browser.page
    browser.get("/")
    assert "Question 1?" in browser.page


# A lead's way


def test_a_lead_settles_what_annotators_disagree_on(sqlite_store: Make) -> None:
    store = sqlite_store(overlap=2, **PLAIN)
    tokens = begin(store, pair(1), pair(2), names=("Ann", "Bob"))
    for name, place in (("Ann", 0), ("Bob", 1)):
        browser = open_page(store, tokens[name])
        for _ in range(2):
            first = browser.page.index("First ") < browser.page.index("Second answer ")
            second_item = "Question 2?" in browser.page
            # They disagree on the first item and agree on the second.
            wanted = 0 if second_item else place
            browser.send("/judge", choice="left" if first == (wanted == 0) else "right")
    lead = open_page(store, tokens["Lea"])
    assert "4 of 4" in lead.get("/lead").text and "Krippendorff" in lead.page
    lead.get("/lead/queue")
    assert re.findall(r"/lead/item/(\d+)", lead.page) == ["1"]
    lead.get("/lead/item/1")
    assert "Ann" in lead.page and "Bob" in lead.page
    assert lead.send("/lead/item/1").status_code == 422
    lead.get("/lead/item/1")
    lead.send("/lead/item/1", choice="right", note="B is right")
    assert "Nothing waits" in lead.page
    assert lead.get("/lead/item/99").status_code == 404
    rows = lead.client.get("/lead/export/file").text.splitlines()
    assert len(rows) == 3
    assert sum('"adjudicated": true' in row for row in rows) == 1
    assert lead.get("/lead/export/file?shape=nonsense").status_code == 400
    assert lead.client.get("/lead/export/file?shape=argilla").headers["content-disposition"].endswith('argilla.json"')


def test_a_lead_manages_people_guidelines_and_settings(sqlite_store: Make) -> None:
    store = sqlite_store(**PLAIN)
    tokens = begin(store, pair(1))
    ann, lead = open_page(store, tokens["Ann"]), open_page(store, tokens["Lea"])
    lead.get("/lead/people")
    lead.send("/lead/people", name="Bob", role="annotator")
    token = re.search(r'id="token">([\w-]+)<', lead.page)[1]
    assert Browser(store, Clock()).log_in(token).url.path == "/guidelines"
    assert token not in lead.get("/lead/people").text
    assert lead.send("/lead/people", name="Bob", role="annotator").status_code == 400
    lead.get("/lead/people")
    lead.send("/lead/people/1", action="deactivate")
    assert ann.get("/").url.path == "/login"
    assert lead.send("/lead/people/2", action="deactivate").status_code == 400, "not themselves"
    lead.get("/lead/guidelines")
    lead.send("/lead/guidelines", text="Be fair.\r\nBe quick.")
    assert "version 2 is in force" in lead.page
    lead.send("/lead/guidelines", text="Be fair.\nBe quick.")
    assert "version 2 is in force" in lead.page, "the same text is no new version"
    lead.get("/lead/settings")
    values = {name: str(value) for name, value in store.rules().settings if name not in ("reasons", "strength")}
    lead.send("/lead/settings", **values | {"threshold": "0.9", "reasons": "a, b", "strength": "yes"})
    assert store.rules().settings.threshold == 0.9 and store.rules().settings.reasons == ("a", "b")
    assert lead.send("/lead/settings", **values | {"threshold": "2"}).status_code == 400
    assert store.rules().settings.threshold == 0.9
