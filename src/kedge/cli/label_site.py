"""`kedge label`: the store of judgments and the site at which they are given."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.feedback.items import Kind, Purpose

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHOWN = 20

Place = Annotated[
    str, typer.Argument(metavar="DB", help="A SQLite file, or postgresql://user@host/database.", show_default=False)
]


def init(
    db: Place,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting, such as overlap=3; repeatable.", show_default=False
        ),
    ] = None,
    guidelines: Annotated[
        Path | None, typer.Option("--guidelines", metavar="FILE", help="Text that annotators read first.")
    ] = None,
    lead: Annotated[str, typer.Option("--lead", metavar="NAME", help="Who leads the labelling.")] = "lead",
    as_json: Json = False,
) -> None:
    """Make a store of judgments, and its lead's token, which is told this once."""

    def work() -> dict[str, Any]:
        from kedge.feedback import people, tables
        from kedge.feedback.settings import parse
        from kedge.feedback.store import Store

        text = "" if guidelines is None else _text(guidelines)
        store = Store.create(db, parse(settings or ()))

        def begin(connection: Any) -> str:
            connection.execute(tables.guidelines.update().values(text=text))
            return people.add(connection, lead, "lead", time.time())

        token = store.write(begin)
        lines = [
            f"made {store.place}",
            f"token of {lead}, told this once: {token}",
            f"next: kedge label import {db} FILE, kedge label annotator add {db} NAME, kedge label serve {db}",
        ]
        return {"place": store.place, "lead": lead, "token": token, "lines": lines}

    _execute(work, as_json=as_json)


def serve(
    db: Place,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen at.")] = 8765,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Also answer other machines; put TLS in front.")
    ] = False,
) -> None:
    """Serve the site, until it is stopped."""
    from kedge.feedback.store import Store

    if host not in LOOPBACK and not allow_remote:
        remedy = "leave --host away, or add --allow-remote and put TLS in front"
        raise InputError(Problem(f"--host {host}", "would be reached by other machines", remedy))
    _free(host, port)
    store = Store.open(db)
    import uvicorn

    from kedge.feedback.site.app import create_app

    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {store.place} at http://{shown}:{port} (Ctrl-C stops)", err=True)
    sys.stderr.flush()
    app = create_app(store, any_host=allow_remote)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)
    store.close()


