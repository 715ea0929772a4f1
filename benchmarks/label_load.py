"""The labelling site under load, its server killed at random: is every acknowledged judgment there, and none twice?

Two hundred annotators with two seconds of thought each label for a minute while the server gets SIGKILL five times and
is started again. An annotator whose answer was not acknowledged sends the same form again, as a browser's reload does.
Server and annotators share the machine. Writes docs/results/label-load.json and .md:

    python benchmarks/label_load.py --out runs/label-load [--postgres URL]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import func, select

from kedge.feedback import people, tables
from kedge.feedback.items import NewItem, add_items
from kedge.feedback.settings import Settings
from kedge.feedback.store import Store

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
HIDDEN = re.compile(rb'<input type="hidden" name="(\w+)" value="([^"]*)">')
PATIENCE = 300.0  # seconds an annotator goes on trying


@dataclass
class Plan:
    """How much load, for how long, how many kills."""

    annotators: int = 200
    seconds: float = 60.0
    think: float = 2.0  # mean, evenly from half to one and a half of it
    kills: int = 5
    overlap: int = 2
    seed: int = 0


@dataclass
class Seen:
    """What the annotators saw: seconds of every answered request, keys that were acknowledged, requests that failed."""

    posts: list[float] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    failed: int = 0
    odd: list[str] = field(default_factory=list)


class Server:
    """`kedge label serve` in a process of its own."""

    def __init__(self, place: str) -> None:
        self.place = place
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None
        self.cpu = 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "kedge.cli", "label", "serve", self.place, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Return once it answers."""
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/login")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the site did not answer")

    def kill(self) -> None:
        assert self.process is not None
        self.cpu += cpu_seconds(self.process.pid)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def cpu_seconds(process: int) -> float:
    """User and system seconds of a process, where the system tells."""
    try:
        parts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


class Annotator:
    """One annotator: a connection, a session, an item in hand."""

    def __init__(self, number: int, token: str, port: int, seen: Seen, rng: random.Random) -> None:
        self.number, self.token, self.port, self.seen, self.rng = number, token, port, seen, rng
        self.cookie = ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, fields: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body. Raises OSError or EOFError where the server is gone."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        body = urlencode(fields or {}).encode() if method == "POST" else b""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/x-www-form-urlencoded"] if body else []
        lines += [f"Cookie: {self.cookie}"] if self.cookie else []
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        if "set-cookie" in headers:
            self.cookie = re.search(r"set-cookie: ([^;\r]+)", head, re.IGNORECASE)[1]  # type: ignore[index]
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        return int(head.split(" ", 2)[1]), content

    async def patiently(
        self, method: str, path: str, fields: dict[str, str] | None, times: list[float]
    ) -> tuple[int, bytes]:
        """The same request until it is answered; only the answered one is timed."""
        until = time.monotonic() + PATIENCE
        while True:
            began = time.monotonic()
            try:
                answer = await self.request(method, path, fields)
            except (OSError, EOFError):
                self.drop()
                self.seen.failed += 1
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.5 + self.rng.random())  # nobody reloads a page faster
                continue
            times.append(time.monotonic() - began)
            return answer

    def drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def come(self) -> None:
        """Log in and read the guidelines, before the clock runs."""
        await self.patiently("POST", "/login", {"token": self.token}, [])
        _, page = await self.patiently("GET", "/guidelines", None, [])
        await self.patiently("POST", "/guidelines", hidden(page), [])

    async def label(self, until: float, think: float) -> None:
        await asyncio.sleep(self.rng.random() * think)
        while time.monotonic() < until:
            status, page = await self.patiently("GET", "/", None, self.seen.gets)
            fields = hidden(page)
            if status != 200 or "assignment" not in fields:
                self.seen.odd.append(f"GET {status}")
                return
            await asyncio.sleep(think * (0.5 + self.rng.random()))
            fields |= {"choice": self.rng.choice(("left", "right", "tie")), "action": "judge"}
            status, _ = await self.patiently("POST", "/judge", fields, self.seen.posts)
            if status == 303:
                self.seen.acknowledged.append(fields["key"])
            else:
                self.seen.odd.append(f"POST {status}")


