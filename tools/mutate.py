"""Break the equations one at a time and see whether a test notices.

Each mutation in `mutations.toml` replaces one piece of source, found by exact match, in a temporary copy of the
package, and the tests of that module run against the copy. A mutation that no test kills is a hole in the tests.

    python tools/mutate.py                  all of them, a table, exit code 1 if any survives
    python tools/mutate.py --only sign      those with "sign" in their name
    python tools/mutate.py --list           names and places only
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "kedge"
SECONDS = 180

# Which tests answer for a module, quickest first; the run stops at the first failure.
TESTS = {
    "ops/masked.py": ("ops/test_ops_masked.py",),
    "ops/logprobs.py": ("ops/test_ops_logprobs.py",),
    "ops/kl.py": ("ops/test_ops_kl.py",),
    "ops/control.py": ("ops/test_ops_control.py",),
    "ops/rewards.py": ("ops/test_ops_rewards.py",),
    "ops/advantages.py": ("ops/test_ops_groups.py", "ops/test_ops_advantages.py"),
    "ops/losses.py": ("ops/test_worked_examples.py", "ops/test_ops_losses.py"),
    "ops/direct.py": ("ops/test_ops_direct.py",),
    "ops/bestofn.py": ("ops/test_ops_bestofn.py",),
    "ops/preferences.py": ("ops/test_worked_examples.py", "ops/test_ops_preferences.py"),
    "ops/length.py": ("ops/test_ops_length.py",),
    "ops/lowess.py": ("ops/test_lowess.py",),
    "ops/shaping.py": ("ops/test_ops_shaping.py",),
    "ops/ensembles.py": ("ops/test_ops_ensembles.py",),
    "ops/distance.py": ("ops/test_ops_distance.py",),
    "structs.py": ("oracles/test_multi_turn.py", "oracles/test_o05_parts_sum.py"),
    "rollout/engine.py": ("oracles/test_generate.py",),
    "rollout/shaping.py": ("rollout/test_shaping.py",),
    "rollout/score.py": ("oracles/test_generate.py", "oracles/test_multi_turn.py"),
    "models/correction.py": ("train/test_length_methods.py",),
    "train/objectives.py": ("train/test_objectives.py", "train/test_length_methods.py"),
    "train/length.py": ("train/test_length_methods.py",),
    "train/normalise.py": ("train/test_normalise.py", "train/test_ranks.py"),
    "train/mix.py": ("train/test_mix.py",),
    "train/token_constants.py": ("train/test_token_constants.py",),
    "train/sequence_update.py": ("train/test_online.py", "train/test_direct.py"),
    "train/choice.py": ("train/test_online.py",),
    "train/direct.py": ("train/test_direct.py",),
    "rollout/best_of.py": ("rollout/test_best_of.py",),
    "train/experience.py": (
        "train/test_methods.py",
        "oracles/test_o05_parts_sum.py",
        "oracles/test_sampler_differs.py",
    ),
    "train/controller.py": ("train/test_controllers.py",),
    "train/limit.py": ("train/test_limits.py",),
    "train/update.py": ("train/test_update_terms.py", "oracles/test_o11_update.py", "oracles/test_sampler_differs.py"),
}


@dataclass(frozen=True)
class Mutation:
    """In `module`, `old` (which occurs exactly once) becomes `new`."""

    name: str
    module: str
    old: str
    new: str

    def apply(self, source: str) -> str:
        """The broken source. Raises `ValueError` unless `old` occurs exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {count} times in {self.module}, expected once")
        return source.replace(self.old, self.new)


def read_mutations() -> list[Mutation]:
    """All mutations of `mutations.toml`, in its order."""
    modules = tomllib.loads((ROOT / "tools" / "mutations.toml").read_text(encoding="utf-8"))
    return [Mutation(name, module, old, new) for module, rows in modules.items() for name, (old, new) in rows.items()]


def pytest_on(package_parent: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and last line of pytest on `tests` (under tests/) with the package imported from `package_parent`."""
    environment = {**os.environ, "PYTHONPATH": str(package_parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow"]
    command += [str(ROOT / "tests" / test) for test in tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {SECONDS} s"
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode, (failed or done.stdout.splitlines() or [done.stderr])[-1]


def copy_of_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "kedge", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def outcome(mutation: Mutation) -> tuple[str, str]:
    """("killed", by which test), ("survived", "") or ("broken", why)."""
    with tempfile.TemporaryDirectory(prefix="kedge-mutant-") as name:
        folder = copy_of_package(Path(name))
        module = folder / "kedge" / mutation.module
        module.write_text(mutation.apply(module.read_text(encoding="utf-8")), encoding="utf-8")
        code, line = pytest_on(folder, TESTS[mutation.module])
    verdict = {0: "survived", 1: "killed"}.get(code, "broken")
    return verdict, line.removeprefix("FAILED ") if verdict != "survived" else ""


def baseline_passes(modules: set[str]) -> bool:
    """Whether the tests pass on a faithful copy, and do run against the copy."""
    with tempfile.TemporaryDirectory(prefix="kedge-mutant-") as name:
        folder = copy_of_package(Path(name))
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        where = subprocess.run(
            [sys.executable, "-c", "import kedge; print(kedge.__file__)"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        if not where.stdout.startswith(str(folder)):
            say(f"the tests would import {where.stdout.strip()}, not the copy")
            return False
        tests = list(dict.fromkeys(test for module in TESTS if module in modules for test in TESTS[module]))
        code, line = pytest_on(folder, tests)
        if code:
            say(f"the tests fail before anything is broken: {line}")
        return code == 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name or module contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="list the mutations and stop")
    arguments = parser.parse_args()
    chosen = [m for m in read_mutations() if arguments.only in m.name or arguments.only in m.module]
    if arguments.list:
        for mutation in chosen:
            say(f"{mutation.module:20} {mutation.name}")
        return 0
    if not chosen:
        say(f"no mutation has {arguments.only!r} in its name or module")
        return 2
    if not baseline_passes({mutation.module for mutation in chosen}):
        return 2
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (verdict, by) in zip(chosen, pool.map(outcome, chosen), strict=True):
            survivors += verdict != "killed"
            say(f"{verdict:9} {mutation.module:20} {mutation.name:45} {by}")
    say(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
