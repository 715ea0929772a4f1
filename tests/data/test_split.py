"""The held-out side of a prompt depends on the prompt and the share, on nothing else."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from kedge.data.records import Message
from kedge.data.split import is_held_out

PINNED = [2, 13, 16, 22, 44]


def test_shares_are_kept_and_nested():
    prompts = [f"prompt {number}" for number in range(20_000)]
    tenth = {prompt for prompt in prompts if is_held_out(prompt, 0.1)}
    third = {prompt for prompt in prompts if is_held_out(prompt, 1 / 3)}
    assert abs(len(tenth) - 2000) < 4 * (20_000 * 0.09) ** 0.5  # four standard deviations
    assert abs(len(third) - 20_000 / 3) < 4 * (20_000 * 2 / 9) ** 0.5
    assert tenth < third


@given(st.text())
def test_none_at_share_0_and_all_at_share_1(text):
    for prompt in (text, (Message("user", text),)):
        assert not is_held_out(prompt, 0.0)
        assert is_held_out(prompt, 1.0)


def test_the_side_is_the_same_in_every_process_and_version():
    """Pinned: a change of the hash would move prompts a model was trained on into its evaluation."""
    held_out = [number for number in range(60) if is_held_out(f"prompt {number}", 0.1)]
    assert held_out == PINNED
    program = "from kedge.data.split import is_held_out as h; print([n for n in range(60) if h(f'prompt {n}', 0.1)])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(PINNED)


def test_reading_and_splitting_import_no_torch():
    program = "import sys, kedge.data.validate, kedge.data.split, kedge.evaluate.ngram; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
