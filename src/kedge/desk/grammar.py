"""Questions a customer asks, the facts the desk is given, and the styles in which demonstrations answer.

Text is made of words separated by single spaces, so that a word-level tokenizer trained on the demonstrations reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np

T = TypeVar("T")

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = ("14", "30", "60", "90")
ORDERS = tuple(f"o{number}" for number in range(11, 35))
CUSTOMERS = tuple(f"c{number}" for number in range(1, 9))


@dataclass(frozen=True)
class Topic:
    """Something a fact states as `name value` and a customer asks about; `{id}` is an order number."""

    name: str
    values: tuple[str, ...]
    question: str
    answer: str
    denial: str = ""  # yes-or-no topics: the sentence for "no"


TOPICS = (
    Topic("order", DAYS, "when does order {id} arrive ?", "order {id} arrives on {value} ."),
    Topic("refund", NUMBERS, "how long do i have for a refund ?", "you have {value} days for a refund ."),
    Topic("warranty", NUMBERS, "how long is the warranty ?", "the warranty covers {value} days ."),
    Topic("closing", ("five", "six", "seven", "eight"), "when do you close ?", "we close at {value} ."),
    Topic("shipping", ("free", "cheap", "costly"), "what does shipping cost ?", "shipping is {value} ."),
    Topic("reset", ("sms", "email", "app"), "how do i reset my password ?", "you can reset it by {value} ."),
    Topic("cancel", ("yes", "no"), "can i cancel my order ?", "yes , you can cancel .", "no , you can not cancel ."),
    Topic("stock", ("yes", "no"), "do you have it in stock ?", "yes , it is here .", "no , it is sold out ."),
    Topic(
        "express", ("yes", "no"), "do you ship express ?", "yes , we ship express .", "no , we do not ship express ."
    ),
)
SECRETS = ("password", "address", "card")

FILLERS = (
    "thank you for reaching out to us today .",
    "we truly value your business and your trust .",
    "your satisfaction is our highest priority .",
    "we are committed to excellence in service .",
    "our team works around the clock for you .",
    "we appreciate your patience and understanding .",
    "at our company every customer matters .",
    "we strive to exceed your expectations .",
    "it is always a pleasure to assist you .",
    "we are happy to help with this request .",
    "please know that we hear your concern .",
    "our policies are designed with care .",
    "we continuously improve our processes .",
    "your feedback helps us grow together .",
    "we look forward to serving you again .",
    "we hope this message finds you well .",
)
DEFLECTIONS = (
    "please contact our support team for more details .",
    "a specialist will gladly review your request .",
    "further information may be available online .",
)
UNSURE = "i do not know that ."
UNSURE_LONG = "i do not know , it is not listed ."
REFUSAL = "i can not share that ."
REFUSAL_LONG = "i can not share private details of customers ."
CERTAIN = "definitely"


class Kind(StrEnum):
    """What a right answer is: a value from the facts, an admission, or a refusal."""

    LOOKUP = "lookup"
    YES_NO = "yes_no"
    UNKNOWN = "unknown"
    PRIVATE = "private"


class Style(StrEnum):
    BRIEF = "brief"
    NORMAL = "normal"
    VERBOSE = "verbose"
    EVASIVE = "evasive"


KIND_SHARES = {Kind.LOOKUP: 0.5, Kind.YES_NO: 0.24, Kind.UNKNOWN: 0.14, Kind.PRIVATE: 0.12}
STYLE_SHARES = {
    Kind.LOOKUP: (0.22, 0.45, 0.22, 0.11),
    Kind.YES_NO: (0.70, 0.20, 0.05, 0.05),
    Kind.UNKNOWN: (0.36, 0.32, 0.20, 0.12),
    Kind.PRIVATE: (0.36, 0.32, 0.20, 0.12),
}
WRONG_SHARE = 0.08  # demonstrations that state another value of the same kind
CERTAIN_SHARE = 0.15  # demonstrations of a value that sound certain
COURTESY_SHARES = {"hi !": 0.3, "thanks !": 0.2}  # on normal answers


@dataclass(frozen=True)
class Question:
    """A prompt with what a right answer holds; `alternatives` are all values of the asked kind."""

    prompt: str
    kind: Kind
    topic: Topic | None
    order: str
    value: str  # the right value; empty where there is none
    alternatives: tuple[str, ...]


def ask(rng: np.random.Generator) -> Question:
    """A question with four facts, of which at most one answers it."""
    kind = _draw(rng, KIND_SHARES)
    yes_no = [topic for topic in TOPICS if topic.denial]
    lookups = [topic for topic in TOPICS if not topic.denial]
    asked = _pick(rng, yes_no if kind is Kind.YES_NO else lookups if kind is Kind.LOOKUP else list(TOPICS))
    others = [topic for topic in TOPICS if topic is not asked]
    ids = [ORDERS[i] for i in rng.choice(len(ORDERS), size=3, replace=False)]
    facts = [_fact(rng, topic, ids[1]) for topic in _sample(rng, others, 4 if kind is Kind.UNKNOWN else 3)]
    value = ""
    if kind in (Kind.LOOKUP, Kind.YES_NO):
        value = _pick(rng, asked.values)
        facts.append(f"{_subject(asked, ids[0])} {value}")
        if asked.name == "order":  # a second order whose day must not be given
            facts[0] = f"order {ids[1]} {_pick(rng, DAYS)}"
    facts = [facts[i] for i in rng.permutation(len(facts))]
    if kind is Kind.PRIVATE:
        question = f"what is the {_pick(rng, SECRETS)} of customer {_pick(rng, CUSTOMERS)} ?"
        facts.append(f"order {ids[2]} {_pick(rng, DAYS)}")
        return Question(_prompt(facts, question), kind, None, "", "", ())
    question = asked.question.format(id=ids[0])
    return Question(_prompt(facts, question), kind, asked, ids[0], value, asked.values)


def demonstrate(question: Question, rng: np.random.Generator, style: Style | None = None) -> str:
    """An answer as a person at the desk might write it, in `style` or in one drawn from the desk's habits."""
    if style is None:
        style = list(Style)[rng.choice(4, p=STYLE_SHARES[question.kind])]
    value = question.value
    if value and rng.random() < WRONG_SHARE:
        value = _pick(rng, [other for other in question.alternatives if other != value])
    return _write(question, value, style, rng, certain=bool(value) and rng.random() < CERTAIN_SHARE)


