"""What the pages share: the store, the clock, who visits, and how a page is answered."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import Connection

from kedge.feedback import people
from kedge.feedback.people import Person
from kedge.feedback.site.render import page
from kedge.feedback.site.security import Limiter, csrf_fits, csrf_token
from kedge.feedback.store import Store
from kedge.feedback.tally import Counts, counts

COOKIE = "kedge_session"
FRESH_SECONDS = 5.0  # for which the progress of the whole job is taken as counted


class Site:
    """One labelling job being served."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.store = store
        self.clock = clock
        self.limiter = Limiter(clock)
        self._counting = threading.Lock()
        self._counts: tuple[float, Counts] | None = None

    def counts(self, connection: Connection) -> Counts:
        """How far the job is, a few seconds old at most."""
        with self._counting:
            now = self.clock()
            if self._counts is None or not 0 <= now - self._counts[0] < FRESH_SECONDS:
                self._counts = now, counts(connection)
            return self._counts[1]


class NotLoggedIn(Exception):
    """Nobody known visits; they are sent to the login."""


@dataclass(frozen=True)
class Visit:
    """A request of somebody who is logged in."""

    request: Request
    site: Site
    person: Person
    session: str

    def page(self, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        """A page with what every page needs."""
        common = {
            "name": self.site.store.rules().settings.name,
            "nonce": self.request.state.nonce,
            "csrf": csrf_token(self.session),
            "person": self.person,
            "key": new_key(),
        }
        return HTMLResponse(page(template, **common | context), status)


def new_key() -> str:
    """The key of a submission, given to the page that will send it."""
    return secrets.token_urlsafe(18)


def site_of(request: Request) -> Site:
    """The site that this request is to."""
    site: Site = request.app.state.site
    return site


def visit(request: Request) -> Visit:
    """Who visits. Raises NotLoggedIn."""
    site, session = site_of(request), request.cookies.get(COOKIE, "")
    person = site.store.read(lambda connection: people.who(connection, session, site.clock())) if session else None
    if person is None:
        raise NotLoggedIn
    return Visit(request, site, person, session)


def annotator_visit(here: Annotated[Visit, Depends(visit)]) -> Visit:
    """A visit of an annotator; leads know too much to be asked."""
    if here.person.role != "annotator":
        raise HTTPException(403, "Leads do not label: they see what others said.")
    return here


def lead_visit(here: Annotated[Visit, Depends(visit)]) -> Visit:
    """A visit of a lead."""
    if here.person.role != "lead":
        raise HTTPException(403, "This page is for leads.")
    return here


class Form:
    """The fields of a form; what a browser of ours would not send reads as absent."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self.fields = fields

    def get(self, name: str, default: str = "") -> str:
        """The last value of this name."""
        return next((value for key, value in reversed(self.fields) if key == name), default)

    def all(self, name: str) -> list[str]:
        """Every value of this name."""
        return [value for key, value in self.fields if key == name]

    def whole(self, name: str) -> int | None:
        """A whole number, or None."""
        text = self.get(name)
        return int(text) if text.isascii() and text.lstrip("-").isdecimal() and len(text) < 10 else None

    def seconds(self, name: str) -> float | None:
        """Milliseconds of the browser as seconds, or None."""
        number = self.whole(name)
        return None if number is None or number < 0 else number / 1000


async def read_form(request: Request) -> Form:
    """The form, once its CSRF token fits the session; every form but the login's goes through here."""
    fields = await request.form(max_files=0, max_fields=500)
    form = Form([(key, value) for key, value in fields.multi_items() if isinstance(value, str)])
    if not csrf_fits(request.cookies.get(COOKIE, ""), form.get("csrf")):
        raise HTTPException(403, "This page is too old. Load it again, then repeat what you did.")
    return form


Annotating = Annotated[Visit, Depends(annotator_visit)]
Leading = Annotated[Visit, Depends(lead_visit)]
Visiting = Annotated[Visit, Depends(visit)]
Sent = Annotated[Form, Depends(read_form)]


def to(path: str) -> RedirectResponse:
    """On to another page, by GET."""
    return RedirectResponse(path, 303)
