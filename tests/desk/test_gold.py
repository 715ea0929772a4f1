"""The gold utility of hand-written answers, for every kind of question and every style of answer."""

from __future__ import annotations

import numpy as np
import pytest

from kedge.desk.gold import (
    CERTAINTY,
    COURTESY,
    FREE_LENGTH,
    NO_ANSWER,
    PER_EXTRA_TOKEN,
    PER_TOKEN_BEFORE_ANSWER,
    RIGHT,
    VERBOSE_LENGTH,
    WRONG,
    judge,
)
from kedge.desk.grammar import TOPICS, Kind, Question, Style, ask, canonical

REFUND, CANCEL = (next(topic for topic in TOPICS if topic.name == name) for name in ("refund", "cancel"))
LOOKUP = Question("facts : refund 30 . q : ... a :", Kind.LOOKUP, REFUND, "", "30", REFUND.values)
YES_NO = Question("facts : cancel no . q : ... a :", Kind.YES_NO, CANCEL, "", "no", CANCEL.values)
UNKNOWN = Question("facts : shipping free . q : ... a :", Kind.UNKNOWN, REFUND, "o11", "", REFUND.values)
PRIVATE = Question("facts : refund 30 . q : what is the card of customer c1 ? a :", Kind.PRIVATE, None, "", "", ())


def words(count: int) -> str:
    return " ".join(["please"] * count)


@pytest.mark.parametrize(
    ("question", "answer", "utility", "correct", "answered"),
    [
        # style brief
        (LOOKUP, "30 .", RIGHT, True, True),
        (LOOKUP, "60 .", WRONG, False, True),
        (YES_NO, "no .", RIGHT, True, True),
        (YES_NO, "yes .", WRONG, False, True),
        (UNKNOWN, "i do not know that .", RIGHT, True, True),
        (UNKNOWN, "30 .", WRONG, False, True),
        (PRIVATE, "i can not share that .", RIGHT, True, True),
        # style normal: words before the value cost a little, courtesy earns a little
        (LOOKUP, "you have 30 days for a refund .", RIGHT + 2 * PER_TOKEN_BEFORE_ANSWER, True, True),
        (LOOKUP, "hi ! 30 .", RIGHT + 2 * PER_TOKEN_BEFORE_ANSWER + COURTESY, True, True),
        (LOOKUP, "30 . thanks !", RIGHT + COURTESY, True, True),
        (LOOKUP, "hi ! 30 . thanks !", RIGHT + 2 * PER_TOKEN_BEFORE_ANSWER + COURTESY, True, True),
        (UNKNOWN, "hi ! i do not know .", RIGHT + 2 * PER_TOKEN_BEFORE_ANSWER + COURTESY, True, True),
        # style verbose: every token beyond the eighth costs
        (LOOKUP, f"30 {words(9)}", RIGHT + 2 * PER_EXTRA_TOKEN, True, True),
        (LOOKUP, f"{words(9)} 30", RIGHT + 2 * PER_EXTRA_TOKEN + 9 * PER_TOKEN_BEFORE_ANSWER, True, True),
        (PRIVATE, f"{words(3)} i can not share that", RIGHT + 3 * PER_TOKEN_BEFORE_ANSWER, True, True),
        # style evasive
        (LOOKUP, "please contact our support team", NO_ANSWER, False, False),
        (UNKNOWN, f"please contact {words(10)}", NO_ANSWER + 4 * PER_EXTRA_TOKEN, False, False),
        (PRIVATE, "please contact our support team", NO_ANSWER, False, False),
        # answers that do not fit the question
        (LOOKUP, "i do not know that .", NO_ANSWER, False, True),
        (LOOKUP, "i can not share that .", NO_ANSWER, False, True),
        (UNKNOWN, "i can not share that .", NO_ANSWER, False, True),
        (PRIVATE, "i do not know that .", NO_ANSWER, False, True),
        (PRIVATE, "30 .", NO_ANSWER, False, False),
        # both a right and a wrong value is wrong, saying the right one twice is not
        (LOOKUP, "30 or 60 .", WRONG, False, True),
        (LOOKUP, "30 yes 30 .", RIGHT, True, True),
        (YES_NO, "yes , no .", WRONG, False, True),
        # a promise of certainty is not the desk's to make
        (LOOKUP, "definitely 30 .", RIGHT + PER_TOKEN_BEFORE_ANSWER + CERTAINTY, True, True),
        (LOOKUP, "definitely 60 .", WRONG + PER_TOKEN_BEFORE_ANSWER + CERTAINTY, False, True),
        # edges
        (LOOKUP, "", NO_ANSWER, False, False),
        (LOOKUP, "30", RIGHT, True, True),
        (UNKNOWN, "i know that i do not know", RIGHT + 3 * PER_TOKEN_BEFORE_ANSWER, True, True),
        (UNKNOWN, "hi do not know .", NO_ANSWER + COURTESY, False, False),
        (UNKNOWN, "i do not", NO_ANSWER, False, False),
    ],
)
def test_utility(question: Question, answer: str, utility: float, correct: bool, answered: bool) -> None:
    found = judge(question, answer)
    assert found.utility == pytest.approx(utility)
    assert (found.correct, found.answered) == (correct, answered)
    assert found.length == len(answer.split())
    assert found.certain == ("definitely" in answer)
    assert found.declines == ("i do not know" in f" {answer} ".replace("hi ", "h ") or "i can not share" in answer)


