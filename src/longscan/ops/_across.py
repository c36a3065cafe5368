"""What an op asks when its tokens are a shard of a sequence that other processes hold the rest of.

Three questions are all that ever crosses the edge of a shard:

    entering(segment, state)    the state that enters its tokens, from the maps of the shards before
    window(tokens, n, state)    the n tokens before them (convolutions, token shifts)
    gathered attention          the keys and values before them (`ops.attention`)

Outside `within` nothing is asked and ops work on whole sequences. `longscan.parallel` answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from longscan.algebra import Affine, SegmentMap

Segment = Callable[[slice], SegmentMap]
"""The map of a stretch of the local tokens (a slice of the time axis)."""


class Across(Protocol):
    """What `longscan.parallel.Shards` is to the ops."""

    def begin(self, segment: Segment, state: Affine | None) -> Entering: ...

    def swap(self, of: SegmentMap, back: bool = False) -> Affine | None:
        """Exchange a map [N, K, V] without autograd: what enters, or from the right if `back`."""
        ...

    def window(self, tokens: Tensor, n: int, state: Tensor | None) -> Tensor | None: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any: ...

    @property
    def notes(self) -> dict[tuple, Any]:
        """What an op derived from these shards, kept for the next layer."""
        ...

    @property
    def local(self) -> list[int]:
        """Boundaries of the local sequences, of a batch [0, T]."""
        ...

    @property
    def continues(self) -> bool:
        """Whether the first local sequence began on a rank before."""
        ...

    @property
    def onward(self) -> bool:
        """Whether the last local sequence goes on on the next rank."""
        ...

    @property
    def passes(self) -> bool:
        """Whether one sequence comes from the left and goes on to the right."""
        ...

    @property
    def packed(self) -> bool:
        """Whether local sequences are packed on one row."""
        ...

    @property
    def first(self) -> slice:
        """Where the tokens of the first local sequence lie."""
        ...

    @property
    def last(self) -> slice:
        """Where the tokens of the last local sequence lie."""
        ...


class Entering(Protocol):
    """An exchange under way."""

    def wait(self) -> Affine:
        """What the first local sequence starts from [rows of a batch, or 1, ...]."""
        ...

    def place(self, entering: Affine) -> Affine:
        """The states of all local sequences, the first being what `wait` gave."""
        ...

    def others(self) -> Affine | None:
        """The states of all local sequences, the first being zero."""
        ...


class _Here(threading.local):
    active: Across | None = None


_here = _Here()


def active() -> Across | None:
    """The shards that the tokens of ops called now are part of, None for whole sequences."""
    return _here.active


@contextmanager
def within(shards: Across | None) -> Iterator[None]:
    """Ops called inside work on shards (None: on whole sequences)."""
    before, _here.active = _here.active, shards
    try:
        yield
    finally:
        _here.active = before


def entering(segment: Segment, state: Any) -> Any:
    """The states that an op starts from: those given, the first row by what enters the shard.

    segment: makes the op's map of a stretch of the local tokens; state: [rows, ...] as the map
    takes it, or None for zeros.
    """
    shards = _here.active
    if shards is None:
        return state
    exchange = shards.begin(segment, state)
    return exchange.place(exchange.wait())


def window(tokens: Callable[[slice], Tensor], n: int, state: Tensor | None) -> Tensor | None:
    """The n tokens before each local sequence: those given, the first row by the shards before.

    tokens: makes what the window holds of a stretch of local tokens [B, t, D]; state [rows, n, D].
    """
    shards = _here.active
    if shards is None or n == 0:
        return state
    last = shards.last
    return shards.window(tokens(slice(max(last.start, last.stop - n), last.stop)), n, state)


def first_order_only() -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gradients that cross ranks have no second derivatives (create_graph=True): "
            "differentiate twice on one device"
        )
