"""Coming in and going out: the login by token, the logout, and the two static files."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from kedge.feedback import people
from kedge.feedback.site.context import COOKIE, Sent, Visiting, site_of, to
from kedge.feedback.site.render import STATIC, page, static_file

router = APIRouter()


@router.get("/login")
def login_page(request: Request) -> HTMLResponse:
    return _login(request, 200, "")


@router.post("/login")
def log_in(request: Request, token: Annotated[str, Form(max_length=200)] = "") -> Response:
    """Take a token for a session. Refused ones are counted, and nothing says why one was."""
    site = site_of(request)
    address = request.client.host if request.client else ""
    wait = site.limiter.wait(address)
    if wait > 0:
        answer = _login(request, 429, f"Too many attempts. Try again in {wait / 60:.0f} minutes.")
        answer.headers["retry-after"] = f"{wait:.0f}"
        return answer
    found = site.store.write(lambda connection: people.log_in(connection, token, site.clock()))
    if found is None:
        site.limiter.failed(address)
        return _login(request, 403, "This token is not known.")
    person, session = found
    response = to("/lead" if person.role == "lead" else "/")
    secure = request.url.scheme == "https"
    age = int(people.SESSION_SECONDS)
    response.set_cookie(COOKIE, session, max_age=age, httponly=True, samesite="strict", secure=secure)
    return response


@router.post("/logout")
def log_out(here: Visiting, form: Sent) -> Response:  # noqa: ARG001 (the form's token is checked)
    here.site.store.write(lambda connection: people.log_out(connection, here.session))
    response = to("/login")
    response.delete_cookie(COOKIE)
    return response


@router.get("/static/{name}")
def static(name: str) -> Response:
    """The script and the style sheet; their addresses change with their content."""
    if name not in STATIC:
        raise HTTPException(404)
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(static_file(name), media_type=STATIC[name], headers=headers)


def _login(request: Request, status: int, problem: str) -> HTMLResponse:
    context = {"name": site_of(request).store.rules().settings.name, "nonce": request.state.nonce, "person": None}
    return HTMLResponse(page("login.html", problem=problem, **context), status)
