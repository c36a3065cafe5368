"""What enters each rank, from the segment maps of those before it: four ways to the same states.

Ranks stand in a row. Rank i holds a map x -> A_i x + U_i, and where `passes[i]` the state that
leaves it is A_i x + U_i of the x that enters; elsewhere a sequence begins inside the rank, and U_i
alone leaves. Rank i is handed what leaves rank i - 1 where `receives[i]`. Read from the right, with
adjoint maps, the same row hands gradients of states from right to left.

    allgather      every rank gets all maps and folds those it needs          LASP-2, 2502.07563
    allscan        states go from rank to rank in blocks, as in a pipeline    ZeCO, 2507.01004
    doubling       composed maps go 1, 2, 4, ... ranks far
    hierarchical   maps are gathered inside each host, states go from host to host

A chain sends U alone, the others A as well. Source of the last two: Hillis and Steele's scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.algebra import Affine, SegmentMap, compose
from longscan.parallel.wire import Wire


@dataclass(frozen=True)
class Row:
    """The ranks of a wire in the order that states pass them.

    ranks[i]: the i-th of the row; passes, receives: see above; per_host: ranks of a host, which
    are neighbours.
    """

    ranks: tuple[int, ...]
    passes: tuple[bool, ...]
    receives: tuple[bool, ...]
    per_host: int

    def start(self, i: int) -> int:
        """The first rank whose map matters for what leaves rank i."""
        while self.passes[i]:
            i -= 1
        return i


Scan = Callable[[SegmentMap, Row, Wire, str], Affine | None]
"""(map, row, wire, kind for the count of bytes) -> what enters this rank, None if nothing does."""


def _packed(of: SegmentMap, with_a: bool = True) -> Tensor:
    """A map [N, K, V] as one row of numbers."""
    parts = [of.u, of.m, of.a if with_a else None]
    real = [
        torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        for x in parts
        if x is not None
    ]
    wide = real[0].dtype
    return torch.cat([x.to(wide).flatten() for x in real])


def _unpacked(row: Tensor, like: SegmentMap, with_a: bool = True) -> SegmentMap:
    """The inverse of `_packed`; without A, that of `like`, to which it does not belong."""
    parts, at = [], 0
    for x in (like.u, like.m, like.a if with_a else None):
        if x is None:
            parts.append(None)
            continue
        n = x.numel() * (2 if x.is_complex() else 1)
        flat, at = row[at : at + n], at + n
        flat = torch.view_as_complex(flat.view(*x.shape, 2)) if x.is_complex() else flat
        parts.append(flat.view(x.shape))
    u, m, a = parts
    return SegmentMap(like.kind, a if with_a else like.a, u, m)  # type: ignore[arg-type]


def _fold(maps: list[SegmentMap], passes: tuple[bool, ...]) -> Affine:
    """What leaves the last of some maps, of which the first does not pass anything on."""
    state = maps[0].offset
    for of, through in zip(maps[1:], passes[1:], strict=True):
        state = of(state) if through else of.offset
    return state


def allgather(of: SegmentMap, row: Row, wire: Wire, kind: str) -> Affine | None:
    """Gather all maps, fold those before this rank."""
    everyone = wire.gather(_packed(of), kind)
    i = row.ranks.index(wire.rank)
    if not row.receives[i]:
        return None
    first = row.start(i - 1)
    maps = [_unpacked(everyone[r], of) for r in row.ranks[first:i]]
    return _fold(maps, row.passes[first:i])


def _blocks(of: SegmentMap, n: int) -> list[SegmentMap]:
    """A map cut into about n pieces: heads first, then columns, along which any map may be cut.

    Scaled maps by heads alone, as a head has one scale for all its columns.
    """
    heads, _, columns = of.u.shape
    by_head = max(1, min(n, heads))
    by_column = 1 if of.m is not None else max(1, min(columns, -(-n // by_head)))
    tall, wide = -(-heads // by_head), -(-columns // by_column)
    return [
        SegmentMap(of.kind, piece.a, piece.u[..., c : c + wide], piece.m)
        for h in range(0, heads, tall)
        for piece in [of[h : h + tall]]
        for c in range(0, columns, wide)
    ]


def _whole(blocks: list[Affine], like: SegmentMap) -> Affine:
    """Blocks of a state put together again."""
    if like.m is not None:
        s, m = zip(*blocks, strict=True)
        return torch.cat(s), torch.cat(m)
    rows, row, wide = [], [], 0
    for block in blocks:
        assert isinstance(block, Tensor)
        row.append(block)
        wide += block.shape[-1]
        if wide == like.u.shape[-1]:
            rows.append(torch.cat(row, -1))
            row, wide = [], 0
    return torch.cat(rows)


def allscan(n_blocks: int) -> Scan:
    """States from rank to rank in n_blocks blocks: rank i works on a block while i + 1 works on
    the one before."""

    def run(of: SegmentMap, row: Row, wire: Wire, kind: str) -> Affine | None:
        i = row.ranks.index(wire.rank)
        onward = i + 1 < len(row.ranks) and row.receives[i + 1]
        pieces = _blocks(of, n_blocks)
        entered, sent, coming = [], [], []
        if row.receives[i]:
            # All posted before the first is waited for, so that none waits for this rank.
            for piece in pieces:
                into = torch.empty_like(_packed(piece, with_a=False))
                coming.append((into, wire.receive(into, row.ranks[i - 1], kind)))
        for j, piece in enumerate(pieces):
            leaving = piece.offset
            if coming:
                into, work = coming[j]
                work.wait()
                state = _unpacked(into, piece, with_a=False).offset
                entered.append(state)
                leaving = piece(state) if row.passes[i] else leaving
            if onward:
                out = _leaves(piece, leaving)
                sent.append((out, wire.send(out, row.ranks[i + 1])))
        for _, work in sent:
            work.wait()
        return _whole(entered, of) if entered else None

    return run


def doubling(of: SegmentMap, row: Row, wire: Wire, kind: str) -> Affine | None:
    """Maps composed of 1, 2, 4, ... ranks go as many ranks far."""
    i, size, far = row.ranks.index(wire.rank), len(row.ranks), 1
    enters: SegmentMap | None = None  # of the ranks i - far + 1 .. i - 1

    def begun(j: int, end: int) -> bool:
        """Whether a sequence begins in one of the far ranks behind j, up to end."""
        return not all(row.passes[max(0, j - far + 1) : end])

    def asks(j: int) -> bool:
        return far <= j < size and row.receives[j] and not begun(j, j)

    while far < size:
        sends, receives = {}, {}
        if asks(i + far):
            sends[row.ranks[i + far]] = _packed(of, with_a=not begun(i, i + 1))
        if asks(i):
            with_a = not begun(i - far, i - far + 1)
            receives[row.ranks[i - far]] = torch.empty_like(_packed(of, with_a=with_a))
            (got,) = wire.trade(sends, receives, kind).values()
            left = _unpacked(got, of, with_a=with_a)
            enters = left if enters is None else compose(enters, left)
            of = of if begun(i, i + 1) else compose(of, left)
        else:
            wire.trade(sends, receives, kind)
        far *= 2
    return None if enters is None else enters.offset


def hierarchical(of: SegmentMap, row: Row, wire: Wire, kind: str) -> Affine | None:
    """Maps are gathered inside each host; states go from the last rank of a host to that of the
    next, once across the slow link, and from there to the ranks of its host that need them."""
    i, n, size = row.ranks.index(wire.rank), row.per_host, len(row.ranks)
    low = i // n * n
    top = min(low + n, size) - 1
    mine = _packed(of)
    others = {j: torch.empty_like(mine) for j in range(low, top + 1) if j != i}
    wire.trade(
        {row.ranks[j]: mine for j in others}, {row.ranks[j]: x for j, x in others.items()}, kind
    )
    maps = {j: _unpacked(x, of) for j, x in others.items()} | {i: of}

    def leaving(j: int, enters: Affine | None) -> Affine:
        """What leaves rank j of this host, which `enters` enters."""
        first = row.start(j)
        if first >= low:
            return _fold([maps[x] for x in range(first, j + 1)], row.passes[first : j + 1])
        for x in range(low, j + 1):
            enters = maps[x](enters)
        assert enters is not None
        return enters

    wants = [
        j for j in range(low, top + 1) if row.receives[j] and (j == low or row.start(j - 1) < low)
    ]
    onward = top + 1 < size and row.receives[top + 1]
    from_afar = bool(wants) or (onward and row.start(top) < low)
    enters: Affine | None = None
    if i == top:
        if from_afar:
            enters = _received(of, row.ranks[low - 1], wire, kind)
        out = [(top + n, leaving(top, enters))] if onward else []
        out += [(j, enters) for j in wants if j != top and enters is not None]
        for to, state in out:
            _send(of, state, row.ranks[min(to, size - 1)], wire)
    elif i in wants:
        enters = _received(of, row.ranks[top], wire, kind)
    if not row.receives[i]:
        return None
    return enters if i == low else leaving(i - 1, enters)


def _received(like: SegmentMap, source: int, wire: Wire, kind: str) -> Affine:
    into = torch.empty_like(_packed(like, with_a=False))
    wire.receive(into, source, kind).wait()
    return _unpacked(into, like, with_a=False).offset


def _leaves(like: SegmentMap, state: Affine) -> Tensor:
    u, m = state if isinstance(state, tuple) else (state, None)
    return _packed(SegmentMap(like.kind, like.a, u, m), with_a=False)


def _send(like: SegmentMap, state: Affine, to: int, wire: Wire) -> None:
    wire.send(_leaves(like, state), to).wait()


METHODS = ("allgather", "allscan", "doubling", "hierarchical")
