"""Features of responses that a reward may pay for: length, lists, refusals, hedges, certainty, repetition, one's own.

A feature turns B responses into B numbers. Text lists are short lists of English phrases: they see form, not meaning,
and a feature of another language is a pattern or function of one's own. nan stands where a text is not known.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
Texts = Sequence[str | None]
GRAM = 4  # words or tokens: repetition counts n-grams of this size
_CLOSE = 0.75  # likeness to a feature's name from which a word is taken for a slip of the pen


@dataclass(frozen=True)
class Feature:
    """A number for each response. `function(texts, lengths)` gives [B] float64; `lengths` [B] counts tokens.

    `on_ids(ids, mask)` gives the same from token ids [B, T] where the texts are not known.
    """

    name: str
    unit: str
    function: Callable[[Texts, Array], Array]
    on_ids: Callable[[Array, Array], Array] | None = None

    def __call__(self, texts: Texts, lengths: Array) -> Array:
        """[B] the feature of each response; nan where it needs a text that is None."""
        return self.function(texts, np.asarray(lengths))

    def of(self, step: StepTrace) -> Array:
        """[B] the feature of the rows of a step, from texts where they were kept, else from token ids."""
        texts = readable(step)
        if self.on_ids is not None and step.response_ids is not None and None in texts:
            return self.on_ids(step.response_ids, step.response_mask)
        return self(texts, step.lengths)


def readable(step: StepTrace) -> Texts:
    """The responses of a step, None where the trace keeps a hash or nothing."""
    known = [text for text in step.responses if text is not None]
    hashed = step.response_ids is None and all(re.fullmatch("[0-9a-f]{16}", text) for text in known)
    return (None,) * len(step) if hashed else step.responses


def text_feature(name: str, unit: str, of_text: Callable[[str], float]) -> Feature:
    """A feature of the text alone."""

    def function(texts: Texts, _: Array) -> Array:
        return np.array([np.nan if text is None else of_text(text) for text in texts], dtype=np.float64)

    return Feature(name, unit, function)


def regex_feature(pattern: str) -> Feature:
    """How often a regular expression is found in each response, letter case ignored."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        what = f"is not a regular expression: {error}"
        raise InputError(Problem(f"feature {pattern!r}", what, "escape special characters with \\")) from None
    return text_feature(pattern, "matches", lambda text: sum(1 for _ in compiled.finditer(text)))


def function_named(spec: str) -> Callable[..., Any]:
    """The function that `package.module:name` or `file.py:name` means. Raises `InputError`."""
    where = f"feature {spec!r}"
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(Problem(where, "names no function", "write package.module:name or file.py:name"))
    function = getattr(_module(place, where), name, None)
    if not callable(function):
        raise InputError(Problem(where, f"{place} holds no function {name!r}", "check the name after the colon"))
    found: Callable[..., Any] = function
    return found


def function_feature(spec: str) -> Feature:
    """A function of one's own, `package.module:name` or `file.py:name`, from a response's text to a number."""
    where, function = f"feature {spec!r}", function_named(spec)

    def of_text(text: str) -> float:
        try:
            return float(function(text))
        except Exception as error:
            what = f"failed on the response {text[:40]!r}: {type(error).__name__}: {error}"
            raise InputError(Problem(where, what, "it takes one text and returns a number")) from None

    return text_feature(spec, "1", of_text)


def feature_named(spec: str) -> Feature:
    """The feature that a user means: a name in FEATURES, `module:function`, or else a regular expression.

    `regex:PATTERN` is always an expression. Raises `InputError`.
    """
    if spec in FEATURES:
        return FEATURES[spec]
    if spec.startswith("regex:"):
        return regex_feature(spec.removeprefix("regex:"))
    if re.fullmatch(r"[\w.\\/~-]+:[A-Za-z_]\w*", spec):
        return function_feature(spec)
    if close := difflib.get_close_matches(spec, FEATURES, n=1, cutoff=_CLOSE):
        remedy = f"write {close[0]}, or regex:{spec} to look for the word"
        raise InputError(Problem(f"feature {spec!r}", "there is no such feature", remedy))
    return regex_feature(spec)


