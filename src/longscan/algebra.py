"""Segment maps: a stretch of tokens as an affine map on the state, and what can be done with them.

    S_out = A . S_in + U,      (A2, U2) o (A1, U1) = (A2 A1, A2 U1 + U2)

The same maps serve chunks of a sequence on one device, segments of a long sequence, and shards of
a sequence across devices. Only the form of A differs between families:

    identity   A = 1                          linear attention
    diagonal   A = diag(exp(log_a))           decays; [..., 1] one number per head, [..., K] per key
    matrix     A = M, K x K                   the delta rule and its products

Diagonal maps keep the logarithm, so composing them adds and never multiplies small numbers.

Scaled maps are diagonal maps of states with exponential input gates (mLSTM), which leave the range
of any float. They act on pairs (s, m) that stand for the state s exp(m), and U is such a pair too:

    (s, m) -> (s exp(log_a + m - m') + u exp(m_u - m'), m'),    m' = max(log_a + m, m_u)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Affine: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""What a map acts on: a state, or for scaled maps a pair of a state and the log of its scale."""

S = TypeVar("S", Tensor, tuple[Tensor, Tensor])

EMPTY = -1e30
"""The log scale of a state of zeros, finite so that differences of log scales are numbers."""


@dataclass(frozen=True)
class SegmentMap:
    """One affine map, or a batch of them.

    Shapes: u [..., K, V]; a is None (identity), log decays [..., K] or [..., 1] (diagonal),
    or [..., K, K] (matrix); the leading axes of a and u agree or broadcast. m, for scaled maps
    only, is the log scale of u, with the axes of a.
    """

    kind: str
    a: Tensor | None
    u: Tensor
    m: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "diagonal", "matrix"):
            raise ValueError(f"kind must be identity, diagonal or matrix, not {self.kind!r}")
        if (self.a is None) != (self.kind == "identity"):
            raise ValueError("an identity map has a=None, every other kind a tensor")
        if self.m is not None and self.kind != "diagonal":
            raise ValueError(f"only diagonal maps can be scaled (have m), not {self.kind} ones")

    def __getitem__(self, index) -> SegmentMap:
        """Index the leading axes."""
        a, u, m = (None if x is None else x[index] for x in (self.a, self.u, self.m))
        assert u is not None
        return SegmentMap(self.kind, a, u, m)

    @property
    def offset(self) -> Affine:
        """The state that leaves when nothing enters: u, or (u, m) of a scaled map."""
        return self.u if self.m is None else (self.u, self.m)

    def transition(self, x: Affine) -> Affine:
        """A . x, without U. x [..., K, V], for a scaled map with its log scale."""
        if isinstance(x, tuple):
            assert self.a is not None
            return x[0], self.a + x[1]
        if self.a is None:
            return x
        if self.kind == "diagonal":
            return self.a.exp().unsqueeze(-1) * x
        return self.a @ x

    def __call__(self, state):
        """The state that leaves the segment when `state` enters it."""
        x = self.transition(state)
        if isinstance(x, Tensor):
            return x + self.u
        s, m = x
        assert self.m is not None
        top = torch.maximum(m, self.m)
        kept, added = ((x - top).exp().unsqueeze(-1) for x in (m, self.m))
        return torch.addcmul(s * kept, self.u, added), top


def compose(second: SegmentMap, first: SegmentMap) -> SegmentMap:
    """The map of `first` followed by `second`. Associative, not commutative."""
    if second.kind != first.kind or (second.m is None) != (first.m is None):
        raise ValueError(f"cannot compose {_form(first)} with {_form(second)}")
    u, m = _pair(second(first.offset))
    if second.a is None or first.a is None:
        return SegmentMap("identity", None, u)
    a = second.a + first.a if second.kind == "diagonal" else second.a @ first.a
    return SegmentMap(second.kind, a, u, m)


def _form(of: SegmentMap) -> str:
    return f"a {of.kind} map" if of.m is None else "a scaled map"


def _pair(x: Affine) -> tuple[Tensor, Tensor | None]:
    return x if isinstance(x, tuple) else (x, None)


def identity(like: SegmentMap) -> SegmentMap:
    """The neutral element of `compose` for maps of this form."""
    u = torch.zeros_like(like.u)
    if like.a is None:
        return SegmentMap("identity", None, u)
    if like.kind == "diagonal":
        m = None if like.m is None else torch.full_like(like.m, EMPTY)
        return SegmentMap("diagonal", torch.zeros_like(like.a), u, m)
    eye = torch.eye(like.a.shape[-1], dtype=like.a.dtype, device=like.a.device)
    return SegmentMap("matrix", eye.expand_as(like.a), u)


def adjoint(of: SegmentMap, u: Tensor, m: Tensor | None = None) -> SegmentMap:
    """The map that carries gradients right to left: dS_in = A^T dS_out + u.

    `u` is the gradient the segment itself sends to the state that enters it (what its reads
    would give with dS_out = 0). Adjoints compose in the reverse order.
    The gradient of s, where the state is s exp(m), is scaled by exp(m): of a scaled map the adjoint
    acts on pairs (ds, -m), and m here is minus the log scale of the state that enters.
    """
    if (m is None) != (of.m is None):
        raise ValueError("the adjoint of a scaled map, and no other, needs the log scale m of u")
    if of.kind == "matrix":
        assert of.a is not None
        return SegmentMap("matrix", of.a.mT, u)
    return SegmentMap(of.kind, None if of.a is None else of.a.conj(), u, m)


def scan(maps: SegmentMap, state: S, counts: list[int]) -> tuple[S, S]:
    """Run rows of states through their segments in order.

    Segment maps are stacked along one leading axis G, step-major: first the first segment of each
    row, then the second of the rows that have one, and so on. Rows are sorted by falling number
    of segments, so that step i concerns the first counts[i] rows.

    Shapes: maps.u [G, ..., K, V] with G = sum(counts); state [R, ..., K, V], R = counts[0], for
    scaled maps with its log scale [R, ..., 1 or K].
    Returns: the state that enters each segment [G, ..., K, V], and the final state [R, ..., K, V].
    """
    u = maps.u.split(counts)
    a, m = ([None] * len(counts) if x is None else x.split(counts) for x in (maps.a, maps.m))
    now: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)
    entering: list[tuple[Tensor, ...]] = []
    done: list[tuple[Tensor, ...]] = []
    for n, a_n, u_n, m_n in zip(counts, a, u, m, strict=True):
        if n < now[0].shape[0]:
            done.append(tuple(x[n:] for x in now))
            now = tuple(x[:n] for x in now)
        entering.append(now)
        out = SegmentMap(maps.kind, a_n, u_n, m_n)(now if isinstance(state, tuple) else now[0])
        now = out if isinstance(out, tuple) else (out,)
    return _joined(entering, state), _joined([now, *reversed(done)], state)


def _joined(parts: list[tuple[Tensor, ...]], like: S) -> S:
    """States joined along the leading axis, in the form of `like`."""
    x = tuple(p[0] if len(p) == 1 else torch.cat(p) for p in zip(*parts, strict=True))
    return x if isinstance(like, tuple) else x[0]  # type: ignore[return-value]
