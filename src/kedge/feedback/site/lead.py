"""A lead's pages on what was said: the figures, the queue of disagreements, settling, and the exports."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, HTTPException, Query
from fastapi.responses import FileResponse, Response
from sqlalchemy import Connection, select

from kedge.errors import InputError, Problem
from kedge.feedback import tables
from kedge.feedback.exporting import ROWS, SHAPES, SUFFIXES, export
from kedge.feedback.items import KINDS, Kind, Unfit, item_of
from kedge.feedback.judge import adjudicate
from kedge.feedback.site.context import Leading, Sent, Visit, new_key, to

router = APIRouter(prefix="/lead")

SHOWN = 50  # items of the queue on a page

_items, _done, _said = tables.items, tables.assignments, tables.judgments


@router.get("")
def overview_page(here: Leading) -> Response:
    from kedge.feedback import figures  # brings SciPy, which takes a second that a server's start can do without

    rules, now = here.site.store.rules(), here.site.clock()
    found = here.site.store.read(lambda connection: figures.overview(connection, rules, now))
    return here.page("lead.html", found=found, few=figures.FEW)


@router.get("/queue")
def queue_page(here: Leading) -> Response:
    """Items whose judgments disagree, then those that somebody flagged, as long as they are not settled."""
    rows = here.site.store.read(lambda connection: _queue(connection, SHOWN))
    return here.page("queue.html", rows=rows, shown=SHOWN)


@router.get("/item/{number}")
def item_page(here: Leading, number: int) -> Response:
    return _item(here, number)


@router.post("/item/{number}")
def settle(here: Leading, number: int, form: Sent) -> Response:
    """Take the lead's word, then go on with the queue."""
    rules, now = here.site.store.rules(), here.site.clock()
    given: dict[str, Any] = {"choice": form.get("choice"), "rating": form.whole("rating")}
    key = form.get("key")[:64] or new_key()

    def work(connection: Connection) -> list[Any]:
        item = item_of(connection, number)
        if item is None:
            raise HTTPException(404)
        given["ranks"] = [form.whole(f"rank_{place}") for place in range(len(item.responses))]
        adjudicate(connection, rules, here.person, item, key, given, form.get("note"), now)
        return _queue(connection, 1)

    try:
        rest = here.site.store.write(work)
    except Unfit as problem:
        return _item(here, number, status=422, notice=str(problem))
    return to(f"/lead/item/{rest[0].id}" if rest else "/lead/queue")


@router.get("/export")
def export_page(here: Leading) -> Response:
    return here.page("export.html", shapes=SHAPES, kinds=KINDS, problem="")


@router.get("/export/file")
def export_file(
    here: Leading,
    after: BackgroundTasks,
    shape: Annotated[str, Query()] = "judgments",
    suffix: Annotated[str, Query()] = ".jsonl",
    kind: Annotated[str, Query()] = "",
    anonymous: Annotated[str, Query()] = "",
) -> Response:
    """A file to keep; it is made anew each time and removed here once it is sent."""
    folder = Path(tempfile.mkdtemp(prefix="kedge-export-"))

    def clear() -> None:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    ending = SUFFIXES.get(shape, (suffix,))[0]
    try:
        if ending not in (*ROWS, ".json"):
            raise InputError(Problem("suffix", "is not known"))
        name = folder / f"{shape if shape in SHAPES else 'export'}{ending}"
        chosen: Kind | None = next((one for one in KINDS if one == kind), None)
        export(here.site.store, name, shape=shape, kind=chosen, anonymous=anonymous == "yes")
    except InputError as error:
        clear()
        said = " ".join(f"{problem.what}. {problem.remedy}" for problem in error.problems)
        return here.page("export.html", 400, shapes=SHAPES, kinds=KINDS, problem=said)
    after.add_task(clear)
    return FileResponse(name, filename=name.name, background=after)


def _item(here: Visit, number: int, status: int = 200, notice: str = "") -> Response:
    def work(connection: Connection) -> Mapping[str, Any]:
        item = item_of(connection, number)
        if item is None:
            raise HTTPException(404)
        return {"item": item, "said": _said_of(connection, number), "words": _words_of(connection, number)}

    found = here.site.store.read(work)
    return here.page("settle.html", status, notice=notice, settings=here.site.store.rules().settings, found=found)


def _queue(connection: Connection, most: int) -> list[Any]:
    flagged = select(_said.c.item).join(_done, _done.c.judgment == _said.c.id)
    flagged = flagged.where(_said.c.flagged, _done.c.purpose == "task")
    there = _items.c.split | _items.c.id.in_(flagged)
    found = select(_items.c.id, _items.c.kind, _items.c.prompt, _items.c.split, _items.c.origin).where(
        there, ~_items.c.settled, _items.c.purpose == "task"
    )
    return list(connection.execute(found.order_by(_items.c.split.desc(), _items.c.id).limit(most)))


def _said_of(connection: Connection, number: int) -> list[Any]:
    people = tables.annotators
    found = (
        select(people.c.name, _said.c.value, _said.c.shown, _said.c.strength, _said.c.reasons, _said.c.note,
               _said.c.flagged, _said.c.seconds, _said.c.action, _done.c.purpose)
        .join(_done, _done.c.judgment == _said.c.id)
        .join(people, people.c.id == _said.c.annotator)
        .where(_said.c.item == number)
        .order_by(_said.c.id)
    )  # fmt: skip
    return list(connection.execute(found))


def _words_of(connection: Connection, number: int) -> list[Any]:
    table, people = tables.adjudications, tables.annotators
    found = select(people.c.name, table.c.value, table.c.note).join(people, people.c.id == table.c.lead)
    return list(connection.execute(found.where(table.c.item == number).order_by(table.c.id)))
