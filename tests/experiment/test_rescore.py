"""Columns filled in offline, against an independent forward pass in float64, one response at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kedge import cli
from kedge.data.tokenise import train_tokenizer
from kedge.errors import InputError, Interrupted
from kedge.experiment.rescore import Asked, plan, rescore
from kedge.models.load import load_classifier, load_policy, reward_model_from, save_model, scratch_policy
from kedge.progress import Interrupt, Progress
from kedge.trace.foreign import Conventions, Rows, padded
from kedge.trace.jsonl import append_json, read_json_lines
from kedge.trace.reader import read_run
from kedge.trace.recorder import Recorder

BETA, LAM, TEMPERATURE = 0.05, 0.9, 0.8
STEPS = 3
TEXTS = ("the desk is open until six", "please ask the desk", "six is late", "the parcel is at the desk until late")


@dataclass
class World:
    """Model folders, and the runs that were made from them."""

    folder: Path
    tokenizer: Any

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def reward(self) -> Path:
        return self.folder / "reward"

    @property
    def policies(self) -> str:
        return str(self.folder / "policy-{step}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXTS * 5, vocab=300)
    sizes: dict[str, Any] = {"family": "llama", "hidden": 16, "layers": 1, "heads": 2, "context": 64}
    for seed, name in enumerate(["reference", *(f"policy-{step}" for step in range(STEPS))]):
        save_model(scratch_policy(tokenizer, seed=seed, **sizes), tokenizer, folder / name)
    model, _ = load_policy(folder / "reference")
    save_model(reward_model_from(model, seed=7), tokenizer, folder / "reward")
    other = train_tokenizer(["a quick brown fox jumps over a lazy dog"] * 5, vocab=290)
    save_model(scratch_policy(other, seed=1, **sizes), other, folder / "other")
    small = {**sizes, "context": 6}
    save_model(scratch_policy(tokenizer, seed=1, **small), tokenizer, folder / "short")
    return World(folder, tokenizer)


def forward(model: Any, prompt: list[int], response: list[int], temperature: float) -> np.ndarray:
    """[T, V] log-probabilities before each response token, in float64, without padding or batches."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return np.asarray((logits[len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1).numpy())


