"""The gates of `mlstm` on a GPU: the running maximum, weights of tokens, their gradients.

Names are those of `kernels.mlstm`. Nothing here goes through the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
CLOSED = tl.constexpr(-48.0)  # lower log decays let nothing through that float32 could hold
LEAST = tl.constexpr(-200.0)
EMPTY = tl.constexpr(-1e30)


@triton.jit
def _log_sigmoid(f):
    """By a series, since 1 + exp(-f) loses the digits of gates near 1."""
    x = tl.exp2(-tl.abs(f) * LOG2E)
    z = x / (2 + x)
    y = z * z
    p = 0.0 * y
    for n in tl.static_range(15, 1, -2):
        p = p * y + 1.0 / n
    return (tl.minimum(f, 0.0) - 2 * z * (y * p + 1)) * LOG2E


@triton.jit
def _top(g1, m1, g2, m2):
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit
def _linear(a1, x1, a2, x2):
    return a1 * a2, x1 * a2 + x2


@triton.jit
def _final(x, B: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, B) == B - 1, x, 0.0), 0)


@entry
@triton.jit(do_not_specialize=["N", "H"])
def gates(
    i, f, m0, decay, top, m, m_end, table, first, starts, N, H,
    HAS: tl.constexpr, SPLIT: tl.constexpr, SUM: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The running maximum m [H, N] in a block of at most B tokens.

    i, f [N, H]; m0, m_end [rows, H], natural logarithms. SPLIT: sequences have several blocks;
    decay, top [blocks, H]: how much each lowers what enters it, and the maximum at its end if
    nothing does. SUM gives these alone.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    t = begin + tl.arange(0, B)
    inside = t < end
    g = _log_sigmoid(tl.load(f + t * H + h, inside, 0.0).to(tl.float32))
    x = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E
    g = tl.where(inside, g, 0.0)
    x = tl.where(inside, x, 2 * EMPTY)
    g, x = tl.associative_scan((g, x), 0, _top)
    if SUM:
        tl.store(decay + pid, _final(g, B))
        tl.store(top + pid, _final(x, B))
    else:
        last = tl.full([], 0.0, tl.float32)
        if HAS:
            last = tl.load(m0 + row * H + h) * LOG2E
        if SPLIT:
            for e in range(tl.load(first + row), b, P):
                o = e + tl.arange(0, P)
                y = tl.load(decay + o * H + h, o < b, 0.0)
                z = tl.load(top + o * H + h, o < b, 2 * EMPTY)
                y, z = tl.associative_scan((y, z), 0, _top)
                last = tl.maximum(last + _final(y, P), _final(z, P))
        x = tl.maximum(last + g, x)
        tl.store(m + h * N + t, x, inside)
        tl.store(m_end + row * H + h, _final(x, B) / LOG2E, end == tl.load(starts + row + 1))


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


@entry
@triton.jit(do_not_specialize=["N"])
def weigh(
    k, i, f, m0, m, steps, rest, gain, read, keep, total, spread, bar, chunks, starts, N,
    H: tl.constexpr, K: tl.constexpr, HAS: tl.constexpr, BAR: tl.constexpr, SPREAD: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """What tokens weigh in their chunk; all [H, N] but total [chunks, H], bar [chunks, H, K].

    steps + rest: the sum of log decays from the chunk's start, its whole numbers apart, which are
    exact whatever they add up to, so that large decays do not drown small ones; gain: c less rest;
    read: the weight of the state that enters; keep: that of a token in the state that leaves;
    total: the whole chunk's decay; spread (with SPREAD): what times `read` is a token's weight in
    its chunk, where no decay is strong; bar (with BAR): what the chunk adds to the normaliser.
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
    y = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E
    y = tl.where(inside, y - tl.load(m + h * N + t, inside, 0.0), -1e4)
    x = _decays(f, m, m0, t, inside, tl.load(starts + row), row, h, N, H, HAS)
    x = tl.maximum(x, LEAST)
    whole = tl.floor(x + 0.5)
    x -= whole
    whole_end, x_end = tl.sum(whole, 0), tl.sum(x, 0)
    whole, x = tl.cumsum(whole, 0), tl.cumsum(x, 0)
    weight = tl.exp2((whole_end - whole) + (x_end - x) + y)
    tl.store(steps + h * N + t, whole, inside)
    tl.store(rest + h * N + t, x, inside)
    tl.store(gain + h * N + t, y - x, inside)
    tl.store(read + h * N + t, tl.exp2(whole + x), inside)
    tl.store(keep + h * N + t, weight, inside)
    tl.store(total + j * H + h, tl.exp2(whole_end + x_end))
    if SPREAD:
        tl.store(spread + h * N + t, tl.exp2(tl.minimum(y - x - whole, 126.0)), inside)
    if BAR:
        x = tl.sum(tile.to(tl.float32) * weight[:, None], 0)
        tl.store(bar + (j * H + h) * K + d, x, d < K)


