"""The delta rule: DeltaNet, Gated DeltaNet, KDA, DeltaProduct."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
from longscan.ops._delta_fused import delta_fits, delta_fused
from longscan.ops._delta_keys_fused import delta_keys_fits, delta_keys_fused
from longscan.ops._delta_scan import Factors, delta_scan
from longscan.ops._delta_shards import delta_spread, delta_spreads
from longscan.ops._layout import layout
from longscan.ops._scores import cumulative, vector_scores
from longscan.ops.dispatch import by_kernel, by_sequence, choose


def delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `delta`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        return by_sequence(delta_reference, [q, k, v, beta, log_a], state, cu_seqlens)
    k, v, beta = _with_steps(k, v, beta)
    heads = v.shape[3]
    q, k = q.repeat_interleave(heads // q.shape[2], 2), k.repeat_interleave(heads // q.shape[2], 3)
    s = state
    if s is None:
        s = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1])
    out = []
    for t in range(v.shape[1]):
        if log_a is not None:
            s = s * log_a[:, t].exp().view(*s.shape[:2], -1, 1)
        for j in range(k.shape[2]):
            kj = k[:, t, j].unsqueeze(-1)
            error = v[:, t, j].unsqueeze(-2) - kj.mT @ s
            s = s + beta[:, t, j].unsqueeze(-1).unsqueeze(-1) * kj * error
        out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, 1), s


def _with_steps(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give a step axis to the one-step form: [B, T, H, .] -> [B, T, 1, H, .]."""
    return (k, v, beta) if k.ndim == 5 else (k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2))


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `delta`.

    Shapes: q [B, Hk, K]; k [B, n, Hk, K]; v [B, n, H, V]; beta [B, n, H]; log_a [B, H] or
    [B, H, K]; state [B, H, K, V].
    """
    batch, heads, d_key, d_value = state.shape
    n = batch * heads
    s = state if log_a is None else state * log_a.exp().view(batch, heads, -1, 1)
    if q.shape[1] != heads:
        r = heads // q.shape[1]
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 2)
    s = s.view(n, d_key, d_value)
    for kj, vj, bj in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        kj = kj.reshape(n, 1, d_key)
        error = torch.baddbmm(vj.reshape(n, 1, d_value), kj, s, alpha=-1)
        s = torch.addcmul(s, kj.mT, error * bj.reshape(n, 1, 1))
    o = torch.bmm(q.reshape(n, 1, d_key), s)
    return o.view(batch, heads, d_value), s.view(batch, heads, d_key, d_value)


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `delta`: matrix products in chunks, a scan of states across them.

    With n steps per token, a chunk of C tokens has N = C n rows of keys and values and C queries.
    Row i belongs to token t(i); b is the cumulative log decay within the chunk, S enters it:

        L_ij = k_i . k_j exp(b_t(i) - b_t(j)),  j < i              (strictly lower)
        P_tj = q_t . k_j exp(b_t - b_t(j)),  t(j) <= t
        R    = V - K exp(b) S                                       what the state gets wrong
        V'   = (I + diag(beta) L)^-1 diag(beta) R                   what is written in the end
        o    = (q exp(b)) S + P V'
        S'   = diag(exp(b_end)) S + (K exp(b_end - b))^T V'
    """
    k, v, beta = _with_steps(k, v, beta)
    n = k.shape[2]
    plan = layout(v.shape[0], v.shape[1], max(1, chunk >> (n - 1).bit_length()), cu_seqlens)
    if state is None:
        state = v.new_zeros(plan.rows, v.shape[3], k.shape[4], v.shape[4])
    q = plan.split(q).transpose(1, 2).contiguous()
    k, v, beta = (plan.split(x).flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v, beta))
    if log_a is not None:
        log_a = plan.split(log_a).transpose(1, 2)
    r = v.shape[1] // k.shape[1]
    if r > 1:
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 1)
    if log_a is None or log_a.ndim == 3:
        # Without a gate a decay of one still masks what lies ahead.
        b = q.new_zeros(q.shape[:3]) if log_a is None else cumulative(log_a, -1)
        factors = Factors(q, k, b)
    else:
        factors = _factors(q, k, log_a)
    o, final = delta_scan(factors, v, beta.unsqueeze(-1), plan.rows_in(state), plan.counts)
    return plan.join(o.transpose(1, 2)), plan.rows_out(final)


def _factors(q: Tensor, k: Tensor, log_a: Tensor) -> Factors:
    """Factors with a gate per key channel.

    Shapes: q [G, H, C, K]; k [G, H, N, K]; log_a [G, H, C, K].
    """
    c, n = q.shape[2], k.shape[2] // q.shape[2]
    b = cumulative(log_a, -2)
    steps = k.unflatten(-2, (c, n))
    scores, lower = vector_scores([q.unsqueeze(-2), steps], steps, b)
    rows = b.repeat_interleave(n, -2) if n > 1 else b
    last = b[..., -1:, :]
    return Factors(
        q * b.exp2(),
        k * rows.exp2(),
        k_out=k * (last - rows).exp2(),
        scores=scores,
        lower=lower,
        end=last.exp2().mT,
    )


