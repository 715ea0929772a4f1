"""Which columns a row has and what they mean: the spellings in use, brought to one form.

Standard rows hold strings; conversational rows hold lists of {"role", "content"}. Both may be mixed, as long as the
response is one assistant turn. Each function returns the record or raises `Unusable` with the reason and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from kedge.data import votes
from kedge.data.cells import UnknownColumns, Unusable, annotator, flag, given, listed, number, numbers, shown
from kedge.data.ranks import ranks_of
from kedge.data.records import Demonstration, Judgment, Preference, Prompt, Ranking, Rating, Verdict
from kedge.data.turns import (
    CONVERSATIONS,
    answered,
    answers,
    joined,
    messages_of,
    prompt_column,
    prompt_of,
    turns_of,
    unknown,
)
from kedge.data.winners import WINNERS, decided, two_named

__all__ = ["UnknownColumns", "Unusable", "demonstration", "judgment", "preference", "prompt"]

PROMPT_COLUMNS = "prompt, messages or instruction (and input)"
DEMONSTRATION_COLUMNS = "prompt and response (or completion), instruction (and input) and output, or messages"
JUDGMENT_COLUMNS = (
    "prompt and one of: chosen and rejected; response_a, response_b and winner; responses and ranks or scores; "
    "response and rating; response and label"
)

LISTS = ("responses", "completions", "answers", "candidates")
SINGLE = ("response", "completion", "output", "messages")
RATINGS = ("rating", "score")
VERDICTS = ("label", "good", "reward")

# The columns of a canonical table, in order.
CANONICAL = (
    *("kind", "plain", "prompt", "responses", "ranks", "rating", "good"),
    *("strength", "margin", "votes", "annotator", "shown", "line"),
)


def demonstration(row: Mapping[str, Any]) -> Demonstration:
    if row.get("messages") is not None:
        return Demonstration(*answered(messages_of(row["messages"], "messages")))
    column = prompt_column(row)
    name = next((name for name in ("response", "completion", "output") if name in row), None)
    if column is None or name is None:
        raise unknown(row, DEMONSTRATION_COLUMNS)
    context, response = joined(prompt_of(*column), turns_of(row[name], name))
    if not response.strip():
        raise Unusable(f"{name} is empty", "write a response or remove the row")
    return Demonstration(context, response)


def prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row; of a conversation, all that comes before a last assistant turn."""
    if row.get("messages") is not None:
        messages = messages_of(row["messages"], "messages")
        return answered(messages)[0] if messages[-1].role == "assistant" else messages
    column = prompt_column(row)
    if column is None:
        raise unknown(row, PROMPT_COLUMNS)
    return prompt_of(*column)


def judgment(row: Mapping[str, Any]) -> Judgment:
    """A judgment of whichever kind the columns that hold something speak of."""
    if row.keys() >= set(CANONICAL):
        row = _from_canonical(row)
    there = {name for name, value in row.items() if value is not None}
    # A row whose needed cell is null is of the kind that its columns name, and is told what it lacks.
    read = _reader(there) or _reader(row.keys())
    if read is None:
        raise unknown(row, JUDGMENT_COLUMNS)
    return read(row)


def _reader(names: AbstractSet[str]) -> Callable[[Mapping[str, Any]], Judgment] | None:
    if "chosen" in names and "rejected" in names:
        return preference
    if not names.isdisjoint(WINNERS) and two_named(names):
        return preference
    if not names.isdisjoint(LISTS):
        return _ranking
    if not names.isdisjoint(SINGLE):
        if not names.isdisjoint(RATINGS):
            return _rating
        if not names.isdisjoint(VERDICTS):
            return _verdict
    return None


