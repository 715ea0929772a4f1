"""Records as Argilla and Label Studio write them: into rows with our columns, and out of judgments.

Argilla: what `dataset.records.to_json` of its SDK 2 writes: `id`, `fields`, `metadata`, `suggestions`, `responses`,
`vectors`. Label Studio: tasks with `data` and `annotations`, as its JSON export has them. Suggestions and predictions
are not read: an annotator who sees them is anchored.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kedge.feedback.items import Item

Row = Mapping[str, Any]

SIDES = ("response_a", "response_b")
NUMBERED = "response_{}"


def plain_row(row: Row) -> Row:
    """The row in our columns; a row of another shape comes back as it is."""
    if isinstance(row.get("fields"), Mapping):
        return _from_argilla(row)
    if isinstance(row.get("data"), Mapping):
        return _from_label_studio(row)
    return row


def _from_argilla(row: Row) -> Row:
    answers = row.get("responses")
    first: dict[str, Any] = {}
    if isinstance(answers, Mapping):
        for question, given in answers.items():
            if isinstance(given, Sequence) and given and isinstance(given[0], Mapping):
                first[question] = given[0].get("value")
    fields = _listed(row["fields"])
    said = _known(next(iter(first.values()), None), fields)
    extra = row.get("metadata")
    return {**(extra if isinstance(extra, Mapping) else {}), **fields, **said}


def _from_label_studio(row: Row) -> Row:
    fields = _listed(row["data"])
    annotations = row.get("annotations")
    results = annotations[0].get("result", ()) if isinstance(annotations, Sequence) and annotations else ()
    said: Row = {}
    for result in results:
        value = result.get("value", {})
        if result.get("type") == "pairwise" and value.get("selected") in ("left", "right"):
            said = _known(SIDES[value["selected"] == "right"], fields)
        elif result.get("type") == "choices" and value.get("choices"):
            said = _known(value["choices"][0], fields)
        elif result.get("type") == "rating":
            said = _known(value.get("rating"), fields)
        elif result.get("type") == "ranker":
            order = next(iter(value.get("ranker", {}).values()), ())
            said = _known([{"value": name, "rank": place + 1} for place, name in enumerate(order)], fields)
    return {**fields, **said}


def _listed(fields: Row) -> dict[str, Any]:
    """Fields with response_1, response_2, ... up to a third or further as one list."""
    numbered = [name for name in (NUMBERED.format(number) for number in range(1, 100)) if name in fields]
    if len(numbered) < 3:
        return dict(fields)
    rest = {name: value for name, value in fields.items() if name not in numbered}
    return rest | {"responses": [fields[name] for name in numbered]}


def _known(value: Any, fields: Row) -> Row:
    """An answer given elsewhere, as a column that our readers know."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, str):
        return {"winner": value}
    if isinstance(value, int | float):
        return {"rating": value}
    if isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value) and "responses" in fields:
        ranks = {str(one.get("value")): one.get("rank") for one in value}
        named = [ranks.get(NUMBERED.format(number + 1)) for number in range(len(fields["responses"]))]
        return {"ranks": named}
    return {}


def argilla_record(item: Item, said: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """An item and what (annotator, value) said of it, as a record of Argilla; users are known there by a UUID."""
    question = {"pair": "preference", "ranking": "ranking", "rating": "rating"}[item.kind]
    responses = [{"value": _argilla_value(item, value), "user_id": str(user_id(who))} for who, value in said]
    return {
        "id": item.key,
        "fields": _fields(item),
        "metadata": {name: value for name, value in item.extra.items() if isinstance(value, str | int | float)},
        "suggestions": {},
        "responses": {question: responses} if responses else {},
        "vectors": {},
    }


def user_id(name: str) -> uuid.UUID:
    """The same UUID for the same annotator in every export."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"kedge:annotator:{name}")


def label_studio_task(item: Item, said: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """An item and what (annotator, value) said of it, as a task of Label Studio."""
    return {
        "id": item.id,
        "data": _fields(item) | {"key": item.key},
        "annotations": [
            {"id": number, "completed_by": {"email": who}, "result": [_label_studio_result(item, value)]}
            for number, (who, value) in enumerate(said, start=1)
        ],
        "predictions": [],
    }


def _fields(item: Item) -> dict[str, str]:
    turns = item.turns
    text = item.prompt if isinstance(item.prompt, str) else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
    names = {"pair": SIDES, "rating": ("response",)}.get(item.kind)
    if names is None:
        names = tuple(NUMBERED.format(number + 1) for number in range(len(item.responses)))
    return {"prompt": text} | dict(zip(names, item.responses, strict=True))


def _argilla_value(item: Item, value: Mapping[str, Any]) -> Any:
    if item.kind == "pair":
        return SIDES[value["choice"]] if value["choice"] in (0, 1) else value["choice"]
    if item.kind == "ranking":
        return [{"value": NUMBERED.format(place + 1), "rank": rank + 1} for place, rank in enumerate(value["ranks"])]
    return value["rating"]


def _label_studio_result(item: Item, value: Mapping[str, Any]) -> dict[str, Any]:
    names = ",".join(name for name in _fields(item) if name != "prompt")
    result = {"from_name": {"pair": "preference"}.get(item.kind, item.kind), "to_name": names}
    if item.kind == "pair" and value["choice"] in (0, 1):
        return result | {"type": "pairwise", "value": {"selected": ("left", "right")[value["choice"]]}}
    if item.kind == "pair":
        return result | {"type": "choices", "from_name": "neither", "value": {"choices": [value["choice"]]}}
    if item.kind == "ranking":
        order = sorted(range(len(item.responses)), key=lambda place: value["ranks"][place])
        return result | {"type": "ranker", "value": {"ranker": {"rank": [NUMBERED.format(p + 1) for p in order]}}}
    return result | {"type": "rating", "value": {"rating": value["rating"]}}
