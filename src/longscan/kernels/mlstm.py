"""`mlstm` on a GPU: with the running maximum taken out of the gates one scan does it, used 4 times.

Let m_t be the running maximum of `ops.mlstm`, a_t = log f_t + m_{t-1} - m_t and c_t = i_t - m_t.
Neither is positive, and with [v | 1] for v the op is

    S_t = exp(a_t) S_{t-1} + exp(c_t) k_t [v_t | 1],    [num_t | qn_t] = q_t S_t

m_t hangs on the gates only, so a small kernel finds it first (`gates`). The normaliser n, the last
column of S, must keep its digits, as h divides by it: it has float32 sums of its own, outside the
products (`weigh`, `carry`). `scores` then knows the products of a chunk and the denominators.
What remains is `scan`: out_t = sum_s M_ts y_s + read_t r_t S, and S gains upd_s u_s y_s. It gives
h, and with the roles of the tensors exchanged and time reversed the gradients of q, k and v.

All tokens lie on one axis of N, a sequence after the other; [.., N] tensors have an axis of heads
first. Chunks of C tokens begin where sequences begin. Logarithms are to the base 2. A letter d
before a name is the gradient by it, a bar the sum over a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CLOSED = tl.constexpr(-48.0)  # lower log decays let nothing through that float32 could hold
EMPTY = tl.constexpr(-1e30)


@triton.jit
def _log_sigmoid(f):
    """By a series, since 1 + exp(-f) loses the digits of gates near 1."""
    x = tl.exp2(-tl.abs(f) * LOG2E)
    z = x / (2 + x)
    y = z * z
    p = y * (1.0 / 15) + 1.0 / 13
    p = y * p + 1.0 / 11
    p = y * p + 1.0 / 9
    p = y * p + 1.0 / 7
    p = y * p + 1.0 / 5
    p = y * p + 1.0 / 3
    return (tl.minimum(f, 0.0) - 2 * z * (y * p + 1)) * LOG2E


@triton.jit
def _top(g1, m1, g2, m2):
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit
def _linear(a1, x1, a2, x2):
    return a1 * a2, x1 * a2 + x2


@triton.jit(do_not_specialize=["N", "H"])
def gates(i, f, m0, m, m_end, starts, N, H, HAS: tl.constexpr, B: tl.constexpr):
    """The running maximum m [H, N]. i, f [N, H]; m0, m_end [rows, H], natural logarithms."""
    pid = tl.program_id(0).to(tl.int64)
    row, h = pid // H, pid % H
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    o = tl.arange(0, B)
    last = tl.full([], 0.0, tl.float32)
    if HAS:
        last = tl.load(m0 + pid) * LOG2E
    for t0 in range(begin, end, B):
        t = t0 + o
        inside = t < end
        g = _log_sigmoid(tl.load(f + t * H + h, inside, 0.0).to(tl.float32))
        x = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E
        g = tl.where(inside, g, 0.0)
        x = tl.where(inside, x, 2 * EMPTY)
        g, x = tl.associative_scan((g, x), 0, _top)
        x = tl.maximum(last + g, x)
        tl.store(m + h * N + t, x, inside)
        last = tl.sum(tl.where(o == B - 1, x, 0.0), 0)
    tl.store(m_end + pid, last / LOG2E)


@triton.jit
def _decays(f, m, m0, t, inside, begin, row, h, N, H, HAS: tl.constexpr):
    """a_t, unbounded below."""
    g = _log_sigmoid(tl.load(f + t * H + h, inside, 0.0).to(tl.float32))
    before = tl.load(m + h * N + t - 1, inside & (t > begin), 0.0)
    if HAS:
        before = tl.where(t > begin, before, tl.load(m0 + row * H + h) * LOG2E)
    # In this order: the difference is exact, and what m was rounded by does not add up.
    a = (before - tl.load(m + h * N + t, inside, 0.0)) + g
    return tl.where(inside, a, 0.0)


@triton.jit(do_not_specialize=["N"])
def weigh(
    k, i, f, m0, m, a, c, cut, read, keep, total, bar, chunks, starts, N,
    H: tl.constexpr, K: tl.constexpr, HAS: tl.constexpr, BAR: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """What tokens weigh in their chunk; all [H, N] but total [chunks, H], bar [chunks, H, K].

    a: the sum of log decays from the chunk's start but closed ones, which would drown the others;
    cut: how many are closed; read: the weight of the state that enters; keep: that of a token in
    the state that leaves; total: the whole chunk's decay; bar (with BAR): what the chunk adds to
    the normaliser.
    """
    pid = tl.program_id(0).to(tl.int64)
    j, h = pid // H, pid % H
    row, t0, end = tl.load(chunks + j * 3), tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    t = t0 + tl.arange(0, C)
    d = tl.arange(0, KP)
    inside = t < end
    if BAR:  # asked for before anything waits
        at = k + (t[:, None] * H + h) * K + d[None, :]
        tile = tl.load(at, inside[:, None] & (d < K)[None, :], 0.0)
    x = _decays(f, m, m0, t, inside, tl.load(starts + row), row, h, N, H, HAS)
    closed = x < CLOSED
    x = tl.where(closed, 0.0, x)
    gone = tl.where(closed, 1, 0)
    last = tl.sum(gone, 0)
    gone = tl.cumsum(gone, 0)
    y = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E
    y = tl.where(inside, y - tl.load(m + h * N + t, inside, 0.0), -1e4)
    whole = tl.sum(x, 0)
    x = tl.cumsum(x, 0)
    weight = tl.where(gone == last, tl.exp2(tl.minimum(whole - x, 0.0) + y), 0.0)
    tl.store(a + h * N + t, x, inside)
    tl.store(cut + h * N + t, gone.to(tl.float32), inside)
    tl.store(c + h * N + t, y, inside)
    tl.store(read + h * N + t, tl.where(gone == 0, tl.exp2(x), 0.0), inside)
    tl.store(keep + h * N + t, weight, inside)
    tl.store(total + j * H + h, tl.where(last == 0, tl.exp2(whole), 0.0))
    if BAR:
        x = tl.sum(tile.to(tl.float32) * weight[:, None], 0)
        tl.store(bar + (j * H + h) * K + d, x, d < K)


@triton.jit(do_not_specialize=["H"])
def carry(
    bar, total, n0, n, n_end, first, H,
    K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, REVERSE: tl.constexpr,
    PARTS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The normaliser (REVERSE: its gradient) before every chunk, n [chunks, H, K], and at the end.

    bar [chunks, H, PARTS, K]; n0, n_end: the last columns of [rows, H, K, V + 1].
    """
    pid = tl.program_id(0).to(tl.int64)
    pid, d0 = pid // tl.cdiv(K, BK), pid % tl.cdiv(K, BK) * BK
    row, h = pid // H, pid % H
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    d = d0 + tl.arange(0, BK)
    o = tl.arange(0, R)
    x = tl.zeros([BK], tl.float32)
    edge = (pid * K + d) * (V + 1) + V
    if HAS:
        x = tl.load(n0 + edge, d < K, 0.0)
    start = begin
    if REVERSE:
        start = end - 1
    tl.store(n + (start * H + h) * K + d, x, d < K)
    for p in range(0, end - begin, R):
        j = begin + p + o
        inside = j < end
        to = j + 1
        if REVERSE:
            j = end - 1 - p - o
            inside = j >= begin
            to = j - 1
        g = tl.load(total + j * H + h, inside, 1.0)
        mask = inside[:, None] & (d < K)[None, :]
        y = tl.zeros([R, BK], tl.float32)
        for part in tl.static_range(PARTS):
            y += tl.load(bar + ((j[:, None] * H + h) * PARTS + part) * K + d[None, :], mask, 0.0)
        g, y = tl.associative_scan((tl.broadcast_to(g[:, None], [R, BK]), y), 0, _linear)
        y += g * x[None, :]
        at = n + (to[:, None] * H + h) * K + d[None, :]
        tl.store(at, y, mask & (to >= begin)[:, None] & (to < end)[:, None])
        x = tl.sum(tl.where((o == R - 1)[:, None], y, 0.0), 0)
    tl.store(n_end + edge, x, d < K)