def _module(place: str, where: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _from_file(Path(place), where)
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: a module beside the command is found
        try:
            return importlib.import_module(place)
        finally:
            sys.path.pop(0)
    except InputError:
        raise
    except Exception as error:
        what = f"{place} cannot be imported: {type(error).__name__}: {error}"
        remedy = "write package.module:name, file.py:name, or regex:PATTERN for an expression with a colon"
        raise InputError(Problem(where, what, remedy)) from None


def _from_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise InputError(Problem(where, f"there is no file {path}", "give the path of a Python file"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # both exist for a .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Phrases. A list is one expression over the text in lower case, with plain apostrophes and single spaces.

_NOT_ABLE = (
    r"(?:can ?not|can't|could not|couldn't|(?:am|are|'m|'re|is) (?:unable|not able|not allowed|not permitted) to)"
)
_WILL_NOT = r"(?:will not|won't|would rather not|prefer not to|do not want to|don't want to)"
_TO_HELP = (
    r"(?:help|assist|share|provide|answer|tell|say|give|comply|do (?:that|this)|discuss|disclose|reveal|fulfil|fulfill|"
    r"support|create|write|generate|offer|continue|engage|respond|access|confirm|find|determine|talk|comment)"
)
REFUSALS = (
    rf"\b(?:i|we)\b ?{_NOT_ABLE} (?:\w+ )?{_TO_HELP}\b",
    rf"\b(?:i|we) {_WILL_NOT} (?:\w+ )?{_TO_HELP}\b",
    r"\b(?:i|we) (?:must |have to |need to |will )?(?:decline|refuse)\b",
    r"\b(?:i|we) (?:do not|don't) (?:know|have (?:access|that|the|this|enough|any|such) ?(?:information)?)",
    r"\b(?:sorry|apologi[sz]e|afraid|unfortunately)\b[^.!?]{0,40}\b(?:i|we)\b ?(?:can ?not|can't|do not|don't|won't)",
    r"\bi(?:'m| am) (?:not comfortable|not able to help|unable to)\b",
    r"\b(?:not appropriate for me|against (?:my|our) (?:policy|guidelines))\b",
)
HEDGES = (
    r"\b(?:maybe|perhaps|might|may|possibly|probably|presumably|generally|usually|typically|often|sometimes|likely|"
    r"roughly|approximately|somewhat|seems?|appears?|supposedly|arguably)\b",
    r"\b(?:in (?:general|most cases|some cases)|it depends|i (?:think|believe|guess|suppose)|as far as i know|"
    r"(?:not|am unsure|n't) (?:entirely |quite |completely )?(?:sure|certain)|tends? to|to some extent|more or less)\b",
)
CERTAINTY = (
    r"\b(?:definitely|certainly|absolutely|undoubtedly|unquestionably|obviously|clearly|surely|guaranteed?|"
    r"always(?! (?:a pleasure|happy|glad|here|welcome)))\b",  # a courtesy is no claim
    r"\b(?:without (?:a |any )?doubt|no doubt|of course|for (?:sure|certain)|(?:am|'m) (?:certain|sure|positive))\b",
    r"\b100 ?%",
)
_SPACES = re.compile(r"\s+")
_BULLET = re.compile(r"^[ \t]*(?:[-*•‣–]|\(?(?:\d{1,2}|[a-z])[.)])[ \t]+\S", re.MULTILINE | re.IGNORECASE)
_NUMBER = re.compile(r"(?<!\S)\(?(\d{1,2}) ?[.)](?=\s)")
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def _plain(text: str) -> str:
    """Lower case, straight apostrophes, single spaces."""
    return _SPACES.sub(" ", text.replace("’", "'").lower())


def _phrases(patterns: Sequence[str]) -> Callable[[str], int]:
    """How often any of `patterns` is found in a text."""
    compiled = re.compile("|".join(patterns))
    return lambda text: sum(1 for _ in compiled.finditer(_plain(text)))


def _list_items(text: str) -> float:
    """Lines that begin as an item does; in one line, numbers that count up from 1 to at least 2."""
    items = len(_BULLET.findall(text))
    counted = 0
    for number in _NUMBER.findall(text):
        counted += int(number) == counted + 1
    return float(max(items, counted if counted > 1 else 0))


def _repeated_words(text: str) -> float:
    words = _WORD.findall(_plain(text))
    grams = [tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeated_tokens(ids: Array, mask: Array) -> Array:
    """[B] share of each row's n-grams of GRAM tokens that it has had before, 0 without any; `ids`, `mask` [B, T]."""
    mask = mask.astype(bool)
    order = np.argsort(~mask, axis=1, kind="stable")  # the policy's tokens first, holes closed
    packed, counts = np.take_along_axis(ids, order, axis=1), mask.sum(axis=1)
    grams = np.maximum(counts - GRAM + 1, 0)
    width = packed.shape[1] - GRAM + 1
    if width < 1 or not grams.any():
        return np.zeros(len(ids))
    _, small = np.unique(packed, return_inverse=True)  # so that four fit one number
    codes = small.reshape(packed.shape).astype(np.uint64)
    key = np.zeros((len(ids), width), dtype=np.uint64)
    for at in range(GRAM):  # products wrap around: a mix of four ids in 64 bits, equal by chance about never
        key = (key ^ codes[:, at : at + width]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    there = np.arange(width) < grams[:, None]
    row = np.broadcast_to(np.arange(len(ids))[:, None], key.shape)[there]
    keys = key[there]
    order = np.lexsort((keys, row))
    again = (np.diff(keys[order]) == 0) & (np.diff(row[order]) == 0)
    repeats = np.bincount(row[order][1:][again], minlength=len(ids))
    return np.asarray(repeats / np.maximum(grams, 1))


_count_refusals = _phrases(REFUSALS)

FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        feature.name: feature
        for feature in (
            Feature("length", "tokens", lambda _, lengths: np.asarray(lengths, dtype=np.float64)),
            text_feature("lists", "list items", _list_items),
            text_feature("refusals", "share", lambda text: float(_count_refusals(text) > 0)),
            text_feature("hedges", "phrases", _phrases(HEDGES)),
            text_feature("certainty", "phrases", _phrases(CERTAINTY)),
            Feature(
                "repetition",
                "share",
                text_feature("repetition", "share", _repeated_words).function,
                repeated_tokens,
            ),
        )
    }
)