def hidden(page: bytes) -> dict[str, str]:
    """The hidden fields of the first form that has an assignment, or of the only one."""
    forms = re.findall(rb"<form .*?</form>", page, re.DOTALL)
    wanted = [form for form in forms if b'"assignment"' in form] or [form for form in forms if b'"version"' in form]
    return {name.decode(): value.decode() for name, value in HIDDEN.findall(wanted[0])} if wanted else {}


async def killer(server: Server, plan: Plan, began: float, rng: random.Random) -> list[float]:
    """Kill the server at random times and start it again; returns for how long it did not answer each time."""
    outages = []
    for at in sorted(rng.uniform(0.05, 0.9) * plan.seconds for _ in range(plan.kills)):
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        down = time.monotonic()
        await asyncio.to_thread(server.kill)
        server.start()
        await asyncio.to_thread(server.wait)
        outages.append(time.monotonic() - down)
    return outages


async def work(server: Server, tokens: list[str], plan: Plan) -> tuple[Seen, list[float]]:
    seen, rng = Seen(), random.Random(plan.seed)
    crowd = [
        Annotator(number, token, server.port, seen, random.Random(f"{plan.seed}-{number}"))
        for number, token in enumerate(tokens)
    ]
    for annotator in crowd:
        await annotator.come()
    began = time.monotonic()
    labelling = [annotator.label(began + plan.seconds, plan.think) for annotator in crowd]
    outages, *_ = await asyncio.gather(killer(server, plan, began, rng), *labelling)
    for annotator in crowd:
        annotator.drop()
    return seen, outages


def prepare(place: str, plan: Plan) -> list[str]:
    """A new store with enough items, and the annotators' tokens."""
    store = Store.create(place, Settings(overlap=plan.overlap, name="Load"))
    wanted = int(plan.annotators * (plan.seconds / plan.think + 5) / plan.overlap)
    words = "A response of some length, as a model would write it. " * 6
    items = (
        NewItem("pair", f"Question {number}?", (f"{number} {words}", f"{number} {words}{words}"))
        for number in range(wanted)
    )
    settings = store.rules().settings
    store.write(lambda connection: add_items(connection, items, settings))
    tokens = [
        store.write(lambda connection, number=number: people.add(connection, f"annotator {number}", "annotator", 0.0))
        for number in range(plan.annotators)
    ]
    store.close()
    return tokens


def verdict(place: str, seen: Seen) -> dict[str, Any]:
    """What the store holds beside what was acknowledged."""
    store = Store.open(place)
    said, done = tables.judgments, tables.assignments
    keys = store.read(lambda c: c.execute(select(said.c.key).where(said.c.action == "judge")).scalars().all())
    counting = select(done.c.item, done.c.annotator).where(done.c.judgment.is_not(None), done.c.purpose == "task")
    pairs = store.read(lambda c: c.execute(counting).all())
    most = select(func.count()).where(done.c.purpose == "task", done.c.state == "judged").group_by(done.c.item)
    crowded = store.read(lambda c: max(c.execute(most).scalars().all(), default=0))
    store.close()
    return {
        "stored": len(keys),
        "lost": len(set(seen.acknowledged) - set(keys)),
        "twice": len(keys) - len(set(keys)) + len(pairs) - len(set(map(tuple, pairs))),
        "most_on_an_item": crowded,
    }


