"""What every request goes through, and what every answer carries.

Model output is text in every template; a strict content policy is the second wall, should the first have a hole.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 1_000_000  # bytes of a form
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
WINDOW, FAILURES, FAILURES_IN_ALL = 300.0, 10, 200  # seconds; refused logins from one address, and from all


def policy(nonce: str) -> str:
    """The content policy of a page: our own script and style sheet, forms to ourselves, nothing else."""
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI middleware: refuses foreign hosts, foreign origins and large bodies; adds the headers.

    Unless `any_host`, only the names of this machine itself are answered, so that no page elsewhere can have its own
    name resolve to it.
    """

    def __init__(self, app: App, *, any_host: bool) -> None:
        self.app = app
        self.any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        scope.setdefault("state", {})["nonce"] = nonce
        headers = _headers(nonce)

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in headers if one[0] not in there)]
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await _plain(answer, *refused)
            return
        size = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, limited, answer)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, where the request is not answered at all."""
        given = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = given.get(b"host", "")
        if not self.any_host and _name(host) not in LOOPBACK:
            return 421, "This site answers under the name localhost only."
        if scope["method"] not in ("GET", "HEAD"):
            origin = given.get(b"origin")
            if origin is not None and origin.partition("://")[2] != host:
                return 403, "This form was sent from another site."
            if given.get(b"sec-fetch-site") in ("cross-site", "same-site"):
                return 403, "This form was sent from another site."
            length = given.get(b"content-length", "0")
            if not length.isdecimal() or int(length) > LARGEST_BODY:
                return 413, "The form is too large."
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _headers(nonce: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-security-policy", policy(nonce).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-store"),
    ]


async def _plain(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def csrf_token(session: str) -> str:
    """What a form of this session carries; only who can read our pages knows it."""
    return hmac.digest(session.encode(), b"csrf", "sha256").hex()


def csrf_fits(session: str, given: str) -> bool:
    """Whether a form was made for this session."""
    return hmac.compare_digest(csrf_token(session).encode(), given.encode("utf-8", "replace"))


class Limiter:
    """Counts refused logins of the last minutes, by address and in all."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._failed: deque[tuple[float, str]] = deque()

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0 where it may now."""
        now = self.clock()
        with self._lock:
            while self._failed and self._failed[0][0] <= now - WINDOW:
                self._failed.popleft()
            own = [at for at, who in self._failed if who == address]
            if len(own) >= FAILURES:
                return own[-FAILURES] + WINDOW - now
            if len(self._failed) >= FAILURES_IN_ALL:
                return self._failed[-FAILURES_IN_ALL][0] + WINDOW - now
            return 0.0

    def failed(self, address: str) -> None:
        """Count a refused login."""
        with self._lock:
            self._failed.append((self.clock(), address))
