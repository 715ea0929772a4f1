"""The forecast: closed forms, what it does not say, and model folders read and told."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import cli
from kedge.errors import InputError
from kedge.experiment.forecast import exploits, forecast, rank, reach, supported_end
from kedge.experiment.forecasting import Request, lines, of_folders, of_run
from kedge.progress import Interrupt, Progress

P, N = 60, 64


def normal(seed: int, prompts: int = P, answers: int = N, slope: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Scores N(0, 1) of each prompt's answers, and lengths that go up by `slope` for a unit of score."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(prompts, answers))
    lengths = 20 + rng.normal(size=(prompts, 1)) + slope * scores + rng.normal(size=(prompts, answers))
    return scores, lengths


# Equations


def test_normal_scores_move_as_theory_has_it() -> None:
    """Under N(0, 1) scores the tilt by 1 / b is N(1 / b, 1): KL 1 / 2b^2, score + 1 / b, and a feature moves by its
    regression on the score."""
    scores, lengths = normal(0, prompts=400, answers=256)
    found = forecast("r", scores, {"length": lengths}, betas=(1.0, 2.0))
    for beta, place in found.betas.items():
        assert not isinstance(place, str)
        assert place.kl == pytest.approx(1 / (2 * beta**2), rel=0.06)
        assert place.score == pytest.approx(1 / beta, rel=0.03)
        assert place.changes["length"].value == pytest.approx(0.5 / beta, rel=0.08)
        assert place.changes["length"].low < 0.5 / beta < place.changes["length"].high
    (half,) = [place for place in found.stations if place.kl == 0.5]
    assert half.beta == pytest.approx(1.0, rel=0.06)


def test_the_path_is_that_of_loops() -> None:
    scores, lengths = normal(1, prompts=7, answers=24)
    words = (np.random.default_rng(2).random(scores.shape) < 0.4).astype(float)
    beta = 0.8
    found = forecast("r", scores, {"length": lengths, "words": words}, betas=(beta,)).betas[beta]
    assert not isinstance(found, str)
    kl = score = length = said = 0.0
    for p in range(7):
        total = sum(math.exp(float(s) / beta) for s in scores[p])
        weights = [math.exp(float(s) / beta) / total for s in scores[p]]
        kl += sum(w * math.log(w * 24) for w in weights) / 7
        score += sum(w * float(s) for w, s in zip(weights, scores[p], strict=True)) / 7 - float(scores[p].mean()) / 7
        length += sum(w * float(v) for w, v in zip(weights, lengths[p], strict=True)) / 7
        said += sum(w * float(v) for w, v in zip(weights, words[p], strict=True)) / 7
    assert found.kl == pytest.approx(kl, rel=2e-3)  # between two points of the grid
    assert found.score == pytest.approx(score, rel=2e-3)
    assert found.values["length"].value == pytest.approx(length, rel=1e-3)
    assert found.values["words"].value == pytest.approx(said, rel=2e-3)


@settings(max_examples=15)
@given(shift=st.floats(-50, 50), scale=st.floats(0.01, 100), seed=st.integers(0, 5))
def test_neither_the_zero_nor_the_unit_of_the_score_matters(shift: float, scale: float, seed: int) -> None:
    scores, lengths = normal(seed, prompts=12, answers=32)
    one = forecast("r", scores, {"length": lengths}, draws=50)
    other = forecast("r", scale * scores + shift, {"length": lengths}, draws=50)
    assert other.end == pytest.approx(one.end, rel=1e-6)
    assert other.least_beta == pytest.approx(scale * one.least_beta, rel=1e-6)
    for mine, theirs in zip(one.path, other.path, strict=True):
        assert theirs.values["length"].value == pytest.approx(mine.values["length"].value, rel=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 30), answers=st.sampled_from([16, 32, 100]))
def test_the_path_rises_and_ends_where_the_answers_do(seed: int, answers: int) -> None:
    scores, lengths = normal(seed, prompts=10, answers=answers)
    found = forecast("r", scores, {"length": lengths}, draws=20)
    assert found.end == pytest.approx(supported_end(scores)) and found.end <= reach(answers) + 1e-12
    kl, gain = ([getattr(place, name) for place in found.path] for name in ("kl", "score"))
    assert kl[0] == 0 and gain[0] == 0 and kl[-1] == pytest.approx(found.end)
    assert all(np.diff(kl) > 0) and all(np.diff(gain) > 0)
    assert all(place.effective >= 10 - 1e-6 for place in found.path)


def test_reach_is_the_kl_of_the_best_of_n() -> None:
    assert reach(64) == pytest.approx(3.1745, abs=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Among 60 prompts drawn anew, the change of length at beta 1 is 0.5; 95% of intervals hold it."""
    held = []
    for seed in range(60):
        scores, lengths = normal(1000 + seed, prompts=40, answers=64)
        place = forecast("r", scores, {"length": lengths}, betas=(2.0,), draws=200).betas[2.0]
        assert not isinstance(place, str)
        held.append(place.changes["length"].low <= 0.25 <= place.changes["length"].high)
    assert np.mean(held) > 0.85


