"""Diagonal plus rank one, a general delta rule: RWKV-7."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
from longscan.ops._scores import cumulative, vector_scores
from longscan.ops.dispatch import by_sequence, choose


def dplr_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    erase: Tensor,
    write: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `dplr`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        return by_sequence(dplr_reference, [q, k, v, log_a, erase, write], state, cu_seqlens)
    s = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if state is None else state
    out = []
    for t in range(v.shape[1]):
        read = erase[:, t].unsqueeze(-2) @ s
        s = s * log_a[:, t].exp().unsqueeze(-1)
        s = s + write[:, t].unsqueeze(-1) * read + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, 1), s


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `dplr`. Shapes: as `dplr` without the time axis."""
    batch, heads, d_key, d_value = state.shape
    s = state.view(-1, d_key, d_value)
    row, column = (-1, 1, d_key), (-1, d_key, 1)
    read = torch.bmm(erase.reshape(row), s)
    s = s * log_a.exp().reshape(column)
    s = torch.addcmul(s, write.reshape(column), read)
    s = torch.addcmul(s, k.reshape(column), v.reshape(-1, 1, d_value))
    o = torch.bmm(q.reshape(row), s)
    return o.view(batch, heads, d_value), s.view(batch, heads, d_key, d_value)


def dplr_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    erase: Tensor,
    write: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `dplr`: matrix products in chunks, a scan of states across them.

    Let b be the cumulative log decay within the chunk that S enters, e = erase, w = write, and
    r_t = S_{t-1}^T e_t what token t reads; X stands for w or k:

        L(X)_ti = sum_d e_td X_id exp(b_{t-1,d} - b_id),  i < t      (strictly lower)
        P(X)_ti = sum_d q_td X_id exp(b_td - b_id),       i <= t
        R  = (I - L(w))^-1 (L(k) V + e exp(b_{t-1}) S)
        o  = P(w) R + P(k) V + q exp(b) S
        S' = (w exp(b_end - b))^T R + (k exp(b_end - b))^T V + diag(exp(b_end)) S

    With the e of token t + 1 in the place of q, P is L one row early: one computation gives both.
    All that does not need S is computed for all chunks at once.
    """
    plan = layout(v.shape[0], v.shape[1], chunk, cu_seqlens)
    if state is None:
        state = v.new_zeros(plan.rows, v.shape[2], k.shape[3], v.shape[3])
    q, k, v, log_a, e, w = (plan.split(x).transpose(1, 2) for x in (q, k, v, log_a, erase, write))
    sizes, v = [v.shape[-1], k.shape[-1]], v.contiguous()
    b = cumulative(log_a, -2)
    c, last = b.shape[-2], b[..., -1:, :]
    columns = torch.stack([w, k], -2)
    (scores,) = vector_scores([torch.stack([q, _later(e)], -2)], columns, b)
    # [.., (token, q | e), (token, w | k)] -> two by two matrices.
    scores = scores.unflatten(-1, (c, 2)).unflatten(-3, (c, 2)).movedim((-3, -1), (0, 1))
    (p_w, p_k), (l_w, l_k) = scores.contiguous()
    # R is affine in S: the values R has for S = 0, and beside them what multiplies S.
    given = torch.cat([_earlier(l_k) @ v, e * _earlier(b).exp2()], -1)
    r = torch.linalg.solve_triangular(-_earlier(l_w), given, upper=False, unitriangular=True)
    out_w, out_k = (columns * (last - b).exp2().unsqueeze(-2)).unbind(-2)
    values, on_s = (torch.cat([p_w, out_w.mT], -2) @ r).split(sizes, -1)
    values = values + torch.cat([p_k, out_k.mT], -2) @ v
    inside, u = values.split([c, sizes[1]], -2)
    reader, m = on_s.split([c, sizes[1]], -2)
    maps = SegmentMap("matrix", m + torch.diag_embed(last.squeeze(-2).exp2()), u)
    entering, final = algebra.scan(maps, plan.rows_in(state), plan.counts)
    o = inside + (reader + q * b.exp2()) @ entering
    return plan.join(o.transpose(1, 2)), plan.rows_out(final)


def _earlier(x: Tensor) -> Tensor:
    """What the token before has, zero for the first. Shapes: [..., C, N]."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0))


