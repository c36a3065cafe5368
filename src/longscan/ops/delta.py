"""The delta rule: DeltaNet, Gated DeltaNet, KDA, DeltaProduct."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

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
    r = v.shape[3] // k.shape[3]
    q = plan.split(q).transpose(1, 2).contiguous()
    k, v, beta = (plan.split(x).flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v, beta))
    if log_a is not None:
        log_a = plan.split(log_a).transpose(1, 2)
    factors = _vector if log_a is not None and log_a.ndim == 4 else _scalar
    o, final, *_ = _delta_scan(
        *factors(q, k, log_a, r), v, beta.unsqueeze(-1), plan.rows_in(state), plan.counts
    )
    return plan.join(o.transpose(1, 2)), plan.rows_out(final)


Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Of each chunk and value head: P [G, H, C, N], L [G, H, N, N] (its strictly lower part counts),
q exp(b) [G, H, C, K], K exp(b) and K exp(b_end - b) [G, H, N, K], exp(b_end) [G, H, K or 1, 1]."""


def _scalar(q: Tensor, k: Tensor, log_a: Tensor | None, r: int) -> Factors:
    """Factors without a gate or with one number per head; r value heads share a key head.

    Shapes: q [G, Hk, C, K]; k [G, Hk, N, K]; log_a [G, H, C].
    """
    c, n = q.shape[2], k.shape[2] // q.shape[2]
    q, k, qk, kk = (_shared(x, r) for x in (q, k, q @ k.mT, k @ k.mT))
    if log_a is None:
        token = torch.arange(c, device=q.device)
        later = token.unsqueeze(-1) < token.repeat_interleave(n)
        return qk.masked_fill(later, 0), kk, q, k, k, None
    b = cumulative(log_a, -1)
    decay = decay_factors(b)
    b_rows = b
    if n > 1:
        b_rows = b.repeat_interleave(n, -1)
        kk = kk * decay_factors(b_rows)
        decay = decay.repeat_interleave(n, -1)
    else:
        kk = kk * decay
    last = b[..., -1:]
    q_in = q * b.exp2().unsqueeze(-1)
    k_in, k_out = k * b_rows.exp2().unsqueeze(-1), k * (last - b_rows).exp2().unsqueeze(-1)
    return qk * decay, kk, q_in, k_in, k_out, last.exp2().unsqueeze(-1)


def _shared(x: Tensor, r: int) -> Tensor:
    """Repeat each key head for the r value heads it serves."""
    return x.repeat_interleave(r, 1) if r > 1 else x


def _vector(q: Tensor, k: Tensor, log_a: Tensor, r: int) -> Factors:
    """Factors with a gate per key channel. Shapes as `_scalar`, log_a [G, H, C, K]."""
    c, n = q.shape[2], k.shape[2] // q.shape[2]
    q, k = _shared(q, r), _shared(k, r)
    b = cumulative(log_a, -2)
    steps = k.unflatten(-2, (c, n))
    qk, kk = vector_scores([q.unsqueeze(-2), steps], steps, b)
    b_rows = b.repeat_interleave(n, -2) if n > 1 else b
    last = b[..., -1:, :]
    return qk, kk, q * b.exp2(), k * b_rows.exp2(), k * (last - b_rows).exp2(), last.exp2().mT


@torch.library.custom_op("longscan::delta_scan", mutates_args=())
def _delta_scan(
    scores: Tensor,
    lower: Tensor,
    q_in: Tensor,
    k_in: Tensor,
    k_out: Tensor,
    end: Tensor | None,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    counts: list[int],
) -> list[Tensor]:
    """States and outputs of all chunks from their factors, see `delta_chunked`.

    -> o [G, H, C, V], final state, and for the backward: the inverse, R, V' and the states that
    enter. The backward is written out: autograd would keep and visit every step of the loop.
    """
    g, h, n, _ = v.shape
    eye = torch.eye(n, dtype=v.dtype, device=v.device).expand(g, h, n, n)
    inverse = torch.linalg.solve_triangular(
        beta * lower.tril(-1), eye, upper=False, unitriangular=True
    )
    solve = (inverse * beta.mT).flatten(0, 1)
    entering = v.new_empty(g * h, *state.shape[2:])
    wrong, written = torch.empty_like(v), torch.empty_like(v)
    scores, q_in, k_in, k_out, v_, wrong_, written_ = (
        x.flatten(0, 1) for x in (scores, q_in, k_in, k_out, v, wrong, written)
    )
    state = state.clone()
    s = state.flatten(0, 1)
    for part in _parts(counts, h):
        now = s[: part.stop - part.start]
        entering[part] = now
        torch.baddbmm(v_[part], k_in[part], now, alpha=-1, out=wrong_[part])
        torch.bmm(solve[part], wrong_[part], out=written_[part])
        if end is not None:
            now *= end.flatten(0, 1)[part]
        now.baddbmm_(k_out[part].mT, written_[part])
    o = torch.bmm(scores, written_).baddbmm_(q_in, entering)
    return [o.unflatten(0, (g, h)), state, inverse, wrong, written, entering.unflatten(0, (g, h))]


