"""A bank of slots, written by the sequence and read by softmax: gated slot attention."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from longscan import algebra
from longscan.algebra import SegmentMap
from longscan.ops import _across
from longscan.ops._check import (
    cast,
    check_floating,
    check_log_decay,
    check_shape,
    check_state,
    check_values,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import layout
from longscan.ops._scores import cumulative
from longscan.ops._slots import read_fixed, slots_inside
from longscan.ops.decay import decay_segment
from longscan.ops.dispatch import by_sequence, choose


def slots_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_a: Tensor,
    bank: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `slots`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        tokens = [q, k, v, w, log_a]
        return by_sequence(partial(slots_reference, bank=bank), tokens, state, cu_seqlens)
    s = state
    if s is None:
        s = v.new_zeros(v.shape[0], *w.shape[2:], k.shape[-1] + v.shape[-1])
    out = []
    for t in range(v.shape[1]):
        o, s = slots_step(q[:, t], k[:, t], v[:, t], w[:, t], log_a[:, t], bank, s)
        out.append(o)
    return torch.stack(out, 1), s


def slots_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_a: Tensor,
    bank: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `slots`. Shapes: q, k [B, H, K]; v [B, H, V]; w, log_a [B, H, M]."""
    written = w.unsqueeze(-1) * torch.cat([k, v], -1).unsqueeze(-2)
    s = torch.addcmul(written, log_a.exp().unsqueeze(-1), state)
    read = s if bank is None else s + bank
    keys, values = read.split([k.shape[-1], v.shape[-1]], -1)
    p = (keys @ q.unsqueeze(-1)).softmax(-2)
    return (p.mT @ values).squeeze(-2), s


def slots_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_a: Tensor,
    bank: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `slots`: a scan of states over chunks, which are then read at once."""
    plan = layout(v.shape[0], v.shape[1], chunk, cu_seqlens)
    kv = torch.cat([k, v], -1)
    if state is None:
        state = v.new_zeros(plan.rows, *w.shape[2:], kv.shape[-1])
    q, kv, w, log_a = (plan.split(x).transpose(1, 2).contiguous() for x in (q, kv, w, log_a))
    b = cumulative(log_a, -2)
    last = b[..., -1:, :]
    u = (w * (last - b).exp2()).mT @ kv
    maps = SegmentMap("diagonal", last.squeeze(-2) * math.log(2), u)
    entering, final = algebra.scan(maps, plan.rows_in(state), plan.counts)
    inputs = (q, *kv.split([k.shape[-1], v.shape[-1]], -1), w, b, entering, bank)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, *_ = slots_inside(*inputs, keep)
    return plan.join(o.transpose(1, 2)), plan.rows_out(final)


def slots_segment(k: Tensor, v: Tensor, w: Tensor, log_a: Tensor) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = exp(sum log_a) S_in + U.

    Keys and values of the slots are written alike, so that one map serves both.

    Shapes: as `slots`; map axes [B, H, M, K + V].
    """
    return decay_segment(w, torch.cat([k, v], -1), log_a)


def slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_a: Tensor,
    bank: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over M slots, each a key and a value, that forget and are written token by token.

    S_t = diag(exp(log_a_t)) S_{t-1} + w_t k_t^T        the slots' keys, M x K
    Z_t = diag(exp(log_a_t)) Z_{t-1} + w_t v_t^T        the slots' values, M x V
    o_t = Z_t^T softmax(S_t q_t)

    With a bank, what is read is its keys and values plus S_t and Z_t: slots that start from the
    bank and, as they forget, return to it.

    Shapes: q, k [B, T, H, K]; v, o [B, T, H, V]; w, log_a [B, T, H, M], how much of the token goes
    into each slot (1 - exp(log_a) in gated slot attention) and natural-log decays <= 0; state
    [B, H, M, K + V], keys and values of the slots side by side (zeros where none is given), and
    bank [H, M, K + V] or None likewise.
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    chunk: tokens handled by one set of matrix products, a power of two; changes speed, not the
    result.
    Precision: states, gates, softmax and products in float32 (float64 for float64 inputs), o in
    v's dtype. Nothing is scaled: multiply q by K^-0.5 where the architecture asks for it.
    Raises: ValueError, TypeError for shapes, dtypes, gates above 0 or cu_seqlens that do not fit.
    Source: Gated Slot Attention (arXiv 2409.07146); with log_a = 0, ABC (arXiv 2110.02488).
    Differs: decays inside a chunk are built by halves, each with exponents <= 0, so that any gate
    is exact; w is free, the authors' layer passes 1 - exp(log_a).
    """
    check_floating(q=q, k=k, v=v, w=w, log_a=log_a, bank=bank, state=state)
    batch, length, heads, d_value = check_values(v)
    check_shape("q", q, (batch, length, heads, None), "[B, T, H, K]")
    check_shape("k", k, tuple(q.shape), "[B, T, H, K], as q")
    check_shape("w", w, (batch, length, heads, None), "[B, T, H, M]")
    check_shape("log_a", log_a, tuple(w.shape), "[B, T, H, M], as w")
    check_log_decay(log_a)
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two, not {chunk}")
    size = (heads, w.shape[3], k.shape[3] + d_value)
    if bank is not None:
        check_shape("bank", bank, size, "[H, M, K + V]")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, *size), "[rows, H, M, K + V]")
    state = _across.entering(
        lambda cut: slots_segment(*(x[:, cut] for x in (k, v, w, log_a))), state
    )
    dtype, out = compute_dtype(q, k, v, w, log_a, bank, state), v.dtype
    with full_precision(v):
        q, k, v, w, log_a, bank, state = cast(dtype, q, k, v, w, log_a, bank, state)
        inputs = (q, k, v, w, log_a, bank)
        run = choose("slots", v, backend, {"reference": slots_reference, "torch": slots_chunked})
        if run is slots_reference or (length == 1 and cu_seqlens is None):
            o, s = slots_reference(*inputs, state=state, cu_seqlens=cu_seqlens)
        else:
            o, s = run(*inputs, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
    return o.to(out), s


def slots_read_reference(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The definition of `slots_read`."""
    p = torch.einsum("...hk,hmk->...hm", q, keys).softmax(-1)
    return torch.einsum("...hm,hmv->...hv", p, values)


def slots_read(q: Tensor, keys: Tensor, values: Tensor, *, backend: str | None = None) -> Tensor:
    """What tokens read from a bank of M slots that nothing writes.

    o_t = values^T softmax(keys q_t)

    Shapes: q [B, T, H, K]; keys [H, M, K]; values [H, M, V]; o [B, T, H, V].
    Precision: products and softmax in float32 (float64 for float64 inputs), o in q's dtype; the
    scores [T, M] are never kept. Nothing is scaled: multiply q by K^-0.5 where that is wanted.
    Raises: ValueError, TypeError for shapes or dtypes that do not fit.
    Source: the associative memory of GAM (arXiv 2509.00605).
    """
    check_floating(q=q, keys=keys, values=values)
    check_shape("q", q, (None, None, None, None), "[B, T, H, K]")
    check_shape("keys", keys, (q.shape[2], None, q.shape[3]), "[H, M, K]")
    check_shape("values", values, (*keys.shape[:2], None), "[H, M, V]")
    dtype, out = compute_dtype(q, keys, values), q.dtype
    with full_precision(q):
        q, keys, values = cast(dtype, q, keys, values)
        forms = {"reference": slots_read_reference, "torch": _read}
        return choose("slots", q, backend, forms)(q, keys, values).to(out)


def _read(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The fast torch form of `slots_read`."""
    return read_fixed(q.flatten(0, 1), keys, values).unflatten(0, q.shape[:2])
