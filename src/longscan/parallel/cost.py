"""What an exchange between the shards of a sequence costs: bytes and seconds, by formula.

P ranks hold one shard each; all figures are for one layer and one direction. Of the states of
linear layers (payload: `Element`), by the formulas of ZeCO (arXiv 2507.01004, 2.3) and LASP-2
(arXiv 2502.07563):

    method         seconds                                   bytes that a rank receives
    allgather      a + (P - 1) b'                            (P - 1) B'            LASP-2
    ring           (P - 1) (a + b')                          (P - 1) B'            LASP-2 by hops
    allscan        (P - 2 + n) (a + b / n)                   B                     ZeCO
    doubling       log2 P (a + b')                           log2 P B'             Hillis, Steele
    hierarchical   allgather of a host, allscan of G hosts,  (H - 1) B' + B
                   a + (H - 1) b within each host
    lasp           (P - 1) (a + b)                           B                     LASP

and of the tokens of softmax layers (payload: `Tokens`), whose bytes grow with their number N:

    ring_attention (P - 1) a + bytes / bandwidth             2 (P - 1) N / P D_kv
    ulysses        2 a + bytes / bandwidth                   2 N (D + D_kv) (P - 1) / P^2
    lasp2h         a + bytes / bandwidth                     as ring_attention

a: latency; B, B': bytes of the state, and of the state with the transition; b, b': their seconds
on the link; n blocks; hosts of H ranks; D, D_kv: bytes of a query, and of a key or value, of all
heads. The backward moves as much, but 2 times that with ring attention (dK and dV travel with K and
V) and LASP-2H (K and V once more, then dK and dV: one launch more).

Assumed: links in both directions at once and as fast in all places; nobody else on them; all ranks
start together; combining states costs nothing. `longscan.bench.scaling` drops these assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STATES = ("allgather", "ring", "allscan", "doubling", "hierarchical", "lasp")
TOKENS = ("ring_attention", "ulysses", "lasp2h")
CHOICE = ("allgather", "allscan", "doubling", "hierarchical")
"""What `choose` chooses from, the simplest first."""


@dataclass(frozen=True)
class Link:
    """From one rank to another. latency: seconds that a message takes, or a launch of many, before
    its first byte; bandwidth: bytes per second behind it."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and self.bandwidth > 0):
            raise ValueError(
                "a link has a latency of 0 seconds or more and a bandwidth above 0 bytes per "
                f"second, not {self.latency} and {self.bandwidth}"
            )

    def seconds(self, nbytes: float) -> float:
        """Of one message."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Element:
    """Bytes of a segment map's U and of its A, of one layer and rank. A chain sends U alone."""

    state: float
    transition: float = 0.0

    def __post_init__(self) -> None:
        if self.state <= 0 or self.transition < 0:
            raise ValueError(f"a state has bytes and a transition not fewer than 0, not {self}")

    @property
    def pair(self) -> float:
        return self.state + self.transition


@dataclass(frozen=True)
class Tokens:
    """What a softmax layer works on: `tokens` of the whole sequence, over all ranks.

    width, kv_width: of q and of k or v (None: the same), over all heads; itemsize: bytes of a
    number.
    """

    tokens: float
    width: int
    kv_width: int | None = None
    batch: int = 1
    itemsize: int = 2

    def nbytes(self, width: float) -> float:
        """Of all tokens with `width` numbers each."""
        return self.batch * self.tokens * width * self.itemsize

    @property
    def kv(self) -> float:
        return self.nbytes(2 * (self.width if self.kv_width is None else self.kv_width))


Payload = Element | Tokens


