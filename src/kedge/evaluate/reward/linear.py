"""A linear Bradley-Terry model on the words of a response: the baseline that a reward model has to beat.

Features are hashed words and pairs of neighbouring words, weighted (1 + log count) * idf and of unit norm, a few shares
that describe the form, and, unless they are left out, logarithms of the length. Every answer is scored by a model that
never saw its prompt, and how much to shrink the weights is chosen in the same way within the training prompts.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.data.records import prompt_text
from kedge.errors import InputError, Problem
from kedge.evaluate.intervals import MIN_PROMPTS, Floats, Integers
from kedge.evaluate.reward.answers import Answer, Judged, RewardJudge

COLUMNS = 2**18
FOLDS, INNER_FOLDS = 5, 3
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
WORD = re.compile(r"\w+|[^\w\s]")
LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", flags=re.MULTILINE)
MARKUP = re.compile(r"^#+ |\*\*|`", flags=re.MULTILINE)
SENTENCE = re.compile(r"[.!?]+(?:\s|$)")
LENGTHS = 3  # the last columns of `_form`


@dataclass(frozen=True)
class _Features:
    """Counts [A, COLUMNS] as a sparse matrix, and the form [A, D] with the logarithms of length last."""

    counts: Any
    form: Floats


@dataclass(frozen=True)
class _Model:
    """Weights of words and of the standardised form; `penalty` is what was chosen."""

    idf: Floats  # [COLUMNS], 0 for what training does not hold twice
    shift: Floats  # [D] of the form
    scale: Floats  # [D] 1 / standard deviation; 0 for what does not vary
    words: Floats  # [COLUMNS]
    form: Floats  # [D]
    penalty: float

    def score(self, features: _Features) -> Floats:
        form = _standardised(features.form, self.shift, self.scale)
        return np.asarray(_weighted(features.counts, self.idf) @ self.words + form @ self.form)


def cross_fitted(
    judged: Judged,
    *,
    length: bool = True,
    folds: int = FOLDS,
    on_fold: Callable[[int], None] | None = None,
) -> RewardJudge:
    """The linear judge of these comparisons; answers to prompts of `judged` are scored by a model that never saw them.

    Prompts outside of `judged` get the mean of the models' scores. `length` adds the logarithms of length; without
    them the judge still sees length through the words. Raises `InputError` for fewer than 10 prompts.
    """
    prompts = len(np.unique(judged.pair_prompt[judged.decided]))
    if prompts < MIN_PROMPTS:
        what = f"decided comparisons on {prompts} prompts, the linear judge needs {MIN_PROMPTS}"
        raise InputError(Problem("linear", what, "give more data"))
    features = _features(judged.answers, length=length)
    fold_of = folds_of(judged, folds)
    models = []
    for fold in range(folds):
        models.append(_chosen(features, judged, fold_of != fold))
        if on_fold is not None:
            on_fold(fold)
    known = {prompt_text(prompt): int(fold) for (prompt, _), fold in zip(judged.answers, fold_of, strict=True)}

    def score(answers: Sequence[Answer]) -> Floats:
        given = _features(answers, length=length)
        by_model = np.stack([model.score(given) for model in models])
        rows = [known.get(prompt_text(prompt), -1) for prompt, _ in answers]
        own = by_model[np.maximum(rows, 0), np.arange(len(answers))] if len(answers) else np.zeros(0)
        return np.where(np.array(rows, dtype=np.int64) >= 0, own, by_model.mean(axis=0))

    return RewardJudge.of("linear" if length else "linear without length", score, log_odds=1.0)


def folds_of(judged: Judged, folds: int) -> Integers:
    """[A] the fold of each answer's prompt; prompts, or groups of them, are dealt out in the order of a hash."""
    first: dict[int, bytes] = {}
    for (prompt, _), number in zip(judged.answers, judged.prompt, strict=True):
        text = prompt_text(prompt).encode("utf-8", errors="surrogatepass")
        digest = hashlib.sha256(b"kedge folds\n" + text).digest()
        first[int(number)] = min(digest, first.get(int(number), digest))
    order = sorted(first, key=lambda number: first[number])
    place = np.zeros(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) % folds
    return place[judged.prompt]


def _chosen(features: _Features, judged: Judged, training: NDArray[np.bool_]) -> _Model:
    """A model of the answers in `training` [A], shrunk by as much as does best on prompts left out within them."""
    inner = folds_of(judged, FOLDS * INNER_FOLDS) // FOLDS
    losses = np.zeros(len(PENALTIES))
    for fold in range(INNER_FOLDS):
        seen, unseen = training & (inner != fold), training & (inner == fold)
        pairs = unseen[judged.first]
        for index, model in enumerate(_path(features, judged, seen, PENALTIES)):
            score = model.score(features)
            margin = score[judged.first[pairs]] - score[judged.second[pairs]]
            losses[index] += _loss(margin, judged.share[pairs])
    best = int(np.argmin(losses))
    return _path(features, judged, training, PENALTIES[: best + 1])[-1]


