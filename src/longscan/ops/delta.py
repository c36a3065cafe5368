"""The delta rule: DeltaNet, Gated DeltaNet, KDA, DeltaProduct."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan import algebra
from longscan.algebra import SegmentMap
from longscan.ops._check import (
    check_floating,
    check_keys,
    check_log_decay,
    check_shape,
    check_state,
    check_values,
    compute_dtype,
)
from longscan.ops._layout import layout
from longscan.ops._scores import cumulative, decay_factors, vector_scores
from longscan.ops.dispatch import by_sequence, choose


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
    s = state
    if log_a is not None:
        s = s * log_a.exp().view(batch, heads, -1, 1)
    if q.shape[1] != heads:
        r = heads // q.shape[1]
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 2)
    s = s.reshape(-1, d_key, d_value)
    for j in range(k.shape[1]):
        kj = k[:, j].reshape(-1, 1, d_key)
        error = torch.baddbmm(v[:, j].reshape(-1, 1, d_value), kj, s, alpha=-1)
        s = torch.baddbmm(s, (kj * beta[:, j].reshape(-1, 1, 1)).mT, error)
    o = torch.bmm(q.reshape(-1, 1, d_key), s)
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
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `delta`: each chunk becomes one affine map of state and outputs.

    With n steps per token, a chunk of C tokens has N = C n rows of keys and values and C queries.
    Rows i, j of token t(i), t(j); b the cumulative log decay within the chunk:

        M_ij = beta_i k_i . k_j exp(b_t(i) - b_t(j)),  j < i         (strictly lower)
        X    = (I + M)^-1 diag(beta)
        P_tj = q_t . k_j exp(b_t - b_t(j)),  t(j) <= t
        W    = X (K exp(b)),   U = X V                               new values: U - W S
        o    = P U + (q exp(b) - P W) S
        S'   = (diag(exp(b_end)) - D^T W) S + D^T U,   D = K exp(b_end - b)
    """
    k, v, beta = _with_steps(k, v, beta)
    n = k.shape[2]
    plan = layout(v.shape[0], v.shape[1], max(1, chunk >> (n - 1).bit_length()), cu_seqlens)
    (groups, d_key), (heads, d_value) = k.shape[3:], v.shape[3:]
    if state is None:
        state = v.new_zeros(plan.rows, heads, d_key, d_value)
    q = plan.split(q).transpose(1, 2)
    k, v, beta = (plan.split(x).flatten(1, 2).transpose(1, 2) for x in (k, v, beta))
    if log_a is not None:
        log_a = plan.split(log_a).transpose(1, 2)
    r = heads // groups
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    maps, out, reader = _chunk_maps(q, k, v, beta.unsqueeze(-1), log_a, r)
    entering, final = algebra.scan(maps, plan.rows_in(state), plan.counts)
    o = (out + reader @ entering).transpose(1, 2)
    return plan.join(o), plan.rows_out(final)


def _chunk_maps(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, r: int
) -> tuple[SegmentMap, Tensor, Tensor]:
    """The map of each chunk, its outputs for S = 0, and the matrix that reads S.

    Shapes: q [G, Hk, C, K]; k [G, Hk, N, K]; v [G, H, N, V]; beta [G, H, N, 1];
    log_a [G, H, C] or [G, H, C, K].
    """
    c, rows = q.shape[2], k.shape[2]
    n = rows // c
    if log_a is not None and log_a.ndim == 4:
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 1)
        b = cumulative(log_a, -2)
        q_steps, k_steps = q.unsqueeze(-2), k.unflatten(-2, (c, n))
        qk, kk = vector_scores([q_steps, k_steps], k_steps, b)
        b_rows = b.repeat_interleave(n, -2) if n > 1 else b
        last = b[..., -1:, :]
        end = last.exp().mT
    else:
        qk, kk = q @ k.mT, k @ k.mT
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 1)
        qk, kk = qk.repeat_interleave(r, 1), kk.repeat_interleave(r, 1)
        b = b_rows = last = end = None
        if log_a is None:
            token = torch.arange(c, device=q.device)
            qk = qk.masked_fill(token.unsqueeze(-1) < token.repeat_interleave(n), 0)
        else:
            b = cumulative(log_a, -1).unsqueeze(-1)
            factors = decay_factors(b.squeeze(-1))
            b_rows = b.repeat_interleave(n, -2) if n > 1 else b
            kk = kk * decay_factors(b_rows.squeeze(-1))
            qk = qk * (factors.repeat_interleave(n, -1) if n > 1 else factors)
            last = b[..., -1:, :]
            end = last.exp()
    k_in = k if b_rows is None else k * b_rows.exp()
    k_out = k if b_rows is None or last is None else k * (last - b_rows).exp()
    q_in = q if b is None else q * b.exp()

    # One unit lower triangular solve gives both U and W.
    m = (beta * kk).tril(-1)
    solved = torch.linalg.solve_triangular(
        m, beta * torch.cat([v, k_in], -1), upper=False, unitriangular=True
    )
    out, through = (qk @ solved).split([v.shape[-1], k.shape[-1]], -1)
    u, a = (k_out.mT @ solved).split([v.shape[-1], k.shape[-1]], -1)
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return SegmentMap("matrix", (eye if end is None else eye * end) - a, u), out, q_in - through


def delta_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None = None, *, chunk: int = 64
) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = M S_in + U, M [B, H, K, K].

    Shapes: as `delta`; map axes [B, H, K, V].
    """
    heads, d_key = v.shape[-2], k.shape[-1]
    q = k.new_zeros(v.shape[0], v.shape[1], k.shape[-2], d_key)
    # The rule is affine with the same linear part for every column: columns of the identity
    # with v = 0 give M.
    eye = torch.eye(d_key, dtype=k.dtype, device=k.device)
    state = torch.cat([v.new_zeros(v.shape[0], heads, d_key, v.shape[-1]),
                       eye.expand(v.shape[0], heads, -1, -1)], -1)  # fmt: skip
    wide = torch.cat([v, v.new_zeros(*v.shape[:-1], d_key)], -1)
    _, s = delta_chunked(q, k, wide, beta, log_a, state=state, chunk=chunk)
    u, m = s.split([v.shape[-1], d_key], -1)
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
    chunk: int = 64,
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
    n rows. chunk: rows handled by one set of matrix products.
    Precision: states, gates, solves in float32 (float64 for float64 inputs), o in v's dtype.
    Nothing is scaled or normalised: k should have unit length, else the rule may diverge.
    Raises: ValueError, TypeError for shapes, dtypes, gates or cu_seqlens that do not fit.
    Source: DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), KDA (2510.26692),
    DeltaProduct (2502.10297).
    Differs: chunks become affine maps (A, U) with an affine read, so the loop across chunks is
    one K x K product; the steps of a token share its query instead of stretching it with zeros.
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
    dtype, out = compute_dtype(q, k, v, beta, log_a, state), v.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, beta = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
        log_a = None if log_a is None else log_a.to(dtype)
        state = None if state is None else state.to(dtype)
        run = choose("delta", v, backend, {"reference": delta_reference, "torch": delta_chunked})
        if run is delta_reference:
            o, s = run(q, k, v, beta, log_a, state=state, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            if state is None:
                state = v.new_zeros(batch, heads, d_key, d_value)
            gate = None if log_a is None else log_a[:, 0]
            k, v, beta = (x[:, 0] for x in _with_steps(k, v, beta))
            o, s = delta_step(q[:, 0], k, v, beta, gate, state)
            o = o.unsqueeze(1)
        else:
            o, s = run(q, k, v, beta, log_a, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
    return o.to(out), s
