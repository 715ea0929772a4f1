"""Which columns a row has and what they mean: the spellings in use, brought to one form.

Standard rows hold strings; conversational rows hold lists of {"role", "content"}. Both may be mixed, as long as the
response is one assistant turn. Each function returns the record or raises `Unusable` with the reason and the remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from kedge.data.records import Demonstration, Message, Preference, Prompt

PROMPT_COLUMNS = "prompt, messages or instruction (and input)"
DEMONSTRATION_COLUMNS = "prompt and response (or completion), instruction (and input) and output, or messages"
PREFERENCE_COLUMNS = "prompt, chosen and rejected, or chosen and rejected conversations that share their beginning"

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
SURROGATE = re.compile("[\ud800-\udfff]")
HH_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = tuple[Message, ...]


class Unusable(Exception):
    """A row that cannot be used: the reason and what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


class UnknownColumns(Unusable):
    """A row without the columns that are needed."""


def demonstration(row: Mapping[str, Any]) -> Demonstration:
    if row.get("messages") is not None:
        return Demonstration(*_answered(_messages(row["messages"], "messages")))
    column, response = _prompt_column(row), _first(row, "response", "completion", "output")
    if column is None or response is None:
        raise _unknown(row, DEMONSTRATION_COLUMNS)
    context, text = _joined(_prompt(*column), _turns(row[response], response))
    if not text.strip():
        raise Unusable(f"{response} is empty", "write a response or remove the row")
    return Demonstration(context, text)


def preference(row: Mapping[str, Any]) -> Preference:
    if not {"chosen", "rejected"} <= row.keys():
        raise _unknown(row, PREFERENCE_COLUMNS)
    sides = [_turns(row[name], name) for name in ("chosen", "rejected")]
    column = _prompt_column(row)
    answers: list[tuple[Prompt, str]]
    if column is None:
        answers = [_answered(_conversation(side, row)) for side in sides]
    else:
        given = _prompt(*column)
        answers = [_joined(given, side) for side in sides]
    (context, better), (other, worse) = answers
    if context != other:
        what = "chosen and rejected answer different prompts: they part before the last turn"
        raise Unusable(what, "compare responses to one prompt, or remove the row")
    if not (better.strip() or worse.strip()):
        raise Unusable("chosen and rejected are both empty", "remove the row")
    return Preference(context, better, worse, _strength(row))


def prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row; of a conversation, all that comes before a last assistant turn."""
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        return _answered(messages)[0] if messages[-1].role == "assistant" else messages
    column = _prompt_column(row)
    if column is None:
        raise _unknown(row, PROMPT_COLUMNS)
    return _prompt(*column)


def _unknown(row: Mapping[str, Any], expected: str) -> UnknownColumns:
    found = ", ".join(str(name) for name in row) or "none"
    return UnknownColumns(f"the columns are {found}; expected {expected}", "rename the columns")


def _first(row: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if name in row), None)


def _prompt_column(row: Mapping[str, Any]) -> tuple[Any, str] | None:
    """The value that prompts and its column; an instruction and its input become one text."""
    if "prompt" in row:
        return row["prompt"], "prompt"
    if "instruction" not in row:
        return None
    extra = row.get("input")
    if extra is None or extra == "":
        return row["instruction"], "instruction"
    return f"{_text(row['instruction'], 'instruction')}\n\n{_text(extra, 'input')}", "instruction"


def _prompt(value: Any, column: str) -> Prompt:
    turns = _turns(value, column)
    if isinstance(turns, str) and not turns.strip():
        raise Unusable(f"{column} is empty", "write a prompt or remove the row")
    return turns


def _text(value: Any, column: str) -> str:
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise Unusable(f"{column} holds half a surrogate pair, which is no character", "write the text as UTF-8")
        return value
    kind = "missing" if value is None else f"of type {type(value).__name__}"
    raise Unusable(f"{column} is {kind}, expected text", "write text or remove the row")


def _turns(value: Any, column: str) -> str | Messages:
    """Text, or a list of messages."""
    return _messages(value, column) if isinstance(value, list | tuple) else _text(value, column)


def _messages(value: Any, column: str) -> Messages:
    remedy = 'write a list of {"role": ..., "content": ...}'
    if not isinstance(value, list | tuple) or not value:
        raise Unusable(f"{column} holds no messages", remedy)
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise Unusable(f"message {number} of {column} is not a role and content", remedy)
        role = turn["role"]
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise Unusable(f"message {number} of {column} has the role {role!r}", "use system, user, assistant or tool")
        messages.append(Message(role, _text(turn["content"], f"message {number} of {column}")))
    return tuple(messages)


def _answered(messages: Messages) -> tuple[Messages, str]:
    """A conversation as its beginning and the assistant's last turn."""
    if messages[-1].role != "assistant":
        what = f"the conversation ends with the role {messages[-1].role}, expected assistant"
        raise Unusable(what, "end it with the response")
    if len(messages) == 1:
        raise Unusable("the conversation has a response but no prompt", "put the turns before it in front")
    return messages[:-1], messages[-1].content


def _joined(prompt: Prompt, response: str | Messages) -> tuple[Prompt, str]:
    """Prompt and response text, where the response column may hold a turn, several, or the whole conversation."""
    if isinstance(response, str):
        return prompt, response
    opening = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if response[: len(opening)] == opening:
        return _answered(response)
    if len(response) == 1 and isinstance(prompt, str) and response[0].role == "assistant":
        return prompt, response[0].content
    if isinstance(prompt, str) and Message("user", prompt) in response[:2]:  # after a system turn
        return _answered(response)
    return _answered(opening + response)


def _conversation(side: str | Messages, row: Mapping[str, Any]) -> Messages:
    """Messages as they are, and a transcript of "Human:" and "Assistant:" turns set off by empty lines as messages."""
    if not isinstance(side, str):
        return side
    if not HH_TURN.match(side):
        raise _unknown(row, PREFERENCE_COLUMNS)
    _, *parts = HH_TURN.split(side)
    return tuple(Message(HH_ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True))


def _strength(row: Mapping[str, Any]) -> float:
    """The share of votes for chosen from the columns strength and tie, in [0, 1]."""
    tie = _flag(row.get("tie"))
    given = row.get("strength")
    if given is None or given == "":
        return 0.5 if tie else 1.0
    try:
        strength = float(given)
    except (TypeError, ValueError, OverflowError):
        strength = math.nan
    if isinstance(given, bool) or not 0 <= strength <= 1:
        raise Unusable(f"strength is {given}, expected a share from 0 to 1", "correct it or remove the row")
    if tie and strength != 0.5:
        raise Unusable(f"tie is set but strength is {given}", "make it 0.5 or clear the tie")
    return strength


def _flag(value: Any) -> bool:
    known = {"": False, "false": False, "0": False, "true": True, "1": True}
    key = "" if value is None else str(value).lower()
    if key not in known:
        raise Unusable(f"tie is {value!r}, expected true or false", "correct it or remove the row")
    return known[key]
