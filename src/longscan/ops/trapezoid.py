"""The recurrence of Mamba-3: a rotating, decaying state written at two points per token."""

from __future__ import annotations

import math
from itertools import pairwise

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
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens, layout
from longscan.ops._scores import cumulative, sums
from longscan.ops._turn import PAIRS, Turned, rotate, to_heads, wrap
from longscan.ops.dispatch import choose
from longscan.state import State

# Numbers in the queries of a block of chunks on a CPU, measured: larger tensors come from fresh
# pages of memory each time, which can take as long as the arithmetic.
_BLOCK = 1 << 20


def trapezoid_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    state: State,
    pairs: str,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition of `trapezoid`: a loop over time in the input dtype."""
    bounds = [0, v.shape[1]]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, v.shape[0], v.shape[1])
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, 2) for x in (q, k))
    out, states = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        row = state if cu_seqlens is None else state.select(i)
        angle, s, k0, v0 = (row.tensor(x) for x in ("angle", "s", "k", "v"))
        for t in range(start, end):
            angle = wrap(angle + rate[:, t] * dt[:, t, :, None])
            qt, kt = (
                rotate(x[:, t] + bias, angle.unsqueeze(-2), pairs)
                for x, bias in ((q, q_bias), (k, k_bias))
            )
            a, before, now = (
                x[:, t, :, None, None] for x in (log_a.exp(), (1 - lam) * dt, lam * dt)
            )
            s = a * (s + before * k0.mT @ v0) + now * kt.mT @ v[:, t]
            k0, v0 = kt, v[:, t]
            out.append(qt @ s)
        states.append(State(angle=angle, s=s, k=k0, v=v0.clone()))
    return torch.stack(out, 1), State.cat(states)


def trapezoid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    state: State,
    pairs: str,
) -> tuple[Tensor, State]:
    """One token of `trapezoid`: the inputs without their time axis."""
    angle, s, k0, v0 = (state.tensor(x) for x in ("angle", "s", "k", "v"))
    batch, heads, ranks, d_value = v.shape
    angle = wrap(angle.double() + rate * dt.unsqueeze(-1)).to(q.dtype)
    qk = torch.cat([q, k], -2)
    if q.shape[1] not in (1, heads):
        qk = qk.repeat_interleave(heads // q.shape[1], 1)
    qk = rotate(qk + torch.cat([q_bias, k_bias], -2), angle.unsqueeze(-2), pairs)
    q, k = qk.split(ranks, -2)
    a, now = log_a.exp(), lam * dt
    before = (dt - now) * a
    # Both writes in one product.
    keys = torch.cat([k0, k], -2).view(batch * heads, 2 * ranks, -1)
    values = torch.cat([v0 * before[..., None, None], v * now[..., None, None]], -2)
    s = (s * a[..., None, None]).flatten(0, 1).baddbmm_(keys.mT, values.flatten(0, 1))
    y = torch.bmm(q.reshape(batch * heads, ranks, -1), s).view(v.shape)
    s = s.view(batch, heads, -1, d_value)
    return y, State(angle=angle, s=s, k=k, v=v.clone())


def trapezoid_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    state: State,
    pairs: str,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """The fast torch form of `trapezoid`: matrix products in chunks, a scan of states across them.

    Both writes of a token have the same key and value. For readers after it they are one write,
    with a weight w that knows the next token; the token itself reads only the first:

        w_t = lam_t dt_t + (1 - lam_{t+1}) dt_{t+1}                (the last token: lam_t dt_t)
        y_t = sum_{s<t} a_{s+1..t} w_s (q_t . k_s) v_s + lam_t dt_t (q_t . k_t) v_t

    So w_t acts on outputs from t + 1 on only, and all is causal in each of its inputs.
    """
    angle, s, k0, v0 = (state.tensor(x) for x in ("angle", "s", "k", "v"))
    heads, ranks = v.shape[2:4]
    plan = layout(v.shape[0], v.shape[1], max(1, chunk // ranks), cu_seqlens)
    now = lam * dt
    before = dt - now
    following = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], 1)
    if cu_seqlens is None:
        # A view in the state would keep the whole sequence in memory.
        first, k_end, v_end = before[:, 0], k[:, -1], v[:, -1].clone()
    else:
        last = cu_seqlens[1:].long() - 1
        following = following.index_fill(1, last, 0.0)
        first, k_end, v_end = before[0, cu_seqlens[:-1]], k[0, last], v[0, last]
    s = s + first[..., None, None] * (k0.mT @ v0)

    q, k, v, rate, log_a, now, w, dt = (
        plan.split(x).transpose(1, 2) for x in (q, k, v, rate, log_a, now, now + following, dt)
    )
    # Angles of thousands of tokens add up in float64; what is left of full turns fits float32.
    turned = _turns(rate, dt).cumsum(2)
    maps = SegmentMap("identity", None, turned[:, :, -1:])
    entering, angle = algebra.scan(maps, plan.rows_in(angle.double().unsqueeze(2)), plan.counts)
    theta = wrap(turned + entering).to(q.dtype).unsqueeze(3)
    angle = wrap(plan.rows_out(angle)).squeeze(2).to(q.dtype)
    k_end = rotate(to_heads(k_end.unsqueeze(2), k_bias).squeeze(2), angle.unsqueeze(2), pairs)

    # Queries and keys get their heads a block of chunks at a time.
    numbers = plan.counts[0] * plan.chunk * heads * ranks * k.shape[-1]
    in_blocks = v.device.type == "cpu" and not torch.compiler.is_compiling()
    steps = max(1, _BLOCK // numbers) if in_blocks else len(plan.counts)
    blocks = [plan.counts[i : i + steps] for i in range(0, len(plan.counts), steps)]
    sizes = [sum(counts) for counts in blocks]
    tensors = (x.split(sizes) for x in (q, k, v, log_a, now, w, theta))
    s, outs, done = plan.rows_in(s), [], []
    for counts, *block in zip(blocks, *tensors, strict=True):
        done.append(s[counts[0] :])
        y, s = _block(s[: counts[0]], counts, pairs, q_bias, k_bias, *block)
        outs.append(y)
    s = plan.rows_out(torch.cat([s, *reversed(done)]))
    return plan.join(torch.cat(outs)), State(angle=angle, s=s, k=k_end, v=v_end)


def _block(
    s: Tensor, counts: list[int], pairs: str, q_bias: Tensor, k_bias: Tensor, *tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [G, C, H, R, P] of chunks and the states [.., H, N, P] that leave the last ones.

    Shapes: s [counts[0], H, N, P], `counts` as in `algebra.scan`; tokens: q, k [G, Hk, C, R, N];
    v [G, H, C, R, P]; log_a, lam dt, w [G, H, C]; theta [G, H, C, 1, S].
    """
    q, k, v, log_a, now, w, theta = tokens
    if torch.compiler.is_compiling():  # which makes few passes of the plain form itself
        q, k = (rotate(to_heads(*x), theta, pairs) for x in ((q, q_bias), (k, k_bias)))
    else:
        q, k = Turned.apply(q, k, q_bias, k_bias, theta, pairs)
    # Ranks lie beside tokens: a chunk has C R rows.
    ranks = v.shape[3]
    b = cumulative(log_a, -1)
    rows = b if ranks == 1 else b.repeat_interleave(ranks, -1)
    q, k, writes = q.flatten(2, 3), k.flatten(2, 3), (v * w[..., None, None]).flatten(2, 3)
    scores = q @ k.mT
    y = (scores * _earlier(b, ranks)) @ writes
    if ranks == 1:
        own = scores.diagonal(dim1=-2, dim2=-1) * now
        y = torch.addcmul(y, own.unsqueeze(-1), v.squeeze(3))
    else:
        own = scores.unflatten(-1, (-1, ranks)).unflatten(-3, (-1, ranks))
        own = own.diagonal(dim1=-4, dim2=-2).movedim(-1, -3) * now[..., None, None]
        y = y + (own @ v).flatten(2, 3)
    u = k.mT @ (writes * (rows[..., -1:] - rows).exp2().unsqueeze(-1))
    maps = SegmentMap("diagonal", b[..., -1:] * math.log(2), u)
    entering, s = algebra.scan(maps, s, counts)
    y = torch.addcmul(y, q @ entering, rows.exp2().unsqueeze(-1))
    return y.unflatten(2, (-1, ranks)).transpose(1, 2), s


