"""Annotators and leads, their tokens and their sessions. Only hashes of tokens are stored.

A token has 192 random bits, so its hash needs no salt and no slowing down.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Float, bindparam, select

from kedge.errors import InputError, Problem
from kedge.feedback import tables

Role = Literal["annotator", "lead"]
ROLES: tuple[Role, ...] = ("annotator", "lead")
SESSION_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Person:
    """Somebody who may log in.

    `attempt` numbers those of the calibration from 0; `granted` is the one at which a lead last let them begin anew.
    """

    id: int
    name: str
    role: Role
    active: bool
    passed: bool
    attempt: int
    granted: int


def add(connection: Connection, name: str, role: Role, now: float) -> str:
    """Add somebody and return their token, which is told this once. Raises InputError for a name that is taken."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise InputError(Problem("name", "must have 1 to 100 printable characters", "choose another"))
    table = tables.annotators
    if connection.execute(select(table.c.id).where(table.c.name == name)).first() is not None:
        raise InputError(Problem(name, "is already there", "choose another name, or give them a new token"))
    token = secrets.token_urlsafe(24)
    connection.execute(table.insert().values(name=name, role=role, token_hash=hashed(token), created=now))
    return token


def new_token(connection: Connection, name: str) -> str:
    """A new token in place of the old one, whose sessions end. Raises InputError where nobody has that name."""
    table, token = tables.annotators, secrets.token_urlsafe(24)
    found = connection.execute(select(table.c.id).where(table.c.name == name)).scalar()
    if found is None:
        raise InputError(Problem(name, "nobody has this name", "see kedge label annotator list"))
    connection.execute(table.update().where(table.c.id == found).values(token_hash=hashed(token)))
    connection.execute(tables.sessions.delete().where(tables.sessions.c.annotator == found))
    return token


def set_active(connection: Connection, number: int, *, active: bool) -> None:
    """Let somebody in, or shut them out at once."""
    table = tables.annotators
    connection.execute(table.update().where(table.c.id == number).values(active=active))
    if not active:
        connection.execute(tables.sessions.delete().where(tables.sessions.c.annotator == number))


def calibrate_again(connection: Connection, number: int) -> None:
    """Give somebody the calibration anew, with all its attempts."""
    table, done = tables.annotators, tables.assignments
    own = (done.c.annotator == number) & (done.c.purpose == "calibration")
    last = connection.execute(select(done.c.attempt).where(own).order_by(done.c.attempt.desc()).limit(1)).scalar()
    # What was answered stays; the attempts are counted on from there.
    first = 0 if last is None else last + 1
    connection.execute(table.update().where(table.c.id == number).values(passed=False, attempt=first, granted=first))


def people(connection: Connection) -> list[Person]:
    """Everybody, by name."""
    rows = connection.execute(select(*_COLUMNS).order_by(tables.annotators.c.name))
    return [Person(*row) for row in rows]


def log_in(connection: Connection, token: str, now: float) -> tuple[Person, str] | None:
    """Who has this token and the secret of a new session; None where nobody active has it."""
    table = tables.annotators
    row = connection.execute(select(*_COLUMNS).where(table.c.token_hash == hashed(token.strip()))).first()
    if row is None or not row.active:
        return None
    connection.execute(tables.sessions.delete().where(tables.sessions.c.expires < now))
    session = secrets.token_urlsafe(24)
    values = {"hash": hashed(session), "annotator": row.id, "expires": now + SESSION_SECONDS}
    connection.execute(tables.sessions.insert().values(values))
    return Person(*row), session


def who(connection: Connection, session: str, now: float) -> Person | None:
    """Whose session this is, if it has not ended."""
    row = connection.execute(_WHO, {"session": hashed(session), "now": now}).first()
    return Person(*row) if row is not None and row.active else None


def log_out(connection: Connection, session: str) -> None:
    """End a session."""
    connection.execute(tables.sessions.delete().where(tables.sessions.c.hash == hashed(session)))


def hashed(secret: str) -> str:
    """What is stored of a token or session."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


_COLUMNS = [tables.annotators.c[name] for name in ("id", "name", "role", "active", "passed", "attempt", "granted")]
_WHO = (
    select(*_COLUMNS)
    .join(tables.sessions, tables.sessions.c.annotator == tables.annotators.c.id)
    .where(tables.sessions.c.hash == bindparam("session"), tables.sessions.c.expires > bindparam("now", type_=Float))
)
