"""Answers to what files cannot tell: from the command line, from the files themselves, and from who is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from kedge.errors import InputError, Problem
from kedge.importers import Answers, Format, Question

Ask = Callable[[Question], str]


def given(options: Sequence[str], known: Format) -> dict[str, str]:
    """`--answer key=value` options as a mapping. Raises InputError for keys and values that the format lacks."""
    questions = {one.key: one for one in known.asks}
    answers: dict[str, str] = {}
    problems = []
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in questions:
            what = f"is not known to {known.name}" if equals else "is not KEY=VALUE"
            problems.append(Problem(f"--answer {option}", what, f"use {', '.join(questions) or 'none'}"))
            continue
        wrong = fault(questions[key], value)
        if wrong is not None:
            problems.append(Problem(f"--answer {option}", *wrong))
        answers[key] = value
    if problems:
        raise InputError(problems)
    return answers


def fault(question: Question, value: str) -> tuple[str, str] | None:
    """What is wrong with an answer, and what would be right; None where it can be used."""
    if question.kind == "number" and value != question.default:
        try:
            if math.isfinite(float(value)):
                return None
        except ValueError:
            pass
        return "is not a number", "give a number" + (f" or {question.default}" if question.default else "")
    if question.choices and value not in question.choices:
        return "is not a choice", f"use {', '.join(question.choices)}"
    return None if value.strip() else ("is empty", "give an answer")


def complete(known: Format, answers: Mapping[str, str], told: Answers, ask: Ask | None, *, defaults: bool) -> Answers:
    """An answer to every question of the format.

    Answers on the command line come first, then those in the files, then the user's (`ask`) or, with `defaults`, the
    stated ones. Raises InputError with everything that is still open where there is nobody to ask.
    """
    held = {one.key: one for one in known.asks}
    for key, value in told.items():
        wrong = fault(held[key], value) if key in held else ("is not asked", f"use {', '.join(held)}")
        if wrong is not None:
            raise InputError(Problem(f"{key} = {value}, as the files say", *wrong))
    found = {**told, **answers}
    still = []
    for question in known.asks:
        if question.key in found:
            continue
        if not _matters(question, found):
            found[question.key] = question.default or "unknown"
        elif defaults and question.default is not None:
            found[question.key] = question.default
        elif ask is not None:
            found[question.key] = ask(question)
        else:
            still.append(question)
    if still:
        raise InputError([_unanswered(known, question) for question in still])
    return found


def _matters(question: Question, found: Answers) -> bool:
    """False where an earlier answer makes the question void, or is open itself: then this one comes next time."""
    if question.only_if is not None and found.get(question.only_if[0]) not in question.only_if[1]:
        return False
    if question.unless is None:
        return True
    key, values = question.unless
    return key in found and found[key] not in values


def _unanswered(known: Format, question: Question) -> Problem:
    """The open question as an error: what is asked, why, and every choice with what it means."""
    choices = "; ".join(f"{name}: {meaning}" for name, meaning in question.choices.items())
    default = f" (--yes takes {question.default})" if question.default is not None else ""
    form = choices or {"number": "a number", "columns": "names or numbers with commas"}.get(question.kind, "text")
    remedy = f"--answer {question.key}=...: {form}{default}"
    return Problem(f"{known.name}: {question.key}", f"{question.text} {_sentence(question.why)}", remedy)


def _sentence(text: str) -> str:
    return f"It matters: {text}."