def _earlier(b: Tensor, ranks: int) -> Tensor:
    """2^(b_i - b_j) for rows of tokens j < i, zero elsewhere: b [..., C] -> [..., C R, C R]."""
    c = b.shape[-1]
    others = torch.ones(c, c, dtype=torch.bool, device=b.device).triu()
    f = (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(others, float("-inf")).exp2()
    return f if ranks == 1 else f.repeat_interleave(ranks, -1).repeat_interleave(ranks, -2)


def trapezoid_segment(
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
    k_bias: Tensor,
    state: State,
    pairs: str = "neighbours",
) -> SegmentMap:
    """The map of a whole stretch on s, for the angle and the last token that enter with `state`:
    s_out = exp(sum log_a) s_in + U. Angles have a map of their own, the identity and a sum.

    Shapes: as `trapezoid`; map axes [B, H, N, P].
    """
    given = k, v, log_a, dt, lam, rate, k_bias
    k, v, log_a, dt, lam, rate, k_bias = cast(compute_dtype(k, v, log_a), *given)
    angle, k0, v0 = (state.tensor(x) for x in ("angle", "k", "v"))
    now = lam * dt
    before = dt - now
    # What is left of each write at the end: sums from there, so that late writes lose no digits.
    left = sums(log_a.flip(1)).flip(1)
    kept = F.pad(left[:, 1:], (0, 0, 0, 1)).exp()
    w = kept * (now + F.pad(before[:, 1:], (0, 0, 0, 1)))
    theta = wrap(sums(_turns(rate, dt)) + angle.double().unsqueeze(1)).to(k.dtype)
    keys = rotate(to_heads(k.transpose(1, 2), k_bias), theta.transpose(1, 2).unsqueeze(3), pairs)
    u = torch.einsum("bhtrn,bthrp->bhnp", keys, v * w[..., None, None])
    first = left[:, 0].exp() * before[:, 0]
    u = torch.addcmul(u, first[..., None, None], k0.to(u.dtype).mT @ v0.to(u.dtype))
    return SegmentMap("diagonal", left[:, :1].mT, u)


def _turns(rate: Tensor, dt: Tensor) -> Tensor:
    """What each token adds to the angles [B, T, H, S], in float64: thousands of them add up."""
    return (rate * dt.unsqueeze(-1)).double()


def _entering(
    shards: _across.Across,
    state: State,
    pairs: str,
    k_bias: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
) -> State:
    """The states that a shard of tokens starts from: angles first, which turn the key of the token
    before, and both make the map on s."""
    turns = _turns(rate, dt)

    def total(cut: slice) -> Tensor:
        return turns[:, cut].sum(1)

    def turn(cut: slice) -> SegmentMap:
        return SegmentMap("identity", None, wrap(total(cut)).unsqueeze(-1))

    angle = wrap(_across.entering(turn, state.tensor("angle").double().unsqueeze(-1)).squeeze(-1))
    rows, sizes = slice(-k.shape[0], None), [state.tensor(x)[0].numel() for x in ("k", "v")]

    def token(cut: slice) -> Tensor:
        """The last one before the end of the shard: its key, turned, and value [B, 1, ...]."""
        end = wrap(angle[rows] + total(shards.last)).to(k.dtype)
        key = to_heads(k[:, cut].transpose(1, 2), k_bias).squeeze(2)
        key = rotate(key, end.unsqueeze(2), pairs)
        return torch.cat([key.flatten(1), v[:, cut].flatten(1)], 1).unsqueeze(1)

    given = torch.cat([state.tensor(x).flatten(1) for x in ("k", "v")], 1).unsqueeze(1)
    before = _across.window(token, 1, given)
    assert before is not None
    k0, v0 = before.squeeze(1).split(sizes, 1)
    state = State(
        state,
        angle=angle.to(k.dtype),
        k=k0.view_as(state.tensor("k")),
        v=v0.view_as(state.tensor("v")),
    )
    last = State({x: state.tensor(x)[rows] for x in ("angle", "k", "v")})

    def segment(cut: slice) -> SegmentMap:
        tokens = (x[:, cut] for x in (k, v, log_a, dt, lam, rate))
        return trapezoid_segment(*tokens, k_bias=k_bias, state=last, pairs=pairs)

    return State(state, s=_across.entering(segment, state.tensor("s")))


def state_shapes(heads: int, ranks: int, d_key: int, d_value: int, angles: int) -> dict:
    """Shapes of a state's tensors behind the batch axis."""
    return {
        "angle": (heads, angles),
        "s": (heads, d_key, d_value),
        "k": (heads, ranks, d_key),
        "v": (heads, ranks, d_value),
    }


def trapezoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    dt: Tensor,
    lam: Tensor,
    rate: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    *,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: str = "neighbours",
    chunk: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """A decaying state read and written in a turning frame; each token writes itself, and the
    token before it once more.

    theta_t = theta_{t-1} + dt_t rate_t;   q_t, k_t = rotate(q_t + q_bias, theta_t), likewise k
    S_t = exp(log_a_t) (S_{t-1} + (1 - lam_t) dt_t k_{t-1} v_{t-1}^T) + lam_t dt_t k_t v_t^T
    y_t = S_t^T q_t;   with R ranks the writes are sums over ranks, and each rank reads

    Shapes: q, k [B, T, Hk, R, N], each serving H / Hk consecutive heads; v, y [B, T, H, R, P];
    log_a (<= 0), dt (>= 0), lam (in [0, 1]) [B, T, H]; rate [B, T, 1 or H, S], angles per unit
    of time, S <= N / 2; q_bias, k_bias [H, R, N]; state: angle [B, H, S] in [-pi, pi],
    s [B, H, N, P], k [B, H, R, N] (biased and rotated) and v [B, H, R, P] of the last token.
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    pairs: what turns together, "neighbours" (2i, 2i + 1) or "halves" (i, N / 2 + i), i < S.
    chunk: rows (tokens x ranks) handled by one set of matrix products.
    Precision: all in float32 (float64 for float64 inputs), angles accumulated in float64 and kept
    modulo full turns; y in v's dtype.
    Raises: ValueError, TypeError for shapes, dtypes, gates above 0 or cu_seqlens that do not fit.
    Source: Mamba-3 (arXiv 2603.15569), the exponential-trapezoidal rule, complex states as rotary
    embeddings, and the multi-input multi-output form.
    Differs: the authors' parallel form gives a token's own write the weight w of `chunked` and
    subtracts the excess, which leaves rounding errors that depend on the next token.
    """
    check_floating(q=q, k=k, v=v, log_a=log_a, dt=dt, lam=lam, rate=rate)
    if v.ndim != 5 or v.shape[1] == 0:
        raise ValueError(f"v must have shape [B, T >= 1, H, R, P], got {list(v.shape)}")
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, not {pairs!r}")
    batch, length, heads, ranks, d_value = v.shape
    check_shape("q", q, (batch, length, None, ranks, None), "[B, T, Hk, R, N]")
    check_shape("k", k, tuple(q.shape), "[B, T, Hk, R, N], as q")
    groups, d_key, angles = q.shape[2], q.shape[-1], rate.shape[-1]
    if heads % groups or 2 * angles > d_key:
        raise ValueError(
            f"{groups} query/key heads must divide {heads} value heads, and {angles} angles turn "
            f"{2 * angles} of {d_key} entries"
        )
    for name, x in (("log_a", log_a), ("dt", dt), ("lam", lam)):
        check_shape(name, x, (batch, length, heads), "[B, T, H]")
    check_shape("rate", rate, (batch, length, min(rate.shape[2], heads), angles), "[B, T, H, S]")
    for name, x in (("q_bias", q_bias), ("k_bias", k_bias)):
        check_shape(name, x, (heads, ranks, d_key), "[H, R, N]")
    check_log_decay(log_a)
    dtype, out = compute_dtype(q, k, v, log_a), v.dtype
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    shapes = state_shapes(heads, ranks, d_key, d_value, angles)
    if state is None:
        state = State({x: v.new_zeros(rows, *size, dtype=dtype) for x, size in shapes.items()})
    for x, size in shapes.items():
        check_state(f"state {x}", state.tensor(x), (rows, *size), "[rows, H, ...]")
    with full_precision(v):
        inputs = cast(dtype, q, k, v, log_a, dt, lam, rate, q_bias, k_bias)
        state = state.to(dtype=dtype)
        if (shards := _across.active()) is not None:
            state = _entering(shards, state, pairs, inputs[8], *inputs[1:7])
        forms = {"reference": trapezoid_reference, "torch": trapezoid_chunked}
        run = choose("trapezoid", v, backend, forms)
        if run is trapezoid_reference:
            y, new = run(*inputs, state=state, pairs=pairs, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            tokens = [x[:, 0] for x in inputs[:7]]
            y, new = trapezoid_step(*tokens, *inputs[7:], state=state, pairs=pairs)
            y = y.unsqueeze(1)
        else:
            y, new = run(*inputs, state=state, pairs=pairs, cu_seqlens=cu_seqlens, chunk=chunk)
    return y.to(out), new
