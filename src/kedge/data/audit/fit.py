"""Logistic regressions: one slope without intercept, and several coefficients with errors clustered by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from kedge.data.audit.clusters import Clusters, sums
from kedge.data.audit.tables import Array

STEPS = 50
STEEPEST = 50.0  # a slope that the data do not bound stops here


@dataclass(frozen=True)
class Fit:
    """Coefficients [K] and their standard errors, robust to rows of one cluster going together."""

    coefficients: Array
    errors: Array


def slope(advantage: Array, weights: Array) -> Array:
    """b of P(winner) = sigmoid(b x) for each row of weights [R, n] on the winners' advantages x [n]: [R].

    The maximum of sum w log sigmoid(b x) by Newton's method, which is concave in one unknown. NaN where every weight on
    x other than 0 is 0.
    """
    weights = np.atleast_2d(weights).astype(np.float64)
    scale = float(np.sqrt(np.mean(advantage**2))) if len(advantage) else 0.0
    if scale == 0.0:
        return np.full(len(weights), np.nan)
    x = advantage / scale
    found = np.zeros(len(weights))
    for _ in range(STEPS):
        loses = expit(-np.outer(found, x))
        gradient = (weights * loses) @ x
        curvature = (weights * loses * (1 - loses)) @ (x * x)
        step = np.divide(gradient, curvature, out=np.zeros_like(gradient), where=curvature > 1e-300)
        found = np.clip(found + np.clip(step, -2.0, 2.0), -STEEPEST, STEEPEST)
        if np.all(np.abs(step) < 1e-9):
            break
    moved = weights @ (x != 0) > 0
    return np.where(moved, found / scale, np.nan)


def fit_logistic(features: Array, labels: Array, clusters: Clusters, ridge: float = 1e-2) -> Fit:
    """Coefficients of P(label) = sigmoid(features @ b) with cluster-robust errors (sandwich estimator).

    `features` is [n, K] (bring a column of ones for an intercept), `labels` [n] in [0, 1]. The small `ridge` on
    standardised columns holds coefficients of separated columns finite.
    """
    scale = np.sqrt(np.mean(np.square(features, dtype=np.float64), axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    scaled = features / scale
    found = np.zeros(features.shape[1])
    for _ in range(STEPS):
        chance = expit(scaled @ found)
        gradient = scaled.T @ (labels - chance) - ridge * found
        bread = (scaled * (chance * (1 - chance))[:, None]).T @ scaled + ridge * np.eye(len(found))
        step = np.linalg.solve(bread, gradient)
        found += step * min(1.0, 5.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-9:
            break
    chance = expit(scaled @ found)
    scores = sums(clusters, scaled * (labels - chance)[:, None])
    inverse = np.linalg.inv(bread)
    correction = clusters.count / max(1, clusters.count - 1)
    covariance = inverse @ (scores.T @ scores) @ inverse * correction
    return Fit(found / scale, np.sqrt(np.maximum(np.diag(covariance), 0)) / scale)
