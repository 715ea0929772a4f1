"""Rewards that are not a model: a Python function, a regular expression or an HTTP endpoint looks at the text.

A Python rule runs the user's own code, because the recipe names it; the other two kinds run nothing of the user's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import reprlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.ops.rewards import clip_scores
from kedge.recipe.sections import Rule
from kedge.rollout.remote import Endpoint

Ask = Callable[[list[str], list[str]], Any]
"""Prompts and responses in, whatever the rule makes of them out; not checked yet."""

REGEX_SECONDS = 10.0  # for all responses of a batch; a search that backtracks without end is stopped

# A search cannot be stopped inside a process, so it has one of its own; a mark per response says how far it came.
_SEARCH = """
import json, re, sys
pattern, texts = json.load(sys.stdin)
search = re.compile(pattern).search
for text in texts:
    print("01"[search(text) is not None], end="", flush=True)
"""


@dataclass(frozen=True)
class RuleReward:
    """One channel's rule, ready to be asked. `where` is what errors point at."""

    name: str
    clip: float
    ask: Ask
    where: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """[B] the rule's numbers, held within plus and minus `clip`.

        Raises `InputError` unless there is one finite number for each response.
        """
        found = self.ask(list(prompts), list(responses))
        numbers = self._numbers(found, len(responses))
        return clip_scores(torch.tensor(numbers, dtype=torch.float64), self.clip).float()

    def _numbers(self, found: Any, count: int) -> list[float]:
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple):
            raise self._refusal(f"returned {reprlib.repr(values)}, not a list of numbers")
        if len(values) != count:
            raise self._refusal(f"returned {len(values)} numbers for {count} responses")
        numbers = [_number(value) for value in values]
        for row, (value, number) in enumerate(zip(values, numbers, strict=True)):
            if not math.isfinite(number):
                raise self._refusal(f"returned {reprlib.repr(value)} for row {row} of {count}, not a finite number")
        return numbers

    def _refusal(self, what: str) -> InputError:
        return InputError(
            Problem(self.where, f"channel {self.name} {what}", "give one finite number per response, in their order")
        )


def rule_reward(name: str, rule: Rule) -> RuleReward:
    """The reward of the channel `name`. Loads the user's function; asks nobody yet. Raises `InputError`."""
    match rule.kind:
        case "python":
            function, where = _loaded(name, rule.function)
            return RuleReward(name, rule.clip, _guarded(name, function, where), where)
        case "regex":
            where = f"rewards.{name}.pattern"
            return RuleReward(name, rule.clip, lambda _, responses: _searched(rule.pattern, responses, where), where)
        case "http":
            endpoint = Endpoint(name, rule.url, rule.timeout, rule.retries)
            return RuleReward(name, rule.clip, endpoint.ask, endpoint.address)


def _number(value: Any) -> float:
    """`value` as a float; NaN for what is no number. True and false are 1 and 0."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


# Python


def _loaded(name: str, function: str) -> tuple[Callable[..., Any], str]:
    """The function that `file.py:name` or `package.module:name` means, and the `file:line` where it begins."""
    source, _, attribute = function.rpartition(":")
    key = f"rewards.{name}.function"
    try:
        module = _module_of_file(name, Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        remedy = "name a file, or a module that is installed, that can be imported; KEDGE_DEBUG=1 shows the traceback"
        raise _failure(_blamed(error, source) or key, name, error, remedy) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        what = f"{source} has no function {attribute!r}"
        raise InputError(Problem(key, what, "name a function of two lists, prompts and responses"))
    code = getattr(inspect.unwrap(found), "__code__", None)
    return found, f"{code.co_filename}:{code.co_firstlineno}" if code is not None else function


def _module_of_file(name: str, path: Path) -> ModuleType:
    """A file run as a module of its own, as often as rules name it."""
    title = f"kedge_reward_{name}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _guarded(name: str, function: Callable[..., Any], where: str) -> Ask:
    source = where.rpartition(":")[0]

    def ask(prompts: list[str], responses: list[str]) -> Any:
        try:
            return function(prompts, responses)
        except (Exception, SystemExit) as error:
            remedy = "correct the function, then go on with --resume; KEDGE_DEBUG=1 shows the traceback"
            raise _failure(_blamed(error, source) or where, name, error, remedy) from error

    return ask


def _failure(where: str, name: str, error: BaseException, remedy: str) -> InputError:
    message = str(error).strip().split("\n")[0]
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return InputError(Problem(where, f"channel {name}: {said}", remedy))


def _blamed(error: BaseException, source: str) -> str:
    """`file:line` of the last line of `source` on the way to the error, else of anything that it imported; or ''."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    machinery = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in machinery and not frame.filename.startswith("<frozen")
    ]
    own = [frame for frame in frames if frame.filename == source] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


# Regular expressions


def _searched(pattern: str, responses: list[str], where: str) -> list[float]:
    """1 for each response in which `re.search` finds the pattern, else 0."""
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    given = json.dumps([pattern, responses]).encode()
    try:
        # A session of its own: Ctrl-C is for the run, which ends its step first.
        done = subprocess.run(command, input=given, capture_output=True, timeout=REGEX_SECONDS, start_new_session=True)
    except subprocess.TimeoutExpired as error:
        row = len(error.stdout or b"")
        what = f"is still searching row {row} of {len(responses)} after {REGEX_SECONDS:g} s"
        remedy = "no repeat inside a repeat, such as (a+)+: it may try without end"
        raise InputError(Problem(where, what, remedy)) from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise InputError(Problem(where, f"cannot be searched for: {last}", "choose another pattern"))
    return [float(mark) for mark in done.stdout.decode()]