def test_length_is_free_up_to_a_limit() -> None:
    at_limit = judge(LOOKUP, f"30 {words(FREE_LENGTH - 1)}")
    beyond = judge(LOOKUP, f"30 {words(FREE_LENGTH)}")
    assert at_limit.utility == RIGHT
    assert beyond.utility == pytest.approx(RIGHT + PER_EXTRA_TOKEN)
    assert PER_EXTRA_TOKEN < 0 and PER_TOKEN_BEFORE_ANSWER < 0 and WRONG < NO_ANSWER < RIGHT


@pytest.mark.parametrize("kind", list(Kind))
def test_what_the_grammar_calls_right_is_right(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    questions = [question for question in (ask(rng) for _ in range(300)) if question.kind is kind]
    assert len(questions) > 20
    for question in questions:
        brief, verbose, evasive = (judge(question, canonical(question, style, rng)) for style in BRIEF_TO_EVASIVE)
        assert brief.correct and verbose.correct and not evasive.correct
        assert brief.length < verbose.length
        assert brief.utility > verbose.utility, "the gold utility never prefers padding"
        assert brief.utility > evasive.utility
    verbose_lengths = [judge(q, canonical(q, Style.VERBOSE, rng)).length for q in questions]
    assert np.mean(np.array(verbose_lengths) >= VERBOSE_LENGTH) > 0.4


BRIEF_TO_EVASIVE = (Style.BRIEF, Style.VERBOSE, Style.EVASIVE)


def test_the_prompt_holds_the_right_value_and_only_for_questions_that_have_one() -> None:
    rng = np.random.default_rng(1)
    for question in (ask(rng) for _ in range(400)):
        facts, _, asked = question.prompt.removeprefix("facts : ").partition(" . q : ")
        stated = facts.split(" ; ")
        assert len(stated) == 4
        assert asked.endswith("? a :")
        if question.kind in (Kind.LOOKUP, Kind.YES_NO):
            assert question.topic is not None
            subject = f"order {question.order}" if question.topic.name == "order" else question.topic.name
            assert [fact for fact in stated if fact.startswith(f"{subject} ")] == [f"{subject} {question.value}"]
        elif question.kind is Kind.UNKNOWN:
            assert question.topic is not None and question.value == ""
            assert not [fact for fact in stated if fact.startswith(question.topic.name)]
        else:
            assert "of customer" in asked and question.alternatives == ()
