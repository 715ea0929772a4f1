"""An older store is brought up to date, once and whole; a newer one and a foreign one are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from people_at_work import ask, choose, say
from sqlalchemy import create_engine, inspect, text

from kedge.errors import InputError
from kedge.feedback import migrate, people, tables
from kedge.feedback.exporting import export
from kedge.feedback.settings import Settings
from kedge.feedback.store import Store

OLD = Path(__file__).parent / "fixtures" / "version-1.sql"


def url_of(place: str) -> str:
    return place.replace("postgresql://", "postgresql+psycopg://") if "://" in place else f"sqlite:///{place}"


def old_store(place: str) -> None:
    engine = create_engine(url_of(place))
    with engine.begin() as connection:
        for statement in OLD.read_text(encoding="utf-8").split(";\n"):
            lines = [line for line in statement.splitlines() if not line.startswith("--")]
            if "".join(lines).strip():
                connection.execute(text("\n".join(lines).replace(":", "\\:")))
        if connection.dialect.name == "postgresql":
            # Rows were written with their numbers; whoever made them would have left the sequences behind them.
            for table in ("items", "annotators", "assignments", "judgments"):
                serial = f"CREATE SEQUENCE {table}_id_seq START 100 OWNED BY {table}.id"
                connection.execute(text(serial))
                connection.execute(text(f"ALTER TABLE {table} ALTER id SET DEFAULT nextval('{table}_id_seq')"))
    engine.dispose()


def columns(place: str) -> dict[str, dict[str, Any]]:
    engine = create_engine(url_of(place))
    found = inspect(engine)
    said = {
        table: {column["name"]: (str(column["type"]), column["nullable"]) for column in found.get_columns(table)}
        for table in found.get_table_names()
    }
    indices = {table: {index["name"] for index in found.get_indexes(table)} for table in found.get_table_names()}
    engine.dispose()
    return {"columns": said, "indices": indices}


def test_an_older_store_is_upgraded(new_place: Callable[[], str]) -> None:
    old, new = new_place(), new_place()
    old_store(old)
    store = Store.open(old)
    assert store.read(migrate.version) == tables.VERSION
    rows = store.read(lambda c: c.execute(tables.items.select().order_by(tables.items.c.id)).all())
    assert [row.split for row in rows] == [True, False, False], "neither draw of the second takes a side"
    (ann, _) = store.read(people.people)
    task = ask(store, ann, 10.0)
    assert task.item.prompt == "Three?"
    say(store, ann, task, choose(task, 1), 11.0, flagged=True, active=0.5)
    store.close()
    again = Store.open(old)
    assert again.rules().settings.name == "Old"
    again.close()
    fresh = Store.create(new, Settings())
    fresh.close()
    assert columns(old) == columns(new), "as if it had been made by this version"


def test_a_step_that_fails_leaves_the_old_store_whole(
    new_place: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = new_place()
    old_store(place)

    def fails(connection: Any) -> None:
        migrate._to_2(connection)
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setitem(migrate.STEPS, 1, fails)
        with pytest.raises(RuntimeError):
            Store.open(place)
    store = Store.open(place)
    assert export(store, tmp_path / "out.jsonl") == 4
    store.close()


def test_a_newer_store_is_refused(new_place: Callable[[], str]) -> None:
    place = new_place()
    store = Store.create(place, Settings())
    store.write(lambda c: c.execute(tables.schema_version.update().values(version=tables.VERSION + 1)))
    store.close()
    with pytest.raises(InputError, match="newer Kedge"):
        Store.open(place)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Store.open(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "text.db").write_text("not a database, and long enough for SQLite to read its head " * 20)
    with pytest.raises(InputError, match="cannot be opened"):
        Store.open(tmp_path / "text.db")
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (a INTEGER)"))
    with pytest.raises(InputError, match="no labels of Kedge"):
        Store.open(tmp_path / "other.db")
    with pytest.raises(InputError, match="nothing is overwritten"):
        Store.create(tmp_path / "other.db", Settings())
    with pytest.raises(InputError, match="no such folder"):
        Store.create(tmp_path / "nowhere" / "labels.db", Settings())
    for place in ("mysql://u:secret@h/d", "://"):
        with pytest.raises(InputError) as caught:
            Store.open(place)
        assert "secret" not in str(caught.value)


def test_a_database_out_of_reach_is_one_line_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(InputError) as caught:
        Store.open("postgresql://user:secret@127.0.0.1:1/none?connect_timeout=2")
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
