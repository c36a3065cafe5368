"""The gradients of `delta` at all pieces at once, from the states and their gradients between them.

These, the errors and Z are of `longscan.kernels.delta`, where names are explained.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels.delta import _decays, _dot, _put_rows, _queries, _rows


@triton.jit
def _sums(by, i, ok, n, ROWS: tl.constexpr, EVERY: tl.constexpr):
    """b of the rows of a piece of one or two chunks, and at its end, from b of each chunk."""
    b = tl.load(by + i, mask=ok, other=0.0)
    last = tl.load(by + n - 1, mask=n > 0, other=0.0)
    if EVERY > 1:
        more = tl.load(by + ROWS - 1, mask=n > ROWS, other=0.0)
        b += tl.where(i >= ROWS, more, 0.0)
        last += more
    return b, last


@triton.jit
def _by_queries(
    q, k, factors, do, e, states, leaving, dq, parts, step, piece, begin, n, tile, hk, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    EVERY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq; for `decays` what b of each row gets by the queries, and what b of all rows gets by the
    state that enters, of which each channel has a part.
    """
    ROWS: tl.constexpr = C // EVERY // STEPS * STEPS
    WIDE_K: tl.constexpr = (K + BK - 1) // BK * BK
    WIDE: tl.constexpr = (V + BV - 1) // BV * BV
    i, kk = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    ok = i < n
    iq, okq = _queries(i, ok, STEPS)
    r, c = i[:, None], i[None, :]
    token = begin // STEPS
    dy = tl.zeros([C, BK], tl.float32)
    before = tl.zeros([C], tl.float32)
    for group in range(H // HK):
        h = hk * (H // HK) + group
        by = factors + h * N + begin
        beta = tl.load(by + i, mask=ok, other=0.0)
        if GATED:
            b, last = _sums(by + N.to(tl.int64) * H, i, ok, n, ROWS, EVERY)
        x = _rows(k + (begin * HK + hk) * K, i, ok, HK * K, kk, K, WIDE_K).to(DT)
        y = _rows(q + (token * HK + hk) * K, iq, okq, HK * K, kk, K, WIDE_K)
        ds = tl.zeros([C, C], tl.float32)
        part = tl.zeros([C, BK], tl.float32)
        both = tl.zeros([BK, BK], tl.float32)
        for v0 in range(0, V, BV):
            vv = v0 + tl.arange(0, BV)
            d = _rows(do + (token * H + h) * V, iq, okq, H * V, vv, V, WIDE).to(DT)
            w = _rows(e + (begin * H + h) * V, i, ok, H * V, vv, V, WIDE)
            s = _rows(states + (piece * H + h) * V * K, vv, vv < V, K, kk, K, WIDE_K)
            ds = _dot(d, tl.trans(w), ds, PRECISION)
            part = _dot(d, s, part, PRECISION)
            if GATED:  # its trace is asked, but registers may not see what a pipelined loop loads
                end = _rows(leaving + (piece * H + h) * V * K, vv, vv < V, K, kk, K, WIDE_K)
                both = _dot(tl.trans(s), end, both, PRECISION)
        ds *= beta[None, :]
        if GATED:
            ds *= _decays(b[:, None], b[None, :], r >= c)
            part *= tl.exp2(b)[:, None]
        else:
            ds = tl.where(r >= c, ds, 0.0)
        dy += _dot(ds.to(DT), x, part, PRECISION)
        if GATED:
            total = tl.sum(dy * y.to(tl.float32), 1)
            kept = tl.sum(tl.where(kk[:, None] == kk[None, :], both, 0.0), 1)
            to = parts + (piece * H + h) * C
            tl.store(to + i, total - before)
            tl.store(to + step + tl.arange(0, BK), tl.exp2(last) * kept)
            before = total
    _put_rows(dq + (token * HK + hk) * K, dy, iq, okq, HK * K, kk, K, WIDE_K)


@triton.jit
def _by_keys(
    q, k, factors, do, e, zs, states, leaving, dk, dv, d_beta, parts, step, piece, begin, n, tile,
    hk, N, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    EVERY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbeta; for `decays` what b of each row gets by the keys, and what b of all rows
    gets by the state that leaves, of which each row has written a part.
    """
    ROWS: tl.constexpr = C // EVERY // STEPS * STEPS
    WIDE_K: tl.constexpr = (K + BK - 1) // BK * BK
    WIDE: tl.constexpr = (V + BV - 1) // BV * BV
    TILES: tl.constexpr = WIDE_K // BK
    SHARE: tl.constexpr = triton.next_power_of_2((V + TILES - 1) // TILES)
    i, kk = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    ok = i < n
    iq, okq = _queries(i, ok, STEPS)
    r, c = i[:, None], i[None, :]
    token = begin // STEPS
    dx = tl.zeros([C, BK], tl.float32)
    for group in range(H // HK):
        h = hk * (H // HK) + group
        by = factors + h * N + begin
        beta = tl.load(by + i, mask=ok, other=0.0)
        # With M = Z V'^T, keys i and j < i meet in -M_ij: once in the gradient of k_i, once in
        # that of k_j, for which another product finds M^T, as turning an accumulator is not safe.
        m = tl.zeros([C, C], tl.float32)
        turned = tl.zeros([C, C], tl.float32)
        ds = tl.zeros([C, C], tl.float32)
        asked = tl.zeros([C, BK], tl.float32)
        sent = tl.zeros([C, BK], tl.float32)
        for v0 in range(0, V, BV):
            vv = v0 + tl.arange(0, BV)
            u = _rows(zs + (begin * H + h) * V, i, ok, H * V, vv, V, WIDE)
            w = _rows(e + (begin * H + h) * V, i, ok, H * V, vv, V, WIDE)
            d = _rows(do + (token * H + h) * V, iq, okq, H * V, vv, V, WIDE).to(DT)
            s = _rows(states + (piece * H + h) * V * K, vv, vv < V, K, kk, K, WIDE_K)
            end = _rows(leaving + (piece * H + h) * V * K, vv, vv < V, K, kk, K, WIDE_K)
            m = _dot(u, tl.trans(w), m, PRECISION)
            turned = _dot(w, tl.trans(u), turned, PRECISION)
            ds = _dot(w, tl.trans(d), ds, PRECISION)
            asked = _dot(u, s, asked, PRECISION)
            sent = _dot(w, end, sent, PRECISION)
        x = _rows(k + (begin * HK + hk) * K, i, ok, HK * K, kk, K, WIDE_K).to(DT)
        y = _rows(q + (token * HK + hk) * K, iq, okq, HK * K, kk, K, WIDE_K).to(DT)
        diagonal = tl.sum(tl.where(r == c, m, 0.0), 1)
        tl.store(d_beta + (begin + i) * H + h, diagonal, mask=ok & (tile == 0))
        if GATED:
            b, last = _sums(by + N.to(tl.int64) * H, i, ok, n, ROWS, EVERY)
        m = tl.where(r > c, m, turned) * -beta[None, :]
        at, leave = -beta, beta
        scale = beta[:, None]
        if GATED:
            # The decay between two rows, whichever comes first.
            scale *= tl.exp2(-tl.abs(b[:, None] - b[None, :]))
            at *= tl.exp2(b)
            leave *= tl.exp2(tl.minimum(last - b, 0.0))
        m *= scale
        ds = tl.where(r <= c, ds * scale, 0.0)
        asked *= at[:, None]
        sent *= leave[:, None]
        if GATED:
            wide = x.to(tl.float32)
            to = parts + (piece * H + h) * C + i
            tl.store(to + step, tl.sum(sent * wide, 1))
        # What a key gets as the later of two rows, and as the earlier.
        asked = _dot(tl.where(r > c, m, 0.0).to(DT), x, asked, PRECISION)
        sent = _dot(tl.where(r < c, m, 0.0).to(DT), x, sent, PRECISION)
        sent = _dot(ds.to(DT), y, sent, PRECISION)
        # Each tile of channels writes its share of dv.
        vv = tile * SHARE + tl.arange(0, SHARE)
        u = _rows(zs + (begin * H + h) * V, i, ok, H * V, vv, V, SHARE * TILES)
        given = u.to(tl.float32) * beta[:, None]
        _put_rows(dv + (begin * H + h) * V, given, i, ok, H * V, vv, V, SHARE * TILES)
        dx += asked + sent
        if GATED:
            # So b of its row enters with a plus and with a minus, and as both use the same rounded
            # numbers, errors cancel in the sums over time.
            tl.store(to, tl.sum((asked - sent) * wide, 1))
    _put_rows(dk + (begin * HK + hk) * K, dx, i, ok, HK * K, kk, K, WIDE_K)


@entry
@triton.jit(do_not_specialize=["N", "step"])
def gradients(
    q, k, factors, do, e, zs, states, leaving, dq, dk, dv, d_beta, parts, table, N, step,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    EVERY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, dbeta of one piece of C rows, for BK channels of a key head.

    One program for what comes by the keys and one for what comes by the queries. parts [tiles of
    channels, 2 roles, 2, pieces, H, C] is for `decays`, as sums over rows wait for all warps. step:
    pieces * H * C.
    """
    PROGRAMS: tl.constexpr = (K + BK - 1) // BK * 2
    pid = tl.program_id(0)
    which, at = pid % PROGRAMS, pid // PROGRAMS
    role, tile = which % 2, which // 2
    hk, piece = (at % HK).to(tl.int64), (at // HK).to(tl.int64)
    begin = tl.load(table + piece * 3 + 1) * STEPS
    n = (tl.load(table + piece * 3 + 2) * STEPS - begin).to(tl.int32)
    step = step.to(tl.int64)
    parts += which * 2 * step
    if role == 0:
        _by_keys(
            q, k, factors, do, e, zs, states, leaving, dk, dv, d_beta, parts, step, piece, begin,
            n, tile, hk, N, H, HK, K, V, BK, BV, C, STEPS, GATED, EVERY, DT, PRECISION,
        )  # fmt: skip
    else:
        _by_queries(
            q, k, factors, do, e, states, leaving, dq, parts, step, piece, begin, n, tile,
            hk, N, H, HK, K, V, BK, BV, C, STEPS, GATED, EVERY, DT, PRECISION,
        )  # fmt: skip


@entry
@triton.jit(do_not_specialize=["step"])
def decays(
    parts, d_log_a, table, step,
    H: tl.constexpr, TILES: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dlog_a of one piece and head from what `gradients` left of it.

    A log_a enters b of its row and of all later ones. The sums over time end with the piece, so
    that no rounding error travels further.
    """
    pid = tl.program_id(0).to(tl.int64)
    piece, h = pid // H, pid % H
    begin = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - begin).to(tl.int32) * STEPS
    i, step = tl.arange(0, C), step.to(tl.int64)
    parts += pid * C + i
    db, kept = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for _ in tl.static_range(TILES):
        db += tl.load(parts) + tl.load(parts + 2 * step)
        kept += tl.load(parts + step) + tl.load(parts + 3 * step, mask=i < BK, other=0.0)
        parts += 4 * step
    da = tl.cumsum(db, 0, reverse=True) + tl.sum(kept, 0)
    to = d_log_a + (begin + i // STEPS) * H + h
    tl.store(to, da, mask=(i < n) & (i % STEPS == 0))