def test_shuffled_rewards_push_nowhere() -> None:
    rng = np.random.default_rng(3)
    moved = []
    for seed in range(40):
        scores, lengths = normal(seed, prompts=40)
        place = forecast("r", rng.permuted(scores, axis=1), {"length": lengths}, draws=200).stations[2]
        moved.append(place.changes["length"])
    assert np.mean([one.excludes() for one in moved]) < 0.15
    assert 0.3 < np.mean([one.value > 0 for one in moved]) < 0.7


# What it does not say


def test_beyond_the_answers_nothing_is_told() -> None:
    scores, lengths = normal(4)
    found = forecast("r", scores, {"length": lengths}, betas=(0.05,))
    why = found.betas[0.05]
    assert isinstance(why, str) and "beyond" in why and f"{found.least_beta:.3g}" in why
    assert all(place.kl <= found.end for place in found.stations)


def test_what_the_reference_never_says_is_not_told() -> None:
    scores, lengths = normal(5)
    once = np.zeros_like(scores)
    once[0, :3] = 1
    everywhere = np.ones_like(scores)
    found = forecast("r", scores, {"length": lengths, "never": np.zeros_like(scores), "once": once, "all": everywhere})
    assert set(found.unknown) == {"never", "once", "all"} and list(found.start.values) == ["length"]
    assert f"{3 / scores.size:.2g}" in found.unknown["never"] and "only 3 of" in found.unknown["once"]


def test_few_prompts_have_no_intervals() -> None:
    scores, lengths = normal(6, prompts=4)
    found = forecast("r", scores, {"length": lengths}, betas=(1.0,))
    place = found.betas[1.0]
    assert not isinstance(place, str) and math.isnan(place.changes["length"].low)
    assert not place.changes["length"].excludes()


def test_a_reward_model_to_which_all_is_alike_is_refused() -> None:
    _, lengths = normal(7)
    with pytest.raises(InputError, match="mine: scores every answer to a prompt alike"):
        forecast("mine", np.ones_like(lengths) + np.arange(P)[:, None], {"length": lengths})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    scores, lengths = normal(8)
    scores[3, 3] = bad
    with pytest.raises(ValueError, match="scores must be finite"):
        forecast("r", scores, {"length": lengths})


# Advice


def test_the_beta_at_which_length_leaves_its_band() -> None:
    """Length 20 + 5 z with z the score leaves 25% at 1 / b = 1."""
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(300, 128))
    found = forecast("r", scores, {"length": 20 + 5 * scores})
    (leaving,) = found.leaving
    assert leaving.beta == pytest.approx(1.0, rel=0.05) and leaving.direction == 1
    assert leaving.kl == pytest.approx(0.5, rel=0.1)
    down = forecast("r", scores, {"length": 20 - 5 * scores}).leaving[0]
    assert down.direction == -1 and down.beta == pytest.approx(1.0, rel=0.05)
    still = forecast("r", scores, {"length": 20 + 0.1 * scores}).leaving[0]
    assert still.beta is None and still.direction == 0


def test_the_runaway_number_is_one_where_slope_times_length_says() -> None:
    """r = 0.03 per token: with reference length 20 the number is 1 at beta 0.6."""
    rng = np.random.default_rng(10)
    lengths = rng.poisson(20, size=(200, 64)).astype(float)
    scores = 0.03 * lengths + 0.1 * rng.normal(size=lengths.shape) + rng.normal(size=(200, 1))
    found = forecast("r", scores, {"length": lengths})
    assert found.slope.value == pytest.approx(0.03, rel=0.03)
    assert found.runaway.low < 0.6 < found.runaway.high


def test_exploits_are_the_answers_that_the_tilt_raises_most() -> None:
    scores = np.zeros((12, 20))
    scores += np.linspace(0, 1, 20)
    scores[7, 3] = 9.0
    lengths = np.tile(np.arange(20.0), (12, 1))
    place = forecast("r", scores, {"length": lengths}, betas=(2.0,)).betas[2.0]
    assert not isinstance(place, str)
    first, second = exploits(scores, place, 2)
    assert (first.prompt, first.answer, first.score) == (7, 3, 9.0) and first.times > second.times > 1
    assert 0.3 < first.usual_score < 0.7


def test_reward_models_are_ranked_by_how_far_they_push() -> None:
    scores, lengths = normal(11)
    rng = np.random.default_rng(12)
    found = [
        forecast("pays for length", lengths + rng.normal(size=lengths.shape), {"length": lengths}),
        forecast("indifferent", rng.normal(size=lengths.shape), {"length": lengths}),
        forecast("a little", scores, {"length": lengths}),
    ]
    ordered = rank(found, ("length",))
    assert [row["reward"] for row in ordered] == ["indifferent", "a little", "pays for length"]
    assert ordered[-1]["furthest"] == "length" and ordered[-1]["change"] > 0.3


# Model folders


