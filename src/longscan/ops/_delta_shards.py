"""`delta` by kernels on a shard of a sequence: the maps of time segments, one scale up.

A long sequence is cut into segments in any case, each with its map (A, U), so that few heads fill a
GPU. Here those of the first and the last segment are made as well, and composed they are the map of
the shard. So a shard costs one forward and one backward, as a whole sequence does, and small
products around the exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.algebra import SegmentMap
from longscan.ops import _delta_fused as fused
from longscan.ops._across import Across


def delta_spreads(k: Tensor, v: Tensor) -> bool:
    """Whether kernels make maps of heads of these sizes."""
    return fused.launches(k.shape[-1], v.shape[-1], v.dtype).maps is not None


def delta_spread(
    shards: Across,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`delta_fused` of the tokens of a shard; state: of the local sequences, the first row counting
    only if it begins here.

    Shapes, precision: as `delta_fused`.
    """
    dtype, out = q.dtype, v.dtype
    if k.dtype is not dtype or out is not dtype:
        dtype = torch.promote_types(torch.promote_types(dtype, k.dtype), out)
        q, k, v = (x if x.dtype is dtype else x.to(dtype) for x in (q, k, v))
    o, final = _Spread.apply(shards, cu_seqlens, q, k, v, beta, log_a, state)  # type: ignore[misc]
    return o.to(out), final


class _Segments:
    """Segments of the local sequences, and how their maps are composed.

    head: the segments of what continues from the left, as a slice of segments (of a batch, all in
    rows); tail: of what goes on to the right.
    """

    def __init__(self, shards: Across, q, k, v, log_a, cu_seqlens: Tensor | None) -> None:
        self.shards = shards
        case = fused._case(q, k, v, log_a, cu_seqlens)
        batch, length = q.shape[:2]
        steps = k.shape[2] if k.ndim == 5 else 1
        if case.cut is None:
            unit = case.launch.chunk // steps * case.launch.every
            assert case.launch.maps is not None
            begins, first, cut = fused._cut.__wrapped__(
                case.launch.maps, batch, length, length, unit, cu_seqlens, q.device
            )
            case = case._replace(starts=begins, first=first, cut=cut)
        assert case.cut is not None
        self.case, self.cut = case, case.cut
        first = case.cut.first
        self.rows = len(first) - 1
        packed = cu_seqlens is not None
        # Which sequences another rank holds more of.
        self.came = slice(0, (1 if packed else self.rows) if shards.continues else 0)
        self.goes = slice(self.rows - (1 if packed else self.rows), self.rows)
        if not shards.onward:
            self.goes = slice(self.rows, self.rows)
        codes = case.cut.codes.clone()
        begin, end = first[:-1][self.came], first[1:][self.goes] - 1
        codes[begin] &= ~1
        codes[end] &= ~2
        self.marked = case.cut._replace(codes=codes)

    def many(self, of: Tensor) -> Tensor:
        """A as one tensor [m, H, K, K] of float32, from its two parts."""
        return of[:, :, 0].float() + of[:, :, 1].float()

    def combined(self, a: Tensor, sums: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
        out = torch.empty_like(sums)
        fused._combine(self.case, self.cut, a, sums, start, out, reverse)
        return out

    def products(self, a: Tensor, reverse: bool) -> Tensor:
        """What segments do to what enters the first of their sequence (or leaves its last)."""
        whole, first = self.many(a), self.cut.first
        ends = (first[1:] - 1) if reverse else first[:-1]
        sums = torch.zeros_like(whole)
        sums[ends] = whole[ends].mT if reverse else whole[ends]
        eye = torch.eye(a.shape[-1], device=a.device).expand(self.rows, a.shape[1], -1, -1)
        return self.combined(a, sums, eye.contiguous(), reverse)

    def row_of(self) -> Tensor:
        """The sequence of each segment [m]."""
        return self.cut.codes // 4


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Across, cu_seqlens, q, k, v, beta, log_a, state):
        q, k, v, beta, log_a, state = fused._contiguous(q, k, v, beta, log_a, state)
        segments = _Segments(shards, q, k, v, log_a, cu_seqlens)
        case, cut = segments.case, segments.cut
        heads, d_key, d_value = case.heads, k.shape[-1], v.shape[-1]
        o, final, g, factors, _, _ = fused._fake(q, k, v, beta, log_a, state, cu_seqlens)
        count = cut.codes.shape[0]
        sums = final.new_zeros(count, heads, d_key, d_value)
        a = g.new_zeros(count, heads, 2, d_key, d_key)
        fused._solve(case, k, beta, log_a, g, factors, case.launch.solve)
        fused._maps(case, segments.marked, q, k, v, g, factors, state, o, sums, a, False)
        start = state if state is None else state.float()
        if start is not None and shards.continues:
            start = start.clone()
            start[segments.came] = 0
        enter = segments.combined(a, sums, start, False)
        products = None
        if shards.continues:
            products = segments.products(a, False)
        entered = shards.swap(_whole(segments, a, sums, enter, products))
        if entered is not None:
            assert isinstance(entered, Tensor)
            assert products is not None
            size = (segments.came.stop, heads, d_key, d_value)
            rows = segments.row_of()
            mine = rows < segments.came.stop
            entered = entered.view(size)
            enter[mine] += products[mine] @ entered[rows[mine]]
        fused._scan(case, q, k, v, g, factors, enter, o, final, case.launch.scan)
        if shards.onward:  # kernels write what leaves a sequence only where it ends
            final[segments.goes] = _leaving(segments, a, sums, enter)
        ctx.shards = shards
        ctx.save_for_backward(q, k, v, beta, log_a, state, cu_seqlens, g, factors, enter, a)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, d_final):  # type: ignore[override]
        q, k, v, beta, log_a, state, cu_seqlens, g, factors, enter, a = ctx.saved_tensors
        shards: Across = ctx.shards
        do = v.new_zeros(*q.shape[:2], *v.shape[-2:]) if do is None else do
        do, d_final = fused._contiguous(do, d_final)
        segments = _Segments(shards, q, k, v, log_a, cu_seqlens)
        case, cut = segments.case, segments.cut
        d_sums = torch.zeros_like(enter)
        fused._maps(case, segments.marked, q, k, v, g, factors, d_final, do, d_sums, a, True)
        start = d_final
        if start is not None and shards.onward:
            start = start.clone()
            start[segments.goes] = 0
        leave = segments.combined(a, d_sums, start, True)
        products = segments.products(a, True) if shards.onward else None
        found = shards.swap(_whole_back(segments, a, d_sums, leave, products, d_final), back=True)
        if shards.onward:
            assert isinstance(found, Tensor)
            assert products is not None
            rows = segments.row_of()
            mine = rows >= segments.goes.start
            found = found.view(-1, *leave.shape[1:])
            if d_final is not None:
                found = found + d_final[segments.goes].float()
            leave[mine] += products[mine] @ found[rows[mine] - segments.goes.start]
        grads, d_state = fused.gradients(
            case, q, k, v, beta, log_a, g, factors, enter, do, leave, torch.empty_like(enter)
        )
        d_state = d_state[cut.begins]
        if shards.continues:
            d_state = d_state.clone()
            d_state[segments.came] = 0
        given = (q, k, v, beta, log_a)
        grads = [None if x is None else d for x, d in zip(given, grads, strict=True)]
        return None, None, *grads, None if state is None else d_state.to(state.dtype)


