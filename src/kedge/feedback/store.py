"""Opening a store of judgments and working in its transactions: SQLite in a file, PostgreSQL by URL.

In SQLite a transaction that writes takes the lock when it begins (BEGIN IMMEDIATE), so none fails half-way. Writers of
one process queue up here rather than in SQLite, whose own waiting sleeps in steps of up to 100 ms, and those that wait
share one commit: waiting for the disk is most of what a small transaction costs.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from kedge.errors import InputError, Problem
from kedge.feedback import migrate, tables
from kedge.feedback.settings import Settings, build

T = TypeVar("T")

BUSY_SECONDS = 30.0  # for which one process waits for another that writes
RETRIES = 8
LOST_RACES = {"40001", "40P01", "23505"}  # serialisation, deadlock, and two who insert the same
WRITES = {"kedge_writes": True}
FRESH_SECONDS = 5.0  # for which the rules are taken as read: another process may change them


@dataclass(frozen=True)
class Rules:
    """What handing out and counting go by.

    `secret` keys what annotators must not foretell: side order, hidden gold and repeats.
    """

    settings: Settings
    secret: bytes


class Job:
    """Work that waits for its turn to write, and what came of it."""

    def __init__(self, work: Callable[[Connection], Any]) -> None:
        self.work = work
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None

    def run(self, connection: Connection) -> None:
        """Do the work within a savepoint of its own, so that its failure undoes nobody else's."""
        self.value = self.error = None
        try:
            with connection.begin_nested():
                self.value = self.work(connection)
        except Exception as error:
            if isinstance(error, DBAPIError) and _lost_race(error):
                raise
            self.error = error


class Store:
    """One labelling job. `place` is how it is named in errors, without a password."""

    def __init__(self, engine: Engine, place: str) -> None:
        self.engine = engine
        self.place = place
        self._turn = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._shares = engine.dialect.name == "sqlite"  # one writer at a time, so they had better share commits
        self._writes = engine.execution_options(**WRITES)
        self._rules: tuple[float, Rules] | None = None

    @classmethod
    def create(cls, place: str | Path, settings: Settings) -> Store:
        """A new store with these settings. Raises InputError where there is one, or none can be made."""
        url = _url(place)
        if url.database and url.get_backend_name() == "sqlite":
            _refuse_taken(Path(url.database))
        store = cls(_engine(url), _named(url))
        store._reached(lambda: store.make(settings))
        return store

    @classmethod
    def open(cls, place: str | Path) -> Store:
        """The store at a path or URL, its tables brought up to date.

        Raises InputError where there is none, where a newer Kedge wrote it, or where it cannot be reached.
        """
        url = _url(place)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise InputError(Problem(str(place), "there is no such file", "make it with kedge label init"))
        store = cls(_engine(url), _named(url))
        found = store._reached(lambda: store.read(migrate.version))
        if found != tables.VERSION:
            store._reached(lambda: store.write(lambda connection: migrate.upgrade(connection, store.place)))
        return store

    def make(self, settings: Settings) -> None:
        """Make the tables of a new store in an empty database."""

        def work(connection: Connection) -> None:
            migrate.create(connection, self.place)
            _put(connection, "settings", settings.model_dump())
            _put(connection, "secret", secrets.token_hex(32))
            connection.execute(tables.guidelines.insert().values(version=1, text="", at=time.time()))

        self.write(work)

    def read(self, work: Callable[[Connection], T]) -> T:
        """`work` in a transaction that only reads."""
        with self.engine.begin() as connection:
            return work(connection)

    def write(self, work: Callable[[Connection], T]) -> T:
        """`work` in a transaction; done again from its beginning where it lost a race, so it must have no effects
        but those in the database."""
        if not self._shares:
            return self._tried(work)
        job = Job(work)
        self._waiting.append(job)
        with self._turn:
            if not job.done:  # nobody took it along
                self._commit(job)
        if job.error is not None:
            raise job.error
        result: T = job.value
        return result

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()

    def rules(self) -> Rules:
        """The settings and the secret, at most `FRESH_SECONDS` old."""
        if self._rules is None or time.monotonic() - self._rules[0] > FRESH_SECONDS:
            self._rules = time.monotonic(), self.read(rules_of)
        return self._rules[1]

    def change(self, settings: Settings) -> None:
        """Replace the settings."""
        self.write(lambda connection: _put(connection, "settings", settings.model_dump()))
        self._rules = None

    def _commit(self, own: Job) -> None:
        """Do all the work that waits in one transaction."""
        batch = []
        while self._waiting:
            batch.append(self._waiting.popleft())
        if own not in batch:  # whoever took it was interrupted
            batch.append(own)
        try:
            self._tried(lambda connection: _run(batch, connection))
        except Exception as error:
            for job in batch:
                job.error = error
        for job in batch:
            job.done = True

    def _tried(self, work: Callable[[Connection], T]) -> T:
        for attempt in range(RETRIES):
            try:
                with self._writes.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                if attempt + 1 == RETRIES or not _lost_race(error):
                    raise
                time.sleep(0.005 * 2**attempt * (0.5 + secrets.randbelow(100) / 100))
        raise AssertionError("unreachable")

    def _reached(self, work: Callable[[], T]) -> T:
        """`work`, with what the database refuses said in one line."""
        try:
            return work()
        except DBAPIError as error:
            why = (str(error.orig).splitlines() or [type(error.orig).__name__])[0]
            self.close()
            raise InputError(Problem(self.place, f"cannot be opened: {why}", "check the path or URL")) from None