def blocks(ranks: int, state_bytes: float, link: Link) -> int:
    """The number of blocks of a chain with the least time: near sqrt((P - 2) b / a), at least 1,
    and a number of four bytes in each."""
    most = max(1, int(state_bytes // 4))
    b = state_bytes / link.bandwidth
    if ranks <= 2 or b == 0:
        return 1
    best = math.sqrt((ranks - 2) * b / link.latency) if link.latency else math.inf
    low = max(1, math.floor(min(best, most)))
    return min(low, min(low + 1, most), key=lambda n: _chain(ranks, state_bytes, link, n))


def _chain(ranks: int, nbytes: float, link: Link, n: int | None) -> float:
    n = n or blocks(ranks, nbytes, link)
    return (ranks - 2 + n) * link.seconds(nbytes / n)


def seconds(
    method: str,
    ranks: int,
    payload: Payload,
    link: Link,
    *,
    blocks: int | None = None,
    per_host: int | None = None,
    outer: Link | None = None,
    backward: bool = False,
) -> float:
    """Seconds until the last rank has what it needs; see the head of this file.

    link: between ranks of a host; outer: between hosts of per_host ranks: where there are several
    it decides for all methods but `hierarchical`. blocks: of a chain; None: the best number.

    Raises: ValueError for an unknown method, a payload of the other kind, no ranks, no blocks, or
    one of per_host and outer without the other.
    """
    _check(method, ranks, payload)
    if (per_host is None) != (outer is None):
        raise ValueError("per_host (ranks of a host) and outer (link between hosts) go together")
    if any(x is not None and x < 1 for x in (per_host, blocks)):
        raise ValueError(f"at least one rank a host and one block, not {per_host} and {blocks}")
    if ranks == 1:
        return 0.0
    size = min(ranks, per_host or ranks)
    slow = outer if outer is not None and size < ranks else link
    if isinstance(payload, Tokens):
        times = _times(method, backward)
        starts = {"ring_attention": ranks - 1, "ulysses": 2, "lasp2h": times}[method]
        moved = received(method, ranks, payload, backward=backward)
        return starts * slow.latency + moved / slow.bandwidth
    if method == "hierarchical":
        inside = link.seconds((size - 1) * payload.pair) if size > 1 else 0.0
        if size == ranks:
            return inside
        spread = link.seconds((size - 1) * payload.state) if size > 1 else 0.0
        hosts = math.ceil(ranks / size)
        return inside + _chain(hosts, payload.state, slow, blocks) + spread
    if method == "allscan":
        return _chain(ranks, payload.state, slow, blocks)
    if method == "allgather":
        return slow.seconds((ranks - 1) * payload.pair)
    if method == "doubling":
        return math.ceil(math.log2(ranks)) * slow.seconds(payload.pair)
    return (ranks - 1) * slow.seconds(payload.state if method == "lasp" else payload.pair)


def received(
    method: str,
    ranks: int,
    payload: Payload,
    *,
    per_host: int | None = None,
    backward: bool = False,
) -> float:
    """Bytes that the rank which receives most receives; see the head of this file.

    Raises: ValueError as `seconds`.
    """
    _check(method, ranks, payload)
    if ranks == 1:
        return 0.0
    if isinstance(payload, Tokens):
        each = payload.kv / ranks
        if method == "ulysses":
            each = (payload.kv + payload.nbytes(2 * payload.width)) / ranks**2
        return _times(method, backward) * (ranks - 1) * each
    if method in ("allgather", "ring"):
        return (ranks - 1) * payload.pair
    if method == "doubling":
        return math.ceil(math.log2(ranks)) * payload.pair
    if method == "hierarchical":
        size = min(ranks, per_host or ranks)
        return (size - 1) * payload.pair + (payload.state if size < ranks else 0.0)
    return payload.state


def _times(method: str, backward: bool) -> int:
    return 2 if backward and method != "ulysses" else 1


def choose(
    ranks: int,
    element: Element,
    link: Link,
    *,
    per_host: int | None = None,
    outer: Link | None = None,
) -> str:
    """The method of least time, the simplest of several; links as in `seconds`."""

    def told(method: str) -> float:
        # Between hosts our `hierarchical` hands on whole states.
        n = 1 if method == "hierarchical" else None
        return seconds(method, ranks, element, link, blocks=n, per_host=per_host, outer=outer)

    return min(CHOICE, key=told)


def fit(samples: Sequence[tuple[float, float]]) -> Link:
    """The link behind measured (bytes, seconds) of single messages: least squares of relative
    errors, so that small messages tell the latency and large ones the bandwidth.

    Raises: ValueError if the samples do not tell both.
    """
    weighted = [(1 / t, x / t) for x, t in samples if t > 0]
    if len({x for x, _ in samples}) < 2 or len(weighted) < len(samples):
        raise ValueError("a link is measured by messages of several sizes that take time")
    aa, ab, bb = (sum(w[i] * w[j] for w in weighted) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(w[i] for w in weighted) for i in (0, 1))
    det = aa * bb - ab * ab
    latency, slope = (a * bb - b * ab) / det, (b * aa - a * ab) / det
    if latency <= 0 or slope <= 0:
        raise ValueError(
            f"the times fit a latency of {latency:.3g} s and {slope:.3g} s per byte: too noisy, or "
            "the sizes too close together; measure more messages, from 1 KiB to some MiB"
        )
    return Link(latency, 1 / slope)


def _check(method: str, ranks: int, payload: Payload) -> None:
    if method not in (*STATES, *TOKENS):
        raise ValueError(f"unknown method {method!r}; known: {', '.join((*STATES, *TOKENS))}")
    kind = Tokens if method in TOKENS else Element
    if not isinstance(payload, kind):
        raise ValueError(f"{method} moves {kind.__name__}, not {type(payload).__name__}")
    if ranks < 1:
        raise ValueError(f"there is at least one rank, not {ranks}")
