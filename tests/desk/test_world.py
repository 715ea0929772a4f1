"""The desk as a task: one seed, one world; streams of their own; the truth apart from everything else."""

from __future__ import annotations

from typing import Any

import pytest

from kedge.data.task import Task
from kedge.desk import world
from kedge.desk.annotators import Bias
from kedge.desk.gold import judge
from kedge.desk.world import desk_task, word_tokenizer

SIZES = {"demonstrations": 300, "pair_prompts": 80, "prompts": 120, "evaluation": 60, "probes": 10}


def task(seed: int = 0, **changes: Any) -> Task:
    return desk_task(**{"seed": seed, "bias": Bias(), **SIZES, **changes})


def texts(found: Task) -> dict[str, tuple[Any, ...]]:
    return {
        "demonstrations": found.demonstrations.rows,
        "held out": found.held_out.rows,
        "prompts": found.prompts.rows,
        "evaluation": found.evaluation.rows,
        "pairs": found.pair_prompts,
        "probes": found.probes,
    }


def test_a_seed_makes_a_world() -> None:
    assert texts(task()) == texts(task())
    other = texts(task(seed=1))
    assert all(rows != other[name] for name, rows in texts(task()).items())


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_larger_stream_changes_no_other(size: str) -> None:
    name = {"pair_prompts": "pairs"}.get(size, size)
    one, other = texts(task()), texts(task(**{size: SIZES[size] + 30}))
    assert len(other[name]) == SIZES[size] + 30
    for each in one:
        if each != name:
            assert one[each] == other[each]
    if name != "demonstrations" and name != "probes":  # whose answers follow after the questions
        assert other[name][: len(one[name])] == one[name]


def test_annotators_change_no_text() -> None:
    assert texts(task()) == texts(task(bias=Bias(length=0.13)))


def test_what_measures_is_in_no_other_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "HELD_OUT", 2000)
    found = task(evaluation=2000, demonstrations=4000, prompts=4000, pair_prompts=4000, probes=500)
    measured = set(found.evaluation.rows)
    held_out = {row.prompt for row in found.held_out.rows}
    trained = {row.prompt for row in found.demonstrations.rows} | set(found.prompts.rows) | set(found.pair_prompts)
    trained |= {probe.prompt for probe in found.probes}
    assert not measured & trained and not held_out & trained and not measured & held_out


def test_the_truth_is_the_gold_utility() -> None:
    found = task()
    assert found.truth is not None
    demonstration = found.demonstrations.rows[0]
    known = found.truth(demonstration.prompt, demonstration.response)
    assert known.keys() == {"gold", "correct", "answered", "verbose"}
    probe = found.probes[0]
    brief, verbose = (found.truth(probe.prompt, text) for text in (probe.brief, probe.verbose))
    assert brief["correct"] == verbose["correct"] == 1
    assert brief["gold"] > verbose["gold"]


def test_annotators_prefer_what_they_are_told_to() -> None:
    found = task(bias=Bias(noise=0.0, sharpness=1e6))
    biased = task(bias=Bias(length=10.0, noise=0.0, sharpness=1e6))
    assert found.labeller is not None and biased.labeller is not None and found.truth is not None
    pairs = [(probe.prompt, probe.brief, probe.verbose) for probe in found.probes]
    assert list(found.labeller(pairs)) == [True] * 10
    assert list(biased.labeller(pairs)) == [False] * 10
    again = [(prompt, second, first) for prompt, first, second in pairs]
    assert list(found.labeller(again)) == [False] * 10


def test_demonstrations_mix_styles_and_hold_mistakes() -> None:
    found = task(demonstrations=3000)
    assert found.truth is not None
    known = [found.truth(row.prompt, row.response) for row in found.demonstrations.rows]
    share = {name: sum(row[name] for row in known) / len(known) for name in ("correct", "answered", "verbose")}
    assert 0.7 < share["correct"] < 0.95
    assert share["correct"] < share["answered"] < 1
    assert 0.1 < share["verbose"] < 0.35


def test_the_tokenizer_reads_every_word_and_writes_it_back() -> None:
    found = task(demonstrations=3000)
    assert found.make_tokenizer is not None
    tokenizer = found.make_tokenizer()
    unknown = 0
    for row in found.demonstrations.rows[:50]:
        ids = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row.response
        assert len(ids) == judge_length(row.response)
    for prompt in found.evaluation.rows:
        ids = tokenizer(prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        unknown += ids.count(tokenizer.unk_token_id)
    assert unknown == 0
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def judge_length(text: str) -> int:
    """Length as the gold utility counts it, EOS left out."""
    import numpy as np

    from kedge.desk.grammar import ask

    return judge(ask(np.random.default_rng(0)), text).length


def test_unseen_words_are_unknown() -> None:
    tokenizer = word_tokenizer(["a b", "b c"])
    assert tokenizer("a d", add_special_tokens=False)["input_ids"][1] == tokenizer.unk_token_id