def preference(row: Mapping[str, Any]) -> Preference:
    """Two responses and the preferred one, as chosen and rejected or as two named responses and a winner."""
    if "chosen" in row and "rejected" in row:
        place = votes.place(row)
    elif two_named(row.keys()):
        row, place = decided(row)
    else:
        raise unknown(row, CONVERSATIONS)
    context, (better, worse) = answers(row, [(row["chosen"], "chosen"), (row["rejected"], "rejected")])
    if not (better.strip() or worse.strip()):
        raise Unusable("chosen and rejected are both empty", "remove the row")
    counts = votes.votes_of(row, place)
    strength = votes.strength_of(row, counts)
    return Preference(context, better, worse, strength, votes.margin_of(row), counts, annotator(row), place)


def _ranking(row: Mapping[str, Any]) -> Ranking:
    """A list of responses, brought into the order that the ranks or scores beside it give."""
    column = _named(row, LISTS)
    values = listed(row[column], column)
    if len(values) < 2:
        raise Unusable(f"{column} holds {len(values)}, a ranking needs 2 or more", "add responses or remove the row")
    context, responses = answers(row, [(value, f"{column}[{place}]") for place, value in enumerate(values)])
    last = {response: place for place, response in enumerate(responses)}
    for place, response in enumerate(responses):
        if last[response] != place:
            what = f"{column}[{place}] and [{last[response]}] are the same text"
            raise Unusable(what, "keep one of them, with one rank")
    ranks = ranks_of(row, len(responses))
    best_first = sorted(zip(ranks, responses, strict=True), key=lambda ranked: ranked[0])
    return Ranking(context, tuple(text for _, text in best_first), tuple(sorted(ranks)), annotator(row))


def _rating(row: Mapping[str, Any]) -> Rating:
    context, response = _single(row)
    column = _named(row, RATINGS)
    return Rating(context, response, number(row[column], column), annotator(row))


def _verdict(row: Mapping[str, Any]) -> Verdict:
    context, response = _single(row)
    column = _named(row, VERDICTS)
    return Verdict(context, response, flag(row[column], column), annotator(row))


def _single(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Prompt and response of a row that judges one; the response may be empty, for that can be judged, too."""
    held = (name for name in SINGLE if row.get(name) is not None)
    column = next(held, None) or _named(row, SINGLE)
    if column == "messages":
        return answered(messages_of(row[column], column))
    context, (response,) = answers(row, [(row[column], column)])
    return context, response


def _named(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these columns that holds something, or that there is; a row of another kind never gets here."""
    return given(row, *names) or next(name for name in names if name in row)


def _from_canonical(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a canonical table in the columns in which its kind is written elsewhere."""
    responses = listed(row["responses"], "responses")
    common = {"prompt": _asked(row), "annotator": row["annotator"]}
    match row["kind"]:
        case "ranking":
            return common | {"responses": responses, "ranks": row["ranks"]}
        case "rating" | "verdict" if len(responses) == 1:
            grade = "rating" if row["kind"] == "rating" else "good"
            return common | {"response": responses[0], grade: row[grade]}
        case "pair" if len(responses) == 2:
            said = {name: row[name] for name in ("strength", "margin", "shown")} | _counts(row["votes"])
            return common | {"chosen": responses[0], "rejected": responses[1]} | said
    what = f"kind is {shown(row['kind'])} with {len(responses)} responses"
    raise Unusable(what, "write pair with 2, rating or verdict with 1, or ranking")


def _counts(value: object) -> dict[str, Any]:
    """The votes of a canonical table: for chosen, for rejected and for neither, wherever they were shown."""
    if value is None:
        return {}
    votes = numbers(value, "votes")
    if len(votes) != 3:
        raise Unusable(f"votes holds {len(votes)} numbers, expected 3", "correct the row")
    return dict(zip(("votes_chosen", "votes_rejected", "votes_tie"), votes, strict=True))


def _asked(row: Mapping[str, Any]) -> Any:
    if not flag(row["plain"], "plain"):
        return row["prompt"]
    messages = messages_of(row["prompt"], "prompt")
    if len(messages) != 1:
        raise Unusable(f"prompt is plain text but holds {len(messages)} messages", "correct plain")
    return messages[0].content
