"""Linear attention with decay: linear attention, RetNet, Mamba-2 (SSD), GLA."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longscan import algebra
from longscan.algebra import SegmentMap
from longscan.ops import _across
from longscan.ops._check import (
    cast,
    check_floating,
    check_keys,
    check_log_decay,
    check_shape,
    check_state,
    check_values,
    compute_dtype,
    full_precision,
)
from longscan.ops._decay_fused import decay_fits, decay_fused
from longscan.ops._decay_keys_fused import decay_keys_fits, decay_keys_fused
from longscan.ops._layout import layout
from longscan.ops._scores import cumulative, decay_factors, sums, vector_scores
from longscan.ops.dispatch import by_sequence, choose

T = TypeVar("T")


def decay_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `decay`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        return by_sequence(decay_reference, [q, k, v, log_a], state, cu_seqlens)
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    s = state
    if s is None:
        s = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1])
    out = []
    for t in range(v.shape[1]):
        if log_a is not None:
            s = s * log_a[:, t].exp().view(*s.shape[:2], -1, 1)
        s = s + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, 1), s


def decay_step(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `decay`. Shapes: q, k [B, Hk, K]; v [B, H, V]; log_a [B, H] or [B, H, K]."""
    batch, heads, d_key, d_value = state.shape
    s = state
    if log_a is not None:
        s = s * log_a.exp().view(batch, heads, -1, 1)
    if k.shape[1] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    s = torch.addcmul(s, k.unsqueeze(-1), v.unsqueeze(-2))
    o = torch.bmm(q.reshape(-1, 1, d_key), s.view(-1, d_key, d_value))
    return o.view(batch, heads, d_value), s


