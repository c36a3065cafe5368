"""Where a model runs, and when each message of an exchange between its ranks begins and ends.

A rank's programme is fixed (map, send, fold, next layer), so which event waits for which is known,
and times follow in programme order: an event begins when what it needs is there and what it
occupies is free. Times of one round of messages are one vector over ranks; `queue` is a link or a
processor that serves blocks one after the other. Links are full-duplex, and what arrives early is
kept in buffers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from longscan.parallel.cost import Element, Link, blocks


@dataclass(frozen=True)
class Compute:
    """How fast a device works in a training step.

    flops: operations a second, 6 weights tokens / seconds of a step of a linear model; scores: of
    softmax attention, 14 d_model per query and key; parts: of a layer's time, the segment map, what
    does not need the entering state, and what does (the rest of the layer follows).
    """

    flops: float
    scores: float
    parts: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.scores > 0):
            raise ValueError("a device has flops and scores above 0")
        if len(self.parts) != 3 or min(self.parts) < 0 or sum(self.parts) > 1:
            raise ValueError("compute.parts are three shares of a layer's time")


@dataclass(frozen=True)
class Calibration:
    """Where a model runs. source: what was measured, and what is assumed.

    inner, outer: links inside and between hosts of per_host ranks, of single messages; gather: of
    a hop of an all-gather, which may use several network cards of a host at once (None: as single
    messages); combine: seconds to fold one byte of a state into another.
    """

    name: str
    source: str
    inner: Link
    outer: Link
    per_host: int = 8
    gather: Link | None = None
    combine: float = 0.0
    compute: Compute | None = None

    def __post_init__(self) -> None:
        if self.per_host < 1 or self.combine < 0:
            raise ValueError(
                "a host has at least one rank and folds in no less than 0 seconds, not "
                f"{self.per_host} and {self.combine}"
            )


def save(c: Calibration) -> str:
    """As JSON, for `load`."""
    return json.dumps(asdict(c), indent=2) + "\n"


def load(path: Path) -> Calibration:
    """The calibration in a JSON file, as `save` writes it.

    Raises: ValueError, saying what is missing or unknown.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        inner, outer = Link(**raw.pop("inner")), Link(**raw.pop("outer"))
        gather, compute = raw.pop("gather", None), raw.pop("compute", None)
        gather = None if gather is None else Link(**gather)
        if compute is not None:
            compute = Compute(**{**compute, "parts": tuple(compute["parts"])})
        return Calibration(**raw, inner=inner, outer=outer, gather=gather, compute=compute)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a calibration ({error}); it is JSON with name, source, inner and outer "
            "(latency in s, bandwidth in bytes/s), and optionally per_host, gather, combine "
            "and compute (flops, scores, parts)"
        ) from error


# --- exchanges: from when each rank is ready to when it has what it needs -------------------------


def queue(there: ndarray, service: float, free: float = -math.inf) -> ndarray:
    """When each of some blocks is done by a server that takes them in order.

    there: when each is there; service: seconds of each; free: when the server is.
    """
    i = np.arange(len(there))
    return np.maximum.accumulate(np.maximum(there, free) - i * service) + (i + 1) * service


@dataclass
class Wires:
    """The links between ranks in the order that states pass them; busy: until when each link from
    a rank's left neighbour is."""

    c: Calibration
    host: ndarray
    busy: ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.busy = np.full(len(self.host), -math.inf)

    def reach(self, far: int, gather: bool = False) -> tuple[ndarray, ndarray]:
        """Of the message to each rank from the one `far` before it: latency, seconds per byte."""
        near = self.host == np.roll(self.host, far)
        inner, outer = self.c.inner, self.c.outer
        if gather and self.c.gather is not None:
            inner = outer = self.c.gather
        latency = np.where(near, inner.latency, outer.latency)
        return latency, np.where(near, 1 / inner.bandwidth, 1 / outer.bandwidth)


def wires(c: Calibration, ranks: int, backward: bool = False) -> Wires:
    """Of all ranks; for the backward in the opposite order."""
    host = np.arange(ranks) // c.per_host
    return Wires(c, host[::-1].copy() if backward else host)


def ring(ready: ndarray, nbytes: float, on: Wires, launches: bool = False) -> ndarray:
    """All-gather: P - 1 times each rank hands its neighbour what it got last. launches: whether
    each of these messages has a latency, or only the first (hops inside one kernel)."""
    latency, per_byte = on.reach(1, gather=True)
    have, sent = ready, ready
    for k in range(len(ready) - 1):
        start = np.roll(np.maximum(have, sent), 1)
        arrived = start + nbytes * per_byte + (latency if launches or k == 0 else 0.0)
        sent = np.roll(arrived, -1)
        have = np.maximum(arrived, ready)
    return np.maximum(have, sent)