@entry
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


@entry
@triton.jit(do_not_specialize=["N", "H"])
def routes(
    i, m, dm, dm_end, kept, own, D, table, first, starts, N, H,
    HAS: tl.constexpr, SPLIT: tl.constexpr, SUM: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """D [H, N], the gradient that reaches m_t: of what reads it, and of m_{t+1} where that kept it.

    dm_end [rows, H]: gradient of the last m. Blocks, SPLIT and SUM as in `gates`; kept, own
    [blocks, H]: whether a block lets through what comes from later ones, and its own gradient.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    t = end - 1 - tl.arange(0, B)
    inside = t >= begin
    later = inside & (t + 1 < tl.load(starts + row + 1))
    i1 = tl.load(i + (t + 1) * H + h, later, 0.0).to(tl.float32) * LOG2E
    m1 = tl.load(m + h * N + t + 1, later, 1.0)
    keep = tl.where(i1 < m1, 1.0, 0.0)
    keep, y = tl.associative_scan((keep, tl.load(dm + h * N + t, inside, 0.0)), 0, _linear)
    if SUM:
        tl.store(kept + pid, _final(keep, B))
        tl.store(own + pid, _final(y, B))
    else:
        x = tl.full([], 0.0, tl.float32)
        if HAS:
            x = tl.load(dm_end + row * H + h)
        if SPLIT:
            final = tl.load(first + row + 1) - 1
            for e in range(0, final - b, P):
                o = final - e - tl.arange(0, P)
                g = tl.load(kept + o * H + h, o > b, 1.0)
                z = tl.load(own + o * H + h, o > b, 0.0)
                g, z = tl.associative_scan((g, z), 0, _linear)
                x = x * _final(g, P) + _final(z, P)
        tl.store(D + h * N + t, y + keep * x, inside)


@entry
@triton.jit(do_not_specialize=["N", "H", "blocks"])
def gates_backward(
    i, f, m0, m, D, qdq, kdk, product, n, dn, ds0, tail, di, df, dm0,
    table, first, first_n, starts, N, H, blocks,
    K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, TAIL: tl.constexpr, BORDERS: tl.constexpr,
    NC: tl.constexpr, C: tl.constexpr, B: tl.constexpr, KP: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates in a block of at most B tokens.

    That of i_t is k_t . dk_t. That of log f_t is all that later tokens read of earlier ones, which
    grows by k_s . dk_s - q_s . dq_s from a token to the next. Rounding errors add up in that sum.
    It is known at both ends of a block, where it is the product of the state and its gradient, and
    at closed gates, where it is 0: it begins anew there, and its error at the right end is spread
    over the tokens that led to it, as the squares of their steps. tail [rows, H]: that product at
    the ends of sequences, 0 without TAIL. n is counted by `first_n` in chunks of NC tokens, dn by
    `first` in chunks of C.
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
    dnt = tl.load(dn + ((j - 1) * H + h) * K + d, (begin > origin) & (d < K), 0.0)
    edge = ((row * H + h) * K + d) * (V + 1) + V
    dnt += tl.load(ds0 + edge, (begin == origin) & (d < K), 0.0)
    left = tl.sum(nt * dnt, 0)
    nt = tl.load(n + ((at + B // NC) * H + h) * K + d, ahead & (d < K), 0.0)
    dnt = tl.load(dn + ((j + B // C - 1) * H + h) * K + d, ahead & (d < K), 0.0)
    right = tl.sum(nt * dnt, 0)
    if TAIL:
        right += tl.load(tail + row * H + h, end == tl.load(starts + row + 1), 0.0)
    o = tl.arange(0, BP)
    at = product + (o.to(tl.int64) * blocks + b) * H + h
    left += tl.sum(tl.load(at, o < BORDERS, 0.0), 0)
    right += tl.sum(tl.load(at + H, ahead & (o < BORDERS), 0.0), 0)
    t = begin + tl.arange(0, B)
    inside = t < end
    earlier = inside & (t > begin)
    own = tl.load(kdk + h * N + t, inside, 0.0)
    step = tl.load(kdk + h * N + t - 1, earlier, 0.0)
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
    top = tl.load(m + h * N + t, inside, 0.0)
    kept = tl.load(i + t * H + h, inside, 0.0).to(tl.float32) * LOG2E < top
    through = tl.load(D + h * N + t, inside, 0.0)
    x += tl.where(kept, through, 0.0)
    tl.store(di + t * H + h, own + tl.where(kept, 0.0, through), inside)
    g = tl.load(f + t * H + h, inside, 0.0).to(tl.float32)
    e = tl.exp2(-tl.abs(g) * LOG2E)
    tl.store(df + t * H + h, x * tl.where(g > 0, e, 1.0) / (1 + e), inside)
    if begin == origin:
        tl.store(dm0 + row * H + h, tl.sum(tl.where(t == begin, x, 0.0), 0))
