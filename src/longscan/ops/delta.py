"""The delta rule: DeltaNet, Gated DeltaNet, KDA, DeltaProduct."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    full_precision,
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
    n = batch * heads
    s = state if log_a is None else state * log_a.exp().view(batch, heads, -1, 1)
    if q.shape[1] != heads:
        r = heads // q.shape[1]
        q, k = q.repeat_interleave(r, 1), k.repeat_interleave(r, 2)
    s = s.view(n, d_key, d_value)
    for kj, vj, bj in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        kj = kj.reshape(n, 1, d_key)
        error = torch.baddbmm(vj.reshape(n, 1, d_value), kj, s, alpha=-1)
        s = torch.baddbmm(s, kj.mT, error * bj.reshape(n, 1, 1))
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
    r = v.shape[3] // k.shape[3]
    q = plan.split(q).transpose(1, 2).contiguous()
    k, v, beta = (plan.split(x).flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v, beta))
    if log_a is not None:
        log_a = plan.split(log_a).transpose(1, 2)
    factors = _vector if log_a is not None and log_a.ndim == 4 else _scalar
    inputs = (*factors(q, k, log_a, r), v, beta.unsqueeze(-1), plan.rows_in(state))
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, *_ = _delta_scan(*inputs, plan.counts, keep)
    return plan.join(o.transpose(1, 2)), plan.rows_out(final)


Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Of each chunk and value head: scores q . k [G, H, C, N] and k . k [G, H, N, N], the reader
[G, H, C, K], the keys that ask and the keys that write [G, H, N, K], then either the cumulative
decays of tokens b [G, H, C], which apply to all of these, or, if they are in these already, what
remains of the state at the end [G, H, K, 1]."""


def _scalar(q: Tensor, k: Tensor, log_a: Tensor | None, r: int) -> Factors:
    """Factors without a gate or with one number per head; r value heads share a key head.

    Shapes: q [G, Hk, C, K]; k [G, Hk, N, K]; log_a [G, H, C].
    """
    q, k, qk, kk = (_shared(x, r) for x in (q, k, q @ k.mT, k @ k.mT))
    # Without a gate a decay of one still masks what lies ahead.
    b = q.new_zeros(q.shape[:3]) if log_a is None else cumulative(log_a, -1)
    return qk, kk, q, k, k, b, None


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
    k_out = k * (last - b_rows).exp2()
    return qk, kk, q * b.exp2(), k * b_rows.exp2(), k_out, None, last.exp2().mT


@dataclass
class _Decay:
    """The decays of a chunk with one gate per head, as factors of its rows (see `_delta_scan`)."""

    among: Tensor  # exp(b_t - b_t(j)) [G * H, C, N], zero where token t(j) is later
    rows: Tensor  # exp(b_t(i) - b_t(j)) [G * H, N, N], zero where token t(j) is later
    reads: Tensor  # exp(b_t) [G * H, C, 1]
    asks: Tensor  # exp(b_t(i)) [G * H, N, 1]
    writes: Tensor  # exp(b_end - b_t(i)) [G * H, N, 1]
    end: Tensor  # exp(b_end) [G * H, 1, 1]

    @staticmethod
    def of(b: Tensor, n: int) -> _Decay:
        b = b.flatten(0, 1)
        steps = n // b.shape[1]
        among = decay_factors(b)
        reads = b.exp2().unsqueeze(-1)
        writes = (b[:, -1:] - b).exp2().unsqueeze(-1)
        end = reads[:, -1:]
        if steps == 1:
            return _Decay(among, among, reads, reads, writes, end)
        columns = among.repeat_interleave(steps, -1)
        rows = columns.repeat_interleave(steps, -2)
        asks, writes = (x.repeat_interleave(steps, 1) for x in (reads, writes))
        return _Decay(columns, rows, reads, asks, writes, end)


