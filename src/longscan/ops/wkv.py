"""The weighted average of RWKV-4, one per channel."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longscan import algebra
from longscan.algebra import EMPTY, SegmentMap
from longscan.ops import _across
from longscan.ops._check import (
    cast,
    check_floating,
    check_log_decay,
    check_shape,
    check_state,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens, layout
from longscan.ops.dispatch import choose

WKVState = tuple[Tensor, Tensor]
"""(s, m): sums of weighted values and of weights, s [B, D, 2], divided by exp(m), m [B, D]."""

Sums = tuple[Tensor, Tensor, Tensor]
"""The two sums and the logarithm of their scale, apart."""


def _joined(first: Sums, second: Sums) -> Sums:
    """The sums over two sets of tokens, from those over each."""
    (num, den, m), (num2, den2, m2) = first, second
    top = torch.maximum(m, m2)
    one, two = (m - top).exp(), (m2 - top).exp()
    return num * one + num2 * two, den * one + den2 * two, top


def wkv_reference(
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    bonus: Tensor,
    *,
    state: WKVState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """The definition of `wkv`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        parts = []
        for i, (a, b) in enumerate(pairwise(check_cu_seqlens(cu_seqlens, *v.shape[:2]))):
            own = None if state is None else (state[0][i : i + 1], state[1][i : i + 1])
            parts.append(wkv_reference(k[:, a:b], v[:, a:b], log_a, bonus, state=own))
        s, m = (torch.cat(x) for x in zip(*(p[1] for p in parts), strict=True))
        return torch.cat([p[0] for p in parts], 1), (s, m)
    s, m = first_state(v) if state is None else state
    num, den = s.unbind(-1)
    one = torch.ones_like(den)
    out = []
    for kt, vt in zip(k.unbind(1), v.unbind(1), strict=True):
        top, bottom, _ = _joined((num, den, m), (vt, one, kt + bonus))
        out.append(top / bottom)
        num, den, m = _joined((num, den, m + log_a), (vt, one, kt))
    return torch.stack(out, 1), (torch.stack([num, den], -1), m)


def first_state(v: Tensor, rows: int | None = None) -> WKVState:
    """The state before the first token, in the dtype of v [B, ..., D]: no weight at all."""
    rows, d = rows or v.shape[0], v.shape[-1]
    return v.new_zeros(rows, d, 2), v.new_full((rows, d), EMPTY)


