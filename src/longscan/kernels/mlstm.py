"""`mlstm` on a GPU: with the running maximum taken out of the gates, a scan with scalar decays.

Let m_t be the running maximum of `ops.mlstm`, a_t = log f_t + m_{t-1} - m_t and c_t = i_t - m_t.
Neither is positive, and with [v | 1] for v the op is

    S_t = exp(a_t) S_{t-1} + exp(c_t) k_t [v_t | 1],    [num_t | qn_t] = q_t S_t

m_t hangs on the gates only, so a small kernel finds it first (`kernels.mlstm_gates`). The
normaliser n, the last column of S, must keep its digits, as h divides by it: it has float32 sums
of its own, outside the products (`weigh`, `carry`). `scores` then knows the products of a chunk and
the denominators, and `scan` holds S and goes through the chunks. Backward, `walk` stores S before
every chunk, and its gradient after it; of them `queries` and `keys` make the gradients of q, k, v.
Where one program holds all of S, `kernels.mlstm_whole` does all that with less memory.

All tokens lie on one axis of N, a sequence after the other; [.., N] tensors have an axis of heads
first. Chunks of C tokens begin where sequences begin. Logarithms are to the base 2. A letter d
before a name is the gradient by it, a bar the sum over a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


@triton.jit
def _there(o, N: tl.constexpr, B: tl.constexpr):
    """Which of o are below N, where tiles of B may reach beyond it."""
    there = tl.full(o.shape, True, tl.int1)
    if N % B != 0:
        there = o < N
    return there


@triton.jit
def _columns(x):
    """x [n] as [n, 16] of bfloat16, whose first three columns add up to it."""
    c = tl.arange(0, 16)[None, :]
    high = x.to(tl.bfloat16).to(tl.float32)
    x -= high
    middle = x.to(tl.bfloat16).to(tl.float32)
    x -= middle
    low = tl.where(c == 2, x[:, None], 0.0)
    return tl.where(c == 0, high[:, None], tl.where(c == 1, middle[:, None], low)).to(tl.bfloat16)


@triton.jit
def _weights(steps, rest, gain, line, o, u, left):
    """What tokens `u` of a chunk weigh in the state that its tokens `o` read; it has `left`."""
    x = tl.load(steps + line + o, o < left, 0.0)
    y = tl.load(steps + line + u, u < left, 0.0)
    whole = x[:, None] - y[None, :]
    x = tl.load(rest + line + o, o < left, 0.0)
    y = tl.load(gain + line + u, u < left, 0.0)
    seen = (o[:, None] >= u[None, :]) & (o < left)[:, None]
    return tl.exp2(tl.where(seen, whole + (x[:, None] + y[None, :]), -1e4))


@entry
@triton.jit(do_not_specialize=["N", "eps"])
def scores(
    q, k, m, steps, rest, gain, read, n, over, qn, M, chunks, N, eps,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M [H, N, C], what tokens of a chunk read of its C, already over the denominator.

    n [chunks, H, K]: the normaliser before chunks. over [H, N]: `read` over the denominator; qn:
    what that is of, q . n.
    """
    pid = tl.program_id(0).to(tl.int64)
    j, h = pid // H, pid % H
    t0, end = tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    left = (end - t0).to(tl.int32)
    o = tl.arange(0, C)
    e = tl.arange(0, BD)
    inside = o < left
    line = h * N + t0
    at = (t0 * H + h) * K + o[:, None].to(tl.int64) * (H * K) + e[None, :]
    enter = tl.load(read + line + o, inside, 0.0)
    least = tl.exp2(-tl.load(m + line + o, inside, 0.0))
    p = tl.zeros([C, C], tl.float32)
    z = tl.zeros([C], tl.float32)
    for d0 in range(0, K, BD):  # of one turn or one stage: no load runs ahead of what reads twice
        d = _there(d0 + e, K, BD)
        qt = tl.load(q + at + d0, inside[:, None] & d[None, :], 0.0)
        kt = tl.load(k + at + d0, inside[:, None] & d[None, :], 0.0)
        p = tl.dot(qt.to(DT), tl.trans(kt.to(DT)), p, input_precision=PRECISION)
        nt = tl.load(n + pid * K + d0 + e, d, 0.0)
        z += tl.sum(qt.to(tl.float32) * nt[None, :], 1)
    p *= _weights(steps, rest, gain, line, o, o, left)
    z = tl.sum(p, 1) + z * enter
    one = 1 / (tl.maximum(tl.abs(z), least) + eps)
    tl.store(qn + line + o, z, inside)
    tl.store(over + line + o, one * enter, inside)
    square = line * C + o[:, None] * C + o[None, :]
    tl.store(M + square, (p * one[:, None]).to(M.dtype.element_ty), inside[:, None])