@triton.jit
def _weights(a, c, cut, line, o, u, left):
    """What tokens `u` of a chunk weigh in the state that its tokens `o` read; it has `left`."""
    x = tl.load(a + line + o, o < left, 0.0)
    y = tl.load(c + line + u, u < left, 0.0) - tl.load(a + line + u, u < left, 0.0)
    cut_o = tl.load(cut + line + o, o < left, 0.0)
    cut_u = tl.load(cut + line + u, u < left, 0.0)
    seen = (o[:, None] >= u[None, :]) & (o < left)[:, None] & (cut_o[:, None] == cut_u[None, :])
    return tl.exp2(tl.where(seen, x[:, None] + y[None, :], -1e4))


@triton.jit(do_not_specialize=["N", "eps"])
def scores(
    q, k, m, a, c, cut, read, n, inv, side, over, M, chunks, N, eps,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M [H, N, C], what tokens of a chunk read of each other, already over the denominator.

    inv [H, N] = 1 / denominator; side: d denominator / d qn times inv; over: read times inv.
    """
    pid = tl.program_id(0).to(tl.int64)
    j, h = pid // H, pid % H
    t0, end = tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    o = tl.arange(0, C)
    t = t0 + o
    inside = t < end
    p = tl.zeros([C, C], tl.float32)
    qn = tl.zeros([C], tl.float32)
    for d0 in range(0, K, BD):
        d = d0 + tl.arange(0, BD)
        mask = inside[:, None] & (d < K)[None, :]
        at = (t[:, None] * H + h) * K + d[None, :]
        x = tl.load(q + at, mask, 0.0)
        y = tl.load(k + at, mask, 0.0)
        p = tl.dot(x.to(DT), tl.trans(y.to(DT)), p, input_precision=PRECISION)
        qn += tl.sum(x.to(tl.float32) * tl.load(n + (j * H + h) * K + d, d < K, 0.0)[None, :], 1)
    p *= _weights(a, c, cut, h * N + t0, o, o, end - t0)
    enter = tl.load(read + h * N + t, inside, 0.0)
    qn = tl.sum(p, 1) + qn * enter
    least = tl.exp2(-tl.load(m + h * N + t, inside, 0.0))
    one = 1 / (tl.maximum(tl.abs(qn), least) + eps)
    sign = tl.where(qn > 0, one, -one)
    tl.store(inv + h * N + t, one, inside)
    tl.store(over + h * N + t, one * enter, inside)
    tl.store(side + h * N + t, tl.where(tl.abs(qn) > least, sign, 0.0), inside)
    p *= one[:, None]
    at = M + (h * N + t[:, None]) * C + o[None, :]
    tl.store(at, p.to(M.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["N", "eps"])
def queries(
    q, k, v, do, a, c, cut, read, inv, side, n, s, M, dM, dq, product, over, dm, bar,
    chunks, starts, first, N, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NC: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of R tokens and its products with q; M again, and dM, its like for the gradients of keys.

    s [chunks, H, K, V], the states before chunks; n those of the normaliser, its chunks of NC
    tokens counted by `first`. over [H, N]: read over the denominator; dm: gradient of m through
    eps; bar [chunks, H, C / R, K]: what q adds to the normaliser's gradient. How much a denominator
    weighs, h . dh, is the product of q with its own gradient through the numerator, never that of a
    rounded h: where one token rules an output, the gradients through both cancel.
    """
    pid = tl.program_id(0).to(tl.int64)
    part, pid = pid % (C // R), pid // (C // R)
    j, h = pid // H, pid % H
    row, t0, end = tl.load(chunks + j * 3), tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    left = (end - t0).to(tl.int32)
    o = (part * R).to(tl.int32) + tl.arange(0, R)
    oc = tl.arange(0, C)
    e = tl.arange(0, KP)
    od = tl.arange(0, BD)
    inside = o < left
    mine = inside[:, None]
    all = (oc < left)[:, None]
    upper = tl.full([KP, BD], True, tl.int1)
    if K != KP:
        mine &= (e < K)[None, :]
        all &= (e < K)[None, :]
        upper &= (e < K)[:, None]
    read_v = v + (t0 * H + h) * V + oc[:, None].to(tl.int64) * (H * V) + od[None, :]
    read_do = do + (t0 * H + h) * V + o[:, None].to(tl.int64) * (H * V) + od[None, :]
    read_s = s + pid * K * V + e[:, None].to(tl.int64) * V + od[None, :]
    along = (t0 * H + h) * K + o[:, None].to(tl.int64) * (H * K) + e[None, :]
    keys = k + (t0 * H + h) * K + oc[:, None].to(tl.int64) * (H * K) + e[None, :]
    # q and k are loaded anew for every use: they take as many registers as x.
    qt = tl.load(q + along, mine, 0.0).to(DT)
    kt = tl.load(keys, all, 0.0).to(DT)
    line = h * N + t0
    one = tl.load(inv + line + o, inside, 0.0)
    enter = tl.load(read + line + o, inside, 0.0)
    tl.store(over + line + o, enter * one, inside)
    seen = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    seen *= _weights(a, c, cut, line, o, oc, left) * one[:, None]
    square = line * C + o[:, None] * C + oc[None, :]
    tl.store(M + square, seen.to(M.dtype.element_ty), inside[:, None])
    x = tl.zeros([R, KP], tl.float32)
    p = tl.zeros([R, C], tl.float32)
    for d0 in range(0, V, BD):
        mask = inside[:, None]
        wide = (oc < left)[:, None]
        lower = upper
        if V % BD != 0:
            mask &= (d0 + od < V)[None, :]
            wide &= (d0 + od < V)[None, :]
            lower &= (d0 + od < V)[None, :]
        g = tl.load(read_do + d0, mask, 0.0).to(DT)
        y = tl.load(read_v + d0, wide, 0.0).to(DT)
        S = tl.load(read_s + d0, lower, 0.0).to(DT)
        p = tl.dot(g, tl.trans(y), p, input_precision=PRECISION)
        x = tl.dot(g, tl.trans(S), x, input_precision=PRECISION)
    delta = tl.sum(seen * p, 1)
    x *= (enter * one)[:, None]
    qt = tl.load(q + along, mine, 0.0).to(tl.float32)
    delta += tl.sum(x * qt, 1)
    dqn = -delta * tl.load(side + line + o, inside, 0.0)
    weight = dqn * enter
    tl.store(dm + line + o, -eps * delta * one, inside)
    p = _weights(a, c, cut, line, o, oc, left) * (p * one[:, None] + dqn[:, None])
    tl.store(dM + square, p.to(dM.dtype.element_ty), inside[:, None])
    qt = tl.load(q + along, mine, 0.0).to(tl.float32)
    sums = bar + (pid * (C // R) + part) * K + e
    tl.store(sums, tl.sum(qt * weight[:, None], 0), e < K)
    j = tl.load(first + row) + (t0 - tl.load(starts + row)) // NC
    nt = tl.load(n + (j * H + h) * K + e, e < K, 0.0)
    x += weight[:, None] * nt[None, :]
    kt = tl.load(keys, all, 0.0).to(DT)
    x = tl.dot(p.to(DT), kt, x, input_precision=PRECISION)
    tl.store(dq + along, x.to(dq.dtype.element_ty), mine)
    qt = tl.load(q + along, mine, 0.0).to(tl.float32)
    tl.store(product + line + o, tl.sum(x * qt, 1), inside)


@triton.jit(do_not_specialize=["N"])
def reads(
    r, y, M, s, n, mate, keep, out, product, chunks, N,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, OVER: tl.constexpr, NORM: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_s = sum_t M_ts y_t + keep_s r_s dS for R tokens, dk or dv, where dS is known.

    r [N, H, D]; y, out [N, H, W]; s, the gradients of the states after chunks, [chunks, H, D, W] if
    OVER, else [chunks, H, W, D]. NORM adds keep_s n, n [chunks, H, W], and gives the products
    mate_s . out_s, one sum per tile of W.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(W, BW)
    part, pid = pid % (C // R), pid // (C // R)
    tile, pid = pid % tiles, pid // tiles
    j, h = pid // H, pid % H
    t0, end = tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    left = (end - t0).to(tl.int32)
    o = (part * R).to(tl.int32) + tl.arange(0, R)
    oc = tl.arange(0, C)
    od = tl.arange(0, BD)
    w = (tile * BW).to(tl.int32) + tl.arange(0, BW)
    inside = o < left
    mine = inside[:, None]
    all = (oc < left)[:, None]
    if W % BW != 0:
        mine &= (w < W)[None, :]
        all &= (w < W)[None, :]
    across = o[:, None].to(tl.int64) * (H * D) + od[None, :]
    along = o[:, None].to(tl.int64) * (H * W) + w[None, :]
    chunk = oc[:, None].to(tl.int64) * (H * W) + w[None, :]
    down = od[:, None].to(tl.int64) * W + w[None, :]
    right = w[:, None].to(tl.int64) * D + od[None, :]
    x = tl.zeros([R, BW], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + od
        rt = tl.load(
            r + (t0 * H + h) * D + d0 + across, inside[:, None] & (d < D)[None, :], 0.0
        ).to(DT)
        if OVER:
            S = tl.load(s + (pid * D + d0) * W + down, (d < D)[:, None] & (w < W)[None, :], 0.0).to(
                DT
            )
        else:
            S = tl.load(s + pid * D * W + d0 + right, (w < W)[:, None] & (d < D)[None, :], 0.0)
            S = tl.trans(S.to(DT))
        x = tl.dot(rt, S, x, input_precision=PRECISION)
    line = h * N + t0
    weight = tl.load(keep + line + o, inside, 0.0)
    x *= weight[:, None]
    yt = tl.load(y + (t0 * H + h) * W + chunk, all, 0.0).to(DT)
    square = line * C + oc[:, None] * C + o[None, :]
    Mt = tl.load(M + square, (oc < left)[:, None], 0.0).to(DT)
    x = tl.dot(tl.trans(Mt), yt, x, input_precision=PRECISION)
    if NORM:
        nt = tl.load(n + pid * W + w, w < W, 0.0)
        x += weight[:, None] * nt[None, :]
        like = tl.load(mate + (t0 * H + h) * W + along, mine, 0.0).to(tl.float32)
        tl.store(product + tile * H * N + line + o, tl.sum(x * like, 1), inside)
    tl.store(out + (t0 * H + h) * W + along, x.to(out.dtype.element_ty), mine)


@triton.jit(do_not_specialize=["N"])
def states(
    k, v, keep, total, s, decay, table, first, starts, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each block of `table` adds to the state (REVERSE: to its gradient, from q and do).

    s [blocks, H, K, V]; decay [blocks, H], that of the whole block.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(K, BK) * tl.cdiv(V, BV)
    tile, pid = pid % tiles, pid // tiles
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    j0 = tl.load(first + row) + (begin - tl.load(starts + row)) // C
    count = (end - begin + C - 1) // C
    dk = (tile // tl.cdiv(V, BV) * BK).to(tl.int32) + tl.arange(0, BK)
    dv = (tile % tl.cdiv(V, BV) * BV).to(tl.int32) + tl.arange(0, BV)
    oc = tl.arange(0, C)
    down = oc[None, :].to(tl.int64) * (H * K) + dk[:, None]
    along = oc[:, None].to(tl.int64) * (H * V) + dv[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    whole = tl.full([], 1.0, tl.float32)
    for p in range(0, count):
        i = p
        if REVERSE:
            i = count - 1 - p
        t0 = begin + i * C
        inside = oc < (end - t0).to(tl.int32)
        tall = inside[None, :]
        wide = inside[:, None]
        if K % BK != 0:
            tall &= (dk < K)[:, None]
        if V % BV != 0:
            wide &= (dv < V)[None, :]
        a = tl.load(k + (t0 * H + h) * K + down, tall, 0.0).to(tl.float32)
        y = tl.load(v + (t0 * H + h) * V + along, wide, 0.0)
        a *= tl.load(keep + h * N + t0 + oc, inside, 0.0)[None, :]
        g = tl.load(total + (j0 + i) * H + h)
        whole *= g
        x *= g
        x = tl.dot(a.to(DT), y.to(DT), x, input_precision=PRECISION)
    spot = s + pid * K * V + dk[:, None] * V + dv[None, :]
    tl.store(spot, x.to(s.dtype.element_ty), (dk < K)[:, None] & (dv < V)[None, :])
    if tile == 0:
        tl.store(decay + pid, whole)


@triton.jit(do_not_specialize=["H"])
def combine(
    s, decay, s0, s_end, firsts, H,
    K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, REVERSE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Puts the state (REVERSE: its gradient, from the right) that enters each block into s.

    s0, s_end [rows, H, K, V + 1] without the last column; firsts: the first block of each row.
    """
    pid = tl.program_id(0).to(tl.int64)
    pieces: tl.constexpr = tl.cdiv(K * V, B)
    piece, pid = pid % pieces, pid // pieces
    row, h = pid // H, pid % H
    e = (piece * B).to(tl.int32) + tl.arange(0, B)
    whole = e < K * V
    edge = pid * K * (V + 1) + e + e // V
    b0, b1 = tl.load(firsts + row), tl.load(firsts + row + 1)
    x = tl.zeros([B], tl.float32)
    if HAS:
        x = tl.load(s0 + edge, whole, 0.0)
    for p in range(0, b1 - b0):
        b = b0 + p
        if REVERSE:
            b = b1 - 1 - p
        at = (b * H + h) * K * V + e
        y = tl.load(s + at, whole, 0.0)
        tl.store(s + at, x, whole)
        x = x * tl.load(decay + b * H + h) + y
    tl.store(s_end + edge, x, whole)


@triton.jit(do_not_specialize=["N", "borders"])
def walk(
    k, v, keep, total, entry, s, s_end, s0, other, product,
    table, first, firsts, starts, N, borders,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, EXTRA: tl.constexpr,
    HAS0: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s [chunks, H, K, V], the states before chunks (REVERSE: their gradients after chunks).

    entry: what enters each block of `table`, [blocks, H, K, V + EXTRA]. REVERSE also multiplies the
    gradients with the states, `other` or s0, at every G-th left border of a chunk: product [tiles,
    borders, H], one sum per tile; firsts: the first such border of each sequence.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(K, BK) * tl.cdiv(V, BV)
    tile, pid = pid % tiles, pid // tiles
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    origin = tl.load(starts + row)
    j0 = tl.load(first + row) + (begin - origin) // C
    count = (end - begin + C - 1) // C
    groups = (count + G - 1) // G
    dk = (tile // tl.cdiv(V, BV) * BK).to(tl.int32) + tl.arange(0, BK)
    dv = (tile % tl.cdiv(V, BV) * BV).to(tl.int32) + tl.arange(0, BV)
    oc = tl.arange(0, C)
    down = oc[None, :].to(tl.int64) * (H * K) + dk[:, None]
    along = oc[:, None].to(tl.int64) * (H * V) + dv[None, :]
    whole = (dk < K)[:, None] & (dv < V)[None, :]
    spot = dk[:, None] * V + dv[None, :]
    edge = (row * H + h) * K * (V + 1) + dk[:, None] * (V + 1) + dv[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if HAS:
        enters = entry + pid * K * (V + EXTRA) + dk[:, None] * (V + EXTRA) + dv[None, :]
        x = tl.load(enters, whole, 0.0)
    for group in range(0, groups):
        i0 = group * G
        if REVERSE:
            i0 = (groups - 1 - group) * G
        own = tl.minimum(count - i0, G)
        for p in range(0, own):
            i = i0 + p
            if REVERSE:
                i = i0 + own - 1 - p
            t0 = begin + i * C
            inside = oc < (end - t0).to(tl.int32)
            tall = inside[None, :]
            wide = inside[:, None]
            if K % BK != 0:
                tall &= (dk < K)[:, None]
            if V % BV != 0:
                wide &= (dv < V)[None, :]
            a = tl.load(k + (t0 * H + h) * K + down, tall, 0.0).to(tl.float32)
            y = tl.load(v + (t0 * H + h) * V + along, wide, 0.0)
            a *= tl.load(keep + h * N + t0 + oc, inside, 0.0)[None, :]
            g = tl.load(total + (j0 + i) * H + h)
            tl.store(s + ((j0 + i) * H + h) * K * V + spot, x.to(s.dtype.element_ty), whole)
            x *= g
            x = tl.dot(a.to(DT), y.to(DT), x, input_precision=PRECISION)
        if REVERSE:
            if begin + i0 == origin:
                like = tl.zeros([BK, BV], tl.float32)
                if HAS0:
                    like = tl.load(s0 + edge, whole, 0.0)
            else:
                at = other + ((j0 + i0) * H + h) * K * V + spot
                like = tl.load(at, whole, 0.0).to(tl.float32)
            border = tl.load(firsts + row) + (begin - origin) // (C * G) + i0 // G
            tl.store(product + (tile * borders + border) * H + h, tl.sum(tl.sum(x * like, 1), 0))
    if FINAL:
        tl.store(s_end + edge, x, whole)


@triton.jit(do_not_specialize=["N"])
def scan(
    q, k, v, M, read, keep, total, entry, s_end, out, table, first, starts, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, EXTRA: tl.constexpr,
    FINAL: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h_t = sum_s M_ts v_s + read_t q_t S, where the state gains keep_s k_s v_s.

    S enters each block of `table` from `entry`, [blocks, H, K, V + EXTRA]. It is kept transposed,
    so that q and k go to the tensor cores as they are loaded.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(V, BV)
    tile, pid = pid % tiles, pid // tiles
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    j0 = tl.load(first + row) + (begin - tl.load(starts + row)) // C
    count = (end - begin + C - 1) // C
    d = tl.arange(0, KP)
    w = (tile * BV).to(tl.int32) + tl.arange(0, BV)
    oc = tl.arange(0, C)
    whole = (w < V)[:, None] & (d < K)[None, :]
    S = tl.zeros([BV, KP], tl.float32)
    if HAS:
        at = entry + pid * K * (V + EXTRA) + d[None, :] * (V + EXTRA) + w[:, None]
        S = tl.load(at, whole, 0.0)
    across = oc[:, None].to(tl.int64) * (H * K) + d[None, :]
    along = oc[None, :].to(tl.int64) * (H * V) + w[:, None]
    square = oc[:, None] * C + oc[None, :]
    for i in range(0, count):
        t0 = begin + i * C
        inside = oc < (end - t0).to(tl.int32)
        wide = inside[:, None]
        thin = inside[None, :]
        if K != KP:
            wide &= (d < K)[None, :]
        if V % BV != 0:
            thin &= (w < V)[:, None]
        line = h * N + t0
        qt = tl.load(q + (t0 * H + h) * K + across, wide, 0.0).to(DT)
        kt = tl.load(k + (t0 * H + h) * K + across, wide, 0.0).to(DT)
        vt = tl.load(v + (t0 * H + h) * V + along, thin, 0.0)
        Mt = tl.load(M + line * C + square, inside[:, None], 0.0).to(DT)
        g = tl.load(total + (j0 + i) * H + h)
        x = tl.dot(S.to(DT), tl.trans(qt), input_precision=PRECISION)
        x *= tl.load(read + line + oc, inside, 0.0)[None, :]
        x = tl.dot(vt.to(DT), tl.trans(Mt), x, input_precision=PRECISION)
        tl.store(out + (t0 * H + h) * V + along, x.to(out.dtype.element_ty), thin)
        vt = (vt.to(tl.float32) * tl.load(keep + line + oc, inside, 0.0)[None, :]).to(DT)
        S *= g
        S = tl.dot(vt, kt, S, input_precision=PRECISION)
    if FINAL:
        edge = s_end + (row * H + h) * K * (V + 1) + d[None, :] * (V + 1) + w[:, None]
        tl.store(edge, S, whole)


@triton.jit(do_not_specialize=["N", "H"])
def routes(i, m, dm, dm_end, D, starts, N, H, B: tl.constexpr):
    """D [H, N], the gradient that reaches m_t: of what reads it, and of m_{t+1} where that kept it.

    dm_end [rows, H]: gradient of the last m.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, h = pid // H, pid % H
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    o = tl.arange(0, B)
    x = tl.load(dm_end + pid)
    for p in range(0, end - begin, B):
        t = end - 1 - p - o
        inside = t >= begin
        later = inside & (t + 1 < end)
        i1 = tl.load(i + (t + 1) * H + h, later, 0.0).to(tl.float32) * LOG2E
        m1 = tl.load(m + h * N + t + 1, later, 1.0)
        keep = tl.where(i1 < m1, 1.0, 0.0)
        keep, y = tl.associative_scan((keep, tl.load(dm + h * N + t, inside, 0.0)), 0, _linear)
        y += keep * x
        tl.store(D + h * N + t, y, inside)
        x = tl.sum(tl.where(o == B - 1, y, 0.0), 0)


@triton.jit(do_not_specialize=["N", "H", "blocks"])
def gates_backward(
    i, f, m0, m, D, qdq, kdk, product, n, dn, ds0, tail, di, df, dm0,
    table, first, first_n, starts, N, H, blocks,
    K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, TILES: tl.constexpr,
    BORDERS: tl.constexpr, NC: tl.constexpr, C: tl.constexpr, B: tl.constexpr, KP: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates in a block of at most B tokens.

    That of i_t is k_t . dk_t. That of log f_t is all that later tokens read of earlier ones, which
    grows by k_s . dk_s - q_s . dq_s from a token to the next. Rounding errors add up in that sum.
    It is known at both ends of a block, where it is the product of the state and its gradient, and
    at closed gates, where it is 0: it begins anew there, and its error at the right end is spread
    over the tokens that led to it, as the squares of their steps. tail [rows, H]: that product at
    the ends of sequences. n is counted by `first_n` in chunks of NC tokens, dn by `first` in chunks
    of C.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    origin = tl.load(starts + row)
    d = tl.arange(0, KP)
    j = tl.load(first + row) + (begin - origin) // C
    ahead = end < tl.load(starts + row + 1)
    at = tl.load(first_n + row) + (begin - origin) // NC
    nt = tl.load(n + (at * H + h) * K + d, d < K, 0.0)
    if begin == origin:
        dnt = tl.load(ds0 + ((row * H + h) * K + d) * (V + 1) + V, d < K, 0.0)
    else:
        dnt = tl.load(dn + ((j - 1) * H + h) * K + d, d < K, 0.0)
    left = tl.sum(nt * dnt, 0)
    j += (end - begin + C - 1) // C
    at += (end - begin) // NC
    nt = tl.load(n + (at * H + h) * K + d, ahead & (d < K), 0.0)
    dnt = tl.load(dn + ((j - 1) * H + h) * K + d, ahead & (d < K), 0.0)
    right = tl.sum(nt * dnt, 0) + tl.load(tail + row * H + h, end == tl.load(starts + row + 1), 0.0)
    o = tl.arange(0, BP)
    at = product + (o.to(tl.int64) * blocks + b) * H + h
    left += tl.sum(tl.load(at, o < BORDERS, 0.0), 0)
    right += tl.sum(tl.load(at + H, ahead & (o < BORDERS), 0.0), 0)
    t = begin + tl.arange(0, B)
    inside = t < end
    earlier = inside & (t > begin)
    step = tl.zeros([B], tl.float32)
    own = tl.zeros([B], tl.float32)
    for x in tl.static_range(TILES):
        at = (tl.full([], x, tl.int64) * H + h) * N + t
        mine = tl.load(kdk + at, inside, 0.0)
        own += mine
        step += tl.load(kdk + at - 1, earlier, 0.0)
    read = tl.load(qdq + h * N + t - 1, earlier, 0.0)
    doubt = step * step + read * read
    step -= read
    read = tl.load(qdq + h * N + t, inside, 0.0)
    final = own - read
    a = _decays(f, m, m0, t, inside, origin, row, h, N, H, HAS)
    open = a > CLOSED
    step = tl.where(t == begin, left, step)
    keep = tl.where(open, 1.0, 0.0)
    _k, x = tl.associative_scan((keep, tl.where(open, step, 0.0)), 0, _linear)
    _k, doubt = tl.associative_scan((keep, tl.where(open, doubt, 0.0)), 0, _linear)
    error = tl.sum(tl.where(t == end - 1, x + final, 0.0), 0) - right
    since = tl.max(tl.where(open, begin, t), 0)
    all = tl.sum(tl.where(t == end - 1, doubt + own * own + read * read, 0.0), 0)
    x -= tl.where(t >= since, error * (doubt / tl.maximum(all, 1e-30)), 0.0)
    kept = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E < tl.load(
        m + h * N + t, inside, 0.0
    )
    through = tl.load(D + h * N + t, inside, 0.0)
    x += tl.where(kept, through, 0.0)
    tl.store(di + t * H + h, own + tl.where(kept, 0.0, through), inside)
    g = tl.load(f + t * H + h, inside, 0.0).to(tl.float32)
    e = tl.exp2(-tl.abs(g) * LOG2E)
    tl.store(df + t * H + h, x * tl.where(g > 0, e, 1.0) / (1 + e), inside)
    if begin == origin:
        tl.store(dm0 + row * H + h, tl.sum(tl.where(t == begin, x, 0.0), 0))