def answers(world: World, step: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses, of unequal length, some without EOS."""
    rng = np.random.default_rng(step)
    prompts = [world.tokenizer(TEXTS[row % 2])["input_ids"] for row in range(4)]
    said = [world.tokenizer(TEXTS[(row + step) % 4], add_special_tokens=False)["input_ids"] for row in range(4)]
    cut = [ids[: int(rng.integers(3, len(ids) + 1))] for ids in said]
    return prompts, [[*ids, world.tokenizer.eos_token_id] if row else ids for row, ids in enumerate(cut)]


def of_each(folder: Path, rows: tuple[list[list[int]], list[list[int]]]) -> list[np.ndarray]:
    return [forward(doubled(folder), prompt, said, TEMPERATURE) for prompt, said in zip(*rows, strict=True)]


@cache
def doubled(folder: Path) -> Any:
    return load_policy(folder)[0].double()


def taken(distributions: list[np.ndarray], responses: list[list[int]]) -> list[np.ndarray]:
    return [table[np.arange(len(said)), said] for table, said in zip(distributions, responses, strict=True)]


def advantage_of(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    carried = following = 0.0
    out = np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        carried = rewards[t] + following - values[t] + LAM * carried
        following, out[t] = values[t], carried
    return out


def record(
    world: World, out: Path, *, text: Any = "full", settings: Any = None, leave_out: tuple[str, ...] = ()
) -> None:
    """A PPO run whose trainer kept all but the reference's log-probabilities, EOS and entropies."""
    told = Conventions(
        "a trainer", lam=LAM, kl="reward", kl_estimator="k1", beta=BETA, normalisation="none", critic=True
    )
    settings = {"policy": {"temperature": TEMPERATURE}} if settings is None else settings
    with Recorder(out, told, text=text, settings=settings) as recorder:
        for step in range(STEPS):
            prompts, responses = rows = answers(world, step)
            old = taken(of_each(world.folder / f"policy-{step}", rows), responses)
            reference = taken(of_each(world.reference, rows), responses)
            rng = np.random.default_rng(100 + step)
            scores, values = rng.normal(size=4), [rng.normal(0, 0.3, len(said)) for said in responses]
            advantages = []
            for row, said in enumerate(responses):
                rewards = -BETA * (old[row] - reference[row])
                rewards[len(said) - 1] += scores[row]
                advantages.append(advantage_of(rewards, values[row]))
            given: dict[str, Any] = {
                "scores": {"score": scores},
                "old_logprob": padded(old),
                "values": padded(values),
                "advantage": padded(advantages),
            }
            for name in leave_out:
                given[name] = {} if name == "scores" else None
            recorder.step(
                Rows(
                    step=step,
                    response_mask=padded([[True] * len(said) for said in responses], fill=False),
                    group=np.array([0, 1, 0, 1]),
                    prompts=[world.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts],
                    responses=[world.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses],
                    prompt_ids=padded(prompts, left=True),
                    prompt_mask=padded([[True] * len(ids) for ids in prompts], fill=False, left=True),
                    response_ids=padded(responses),
                    ended=np.array([False, True, True, True]),
                    **given,
                ),
                **{"policy/loss": 0.25},
            )


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    record(world, out)
    return out


def fill(source: Path, out: Path, interrupt: Interrupt | None = None, **asked: Any) -> dict[str, Any]:
    planned = plan(source, out, Asked(**asked))
    return rescore(planned, progress=Progress(quiet=True), interrupt=interrupt or Interrupt())


def test_the_reference_is_filled_in_and_the_advantage_stays(world: World, run: Path, tmp_path: Path) -> None:
    found = fill(run, tmp_path / "filled", reference=world.reference, eos=True)
    before, after = read_run(run), read_run(tmp_path / "filled")
    assert found["filled"] == ["reference_eos_logprob", "reference_logprob"]
    assert after.manifest["absent"] == sorted(after.step(0).absent)
    assert after.manifest["status"] == "finished"
    for number in range(STEPS):
        assert "rest" in before.step(number).channels  # what nothing explained without the reference
        step = after.step(number)  # checks the digest
        assert step.channels == ("score", "kl", "critic")
        assert step.advantage() == pytest.approx(before.step(number).advantage(), abs=1e-5)
        assert step.weights[:, 1] == pytest.approx([-BETA] * 4)
        rows = answers(world, number)
        tables = of_each(world.reference, rows)
        for row, (table, said) in enumerate(zip(tables, rows[1], strict=True)):
            length = len(said)
            assert step.tokens["reference_logprob"][row, :length] == pytest.approx(
                table[np.arange(length), said], abs=1e-5
            )
            end = table[:, world.tokenizer.eos_token_id]
            assert step.tokens["reference_eos_logprob"][row, :length] == pytest.approx(end, abs=1e-5)
        old = before.step(number).tokens["old_logprob"]
        gap = sum(
            float(old[row, : len(said)].sum() - taken(tables, rows[1])[row].sum()) for row, said in enumerate(rows[1])
        )
        line = read_json_lines(after.dir.metrics)[number]
        assert line["kl/reference_per_sequence"] == pytest.approx(gap / 4, abs=1e-4)
        assert line["policy/loss"] == 0.25  # the trainer's own stays
        assert line["weight/kl"] == pytest.approx(-BETA)


def test_the_policy_of_each_step_gives_entropies(world: World, run: Path, tmp_path: Path) -> None:
    fill(run, tmp_path / "filled", policy=world.policies, eos=True)
    step = read_run(tmp_path / "filled").step(1)
    assert not {"entropy", "old_eos_logprob"} & step.absent
    rows = answers(world, 1)
    for row, table in enumerate(of_each(world.folder / "policy-1", rows)):
        entropy = -(np.exp(table) * table).sum(axis=1)
        assert step.tokens["entropy"][row, : len(table)] == pytest.approx(entropy, abs=1e-5)
        end = table[:, world.tokenizer.eos_token_id]
        assert step.tokens["old_eos_logprob"][row, : len(table)] == pytest.approx(end, abs=1e-5)


def test_scores_are_filled_in(world: World, tmp_path: Path) -> None:
    record(world, tmp_path / "run", leave_out=("scores", "advantage"))
    assert "score" in read_run(tmp_path / "run").step(0).absent
    fill(tmp_path / "run", tmp_path / "filled", reward=world.reward, reference=world.reference)
    step = read_run(tmp_path / "filled").step(2)
    assert step.channels == ("score", "kl", "critic")
    assert not {"score", "advantage"} & step.absent  # it can be derived now
    model = load_classifier(world.reward).double()
    for row, (prompt, said) in enumerate(zip(*answers(world, 2), strict=True)):
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([[*prompt, *said]])).last_hidden_state[0, -1]
            score = float(model.score(states))
        assert step.rewards[row, len(said) - 1, 0] == pytest.approx(score, abs=1e-5)
        assert step.rewards[row, : len(said) - 1, 0] == pytest.approx(0)
    lines = read_json_lines(tmp_path / "filled" / "metrics.jsonl")
    assert lines[2]["score/mean"] == pytest.approx(float(step.rewards[..., 0].sum(axis=1).mean()), abs=1e-6)
    assert read_run(tmp_path / "filled").manifest["advantage"] == "derived"