@entry
@triton.jit(do_not_specialize=["N", "eps"])
def queries(
    q, k, v, do, s, n, m, qn, steps, rest, gain, read, over, dm, product, M, dM, dq, bar,
    chunks, starts, first, N, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NC: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, TURNS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, KP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_t = over_t s do_t + sum_s dM_ts k_s and a term of the normaliser, of R tokens of a chunk.

    s [chunks, H, K, V], the states before chunks; n, the normaliser before chunks of NC tokens,
    counted by `first`. M, dM [H, N, C]: M as in `scores`, here of chunks of C, and the gradient of
    q k. dm: gradient of m through eps; product: q . dq; bar [chunks, H, C / R, K]: what q adds to
    the normaliser's gradient.

    How much a denominator weighs, h . dh, is the product of q with its own gradient through the
    numerator, never that of a rounded h: where one token rules an output, the gradients through
    both cancel.
    """
    pid = tl.program_id(0).to(tl.int64)
    part, pid = pid % (C // R), pid // (C // R)
    j, h = pid // H, pid % H
    row, t0, end = tl.load(chunks + j * 3), tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    left = (end - t0).to(tl.int32)
    o = (part * R).to(tl.int32) + tl.arange(0, R)
    u = tl.arange(0, C)
    e = tl.arange(0, KP)
    inside, present, there = o < left, u < left, _there(e, K, KP)
    mine = inside[:, None] & there[None, :]
    at, line = t0 * H + h, h * N + t0
    j = tl.load(first + row) + (t0 - tl.load(starts + row)) // NC
    od, ok = tl.arange(0, BD), tl.arange(0, BK)
    ro, ru = o[:, None].to(tl.int64) * H, u[:, None].to(tl.int64) * H
    p, dp = tl.zeros([R, C], tl.float32), tl.zeros([R, C], tl.float32)
    x = tl.zeros([R, KP], tl.float32)
    for i in range(0, TURNS):
        d = i * BD + od
        c = _there(d, V, TURNS * BD)
        g = tl.load(do + (at + ro) * V + d[None, :], inside[:, None] & c[None, :], 0.0).to(DT)
        y = tl.load(v + (at + ru) * V + d[None, :], present[:, None] & c[None, :], 0.0).to(DT)
        dp = tl.dot(g, tl.trans(y), dp, input_precision=PRECISION)
        y = s + (pid * K + e[:, None]) * V + d[None, :]
        y = tl.load(y, there[:, None] & c[None, :], 0.0).to(DT)
        x = tl.dot(g, tl.trans(y), x, input_precision=PRECISION)
        d = i * BK + ok
        c = _there(d, K, TURNS * BK)
        g = tl.load(q + (at + ro) * K + d[None, :], inside[:, None] & c[None, :], 0.0).to(DT)
        y = tl.load(k + (at + ru) * K + d[None, :], present[:, None] & c[None, :], 0.0).to(DT)
        p = tl.dot(g, tl.trans(y), p, input_precision=PRECISION)
    enter = tl.load(read + line + o, inside, 0.0)
    least = tl.exp2(-tl.load(m + line + o, inside, 0.0))
    all = tl.load(qn + line + o, inside, 0.0)
    nt = tl.load(n + (j * H + h) * K + e, e < K, 0.0)
    qt = tl.load(q + (at + ro) * K + e[None, :], mine, 0.0).to(DT)
    one = 1 / (tl.maximum(tl.abs(all), least) + eps)
    tl.store(over + line + o, one * enter, inside)
    x *= (one * enter)[:, None]
    through = tl.sum(x * qt.to(tl.float32), 1)
    w = _weights(steps, rest, gain, line, o, u, left)
    y = p * w
    square = line * C + o[:, None] * C + u[None, :]
    tl.store(M + square, (y * one[:, None]).to(M.dtype.element_ty), inside[:, None])
    before = all - tl.sum(y, 1)
    dp *= one[:, None]
    delta = through + tl.sum(y * dp, 1)
    tl.store(dm + line + o, -eps * delta * one, inside)
    dqn = tl.where(all > 0, -one, one) * delta
    dqn = tl.where(tl.abs(all) > least, dqn, 0.0)
    dp = (w * (dp + dqn[:, None])).to(dM.dtype.element_ty)
    tl.store(dM + square, dp, inside[:, None])
    # Of dM as it is rounded: so it is in the products of k with its gradients, and errors cancel.
    through += dqn * before + tl.sum(dp.to(tl.float32) * p, 1)
    tl.store(product + line + o, through, inside)
    own = dqn * enter
    high = own.to(DT).to(tl.float32)
    c = tl.arange(0, 16)[None, :]
    y = tl.where(c == 0, high[:, None], tl.where(c == 1, (own - high)[:, None], 0.0)).to(DT)
    y = tl.sum(tl.dot(tl.trans(qt), y, input_precision=PRECISION), 1)
    tl.store(bar + (pid * (C // R) + part) * K + e, y, e < K)
    y = tl.load(k + (at + ru) * K + e[None, :], present[:, None] & there[None, :], 0.0).to(DT)
    x = tl.dot(dp.to(DT), y, x + own[:, None] * nt[None, :], input_precision=PRECISION)
    tl.store(dq + (at + ro) * K + e[None, :], x.to(dq.dtype.element_ty), mine)


@entry
@triton.jit(do_not_specialize=["N"])
def keys(
    q, k, v, do, s, n, M, dM, keep, product, dk, dv, chunks, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr, KP: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of R keys and values of a chunk, M and dM of its C tokens taken the other way:

        dk_s = keep_s s v_s + sum_t dM_ts q_t,    dv_s = keep_s k_s s + sum_t M_ts do_t

    s [chunks, H, K, V], n [chunks, H, K]: the gradients of states and normalisers after chunks.
    product: k . dk.
    """
    pid = tl.program_id(0).to(tl.int64)
    part, pid = pid % (C // R), pid // (C // R)
    j, h = pid // H, pid % H
    t0, end = tl.load(chunks + j * 3 + 1), tl.load(chunks + j * 3 + 2)
    left = (end - t0).to(tl.int32)
    o = (part * R).to(tl.int32) + tl.arange(0, R)
    u = tl.arange(0, C)
    od = tl.arange(0, BD)
    e = tl.arange(0, KP)
    inside, present, there = o < left, u < left, _there(e, K, KP)
    mine = inside[:, None] & there[None, :]
    at, line = t0 * H + h, h * N + t0
    ro, ru = o[:, None].to(tl.int64) * H, u[:, None].to(tl.int64) * H
    own = tl.load(keep + line + o, inside, 0.0)
    nt = tl.load(n + pid * K + e, e < K, 0.0)
    along = (at + ro) * K + e[None, :]
    square = line * C + u[:, None] * C + o[None, :]
    if tl.bfloat16 == DT:
        kt = tl.load(k + along, mine, 0.0).to(DT)
    Mt = tl.trans(tl.load(M + square, present[:, None], 0.0).to(DT))
    x = tl.zeros([R, KP], tl.float32)
    for d0 in range(0, V, BD):
        d = d0 + od
        c = _there(d, V, BD)
        y = tl.load(v + (at + ro) * V + d[None, :], inside[:, None] & c[None, :], 0.0).to(DT)
        S = s + (pid * K + e[:, None]) * V + d[None, :]
        S = tl.load(S, there[:, None] & c[None, :], 0.0).to(DT)
        x = tl.dot(y, tl.trans(S), x, input_precision=PRECISION)
        g = tl.load(do + (at + ru) * V + d[None, :], present[:, None] & c[None, :], 0.0).to(DT)
        if tl.bfloat16 == DT:
            z = tl.dot(kt, S)
        else:  # in pieces, as registers are few
            z = tl.zeros([R, BD], tl.float32)
            for e0 in range(0, K, BD):
                b = _there(e0 + od, K, BD)
                a = k + (at + ro) * K + e0 + od[None, :]
                a = tl.load(a, inside[:, None] & b[None, :], 0.0).to(DT)
                t = s + (pid * K + e0 + od[:, None]) * V + d[None, :]
                t = tl.load(t, b[:, None] & c[None, :], 0.0).to(DT)
                z = tl.dot(a, t, z, input_precision=PRECISION)
        z = tl.dot(Mt, g, z * own[:, None], input_precision=PRECISION)
        z = z.to(dv.dtype.element_ty)
        tl.store(dv + (at + ro) * V + d[None, :], z, inside[:, None] & c[None, :])
    Mt = tl.trans(tl.load(dM + square, present[:, None], 0.0).to(DT))
    y = tl.load(q + (at + ru) * K + e[None, :], present[:, None] & there[None, :], 0.0).to(DT)
    x = tl.dot(Mt, y, (x + nt[None, :]) * own[:, None], input_precision=PRECISION)
    tl.store(dk + along, x.to(dk.dtype.element_ty), mine)
    y = tl.load(k + along, mine, 0.0).to(tl.float32)  # anew, as registers are few
    tl.store(product + line + o, tl.sum(x * y, 1), inside)


@triton.jit
def _entering(
    x, sums, b, h, blocks, row, at, whole, H: tl.constexpr, SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The state x before a sequence carried to its block b (REVERSE: its gradient, from the end).

    sums [blocks, H, SIZE + 4]: what each block adds to the state, its normaliser's after the rest,
    and its decay; blocks: the first of each sequence.
    """
    e = tl.load(blocks + row)
    count = b - e
    if REVERSE:
        e = tl.load(blocks + row + 1) - 1
        count = e - b
    for _p in range(0, count):
        base = sums + (e * H + h) * (SIZE + 4)
        x = x * tl.load(base + SIZE) + tl.load(base + at, whole, 0.0)
        e += -1 if REVERSE else 1
    return x


@entry
@triton.jit(do_not_specialize=["N", "borders"])
def walk(
    k, v, keep, total, more, x0, sums, s, s_end, s0, other, product,
    table, blocks, first, firsts, starts, N, borders,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, HAS0: tl.constexpr,
    SPLIT: tl.constexpr, SUM: tl.constexpr, MORE: tl.constexpr, REVERSE: tl.constexpr,
    G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """s [chunks, H, K, V], the states before chunks (REVERSE: their gradients after chunks).

    One program for each block of `table`. x0 [rows, H, K, V + 1], without its last column: what
    enters sequences; SPLIT: they have several blocks, sums are as in `_entering`. REVERSE also
    gives the gradient s_end, like x0, of the first state, s0, and multiplies the gradients with the
    states, `other` or s0, at every G-th left border of a chunk: product [tiles, borders, H], one
    sum per tile; firsts: the first such border of each sequence.
    SUM gives `sums` alone, without the last block of a sequence, which no other follows; with MORE
    the normaliser's too, of k weighted with `more` [H, N].
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = tl.cdiv(K, BK) * tl.cdiv(V, BV)
    tile, pid = pid % tiles, pid // tiles
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    origin = tl.load(starts + row)
    j0 = tl.load(first + row) + (begin - origin) // C
    count = (end - begin + C - 1) // C
    ends = end == tl.load(starts + row + 1)
    if REVERSE:
        ends = begin == origin
    if SUM:
        count = tl.where(ends, 0, count)
    dk = (tile // tl.cdiv(V, BV) * BK).to(tl.int32) + tl.arange(0, BK)
    dv = (tile % tl.cdiv(V, BV) * BV).to(tl.int32) + tl.arange(0, BV)
    oc = tl.arange(0, C)
    down = oc[None, :].to(tl.int64) * (H * K) + dk[:, None]
    along = oc[:, None].to(tl.int64) * (H * V) + dv[None, :]
    tall, wide = _there(dk, K, BK)[:, None], _there(dv, V, BV)[None, :]
    whole = tall & wide
    spot = dk[:, None] * V + dv[None, :]
    edge = (row * H + h) * K * (V + 1) + dk[:, None] * (V + 1) + dv[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if HAS and not SUM:
        x = tl.load(x0 + edge, whole, 0.0)
    if SPLIT and not SUM:
        x = _entering(x, sums, b, h, blocks, row, spot, whole, H, K * V + K, REVERSE)
    decay = tl.full([], 1.0, tl.float32)
    near = tl.zeros([BK, 16], tl.float32)
    for p in range(0, count):
        i = p
        if REVERSE:
            i = count - 1 - p
        t0 = begin + i * C
        inside = oc < (end - t0).to(tl.int32)
        kt = tl.load(k + (t0 * H + h) * K + down, inside[None, :] & tall, 0.0)
        if MORE:
            z = _columns(tl.load(more + h * N + t0 + oc, inside, 0.0))
        y = tl.load(v + (t0 * H + h) * V + along, inside[:, None] & wide, 0.0)
        a = kt.to(tl.float32) * tl.load(keep + h * N + t0 + oc, inside, 0.0)[None, :]
        g = tl.load(total + (j0 + i) * H + h)
        at = ((j0 + i) * H + h) * K * V + spot
        if SUM:
            decay *= g
        else:
            tl.store(s + at, x.to(s.dtype.element_ty), whole)
        x *= g
        if MORE:  # after the last product with x ended, or the compiler has each wait for another
            near = tl.dot(kt, z, near * g)
        high = a.to(DT)
        x = tl.dot(high, y.to(DT), x, input_precision=PRECISION)
        if REVERSE and tl.bfloat16 == DT:  # the gradient of the first m is a difference of sums
            x = tl.dot((a - high.to(tl.float32)).to(DT), y.to(DT), x)
        if REVERSE and not SUM and i % G == 0:
            like = tl.load(other + at, whole & (t0 != origin), 0.0).to(tl.float32)
            if HAS0:
                like += tl.load(s0 + edge, whole & (t0 == origin), 0.0)
            border = tl.load(firsts + row) + (t0 - origin) // (C * G)
            to = product + (tile * borders + border) * H + h
            tl.store(to, tl.sum(tl.sum(x * like, 1), 0))
    if SUM:
        sums += pid * (K * V + K + 4)
        tl.store(sums + spot, x, whole)
        tl.store(sums + K * V + dk, tl.sum(near, 1), (dk < K) & (tile % tl.cdiv(V, BV) == 0))
        tl.store(sums + K * V + K, decay, tile == 0)
    elif REVERSE:
        tl.store(s_end + edge, x, whole & ends)


@entry
@triton.jit(do_not_specialize=["N"])
def scan(
    q, k, v, M, read, keep, total, s0, sums, s_end, out, table, blocks, first, starts, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, SPLIT: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h_t = sum_s M_ts v_s + read_t q_t S, where the state gains keep_s k_s v_s.

    s0, s_end [rows, H, K, V + 1], without the last column; blocks of sequences as in `walk`. S is
    kept transposed, so that q and k go to the tensor cores as they are loaded.
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
    wide, thin = _there(d, K, KP)[None, :], _there(w, V, BV)[:, None]
    S = tl.zeros([BV, KP], tl.float32)
    edge = (row * H + h) * K * (V + 1) + d[None, :] * (V + 1) + w[:, None]
    if HAS:
        S = tl.load(s0 + edge, wide & thin, 0.0)
    if SPLIT:
        spot = d[None, :] * V + w[:, None]
        S = _entering(S, sums, b, h, blocks, row, spot, wide & thin, H, K * V + K, False)
    across = oc[:, None].to(tl.int64) * (H * K) + d[None, :]
    along = oc[None, :].to(tl.int64) * (H * V) + w[:, None]
    square = oc[:, None] * C + oc[None, :]
    for i in range(0, count):
        t0 = begin + i * C
        inside = oc < (end - t0).to(tl.int32)
        line = h * N + t0
        qt = tl.load(q + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0).to(DT)
        kt = tl.load(k + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0).to(DT)
        vt = tl.load(v + (t0 * H + h) * V + along, inside[None, :] & thin, 0.0)
        Mt = tl.load(M + line * C + square, inside[:, None], 0.0).to(DT)
        g = tl.load(total + (j0 + i) * H + h)
        x = tl.dot(S.to(DT), tl.trans(qt), input_precision=PRECISION)
        x *= tl.load(read + line + oc, inside, 0.0)[None, :]
        x = tl.dot(vt.to(DT), tl.trans(Mt), x, input_precision=PRECISION)
        to = out + (t0 * H + h) * V + along
        tl.store(to, x.to(out.dtype.element_ty), inside[None, :] & thin)
        vt = (vt.to(tl.float32) * tl.load(keep + line + oc, inside, 0.0)[None, :]).to(DT)
        S *= g
        S = tl.dot(vt, kt, S, input_precision=PRECISION)
    tl.store(s_end + edge, S, wide & thin & (end == tl.load(starts + row + 1)))