def _later(x: Tensor) -> Tensor:
    """What the next token has, zero for the last."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1))


def dplr_segment(
    k: Tensor, v: Tensor, log_a: Tensor, erase: Tensor, write: Tensor, *, chunk: int = 32
) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = M S_in + U, M [B, H, K, K].

    Shapes: as `dplr`; map axes [B, H, K, V].
    """
    given = (k, v, log_a, erase, write)
    k, v, log_a, erase, write = cast(compute_dtype(*given), *given)
    d_key, d_value = k.shape[-1], v.shape[-1]
    # Every column of the state goes through the same linear part: columns of the identity,
    # with values of zero, come out as M.
    eye = torch.eye(d_key, dtype=k.dtype, device=k.device)
    state = F.pad(eye, (d_value, 0)).expand(k.shape[0], k.shape[2], -1, -1)
    wide = F.pad(v, (0, d_key))
    with full_precision(v):
        _, s = dplr_chunked(
            torch.zeros_like(k), k, wide, log_a, erase, write, state=state, chunk=chunk
        )
    u, m = s.split([d_value, d_key], -1)
    return SegmentMap("matrix", m, u)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    erase: Tensor,
    write: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A state whose transition is diagonal plus rank one: what `erase` reads, `write` puts back.

    S_t = (diag(exp(log_a_t)) + write_t erase_t^T) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t

    `erase` reads S_{t-1} before it decays. The delta rule with a gate per key channel (`delta`) is
    erase = -exp(log_a) k, write = beta k, with beta k in the place of k; RWKV-7 is
    erase = -kappa, write = kappa a, which frees the strength of each channel.

    Shapes: q, k, erase, write [B, T, H, K]; v, o [B, T, H, V]; log_a [B, T, H, K], natural-log
    decays <= 0; state [B, H, K, V]. cu_seqlens [n + 1] packs n sequences on one row (B = 1), the
    state then has n rows.
    chunk: tokens handled by one set of matrix products; None: 32 on a CPU, 64 elsewhere.
    Precision: states, gates, solves in float32 (float64 for float64 inputs), o in v's dtype.
    Nothing is scaled or normalised: where |diag(exp(log_a)) + write erase^T| > 1 the state grows.
    Raises: ValueError, TypeError for shapes, dtypes, gates above 0 or cu_seqlens that do not fit.
    Source: RWKV-7 (arXiv 2503.14456, time mixing).
    Differs: any gate is exact (see `decay`). The authors' kernel goes token by token, and back
    again by dividing by the gates, which is why these stay above exp(-0.61) in RWKV-7.
    """
    check_floating(q=q, k=k, v=v, log_a=log_a, erase=erase, write=write, state=state)
    batch, length, heads, d_value = check_values(v)
    check_shape("k", k, (batch, length, heads, None), "[B, T, H, K]")
    d_key = k.shape[3]
    for name, x in {"q": q, "log_a": log_a, "erase": erase, "write": write}.items():
        check_shape(name, x, (batch, length, heads, d_key), "[B, T, H, K]")
    check_log_decay(log_a)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, heads, d_key, d_value), "[rows, H, K, V]")
    state = _across.entering(
        lambda cut: dplr_segment(*(x[:, cut] for x in (k, v, log_a, erase, write))), state
    )
    dtype, out = compute_dtype(q, k, v, log_a, erase, write, state), v.dtype
    with full_precision(v):
        tokens = cast(dtype, q, k, v, log_a, erase, write)
        (state,) = cast(dtype, state)
        run = choose("dplr", v, backend, {"reference": dplr_reference, "torch": dplr_chunked})
        if run is dplr_reference:
            o, s = run(*tokens, state=state, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            before = tokens[2].new_zeros(batch, heads, d_key, d_value) if state is None else state
            o, s = dplr_step(*[x[:, 0] for x in tokens], state=before)
            o = o.unsqueeze(1)
        else:
            chunk = chunk or (32 if v.device.type == "cpu" else 64)
            o, s = run(*tokens, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
    return o.to(out), s


__all__ = ["dplr", "dplr_chunked", "dplr_reference", "dplr_segment", "dplr_step"]
