"""`mlstm` of heads whose state fits into the registers of one program, in bfloat16.

The recurrence, the names and the weights are those of `kernels.mlstm`. Where a program holds all of
a head's state, nothing needs to be kept of the states: `outputs` goes through the chunks with S and
the normaliser, `look_back` does so again in the backward and makes the gradients of the queries on
its way, `look_ahead` goes from the end to the begin with the gradients of S and of the normaliser
and makes those of keys and values. Products are of bfloat16. The normaliser and its gradient go
through them too, in three numbers each that together have the digits of float32.

A compiler that knows how addresses grow from chunk to chunk keeps one for each row of each tile,
and registers overflow. So a 0 is mixed in that it cannot know (`zero`). The order of products, too,
is what leaves the most registers free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels.mlstm import _columns, _entering, _there, _weights


@triton.jit
def _within(steps, rest, gain, read, spread, total, line, o, left):
    """As `_weights` of a chunk, of a factor of either token unless the chunk's decay is strong."""
    w = tl.where(o[:, None] >= o[None, :], read[:, None] * spread[None, :], 0.0)
    if total < 2**-80:
        w = _weights(steps, rest, gain, line, o, o, left)
    return w


@entry
@triton.jit(do_not_specialize=["N", "eps"])
def outputs(
    q, k, v, m, steps, rest, gain, read, spread, keep, total, s0, sums, n, qn, over, s_end, out,
    table, blocks, first, starts, N, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, C: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out_t = (q_t S, and sum_s of (q_t . k_s) v_s weighted) over the denominator.

    n [chunks, H, K]: the normaliser before chunks; qn [H, N]: what the denominator is of, q . n;
    s_end [rows, H, K, V + 1]. Programs are for BV values of a block of `table`, a stretch of a
    sequence; sums as in `walk`.
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
    tall, wide, thin = (d < K)[:, None], _there(d, K, KP)[None, :], _there(w, V, BV)[None, :]
    S = tl.zeros([KP, BV], tl.float32)
    near = tl.zeros([KP], tl.float32)
    edge = ((row * H + h) * K + d) * (V + 1)
    if HAS:
        S = tl.load(s0 + edge[:, None] + w[None, :], tall & thin, 0.0)
        near = tl.load(s0 + edge + V, d < K, 0.0)
    spot = d[:, None] * V + w[None, :]
    S = _entering(S, sums, b, h, blocks, row, spot, tall & thin, H, K * V + K, False)
    near = _entering(near, sums, b, h, blocks, row, K * V + d, d < K, H, K * V + K, False)
    across = oc[:, None].to(tl.int64) * (H * K) + d[None, :]
    along = oc[:, None].to(tl.int64) * (H * V) + w[None, :]
    zero = tl.load(starts)
    for i in range(0, count):
        t0 = begin + (i * C ^ zero)
        left = (end - t0).to(tl.int32)
        inside = oc < left
        there = oc + (t0 - end).to(tl.int32) < 0  # the same, but not kept from what loads ahead
        line = h * N + t0
        at = (j0 + i) * H + h
        qt = tl.load(q + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        kt = tl.load(k + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        vt = tl.load(v + (t0 * H + h) * V + along, inside[:, None] & thin, 0.0)
        g = tl.load(total + at)
        enter = tl.load(read + line + oc, there, 0.0)
        leave = tl.load(spread + line + oc)  # where it is another chunk's, it is in the future
        least = tl.exp2(-tl.load(m + line + oc, there, 0.0))
        own = tl.load(keep + line + oc, there, 0.0)
        tl.store(n + at * K + d, near, (d < K) & (tile == 0))
        z = tl.sum(tl.dot(qt, _columns(near)), 1) * enter
        p = tl.dot(qt, tl.trans(kt))
        p *= _within(steps, rest, gain, enter, leave, g, line, oc, -(t0 - end).to(tl.int32))
        z += tl.sum(p, 1)
        one = 1 / (tl.maximum(tl.abs(z), least) + eps)
        tl.store(qn + line + oc, z, there & (tile == 0))
        tl.store(over + line + oc, one * enter, there & (tile == 0))
        x = tl.dot(qt, S.to(tl.bfloat16)) * enter[:, None]
        x = tl.dot(p.to(tl.bfloat16), vt, x) * one[:, None]
        to = out + (t0 * H + h) * V + along
        tl.store(to, x.to(tl.bfloat16), there[:, None] & thin)
        vt = (vt.to(tl.float32) * own[:, None]).to(tl.bfloat16)
        S = tl.dot(tl.trans(kt), vt, S * g)
        near = near * g + tl.sum(tl.dot(tl.trans(kt), _columns(own)), 1)
    ends = end == tl.load(starts + row + 1)
    tl.store(s_end + edge[:, None] + w[None, :], S, tall & thin & ends)
    tl.store(s_end + edge + V, near, (d < K) & (tile == 0) & ends)


@entry
@triton.jit(do_not_specialize=["N", "eps"])
def look_back(
    q, k, v, do, n, m, qn, over, steps, rest, gain, read, spread, keep, total, s0, sums,
    own, dm, product, M, dM, s, dq, table, blocks, first, firsts, starts, N, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """dq, and what the other gradients need; as `kernels.mlstm.queries`, S in registers.

    own [H, N]: what q adds to the normaliser's gradient; M, dM
    [H, N, C], dm and product as there. s [borders, H, K, V]: S before every G-th chunk, `firsts`
    counts them. Tiles of the width of K have tokens in columns.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    origin = tl.load(starts + row)
    j0 = tl.load(first + row) + (begin - origin) // C
    count = (end - begin + C - 1) // C
    d = tl.arange(0, KP)
    w = tl.arange(0, VP)
    oc = tl.arange(0, C)
    tall, wide, thin = (d < K)[:, None], _there(d, K, KP)[None, :], _there(w, V, VP)[None, :]
    S = tl.zeros([KP, VP], tl.float32)
    spot = d[:, None] * V + w[None, :]
    if HAS:
        edge = ((row * H + h) * K + d[:, None]) * (V + 1) + w[None, :]
        S = tl.load(s0 + edge, tall & thin, 0.0)
    S = _entering(S, sums, b, h, blocks, row, spot, tall & thin, H, K * V + K, False)
    across = oc[:, None].to(tl.int64) * (H * K) + d[None, :]
    down = oc[None, :].to(tl.int64) * (H * K) + d[:, None]
    along = oc[:, None].to(tl.int64) * (H * V) + w[None, :]
    square = oc[:, None] * C + oc[None, :]
    same = tl.where(oc[:, None] == oc[None, :], 1.0, 0.0).to(tl.bfloat16)
    zero = tl.load(starts)
    for i in range(0, count):
        t0 = begin + (i * C ^ zero)
        left = (end - t0).to(tl.int32)
        inside = oc < left
        there = oc + (t0 - end).to(tl.int32) < 0  # the same, but not kept from what loads ahead
        line = h * N + t0
        at = (j0 + i) * H + h
        gt = tl.load(do + (t0 * H + h) * V + along, inside[:, None] & thin, 0.0)
        vt = tl.load(v + (t0 * H + h) * V + along, inside[:, None] & thin, 0.0)
        qt = tl.load(q + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        kt = tl.load(k + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        g = tl.load(total + at)
        enter = tl.load(read + line + oc, there, 0.0)
        leave = tl.load(spread + line + oc)
        least = tl.exp2(-tl.load(m + line + oc, there, 0.0))
        all = tl.load(qn + line + oc, there, 0.0)
        near = tl.load(n + at * K + d, d < K, 0.0)
        weight = tl.load(keep + line + oc, there, 0.0)
        one = 1 / (tl.maximum(tl.abs(all), least) + eps)
        high = S.to(tl.bfloat16)
        if i % G == 0:
            border = tl.load(firsts + row) + (t0 - origin) // (C * G)
            tl.store(s + (border * H + h) * (K * V) + spot, high, tall & thin)
        flip = tl.dot(tl.trans(qt), same)
        x = tl.dot(high, tl.trans(gt)) * tl.load(over + line + oc, there, 0.0)[None, :]
        through = tl.sum(x * flip, 0)
        weighted = (vt.to(tl.float32) * weight[:, None]).to(tl.bfloat16)
        S = tl.dot(tl.trans(kt), weighted, S * g)
        pull = tl.zeros([C], tl.float32)
        dp = tl.zeros([C, C], tl.bfloat16)
        if left > 0:  # always; else the compiler, seeing products of dp, has half of the warps idle
            z = tl.dot(gt, tl.trans(vt)) * one[:, None]
            p = tl.dot(qt, tl.trans(kt))
            after = -(t0 - end).to(tl.int32)
            weights = _within(steps, rest, gain, enter, leave, g, line, oc, after)
            y = p * weights
            to = M + line * C + square
            tl.store(to, (y * one[:, None]).to(tl.bfloat16), there[:, None])
            before = all - tl.sum(y, 1)
            delta = through + tl.sum(y * z, 1)
            dqn = tl.where(all > 0, -one, one) * delta
            dqn = tl.where(tl.abs(all) > least, dqn, 0.0)
            dp = (weights * (z + dqn[:, None])).to(tl.bfloat16)
            tl.store(dM + line * C + square, dp, there[:, None])
            # Of dM as it is rounded, as in the products of k with its gradients: errors cancel.
            through += dqn * before + tl.sum(dp.to(tl.float32) * p, 1)
            tl.store(product + line + oc, through, there)
            tl.store(dm + line + oc, -eps * delta * one, there)
            pull = dqn * enter
            tl.store(own + line + oc, pull, there)
        x = tl.dot(tl.trans(kt), tl.trans(dp), x + near[:, None] * pull[None, :])
        tl.store(dq + (t0 * H + h) * K + down, x.to(tl.bfloat16), there[None, :] & tall)


@entry
@triton.jit(do_not_specialize=["N"])
def look_ahead(
    q, k, v, do, M, dM, over, own, keep, total, ds, sums, s, s0,
    n, ds0, product, kdk, dk, dv, table, blocks, first, firsts, starts, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS: tl.constexpr, HAS0: tl.constexpr,
    G: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """dk and dv, from the ends of sequences to their begins:

        dk_s = keep_s (D v_s + n) + sum_t dM_ts q_t,    dv_s = keep_s k_s D + sum_t M_ts do_t

    D, n: the gradients of S and of the normaliser after a chunk; n [chunks, H, K] is kept. ds, ds0
    [rows, H, K, V + 1]: those of the last and the first state. s as in `look_back`; product
    [borders, H]: of S and its gradient at each of these borders; kdk: k . dk.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    row, begin, end = tl.load(table + b * 3), tl.load(table + b * 3 + 1), tl.load(table + b * 3 + 2)
    origin = tl.load(starts + row)
    j0 = tl.load(first + row) + (begin - origin) // C
    count = (end - begin + C - 1) // C
    d = tl.arange(0, KP)
    w = tl.arange(0, VP)
    oc = tl.arange(0, C)
    tall, wide, thin = (d < K)[:, None], _there(d, K, KP)[None, :], _there(w, V, VP)[None, :]
    D = tl.zeros([KP, VP], tl.float32)
    near = tl.zeros([KP], tl.float32)
    spot = d[:, None] * V + w[None, :]
    edge = ((row * H + h) * K + d) * (V + 1)
    if HAS:
        D = tl.load(ds + edge[:, None] + w[None, :], tall & thin, 0.0)
        near = tl.load(ds + edge + V, d < K, 0.0)
    D = _entering(D, sums, b, h, blocks, row, spot, tall & thin, H, K * V + K, True)
    near = _entering(near, sums, b, h, blocks, row, K * V + d, d < K, H, K * V + K, True)
    across = oc[:, None].to(tl.int64) * (H * K) + d[None, :]
    down = oc[None, :].to(tl.int64) * (H * K) + d[:, None]
    along = oc[:, None].to(tl.int64) * (H * V) + w[None, :]
    under = oc[None, :].to(tl.int64) * (H * V) + w[:, None]
    square = oc[:, None] * C + oc[None, :]
    same = tl.where(oc[:, None] == oc[None, :], 1.0, 0.0).to(tl.bfloat16)
    zero = tl.load(starts)
    for p in range(0, count):
        i = count - 1 - p
        t0 = begin + (i * C ^ zero)
        left = (end - t0).to(tl.int32)
        inside = oc < left
        there = oc + (t0 - end).to(tl.int32) < 0  # the same, but not kept from what loads ahead
        line = h * N + t0
        at = (j0 + i) * H + h
        vt = tl.load(v + (t0 * H + h) * V + along, inside[:, None] & thin, 0.0)
        kt = tl.load(k + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        qt = tl.load(q + (t0 * H + h) * K + across, inside[:, None] & wide, 0.0)
        gt = tl.load(do + (t0 * H + h) * V + along, inside[:, None] & thin, 0.0)
        Mt = tl.load(M + line * C + square, inside[:, None], 0.0)
        dMt = tl.load(dM + line * C + square, inside[:, None], 0.0)
        g = tl.load(total + at)
        weight = tl.load(keep + line + oc, there, 0.0)
        tl.store(n + at * K + d, near, d < K)
        high = D.to(tl.bfloat16)
        x = tl.dot(tl.trans(high), tl.trans(kt)) * weight[None, :]
        x = tl.dot(tl.trans(gt), Mt, x)
        x = x.to(tl.bfloat16)
        tl.store(dv + (t0 * H + h) * V + under, x, there[None, :] & tl.trans(thin))
        x = (tl.dot(high, tl.trans(vt)) + near[:, None]) * weight[None, :]
        x = tl.dot(tl.trans(qt), dMt, x)
        y = tl.sum(x * tl.dot(tl.trans(kt), same), 0)
        tl.store(kdk + line + oc, y, there)
        tl.store(dk + (t0 * H + h) * K + down, x.to(tl.bfloat16), there[None, :] & tall)
        weight = tl.load(over + line + oc, there, 0.0)
        z = gt.to(tl.float32) * weight[:, None]
        high = z.to(tl.bfloat16)
        D = tl.dot(tl.trans(qt), high, D * g)
        # What `high` lacks: the gradient of the first m is a difference of sums.
        D = tl.dot(tl.trans(qt), (z - high.to(tl.float32)).to(tl.bfloat16), D)
        weight = tl.load(own + line + oc, there, 0.0)
        near = near * g + tl.sum(tl.dot(tl.trans(qt), _columns(weight)), 1)
        if i % G == 0:
            border = tl.load(firsts + row) + (t0 - origin) // (C * G)
            like = tl.load(s + (border * H + h) * (K * V) + spot, tall & thin & (t0 != origin), 0.0)
            like = like.to(tl.float32)
            if HAS0:
                like += tl.load(s0 + edge[:, None] + w[None, :], tall & thin & (t0 == origin), 0.0)
            tl.store(product + border * H + h, tl.sum(tl.sum(D * like, 1), 0))
    ends = begin == origin
    tl.store(ds0 + edge[:, None] + w[None, :], D, tall & thin & ends)
    tl.store(ds0 + edge + V, near, (d < K) & ends)
