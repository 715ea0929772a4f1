"""An annotator's pages: guidelines, calibration, and one item after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from sqlalchemy import Connection, Integer, bindparam, select

from kedge.feedback import tables
from kedge.feedback.assign import Gate, Task, decided, gate, hand_out, in_hand, latest_guidelines
from kedge.feedback.items import Unfit
from kedge.feedback.judge import Answer, Refused, Stored, calibration, right, submit, undo
from kedge.feedback.site.context import Annotating, Form, Sent, Visit, Visiting, to
from kedge.feedback.tally import Counts

router = APIRouter()

RECENT = 20  # events over which the time on task is averaged


_said = tables.judgments
_RECENT = (
    select(_said.c.id, _said.c.action, _said.c.seconds)
    .where(_said.c.annotator == bindparam("who", type_=Integer))
    .order_by(_said.c.id.desc())
    .limit(RECENT)
)


@dataclass(frozen=True)
class Progress:
    """What an annotator sees of their own work and of all."""

    done: int
    seconds: float | None  # a judgment, lately
    counts: Counts
    undo_key: str  # the same until something is stored: an undo sent twice from one page is one undo


@router.get("/")
def item_page(here: Visiting) -> Response:
    if here.person.role == "lead":
        return to("/lead")
    return _item(here)


@router.post("/judge")
def judge(here: Annotating, form: Sent) -> Response:
    """Store the answer, hand out the next item in the same transaction, and acknowledge both."""
    site, rules, now = here.site, here.site.store.rules(), here.site.clock()
    answer = _answer(form)
    if not answer.key:
        raise HTTPException(400, "This form is not one of ours.")
    assignment = form.whole("assignment") or 0

    def work(connection: Connection) -> Stored:
        stored = submit(connection, rules, here.person, assignment, answer, now)
        if stored.calibrated is None:
            hand_out(connection, rules, here.person, now)
        return stored

    try:
        stored = site.store.write(work)
    except Unfit as problem:
        return _item(here, status=422, notice=str(problem))
    except Refused as problem:
        return _item(here, status=409, notice=str(problem))
    return to("/" if stored.calibrated is None else "/calibration")


@router.post("/undo")
def take_back(here: Annotating, form: Sent) -> Response:
    rules, now = here.site.store.rules(), here.site.clock()
    key = form.get("key")[:64]
    if not key.startswith(f"undo-{here.person.id}-"):
        raise HTTPException(400, "This form is not one of ours.")
    try:
        here.site.store.write(lambda connection: undo(connection, rules, here.person, key, now))
    except Refused as problem:
        return _item(here, status=409, notice=str(problem))
    return to("/")


@router.get("/guidelines")
def guidelines_page(here: Annotating) -> Response:
    table, read = tables.guidelines, tables.readings

    def work(connection: Connection) -> tuple[Any, bool]:
        version = latest_guidelines(connection)
        row = connection.execute(select(table).where(table.c.version == version)).one()
        own = (read.c.annotator == here.person.id) & (read.c.version == version)
        return row, connection.execute(select(read).where(own)).first() is not None

    row, known = here.site.store.read(work)
    return here.page("guidelines.html", text=row.text, version=row.version, known=known)


@router.post("/guidelines")
def guidelines_read(here: Annotating, form: Sent) -> Response:
    """Note that somebody has read a version; a later one in the meantime will be shown next."""
    read, version = tables.readings, form.whole("version")

    def work(connection: Connection) -> None:
        own = (read.c.annotator == here.person.id) & (read.c.version == version)
        there = connection.execute(select(read).where(own)).first()
        if there is None and version is not None and 1 <= version <= latest_guidelines(connection):
            values = {"annotator": here.person.id, "version": version, "at": here.site.clock()}
            connection.execute(read.insert().values(values))

    here.site.store.write(work)
    return to("/")


@router.get("/calibration")
def calibration_page(here: Annotating) -> Response:
    """How the last attempt went, with the reasons that the lead gave."""
    rules = here.site.store.rules()
    attempt = here.person.attempt if here.person.passed else here.person.attempt - 1
    answered = here.site.store.read(lambda connection: calibration(connection, here.person, attempt))
    if not answered:
        return to("/")
    results = [
        {"item": item, "shown": shown, "right": right(rules, item, value), "said": value}
        for item, value, shown in answered
    ]
    share = sum(bool(one["right"]) for one in results) / len(results)
    left = rules.settings.attempts - (here.person.attempt - here.person.granted)
    return here.page(
        "calibration.html", results=results, share=share, threshold=rules.settings.threshold, left=max(0, left)
    )


def _item(here: Visit, status: int = 200, notice: str = "") -> Response:
    """The item in hand or the next one; what comes before it, where something does."""
    site, rules, now = here.site, here.site.store.rules(), here.site.clock()

    def look(connection: Connection) -> tuple[Gate, Task | None, Progress]:
        return gate(connection, rules, here.person), in_hand(connection, here.person, now), _progress(connection, here)

    state, task, progress = site.store.read(look)
    if state == "guidelines":
        return to("/guidelines")
    if state == "shut":
        return here.page("shut.html", status)
    if task is None:
        task = site.store.write(lambda connection: hand_out(connection, rules, here.person, now))
    if task is None:
        return here.page("nothing.html", status, progress=progress, notice=notice)
    return here.page("item.html", status, task=task, progress=progress, notice=notice, settings=rules.settings)


def _progress(connection: Connection, here: Visit) -> Progress:
    rows = connection.execute(_RECENT, {"who": here.person.id}).all()
    times = [row.seconds for row in rows if row.action == "judge"]
    seconds = sum(times) / len(times) if times else None
    key = f"undo-{here.person.id}-{rows[0].id if rows else 0}"
    return Progress(decided(connection, here.person), seconds, here.site.counts(connection), key)


def _answer(form: Form) -> Answer:
    """The answer as it was sent; whether it fits is for `judge.submit` to say."""
    given: dict[str, Any] | None = None
    if form.get("action", "judge") != "skip":
        ranks = [form.whole(f"rank_{place}") for place in range(len([1 for key, _ in form.fields if "rank_" in key]))]
        given = {"choice": form.get("choice"), "rating": form.whole("rating"), "ranks": ranks}
    strength = form.whole("strength")
    return Answer(
        key=form.get("key")[:64],
        given=given,
        strength=strength if strength in (1, 2, 3) else None,
        reasons=form.all("reason"),
        note=form.get("note"),
        flagged=form.get("flagged") == "yes",
        active=form.seconds("active"),
    )