def told(source: Path, tmp_path: Path, request: Request, rewards: int = 1) -> dict[str, Any]:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"facts : refund {n} . q : can i cancel my order ? a :"} for n in range(14)]
    path.write_text("\n".join([*map(json.dumps, rows), "{torn", '{"prompt": 7}']) + "\n")
    models = source / "models"
    found = [models / "reward", source.parent / "again" / "reward"][:rewards]
    return of_folders(models / "sft", found, path, request, Progress(quiet=True), Interrupt())


@pytest.fixture
def twice(source: Path) -> Path:
    import shutil

    other = source.parent / "again" / "reward"
    if not other.exists():
        shutil.copytree(source / "models" / "reward", other)
    return other


def test_folders(source: Path, tmp_path: Path) -> None:
    found = told(source, tmp_path, Request(samples=32, max_new_tokens=10, features=("regex:a",)))
    assert found["prompts"] == 14 and found["answers"] == 32
    assert len(found["left_out"]) == 2 and "prompts.jsonl:15" in found["left_out"][0]
    (one,) = found["forecasts"]
    assert one["reward"] == "reward" and "length" in {**one["reference"], **one["not_checked"]}
    assert one["support"]["kl"] <= reach(32)
    json.dumps(cli.output.plain(found), allow_nan=False)
    assert any("rows left out" in line for line in found["lines"])


def test_a_run(source: Path, small_desk: None, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def both(prompt, response):\n    return len(prompt) + len(response)\n")
    request = Request(samples=24, features=(f"{tmp_path}/mine.py:both",))
    found = of_run(source, [], request, Progress(quiet=True), Interrupt())
    (one,) = found["forecasts"]
    assert found["prompts"] == 16 and request.features[0] in one["reference"]
    assert lines(found) == found["lines"]
    again = of_run(source, [], request, Progress(quiet=True), Interrupt())
    assert again["forecasts"] == found["forecasts"], "the draws are a function of the seed"


def test_the_same_reward_model_twice_is_a_tie(source: Path, twice: Path, tmp_path: Path) -> None:
    found = told(source, tmp_path, Request(samples=32, max_new_tokens=10), rewards=2)
    first, second = found["forecasts"]
    assert first["path"] == second["path"] and len(found["ranking"]) == 2
    assert {row["reward"] for row in found["ranking"]} == {"models/reward", "again/reward"}


def test_a_function_that_fails_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def both(prompt, response):\n    return None\n")
    with pytest.raises(InputError, match="takes a prompt and a response"):
        told(source, tmp_path, Request(samples=16, features=(f"{tmp_path}/bad.py:both",)))


def test_a_reward_model_of_another_tokenizer_reads_the_text(source: Path, tmp_path: Path) -> None:
    """The same model behind a tokenizer with one more word scores answers that ended as it does from their ids."""
    import shutil

    from kedge.data.tokenise import encode_response
    from kedge.experiment.answers import drawn, loaded_policy, prompts_of
    from kedge.structs import Sampling

    other = tmp_path / "other"
    shutil.copytree(source / "models" / "reward", other)
    described = json.loads((other / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "id": 9999, "content": "<|new|>"})
    (other / "tokenizer.json").write_text(json.dumps(described))
    policy, tokenizer = loaded_policy(source / "models" / "sft")
    asked = prompts_of(["facts : refund 14 . q : can i cancel my order ? a :"] * 12, tokenizer, 12)
    answers = drawn(
        policy, tokenizer, asked, {"ids": source / "models" / "reward", "text": other}, count=16,
        sampling=Sampling(30), seed=0, progress=Progress(quiet=True), interrupt=Interrupt(),
    )  # fmt: skip
    # An untrained policy spells special tokens, too, which its text leaves out.
    again = [[len(encode_response(tokenizer, text)) for text in row] for row in answers.texts]
    same = (answers.ended == 1) & (answers.lengths == np.array(again))
    assert same.sum() > 10
    np.testing.assert_allclose(answers.scores["text"][same], answers.scores["ids"][same], atol=2e-5)


def test_the_page_holds_what_was_found(source: Path, twice: Path, tmp_path: Path) -> None:
    from kedge.report.forecast_page import write_forecast

    found = told(source, tmp_path, Request(samples=32, betas=(0.01, 5.0), max_new_tokens=10), rewards=2)
    found["forecasts"][0]["exploits"][0]["answer"] = "<script>alert(1)</script>"
    page = write_forecast(found, tmp_path / "f.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page) and "&lt;script&gt;" in page
    assert "not checked: the optimum is beyond" in page and "2 rows left out" in page


@pytest.mark.slow
def test_150_prompts_of_64_answers_take_seconds() -> None:
    """The arithmetic alone; sampling and scoring the desk's small model takes some 15 s of one core."""
    scores, lengths = normal(13, prompts=150)
    features = {"length": lengths} | {str(n): lengths + n for n in range(8)}
    began = time.perf_counter()
    forecast("r", scores, features, betas=(0.5,))
    assert time.perf_counter() - began < 10