@torch.library.custom_op("longscan::delta_scan", mutates_args=())
def _delta_scan(
    scores: Tensor,
    lower: Tensor,
    q: Tensor,
    k_in: Tensor,
    k_out: Tensor,
    b: Tensor | None,
    end: Tensor | None,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    counts: list[int],
    keep: bool,
) -> list[Tensor]:
    """States and outputs of all chunks from their `Factors`, see `delta_chunked`.

    -> o [G, H, C, V], final state, and if `keep`, for the backward: (I + diag(beta) L)^-1, V'
    and the states that enter. The backward is written out: autograd would keep and visit every
    step of the loop.
    """
    g, h, n, _ = v.shape
    scores, lower, q, k_in, k_out, flat_v, beta = (
        x.flatten(0, 1) for x in (scores, lower, q, k_in, k_out, v, beta)
    )
    decay = None if b is None else _Decay.of(b, n)
    if decay is not None:
        scores, lower, end = scores * decay.among, lower * decay.rows, decay.end
    elif end is not None:
        end = end.flatten(0, 1)
    inverse = _inverse(lower, beta)
    solve = inverse * beta.mT
    fresh = solve @ flat_v
    if decay is not None:
        solve.mul_(decay.asks.mT)
    entering = v.new_empty(g * h if keep else 0, *state.shape[2:])
    o = v.new_empty(g, h, q.shape[1], v.shape[3])
    flat_o = o.view(g * h, *o.shape[2:])
    state = state.clone()
    s = state.flatten(0, 1)
    for part in _parts(counts, h):
        now = s[: part.stop - part.start]
        if keep:
            entering[part] = now
        written = fresh[part].baddbmm_(solve[part], k_in[part] @ now, alpha=-1)
        out = torch.bmm(q[part], now, out=flat_o[part])
        if decay is not None:
            out *= decay.reads[part]
        out.baddbmm_(scores[part], written)
        if end is not None:
            now *= end[part]
        scaled = written if decay is None else written * decay.writes[part]
        now.baddbmm_(k_out[part].mT, scaled)
    kept = [inverse, fresh, entering] if keep else [v.new_empty(0) for _ in range(3)]
    return [o, state, *kept]


