"""The list of mutations stays applicable: every pattern occurs once, and what comes out is other, valid Python."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutate = load()
MUTATIONS = mutate.read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.module}: {m.name}")
def test_mutation_still_applies(mutation: object) -> None:
    source = (ROOT / "src" / "kedge" / mutation.module).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    broken = mutation.apply(source)  # type: ignore[attr-defined]
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))


def test_every_module_of_ops_is_mutated_and_has_tests() -> None:
    modules = {f"ops/{path.name}" for path in (ROOT / "src/kedge/ops").glob("*.py") if path.name != "__init__.py"}
    assert len(MUTATIONS) >= 25
    assert modules <= {mutation.module for mutation in MUTATIONS}
    assert all((ROOT / "tests" / test).exists() for tests in mutate.TESTS.values() for test in tests)


def test_a_pattern_that_does_not_match_once_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate.Mutation("none", "ops/kl.py", "no such text", "").apply("x = 1\n")
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutate.Mutation("two", "ops/kl.py", "x", "y").apply("x = x\n")


@pytest.mark.slow
def test_a_flipped_sign_is_killed() -> None:
    (mutation,) = [m for m in MUTATIONS if m.name == "KL reward with the wrong sign"]
    verdict, by = mutate.outcome(mutation)
    assert verdict == "killed"
    assert "test_the_kl_channel_is_k1" in by


@pytest.mark.slow
def test_a_harmless_change_survives() -> None:
    harmless = mutate.Mutation(
        "harmless", "ops/kl.py", "return logprobs - ref_logprobs\n", "return -ref_logprobs + logprobs\n"
    )
    assert mutate.outcome(harmless) == ("survived", "")
