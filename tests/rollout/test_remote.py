"""A reward from a real HTTP server: slow, failing, wrong and right answers."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kedge.errors import InputError, Problem
from kedge.recipe.sections import Rule
from kedge.rollout import remote
from kedge.rollout.remote import Endpoint
from kedge.rollout.rules import rule_reward

Answer = tuple[int, bytes, dict[str, str]]
PROMPTS, RESPONSES = ["p", "é", "q"], ["one", "two\n", "\ud800 three"]


class Service:
    """A server whose answers a test writes down; the last one is repeated. `seen` holds what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer | Callable[[BaseHTTPRequestHandler], None]] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                service.seen.append(json.loads(body))
                service.headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = service.answers[min(len(service.seen), len(service.answers)) - 1]
                if callable(answer):
                    answer(self)
                    return
                status, content, headers = answer
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def reward(self, *, timeout: float = 5.0, retries: int = 3, url: str | None = None) -> Any:
        return rule_reward("judge", Rule(kind="http", url=url or self.url, timeout=timeout, retries=retries))

    def refused(self, **settings: Any) -> Problem:
        with pytest.raises(InputError) as caught:
            self.reward(**settings)(PROMPTS, RESPONSES)
        (problem,) = caught.value.problems
        assert problem.remedy
        assert len(str(problem)) < 500
        return problem


def saying(found: Any, status: int = 200, **headers: str) -> Answer:
    return status, found if isinstance(found, bytes) else json.dumps(found).encode(), headers


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    made = Service()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.mark.parametrize("found", [{"rewards": [1, -0.5, 2.5]}, [1, -0.5, 2.5], {"rewards": [1, -0.5, 2.5], "x": 1}])
def test_a_right_answer(service: Service, found: Any) -> None:
    service.answers = [saying(found)]
    assert service.reward()(PROMPTS, RESPONSES).tolist() == [1.0, -0.5, 2.5]
    assert service.seen == [{"prompts": PROMPTS, "responses": RESPONSES}]
    assert service.headers[0]["content-type"] == "application/json"


def test_an_answer_in_gzip(service: Service) -> None:
    service.answers = [saying(gzip.compress(b"[1, 2, 3]"), **{"content-encoding": "gzip"})]
    assert service.reward()(PROMPTS, RESPONSES).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_service_that_is_down_twice_is_asked_again(
    service: Service, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    service.answers = [saying("no", status), saying("no", status), saying([1, 2, 3])]
    assert service.reward()(PROMPTS, RESPONSES).tolist() == [1.0, 2.0, 3.0]
    assert len(service.seen) == 3
    assert waits == [0.01, 0.02], "each wait is twice the one before"


def test_a_connection_that_breaks_is_made_again(service: Service) -> None:
    service.answers = [lambda handler: handler.connection.close(), saying([1, 2, 3])]
    assert service.reward()(PROMPTS, RESPONSES).tolist() == [1.0, 2.0, 3.0]


def test_a_service_that_stays_down(service: Service) -> None:
    service.answers = [saying("overloaded", 503)]
    problem = service.refused(retries=2)
    assert problem.where == "rewards.judge.url"
    assert problem.what == f"{service.url} gave no answer in 3 attempts; the last: status 503: '\"overloaded\"'"
    assert "--resume" in problem.remedy
    assert len(service.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_request_that_is_refused_is_not_repeated(service: Service, status: int) -> None:
    service.answers = [saying(b"wrong key", status), saying([1, 2, 3])]
    problem = service.refused()
    assert f"answered attempt 1 with status {status}: 'wrong key'" in problem.what
    assert len(service.seen) == 1


def test_a_redirect_is_not_followed(service: Service) -> None:
    service.answers = [saying(b"", 302, location="http://127.0.0.1:9/elsewhere"), saying([1, 2, 3])]
    problem = service.refused()
    assert "status 302 (a redirect, which is not followed)" in problem.what
    assert len(service.seen) == 1


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)
    handler.close_connection = True


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Byte by byte, each well within a timeout on single reads."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for byte in b"[1, 2, 3]" + b" " * 40:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize(("answer", "what"), [(slow, "ReadTimeout"), (dripping, "took too long")])
def test_a_slow_answer(service: Service, answer: Any, what: str) -> None:
    service.answers = [answer]
    began = time.monotonic()
    problem = service.refused(timeout=0.2, retries=1)
    assert time.monotonic() - began < 2
    assert "gave no answer in 2 attempts" in problem.what and what in problem.what


def test_a_slow_answer_may_be_followed_by_a_quick_one(service: Service) -> None:
    service.answers = [slow, saying([1, 2, 3])]
    assert service.reward(timeout=0.3)(PROMPTS, RESPONSES).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (b"<html>hello", "what is not JSON: '<html>hello'"),
        (b"", "what is not JSON"),
        (b"\xff\xfe\x00", "what is not JSON"),
        (b"[" * 200_000, "what is not JSON"),
        ({"scores": [1, 2, 3]}, "without a list of rewards"),
        ("text", "without a list of rewards"),
        ({"rewards": {"a": 1}}, "without a list of rewards"),
        ([1, 2], "returned 2 numbers for 3 responses"),
        ([1, 2, 3, 4], "returned 4 numbers for 3 responses"),
        (b"[1, NaN, 3]", "returned nan for row 1 of 3"),
        (b"[1, 1e999, 3]", "returned inf for row 1 of 3"),
        ([1, 2, "3"], "returned '3' for row 2 of 3"),
        ([None, 2, 3], "returned None for row 0 of 3"),
        ([[1], [2], [3]], "returned [1] for row 0 of 3"),
    ],
)
def test_a_wrong_answer_is_refused_at_once(service: Service, found: Any, what: str) -> None:
    service.answers = [saying(found)]
    assert what in service.refused().what
    assert len(service.seen) == 1


def test_an_answer_that_is_not_what_it_says(service: Service) -> None:
    service.answers = [saying(b"not gzip", **{"content-encoding": "gzip"})]
    assert "gave no usable answer" in service.refused().what


def test_an_answer_without_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGEST_ANSWER", 1 << 20)
    service.answers = [saying(b" " * (1 << 21))]
    assert "more than 1 MiB" in service.refused().what


def test_nobody_listens(service: Service) -> None:
    service.server.server_close()
    problem = service.refused(retries=0)
    assert "gave no answer in 1 attempt; the last: ConnectError" in problem.what


def test_credentials_are_used_but_not_told(service: Service) -> None:
    secret = service.url.replace("http://", "http://user:hush@") + "?key=quiet"
    service.answers = [saying([1, 2, 3]), saying(b"no", 403)]
    service.reward(url=secret)(PROMPTS, RESPONSES)
    assert service.headers[0]["authorization"].startswith("Basic ")
    problem = service.refused(url=secret)
    assert "hush" not in str(problem) and "quiet" not in str(problem) and "user" not in str(problem)
    assert service.url in problem.what


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://a.example/x?y=1#z", "https://a.example/x"),
        ("http://u:p@[::1]:8080/", "http://[::1]:8080/"),
        ("http://u:p%40@host", "http://host"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert Endpoint("judge", url, 1.0, 0).address == address
