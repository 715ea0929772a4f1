"""The ledger sums exactly, whichever way it is cut, and its length shares match a covariance computed apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_run import World, make_run

from kedge.diagnose.ledger import POSITIONS, STYLES, Ledger, ledger, position_names, reference_length, styles
from kedge.trace.reader import Part, Run, read_run
from kedge.trace.run_dir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("run"), World(steps=6, batch=16, penalty=0.02)))


@pytest.fixture(scope="module")
def account(run: Run) -> Ledger:
    found = ledger(run)
    assert found is not None
    return found


def test_everything_sums(run: Run, account: Ledger) -> None:
    advantage = np.concatenate([trace.advantage()[trace.response_mask] for trace in run.traces()])
    assert account.residual < 1e-9
    assert account.tokens.sum() == len(advantage)
    assert account.responses.sum() == 6 * 16
    rows = account.rows()
    assert sum(row.token_mean for row in rows) == pytest.approx(advantage.mean(), abs=1e-9)
    assert sum(row.response_sum for row in rows) * 96 == pytest.approx(advantage.sum(), abs=1e-9)
    by_style = [sum(row.response_sum for row in account.rows(style)) * account.count(style) for style in STYLES]
    assert sum(by_style) == pytest.approx(advantage.sum(), abs=1e-9)


def test_one_cell_against_a_loop(run: Run, account: Ledger) -> None:
    total, tokens = 0.0, 0
    for number in (4, 5):
        trace = run.step(number)
        part = trace.parts()[Part("score", "critic")]
        for b in range(len(trace)):
            if trace.response_mask[b].sum() <= 15:
                continue
            places = np.flatnonzero(trace.response_mask[b])[8:16]
            total += float(part[b, places].sum())
            tokens += len(places)
    rows = {row.part: row for row in account.rows("verbose", window=2, position=2)}
    assert rows[Part("score", "critic")].token_mean == pytest.approx(total / tokens, rel=1e-9)


def test_length_shares(run: Run, account: Ledger) -> None:
    products = 0.0
    for trace in run.traces():
        part = trace.parts()[Part("score", "reward")].sum(axis=1)
        products += len(trace) * np.cov(part, trace.lengths, bias=True)[0, 1]
    shares = {share.part: share for share in account.length_shares()}
    assert shares[Part("score", "reward")].covariance == pytest.approx(products / 96, rel=1e-9)
    assert sum(share.share for share in shares.values()) == pytest.approx(1)
    assert shares[Part("score", "reward")].covariance > 0  # the synthetic score pays for length


def test_styles_are_cut_at_the_reference(run: Run) -> None:
    assert reference_length(run) == 10
    assert [STYLES[index] for index in styles(np.array([10, 11, 15, 16]), 10.0)] == [
        "concise",
        "between",
        "between",
        "verbose",
    ]
    assert set(styles(np.array([1, 99]), None)) == {1}


def test_a_run_without_rows_or_probes(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "empty")
    assert ledger(read_run(tmp_path / "empty")) is None
    path = make_run(tmp_path / "run", World(steps=2, batch=4))
    for file in path.glob("trace/probes-*"):
        file.unlink()
    account = ledger(read_run(path))
    assert account is not None and account.reference_length is None
    assert account.count("between") == 8 and account.rows("verbose") == []


def test_position_names_cover_every_token() -> None:
    assert position_names() == ["1", "2–8", "9–16", "17–32", "33+"]
    assert len(position_names()) == len(POSITIONS)
