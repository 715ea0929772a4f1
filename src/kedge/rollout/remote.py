"""A reward from an HTTP endpoint: one POST per batch, tried again while the service is down or busy."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kedge.errors import InputError, Problem

if TYPE_CHECKING:
    import httpx

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second attempt, doubled from then on, and the most
LARGEST_ANSWER = 16 << 20  # bytes


@dataclass(frozen=True)
class Endpoint:
    """Where to POST `{"prompts": [...], "responses": [...]}`; `timeout` in seconds holds for each attempt."""

    name: str
    url: str
    timeout: float
    retries: int

    @property
    def address(self) -> str:
        """The URL without what may be secret in it: credentials and query."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}"

    def ask(self, prompts: list[str], responses: list[str]) -> Any:
        """The list that the service answers with, or that under "rewards"; what is in it is not checked.

        Tries again on connection errors and timeouts, status 429 and 5xx, and on nothing else. Raises `InputError`.
        """
        import httpx

        content = json.dumps({"prompts": prompts, "responses": responses}).encode()
        failure = ""
        with httpx.Client(timeout=self.timeout, headers={"content-type": "application/json"}) as client:
            for attempt in range(self.retries + 1):
                if attempt:
                    time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
                try:
                    status, body = self._posted(client, content)
                except httpx.TransportError as error:
                    failure = f"{type(error).__name__}: {error}".removesuffix(": ")
                    continue
                except (httpx.DecodingError, httpx.InvalidURL) as error:
                    raise self._refusal(f"gave no usable answer: {error}") from None
                if 200 <= status < 300:
                    return self._rewards(body)
                failure = f"status {status}{_said(body)}"
                if status != 429 and status < 500:
                    again = " (a redirect, which is not followed)" if 300 <= status < 400 else ""
                    raise self._refusal(f"answered attempt {attempt + 1} with {failure}{again}")
        attempts = f"{self.retries + 1} attempts" if self.retries else "1 attempt"
        raise self._refusal(f"gave no answer in {attempts}; the last: {failure}")

    def _posted(self, client: httpx.Client, content: bytes) -> tuple[int, bytes]:
        """Status and body. The client's timeout is for each read, so the whole answer is timed here."""
        import httpx

        deadline = time.monotonic() + self.timeout
        body = bytearray()
        with client.stream("POST", self.url, content=content, follow_redirects=False) as answer:
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > LARGEST_ANSWER:
                    raise self._refusal(f"answered with more than {LARGEST_ANSWER >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer took too long")
        return answer.status_code, bytes(body)

    def _rewards(self, body: bytes) -> Any:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise self._refusal(f"answered with what is not JSON{_said(body)}") from None
        rewards = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(rewards, list):
            raise self._refusal(f"answered without a list of rewards{_said(body)}")
        return rewards

    def _refusal(self, what: str) -> InputError:
        remedy = "look at the service, then go on with --resume from the last checkpoint"
        return InputError(Problem(f"rewards.{self.name}.url", f"{self.address} {what}", remedy))


def _said(body: bytes) -> str:
    """The beginning of an answer, for an error."""
    text = body[:200].decode(errors="replace")
    return f": {text[:80]!r}" if text else ""