class Stopping(Interrupt):
    """Asks for a stop once a step is there."""

    def __init__(self, trace: Path, step: int) -> None:
        super().__init__()
        self.file = trace / f"step-{step:06d}.parquet"

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.file.exists()

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_rescoring_goes_on_where_it_was(world: World, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled"
    asked: dict[str, Any] = {"reference": world.reference, "eos": True}
    with pytest.raises(Interrupted, match="the same command again"):
        fill(run, out, Stopping(out / "trace", 0), **asked)
    first = out / "trace" / "step-000000.parquet"
    done, written = first.read_bytes(), first.stat().st_mtime_ns
    # What a kill in the middle of a step leaves: its metrics without its rows, and half a file.
    append_json(out / "metrics.jsonl", {"stage": "policy", "step": 1, "kl/reference_per_sequence": -1.0})
    (out / "trace" / ".step-000001.parquet.tmp").write_bytes(b"PAR1")

    planned = plan(run, out, Asked(**asked))
    assert (planned.done, planned.steps) == (1, (1, 2))
    rescore(planned, progress=Progress(quiet=True), interrupt=Interrupt())
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (done, written)
    assert read_run(out).manifest["status"] == "finished"
    fill(run, tmp_path / "at-once", **asked)
    assert files_of(out) == files_of(tmp_path / "at-once")

    again = fill(run, out, **asked)  # nothing is left to do
    assert again["steps"] == STEPS
    assert files_of(out) == files_of(tmp_path / "at-once")
    with pytest.raises(InputError, match="begun with eos True"):
        plan(run, out, Asked(reference=world.reference))
    with pytest.raises(InputError, match="not empty"):
        plan(run, tmp_path, Asked(**asked))
    with pytest.raises(InputError, match="another run"):
        plan(out, run, Asked(policy=world.policies))


def test_the_cost_is_counted(world: World, run: Path, tmp_path: Path) -> None:
    cost = plan(run, tmp_path / "filled", Asked(reference=world.reference, reward=world.reward, again=True)).cost
    pieces = [part for step in range(STEPS) for side in answers(world, step) for part in side]
    assert (cost.steps, cost.responses, cost.tokens) == (STEPS, 4 * STEPS, sum(map(len, pieces)))
    model, _ = load_policy(world.reference)
    head = 16  # the reward model has a head of one weight per hidden unit, and no other output
    assert cost.parameter_bytes == 2 * 4 * model.num_parameters() + 4 * head
    assert cost.seconds > 0
    assert not (tmp_path / "filled").exists()
    assert "12 responses" in cost.lines()[0]


def test_what_is_there_is_replaced_only_when_asked(world: World, run: Path, tmp_path: Path) -> None:
    fill(run, tmp_path / "filled", reference=world.reference)
    with pytest.raises(InputError, match="every step has reference_logprob already"):
        plan(tmp_path / "filled", tmp_path / "more", Asked(reference=world.reference))
    other = world.folder / "policy-0"
    fill(tmp_path / "filled", tmp_path / "again", reference=other, again=True)
    step = read_run(tmp_path / "again").step(0)
    assert step.tokens["reference_logprob"] == pytest.approx(step.tokens["old_logprob"], abs=1e-5)
    assert step.channels == ("score", "kl", "critic", "rest")  # the advantage was made with the other reference
    assert step.advantage() == pytest.approx(read_run(run).step(0).advantage(), abs=1e-5)
    # Only EOS is missing, and the reference is seen to be the recorded one, or not.
    fill(tmp_path / "filled", tmp_path / "ends", reference=world.reference, eos=True)
    assert "reference_eos_logprob" not in read_run(tmp_path / "ends").step(0).absent
    with pytest.raises(InputError, match="another model, or another --temperature"):
        fill(tmp_path / "filled", tmp_path / "wrong", reference=other, eos=True)


def test_a_model_that_does_not_fit_is_refused(world: World, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled"
    with pytest.raises(InputError, match=r"another vocabulary|as other texts"):
        plan(run, out, Asked(reference=world.folder / "other"))
    with pytest.raises(InputError, match="the model reads 6"):
        plan(run, out, Asked(reference=world.folder / "short"))
    with pytest.raises(InputError, match="no such folder"):
        plan(run, out, Asked(reference=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot be loaded"):
        plan(run, out, Asked(reward=_headless(world, tmp_path), again=True))
    with pytest.raises(InputError, match="did not sample all 3 steps"):
        plan(run, out, Asked(policy=str(world.reference)))
    with pytest.raises(InputError, match="has such a folder"):
        plan(run, out, Asked(policy="nowhere-{step}"))
    with pytest.raises(
        InputError, match=r"differ from the recorded ones of step-000000.parquet by .* at temperature 3"
    ):
        fill(run, out, policy=world.policies, temperature=3.0)
    assert not list((out / "trace").glob("*.parquet"))


def _headless(world: World, tmp_path: Path) -> Path:
    """A folder that says it is a classifier of two labels."""
    folder = tmp_path / "two-labels"
    model, tokenizer = load_policy(world.reference)
    save_model(reward_model_from(model, seed=0, heads=2), tokenizer, folder)
    return folder


def test_what_models_cannot_read_is_refused(world: World, run: Path, tmp_path: Path) -> None:
    asked = Asked(reference=world.reference)
    record(world, tmp_path / "hashed", text="hashed")
    with pytest.raises(InputError, match="left out"):
        plan(tmp_path / "hashed", tmp_path / "out", asked)
    shutil.copytree(run, tmp_path / "words")
    _manifest(tmp_path / "words", conventions={**read_run(run).manifest["conventions"], "positions": "words"})
    with pytest.raises(InputError, match="--tokenizer"):
        plan(tmp_path / "words", tmp_path / "out", asked)
    shutil.copytree(run, tmp_path / "own")
    _manifest(tmp_path / "own", conventions=None)
    with pytest.raises(InputError, match="Kedge's own"):
        plan(tmp_path / "own", tmp_path / "out", asked)
    record(world, tmp_path / "silent", settings={})
    with pytest.raises(InputError, match="--temperature"):
        plan(tmp_path / "silent", tmp_path / "out", asked)
    assert plan(tmp_path / "silent", tmp_path / "out", asked, ask_temperature=lambda: 0.8).temperature == 0.8
    with pytest.raises(InputError, match="no model is named"):
        Asked()
    with pytest.raises(InputError, match="a language model's"):
        Asked(reward=world.reward, eos=True)


def _manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_the_command(
    world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["rescore", str(run), "--reference", str(world.reference), "--out", str(tmp_path / "filled")]
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert "add --yes" in shown.err
    assert "3 steps, 12 responses" in shown.err
    assert not (tmp_path / "filled").exists()
    assert cli.main([*arguments, "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["filled"] == ["reference_logprob"]
    assert found["cost"]["responses"] == 12
    assert cli.main(["ledger", str(tmp_path / "filled")]) == 0