def _run(batch: list[Job], connection: Connection) -> None:
    for job in batch:
        job.run(connection)


def rules_of(connection: Connection) -> Rules:
    """The rules of the store that this connection is to."""
    settings = build(_get(connection, "settings"), "settings of the store: ")
    return Rules(settings, bytes.fromhex(_get(connection, "secret")))


def _get(connection: Connection, key: str) -> Any:
    table = tables.settings
    return connection.execute(select(table.c.value).where(table.c.key == key)).scalar_one()


def _put(connection: Connection, key: str, value: Any) -> None:
    table = tables.settings
    if not connection.execute(table.update().where(table.c.key == key).values(value=value)).rowcount:
        connection.execute(table.insert().values(key=key, value=value))


def _url(place: str | Path) -> URL:
    text = str(place)
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except ArgumentError:
        raise InputError(Problem("the URL", "is not readable", "write postgresql://user@host/database")) from None
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite" and url.database:
        return url
    what = f"{url.get_backend_name()} is not supported"
    raise InputError(Problem(url.render_as_string(hide_password=True), what, "give a file, or postgresql://..."))


def _named(url: URL) -> str:
    """How errors name the place: a file by its path, a database without its password."""
    return url.database or "" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def _refuse_taken(path: Path) -> None:
    if path.exists():
        raise InputError(Problem(str(path), "is already there, and nothing is overwritten", "choose another name"))
    if not path.parent.is_dir():
        raise InputError(Problem(str(path.parent), "there is no such folder", "make it or choose another"))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        options = {"timeout": BUSY_SECONDS, "check_same_thread": False}
        return prepared(create_engine(url, pool_size=40, connect_args=options))
    try:
        return create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError):
        raise InputError(Problem("psycopg", "is not installed", "pip install 'kedge[label,postgres]'")) from None


def prepared(engine: Engine) -> Engine:
    """An engine of SQLite that begins transactions as `Store` needs it."""
    event.listen(engine, "connect", _connected)
    event.listen(engine, "begin", _begun)
    return engine


def _connected(connection: Any, record: Any) -> None:  # noqa: ARG001 (SQLAlchemy's shape)
    """A SQLite connection: we begin transactions ourselves, and what was committed survives a power cut."""
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_SECONDS * 1000:.0f}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begun(connection: Connection) -> None:
    writes = connection.get_execution_options().get("kedge_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _lost_race(error: DBAPIError) -> bool:
    """Whether the same work, begun anew, may do."""
    state = getattr(error.orig, "sqlstate", None)
    return state in LOST_RACES if state is not None else "locked" in str(error.orig)
