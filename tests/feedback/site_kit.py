"""A site to test without a network, and what a browser without scripts would do on it."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from fastapi.testclient import TestClient
from people_at_work import fill

from kedge.feedback import people
from kedge.feedback.items import NewItem
from kedge.feedback.site.app import create_app
from kedge.feedback.store import Store

FIELD = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Browser:
    """Somebody at the site: follows redirects, keeps cookies, sends forms as they stand on the page."""

    def __init__(self, store: Store, clock: Clock, **options: Any) -> None:
        self.client = TestClient(create_app(store, clock=clock, **options), base_url="http://localhost")
        self.page = ""

    def get(self, path: str) -> Any:
        return self._read(self.client.get(path))

    def post(self, path: str, /, **fields: Any) -> Any:
        return self._read(self.client.post(path, data=fields))

    def send(self, path: str, /, **fields: Any) -> Any:
        """Send the form of the page that goes to `path`, its hidden fields and these."""
        form = next(form for form in re.findall(r"<form .*?</form>", self.page, re.DOTALL) if f'"{path}"' in form)
        hidden = {name: unescape(value) for name, value in FIELD.findall(form)}
        return self.post(path, **hidden | fields)

    def log_in(self, token: str) -> Any:
        self.get("/login")
        return self.post("/login", token=token)

    def _read(self, response: Any) -> Any:
        self.page = response.text
        return response


def begin(store: Store, *items: NewItem, names: tuple[str, ...] = ("Ann",)) -> dict[str, str]:
    """Tokens of the annotators named and of the lead "Lea"."""
    fill(store, *items)
    tokens = {name: store.write(lambda c, name=name: people.add(c, name, "annotator", 0.0)) for name in names}
    tokens["Lea"] = store.write(lambda c: people.add(c, "Lea", "lead", 0.0))
    return tokens


def open_page(store: Store, token: str, clock: Clock | None = None) -> Browser:
    """Somebody logged in who has read the guidelines."""
    browser = Browser(store, clock or Clock())
    browser.log_in(token)
    if 'action="/guidelines"' in browser.page:
        browser.send("/guidelines")
    return browser