def delta_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None = None, *, chunk: int = 32
) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = M S_in + U, M [B, H, K, K].

    Shapes: as `delta`; map axes [B, H, K, V].
    """
    # The rule is affine with the same linear part for every column: columns of the identity
    # with v = 0 give M.
    with _across.within(None), full_precision(v):
        k, v, beta, log_a = cast(compute_dtype(k, v, beta, log_a), k, v, beta, log_a)
        heads, d_key, d_value = v.shape[-2], k.shape[-1], v.shape[-1]
        q = k.new_zeros(v.shape[0], v.shape[1], k.shape[-2], d_key)
        eye = torch.eye(d_key, dtype=k.dtype, device=k.device).expand(v.shape[0], heads, -1, -1)
        if v.is_cuda:  # kernels have limits on V
            zeros = v.new_zeros(*v.shape[:-1], d_key)
            _, m = delta(q, k, zeros, beta, log_a, state=eye.contiguous())
            return SegmentMap("matrix", m, delta(q, k, v, beta, log_a)[1])
        state, wide = F.pad(eye, (d_value, 0)), F.pad(v, (0, d_key))
        _, s = delta_chunked(q, k, wide, beta, log_a, state=state, chunk=chunk)
        u, m = s.split([d_value, d_key], -1)
        return SegmentMap("matrix", m, u)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_a: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule: decay the state, then write what it gets wrong; n writes per token.

    S <- diag(exp(log_a_t)) S_{t-1}
    S <- S + beta_tj k_tj (v_tj - S^T k_tj)^T      for j = 1..n
    S_t = S,   o_t = S_t^T q_t

    Shapes: q [B, T, Hk, K]; k [B, T, Hk, K]; v, o [B, T, H, V]; beta [B, T, H] in [0, 2]; with
    n steps per token k, v, beta have a step axis after T: [B, T, n, ...]. Each q/k head serves
    H / Hk consecutive value heads. log_a None, [B, T, H] or [B, T, H, K], natural-log decays <= 0;
    state [B, H, K, V]. cu_seqlens [n + 1] packs sequences on one row (B = 1), the state then has
    n rows. chunk: rows handled by one set of matrix products; None: 32 on a CPU, 64 elsewhere.
    Precision: states, gates, solves in float32 (float64 for float64 inputs), o in v's dtype.
    Nothing is scaled or normalised: k should have unit length, else the rule may diverge.
    Raises: ValueError, TypeError for shapes, dtypes, gates or cu_seqlens that do not fit.
    Source: DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), KDA (2510.26692),
    DeltaProduct (2502.10297).
    Differs: the steps of a token share its query instead of stretching it with zeros; with a gate
    per key channel any gate is exact (see `decay`).
    """
    check_floating(q=q, k=k, v=v, beta=beta, log_a=log_a, state=state)
    steps = v.ndim == 5
    if steps != (k.ndim == 5):
        raise ValueError(
            f"k and v must both have a step axis or neither; got {k.ndim} and {v.ndim} axes"
        )
    v1, k1 = (v[:, :, 0], k[:, :, 0]) if steps else (v, k)
    batch, length, heads, d_value = check_values(v1)
    d_key = check_keys(q, k1, v1)
    if steps:
        check_shape("k", k, (None, None, v.shape[2], None, None), "[B, T, n, Hk, K]")
    check_shape("beta", beta, tuple(v.shape[:-1]), "[B, T, (n,) H]")
    if log_a is not None:
        shape = (batch, length, heads, d_key)[: 4 if log_a.ndim == 4 else 3]
        check_shape("log_a", log_a, shape, "[B, T, H] or [B, T, H, K]")
        check_log_decay(log_a)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, heads, d_key, d_value), "[rows, H, K, V]")

    def segment(cut: slice) -> SegmentMap:
        gates = None if log_a is None else log_a[:, cut]
        return delta_segment(k[:, cut], v[:, cut], beta[:, cut], gates)

    shards = _across.active()
    if shards is not None and backend in (None, "triton"):
        given = (q, k, v, beta, log_a)
        if by_kernel("delta", v, lambda: delta_fits(*given) and delta_spreads(k, v)):
            with full_precision(v):
                return delta_spread(shards, *given, state, cu_seqlens)
    state = _across.entering(segment, state)
    dtype, out = compute_dtype(q, k, v, beta, log_a, state), v.dtype
    kernel, fits = delta_fused, delta_fits
    if log_a is not None and log_a.ndim == 4:
        kernel, fits = delta_keys_fused, delta_keys_fits
    forms = {"reference": delta_reference, "torch": delta_chunked, "triton": kernel}
    run = choose(
        "delta", v, backend, forms, lambda: dtype is torch.float32 and fits(q, k, v, beta, log_a)
    )
    with full_precision(v):
        if run is kernel and (length > 1 or cu_seqlens is not None):
            o, s = run(q, k, v, beta, log_a, state=state, cu_seqlens=cu_seqlens)
            return o.to(out), s
        q, k, v, beta, log_a, state = cast(dtype, q, k, v, beta, log_a, state)
        if run is delta_reference:
            o, s = run(q, k, v, beta, log_a, state=state, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            if state is None:
                state = v.new_zeros(batch, heads, d_key, d_value)
            gate = None if log_a is None else log_a[:, 0]
            if steps:  # else the time axis of one token stands for the axis of its one step
                k, v, beta = k[:, 0], v[:, 0], beta[:, 0]
            o, s = delta_step(q[:, 0], k, v, beta, gate, state)
            o = o.unsqueeze(1)
        else:
            chunk = chunk or (32 if v.device.type == "cpu" else 64)
            o, s = run(q, k, v, beta, log_a, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
    return o.to(out), s
