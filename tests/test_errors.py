"""Errors keep what they say on their way between processes."""

from __future__ import annotations

import copy

from kedge.errors import DivergenceError, InputError, Interrupted, Problem


def test_problems_survive_the_way_between_processes() -> None:
    problems = [Problem("a.toml:3", "is wrong", "mend it"), Problem("b", "too")]
    back = copy.copy(InputError(problems))  # by the same way as between processes
    assert back.problems == tuple(problems)
    assert str(back) == "a.toml:3: is wrong -> mend it\nb: too"
    assert str(copy.copy(DivergenceError("step 3"))) == "step 3"


def test_a_stop_says_where_and_how_to_go_on() -> None:
    assert str(Interrupted("policy step 3")).startswith("policy step 3: stopped on request -> ")
