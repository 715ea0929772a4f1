"""How far the prompts one deploys on are from those that were judged.

The two-sample test of Lopez-Paz and Oquab (2017): a classifier that tells the two apart on prompts it was not fitted on
does so better than a coin only if they differ. Its features are hashed words, its fit SciPy's L-BFGS.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import ks_2samp, rankdata

from kedge.data import columns
from kedge.data.audit.extent import expected_rows
from kedge.data.audit.gather import stop_if_asked
from kedge.data.audit.near import Near, near_another, word_codes
from kedge.data.audit.sample import Sample, text_hash
from kedge.data.audit.tables import Array, Texts
from kedge.data.files import read_rows
from kedge.data.records import prompt_text
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

SAMPLED = 5_000  # distinct prompts of the deployment file that are compared
CLASSIFIED = 2_000  # of each file that the classifier sees
FEATURES, FOLDS, RIDGE, REPLICATES = 4096, 5, 1.0, 500
LEAST = 50  # prompts on each side for the classifier


@dataclass(frozen=True)
class Shift:
    """Deployment prompts beside judged ones; figures are of the samples whose sizes stand beside them.

    `covered`: deployment prompts with a near one among the judged. `unknown_words`: share of their words that no judged
    prompt has. `lengths`: median characters, judged and deployed, of texts cut at 2,000; `length_gap`: largest distance
    between the two distributions (Kolmogorov and Smirnov). `auc` of the classifier, 0.5 where it cannot tell, with a
    95% interval over prompts; None with too few prompts.
    """

    judged: int
    deployed: int
    rejected: int
    covered: Near
    same: float
    unknown_words: float
    lengths: tuple[float, float]
    length_gap: float
    auc: float | None
    auc_ci: tuple[float, float] | None


@dataclass(frozen=True)
class Deployed:
    """A sample of the deployment file's distinct prompts, and how many of its rows could not be read."""

    texts: Texts
    rejected: int


def read_deployed(path: str | Path, *, progress: Progress, interrupt: Interrupt | None = None) -> Deployed:
    """Prompts of a file. Raises InputError where it cannot be read or holds none."""
    sample, rejected, used = Sample(SAMPLED), 0, array("Q")
    first: Problem | None = None
    expected = expected_rows(Path(path)) or 1
    with progress.stage("prompts", expected) as stage:
        for index, (number, row) in enumerate(read_rows(path)):
            try:
                if isinstance(row, Problem):
                    raise columns.Unusable(row.what, row.remedy)
                text = prompt_text(columns.prompt(row))
            except columns.Unusable as error:
                rejected += 1
                first = first or Problem(f"{path}:{number}", error.what, error.remedy)
                continue
            key = text_hash(text)
            used.append(key)
            sample.offer(key, text)
            if index % 1000 == 0:
                stage.total = max(stage.total, index + 2)
                stage.advance(index)
                stop_if_asked(interrupt, f"{path}:{number}")
    if not used:
        raise InputError(first or Problem(str(path), "no prompts in it", "give a file with prompts"))
    return Deployed(sample.texts(len(np.unique(np.frombuffer(used, np.uint64)))), rejected)


def find_shift(judged: Texts, deployed: Deployed) -> Shift:
    texts = deployed.texts
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(word_codes(text) for text in judged.texts)]))
    spoken = np.concatenate([np.zeros(0, np.uint64), *(word_codes(text) for text in texts.texts)])
    ours, theirs = ([len(text) for text in side] for side in (judged.texts, texts.texts))
    auc, interval = _classified(judged.texts[:CLASSIFIED], texts.texts[:CLASSIFIED])
    return Shift(
        judged=len(judged.texts),
        deployed=len(texts.texts),
        rejected=deployed.rejected,
        covered=near_another(texts.texts, judged, texts.total),
        same=float(np.isin(texts.hashes, judged.hashes).mean()),
        unknown_words=float(1 - np.isin(spoken, known).mean()) if len(spoken) else 0.0,
        lengths=(float(np.median(ours)), float(np.median(theirs))),
        length_gap=float(ks_2samp(ours, theirs).statistic),
        auc=auc,
        auc_ci=interval,
    )


def _classified(judged: tuple[str, ...], deployed: tuple[str, ...]) -> tuple[float | None, tuple[float, float] | None]:
    """Cross-fitted AUC with its interval; prompts that both files hold count on both sides, so they pull to 0.5."""
    if min(len(judged), len(deployed)) < LEAST:
        return None, None
    features = _hashed((*judged, *deployed))
    label = np.repeat([0.0, 1.0], [len(judged), len(deployed)])
    rng = np.random.default_rng(0)
    keys = np.array([text_hash(text) for text in (*judged, *deployed)], np.uint64)
    fold = (keys % np.uint64(FOLDS)).astype(np.int64)  # the same text on both sides is in one fold
    scores = np.zeros(len(label))
    for held in range(FOLDS):
        inside = fold != held
        weights = _fitted(features[inside], label[inside])
        raw = features[~inside] @ weights
        scores[~inside] = (rankdata(raw) - 0.5) / max(1, len(raw))  # folds have their own scale
    draws = []
    zeros, ones = scores[label == 0], scores[label == 1]
    for _ in range(REPLICATES):
        draws.append(_auc(rng.choice(zeros, len(zeros)), rng.choice(ones, len(ones))))
    low, high = np.quantile(draws, [0.025, 0.975])
    return _auc(zeros, ones), (float(low), float(high))


def _hashed(texts: tuple[str, ...]) -> sparse.csr_array:
    """Whether each of `FEATURES` buckets of words occurs in a text, rows of unit length, and a constant."""
    buckets = [np.unique(word_codes(text) % np.uint64(FEATURES)).astype(np.int64) for text in texts]
    sizes = np.array([len(found) for found in buckets])
    data = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    at = np.concatenate([[0], np.cumsum(sizes)])
    words = sparse.csr_array((data, np.concatenate(buckets), at), shape=(len(texts), FEATURES))
    return sparse.csr_array(sparse.hstack([words, np.ones((len(texts), 1))]))


def _fitted(features: sparse.csr_array, label: Array) -> Array:
    sign = 2 * label - 1

    def loss(weights: Array) -> tuple[float, Array]:
        margin = sign * (features @ weights)
        value = float(np.logaddexp(0, -margin).sum() + 0.5 * RIDGE * weights @ weights)
        return value, -(features.T @ (sign * expit(-margin))) + RIDGE * weights

    start = np.zeros(features.shape[1])
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x)


def _auc(zeros: Array, ones: Array) -> float:
    """Chance that a one outranks a zero, ties counting half (Mann and Whitney)."""
    ranks = rankdata(np.concatenate([zeros, ones]))[len(zeros) :]
    return float((ranks.sum() - len(ones) * (len(ones) + 1) / 2) / (len(zeros) * len(ones)))