def quantile(times: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(times)[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


def measure(place: str, plan: Plan) -> dict[str, Any]:
    """One run."""
    tokens = prepare(place, plan)
    server = Server(place)
    server.start()
    server.wait()
    loads = [os.getloadavg()[0]]
    try:
        seen, outages = asyncio.run(work(server, tokens, plan))
        loads.append(os.getloadavg()[0])
    finally:
        server.kill()
    both = seen.posts + seen.gets
    return {
        "plan": vars(plan),
        "requests": len(both),
        "acknowledged": len(seen.acknowledged),
        "failed_and_sent_again": seen.failed,
        "odd": seen.odd,
        "p50_ms": quantile(both, 0.5),
        "p95_ms": quantile(both, 0.95),
        "p99_ms": quantile(both, 0.99),
        "post_p95_ms": quantile(seen.posts, 0.95),
        "get_p95_ms": quantile(seen.gets, 0.95),
        "server_cpu_ms_a_request": 1000 * server.cpu / max(1, len(both)),
        "outages_s": outages,
        "load_average": loads,
    } | verdict(place, seen)


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version()}


def render(results: dict[str, Any]) -> str:
    """The page; every number in it comes from `results`."""
    lines = ["# The labelling site under load", ""]
    lines += ["Made by `python benchmarks/label_load.py`; raw figures in `label-load.json`.", ""]
    lines += [
        f"{results['machine']['cores']} cores, shared by the server, all annotators and whatever else ran; Python "
        f"{results['machine']['python']}. The load average is the whole machine's: where it is above the number of "
        "cores, waiting for a core is part of every time below.",
        "",
    ]
    head = ["", *results["runs"]]
    lines += ["| " + " | ".join(head) + " |", "|" + "--|" * len(head)]

    def row(title: str, show: Any) -> None:
        lines.append(f"| {title} | " + " | ".join(show(run) for run in results["runs"].values()) + " |")

    row("annotators, seconds of thought", lambda run: f"{run['plan']['annotators']}, {run['plan']['think']:g}")
    row("seconds, kills", lambda run: f"{run['plan']['seconds']:g}, {run['plan']['kills']}")
    row("judgments acknowledged", lambda run: f"{run['acknowledged']:,}")
    row("of them lost", lambda run: str(run["lost"]))
    row("stored twice", lambda run: str(run["twice"]))
    row("most annotators on an item (overlap)", lambda run: f"{run['most_on_an_item']} ({run['plan']['overlap']})")
    row("requests answered", lambda run: f"{run['requests']:,}")
    row("failed by a kill, and sent again", lambda run: f"{run['failed_and_sent_again']:,}")
    row("median, ms", lambda run: f"{run['p50_ms']:.0f}")
    row("p95, ms", lambda run: f"{run['p95_ms']:.0f}")
    row("p99, ms", lambda run: f"{run['p99_ms']:.0f}")
    row("p95 of answers, ms", lambda run: f"{run['post_p95_ms']:.0f}")
    row("p95 of pages, ms", lambda run: f"{run['get_p95_ms']:.0f}")
    row("server CPU a request, ms", lambda run: f"{run['server_cpu_ms_a_request']:.1f}")
    row("seconds until answered again", lambda run: ", ".join(f"{one:.1f}" for one in run["outages_s"]) or "–")
    row("load average", lambda run: " to ".join(f"{one:.1f}" for one in run["load_average"]))
    said = "Times are of requests that were answered, also of those that waited for a server that had just come back."
    lines += ["", said]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/label-load"))
    parser.add_argument("--postgres", metavar="URL", help="an empty PostgreSQL database, measured as well")
    parser.add_argument("--annotators", type=int, default=Plan.annotators)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--dry", action="store_true", help="print only; leave docs/results alone")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.out.glob("labels*"):
        path.unlink()
    plans = {"SQLite": Plan(given.annotators, given.seconds)}
    plans["SQLite, no kills"] = Plan(given.annotators, given.seconds, kills=0)
    runs = {}
    for number, (name, plan) in enumerate(plans.items()):
        runs[name] = measure(str(given.out / f"labels-{number}.db"), plan)
    if given.postgres:
        runs["PostgreSQL"] = measure(given.postgres, plans["SQLite"])
    result = {"machine": machine(), "runs": runs}
    if not given.dry:
        (RESULTS / "label-load.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "label-load.md").write_text(render(result), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
