"""The matrix memory of xLSTM (mLSTM): linear attention with exponential gates and a normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import algebra
from longscan.algebra import EMPTY, SegmentMap
from longscan.ops import _across
from longscan.ops._check import (
    cast,
    check_floating,
    check_keys,
    check_shape,
    check_state,
    check_values,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import Layout, check_cu_seqlens, layout
from longscan.ops._mlstm_fused import mlstm_fits, mlstm_fused
from longscan.ops._scores import sums
from longscan.ops.dispatch import choose

MLSTMState = tuple[Tensor, Tensor]
"""(s, m): the memory and the normaliser side by side, s = [C | n] [B, H, K, V + 1], both divided
by exp(m), m [B, H, 1]."""

_LOG2E = math.log2(math.e)


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """The definition of `mlstm`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        parts = []
        for n, (a, b) in enumerate(pairwise(check_cu_seqlens(cu_seqlens, *v.shape[:2]))):
            own = None if state is None else (state[0][n : n + 1], state[1][n : n + 1])
            tokens = [x[:, a:b] for x in (q, k, v, i, f)]
            parts.append(mlstm_reference(*tokens, state=own, eps=eps))
        s, m = (torch.cat(x) for x in zip(*(p[1] for p in parts), strict=True))
        return torch.cat([p[0] for p in parts], 1), (s, m)
    s, m = _first_state(k, v) if state is None else state
    out = []
    for t in range(v.shape[1]):
        h, (s, m) = mlstm_step(q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], (s, m), eps=eps)
        out.append(h)
    return torch.stack(out, 1), (s, m)


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState, *, eps: float = 1e-6
) -> tuple[Tensor, MLSTMState]:
    """One token of `mlstm`. Shapes: q, k [B, H, K]; v, h [B, H, V]; i, f [B, H]."""
    s, m = state
    kept = F.logsigmoid(f).unsqueeze(-1) + m
    i = i.unsqueeze(-1)
    m = torch.maximum(kept, i)
    k, v = ((i - m).exp() * k).unsqueeze(-1), F.pad(v, (0, 1), value=1.0).unsqueeze(-2)
    s = torch.addcmul((kept - m).exp().unsqueeze(-1) * s, k, v)
    num, qn = (q.unsqueeze(-2) @ s).squeeze(-2).split([v.shape[-1] - 1, 1], -1)
    return _normalised(num, qn, m, eps), (s, m)


def _normalised(num: Tensor, qn: Tensor, m: Tensor, eps: float | Tensor) -> Tensor:
    """num / (max(|qn|, exp(-m)) + eps), without the overflow of exp(-m) where m < 0.

    Shapes: num [..., V]; qn, m, eps [..., 1].
    """
    low = m.detach().clamp(max=0)
    scale = low.exp()
    return num * (scale / (torch.maximum(qn.abs() * scale, (low - m).exp()) + eps * scale))


def _first_state(k: Tensor, v: Tensor, rows: int | None = None) -> MLSTMState:
    """The state before the first token, zeros at the scale exp(0). k, v [B, ..., H, . ]."""
    rows, heads = rows or v.shape[0], v.shape[-2]
    s = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1] + 1)
    return s, v.new_zeros(rows, heads, 1)


def mlstm_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """The fast torch form of `mlstm`: matrix products inside chunks, a scan of states across.

    Inside a chunk that the state (s, m) enters, with b_t the sum of log f up to token t:

        w_t = i_t - b_t,   p_t = max(m, w_1, ..., w_t),   m_t = b_t + p_t
        [num_t | qn_t] = exp(m - p_t) s^T q_t + sum_{j <= t} exp(w_j - p_t) (q_t . k_j) [v_j | 1]

    No exponent is positive. h is the same whatever p is, except through eps, so gradients pass
    through the p of the sums as through a constant, and through the eps beside them.
    """
    plan = layout(v.shape[0], v.shape[1], chunk, cu_seqlens)
    s, m = _first_state(k, v, plan.rows) if state is None else state
    log_f = _floored(F.logsigmoid(f), i, m)
    maps, read = _chunks(plan, q, k, v, i, log_f, eps)
    entering, (s, m) = algebra.scan(maps, (plan.rows_in(s), plan.rows_in(m)), plan.counts)
    return plan.join(read(*entering)), (plan.rows_out(s), plan.rows_out(m))