def _leaving(segments: _Segments, a, sums, enter) -> Tensor:
    """What leaves the sequences that go on [n, H, K, V], of what enters their segments.

    A first segment that begins here has no A, and its sum holds what entered it.
    """
    last = (segments.cut.first[1:] - 1)[segments.goes]
    alone = (segments.marked.codes[last] & 1).bool().view(-1, 1, 1, 1)
    return torch.where(alone, 0.0, segments.many(a[last]) @ enter[last]) + sums[last]


def _whole(segments: _Segments, a, sums, enter, products) -> SegmentMap:
    """The map of what goes on to the right; of one sequence where nothing does, for its shape."""
    shards = segments.shards
    if not shards.onward:
        like = sums[: 1 if shards.packed else segments.rows].flatten(0, 1)
        return SegmentMap("matrix", like.new_zeros(*like.shape[:2], like.shape[1]), like * 0)
    u = _leaving(segments, a, sums, enter).flatten(0, 1)
    m = u.new_zeros(*u.shape[:2], u.shape[1])
    if shards.passes:
        assert products is not None
        last = (segments.cut.first[1:] - 1)[segments.goes]
        m = (segments.many(a[last]) @ products[last]).flatten(0, 1)
    return SegmentMap("matrix", m, u)


def _whole_back(segments: _Segments, a, d_sums, leave, products, d_final) -> SegmentMap:
    """The map on gradients of what came from the left."""
    shards, first = segments.shards, segments.cut.first[:-1]
    if not shards.continues:
        like = d_sums[: 1 if shards.packed else segments.rows].flatten(0, 1)
        return SegmentMap("matrix", like.new_zeros(*like.shape[:2], like.shape[1]), like * 0)
    at = first[segments.came]
    alone = (segments.marked.codes[at] & 2).bool().view(-1, 1, 1, 1)
    whole = segments.many(a[at]).mT
    d = torch.where(alone, 0.0, whole @ leave[at]) + d_sums[at]
    m = d.new_zeros(*d.shape[:3], d.shape[2])
    if shards.passes:
        assert products is not None
        m = whole @ products[at]
        if d_final is not None:
            d = d + m @ d_final[segments.goes].float()
    return SegmentMap("matrix", m.flatten(0, 1), d.flatten(0, 1))
