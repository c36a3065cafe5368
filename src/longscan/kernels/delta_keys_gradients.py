"""Gradients of `delta` with a gate per key channel: a scan from the end, then all chunks at once.

Names and equations are those of `longscan.kernels.delta_keys`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels.delta_keys import (
    FLOOR,
    REACH,
    _across,
    _border,
    _exponents,
    _from,
    _gates,
    _is_far,
    _is_far_any,
    _load,
    _store,
    _sums,
)


@triton.jit
def _decays(g, own, later, C: tl.constexpr, PARTS: tl.constexpr):
    """2^b and 2^(b_end - b): the decay since the chunk began, and until it ends; and b_end."""
    since, until = _exponents(g, own, later, PARTS)
    # In the layout of the other two.
    end = tl.sum(tl.where(tl.arange(0, C)[:, None] == 0, since + until, 0.0), 0)
    return tl.exp2(since), tl.exp2(until), end


@triton.jit
def _middle(end):
    """A whole number z, about the middle of a chunk's decay, and what z leaves of it.

    2^(b_t - b_s) = 2^(b_t - z) 2^(z - b_s) loses nothing where both exponents are moderate, as in
    a near chunk. In others the limits keep numbers finite, and no result is of use.
    """
    z = tl.maximum(tl.floor(end * 0.5), -REACH)
    return z, tl.maximum(end - z, -REACH)


@entry
@triton.jit(do_not_specialize=["enters"])
def backward(
    read, into, out, ends, beta, scores, inner, do, dfinal, dv, error, dstates, dstate,
    starts, before, enters,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """dv, G (error), and D of every chunk, from the last chunk to the first; MAP: dstate alone.

    Shapes: dv, error, do [tokens, H, V]; dstates [chunks, H, V, K]; dfinal, dstate [rows, H, K, V]
    (dfinal only if `enters`).
    """
    pid = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (V + BV - 1) // BV
    row, h, tile = pid // TILES // H, pid // TILES % H, (pid % TILES).to(tl.int32)
    first = tl.load(starts + row)
    length = (tl.load(starts + row + 1) - first).to(tl.int32)
    chunks = (length + C - 1) // C
    chunk = tl.load(before + row) + chunks - 1
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    first += (chunks - 1) * C
    keys, values, square = (first * H + h) * K, (first * H + h) * V, (first * H + h) * C
    read += keys
    into += keys
    out += keys
    do += values
    dv += values
    error += values
    scores += square
    inner += square
    beta += first * H + h
    ends += (chunk * H + h) * K
    dstates += (chunk * H + h) * K * V
    height = tl.where(enters != 0, K, 0)
    D = tl.trans(_load(dfinal + (row * H + h) * K * V, d, e, V, height, V, V % BV != 0))
    n = tl.minimum(length, length - (chunks - 1) * C)  # there may be no chunk
    follows = _load(do, i, e, H * V, n, V, V % BV != 0)
    for back in range(0, chunks):
        n = length - (chunks - 1 - back) * C
        if not MAP:
            _store(dstates, D, e, d, K, V, K, K != BK)
        writing = _load(out, i, d, H * K, n, K, K != BK)
        p = _load(scores, i, i, H * C, n, C, False)
        a = _load(inner, i, i, H * C, n, C, False)
        b = tl.load(beta + i * H, mask=i < n, other=0.0).to(tl.float32)[None, :]
        reading = _load(read, i, d, H * K, n, K, K != BK)
        asking = _load(into, i, d, H * K, n, K, K != BK)
        kept = tl.load(ends + d, mask=d < K, other=0.0)
        y = tl.trans(follows.to(OPERAND))
        u = tl.dot(D.to(OPERAND), tl.trans(writing), input_precision=PRECISION)
        u = tl.dot(y, p, u, input_precision=PRECISION)
        do -= C * H * V
        follows = _load(do, i, e, H * V, tl.where(back + 1 < chunks, C, 0), V, V % BV != 0)
        D *= kept[None, :]
        D = tl.dot(y, reading, D, input_precision=PRECISION)
        u = tl.dot((u * -b).to(OPERAND), a, u, input_precision=PRECISION)
        if not MAP:
            _store(error, tl.trans(u), i, e, H * V, n, V, V % BV != 0)
        u *= b
        if not MAP:
            _store(dv, tl.trans(u), i, e, H * V, n, V, V % BV != 0)
        D = tl.dot((-u).to(OPERAND), asking, D, input_precision=PRECISION)
        read -= C * H * K
        into -= C * H * K
        out -= C * H * K
        dv -= C * H * V
        error -= C * H * V
        scores -= C * H * C
        inner -= C * H * C
        beta -= C * H
        ends -= H * K
        dstates -= H * K * V
    _store(dstate + (row * H + h) * K * V, tl.trans(D), d, e, V, K, V, V % BV != 0)


@entry
@triton.jit
def pairs(
    beta, do, error, written, dscores, dlower, dself, dbeta, table,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP and dL below the diagonal [tokens, H, C], dP on it (dself [tokens, H]), and dbeta."""
    pid = tl.program_id(0).to(tl.int64)
    piece, h = pid // H, pid % H
    first = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - first).to(tl.int32)
    i, e = tl.arange(0, C), tl.arange(0, BV)
    do += (first * H + h) * V
    error += (first * H + h) * V
    written += (first * H + h) * V
    P = tl.zeros((C, C), tl.float32)
    L = tl.zeros((C, C), tl.float32)
    diagonal = tl.zeros((C,), tl.float32)
    writes = tl.zeros((C,), tl.float32)
    for at in range(0, V, BV):
        y = _load(do, i, at + e, H * V, n, V, V % BV != 0)
        u = _load(error, i, at + e, H * V, n, V, V % BV != 0)
        w = _load(written, i, at + e, H * V, n, V, V % BV != 0)
        right = tl.trans(w.to(OPERAND))
        P = tl.dot(y.to(OPERAND), right, P, input_precision=PRECISION)
        L = tl.dot(u.to(OPERAND), right, L, input_precision=PRECISION)
        w = w.to(tl.float32)
        diagonal += tl.sum(y.to(tl.float32) * w, 1)
        writes += tl.sum(u.to(tl.float32) * w, 1)
    dscores += (first * H + h) * C
    dlower += (first * H + h) * C
    at = (first + i) * H + h
    b = tl.load(beta + at, mask=i < n, other=0.0).to(tl.float32)
    P = tl.where(i[:, None] > i[None, :], P * b[None, :], 0.0)
    L = tl.where(i[:, None] > i[None, :], L * (-b)[:, None] * b[None, :], 0.0)
    _store(dscores, P, i, i, H * C, n, C, False)
    _store(dlower, L, i, i, H * C, n, C, False)
    tl.store(dself + at, diagonal * b, mask=i < n)
    tl.store(dbeta + at, writes.to(dbeta.dtype.element_ty), mask=i < n)