def _path(features: _Features, judged: Judged, training: NDArray[np.bool_], penalties: Sequence[float]) -> list[_Model]:
    """A model for each penalty, each starting from the last, on the comparisons within `training` [A]."""
    from scipy import sparse
    from scipy.optimize import minimize

    seen_twice = np.bincount(features.counts[training].indices, minlength=COLUMNS)
    idf = np.where(seen_twice > 1, 1 + np.log((1 + training.sum()) / (1 + seen_twice)), 0.0)
    columns = np.flatnonzero(idf)
    shift, spread = features.form[training].mean(axis=0), features.form[training].std(axis=0)
    scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
    words = _weighted(features.counts, idf)[:, columns]
    form = _standardised(features.form, shift, scale)
    matrix = sparse.hstack([words, sparse.csr_matrix(form)], format="csr")
    pairs = training[judged.first]
    first, second, share = judged.first[pairs], judged.second[pairs], judged.share[pairs]
    count = max(1, len(first))
    weights = np.zeros(matrix.shape[1])
    found = []
    for penalty in penalties:

        def objective(w: Floats, penalty: float = penalty) -> tuple[float, Floats]:
            score = matrix @ w
            margin = score[first] - score[second]
            pull = (1 / (1 + np.exp(-margin)) - share) / count
            push = np.bincount(first, pull, minlength=len(score)) - np.bincount(second, pull, minlength=len(score))
            loss = _loss(margin, share) / count + 0.5 * penalty * float(w @ w)
            return loss, matrix.T @ push + penalty * w

        weights = minimize(objective, weights, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-7}).x
        whole = np.zeros(COLUMNS)
        whole[columns] = weights[: len(columns)]
        found.append(_Model(idf, shift, scale, whole, weights[len(columns) :], penalty))
    return found


def _standardised(form: Floats, shift: Floats, scale: Floats) -> Floats:
    """Within three standard deviations, so that one odd answer, say without spaces, does not outweigh its words."""
    return np.asarray(np.clip((form - shift) * scale, -3.0, 3.0))


def _loss(margin: Floats, share: Floats) -> float:
    """Summed cross-entropy of the votes, nats."""
    return float(np.sum(np.logaddexp(0, -margin) * share + np.logaddexp(0, margin) * (1 - share)))


def _weighted(counts: Any, idf: Floats) -> Any:
    """(1 + log count) * idf in rows of unit norm; rows without a known word stay 0."""
    from scipy import sparse

    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * idf[counts.indices]
    norm = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return sparse.diags(np.where(norm > 0, 1 / np.maximum(norm, 1e-12), 0.0)) @ weighted


def _features(answers: Sequence[Answer], *, length: bool) -> _Features:
    from scipy import sparse

    hashes: dict[str, int] = {}
    indices: list[Integers] = []
    values: list[Integers] = []
    form = np.zeros((len(answers), 11 + LENGTHS))
    prompt_words: dict[str, frozenset[str]] = {}
    for row, (prompt, text) in enumerate(answers):
        words = WORD.findall(text.lower())
        grams = [*words, *(f"{one} {other}" for one, other in pairwise(words))]
        for gram in grams:
            if gram not in hashes:
                hashes[gram] = zlib.crc32(gram.encode("utf-8", errors="surrogatepass")) % COLUMNS
        column, count = np.unique(np.array([hashes[gram] for gram in grams], dtype=np.int64), return_counts=True)
        indices.append(column)
        values.append(count)
        key = prompt_text(prompt)
        if key not in prompt_words:
            prompt_words[key] = frozenset(WORD.findall(key.lower()))
        form[row] = _form(text, words, prompt_words[key])
    offsets = np.concatenate([[0], np.cumsum([len(column) for column in indices])])
    empty = np.zeros(0, dtype=np.int64)
    data = np.concatenate([*values, empty]).astype(np.float64), np.concatenate([*indices, empty]), offsets
    counts = sparse.csr_matrix(data, shape=(len(answers), COLUMNS))
    return _Features(counts, form if length else form[:, :-LENGTHS])


def _form(text: str, words: Sequence[str], asked: frozenset[str]) -> list[float]:
    """Shares of characters, words and lines that describe how a response is written; its length comes last."""
    size, number, lines = max(1, len(text)), max(1, len(words)), text.count("\n") + 1
    said = frozenset(words)
    sentences = len(SENTENCE.findall(text))
    return [
        float(not words),
        sum(map(str.isupper, text)) / size,
        sum(map(str.isdigit, text)) / size,
        sum(not word[0].isalnum() for word in words) / number,
        sum(map(len, words)) / number,
        len(LIST_LINE.findall(text)) / lines,
        len(MARKUP.findall(text)) / number,
        sum(word in asked for word in words) / number,
        len(said & asked) / max(1, len(asked)),
        float(text.rstrip().endswith((".", "!", '"', ")", "`"))),
        float(text.rstrip().endswith("?")),
        float(np.log1p(len(text))),
        float(np.log1p(len(words))),
        float(np.log1p(sentences)),
    ]
