"""Stores of judgments to test with: SQLite always, a PostgreSQL of our own where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kedge.feedback.settings import Settings
from kedge.feedback.store import Store

sys.path[:0] = [str(Path(__file__).parent)]

Make = Callable[..., Store]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server of our own, reached by a socket; gives the URL of a new database of a name."""
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl", "createdb")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(missing)} on the path")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'kedge[postgres]'")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="kedge-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, user)

    def call(*command: str) -> None:
        named = {"user": user} if os.geteuid() == 0 else {}
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60, **named)  # type: ignore[call-overload]

    data = folder / "data"
    options = f"-c listen_addresses='' -k {folder} -c max_connections=200"
    call("initdb", "-D", str(data), "-A", "trust", "-U", "kedge", "--no-sync")
    call("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")

    def database(name: str) -> str:
        call("createdb", "-h", str(folder), "-U", "kedge", name)
        return f"postgresql://kedge@/{name}?host={folder}"

    try:
        yield database
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> str:
    """Who runs the server, which refuses to be run by root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("PostgreSQL refuses to be run by root, and there is no user postgres or nobody")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Places for new stores, one after another."""
    count = iter(range(1000))
    if request.param == "sqlite":
        return lambda: str(tmp_path / f"labels-{next(count)}.db")
    database = request.getfixturevalue("postgres")
    name = f"{abs(hash(request.node.nodeid)):x}"
    return lambda: database(f"t{name}_{next(count)}")


@pytest.fixture
def make_store(new_place: Callable[[], str]) -> Iterator[Make]:
    """Makes stores with settings given by name."""
    made = []

    def make(**settings: object) -> Store:
        made.append(Store.create(new_place(), Settings(**settings)))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Make]:
    """The same, in SQLite alone."""
    made = []

    def make(**settings: object) -> Store:
        made.append(Store.create(tmp_path / f"own-{len(made)}.db", Settings(**settings)))
        return made[-1]

    yield make
    for store in made:
        store.close()