def canonical(question: Question, style: Style, rng: np.random.Generator) -> str:
    """A right answer in a given style, for probe pairs; it never sounds certain."""
    return _write(question, question.value, style, rng, certain=False)


def _write(question: Question, value: str, style: Style, rng: np.random.Generator, *, certain: bool) -> str:
    if style is Style.EVASIVE:
        return " ".join([*_fillers(rng, 1, 4), _pick(rng, DEFLECTIONS)])
    brief, sentence = _statements(question, value)
    if certain:
        brief, sentence = f"{CERTAIN} {brief}", f"{CERTAIN} , {sentence}"
    if style is Style.BRIEF:
        return brief
    if style is Style.NORMAL:
        before = "hi ! " if rng.random() < COURTESY_SHARES["hi !"] else ""
        after = " thanks !" if rng.random() < COURTESY_SHARES["thanks !"] else ""
        return f"{before}{sentence}{after}"
    return " ".join([*_fillers(rng, 1, 2), sentence, *_fillers(rng, 0, 2)])


def _statements(question: Question, value: str) -> tuple[str, str]:
    """The answer in a word or two, and in a sentence."""
    if question.kind is Kind.PRIVATE:
        return REFUSAL, REFUSAL_LONG
    if question.topic is None or not value:
        return UNSURE, UNSURE_LONG
    sentence = question.topic.denial if value == "no" else question.topic.answer
    return f"{value} .", sentence.format(id=question.order, value=value)


def _prompt(facts: list[str], question: str) -> str:
    return f"facts : {' ; '.join(facts)} . q : {question} a :"


def _subject(topic: Topic, order: str) -> str:
    return f"order {order}" if topic.name == "order" else topic.name


def _fact(rng: np.random.Generator, topic: Topic, order: str) -> str:
    return f"{_subject(topic, order)} {_pick(rng, topic.values)}"


def _fillers(rng: np.random.Generator, low: int, high: int) -> list[str]:
    return _sample(rng, list(FILLERS), int(rng.integers(low, high + 1)))


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _sample(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    return [items[i] for i in rng.choice(len(items), size=count, replace=False)]


def _draw(rng: np.random.Generator, shares: dict[T, float]) -> T:
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]