def wkv_chunked(
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    bonus: Tensor,
    *,
    state: WKVState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, WKVState]:
    """The fast torch form of `wkv`: a loop over the tokens of all chunks at once, one over chunks.

    Sums over tokens join associatively (`_joined`); a decay only moves their scale. Once the sums
    before each chunk are known, its tokens are walked again, which takes less memory and no more
    time than to keep the sums of the first walk.
    """
    batch, length = v.shape[:2]
    # Half as many tokens in a chunk as there are chunks: the loops are shortest together.
    plan = layout(batch, length, chunk or 1 << (length.bit_length() - 1) // 2, cu_seqlens)
    s, m = first_state(v, plan.rows) if state is None else state
    here = plan.split(torch.ones_like(k[..., :1]))
    decay = here * log_a
    k, v = torch.where(here > 0, plan.split(k), EMPTY), plan.split(v)
    one = torch.ones_like(v[:, 0])
    now: Sums = (torch.zeros_like(one), torch.zeros_like(one), torch.full_like(one, EMPTY))
    steps = list(zip(k.unbind(1), v.unbind(1), decay.unbind(1), strict=True))
    for kt, vt, dt in steps:
        num, den, log_scale = now
        now = _joined((num, den, log_scale + dt), (vt, one, kt))
    num, den, log_scale = now
    maps = SegmentMap("diagonal", decay.sum(1), torch.stack([num, den], -1), log_scale)
    entering, (s, m) = algebra.scan(maps, (plan.rows_in(s), plan.rows_in(m)), plan.counts)
    num, den = entering[0].unbind(-1)
    now, out = (num, den, entering[1]), []
    for kt, vt, dt in steps:
        top, bottom, _ = _joined(now, (vt, one, kt + bonus))
        out.append(top / bottom)
        num, den, log_scale = now
        now = _joined((num, den, log_scale + dt), (vt, one, kt))
    return plan.join(torch.stack(out, 1)), (plan.rows_out(s), plan.rows_out(m))


def wkv_segment(k: Tensor, v: Tensor, log_a: Tensor) -> SegmentMap:
    """The map of a whole stretch on the state, a scaled one.

    Shapes: as `wkv`; map axes [B, D, 2].
    """
    length = k.shape[1]
    age = torch.arange(length - 1, -1, -1, dtype=k.dtype, device=k.device)
    w = k + age.unsqueeze(-1) * log_a
    m = w.amax(1)
    w = (w - m.unsqueeze(1)).exp()
    s = torch.stack([(w * v).sum(1), w.sum(1)], -1)
    return SegmentMap("diagonal", (length * log_a).expand_as(m), s, m)


def _entering(k: Tensor, v: Tensor, log_a: Tensor, state: WKVState | None, rows: int) -> WKVState:
    """The states that a shard of tokens starts from: a head of one key for each channel."""

    def segment(cut: slice) -> SegmentMap:
        with full_precision(v):
            of = wkv_segment(*cast(compute_dtype(k, v, log_a), k[:, cut], v[:, cut], log_a))
        assert of.a is not None
        assert of.m is not None
        return SegmentMap("diagonal", of.a.unsqueeze(-1), of.u.unsqueeze(-2), of.m.unsqueeze(-1))

    if state is None:
        state = first_state(v, rows)
    s, m = _across.entering(segment, (state[0].unsqueeze(-2), state[1].unsqueeze(-1)))
    return s.squeeze(-2), m.squeeze(-1)


def wkv(
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    bonus: Tensor,
    *,
    state: WKVState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, WKVState]:
    """A running average of values with exponential weights that decay, and a bonus for the last.

    o_t = (sum_{i<t} exp((t - 1 - i) log_a + k_i) v_i + exp(bonus + k_t) v_t) / (same without v)

    Shapes: k, v, o [B, T, D]; log_a, bonus [D], log_a <= 0 natural-log decays; state (s, m):
    s [B, D, 2], the sums of weighted values and of weights, divided by exp(m), m [B, D].
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    chunk: tokens that follow each other in the first loop, a power of two; None: near the square
    root of T / 2. Changes speed, not the result.
    Precision: sums in float32 (float64 for float64 inputs), o in v's dtype; exponentials of
    non-positive numbers only.
    Raises: ValueError, TypeError for shapes, dtypes, decays above 0 or cu_seqlens that do not fit.
    Source: RWKV-4 (arXiv 2305.13048, time mixing; its appendix on a numerically stable form).
    """
    s, m = state or (None, None)
    check_floating(k=k, v=v, log_a=log_a, bonus=bonus, s=s, m=m)
    if v.ndim != 3 or v.shape[1] == 0:
        raise ValueError(f"v must have shape [B, T >= 1, D], got {list(v.shape)}")
    d = v.shape[2]
    check_shape("k", k, tuple(v.shape), "[B, T, D]")
    check_shape("log_a", log_a, (d,), "[D]")
    check_shape("bonus", bonus, (d,), "[D]")
    check_log_decay(log_a.unsqueeze(0))
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("s", s, (rows, d, 2), "[rows, D, 2]")
    check_state("m", m, (rows, d), "[rows, D]")
    if _across.active() is not None:
        s, m = _entering(k, v, log_a, state, rows)
    dtype, out = compute_dtype(k, v, log_a, bonus, s, m), v.dtype
    with full_precision(v):
        k, v, log_a, bonus, s, m = cast(dtype, k, v, log_a, bonus, s, m)
        before = None if s is None or m is None else (s, m)
        run = choose("wkv", v, backend, {"reference": wkv_reference, "torch": wkv_chunked})
        if run is wkv_reference or (v.shape[1] == 1 and cu_seqlens is None):
            o, after = wkv_reference(k, v, log_a, bonus, state=before, cu_seqlens=cu_seqlens)
        else:
            o, after = run(k, v, log_a, bonus, state=before, cu_seqlens=cu_seqlens, chunk=chunk)
    return o.to(out), after


__all__ = ["wkv", "wkv_chunked", "wkv_reference", "wkv_segment"]
