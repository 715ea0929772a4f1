"""Findings in order, symptoms under their causes, sentences whose numbers are those of the trace."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import HEALTHY, World, make_run

from kedge.diagnose import diagnosis
from kedge.diagnose.account import PARTS, account, account_of
from kedge.diagnose.checks import all_checks, reducers
from kedge.diagnose.contrast import matched_pairs
from kedge.diagnose.diagnosis import Diagnosis, diagnose, explained, likely, rank, read_view
from kedge.diagnose.finding import Finding, Remedy
from kedge.diagnose.ledger import reference_length, styles
from kedge.diagnose.margin import margin, probe_pairs
from kedge.diagnose.mechanisms import MECHANISMS
from kedge.diagnose.prose import matched_wins, prose, verdict
from kedge.diagnose.trials import read_trials
from kedge.diagnose.view import save, view_of
from kedge.errors import InputError
from kedge.trace.reader import Run, read_run

ROOT = Path(__file__).parents[2]
NAMES = [check.name for check in all_checks()]


@pytest.fixture(scope="module")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("drift") / "run", World(steps=18))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("healthy") / "run", HEALTHY)


# Order


def finding(check: str, status: str = "fail", strength: float = 1.0, validated: bool = True) -> Finding:
    return Finding(check, status, "", strength=strength, validated=validated)  # type: ignore[arg-type]


findings = st.lists(
    st.builds(
        finding,
        st.sampled_from(["sampler", "beta", "length_reward", "critic", "runaway_length", "prompt_mix", "none_such"]),
        st.sampled_from(["fail", "warn", "ok", "not_checked"]),
        st.floats(0, 10),
        st.booleans(),
    ),
    max_size=8,
)


@given(findings, st.randoms())
def test_the_order_does_not_depend_on_that_of_the_checks(found: list[Finding], random: object) -> None:
    ranked = rank(found)
    assert sorted(map(repr, ranked)) == sorted(map(repr, found))
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [(one.check, one.status, one.strength) for one in rank(shuffled)] == [
        (one.check, one.status, one.strength) for one in ranked
    ]


@given(findings)
def test_what_is_not_validated_never_comes_before_what_is(found: list[Finding]) -> None:
    checked = [one for one in rank(found) if one.status != "not_checked"]
    assert [one.validated for one in checked] == sorted((one.validated for one in checked), reverse=True)
    missing = [one.status == "not_checked" for one in rank(found)]
    assert missing == sorted(missing), "what was not checked comes last"
    assert set(likely(rank(found))) <= {one.check for one in found if one.validated and one.status in ("fail", "warn")}


def test_integrity_before_causes_before_symptoms_then_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"sampler": 0, "beta": 0, "length_reward": 1, "critic": 1, "runaway_length": 2, "prompt_mix": 3}
    monkeypatch.setattr(diagnosis, "_kind", lambda name: diagnosis.Kind(kinds[name]))
    found = [
        finding("prompt_mix", strength=9), finding("runaway_length", strength=8), finding("critic", strength=2),
        finding("length_reward", strength=3), finding("beta", "warn", 0.9), finding("sampler", strength=1),
    ]  # fmt: skip
    ranked = rank(found)
    assert [one.check for one in ranked] == [
        "sampler", "length_reward", "critic", "runaway_length", "prompt_mix", "beta"
    ]  # fmt: skip
    assert likely(ranked) == ("sampler",)
    assert likely(rank(found[:4])) == ("length_reward",)
    assert likely(rank([finding("critic", strength=2.5), finding("length_reward", strength=3)])) == (
        "length_reward",
        "critic",
    ), "about as strong: they cannot be told apart"
    assert likely(rank([finding("runaway_length"), finding("prompt_mix")])) == (), "a symptom is no cause"


def test_a_symptom_stands_under_the_causes_found() -> None:
    ranked = rank([finding("runaway_length"), finding("length_reward"), finding("critic", "ok"), finding("discount")])
    assert set(explained(ranked)["runaway_length"]) == {"length_reward", "discount"}
    found = Diagnosis("run", None, ranked, likely(ranked), explained(ranked))
    assert "runaway_length" not in [one.check for one in found.alone()]
    assert [one.check for one in found.symptoms_of("length_reward")] == ["runaway_length"]
    alone = rank([finding("runaway_length")])
    assert explained(alone) == {}
    assert [one.check for one in Diagnosis("run", None, alone, (), {}).alone()] == ["runaway_length"]


def test_causes_that_explain_are_checks() -> None:
    from kedge.diagnose.diagnosis import EXPLAINS

    planned = set(NAMES) | _fixed_names()
    assert set(EXPLAINS) <= planned
    assert {cause for causes in EXPLAINS.values() for cause in causes} <= planned


def _fixed_names() -> set[str]:
    """Names that are agreed on, whether or not there is a check of them yet."""
    names = (
        "sampler kl_estimator beta controller reference scoring_noise token_constant discount ending reward_unit "
        "saturation length_normalised length_reward feature_reward exploit heavy_tail prompt_offset brief_prompts "
        "critic whitening step_size wasted_kl unscaled_reward entropy_bonus frozen runaway_length mode_collapse "
        "refusals capability overconfidence reward_hacking human_gap prompt_mix"
    )
    return set(names.split())


# A whole run


def test_a_diagnosis_of_a_run(drift: Path) -> None:
    view, notes = read_view(drift)
    found = diagnose(view)
    assert notes == () and found.run == "synthetic" and found.steps == (0, 17)
    assert [one.check for one in found.findings] != [] and {one.check for one in found.findings} == set(NAMES)
    assert all(one.summary for one in found.findings), "what was not checked says why"
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [one["check"] for one in record["findings"]] == [one.check for one in found.findings]
    assert {"status", "kind", "title", "evidence", "remedies", "validated"} <= set(record["findings"][0])


def test_only_the_checks_named(drift: Path) -> None:
    view, _ = read_view(drift, frozenset({"sampler"}))
    assert {name.split("/")[0] for name in view.facts} == {"sampler", "account"}
    assert [one.check for one in diagnose(view, frozenset({"sampler"})).findings] == ["sampler"]


@pytest.mark.parametrize("kind", ["step", "probes", "samples"])
def test_a_half_written_last_file_is_left_out(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=8), finished=False)
    last = sorted((run / "trace").glob(f"{kind}-*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:200])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "policy", "st')
    view, notes = read_view(run)
    assert [last.name in note for note in notes] == [True]
    assert len(diagnose(view).findings) == len(NAMES)


def test_a_damaged_file_before_the_last_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=4))
    (run / "trace" / "step-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="step-000001"):
        read_view(run)


@pytest.mark.parametrize("keep", ["nothing", "metrics"])
def test_a_run_that_has_hardly_begun(keep: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=1), finished=False)
    for path in (run / "trace").iterdir():
        path.unlink()
    if keep == "nothing":
        (run / "metrics.jsonl").unlink()
    view, _ = read_view(run)
    found = diagnose(view)
    assert not found.failed
    said = prose(view, found)
    assert said.changes == () and said.causes == ()
    assert said.verdict


class Earlier(Run):
    """The run as it was after six steps."""

    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().steps() if step < 6)

    def probe_steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().probe_steps() if step <= 6)

    def sample_steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().sample_steps() if step <= 6)


def test_a_view_that_grew_is_one_made_at_once(drift: Path, tmp_path: Path) -> None:
    run = read_run(drift)
    grown = view_of(run, list(reducers()), after=view_of(Earlier(run.dir, run.manifest), list(reducers())))
    for name, one in (("grown", grown), ("whole", view_of(run, list(reducers())))):
        save(one, tmp_path / name)
    assert (tmp_path / "grown").read_bytes() == (tmp_path / "whole").read_bytes()


def test_of_many_looks_a_view_holds_some_and_both_ends(drift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kedge.diagnose.view as views

    monkeypatch.setattr(views, "LOOKS", 4)
    found = view_of(read_run(drift), [])
    assert [one.step for one in found.probes] == [one.step for one in found.pairs] == [0, 6, 12, 18]
    assert [one["step"] for one in found.samples] == [0, 18]
    assert found.facts == {}, "nobody asks for the rows, so they are not read"


# Sentences


def test_the_margin_in_words_is_that_of_the_pairs(drift: Path) -> None:
    view, _ = read_view(drift)
    last = margin(list(probe_pairs(read_run(drift)))[-1])
    assert last is not None
    said = " ".join(prose(view, diagnose(view)).penalty)
    for number in (
        f"{last.score:+.2f}",
        f"{last.kl:.1f} nats more",
        f"costs {last.kl_cost:.2f} reward",
        f"{last.net:+.2f}",
    ):
        assert number in said
    assert f"= {last.score / last.beta:.0f} nats" in said
    assert "caused" not in said


def test_the_net_margin_under_a_change(drift: Path) -> None:
    """Recomputed prompt by prompt, one number after another."""
    view, _ = read_view(drift)
    found = replace(diagnose(view), findings=(_failing(),), explained={}, likely=("beta",))
    change, other = prose(view, found).changes
    pairs = list(probe_pairs(read_run(drift)))[-1]
    nets = []
    for score, kl, length in zip(pairs.score, pairs.kl, pairs.length, strict=True):
        nets.append(score - 0.2 * max(kl, 0.0) - 0.03 * length)
    assert change.overrides == ("policy.kl.beta=0.2", "policy.length_penalty=0.03")
    assert f"to {np.mean(nets):+.2f} reward".replace("-", "-") in change.reward
    assert f"above 0 on {np.mean(np.array(nets) > 0):.0%}" in change.reward
    assert other.overrides != change.overrides


def _failing() -> Finding:
    overrides = ("policy.kl.beta=0.2", "policy.length_penalty=0.03")
    return Finding("beta", "fail", "It fails.", strength=2.0, remedies=(Remedy(overrides, "pays less", "is slower"),))


@pytest.mark.parametrize("critic", ["channels", "scalar"])
def test_the_account_is_the_mean_advantage_of_the_style(critic: str, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", World(steps=4, critic=critic, penalty=0.02)))
    usual = reference_length(run)
    view = view_of(run, [account(usual)])
    for number, style in enumerate(("concise", "between", "verbose")):
        means, units = [], []
        for step in run.traces():
            rows = np.flatnonzero(styles(step.lengths, usual) == number)
            total = tokens = unit = 0.0
            for row in rows:
                places = np.flatnonzero(step.response_mask[row])
                for at in places:
                    total += step.advantage()[row, at]
                    later = places[places >= at]
                    unit += sum((step.gamma * step.lam) ** index for index in range(len(later))) / step.scale[row]
                    tokens += 1
            if tokens:
                means.append(total / tokens)
                units.append(unit / tokens)
        found = account_of(view, style)
        assert found is not None
        late = max(1, round(len(means) / 3))
        assert found.total == pytest.approx(np.mean(means[-late:]), abs=1e-5)
        assert found.per_token == pytest.approx(np.mean(units[-late:]), rel=1e-5)
        assert set(found.parts) == set(PARTS)
        assert (found.parts["critic"] == 0) == (critic == "channels")


def test_another_beta_or_penalty_in_the_account_is_that_of_the_advantage(tmp_path: Path) -> None:
    """Weights changed on the rows of a step, shift and scale as they were."""
    run = read_run(make_run(tmp_path / "run", World(steps=2)))
    step = run.step(1)
    usual = reference_length(run)
    kl, length = (step.channels.index(name) for name in ("kl", "length"))
    weights = step.weights.copy()
    weights[:, kl] *= 3
    changed = replace(step, weights=weights)
    here = (styles(step.lengths, usual) == 2)[:, None] & step.response_mask
    facts = account(usual)(step)
    found = account_of(
        SimpleNamespace(fact=lambda name: SimpleNamespace(values=np.array([facts.get(name, 0.0)]))), "verbose"
    )  # type: ignore[arg-type]
    assert found is not None
    assert found.under(beta=3) == pytest.approx(changed.advantage()[here].mean(), abs=1e-5)
    weights = step.weights.copy()
    weights[:, length] -= 0.05
    values = step.values.copy()
    values[..., length] = 0  # a penalty that is new has no critic yet
    before, after = (replace(step, weights=w, values=values).advantage()[here].mean() for w in (step.weights, weights))
    assert found.under(penalty=0.05) - found.total == pytest.approx(after - before, abs=1e-5)


def test_wins_at_equal_length() -> None:
    sample = {
        "step": 6,
        "length": np.array([10.0] * 8 + [20.0] * 4),
        "reference_tokens": np.array([10.5] * 12),
        "score": np.array([1.0, 1, 1, 1, 1, 0, 0, -1, 9, 9, 9, 9]),
        "reference_score": np.zeros(12),
    }
    view = SimpleNamespace(samples=(sample,))
    assert matched_wins(view) == [(6, (5 + 0.5 * 2) / 8, 8)]  # type: ignore[arg-type]
    few = {**sample, "length": np.array([20.0] * 12)}
    assert matched_wins(SimpleNamespace(samples=(few,))) == []  # type: ignore[arg-type]


def test_the_verdict_says_how_sure_it_is() -> None:
    def of(*found: Finding) -> str:
        ranked = rank(found)
        return verdict(Diagnosis("run", None, ranked, likely(ranked), explained(ranked)))

    assert "Nothing fails: 2 checks" in of(finding("sampler", "ok"), finding("discount", "ok"))
    assert "Nothing could be checked" in of(finding("sampler", "not_checked"))
    assert of(finding("sampler")).startswith("Most likely: ")
    assert "do not tell apart" in of(finding("sampler"), finding("discount"))
    doubted = of(finding("sampler", validated=False))
    assert doubted.startswith("Most likely: ") and "No check that says so has been validated" in doubted
    named = of(finding("sampler", validated=False), replace(finding("feature_reward"), subject="lists"))
    assert named.startswith("Most likely: ") and named.endswith(": lists (the check fails).")


def test_without_probes_the_samples_stand_in(tmp_path: Path) -> None:
    """Pairs by hand: the longer of the policy's and the reference's answer first, equal lengths left out."""
    own, usual = np.array([12.0, 5, 9, 9, 9, 9, 9, 9, 9]), np.full(9, 9.0)
    own[4:] = 11
    score = np.linspace(0, 1, 9)
    sample = {
        "step": 3, "length": own, "reference_tokens": usual, "score": score, "reference_score": np.zeros(9),
        "kl": np.full(9, 2.0), "reference_kl": np.full(9, -1.0), "tercile": np.arange(9) % 3,
    }  # fmt: skip
    run = make_run(tmp_path / "run", World(steps=6, beta=0.1))
    view = replace(view_of(read_run(run), []), pairs=(), samples=(sample,))
    assert matched_pairs(view) == (), "seven pairs are too few"
    own[3] = 20
    (found,) = matched_pairs(view)
    rows = [row for row in range(9) if own[row] != 9]
    signs = [1 if own[row] > 9 else -1 for row in rows]
    assert found.beta == 0.1 and found.step == 3
    assert found.score.tolist() == [sign * score[row] for row, sign in zip(rows, signs, strict=True)]
    assert found.kl.tolist() == [3.0 * sign for sign in signs]
    said = " ".join(prose(view, diagnose(view)).penalty)
    assert "no probe pairs" in said and "same 8 prompts" in said


# Trials


def trial(caused: bool = True) -> dict[str, object]:
    row = {
        "figure": "length", "unit": "tokens", "reference": 9.0, "null": 21.0, "changed": 13.0, "difference": -8.0,
        "differences": [-8.0, -8.0], "over_seeds": {"low": -9.0, "high": -7.0}, "over_prompts": None, "caused": caused,
        "truth": False, "note": "",
    }  # fmt: skip
    sentence = "policy.kl.beta=0.2 caused length to fall by 8 tokens." if caused else "No effect on length was seen."
    arm = {"changes": ["policy.kl.beta=0.2"], "retrained": False, "rows": [row], "sentences": [sentence]}
    return {"version": 1, "run": "run", "from": 6, "steps": 5, "until": 11, "seeds": 2, "arms": [arm]}


def test_what_was_tried_stands_by_its_proposal_and_caused_is_said_of_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", World(steps=12))
    (run / "trials").mkdir()
    (run / "trials" / "beta.json").write_text(json.dumps(trial()))
    view, _ = read_view(run)
    found = replace(diagnose(view), findings=(_failing(),), explained={})
    said = prose(view, found, read_trials(run))
    assert [one.overrides for one in said.changes] == [
        ("policy.kl.beta=0.2", "policy.length_penalty=0.03"), ("policy.kl.mode=fixed", "policy.kl.beta=0.15"),
        ("policy.kl.beta=0.2",),
    ]  # fmt: skip
    assert [one.tried is not None for one in said.changes] == [False, False, True]
    rest = [
        *said.happening,
        *said.penalty,
        *(part for one in said.changes for part in (one.effect, one.reward, one.gradient)),
    ]
    assert not re.search(r"\bcause[sd]\b", " ".join(rest))


def test_a_damaged_trial_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "one.json").write_text('{"arms": [{}]}')
    with pytest.raises(InputError, match=r"one\.json"):
        read_trials(tmp_path)


# The page of the checks


def test_the_page_of_the_checks_is_current() -> None:
    spec = importlib.util.spec_from_file_location("render_checks", ROOT / "tools" / "render_checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert page == module.render(), "run python tools/render_checks.py"
    assert all(f"### {name}\n" in page for name in NAMES)


def test_every_mechanism_has_a_check_and_checks_name_no_other() -> None:
    named = {number for check in all_checks() for number in check.mechanisms}
    assert named == set(MECHANISMS) == {f"M{number}" for number in range(1, 26)}
