"""`delta` by kernels on a shard of a sequence: the maps of time segments, one scale up.

A long sequence is cut into segments in any case, each with its map (A, U), so that few heads fill a
GPU. Here those of the first and the last segment are made as well, and composed they are the map of
the shard. So a shard costs one forward and one backward, as a whole sequence does, and small
products around the exchange.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from longscan.algebra import SegmentMap
from longscan.ops import _delta_fused as fused
from longscan.ops._across import Across, first_order_only


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

    Everything is told by lengths that the host knows, so nothing waits for the device. came:
    sequences that come from the left; goes: those that go on to the right; head, tail: the segments
    of these; shape: (sequences, segments of each) of head and tail.
    """

    def __init__(self, shards: Across, q, k, v, log_a, cu_seqlens: Tensor | None) -> None:
        self.shards = shards
        case = fused._case(q, k, v, log_a, cu_seqlens)
        batch, length = q.shape[:2]
        steps = k.shape[2] if k.ndim == 5 else 1
        size = length
        if case.cut is None:
            unit = case.launch.chunk // steps * case.launch.every
            assert case.launch.maps is not None
            begins, first, cut = fused._cut.__wrapped__(
                case.launch.maps, batch, length, length, unit, cu_seqlens, q.device
            )
            case = case._replace(starts=begins, first=first, cut=cut)
        else:
            size, _ = fused._segments(
                case.launch, batch, length, case.heads, k.shape[-1], v.shape[-1], steps, cu_seqlens
            )
        assert case.cut is not None
        self.case, self.cut = case, case.cut
        packed = cu_seqlens is not None
        lengths = [b - a for a, b in pairwise(shards.local)] if packed else [length] * batch
        counts = [-(-n // size) for n in lengths]
        ends = [*accumulate(counts)]
        self.rows, many = len(counts), len(counts)
        self.came = slice(0, (1 if packed else many) if shards.continues else 0)
        self.goes = slice(many - ((1 if packed else many) if shards.onward else 0), many)
        self.head = slice(0, sum(counts[self.came]))
        self.tail = slice(ends[-1] - sum(counts[self.goes]), ends[-1])
        begin = [e - n for e, n in zip(ends, counts, strict=True)]
        device = q.device
        self.firsts = torch.tensor(begin, device=device)
        self.lasts = torch.tensor([e - 1 for e in ends], device=device)
        codes = case.cut.codes.clone()
        codes[self.firsts[self.came]] &= ~1
        codes[self.lasts[self.goes]] &= ~2
        self.marked = case.cut._replace(codes=codes)
        # Whether a sequence that goes on has but one segment, and began here; and the mirror.
        alone = [n == 1 and r >= self.came.stop for r, n in enumerate(counts)]
        self.began = torch.tensor(alone[self.goes], device=device).view(-1, 1, 1, 1)
        alone = [n == 1 and r < self.goes.start for r, n in enumerate(counts)]
        self.ended = torch.tensor(alone[self.came], device=device).view(-1, 1, 1, 1)
        self.eye = torch.eye(k.shape[-1], device=device).expand(self.rows, case.heads, -1, -1)
        self.eye = self.eye.contiguous()

    def many(self, of: Tensor) -> Tensor:
        """A as one tensor [m, H, K, K] of float32, from its two parts."""
        return of[:, :, 0].float() + of[:, :, 1].float()

    def combined(self, a: Tensor, sums: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
        out = torch.empty_like(sums)
        fused._combine(self.case, self.cut, a, sums, start, out, reverse)
        return out

    def products(self, a: Tensor, reverse: bool) -> Tensor:
        """What segments do to what enters the first of their sequence (or leaves its last)."""
        ends = self.lasts if reverse else self.firsts
        whole = self.many(a[ends])
        sums = a.new_zeros(a.shape[0], a.shape[1], *a.shape[3:], dtype=torch.float32)
        sums[ends] = whole.mT if reverse else whole
        return self.combined(a, sums, self.eye, reverse)


def _segments(shards: Across, q, k, v, log_a, cu_seqlens: Tensor | None) -> _Segments:
    """Those of an earlier layer with the same shapes, if there was one."""
    key = ("delta", q.shape, k.shape, v.shape, v.dtype, log_a is None, q.device)
    if key not in shards.notes:
        shards.notes[key] = _Segments(shards, q, k, v, log_a, cu_seqlens)
    return shards.notes[key]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Across, cu_seqlens, q, k, v, beta, log_a, state):
        q, k, v, beta, log_a, state = fused._contiguous(q, k, v, beta, log_a, state)
        segments = _segments(shards, q, k, v, log_a, cu_seqlens)
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
            _add(enter[segments.head], products[segments.head], entered, segments.came.stop)
        fused._scan(case, q, k, v, g, factors, enter, o, final, case.launch.scan)
        if shards.onward:  # kernels write what leaves a sequence only where it ends
            final[segments.goes] = _leaving(segments, a, sums, enter)
        ctx.shards = shards
        ctx.save_for_backward(q, k, v, beta, log_a, state, cu_seqlens, g, factors, enter, a)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do, d_final):  # type: ignore[override]
        first_order_only()
        q, k, v, beta, log_a, state, cu_seqlens, g, factors, enter, a = ctx.saved_tensors
        shards: Across = ctx.shards
        do = v.new_zeros(*q.shape[:2], *v.shape[-2:]) if do is None else do
        do, d_final = fused._contiguous(do, d_final)
        segments = _segments(shards, q, k, v, log_a, cu_seqlens)
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
            if d_final is not None:
                found = found + d_final[segments.goes].float().flatten(0, 1)
            rows = segments.goes.stop - segments.goes.start
            _add(leave[segments.tail], products[segments.tail], found, rows)
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


def _add(into: Tensor, products: Tensor, x: Tensor, rows: int) -> None:
    """into += products x, for the segments of so many sequences; x [rows H, K, V]."""
    x = x.view(rows, 1, -1, *x.shape[1:])
    into += (products.unflatten(0, (rows, -1)) @ x).flatten(0, 1)


def _leaving(segments: _Segments, a, sums, enter) -> Tensor:
    """What leaves the sequences that go on [n, H, K, V], of what enters their segments.

    A first segment that begins here has no A, and its sum holds what entered it.
    """
    last = segments.lasts[segments.goes]
    through = segments.many(a[last]) @ enter[last]
    return torch.where(segments.began, 0.0, through) + sums[last]


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
        last = segments.lasts[segments.goes]
        m = (segments.many(a[last]) @ products[last]).flatten(0, 1)
    return SegmentMap("matrix", m, u)


def _whole_back(segments: _Segments, a, d_sums, leave, products, d_final) -> SegmentMap:
    """The map on gradients of what came from the left."""
    shards = segments.shards
    if not shards.continues:
        like = d_sums[: 1 if shards.packed else segments.rows].flatten(0, 1)
        return SegmentMap("matrix", like.new_zeros(*like.shape[:2], like.shape[1]), like * 0)
    at = segments.firsts[segments.came]
    whole = segments.many(a[at]).mT
    d = torch.where(segments.ended, 0.0, whole @ leave[at]) + d_sums[at]
    m = d.new_zeros(*d.shape[:3], d.shape[2])
    if shards.passes:
        assert products is not None
        m = whole @ products[at]
        if d_final is not None:
            d = d + m @ d_final[segments.goes].float()
    return SegmentMap("matrix", m.flatten(0, 1), d.flatten(0, 1))
