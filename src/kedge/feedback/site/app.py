"""The application: its pages, its guard, and what is answered when something goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from kedge.errors import InputError
from kedge.feedback.site import annotate, entry, lead, manage
from kedge.feedback.site.context import NotLoggedIn, Site
from kedge.feedback.site.render import page
from kedge.feedback.site.security import Guard
from kedge.feedback.store import Store


def create_app(store: Store, *, any_host: bool = False, clock: Callable[[], float] = time.time) -> FastAPI:
    """The site of this store. Unless `any_host`, it answers only under the names of this machine itself."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = Site(store, clock)
    app.add_middleware(Guard, any_host=any_host)
    for module in (entry, annotate, lead, manage):
        app.include_router(module.router)
    app.add_exception_handler(NotLoggedIn, _log_in)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(404, _refused)
    app.add_exception_handler(405, _refused)
    app.add_exception_handler(RequestValidationError, _not_found)
    app.add_exception_handler(InputError, _input)
    app.add_exception_handler(Exception, _failed)
    return app


def _log_in(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return RedirectResponse("/login", 303)


def _refused(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    reason = "There is no such page." if status in (404, 405) else str(getattr(error, "detail", ""))
    return _message(request, status, reason)


def _not_found(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return _message(request, 404, "There is no such page.")


def _input(request: Request, error: Exception) -> Response:
    problems = error.problems if isinstance(error, InputError) else ()
    return _message(request, 400, " ".join(f"{problem.where}: {problem.what}." for problem in problems))


def _failed(request: Request, error: Exception) -> Response:  # noqa: ARG001 (uvicorn logs it)
    return _message(request, 500, "Something went wrong. What you last saw acknowledged is kept; load the page again.")


def _message(request: Request, status: int, reason: str) -> HTMLResponse:
    context: dict[str, Any] = {"nonce": getattr(request.state, "nonce", ""), "name": "Labelling", "person": None}
    return HTMLResponse(page("message.html", reason=reason, **context), status)
