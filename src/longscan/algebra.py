"""Segment maps: a stretch of tokens as an affine map on the state, and what can be done with them.

    S_out = A . S_in + U,      (A2, U2) o (A1, U1) = (A2 A1, A2 U1 + U2)

The same maps serve chunks of a sequence on one device, segments of a long sequence, and shards of
a sequence across devices. Only the form of A differs between families:

    identity   A = 1                          linear attention
    diagonal   A = diag(exp(log_a))           decays; [..., 1] one number per head, [..., K] per key
    matrix     A = M, K x K                   the delta rule and its products

Diagonal maps keep the logarithm, so composing them adds and never multiplies small numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentMap:
    """One affine map, or a batch of them.

    Shapes: u [..., K, V]; a is None (identity), log decays [..., K] or [..., 1] (diagonal),
    or [..., K, K] (matrix); the leading axes of a and u agree or broadcast.
    """

    kind: str
    a: Tensor | None
    u: Tensor

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "diagonal", "matrix"):
            raise ValueError(f"kind must be identity, diagonal or matrix, not {self.kind!r}")
        if (self.a is None) != (self.kind == "identity"):
            raise ValueError("an identity map has a=None, every other kind a tensor")

    def __getitem__(self, index) -> SegmentMap:
        """Index the leading axes."""
        return SegmentMap(self.kind, None if self.a is None else self.a[index], self.u[index])

    def transition(self, x: Tensor) -> Tensor:
        """A . x, without U. x [..., K, V]."""
        if self.a is None:
            return x
        if self.kind == "diagonal":
            return self.a.exp().unsqueeze(-1) * x
        return self.a @ x

    def __call__(self, state: Tensor) -> Tensor:
        """The state that leaves the segment when `state` enters it."""
        return self.transition(state) + self.u


def compose(second: SegmentMap, first: SegmentMap) -> SegmentMap:
    """The map of `first` followed by `second`. Associative, not commutative."""
    if second.kind != first.kind:
        raise ValueError(f"cannot compose a {first.kind} map with a {second.kind} map")
    u = second(first.u)
    if second.a is None or first.a is None:
        return SegmentMap("identity", None, u)
    a = second.a + first.a if second.kind == "diagonal" else second.a @ first.a
    return SegmentMap(second.kind, a, u)


def identity(like: SegmentMap) -> SegmentMap:
    """The neutral element of `compose` for maps of this form."""
    u = torch.zeros_like(like.u)
    if like.a is None:
        return SegmentMap("identity", None, u)
    if like.kind == "diagonal":
        return SegmentMap("diagonal", torch.zeros_like(like.a), u)
    eye = torch.eye(like.a.shape[-1], dtype=like.a.dtype, device=like.a.device)
    return SegmentMap("matrix", eye.expand_as(like.a), u)


def adjoint(of: SegmentMap, u: Tensor) -> SegmentMap:
    """The map that carries gradients right to left: dS_in = A^T dS_out + u.

    `u` is the gradient the segment itself sends to the state that enters it (what its reads
    would give with dS_out = 0). Adjoints compose in the reverse order.
    """
    if of.kind == "matrix":
        assert of.a is not None
        return SegmentMap("matrix", of.a.mT, u)
    return SegmentMap(of.kind, None if of.a is None else of.a.conj(), u)


def scan(maps: SegmentMap, state: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Run rows of states through their segments in order.

    Segment maps are stacked along one leading axis G, step-major: first the first segment of each
    row, then the second of the rows that have one, and so on. Rows are sorted by falling number
    of segments, so that step i concerns the first counts[i] rows.

    Shapes: maps.u [G, ..., K, V] with G = sum(counts); state [R, ..., K, V], R = counts[0].
    Returns: the state that enters each segment [G, ..., K, V], and the final state [R, ..., K, V].
    """
    u = maps.u.split(counts)
    a = [None] * len(counts) if maps.a is None else maps.a.split(counts)
    entering: list[Tensor] = []
    done: list[Tensor] = []
    for n, a_n, u_n in zip(counts, a, u, strict=True):
        if n < state.shape[0]:
            done.append(state[n:])
            state = state[:n]
        entering.append(state)
        state = SegmentMap(maps.kind, a_n, u_n)(state)
    final = torch.cat([state, *reversed(done)]) if done else state
    return (entering[0] if len(entering) == 1 else torch.cat(entering)), final
