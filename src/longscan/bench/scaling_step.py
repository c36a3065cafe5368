"""A training step of a model whose sequence is shared by up to thousands of ranks, event by event.

A rank has one stream for its own layers and one for the exchange. Nothing but messages holds ranks
together: where states flow one way, a rank that starts a layer late finds its state already there
in the next one, and the latency of a chain is paid once a direction, not once a layer.
`together=True` makes all ranks wait for the slowest at each layer, as the parameter gathers of FSDP
do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from longscan.bench.scaling_exchange import (
    EXCHANGES,
    Calibration,
    Compute,
    Wires,
    direct,
    exchange,
    ring,
    wires,
)  # fmt: skip
from longscan.parallel.cost import Element, Tokens

TRANSITIONS = ("none", "head", "key", "matrix")


@dataclass(frozen=True)
class Model:
    """L equal blocks. weights: those that a token meets; transition: numbers of A per head, none,
    1, d_key or d_key^2. States travel in float32, keys and values of softmax layers in bfloat16.
    """

    name: str
    weights: float
    layers: int
    d_model: int
    heads: int
    d_key: int
    d_value: int
    transition: str
    source: str

    @property
    def element(self) -> Element:
        if self.transition not in TRANSITIONS:
            raise ValueError(f"transition is one of {TRANSITIONS}, not {self.transition!r}")
        a = (0, 1, self.d_key, self.d_key**2)[TRANSITIONS.index(self.transition)]
        return Element(4 * self.heads * self.d_key * self.d_value, 4 * self.heads * a)


LINEAR = ("data", *EXCHANGES, "lasp", "lasp_early")
"""Of linear layers. lasp: all of a layer's mixing in series, rank after rank; lasp_early: without
what needs no state; data: ranks with a sequence of their own."""
SOFTMAX = ("softmax_data", "ring_attention", "ulysses", "lasp2h")


@dataclass(frozen=True)
class Step:
    """seconds: until the last rank is done; alone: of the same work without any exchange."""

    seconds: float
    alone: float

    @property
    def relative(self) -> float:
        """Tokens a second beside those of the same work without exchange."""
        return self.alone / self.seconds


def step(
    model: Model,
    c: Calibration,
    method: str,
    ranks: int,
    tokens: float,
    *,
    together: bool = False,
    n: int | None = None,
) -> Step:
    """One step, forward and backward, on one sequence of `tokens` over all ranks.

    The all-reduce of gradients, equal for all methods, is left out. Softmax layers are balanced
    (zigzag), as long as the linear ones but for the scores.

    Raises: ValueError for an unknown method, no ranks or tokens, or a calibration that does not
    say how fast devices compute.
    """
    if method not in (*LINEAR, *SOFTMAX):
        raise ValueError(f"unknown method {method!r}; known: {', '.join((*LINEAR, *SOFTMAX))}")
    if ranks < 1 or tokens <= 0:
        raise ValueError(f"a step needs ranks and tokens, not {ranks} and {tokens}")
    if c.compute is None:
        raise ValueError(f"calibration {c.name!r} knows links only; steps need its `compute`")
    layer = 6 * model.weights / model.layers * tokens / ranks / c.compute.flops
    scores = 14 * model.d_model * tokens**2 / 2 / ranks / c.compute.scores
    if method == "softmax_data":
        scores /= ranks
    run = _softmax if method in SOFTMAX else _linear
    now, alone = np.zeros(ranks), 0.0
    for backward in (False, True):
        on, now = wires(c, ranks, backward), now[::-1].copy()
        work = layer * (2 if backward else 1) / 3
        core = scores * (10 if backward else 4) / 14 if method in SOFTMAX else 0.0
        alone += model.layers * _alone(work, core, c.compute)
        for _ in range(model.layers):
            if together:
                now = np.full(ranks, now.max())
            now = run(method, now, work, core, model, tokens, on, backward, n)
    return Step(float(now.max()), alone)


def _alone(work: float, core: float, compute: Compute) -> float:
    """A layer's time; softmax layers have scores for the three parts of linear ones."""
    return work * (1 - sum(compute.parts)) + core if core else work


def _linear(
    method: str, now: ndarray, work: float, core: float, model: Model, tokens: float, on: Wires,
    backward: bool, n: int | None,
) -> ndarray:  # fmt: skip
    assert on.c.compute is not None
    first, intra, fix = (p * work for p in on.c.compute.parts)
    rest = work - first - intra - fix
    if method == "data":
        return now + work
    if method in ("lasp", "lasp_early"):
        early = intra if method == "lasp_early" else 0.0
        return _in_series(now + early, first + intra + fix - early, model.element, on) + rest
    ready = now + first
    entered = exchange(method, ready, model.element, on, n=n, combine=on.c.combine)
    return np.maximum(ready + intra, entered) + fix + rest


def _in_series(now: ndarray, work: float, e: Element, on: Wires) -> ndarray:
    """Each rank waits for the state, works, and sends its own."""
    latency, per_byte = on.reach(1)
    out, at = now.copy(), -math.inf
    for r in range(len(now)):
        out[r] = max(now[r], at) + work
        if r + 1 < len(now):
            at = max(out[r], on.busy[r + 1]) + latency[r + 1] + e.state * per_byte[r + 1]
            on.busy[r + 1] = at
    return out


def _softmax(
    method: str, now: ndarray, work: float, core: float, model: Model, tokens: float, on: Wires,
    backward: bool, n: int | None,
) -> ndarray:  # fmt: skip
    assert on.c.compute is not None
    ranks, rest = len(now), work * (1 - sum(on.c.compute.parts))
    payload = Tokens(tokens, model.d_model)
    shard = payload.kv / ranks
    if method == "lasp2h":
        now = ring(now, shard, on) + core
        return (ring(now, shard, on) if backward else now) + rest
    if method == "ulysses":
        each = payload.nbytes(model.d_model) / ranks**2
        return direct(direct(now, 3 * each, on) + core, each, on) + rest
    if method == "ring_attention":
        now = _ring_attention(now, core / ranks, shard * (2 if backward else 1), on, backward)
        return now + rest
    return now + core + rest


def _ring_attention(now: ndarray, core: float, nbytes: float, on: Wires, backward: bool) -> ndarray:
    """P rounds of scores, each with the keys and values of another rank, which travel meanwhile;
    in the backward their gradients travel with them, once the round is computed."""
    latency, per_byte = on.reach(1)
    have, sent = now, now
    for k in range(len(now)):
        now = np.maximum(now, have) + core
        if k + 1 < len(now):
            start = np.maximum(now if backward else have, sent)
            have = np.roll(start, 1) + latency + nbytes * per_byte
            sent = np.roll(have, -1)
    return np.maximum(now, sent)
