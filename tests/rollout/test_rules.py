"""Rules that are a Python function or a regular expression: their numbers, and what is said when they give none."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.errors import InputError, Problem
from kedge.recipe.sections import Rule
from kedge.rollout import rules
from kedge.rollout.rules import RuleReward, rule_reward


def python(folder: Path, code: str, name: str = "judge", clip: float = 10.0) -> RuleReward:
    (folder / "own.py").write_text(code)
    return rule_reward("polite", Rule(kind="python", function=f"{folder / 'own.py'}:{name}", clip=clip))


def regex(pattern: str, clip: float = 10.0) -> RuleReward:
    return rule_reward("digits", Rule(kind="regex", pattern=pattern, clip=clip))


def giving(value: Any) -> RuleReward:
    return RuleReward("polite", 10.0, lambda prompts, responses: value, "own.py:1")


def refused(reward: RuleReward, *responses: str) -> Problem:
    with pytest.raises(InputError) as caught:
        reward(["p"] * len(responses), list(responses))
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


def unloadable(function: str) -> Problem:
    with pytest.raises(InputError) as caught:
        rule_reward("polite", Rule(kind="python", function=function))
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


# Numbers


def test_a_function_sees_prompts_and_responses(tmp_path: Path) -> None:
    code = "def judge(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n"
    found = python(tmp_path, code)(["abc", "", "é"], ["a", "four", "é"])
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0, -4.0, 0.0]


def test_numbers_are_held_within_the_clip(tmp_path: Path) -> None:
    code = "def judge(prompts, responses):\n    return [float(text) for text in responses]\n"
    found = python(tmp_path, code, clip=2.5)(["p"] * 5, ["-1e300", "-2.5", "0.5", "2.6", "1e308"])
    assert found.tolist() == [-2.5, -2.5, 0.5, 2.5, 2.5]


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5],
        (1.0, 0.5),
        np.array([1.0, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        [np.float64(1), np.float16(0.5)],
        torch.tensor([1.0, 0.5], requires_grad=True),
        [torch.tensor(1.0), torch.tensor(0.5)],
        [True, Decimal("0.5")],
    ],
)
def test_what_counts_as_numbers(value: Any) -> None:
    assert giving(value)(["p", "q"], ["a", "b"]).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1.0], "returned 1 numbers for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 responses"),
        ([], "returned 0 numbers for 2 responses"),
        ([1.0, float("nan")], "returned nan for row 1 of 2"),
        ([float("-inf"), 1.0], "returned -inf for row 0 of 2"),
        ([1.0, 10**400], "for row 1 of 2, not a finite number"),
        (np.array([np.inf, 1]), "returned inf for row 0 of 2"),
        ([1.0, "2"], "returned '2' for row 1 of 2"),
        ([1.0, None], "returned None for row 1 of 2"),
        ([1.0, [1.0]], "returned [1.0] for row 1 of 2"),
        (np.ones((2, 1)), "returned [1.0] for row 0 of 2"),
        ([1.0, 1j], "for row 1 of 2"),
        ([1.0, torch.ones(2)], "for row 1 of 2"),
        ("ab", "returned 'ab', not a list of numbers"),
        ({"a": 1, "b": 2}, "not a list of numbers"),
        (None, "returned None, not a list of numbers"),
        (1.0, "returned 1.0, not a list of numbers"),
        (np.float64(1), "returned 1.0, not a list of numbers"),
        (iter([1.0, 2.0]), "not a list of numbers"),
        ([1.0, "x" * 10_000], "for row 1 of 2"),
    ],
)
def test_what_does_not(value: Any, what: str) -> None:
    problem = refused(giving(value), "a", "b")
    assert problem.where == "own.py:1"
    assert problem.what.startswith("channel polite returned ")
    assert what in problem.what
    assert len(str(problem)) < 300


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6), st.floats(0.1, 1e6))
def test_any_finite_numbers_pass(numbers: list[float], clip: float) -> None:
    reward = RuleReward("polite", clip, lambda prompts, responses: numbers, "own.py:1")
    found = reward(["p"] * len(numbers), ["r"] * len(numbers))
    expected = np.array([min(max(number, -clip), clip) for number in numbers], dtype=np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


# Functions


def test_a_rule_cannot_change_what_others_see() -> None:
    prompts, responses = ["p"], ["r"]

    def greedy(own_prompts: list[str], own_responses: list[str]) -> list[float]:
        own_prompts.clear()
        own_responses[0] = "changed"
        return [1.0]

    RuleReward("polite", 10.0, greedy, "own.py:1")(prompts, responses)
    assert (prompts, responses) == (["p"], ["r"])


def test_a_function_of_a_module() -> None:
    reward = rule_reward("words", Rule(kind="python", function="operator:concat"))
    problem = refused(reward, "r")
    assert "returned 2 numbers for 1 responses" in problem.what
    assert problem.where == "operator:concat"


def test_an_exception_is_told_with_the_users_line(tmp_path: Path) -> None:
    code = (
        "import json\n"
        "def judge(prompts, responses):\n"
        "    return [parsed(text) for text in responses]\n"
        "def parsed(text):\n"
        "    return json.loads(text)['score']\n"
    )
    reward = python(tmp_path, code)
    assert reward(["p"], ['{"score": 2}']).tolist() == [2.0]
    problem = refused(reward, '{"score": 2}', "not json")
    assert problem.where == f"{tmp_path / 'own.py'}:5", "the last line of the user's, not that of the library"
    assert problem.what.startswith("channel polite: JSONDecodeError: Expecting value")
    assert "KEDGE_DEBUG" in problem.remedy


@pytest.mark.parametrize(
    ("body", "line", "what"),
    [
        ("def judge(prompts):\n    return [1.0]\n", 1, "TypeError"),
        ("def judge(prompts, responses):\n    raise SystemExit(3)\n", 2, "SystemExit: 3"),
        ("def judge(prompts, responses):\n    raise ValueError\n", 2, "ValueError"),
        ("def judge(prompts, responses):\n    raise ValueError('one\\ntwo')\n", 2, "ValueError: one"),
        ("def judge(prompts, responses):\n    return judge(prompts, responses)\n", 2, "RecursionError"),
    ],
)
def test_how_a_function_may_fail(tmp_path: Path, body: str, line: int, what: str) -> None:
    problem = refused(python(tmp_path, body), "a")
    assert problem.where == f"{tmp_path / 'own.py'}:{line}"
    assert problem.what.startswith(f"channel polite: {what}")
    assert "two" not in problem.what


def test_an_interrupt_is_no_failure_of_the_function(tmp_path: Path) -> None:
    reward = python(tmp_path, "def judge(prompts, responses):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        reward(["p"], ["r"])


@pytest.mark.parametrize(
    ("code", "where", "what"),
    [
        ("x = 1\ndef judge(:\n", ":2", "SyntaxError"),
        ("x = 1\ny = x / 0\n", ":2", "ZeroDivisionError"),
        ("import no_such_package_here\n", ":1", "ModuleNotFoundError"),
        ("raise SystemExit\n", ":1", "SystemExit"),
        ("x = 1\n", "rewards.polite.function", "has no function 'judge'"),
        ("judge = 3\n", "rewards.polite.function", "has no function 'judge'"),
    ],
)
def test_files_without_a_usable_function(tmp_path: Path, code: str, where: str, what: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(code)
    problem = unloadable(f"{path}:judge")
    assert problem.where == (where if where.startswith("rewards") else f"{path}{where}")
    assert what in problem.what


@pytest.mark.parametrize("function", ["no_such_package_here:judge", "os.nowhere:judge", "missing.py:judge"])
def test_functions_that_are_nowhere(function: str) -> None:
    problem = unloadable(function)
    assert problem.where == "rewards.polite.function"
    assert "Error: " in problem.what


def test_binary_rubbish_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_bytes(b"\xff\x00\xfe")
    assert "Error" in unloadable(f"{tmp_path / 'own.py'}:judge").what


def test_a_file_may_define_dataclasses_and_be_named_twice(tmp_path: Path) -> None:
    code = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "calls = []\n"
        "@dataclass\n"
        "class Found:\n"
        "    value: float\n"
        "def judge(prompts, responses):\n"
        "    calls.append(1)\n"
        "    return [Found(len(calls)).value for _ in responses]\n"
    )
    first = python(tmp_path, code)
    rule = Rule(kind="python", function=f"{tmp_path / 'own.py'}:judge")
    second = rule_reward("other", rule)
    assert [first(["p"], ["r"]).item() for _ in range(2)] == [1.0, 2.0]
    assert second(["p"], ["r"]).item() == 1.0, "every rule has a module of its own"


# Regular expressions


@pytest.mark.parametrize("pattern", [r"\d", r"(?i)^yes\b", "é|ß", "", r"\Z", r"(?s)a.b", "(?P<x>a)(?P=x)", "日本"])
def test_a_pattern_is_found_where_re_finds_it(pattern: str) -> None:
    texts = ["", "a1", "Yes, sir", "yesterday", "straße", "a\nb", "aa", "日本語", "\u2028", "\x00", "💧 9", "\ud800 1"]
    reward = RuleReward("digits", 10.0, lambda _, found: rules._searched(pattern, found, "x"), "x")
    assert reward([""] * len(texts), texts).tolist() == [float(bool(re.search(pattern, text))) for text in texts]


def test_a_match_is_clipped_like_any_number() -> None:
    assert regex(r"\d", clip=0.25)(["p", "p"], ["1", "x"]).tolist() == [0.25, 0.0]


def test_a_search_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "REGEX_SECONDS", 0.5)
    problem = refused(regex(r"^(a+)+$"), "aaa", "b", "a" * 60 + "b", "a")
    assert problem.where == "rewards.digits.pattern"
    assert "row 2 of 4 after 0.5 s" in problem.what


def test_a_search_that_fails_is_told() -> None:
    with pytest.raises(InputError, match=r"rewards\.digits\.pattern: cannot be searched for: .*error"):
        rules._searched("(", ["a"], "rewards.digits.pattern")


def test_ten_thousand_responses_of_some_length() -> None:
    texts = ["word " * 50 + str(number % 2) for number in range(10_000)]
    found = regex(r"1$")([""] * len(texts), texts)
    assert found.sum() == 5000
