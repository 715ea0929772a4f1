"""Groups are what their names say, sums over them are sums over their tokens, and labels find what they are about."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from step_traces import random_step
from synthetic_run import World, make_run

from kedge.diagnose.groups import Grouping, crossed, grouping_named
from kedge.diagnose.phrases import PhraseTally, vocabulary
from kedge.diagnose.push import Measure
from kedge.diagnose.split import split
from kedge.diagnose.survey import account, survey
from kedge.errors import InputError
from kedge.trace.labels import Labels, LabelSet, text_key
from kedge.trace.reader import Run, read_run

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("run"), World(steps=STEPS, batch=16, penalty=0.02)))


def named(run: Run, spec: str, labels: Labels | None = None) -> Grouping:
    return grouping_named(spec, run, run.steps(), labels)


@pytest.mark.parametrize("spec", ["style", "position", "time", "feature:length", "feature:hedges"])
def test_groups_hold_every_token_once(run: Run, spec: str) -> None:
    found = account(run, named(run, spec))
    everything = account(run, crossed([]))
    assert found.ungrouped == 0
    for entry, sums in found.sums.items():
        assert sums.sum() == pytest.approx(everything.sums[entry].sum(), abs=1e-9)
    for name in ("tokens", "advantage", "silenced", "signed_tokens", "silenced_tokens", "moved"):
        assert getattr(found, name).sum() == pytest.approx(getattr(everything, name).sum(), abs=1e-9)
    parts = sum(sums for entry, sums in found.sums.items() if entry.kind == "part")
    np.testing.assert_allclose(parts, found.advantage, atol=1e-9)


def test_a_crossed_cell_by_a_loop(run: Run) -> None:
    found = account(run, crossed([named(run, "style"), named(run, "position")]))
    cell = found.labels.index("verbose, token 9–16")
    advantage = silenced = change = 0.0
    tokens, responses, below, held = 0, 0, 0, 0
    for step in run.traces():
        total = step.advantage()
        for b in range(len(step)):
            if step.response_mask[b].sum() <= 15:
                continue
            places = np.flatnonzero(step.response_mask[b])[8:16]
            responses += len(places) > 0
            for t in places:
                tokens += 1
                advantage += total[b, t]
                change += step.tokens["new_logprob"][b, t] - step.tokens["old_logprob"][b, t]
                below += total[b, t] < 0
                if not step.active[b, t]:
                    silenced += total[b, t]
                    held += total[b, t] < 0
    assert (found.tokens[cell], found.responses[cell]) == (tokens, responses)
    assert found.advantage[cell] == pytest.approx(advantage)
    assert found.moved[cell] == pytest.approx(change)
    assert found.silenced[cell].sum() == pytest.approx(silenced)
    assert found.reached[cell] == pytest.approx(advantage - silenced)
    assert (found.signed_tokens[cell, 0], found.silenced_tokens[cell, 0]) == (below, held)
    assert found.per_token(found.advantage)[cell] == pytest.approx(advantage / tokens)
    assert found.per_response(found.advantage)[cell] == pytest.approx(advantage / responses)


def test_time_is_cut_into_stretches(run: Run) -> None:
    grouping = named(run, "time")
    assert grouping.labels == ("steps 0–1", "steps 2–3", "steps 4–4", "steps 5–5")
    assert [int(grouping.of(run.step(step))[0]) for step in run.steps()] == [0, 0, 1, 1, 2, 3]


def test_terciles_are_those_of_known_prompts(run: Run, tmp_path: Path) -> None:
    found = account(run, named(run, "tercile"))
    assert found.tokens.sum() == 0 and found.ungrouped > 0  # the probes' prompts are others
    table = run.probes()
    known = dict(zip(table.column("prompt").to_pylist(), table.column("tercile").to_pylist(), strict=True))
    prompts = [*list(known)[:5], "another"]
    step = random_step(np.random.default_rng(0), prompts=prompts)
    assert named(run, "tercile").of(step).tolist() == [*(known[prompt] for prompt in prompts[:5]), -1]
    hashed = random_step(np.random.default_rng(0), prompts=[text_key(prompt) for prompt in prompts])
    assert named(run, "tercile").of(hashed).tolist() == named(run, "tercile").of(step).tolist()


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", World(steps=2, batch=4))
    for file in [*path.glob("trace/probes-*"), *path.glob("trace/samples-*")]:
        file.unlink()
    bare = read_run(path)
    for spec in ("style", "tercile"):
        grouping = named(bare, spec)
        assert grouping.labels == () and grouping.note.startswith("not known: no probe")
        assert account(bare, grouping).ungrouped > 0


def test_features_are_cut_where_they_differ(run: Run) -> None:
    flag = named(run, "feature:regex:response 1$")
    assert flag.labels == ("response 1$ no", "response 1$ yes")
    thirds = named(run, "feature:length")
    assert len(thirds.labels) == 3
    found = account(run, thirds)
    assert found.responses.min() > 10
    constant = named(run, "feature:hedges")
    assert account(run, constant).tokens.min() == 0


def test_mistakes(run: Run) -> None:
    for spec, message in (
        ("stile", "did you mean style"),
        ("label:grade", "kedge label join"),
        ("colour", "take one of style"),
        ("feature:", "is not a way to group"),
        ("feature:lenght", "write length"),
    ):
        with pytest.raises(InputError, match=message):
            named(run, spec)
    many = Grouping("many", tuple(map(str, range(50))), lambda step: np.zeros(len(step), int))
    with pytest.raises(InputError, match="2500 groups"):
        crossed([many, many])


def labels_of(**columns: dict[tuple[int, int], object]) -> Labels:
    return Labels([LabelSet("audit", {}, columns)])


def test_a_label_groups_its_responses(run: Run) -> None:
    said = {(step, row): "good" if row % 3 else "bad" for step in range(STEPS) for row in range(15)}
    found = account(run, named(run, "label:grade", labels_of(grade=said)))
    assert found.labels == ("grade bad", "grade good")
    lengths = {"bad": 0, "good": 0, "": 0}
    for step in run.traces():
        for row, length in enumerate(step.lengths):
            lengths["" if row == 15 else "good" if row % 3 else "bad"] += int(length)
    assert found.tokens.tolist() == [lengths["bad"], lengths["good"]] and found.ungrouped == lengths[""]


def test_labels_as_numbers(run: Run) -> None:
    labels = labels_of(n={(step, row): 2.5 for step in range(STEPS) for row in range(2)})
    found = labels.numbers(run.step(0), "n")
    assert found[:2].tolist() == [2.5, 2.5] and np.isnan(found[2:]).all()
    pushed = survey(run, measures=[Measure("n", "1", lambda step: labels.numbers(step, "n"))]).pushes
    assert pushed[0].responses == 2 * STEPS
    with pytest.raises(InputError, match="holds words"):
        labels_of(g={(0, 1): "x"}).numbers(run.step(0), "g")


def test_many_numbers_are_cut_and_many_words_gathered(run: Run) -> None:
    places = [(step, row) for step in range(6) for row in range(16)]
    labels = labels_of(n={place: 16.0 * place[0] + place[1] for place in places}, word={p: f"w{p}" for p in places})
    assert len(named(run, "label:n", labels).labels) == 3
    words = named(run, "label:word", labels)
    assert len(words.labels) == 25 and words.labels[-1] == "word (other)"
    assert account(run, words).ungrouped == 0
    assert named(run, "label:n", labels_of(n={(0, 0): 1.0, (0, 1): 0.0})).labels == ("n 0", "n 1")


def test_labels_that_are_not_there(run: Run) -> None:
    with pytest.raises(InputError, match=r"it has grade, audit, audit\.grade"):
        named(run, "label:worth", labels_of(grade={(0, 0): "good"}))


# Phrases


def test_phrases_are_counted_with_the_advantage_of_their_tokens() -> None:
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 3, (6, 7))
    steps = [random_step(rng, ids=ids, channels=("score", "kl"), step=number) for number in range(3)]
    tally = PhraseTally({0: " a", 1: " b", 2: " c"}, size=2)
    expected: dict[str, tuple[int, float, float]] = {}
    for step in steps:
        rows = split(step)
        tally.add(step, rows)
        total = step.advantage()
        score = sum(rows.tokens[..., index] for index in rows.of_kind("part") if rows.entries[index].channel == "score")
        for b in range(len(step)):
            kept = np.flatnonzero(step.response_mask[b])
            for first, second in itertools.pairwise(kept):
                text = f"{'abc'[ids[b, first]]} {'abc'[ids[b, second]]}"
                count, whole, part = expected.get(text, (0, 0.0, 0.0))
                pair = [first, second]
                expected[text] = (count + 1, whole + total[b, pair].sum(), part + score[b, pair].sum())
    found = {phrase.text: phrase for phrase in tally.result(100)}
    assert set(found) == set(expected)
    for text, (count, whole, part) in expected.items():
        assert found[text].count == count
        assert found[text].advantage == pytest.approx(whole)
        assert found[text].by_channel["score"] == pytest.approx(part)
    largest = tally.result(3)
    sizes = [max(map(abs, phrase.by_channel.values())) for phrase in largest]
    assert sizes == sorted(sizes, reverse=True)
    assert abs(largest[0].by_channel[largest[0].largest]) == sizes[0]


def test_phrases_stay_bounded() -> None:
    rng = np.random.default_rng(5)
    tally = PhraseTally(size=3, kept=40)
    for number in range(20):
        step = random_step(rng, batch=8, width=8, holes=False, ids=rng.integers(0, 50, (8, 8)), step=number)
        tally.add(step, split(step))
        assert len(tally.result(10_000)) <= 40
    assert tally.dropped > 0
    assert all(phrase.text.startswith("#") for phrase in tally.result())
    assert not math.isnan(sum(phrase.advantage for phrase in tally.result()))


def test_a_step_without_ids_has_no_phrases() -> None:
    step = random_step(np.random.default_rng(6))
    tally = PhraseTally()
    tally.add(step, split(step))
    assert tally.result() == () and tally.unknown_steps == 1


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ('{"type": "WordLevel", "vocab": {"hello": 0, "you": 1}}', "hello you"),
        ('{"type": "BPE", "vocab": {"hel": 0, "lo\\u0120you": 1}}', "hello you"),
        ('{"type": "Unigram", "vocab": [["\\u2581hello", -1.0], ["\\u2581you", -2.0]]}', "hello you"),
        ('{"type": "WordPiece", "vocab": {"hello": 0, "##you": 1}}', "helloyou"),
    ],
)
def test_words_of_a_tokenizer(run: Run, tmp_path: Path, model: str, text: str) -> None:
    assert vocabulary(run) is None
    folder = tmp_path / "run"
    make_run(folder, World(steps=1, batch=4))
    (folder / "models" / "policy").mkdir()
    (folder / "models" / "policy" / "tokenizer.json").write_text(
        f'{{"model": {model}, "added_tokens": [{{"id": 2, "content": "<eos>"}}]}}'
    )
    words = vocabulary(read_run(folder))
    assert words is not None
    assert (words[0] + words[1]).strip() == text and words[2] == " <eos>"