def _floored(log_f: Tensor, i: Tensor, m: Tensor) -> Tensor:
    """Log forget gates [B, T, H], none lower than what already erases all that could be kept.

    Keeps sums of them small, so that weak gates after a closed one do not drown in rounding.
    """
    low, high = torch.aminmax(i.detach(), dim=1, keepdim=True)
    m = m.detach().mT
    if len(m) != len(i):  # packed sequences lie on one row
        m = m.amax(0, keepdim=True)
    reach = torch.maximum(high, m) - low
    return log_f.clamp(min=2 * math.log(torch.finfo(i.dtype).tiny) - reach)


Read = Callable[[Tensor, Tensor], Tensor]
"""The outputs of all chunks [G, C, H, V], given the states that enter them."""


def _chunks(
    plan: Layout, q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, eps: float
) -> tuple[SegmentMap, Read]:
    """Maps and reads of all chunks. Logarithms of the gates are to the base 2 in here."""
    q, k = (plan.split(x).transpose(1, 2).contiguous() for x in (q, k))
    v = F.pad(plan.split(v).transpose(1, 2), (0, 1), value=1.0)
    i, log_f = (plan.split(x).transpose(1, 2) * _LOG2E for x in (i, log_f))
    empty = plan.split(v.new_ones(plan.batch, plan.length)) == 0
    i = i.masked_fill(empty.unsqueeze(1), EMPTY)
    b = log_f.cumsum(-1)
    w = i - b
    later = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).triu(1)
    # A running maximum; cummax's own backward adds atomically on a GPU.
    top = w.unsqueeze(-2).masked_fill(later, -math.inf).amax(-1)
    last = top[..., -1:]
    u = (k * (w - last).exp2().unsqueeze(-1)).mT @ v
    total = b[..., -1:]
    maps = SegmentMap("diagonal", total / _LOG2E, u, (total + last) / _LOG2E)

    def read(s: Tensor, m: Tensor) -> Tensor:
        m = m * _LOG2E
        p = torch.maximum(top, m)
        held = p.detach()
        among = (w.unsqueeze(-2) - held.unsqueeze(-1)).masked_fill(later, -math.inf).exp2()
        inside = (((q @ k.mT) * among) @ v).flatten(0, 1)
        before = q * (m - held).exp2().unsqueeze(-1)
        o = torch.baddbmm(inside, before.flatten(0, 1), s.flatten(0, 1)).view_as(v)
        num, qn = o.split([v.shape[-1] - 1, 1], -1)
        slack = eps * (p - held).exp2().unsqueeze(-1)
        return _normalised(num, qn, (b + held).unsqueeze(-1) / _LOG2E, slack).transpose(1, 2)

    return maps, read


