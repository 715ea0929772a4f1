"""Files that hold text alone: what their prompts and responses say, and which positions a response has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedge.importers import Intake
from kedge.importers.records import Array
from kedge.trace.foreign import padded

NO_TEXT = "the prompt or the response is neither text nor a list of messages"


def text_of(value: Any, roles: tuple[str, ...] | None = None) -> str | None:
    """Text of a string or of a list of messages; None of anything else.

    A single message is its content. Several stand one after another, each under its role. `roles` keeps only messages
    of these roles and joins their contents: of a completion, only what the policy wrote.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [(str(turn.get("role", "")), _content(turn.get("content"))) for turn in value]
    if any(content is None for _, content in turns):
        return None
    if roles is not None:
        return "\n\n".join(str(content) for role, content in turns if role in roles)
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def _content(content: Any) -> str | None:
    """A message's words: a string, or parts of which the text counts; a turn of tool calls alone has none."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        parts = [part.get("text") or "" for part in content if isinstance(part, dict)]
        return "".join(map(str, parts))
    return content if isinstance(content, str) else None


def positions(responses: Sequence[str], intake: Intake) -> tuple[Array, Array | None]:
    """The response mask [B, T] of texts, and token ids [B, T] where a tokenizer was given; else positions are words.

    A response without any has one position, its end, so that its score has a place.
    """
    if intake.tokenise is None:
        return _mask([len(text.split()) for text in responses]), None
    ids = [intake.tokenise(text) for text in responses]
    mask = _mask(list(map(len, ids)))
    intake.note("token ids are those of the decoded text, tokenised again: they may differ from the sampled ones")
    return mask, padded(ids, width=mask.shape[1])


def _mask(counts: Sequence[int]) -> Array:
    return padded([[True] * max(1, count) for count in counts], fill=False)