def direct(ready: ndarray, nbytes: float, on: Wires) -> ndarray:
    """All-gather or all-to-all: in round k each rank sends nbytes to the one k behind it."""
    sent, got = ready, np.full(len(ready), -math.inf)
    for k in range(1, len(ready)):
        latency, per_byte = on.reach(k)
        start = np.maximum(np.roll(sent, k), got)
        got = start + nbytes * per_byte + (latency if k == 1 else 0.0)
        sent = np.roll(got, -k)
    return np.maximum(np.maximum(got, sent), ready)


def chain(
    ready: ndarray, nbytes: float, on: Wires, n: int, combine: float = 0.0
) -> tuple[ndarray, float]:
    """All-scan: each rank folds block i while its neighbour folds block i - 1.

    combine: seconds to fold one byte. Returns: when all blocks have entered each rank, and when
    the last has left the last rank.
    """
    latency, per_byte = on.reach(1)
    cost = latency + nbytes / n * per_byte
    done, entered = ready.copy(), np.full(n, -math.inf)
    for r in range(len(ready)):
        left = queue(np.maximum(entered, ready[r]), combine * nbytes / n)
        if r + 1 < len(ready):
            entered = queue(left, cost[r + 1], on.busy[r + 1])
            on.busy[r + 1] = entered[-1]
            done[r + 1] = max(entered[-1], ready[r + 1])
    return done, float(left[-1])


def doubling(ready: ndarray, nbytes: float, on: Wires, combine: float = 0.0) -> ndarray:
    """Composed maps go 1, 2, 4, ... ranks far."""
    have, done, far, rank = ready, ready, 1, np.arange(len(ready))
    while far < len(ready):
        latency, per_byte = on.reach(far)
        got = np.roll(have, far) + latency + nbytes * per_byte
        takes, gives = rank >= far, rank < len(ready) - far
        done = np.where(takes, np.maximum(got, have) + combine * nbytes, done)
        have = np.maximum(np.where(takes, done, have), np.where(gives, np.roll(got, -far), have))
        far *= 2
    return done


def hierarchical(
    ready: ndarray, e: Element, on: Wires, n: int | None = None, combine: float = 0.0
) -> ndarray:
    """An all-gather inside each host, a chain of the hosts' last ranks, which then send what came
    to each of their host."""
    edges = np.flatnonzero(np.diff(on.host)) + 1
    hosts = np.split(np.arange(len(ready)), edges)
    done = ready.copy()
    for h in hosts:
        done[h] = direct(ready[h], e.pair, Wires(on.c, on.host[h]))
    if len(hosts) == 1:
        return done
    between = Wires(on.c, np.arange(len(hosts)))
    last = np.array([done[h[-1]] + combine * e.state * len(h) for h in hosts])
    n = n or blocks(len(hosts), e.state, on.c.outer)
    entered, _ = chain(last, e.state, between, n, combine)
    for h, at in list(zip(hosts, entered, strict=True))[1:]:
        sends = np.arange(1, len(h)) * e.state / on.c.inner.bandwidth + on.c.inner.latency
        done[h] = np.maximum(done[h], np.append(at + sends, at))
    return done


EXCHANGES = ("allgather", "ring", "direct", "allscan", "relay", "doubling", "hierarchical")
"""Of states. ring, direct: other ways to gather; relay: all-scan in one block."""


def exchange(
    method: str,
    ready: ndarray,
    e: Element,
    on: Wires,
    *,
    n: int | None = None,
    combine: float = 0.0,
) -> ndarray:
    """When the state that enters each rank is there. ready: when each rank's map is.

    combine: seconds to fold one byte; n: blocks of a chain, None: the best by the closed formula.
    """
    if method in ("allgather", "ring"):
        folded = np.arange(len(ready)) * combine * e.state
        return ring(ready, e.pair, on, launches=method == "ring") + folded
    if method == "direct":
        return direct(ready, e.pair, on) + np.arange(len(ready)) * combine * e.state
    if method == "doubling":
        return doubling(ready, e.pair, on, combine)
    if method == "hierarchical":
        return hierarchical(ready, e, on, n, combine)
    if method == "allscan":
        slow = on.c.outer if len(ready) > on.c.per_host else on.c.inner
        n = n or blocks(len(ready), e.state, slow)
        return chain(ready, e.state, on, n, combine)[0]
    if method == "relay":
        return chain(ready, e.state, on, 1, combine)[0]
    raise ValueError(f"unknown method {method!r}; known: {', '.join(EXCHANGES)}")
