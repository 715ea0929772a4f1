"""A lead's pages on how the job is run: guidelines, people, settings."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from sqlalchemy import Connection, select

from kedge.errors import InputError
from kedge.feedback import people, tables
from kedge.feedback.assign import latest_guidelines
from kedge.feedback.settings import Settings, parse
from kedge.feedback.site.context import Leading, Sent, Visit, to

router = APIRouter(prefix="/lead")

LONGEST_GUIDELINES = 200_000


@router.get("/guidelines")
def guidelines_page(here: Leading) -> Response:
    table = tables.guidelines
    rows = here.site.store.read(lambda connection: list(connection.execute(select(table).order_by(table.c.version))))
    return here.page("lead_guidelines.html", versions=rows[::-1])


@router.post("/guidelines")
def publish(here: Leading, form: Sent) -> Response:
    """A new version, which everybody reads before their next item; the old ones stay."""
    text = form.get("text").replace("\r\n", "\n")[:LONGEST_GUIDELINES]

    def work(connection: Connection) -> None:
        version = latest_guidelines(connection)
        held = connection.execute(select(tables.guidelines.c.text).where(tables.guidelines.c.version == version))
        if held.scalar_one() != text:
            values = {"version": version + 1, "text": text, "author": here.person.id, "at": here.site.clock()}
            connection.execute(tables.guidelines.insert().values(values))

    here.site.store.write(work)
    return to("/lead/guidelines")


@router.get("/people")
def people_page(here: Leading) -> Response:
    return _people(here)


@router.post("/people")
def add_person(here: Leading, form: Sent) -> Response:
    """Add somebody; their token is on the answer alone."""
    role: people.Role = "lead" if form.get("role") == "lead" else "annotator"
    name = " ".join(form.get("name").split())
    try:
        token = here.site.store.write(lambda connection: people.add(connection, name, role, here.site.clock()))
    except InputError as error:
        return _people(here, 400, problem=" ".join(f"{one.where} {one.what}." for one in error.problems))
    return _people(here, token=token, whose=name)


@router.post("/people/{number}")
def change_person(here: Leading, number: int, form: Sent) -> Response:
    """Shut somebody out, let them in, give them a new token or the calibration anew."""
    action = form.get("action")
    there = {one.id: one for one in here.site.store.read(people.people)}
    if number not in there or action not in ("activate", "deactivate", "token", "calibrate"):
        raise HTTPException(404)
    if action == "deactivate" and number == here.person.id:
        return _people(here, 400, problem="You cannot shut yourself out.")

    def work(connection: Connection) -> str:
        if action == "token":
            return people.new_token(connection, there[number].name)
        if action == "calibrate":
            people.calibrate_again(connection, number)
        else:
            people.set_active(connection, number, active=action == "activate")
        return ""

    token = here.site.store.write(work)
    return _people(here, token=token, whose=there[number].name)


@router.get("/settings")
def settings_page(here: Leading) -> Response:
    return _settings(here, here.site.store.rules().settings)


@router.post("/settings")
def change_settings(here: Leading, form: Sent) -> Response:
    given = [f"{key}={form.get(key)}" for key in Settings.model_fields if key != "strength"]
    given.append(f"strength={'true' if form.get('strength') == 'yes' else 'false'}")
    try:
        settings = parse(given)
    except InputError as error:
        problem = " ".join(f"{one.where.removeprefix('--set ')}: {one.what}." for one in error.problems)
        return _settings(here, here.site.store.rules().settings, 400, problem)
    here.site.store.change(settings)
    return to("/lead/settings")


def _people(here: Visit, status: int = 200, *, token: str = "", whose: str = "", problem: str = "") -> Response:
    limit = here.site.store.rules().settings.attempts
    everybody = here.site.store.read(people.people)
    return here.page("people.html", status, people=everybody, token=token, whose=whose, problem=problem, attempts=limit)


def _settings(here: Visit, settings: Settings, status: int = 200, problem: str = "") -> Response:
    fields = [(key, getattr(settings, key), field.description) for key, field in Settings.model_fields.items()]
    return here.page("settings.html", status, fields=fields, problem=problem)