def import_(
    db: Place,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSONL, JSON, Parquet, CSV or a folder of datasets.", show_default=False),
    ],
    purpose: Annotated[
        str, typer.Option("--purpose", metavar="task|gold|calibration", help="What the items are for.")
    ] = "task",
    as_kind: Annotated[
        str | None, typer.Option("--as", metavar="pair|ranking|rating", help="The kind, where two may be ranked, too.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option("--overlap", min=1, max=1000, help="Annotators asked; the setting if absent.")
    ] = None,
    max_rejected: Annotated[
        float, typer.Option("--max-rejected", min=0, max=1, help="Share of malformed rows to leave out.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Add items to label. What a file says of them is left aside, but is the known answer of gold and calibration."""

    def work() -> dict[str, Any]:
        from kedge.feedback.importing import counted, read_items
        from kedge.feedback.items import add_items
        from kedge.feedback.store import Store

        kind, meant = _kind("--as", as_kind), _purpose(purpose)
        store = Store.open(db)
        rules = store.rules()
        found = read_items(file, rules.settings, kind=kind, purpose=meant, overlap=overlap)
        items, problems = counted(found)
        total = len(items) + len(problems)
        if len(problems) > max_rejected * total or not items:
            remedy = "fix them, or allow a share with --max-rejected"
            what = f"{len(problems)} of {total} rows are rejected; nothing is added"
            raise InputError([*problems[:SHOWN], Problem(str(file), what, remedy)])
        added, before = store.write(lambda connection: add_items(connection, items, rules.settings))
        kinds = {name: sum(item.kind == name for item in items) for name in ("pair", "ranking", "rating")}
        lines = [
            f"{added} items added to {store.place} ({', '.join(f'{n} {k}' for k, n in kinds.items() if n)})",
            *([f"{before} were there before, or twice in the file"] if before else []),
            *([f"{len(problems)} rows rejected:", *map(str, problems[:SHOWN])] if problems else []),
        ]
        said = {"added": added, "there_before": before, "rejected": [vars(problem) for problem in problems]}
        return said | {"kinds": kinds, "lines": lines}

    _execute(work, as_json=as_json)


def export(
    db: Place,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl, .parquet or .json.", show_default=False)],
    shape: Annotated[
        str, typer.Option("--shape", metavar="NAME", help="judgments, majority, raw, argilla or label-studio.")
    ] = "judgments",
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="pair|ranking|rating", help="Of several kinds, only this one.")
    ] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Pseudonyms in place of names.")] = False,
    as_json: Json = False,
) -> None:
    """Write what was said, as a recipe, `kedge data` and other tools read it."""

    def work() -> dict[str, Any]:
        from kedge.feedback.exporting import export
        from kedge.feedback.store import Store

        written = export(Store.open(db), out, shape=shape, kind=_kind("--kind", kind), anonymous=anonymous)
        lines = [f"{out}: {written} {'rows' if shape in ('judgments', 'majority', 'raw') else 'records'} written"]
        if shape == "judgments":
            lines.append(f"next: kedge data audit {out}, or --set data.preferences={out}")
        return {"out": out, "written": written, "lines": lines}

    _execute(work, as_json=as_json)


def status(db: Place, as_json: Json = False) -> None:
    """Say how far the labelling is, and how far people agree."""

    def work() -> dict[str, Any]:
        from dataclasses import asdict

        from kedge.feedback.figures import overview
        from kedge.feedback.store import Store

        store = Store.open(db)
        rules = store.rules()
        found = store.read(lambda connection: overview(connection, rules, time.time()))
        counts = found.counts
        lines = [
            f"{store.place}: {counts.judged} of {counts.asked} judgments, {counts.finished} of {counts.items} items "
            f"finished, {counts.held} in somebody's hands",
            f"disagreements open: {counts.split}; settled: {counts.settled}; flagged: {counts.flagged}",
        ]
        lines += [
            f"alpha ({one.level}): {'not known' if one.alpha is None else f'{one.alpha:.3f}'} on {one.units} items"
            for one in found.agreements
        ]
        lines += [
            f"  {one.name:<20} {one.judged:>6} judged, {one.skipped} skipped, gold {one.gold.count}/{one.gold.of}, "
            f"same again {one.repeats.count}/{one.repeats.of}"
            for one in found.annotators
        ]
        return {**asdict(found), "lines": lines}

    _execute(work, as_json=as_json)


def add(
    db: Place,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As the lead's page shows it.", show_default=False)],
    role: Annotated[str, typer.Option("--role", metavar="annotator|lead", help="What they may do.")] = "annotator",
    renew: Annotated[bool, typer.Option("--renew", help="A new token for somebody who is there.")] = False,
    as_json: Json = False,
) -> None:
    """Let somebody in; their token is told this once."""

    def work() -> dict[str, Any]:
        from kedge.feedback import people
        from kedge.feedback.store import Store

        meant = next((one for one in people.ROLES if one == role), None)
        if meant is None:
            raise InputError(Problem(f"--role {role}", "is not known", f"use {' or '.join(people.ROLES)}"))
        store = Store.open(db)
        if renew:
            token = store.write(lambda connection: people.new_token(connection, name))
        else:
            token = store.write(lambda connection: people.add(connection, name, meant, time.time()))
        return {"name": name, "token": token, "lines": [f"token of {name}, told this once: {token}"]}

    _execute(work, as_json=as_json)


def list_(db: Place, as_json: Json = False) -> None:
    """Everybody who may log in."""

    def work() -> dict[str, Any]:
        from dataclasses import asdict

        from kedge.feedback import people
        from kedge.feedback.store import Store

        found = Store.open(db).read(people.people)
        lines = [f"{one.name:<24} {one.role}{'' if one.active else ', shut out'}" for one in found]
        return {"people": [asdict(one) for one in found], "lines": lines or ["nobody"]}

    _execute(work, as_json=as_json)


def register(labels: typer.Typer, options: dict[str, list[str]]) -> None:
    """Add the commands to `kedge label`."""
    for name, command in (
        ("init", init),
        ("serve", serve),
        ("import", import_),
        ("export", export),
        ("status", status),
    ):
        labels.command(name)(command)
    people = typer.Typer(no_args_is_help=True, context_settings=options, help="Who may log in.")
    people.command("add")(add)
    people.command("list")(list_)
    labels.add_typer(people, name="annotator")


def _execute(work: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    def quietly(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:  # noqa: ARG001 (the shape execute wants)
        return work()

    execute(quietly, as_json=as_json)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(Problem(str(path), "there is no such file", "give a text file")) from None
    except UnicodeDecodeError:
        raise InputError(Problem(str(path), "is not UTF-8 text", "save it as UTF-8")) from None


def _kind(option: str, given: str | None) -> Kind | None:
    from kedge.feedback.items import KINDS

    kind = next((one for one in KINDS if one == given), None)
    if given is not None and kind is None:
        raise InputError(Problem(f"{option} {given}", "is not known", f"use {', '.join(KINDS)}"))
    return kind


def _purpose(given: str) -> Purpose:
    from kedge.feedback.items import PURPOSES

    purpose = next((one for one in PURPOSES if one == given), None)
    if purpose is None:
        raise InputError(Problem(f"--purpose {given}", "is not known", f"use {', '.join(PURPOSES)}"))
    return purpose


def _free(host: str, port: int) -> None:
    """Raise InputError where the port is taken: uvicorn would only log it."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            what = f"cannot be listened at: {(error.strerror or str(error)).lower()}"
            raise InputError(Problem(f"{host}:{port}", what, "choose another --port or --host")) from None
