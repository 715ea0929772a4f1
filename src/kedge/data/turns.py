"""Prompts and responses in a row: text, message lists, whole conversations and transcripts, told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kedge.data.cells import UnknownColumns, Unusable, name_list, shown, text
from kedge.data.records import Message, Prompt

CONVERSATIONS = "prompt, chosen and rejected, or chosen and rejected conversations that share their beginning"

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
HH_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = tuple[Message, ...]


def unknown(row: Mapping[str, Any], expected: str) -> UnknownColumns:
    return UnknownColumns(f"the columns are {name_list(row)}; expected {expected}", "rename the columns")


def prompt_column(row: Mapping[str, Any]) -> tuple[Any, str] | None:
    """The value that prompts and its column; an instruction and its input become one text."""
    if "prompt" in row:
        return row["prompt"], "prompt"
    if "instruction" not in row:
        return None
    extra = row.get("input")
    if extra is None or extra == "":
        return row["instruction"], "instruction"
    return f"{text(row['instruction'], 'instruction')}\n\n{text(extra, 'input')}", "instruction"


def prompt_of(value: Any, column: str) -> Prompt:
    """Text that is not blank, or messages."""
    found = turns_of(value, column)
    if isinstance(found, str) and not found.strip():
        raise Unusable(f"{column} is empty", "write a prompt or remove the row")
    return found


def turns_of(value: Any, column: str) -> str | Messages:
    """Text, or a list of messages."""
    return messages_of(value, column) if isinstance(value, list | tuple) else text(value, column)


def messages_of(value: Any, column: str) -> Messages:
    remedy = 'write text, or a list of {"role": ..., "content": ...}'
    if not isinstance(value, list | tuple) or not value:
        raise Unusable(f"{column} holds no messages", remedy)
    messages = []
    for number, turn in enumerate(value, start=1):
        name = f"message {number} of {column}"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise Unusable(f"{name} is not a role and content", remedy)
        role = turn["role"]
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise Unusable(f"{name} has the role {shown(role)}", "use system, user, assistant or tool")
        messages.append(Message(role, text(turn["content"], name)))
    return tuple(messages)


def answered(messages: Messages) -> tuple[Messages, str]:
    """A conversation as its beginning and the assistant's last turn."""
    if messages[-1].role != "assistant":
        what = f"the conversation ends with the role {shown(messages[-1].role)[1:-1]}, expected assistant"
        raise Unusable(what, "end it with the response")
    if len(messages) == 1:
        raise Unusable("the conversation has a response but no prompt", "put the turns before it in front")
    return messages[:-1], messages[-1].content


def joined(prompt: Prompt, response: str | Messages) -> tuple[Prompt, str]:
    """Prompt and response text, where the response column may hold a turn, several, or the whole conversation."""
    if isinstance(response, str):
        return prompt, response
    opening = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if len(response) > len(opening) and response[: len(opening)] == opening:
        return answered(response)
    if len(response) == 1 and isinstance(prompt, str) and response[0].role == "assistant":
        return prompt, response[0].content
    if isinstance(prompt, str) and Message("user", prompt) in response[:2]:  # after a system turn
        return answered(response)
    return answered(opening + response)


def answers(row: Mapping[str, Any], sides: Sequence[tuple[Any, str]]) -> tuple[Prompt, list[str]]:
    """The prompt of a row and the text of each (value, column), which may hold the prompt, too, or instead."""
    turns = [turns_of(value, name) for value, name in sides]
    column = prompt_column(row)
    if column is None:
        found: list[tuple[Prompt, str]] = [answered(_conversation(side, row)) for side in turns]
    else:
        asked = prompt_of(*column)
        found = [joined(asked, side) for side in turns]
    prompt = found[0][0]
    for (other, _), (_, name) in zip(found, sides, strict=True):
        if other != prompt:
            what = f"{sides[0][1]} and {name} answer different prompts: they part before the last turn"
            raise Unusable(what, "compare responses to one prompt, or remove the row")
    return prompt, [response for _, response in found]


def _conversation(side: str | Messages, row: Mapping[str, Any]) -> Messages:
    """Messages as they are, and a transcript of "Human:" and "Assistant:" turns set off by empty lines as messages."""
    if not isinstance(side, str):
        return side
    if not HH_TURN.match(side):
        raise unknown(row, CONVERSATIONS)
    _, *parts = HH_TURN.split(side)
    return tuple(Message(HH_ROLES[role], turn.strip()) for role, turn in zip(parts[::2], parts[1::2], strict=True))