@triton.jit
def _gradients(
    q, k, beta, log_a, do, error, written, states, dstates, dscores, dlower, dself, dq, dk, dlog_a,
    ones, table, ends, piece, h, tile,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    """`gradients` of one tile of channels; of far chunks nothing is written without FAR."""
    first = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - first).to(tl.int32)
    i, d, e = tl.arange(0, C), tile * BK + tl.arange(0, BK), tl.arange(0, BV)
    do += (first * H + h) * V
    error += (first * H + h) * V
    written += (first * H + h) * V
    states += (piece * H + h) * K * V
    dstates += (piece * H + h) * K * V
    at_keys = (first * H + h) * K
    writes = tl.zeros((C, BK), tl.float32)
    asks = tl.zeros((C, BK), tl.float32)
    reads = tl.zeros((C, BK), tl.float32)
    kept = tl.zeros((BK,), tl.float32)
    for at in range(0, V, BV):
        D = _load(dstates, at + e, d, K, V, K, K % BK != 0)
        S = _load(states, at + e, d, K, V, K, K % BK != 0)
        w = _load(written, i, at + e, H * V, n, V, V % BV != 0)
        u = _load(error, i, at + e, H * V, n, V, V % BV != 0)
        y = _load(do, i, at + e, H * V, n, V, V % BV != 0).to(OPERAND)
        writes = tl.dot(w, D, writes, input_precision=PRECISION)
        asks = tl.dot(u, S, asks, input_precision=PRECISION)
        reads = tl.dot(y, S, reads, input_precision=PRECISION)
        kept += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
    log_a += at_keys
    q += (first * HK + h // (H // HK)) * K
    k += (first * HK + h // (H // HK)) * K
    g = _load(log_a, i, d, H * K, n, K, K % BK != 0)
    x = _load(q, i, d, HK * K, n, K, K % BK != 0)
    z = _load(k, i, d, HK * K, n, K, K % BK != 0)
    p = _load(dscores + (first * H + h) * C, i, i, H * C, n, C, False)
    a = _load(dlower + (first * H + h) * C, i, i, H * C, n, C, False)
    b = tl.load(beta + (first + i) * H + h, mask=i < n, other=0.0).to(tl.float32)[:, None]
    own = tl.load(dself + (first + i) * H + h, mask=i < n, other=0.0)[:, None]
    if not FAR:
        # Nothing waits for this: of a far chunk all is computed, and not written.
        every = tl.arange(0, KP)
        ends += (piece * H + h) * K + every
        if _is_far(tl.load(ends, mask=every < K, other=1.0), WIDE):
            n = 0
    g = _gates(g)
    since, until, end = _decays(g, _from(ones, 0, C), _from(ones, 1, C), C, PARTS)
    x, z = x.to(tl.float32), z.to(tl.float32)
    kept *= tl.exp2(end)
    writes *= b
    asks *= -b
    if FAR:
        writes *= until
        asks *= since
        reads *= since
        kept += tl.sum(z * writes, 0)
        for level in range(0, LEVELS):
            border = _border(g, level, C, PARTS)
            now = _across(level, C)
            pp, aa = tl.where(now, p, 0.0).to(OPERAND), tl.where(now, a, 0.0).to(OPERAND)
            near, reading = (z * border).to(OPERAND), (x * border).to(OPERAND)
            t = tl.dot(tl.trans(pp), reading, input_precision=PRECISION)
            t = tl.dot(tl.trans(aa), near, t, input_precision=PRECISION)
            writes += t * border
            asks += tl.dot(aa, near, input_precision=PRECISION) * border
            reads += tl.dot(pp, near, input_precision=PRECISION) * border
        dsum = z * (asks - writes) + x * reads
        _store(dq + at_keys, reads + own * z, i, d, H * K, n, K, K % BK != 0)
    else:
        middle, rest = _middle(end)
        until *= tl.exp2(-rest)[None, :]
        since *= tl.exp2(-middle)[None, :]
        keys, writes = (z * until).to(OPERAND), writes * tl.exp2(rest)[None, :]
        reading, asking = (x * since).to(OPERAND), (z * since).to(OPERAND)
        reads = tl.dot(p, keys, reads * tl.exp2(middle)[None, :], input_precision=PRECISION)
        # Read again, as all at once would not fit the registers. Sums over time see keys and
        # queries as the products do: what then cancels leaves nothing.
        x = _load(q, i, d, HK * K, n, K, K % BK != 0, True)
        z = _load(k, i, d, HK * K, n, K, K % BK != 0, True)
        x, z = x.to(tl.float32), z.to(tl.float32)
        dsum = (x * since).to(OPERAND).to(tl.float32) * reads
        _store(dq + at_keys, reads * since + own * z, i, d, H * K, n, K, K % BK != 0)
        asks = tl.dot(a, keys, asks * tl.exp2(middle)[None, :], input_precision=PRECISION)
        dsum += (z * since).to(OPERAND).to(tl.float32) * asks
        asks *= since
        seen = (z * until).to(OPERAND).to(tl.float32)
        kept += tl.sum(seen * writes, 0)
        writes = tl.dot(tl.trans(p), reading, writes, input_precision=PRECISION)
        writes = tl.dot(tl.trans(a), asking, writes, input_precision=PRECISION)
        dsum -= seen * writes
        writes *= until
    _store(dk + at_keys, asks + writes + own * x, i, d, H * K, n, K, K % BK != 0)
    dsum = _sums(_from(ones, 0, C), dsum, 3 if WIDE else 2) + kept[None, :]
    g = _load(log_a, i, d, H * K, n, K, K % BK != 0, True).to(tl.float32)
    dsum = tl.where(g > FLOOR, dsum, 0.0)
    _store(dlog_a + at_keys, dsum, i, d, H * K, n, K, K % BK != 0)


@entry
@triton.jit(do_not_specialize=["many"])
def gradients(
    q, k, beta, log_a, ends, do, error, written, states, dstates, dscores, dlower, dself,
    dq, dk, dlog_a, ones, table, many,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    FAR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dq, dk, dlog_a of a chunk of a head, all [tokens, H, K]; of far chunks, or the others.

    A program computes BK channels of one chunk, or FAR all of those that are far of GROUP, of
    `many` in all. The sum over time behind dlog_a begins anew in every chunk, from <S, D> of each
    channel. What a token reads of its own writes has no gate, and never enters that sum.
    """
    pid = tl.program_id(0)
    TILES: tl.constexpr = (K + BK - 1) // BK
    if FAR:
        begin = pid * GROUP
        if not _is_far_any(ends, begin, many, K, KP, GROUP, WIDE):
            return
        every = tl.arange(0, KP)
        for chunk in range(begin, tl.minimum(begin + GROUP, many)):
            where = tl.zeros([], tl.int64) + chunk
            left = tl.load(ends + where * K + every, mask=every < K, other=1.0)
            if _is_far(left, WIDE):
                for tile in range(0, TILES):
                    _gradients(
                        q, k, beta, log_a, do, error, written, states, dstates, dscores, dlower,
                        dself, dq, dk, dlog_a, ones, table, ends, where // H, where % H, tile,
                        H, HK, K, KP, V, C, LEVELS, BK, BV, OPERAND, PRECISION, WIDE, PARTS, FAR,
                    )  # fmt: skip
    else:
        _gradients(
            q, k, beta, log_a, do, error, written, states, dstates, dscores, dlower, dself,
            dq, dk, dlog_a, ones, table, ends, (pid // TILES // H).to(tl.int64), pid // TILES % H,
            pid % TILES,
            H, HK, K, KP, V, C, LEVELS, BK, BV, OPERAND, PRECISION, WIDE, PARTS, FAR,
        )  # fmt: skip