@_delta_scan.register_fake
def _(scores, lower, q_in, k_in, k_out, end, v, beta, state, counts):
    entering = v.new_empty(*v.shape[:2], *state.shape[2:])
    o = v.new_empty(*q_in.shape[:3], v.shape[3])
    empty = (torch.empty_like(x) for x in (state, lower, v, v))
    return [o, *empty, entering]


@torch.library.custom_op("longscan::delta_scan_backward", mutates_args=())
def _delta_scan_backward(
    scores: Tensor,
    lower: Tensor,
    q_in: Tensor,
    k_in: Tensor,
    k_out: Tensor,
    end: Tensor | None,
    beta: Tensor,
    inverse: Tensor,
    wrong: Tensor,
    written: Tensor,
    entering: Tensor,
    do: Tensor,
    ds: Tensor,
    counts: list[int],
) -> list[Tensor]:
    """Gradients of scores, lower, q_in, k_in, k_out, v, beta, state and, with gates, end."""
    g, h = beta.shape[:2]
    scores, q_in, k_in, k_out, wrong, written, entering, do = (
        x.flatten(0, 1) for x in (scores, q_in, k_in, k_out, wrong, written, entering, do)
    )
    solve = (inverse * beta.mT).flatten(0, 1)
    d_written, d_entering = scores.mT @ do, q_in.mT @ do
    d_wrong, leaving = torch.empty_like(wrong), torch.empty_like(entering)
    d_state = ds.clone()
    d = d_state.flatten(0, 1)
    for part in reversed(_parts(counts, h)):
        now = d[: part.stop - part.start]
        leaving[part] = now
        d_written[part].baddbmm_(k_out[part], now)
        torch.bmm(solve[part].mT, d_written[part], out=d_wrong[part])
        if end is not None:
            now *= end.flatten(0, 1)[part]
        now += d_entering[part]
        now.baddbmm_(k_in[part].mT, d_wrong[part], alpha=-1)
    d_solve = (d_written @ wrong.mT).unflatten(0, (g, h))
    d_lower = (inverse.mT @ (d_solve * beta.mT) @ inverse.mT).tril_(-1).neg_()
    d_beta = (d_solve * inverse).sum(-2).unsqueeze(-1) + (d_lower * lower).sum(-1, True)
    grads = [
        (do @ written.mT).unflatten(0, (g, h)),
        beta * d_lower,
        (do @ entering.mT).unflatten(0, (g, h)),
        (d_wrong @ entering.mT).neg_().unflatten(0, (g, h)),
        (written @ leaving.mT).unflatten(0, (g, h)),
        d_wrong.unflatten(0, (g, h)),
        d_beta,
        d_state,
    ]
    if end is not None:
        through = (entering * leaving).unflatten(0, (g, h))
        per_head = end.shape[-2] == 1
        grads.append(through.sum((-1, -2) if per_head else -1).view_as(end))
    return grads


@_delta_scan_backward.register_fake
def _(scores, lower, q_in, k_in, k_out, end, beta, inverse, wrong, written, entering, do, ds, n):
    like = [scores, lower, q_in, k_in, k_out, wrong, beta, ds, *([] if end is None else [end])]
    return [torch.empty_like(x) for x in like]


def _save(ctx, inputs, output) -> None:
    *factors, end, _, beta, _, ctx.counts = inputs
    ctx.save_for_backward(*factors, end, beta, *output[2:])


def _gradients(ctx, grads: list[Tensor]):
    grads = _delta_scan_backward(*ctx.saved_tensors, grads[0], grads[1], ctx.counts)
    *factors, v, beta, state = grads[:8]
    return *factors, (grads[8] if len(grads) > 8 else None), v, beta, state, None


_delta_scan.register_autograd(_gradients, setup_context=_save)


def _parts(counts: list[int], heads: int) -> list[slice]:
    """Where each step of a scan lies among the flattened [G * H] chunks."""
    bounds = [0, *accumulate(n * heads for n in counts)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def delta_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None = None, *, chunk: int = 32
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
    chunk: int = 32,
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