def mlstm_segment(k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> SegmentMap:
    """The map of a whole stretch on the state: a scaled map, see `longscan.algebra`.

    Shapes: as `mlstm`; map axes [B, H, K, V + 1], log decay and log scale [B, H, 1].
    """
    with full_precision(v):
        k, v, i, f = cast(compute_dtype(k, v, i, f), k, v, i, f)
        log_f = F.logsigmoid(f)
        # The weight of each write at the end: sums from there, so that late ones lose no digits.
        kept = _floored(log_f, i, i.new_full((v.shape[0], 1, 1), EMPTY))
        left = sums(kept.flip(1)).flip(1)
        w = i + F.pad(left[:, 1:], (0, 0, 0, 1))
        m = w.amax(1)
        v = F.pad(v, (0, 1), value=1.0)
        u = torch.einsum("bthk,bthv->bhkv", k, v * (w - m.unsqueeze(1)).exp().unsqueeze(-1))
        return SegmentMap("diagonal", log_f.sum(1).unsqueeze(-1), u, m.unsqueeze(-1))


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: MLSTMState | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Linear attention with exponential input gates, sigmoid forget gates and a normaliser.

    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,   n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_t^T q_t / (max(|n_t . q_t|, 1) + eps exp(m_t)),
    m_t = max(logsigmoid(f_t) + m_{t-1}, i_t),   m_0 = 0

    All is computed relative to exp(m_t), so no gate can overflow. The state is the pair (s, m),
    s = [C | n] exp(-m).
    Shapes: q, k [B, T, H, K]; v, h [B, T, H, V]; i, f [B, T, H], pre-activations of the gates,
    any real number; s [B, H, K, V + 1], m [B, H, 1]. cu_seqlens [n + 1] packs n sequences on one
    row (B = 1), the state then has n rows.
    chunk: tokens handled by one set of matrix products; changes speed, not the result.
    eps: added to the denominator, in units of exp(m_t) as the authors do.
    Precision: states, gates and products in float32 (float64 for float64 inputs), h in v's dtype.
    Nothing is scaled: multiply q or k by K^-0.5 where the architecture asks for it.
    Sigmoid input gates (mLSTMsig, arXiv 2503.14376): pass logsigmoid(i) as i; without their
    normaliser it is `decay(q, k * sigmoid(i), v, logsigmoid(f))`.
    Raises: ValueError, TypeError for shapes, dtypes or cu_seqlens that do not fit.
    Source: xLSTM (arXiv 2405.04517, eq. 19-27); the chunked form as in arXiv 2503.14376.
    Differs: gradients are exact: the authors' backward leaves out that of the denominator and
    those of the first n and m.
    """
    check_floating(q=q, k=k, v=v, i=i, f=f)
    batch, length, heads, d_value = check_values(v)
    d_key = check_keys(q, k, v)
    check_shape("k", k, (batch, length, heads, d_key), "[B, T, H, K]")
    check_shape("i", i, (batch, length, heads), "[B, T, H]")
    check_shape("f", f, (batch, length, heads), "[B, T, H]")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError("the state of mlstm is the pair (s, m) that an earlier call returned")
        check_floating(s=state[0], m=state[1])
        check_state("s", state[0], (rows, heads, d_key, d_value + 1), "[rows, H, K, V + 1]")
        check_state("m", state[1], (rows, heads, 1), "[rows, H, 1]")
    if _across.active() is not None:
        start = state
        if start is None:
            start = _first_state(k.to(wide := compute_dtype(k, v)), v.to(wide), rows)
        state = _across.entering(
            lambda cut: mlstm_segment(*(x[:, cut] for x in (k, v, i, f))), start
        )
    dtype, out = compute_dtype(q, k, v, i, f, *(state or ())), v.dtype
    forms = {"reference": mlstm_reference, "torch": mlstm_chunked, "triton": mlstm_fused}
    run = choose(
        "mlstm", v, backend, forms,
        lambda: dtype is torch.float32 and mlstm_fits(q, k, v, i, f, state),
    )  # fmt: skip
    with full_precision(v):
        more = {"state": state, "cu_seqlens": cu_seqlens, "eps": eps}
        if run is mlstm_fused and (length > 1 or cu_seqlens is not None):
            h, final = run(q, k, v, i, f, **more)
            return h.to(out), final
        q, k, v, i, f = cast(dtype, q, k, v, i, f)
        if state is not None:
            more["state"] = state = (state[0].to(dtype), state[1].to(dtype))
        if run is mlstm_reference:
            h, final = run(q, k, v, i, f, **more)
        elif length == 1 and cu_seqlens is None:
            q, k, v, i, f = (x.squeeze(1) for x in (q, k, v, i, f))
            h, final = mlstm_step(q, k, v, i, f, state or _first_state(k, v), eps=eps)
            h = h.unsqueeze(1)
        else:
            h, final = run(q, k, v, i, f, **more, chunk=chunk)
    return h.to(out), final