def decay_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `decay`: matrix products inside chunks, a scan of states across."""
    plan = layout(v.shape[0], v.shape[1], chunk, cu_seqlens)
    if state is None:
        state = v.new_zeros(plan.rows, v.shape[2], k.shape[3], v.shape[3])
    q, k, v = (plan.split(x).transpose(1, 2).contiguous() for x in (q, k, v))
    if log_a is not None:
        log_a = plan.split(log_a).transpose(1, 2)
    if log_a is not None and log_a.ndim == 4:
        maps, read = _vector(q, k, v, log_a)
    else:
        maps, read = _scalar(q, k, v, log_a)
    entering, final = algebra.scan(maps, plan.rows_in(state), plan.counts)
    return plan.join(read(entering)), plan.rows_out(final)


Read = Callable[[Tensor], Tensor]
"""The outputs of all chunks [G, C, H, V], given the states that enter them [G, H, K, V]."""


def _scalar(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None) -> tuple[SegmentMap, Read]:
    """Maps and reads of chunks without a gate or with one number per head.

    Keys stay shared by the R value heads of a group: the heads' values lie side by side, so that
    one product serves the group. Shapes: q, k [G, Hk, C, K]; v [G, H, C, V]; log_a [G, H, C].
    """
    n, groups, c, _ = k.shape
    heads, d_value = v.shape[1], v.shape[3]
    r = heads // groups
    scores = q @ k.mT
    if log_a is None:
        scores, carry, b = scores.tril(), v, None
        a = None
    else:
        b = cumulative(log_a, -1)
        scores = scores.unsqueeze(2) * decay_factors(b).unflatten(1, (groups, r))
        carry = v * (b[..., -1:] - b).exp2().unsqueeze(-1)
        a = b[..., -1:] * math.log(2)
    if b is None and r > 1:
        scores = scores.unsqueeze(2).expand(-1, -1, r, -1, -1)
    inside = (scores.reshape(n, heads, c, c) if r > 1 else scores.view(n, heads, c, c)) @ v
    u = k.mT @ _beside(carry, groups)
    u = u.unflatten(-1, (r, d_value)).transpose(2, 3).flatten(1, 2)
    maps = SegmentMap("identity", None, u) if a is None else SegmentMap("diagonal", a, u)

    def read(state: Tensor) -> Tensor:
        o = q @ _beside(state, groups)
        o = o.unflatten(-1, (r, d_value)).transpose(2, 3).flatten(1, 2)
        o = inside + o if b is None else torch.addcmul(inside, o, b.exp2().unsqueeze(-1))
        return o.transpose(1, 2)

    return maps, read


def _beside(x: Tensor, groups: int) -> Tensor:
    """[G, H, N, V] -> [G, Hk, N, R * V]: the heads of a group side by side."""
    if x.shape[1] == groups:
        return x
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def _vector(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> tuple[SegmentMap, Read]:
    """Maps and reads of chunks with a gate per key channel. Shapes as `_scalar`, log_a [.., K]."""
    r = v.shape[1] // k.shape[1]
    if r > 1:
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 1)
    b = cumulative(log_a, -2)
    (scores,) = vector_scores([q.unsqueeze(-2)], k.unsqueeze(-2), b)
    inside = scores @ v
    last = b[..., -1:, :]
    maps = SegmentMap("diagonal", last.squeeze(-2) * math.log(2), (k * (last - b).exp2()).mT @ v)
    reader = q * b.exp2()
    return maps, lambda state: (inside + reader @ state).transpose(1, 2)


def decay_segment(k: Tensor, v: Tensor, log_a: Tensor | None = None) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = exp(sum log_a) S_in + U.

    Shapes: as `decay`; map axes [B, H, K, V].
    """
    k, v, log_a = cast(compute_dtype(k, v, log_a), k, v, log_a)
    groups, heads = k.shape[2], v.shape[2]
    if log_a is None:
        return SegmentMap("identity", None, _written(k, v))
    # What is left of each write at the end: sums from there, so that late writes lose no digits.
    left = sums(log_a.flip(1)).flip(1)
    total, kept = left[:, 0], F.pad(left[:, 1:], (0, 0) * (left.ndim - 2) + (0, 1)).exp()
    if log_a.ndim == 4:
        k = k if groups == heads else k.repeat_interleave(heads // groups, 2)
        return SegmentMap("diagonal", total, _written(k * kept, v))
    return SegmentMap("diagonal", total.unsqueeze(-1), _written(k, v * kept.unsqueeze(-1)))


def _written(k: Tensor, v: Tensor) -> Tensor:
    """sum_t k_t v_t^T [B, H, K, V]."""
    v = v.unflatten(2, (k.shape[2], -1))
    return torch.einsum("btgk,btgrv->bgrkv", k, v).flatten(1, 2)


def _spread(
    shards: _across.Across,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None,
    state: Tensor | None,
    run: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`decay` of a shard: its tokens as if no state entered, while the state is on its way.

    What is wide in the map and in the reads, in float32, is made anew in the backward.
    """

    def segment(cut: slice) -> SegmentMap:
        with full_precision(v):
            u = v[:, cut] if scale is None else scale[:, cut].unsqueeze(-1) * v[:, cut]
            return decay_segment(k[:, cut], u, None if log_a is None else log_a[:, cut])

    exchange = shards.begin(lambda cut: _anew(segment, cut), state)
    others = exchange.others()
    assert not isinstance(others, tuple)
    with _across.within(None):
        o, s = run(others)
    enters, first = exchange.wait(), shards.first
    assert isinstance(enters, Tensor)
    gates = None if log_a is None else log_a[:, first]
    read, left = _anew(_reads, q[:, first], gates, enters)
    o = o.to(read.dtype)
    rest = o.shape[1] - read.shape[1]
    o = o + read if not rest else torch.cat([o[:, first] + read, o[:, first.stop :]], 1)
    s = s + left if len(s) == len(left) else torch.cat([s[:1] + left, s[1:]])
    return o.to(v.dtype), s


def _reads(q: Tensor, log_a: Tensor | None, enters: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens read of the state that entered before them [B, T, H, V], and what is left of it.

    Shapes: q, log_a as `decay`; enters [B, H, K, V].
    """
    with full_precision(q):
        q, log_a = cast(enters.dtype, q, log_a)
        groups, heads = q.shape[2], enters.shape[1]
        b = None if log_a is None else sums(log_a)
        if b is not None and b.ndim == 4:
            q = q if groups == heads else q.repeat_interleave(heads // groups, 2)
            return torch.einsum("bthk,bhkv->bthv", q * b.exp(), enters), (
                b[:, -1].exp().unsqueeze(-1) * enters
            )
        read = torch.einsum("btgk,bgrkv->btgrv", q, enters.unflatten(1, (groups, -1)))
        read = read.flatten(2, 3)
        if b is None:
            return read, enters
        return read * b.exp().unsqueeze(-1), b[:, -1].exp()[..., None, None] * enters


def _anew(make: Callable[..., T], *inputs: Any) -> T:
    """make(*inputs), of which the backward keeps the inputs alone."""
    if not torch.is_grad_enabled():
        return make(*inputs)
    return checkpoint(make, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention whose state decays by a gate: none, one per head, or one per key channel.

    S_t = diag(exp(log_a_t)) S_{t-1} + k_t (scale_t v_t)^T,   o_t = S_t^T q_t + skip v_t

    Shapes: q, k [B, T, Hk, K]; v, o [B, T, H, V], each q/k head serving H / Hk consecutive value
    heads; log_a None, [B, T, H] or [B, T, H, K], natural-log decays <= 0; state [B, H, K, V];
    scale [B, T, H], finite, 1 if None; skip [H], 0 if None.
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    chunk: tokens handled by one set of matrix products; changes speed, not the result.
    Precision: states, gates and products in float32 (float64 for float64 inputs), o in v's dtype.
    Where kernels compute gates per head, scale and skip are products inside them; elsewhere torch
    multiplies, and under a kernel scale v is rounded to v's dtype.
    q is not scaled: multiply it by K^-0.5 where the architecture asks for it.
    Raises: ValueError, TypeError for shapes, dtypes, gates above 0 or cu_seqlens that do not fit.
    Source: GLA (arXiv 2312.06635, eq. 3); Mamba-2 (arXiv 2405.21060) with C, B, x, dt, D as
    q, k, v, scale, skip.
    Differs: scores with a gate per key are built by halves, each with exponents <= 0, so that
    any gate is exact; the authors' code goes elementwise inside 16-token blocks.
    """
    check_floating(q=q, k=k, v=v, log_a=log_a, scale=scale, skip=skip, state=state)
    batch, length, heads, d_value = check_values(v)
    d_key = check_keys(q, k, v)
    if log_a is not None:
        shape = (batch, length, heads, d_key)[: 4 if log_a.ndim == 4 else 3]
        check_shape("log_a", log_a, shape, "[B, T, H] or [B, T, H, K]")
        check_log_decay(log_a)
    if scale is not None:
        check_shape("scale", scale, (batch, length, heads), "[B, T, H]")
    if skip is not None:
        check_shape("skip", skip, (heads,), "[H]")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, heads, d_key, d_value), "[rows, H, K, V]")
    if (shards := _across.active()) is not None:
        run = partial(
            decay, q, k, v, log_a, scale=scale, skip=skip, cu_seqlens=cu_seqlens, chunk=chunk,
            backend=backend,
        )  # fmt: skip
        return _spread(shards, q, k, v, log_a, state, lambda s: run(state=s), scale)
    dtype, out = compute_dtype(q, k, v, log_a, scale, skip, state), v.dtype
    kernel: Callable = decay_fused
    fits: Callable = decay_fits
    if log_a is not None and log_a.ndim == 4:
        kernel, fits = decay_keys_fused, decay_keys_fits
    forms = {"reference": decay_reference, "torch": decay_chunked, "triton": kernel}
    run = choose(
        "decay", v, backend, forms, lambda: dtype is torch.float32 and fits(q, k, v, log_a)
    )
    with full_precision(v):
        if run is kernel and (length > 1 or cu_seqlens is not None):
            more = {"state": state, "cu_seqlens": cu_seqlens}
            if kernel is decay_fused and log_a is not None:
                o, s = decay_fused(q, k, v, log_a, scale=scale, skip=skip, **more)
            else:
                u = v if scale is None else (scale.unsqueeze(-1) * v).to(out)
                o, s = _skipping(kernel(q, k, u, log_a, **more), v, skip)
            return o.to(out), s
        q, k, v, log_a, scale, skip, state = cast(dtype, q, k, v, log_a, scale, skip, state)
        u = v if scale is None else scale.unsqueeze(-1) * v
        if run is decay_reference:
            found = run(q, k, u, log_a, state=state, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            if state is None:
                state = v.new_zeros(batch, heads, d_key, d_value)
            gate = None if log_a is None else log_a[:, 0]
            o, s = decay_step(q[:, 0], k[:, 0], u[:, 0], gate, state)
            found = o.unsqueeze(1), s
        else:
            found = run(q, k, u, log_a, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
        o, s = _skipping(found, v, skip)
    return o.to(out), s


def _skipping(found: tuple[Tensor, Tensor], v: Tensor, skip: Tensor | None) -> tuple:
    """o + skip v, and the state."""
    o, s = found
    return o if skip is None else o + skip.unsqueeze(-1) * v, s
