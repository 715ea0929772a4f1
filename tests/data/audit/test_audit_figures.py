"""The audit's equations against loops, closed forms, SciPy, statsmodels and numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import pair, tables, write

from kedge.data.audit.agreement import agreement, label_counts
from kedge.data.audit.annotators import annotators, drifts
from kedge.data.audit.clusters import MOST, clustered, interval, resampled, sums
from kedge.data.audit.cycles import find_cycles
from kedge.data.audit.domain import domain_mix
from kedge.data.audit.duplicates import find_duplicates
from kedge.data.audit.extent import expected_rows
from kedge.data.audit.fit import fit_logistic, slope
from kedge.data.audit.format import MARKS, format_bias, marks_of
from kedge.data.audit.length import label_length, length_bias
from kedge.data.audit.near import Index, near_duplicates, similarity, sketch, words
from kedge.data.audit.noise import flip_rate, label_noise
from kedge.data.audit.position import position_bias
from kedge.data.audit.sample import Sample, text_hash
from kedge.data.audit.tables import outcome


def test_the_slope_is_that_of_statsmodels() -> None:
    import statsmodels.api as models

    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    won = rng.random(400) < 1 / (1 + np.exp(-0.8 * x))
    expected = models.Logit(won.astype(float), x[:, None]).fit(disp=0).params[0]
    found = slope(np.where(won, x, -x), np.ones(400))[0]
    assert found == pytest.approx(expected, abs=1e-8)


def test_a_slope_by_hand() -> None:
    # Three of four pairs with ratio 2 are won by the longer: sigmoid(b log 2) = 3/4.
    advantage = math.log(2) * np.array([1.0, 1.0, 1.0, -1.0])
    assert slope(advantage, np.ones(4))[0] == pytest.approx(math.log(3) / math.log(2))
    assert np.isnan(slope(np.zeros(3), np.ones(3))[0])
    assert slope(np.ones(5), np.ones(5))[0] > 20  # not bounded by the data


def test_robust_errors_are_those_of_statsmodels() -> None:
    import statsmodels.api as models

    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(60, dtype=np.uint64), 5)
    features = rng.normal(size=(300, 2)) + rng.normal(size=(60, 2))[prompts.astype(int)]
    labels = (rng.random(300) < 1 / (1 + np.exp(-features @ [0.5, -0.3]))).astype(float)
    found = fit_logistic(features, labels, clustered(prompts), ridge=0.0)
    fitted = models.Logit(labels, features).fit(
        disp=0, cov_type="cluster", cov_kwds={"groups": prompts.astype(int), "use_correction": False}
    )
    np.testing.assert_allclose(found.coefficients, fitted.params, atol=1e-7)
    np.testing.assert_allclose(found.errors, fitted.bse * math.sqrt(60 / 59), rtol=1e-6)


def test_resampling_has_the_right_spread() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=2000)
    clusters = clustered(np.arange(2000, dtype=np.uint64))
    totals = resampled(sums(clusters, np.column_stack([values, np.ones(2000)])))
    low, high = interval(totals[:, 0] / totals[:, 1]) or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(2000), rel=0.1)


def test_rows_of_one_prompt_go_together_and_many_prompts_are_grouped() -> None:
    few = clustered(np.repeat(np.arange(20, dtype=np.uint64), 3))
    assert (few.count, few.by_prompt) == (20, True)
    assert len({*few.code[:3]}) == 1
    one = clustered(np.zeros(50, np.uint64))
    assert (one.count, one.by_prompt) == (50, False)
    many = clustered(np.repeat(np.arange(3 * MOST, dtype=np.uint64), 2))
    assert many.count == MOST and (many.code[::2] == many.code[1::2]).all()


def test_length_bias_by_hand(tmp_path: Path) -> None:
    rows = [pair("p", "aaaa", "bb")] * 3 + [
        pair("p", "cc", "dddd"),
        pair("q", "xy", "zz"),
        pair("q", "e", "f", tie=True),
    ]
    found = length_bias(tables(tmp_path, rows).pairs)
    assert found is not None
    assert (found.pairs, found.longer_wins) == (4, 0.75)
    assert found.length_only_accuracy == (3 + 0.5) / 5  # equal lengths: a coin; the tie is left out
    assert found.slope == pytest.approx(math.log(3) / math.log(2))
    assert found.by_prompt is False  # two prompts are too few to resample


def test_strength_below_one_half_means_the_other_side_won(tmp_path: Path) -> None:
    got = tables(tmp_path, [pair("p", "aaaa", "b", strength=0.2), pair("p", "a", "b", strength=0.5)])
    assert outcome(got.pairs).tolist() == [-1, 0]
    found = length_bias(got.pairs)
    assert found is not None and found.longer_wins == 0.0


def test_an_empty_response_has_the_length_of_one_character(tmp_path: Path) -> None:
    found = length_bias(tables(tmp_path, [pair(f"p{i}", "ab" if i else "", "" if i else "ab") for i in range(4)]).pairs)
    assert found is not None and found.slope == pytest.approx(math.log(3) / math.log(2))


def test_binned_intervals_are_those_of_exact_refits(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for prompt in range(150):
        for _ in range(3):
            sizes = rng.integers(1, 3000, 2)
            first = rng.random() < 1 / (1 + (sizes[1] / sizes[0]) ** 0.6)
            texts = ["x" * size for size in sizes]
            rows.append(pair(f"p{prompt}", *(texts if first else texts[::-1])))
    got = tables(tmp_path, rows)
    found = length_bias(got.pairs)
    ratio = np.log(got.pairs["chosen_length"] / got.pairs["rejected_length"])
    exact = []
    for _ in range(300):
        drawn = rng.integers(0, 150, 150)
        exact.append(slope(np.concatenate([ratio[3 * i : 3 * i + 3] for i in drawn]), np.ones(450))[0])
    assert found is not None and found.slope_ci is not None
    np.testing.assert_allclose(found.slope_ci, np.quantile(exact, [0.025, 0.975]), atol=0.04)


def test_position_bias_by_hand(tmp_path: Path) -> None:
    rows = [pair(f"p{i}", "a", "b", chosen_pos=1 if i < 75 else 2) for i in range(100)]
    found = position_bias(tables(tmp_path, [*rows, pair("q", "a", "b")]).pairs)
    assert found is not None
    assert (found.pairs, found.first_wins) == (100, 0.75)
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959964, 100, 0.75
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(
        found.wilson, [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)], 1e-6
    )
    assert found.ci is not None
    np.testing.assert_allclose(found.ci, [0.75 - 0.085, 0.75 + 0.085], atol=0.02)
    assert position_bias(tables(tmp_path, [pair("q", "a", "b")]).pairs) is None


def test_duplicates_by_hand(tmp_path: Path) -> None:
    rows = [
        pair("p", "a", "b"),
        pair("p", "a", "b"),  # duplicate
        pair("p", "a", "b", strength=0.9),  # duplicate: strength is no part of it
        pair("p", "a", "b", tie=True),  # another winner, no duplicate
        pair("p", "a", "b", annotator="me"),  # another annotator, no duplicate
        pair("p", "b", "a"),  # opposite winner
        pair("q", "a", "b"),
        pair("q", "c", "c"),
        pair("q", "d", "d", tie=True),
        pair("q", "e", " "),
    ]
    found = find_duplicates(tables(tmp_path, rows))
    assert (found.duplicates, found.identical, found.identical_decided, found.empty) == (2, 2, 1, 1)
    assert (found.repeated, found.contradictory) == (1, 1)


def test_verdicts_and_ratings_contradict(tmp_path: Path) -> None:
    verdicts = [{"prompt": "p", "response": "r", "label": good} for good in (True, False, True)]
    found = find_duplicates(tables(tmp_path, verdicts))
    assert (found.duplicates, found.repeated, found.contradictory) == (1, 1, 1)
    ratings = [{"prompt": "p", "response": "r", "rating": 1}, {"prompt": "p", "response": "r", "rating": 5}]
    found = find_duplicates(tables(tmp_path, [*ratings, {"prompt": "q", "response": "r", "rating": 3}]))
    assert (found.repeated, found.contradictory) == (1, 1)


def test_near_duplicates_are_those_of_the_definition() -> None:
    base = " ".join(f"word{i}" for i in range(40))
    one, close, far = sketch(base), sketch(base + " and more"), sketch("something else entirely, said at some length")
    assert one is not None and close is not None and far is not None
    shingles = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (words(base), words(base + " and more"))]
    expected = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert similarity(one.shingles, close.shingles) == expected
    index = Index()
    index.add(one)
    assert list(index.near(close)) == [0] and list(index.near(far)) == []
    assert sketch("!?") is None
    sample = Sample(10)
    for text in (base, base + " and more", "far away from all of it", base + "  and MORE."):
        sample.offer(text_hash(text), text)
    found = near_duplicates(sample.texts(4))
    assert (found.alike, found.texts) == (3, 4)


@given(st.lists(st.text(max_size=5), max_size=60), st.integers(1, 8))
def test_a_sample_does_not_depend_on_order(texts: list[str], size: int) -> None:
    one, other = Sample(size), Sample(size)
    for text in texts:
        one.offer(text_hash(text), text)
    for text in reversed(texts):
        other.offer(text_hash(text), text)
    assert one.texts(0).texts == other.texts(0).texts
    assert set(one.texts(0).hashes.tolist()) == set(sorted({text_hash(text) for text in texts})[:size])


def count_cycles(wins: set[tuple[str, str]]) -> tuple[int, int]:
    """Cycles and triangles by looking at every three."""
    names, cyclic, triangles = sorted({name for edge in wins for name in edge}), 0, 0
    for trio in combinations(names, 3):
        beaten = [sum((one, other) in wins for other in trio) for one in trio]
        if all((one, other) in wins or (other, one) in wins for one, other in combinations(trio, 2)):
            triangles += 1
            cyclic += beaten == [1, 1, 1]
    return cyclic, triangles


@settings(max_examples=25)
@given(st.integers(3, 7), st.randoms(use_true_random=False))
def test_cycles_are_those_of_a_look_at_every_three(tmp_path_factory, size, random) -> None:
    edges = [edge if random.random() < 0.5 else edge[::-1] for edge in combinations("abcdefg"[:size], 2)]
    edges = [edge for edge in edges if random.random() < 0.8]
    cyclic, triangles = count_cycles(set(edges))
    folder = tmp_path_factory.mktemp("cycles")
    found = find_cycles(tables(folder, [pair("p", *edge) for edge in edges] or [pair("p", "a", "b")]).pairs)
    assert (cyclic, triangles) == (0, 0) if found is None else (found.cyclic, found.triangles) == (cyclic, triangles)


def test_curl_by_hand(tmp_path: Path) -> None:
    """A cycle of three is all curl; an order of three has flow (1, 1, 1), of which a third goes round: 1/9."""
    cycle = find_cycles(tables(tmp_path, [pair("p", "a", "b"), pair("p", "b", "c"), pair("p", "c", "a")]).pairs)
    order = find_cycles(tables(tmp_path, [pair("p", "a", "b"), pair("p", "b", "c"), pair("p", "a", "c")]).pairs)
    assert cycle is not None and order is not None
    assert (cycle.cyclic, cycle.curl) == (1, pytest.approx(1.0))
    assert (order.cyclic, order.curl) == (0, pytest.approx(1 / 9))


def test_contradicted_pairs_and_other_prompts_make_no_triangle(tmp_path: Path) -> None:
    rows = [pair("p", "a", "b"), pair("p", "b", "a"), pair("p", "b", "c"), pair("p", "c", "a"), pair("q", "a", "b")]
    assert find_cycles(tables(tmp_path, rows).pairs) is None


def test_alpha_is_that_of_the_raw_table(tmp_path: Path) -> None:
    """Krippendorff's alpha from our counts against the library on the coders' table, turned to one side."""
    import krippendorff

    rng = np.random.default_rng(4)
    rows, table = [], np.full((3, 40), np.nan)
    for item in range(40):
        a, b = f"a{item}", f"b{item}"
        first = text_hash(a) < text_hash(b)
        for coder in range(3):
            if rng.random() < 0.8:
                vote = rng.choice([1, 0, -1], p=[0.6, 0.1, 0.3])
                chosen, rejected = (a, b) if vote >= 0 else (b, a)
                rows.append(pair(f"p{item}", chosen, rejected, tie=bool(vote == 0), annotator=f"c{coder}"))
                table[coder, item] = vote if first else -vote
    (counts,) = label_counts(tables(tmp_path, rows))
    found = agreement(counts)
    assert found.source == "annotators"
    assert found.alpha == pytest.approx(krippendorff.alpha(table, level_of_measurement="nominal"))
    pairs_of_labels = [
        a == b for column in table.T for a, b in combinations(column[~np.isnan(column)], 2)
    ]  # fmt: skip
    per_item = [
        np.mean([a == b for a, b in combinations(column[~np.isnan(column)], 2)])
        for column in table.T
        if np.sum(~np.isnan(column)) > 1
    ]
    assert pairs_of_labels and found.agree == pytest.approx(np.mean(per_item))


def test_votes_become_counts(tmp_path: Path) -> None:
    rows = [pair(f"p{i}", f"a{i}", f"b{i}", votes=[4, 1, 0]) for i in range(40)]
    by_source = {counts.source: counts for counts in label_counts(tables(tmp_path, rows))}
    found = agreement(by_source["votes"])
    assert found.agree == pytest.approx(0.6) and found.unanimous == 0.0  # of 10 pairs of votes 6 are the same
    noise = label_noise(by_source["votes"])
    assert noise is not None and noise.differ == pytest.approx(0.4)
    assert noise.ceiling == pytest.approx((0.6, 1 - flip_rate(0.4)))


@given(st.floats(0, 0.5))
def test_the_flip_rate_undoes_its_formula(rate: float) -> None:
    assert flip_rate(2 * rate * (1 - rate)) == pytest.approx(rate, abs=1e-6)


def test_the_flip_rate_of_flipped_labels_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = []
    for item in range(1500):
        for coder in ("x", "y"):
            texts = (f"good {item}", f"bad {item}")
            rows.append(pair(f"p{item}", *(texts[::-1] if rng.random() < 0.15 else texts), annotator=coder))
    (counts,) = label_counts(tables(tmp_path, rows))
    noise = label_noise(counts)
    assert noise is not None and noise.flips == pytest.approx(0.15, abs=0.02)
    low, high = noise.ceiling
    assert low <= 0.85 <= high + 0.02


def test_a_bad_annotator_and_one_who_changes_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows = []
    for item in range(400):
        for coder in ("ann", "bea", "cid", "dan"):
            good = rng.random() < {"ann": 0.95, "bea": 0.95, "cid": 0.95, "dan": 0.3}[coder]
            texts = ("r" * int(rng.integers(5, 40)) + str(item), "s" * int(rng.integers(5, 40)) + str(item))
            rows.append(pair(f"p{item}", *(texts if good else texts[::-1]), annotator=coder))
    rows = rows[:0] + rows
    found = {one.name: one for one in annotators(tables(tmp_path, [_same_texts(row) for row in rows]))}
    assert found["dan"].agrees is not None and found["dan"].agrees < 0.45
    assert all((found[name].agrees or 0) > 0.8 for name in ("ann", "bea", "cid"))
    changing = [
        pair(f"p{i}", "x" * (9 if (i < 300) == (i % 5 > 0) else 3), "y" * 6, annotator="eve") for i in range(600)
    ]
    first = drifts(tables(tmp_path, changing))[0]
    assert first.what == "longer wins" and first.p < 1e-6
    assert (first.before, first.after) == (0.8, 0.2)


def _same_texts(row: dict[str, str]) -> dict[str, str]:
    """The same two responses for every annotator of an item."""
    kind = {"r": "good answer", "s": "bad answer"}
    item = row["prompt"][1:]
    return row | {side: f"{kind[row[side][0]]} {item}" for side in ("chosen", "rejected")}


def test_domain_effect_is_cramers_v(tmp_path: Path) -> None:
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(7)
    rows = [
        {"prompt": f"p{i}", "response": f"r{i}", "label": bool(rng.random() < (0.86 if i % 2 else 0.16)),
         "domain": ("cinema", "coffee")[i % 2], "season": ("dry", "wet")[i % 3 > 0]}
        for i in range(2000)
    ]  # fmt: skip
    domain, season = domain_mix(tables(tmp_path, rows))
    assert (domain.column, season.column) == ("domain", "season")
    counts = [[sum(r["label"] == good for r in rows if r["domain"] == name) for good in (True, False)]
              for name in ("cinema", "coffee")]  # fmt: skip
    chi = chi2_contingency(counts, correction=False)
    assert domain.effect == pytest.approx(math.sqrt(chi.statistic / 2000), abs=0.002)
    assert domain.p < 1e-100 and season.p > 0.001
    assert {part.value: round(part.share, 1) for part in domain.parts} == {"coffee": 0.9, "cinema": 0.2}


def test_columns_made_from_the_label_are_no_domains(tmp_path: Path) -> None:
    rows = [
        pair(f"p{i}", "aa", "b", model_chosen="m", gold_label="x", id=str(i), source=("s", "t")[i % 2], number=i)
        for i in range(100)
    ]
    assert [domain.name for domain in tables(tmp_path, rows).domains] == ["source"]


def test_marks_of_texts() -> None:
    def marks(text: str) -> set[str]:
        return {name for bit, name in enumerate(MARKS) if marks_of(text) >> bit & 1}

    assert marks("plain words") == set()
    assert marks("- one\n- two") == {"list"}
    assert marks("1. one") == {"list", "digits"}
    assert marks("# Title\n\n**bold** `code`") == {"heading", "paragraphs", "bold", "code"}
    assert marks("Sorry! See www.x, why?") == {"apology", "exclamation", "link", "question"}


def test_format_coefficients_are_those_of_statsmodels(tmp_path: Path) -> None:
    import statsmodels.api as models

    rng = np.random.default_rng(8)
    rows, features = [], []
    for i in range(800):
        marked, sizes = rng.random(2) < 0.5, rng.integers(10, 80, 2)
        texts = ["x" * size + ("!" if mark else ".") + str(i).translate(str.maketrans("0123456789", "abcdefghij"))
                 for mark, size in zip(marked, sizes, strict=True)]  # fmt: skip
        x = np.array([float(marked[0]) - float(marked[1]), math.log(len(texts[0]) / len(texts[1]))])
        first = rng.random() < 1 / (1 + math.exp(-(0.7 * x[0] + 0.3 * x[1])))
        features.append(x if first else -x)
        rows.append(pair(f"p{i}", *(texts if first else texts[::-1])))
    (effect,) = [one for one in format_bias(tables(tmp_path, rows).pairs) if one.coefficient is not None]
    both = np.concatenate([features, -np.array(features)])
    expected = models.Logit(np.repeat([1.0, 0.0], 800), both).fit(disp=0).params[0]
    assert effect.mark == "exclamation"
    assert effect.coefficient == pytest.approx(expected, abs=1e-3)


def test_length_of_single_labels(tmp_path: Path) -> None:
    import statsmodels.api as models

    rng = np.random.default_rng(9)
    size = rng.integers(2, 400, 500)
    good = rng.random(500) < 1 / (1 + np.exp(-(np.log(size) - 4)))
    rows = [
        {"prompt": f"p{i}", "response": "x" * n, "label": bool(g)}
        for i, (n, g) in enumerate(zip(size, good, strict=True))
    ]
    found = label_length(tables(tmp_path, rows).singles, "verdict")
    expected = models.Logit(good.astype(float), models.add_constant(np.log(size))).fit(disp=0).params[1]
    assert found is not None and found.slope == pytest.approx(expected, abs=2e-3)
    rated = [{"prompt": f"p{i}", "response": "x" * n, "rating": float(np.log(n))} for i, n in enumerate(size)]
    found = label_length(tables(tmp_path, rated).singles, "rating")
    assert found is not None and found.slope == pytest.approx(1 / np.log(size).std())


def test_rankings_become_all_pairs(tmp_path: Path) -> None:
    got = tables(tmp_path, [{"prompt": "p", "responses": ["c", "a", "b", "d"], "ranks": [2, 0, 1, 1]}])
    assert (len(got.rows), len(got.pairs), got.kinds) == (1, 6, {"rankings": 1})
    assert sorted(outcome(got.pairs).tolist()) == [0, 0, 1, 1, 1, 1] or sorted(outcome(got.pairs).tolist()) == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


def test_expected_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(f"p{i}", "a" * (i % 50), "b") for i in range(30_000)])
    assert expected_rows(path) == pytest.approx(30_000, rel=0.02)
    assert expected_rows(tmp_path / "none.jsonl") is None