def _inverse(lower: Tensor, beta: Tensor) -> Tensor:
    """(I + diag(beta) strictly_lower)^-1 [G * H, N, N]."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    # Unit lower triangular: the solver reads neither the diagonal nor what is above.
    return torch.linalg.solve_triangular(
        beta * lower, eye.expand_as(lower), upper=False, unitriangular=True
    )


@_delta_scan.register_fake
def _(scores, lower, q, k_in, k_out, b, end, v, beta, state, counts, keep):
    o = v.new_empty(*q.shape[:3], v.shape[3])
    g = v.shape[0] * v.shape[1]
    shapes = ((g, *x.shape[2:]) for x in (lower, v, state))
    kept = [v.new_empty(shape if keep else 0) for shape in shapes]
    return [o, torch.empty_like(state), *kept]


@torch.library.custom_op("longscan::delta_scan_backward", mutates_args=())
def _delta_scan_backward(
    scores: Tensor,
    lower: Tensor,
    q: Tensor,
    k_in: Tensor,
    k_out: Tensor,
    b: Tensor | None,
    end: Tensor | None,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    written: Tensor,
    entering: Tensor,
    do: Tensor,
    ds: Tensor,
    counts: list[int],
) -> list[Tensor]:
    """Gradients of scores, lower, q, k_in, k_out, v, beta, state, and of b or end if given."""
    g, h, n, _ = v.shape
    shape = (g, h)
    scores, lower, q, k_in, k_out, v, beta, do = (
        x.flatten(0, 1) for x in (scores, lower, q, k_in, k_out, v, beta, do.contiguous())
    )
    decay = None if b is None else _Decay.of(b, n)
    asked = k_in @ entering
    do_read = do
    through = None if end is None else end.flatten(0, 1)
    if decay is not None:
        scores, lower, through = scores * decay.among, lower * decay.rows, decay.end
        asked *= decay.asks
        do_read = do * decay.reads
    wrong = v - asked
    solve = inverse * beta.mT
    d_written, d_entering = scores.mT @ do, q.mT @ do_read
    d_wrong, leaving = torch.empty_like(v), torch.empty_like(entering)
    d_state = ds.clone()
    d = d_state.flatten(0, 1)
    for part in reversed(_parts(counts, h)):
        now = d[: part.stop - part.start]
        leaving[part] = now
        if decay is None:
            d_written[part].baddbmm_(k_out[part], now)
        else:
            d_written[part].addcmul_(k_out[part] @ now, decay.writes[part])
        x = torch.bmm(solve[part].mT, d_written[part], out=d_wrong[part])
        if decay is not None:
            x = x * decay.asks[part]
        if through is not None:
            now *= through[part]
        now += d_entering[part]
        now.baddbmm_(k_in[part].mT, x, alpha=-1)
    del d_entering
    d_solve = d_written @ wrong.mT
    d_lower = (inverse.mT @ (d_solve * beta.mT) @ inverse.mT).tril_(-1).neg_()
    d_beta = (d_solve * inverse).sum(-2).unsqueeze(-1) + (d_lower * lower).sum(-1, True)
    d_lower *= beta
    d_scores = do @ written.mT
    d_ask, sent = d_wrong, written
    if decay is not None:
        d_ask, sent = d_wrong * decay.asks, written * decay.writes
    d_q, d_k_out = do_read @ entering.mT, sent @ leaving.mT
    last = []
    if decay is not None:
        d_b = _decay_gradient(
            decay, d_scores * scores, d_lower * lower, d_q * q,
            d_wrong * asked, d_k_out * k_out, entering * leaving,
        )  # fmt: skip
        last = [d_b]
        d_scores *= decay.among
        d_lower *= decay.rows
    elif end is not None:
        last = [(entering * leaving).sum(-1, True)]
    grads = [
        d_scores,
        d_lower,
        d_q,
        (d_ask @ entering.mT).neg_(),
        d_k_out,
        d_wrong,
        d_beta,
    ]
    first = [x.unflatten(0, shape) for x in grads]
    return [*first, d_state, *(x.unflatten(0, shape) for x in last)]


def _decay_gradient(
    decay: _Decay, scores: Tensor, lower: Tensor, reads: Tensor, asks: Tensor, writes: Tensor,
    ends: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of b [G * H, C] from the products of each decayed term and its gradient."""
    c = decay.reads.shape[1]
    written = writes.sum(-1)
    rows = lower.sum(-1) - lower.sum(-2) - scores.sum(-2) - asks.sum(-1) - written
    d_b = rows.unflatten(1, (c, -1)).sum(-1) + scores.sum(-1) + reads.sum(-1)
    d_b[:, -1] += written.sum(-1) + ends.sum((-1, -2)) * decay.end.view(-1)
    return d_b * math.log(2)


@_delta_scan_backward.register_fake
def _(scores, lower, q, k_in, k_out, b, end, v, beta, inverse, written, entering, do, ds, counts):
    last = [x for x in (b, end) if x is not None]
    return [torch.empty_like(x) for x in (scores, lower, q, k_in, k_out, v, beta, ds, *last)]


def _save(ctx, inputs, output) -> None:
    *factors, _, ctx.counts, _ = inputs
    ctx.shapes = [x.shape for x in output[:2]]
    ctx.save_for_backward(*factors, *output[2:])
    ctx.set_materialize_grads(False)  # what is only kept for the backward has no gradient


def _gradients(ctx, grads: list[Tensor]):
    saved = ctx.saved_tensors
    do, ds = (
        saved[7].new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, ctx.shapes, strict=False)
    )
    out = _delta_scan_backward(*saved, do, ds, ctx.counts)
    d_b = out[8] if saved[5] is not None else None
    d_end = out[8] if saved[6] is not None else None
    return *out[:5], d_b, d_end, *out[5:8], None, None


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
    with full_precision(v):
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
