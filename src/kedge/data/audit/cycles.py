"""Cycles: A over B over C over A, which no score can satisfy.

Edges are pairs of one prompt with a winner that nobody contradicts. Triangles are three edges among three responses.
Hodge's decomposition (Jiang, Lim, Yao, Ye 2011) splits the edge flow into a part that scores explain, a part that runs
around triangles (curl) and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import lsqr

from kedge.data.audit.duplicates import agreed_sides, pair_units
from kedge.data.audit.tables import Array, mixed

WEDGES = 1_000_000  # pairs of edges at one response that are looked at; prompts beyond are left out
FLIPS = 200  # random orientations for the share of cycles
CURL_FLIPS = 19


@dataclass(frozen=True)
class Cycles:
    """`cyclic` of `triangles`; `chance` and `chance_ci` are the share if every winner were a coin toss.

    `p` is the share of coin-toss graphs with at most as many cycles: small means there is an order. `curl` is the
    share of the squared flow that runs around triangles, `curl_chance` its mean over coin tosses.
    `prompts` is how many were looked at, `left_out` how many were too large.
    """

    triangles: int
    cyclic: int
    chance: float
    chance_ci: tuple[float, float]
    p: float
    curl: float
    curl_chance: float
    prompts: int
    left_out: int

    @property
    def share(self) -> float:
        return self.cyclic / self.triangles


@dataclass(frozen=True)
class _Graph:
    """Edges from the lower to the higher node number, `flow` 1 where the lower won, and triangles of edge numbers."""

    tails: Array
    heads: Array
    flow: Array
    triangles: Array  # [T, 3]: lower-middle, middle-higher, lower-higher


def find_cycles(pairs: Array) -> Cycles | None:
    """None where there is no triangle."""
    graph, prompts, left_out = _graph(pairs)
    if graph is None or len(graph.triangles) == 0:
        return None
    rng = np.random.default_rng(0)
    tosses = rng.choice(np.array([-1, 1], np.int8), size=(FLIPS, len(graph.flow)))
    by_chance = np.array([_cyclic(graph, toss) for toss in tosses])
    cyclic, triangles = _cyclic(graph, graph.flow), len(graph.triangles)
    low, high = np.quantile(by_chance, [0.025, 0.975]) / triangles
    circulation = _circulation(graph)
    return Cycles(
        triangles=triangles,
        cyclic=cyclic,
        chance=float(by_chance.mean() / triangles),
        chance_ci=(float(low), float(high)),
        p=float((1 + np.sum(by_chance <= cyclic)) / (1 + FLIPS)),
        curl=_curl(circulation, graph.flow),
        curl_chance=float(np.mean([_curl(circulation, toss) for toss in tosses[:CURL_FLIPS]])),
        prompts=prompts,
        left_out=left_out,
    )


def _graph(pairs: Array) -> tuple[_Graph | None, int, int]:
    """The graph of the prompts that are looked at, their number, and how many were left out for their size."""
    pairs = pairs[pairs["chosen"] != pairs["rejected"]]
    units = pair_units(pairs)
    first = np.zeros(units.count, np.int64)
    first[units.code[::-1]] = np.arange(len(pairs))[::-1]
    side = agreed_sides(units)
    rows, side = first[side != 0], side[side != 0]
    pairs = pairs[rows]
    low, high = np.minimum(pairs["chosen"], pairs["rejected"]), np.maximum(pairs["chosen"], pairs["rejected"])
    nodes = np.unique(np.concatenate([mixed(pairs["prompt"], low), mixed(pairs["prompt"], high)]), return_inverse=True)[
        1
    ]
    one, other = nodes[: len(pairs)], nodes[len(pairs) :]
    tails, heads = np.minimum(one, other), np.maximum(one, other)
    flow = np.where(one < other, side, -side).astype(np.int8)
    prompt = np.unique(pairs["prompt"], return_inverse=True)[1]
    keep, prompts, left_out = _within_limits(prompt, tails)
    tails, heads, flow = tails[keep], heads[keep], flow[keep]
    order = np.lexsort((heads, tails))
    tails, heads, flow = tails[order], heads[order], flow[order]
    return (_Graph(tails, heads, flow, _triangles(tails, heads)) if len(flow) else None), prompts, left_out


def _within_limits(prompt: Array, tails: Array) -> tuple[Array, int, int]:
    """Which edges to look at: those of prompts with three edges or more, as many prompts as `WEDGES` allows."""
    if len(prompt) == 0:
        return np.zeros(0, bool), 0, 0
    count = int(prompt.max()) + 1
    out = np.bincount(tails)
    wedges = np.bincount(prompt, (out[tails] - 1) / 2, count)  # each node's edges share its wedges
    usable = np.bincount(prompt, minlength=count) >= 3
    size = np.where(usable, wedges, 0)
    order = np.argsort(size, kind="stable")
    taken = np.zeros(count, bool)
    taken[order] = np.cumsum(size[order]) <= WEDGES
    return (taken & usable)[prompt], int((taken & usable).sum()), int((usable & ~taken).sum())


def _triangles(tails: Array, heads: Array) -> Array:
    """Edge numbers of every triangle, from pairs of edges with the same tail whose heads are joined."""
    starts = np.searchsorted(tails, tails, side="left")
    before = np.arange(len(tails)) - starts  # edges of the same tail in front of each
    later = np.repeat(np.arange(len(tails)), before)
    earlier = np.arange(len(later)) - np.repeat(np.cumsum(before) - before, before) + np.repeat(starts, before)
    size = int(heads.max()) + 1
    keys = tails.astype(np.int64) * size + heads
    wanted = heads[earlier].astype(np.int64) * size + heads[later]
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[found] == wanted
    return np.column_stack([earlier[there], found[there], later[there]])


def _cyclic(graph: _Graph, flow: Array) -> int:
    one, two, across = (flow[graph.triangles[:, side]] for side in range(3))
    return int(np.sum((one == two) & (one != across)))


def _circulation(graph: _Graph) -> sparse.csr_array:
    """The curl operator [triangles, edges]: the flow once around each triangle."""
    rows = np.repeat(np.arange(len(graph.triangles)), 3)
    signs = np.tile(np.array([1.0, 1.0, -1.0]), len(graph.triangles))
    shape = (len(graph.triangles), len(graph.flow))
    return sparse.csr_array((signs, (rows, graph.triangles.ravel())), shape=shape)


def _curl(circulation: sparse.csr_array, flow: Array) -> float:
    """Share of the squared flow in the span of the triangles' boundaries."""
    boundary = circulation.T
    potential = lsqr(boundary, flow.astype(np.float64), atol=1e-5, btol=1e-5, iter_lim=200)[0]
    around = boundary @ potential
    return float(around @ around / len(flow))
