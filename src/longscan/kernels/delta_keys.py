"""`delta` with a gate per key channel: scores and inverses of chunks, then scans of the state.

Names and equations are those of `longscan.ops.delta.delta_chunked`; b is the cumulative log gate
(base 2) within a chunk of C tokens, S the state that enters it:

    P_ts = sum_d q_td k_sd 2^(b_td - b_sd)   s <= t        L: the same of k with k, s < t
    R    = V - (k 2^b) S                                   N = L (I + diag(beta) L)^-1
    E    = R - N (beta R)                                  V' = beta E
    o    = (q 2^b) S + P V'                                S' = 2^b_end S + (k 2^(b_end - b))^T V'

A letter d before a name is the gradient by it; D is that by the state that leaves a chunk. E is
what the state gets wrong when a token comes, and G its counterpart backwards, before beta:

    G    = dV' - N^T (beta dV')      dV = beta G      dL = -tril(dV V'^T, -1)      dbeta = G . E

So beta divides nothing, and of (I + beta L)^-1 only what differs from I is rounded.

Where no channel decays by more than 2^(2 REACH) in a chunk, decays between tokens are products of
two, from and to the middle of that decay, and P and L one product each. Other chunks are far: there
pairs are taken by the halves of blocks that they lie in, so that no exponent is above zero.

Tokens of all sequences lie one after the other; tensors are [tokens, heads, ...]. The scans hold
the state transposed: it and all that is computed from it are then left operands, which stay in
registers, and decayed keys and queries are right ones, which come from memory as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
# A gate below 2^-150 is zero in float32; the floor admits -inf. It is a bfloat16.
FLOOR = tl.constexpr(-104.0)
# Half of what a near chunk decays by at most, as a power of two.
REACH = tl.constexpr(60.0)


@triton.jit
def _load(
    base, rows, cols, stride, height, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Rows below `height` and columns below WIDTH of a matrix; the rest is zero.

    AGAIN: what was loaded before; the modifier keeps the compiler from keeping it meanwhile.
    """
    mask = rows[:, None] < height
    if PADDED:
        mask = mask & (cols[None, :] < WIDTH)
    at = base + rows[:, None] * stride + cols[None, :]
    if AGAIN:
        x = tl.load(at, mask=mask, other=0.0, cache_modifier=".ca")
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x


@triton.jit
def _store(base, x, rows, cols, stride, height, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    mask = rows[:, None] < height
    if PADDED:
        mask = mask & (cols[None, :] < WIDTH)
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _both_parts(x, y, z, PRECISION: tl.constexpr):
    """x y + z; where y is bfloat16, with x in two numbers of that type, so that its digits stay."""
    high = x.to(y.dtype)
    z = tl.dot(high, y, z, input_precision=PRECISION)
    if y.dtype == tl.bfloat16:
        z = tl.dot((x - high.to(tl.float32)).to(y.dtype), y, z, input_precision=PRECISION)
    return z


@triton.jit
def _gates(log_a):
    return tl.maximum(log_a.to(tl.float32), FLOOR)


@triton.jit
def _upper(x):
    """The upper half of the bits of float32 numbers, as bfloat16, and what it leaves."""
    bits = x.to(tl.int32, bitcast=True)
    rest = x - (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), rest


@triton.jit
def _sums(which, x, PARTS: tl.constexpr):
    """which @ x for a matrix of ones and zeros: sums over tokens, on the tensor cores.

    x is taken apart into PARTS bfloat16 numbers: one, if it comes in that type; two have 16 of its
    bits, three all. Sums of gates are never differences of other sums: a closed gate must not
    swallow the digits of those beside it.
    """
    if PARTS == 1:
        out = tl.dot(which, x.to(tl.bfloat16))
    else:
        high, rest = _upper(x)
        out = tl.dot(which, high)
        if PARTS == 3:
            high, rest = _upper(rest)
            out = tl.dot(which, high, out)
        out = tl.dot(which, rest.to(tl.bfloat16), out)
    return out


@triton.jit
def _from(ones, first, C: tl.constexpr):
    """[i, j] is 1 where token j is token i + first or a later one. Loads it, as making it takes
    more instructions: ones [C + 1, C] is 1 where the column is the row or a later one."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.load(ones + (i + first) * C + j)


@triton.jit
def _decays(g, own, later, C: tl.constexpr, PARTS: tl.constexpr):
    """2^b and 2^(b_end - b): the decay since the chunk began, and until it ends; and b_end.

    own, later: `_from` 0 and 1.
    """
    since = _sums(tl.trans(own), g, PARTS) * LOG2E
    until = _sums(later, g, PARTS) * LOG2E
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


@triton.jit
def _border(g, level, C: tl.constexpr, PARTS: tl.constexpr):
    """Decay between a token and the middle of its block of 2^(level + 1) tokens."""
    t = tl.arange(0, C)
    late = ((t >> level) & 1 == 1)[:, None]
    i, j = t[:, None], t[None, :]
    way = ((i >> level) == (j >> level)) & ((late & (j <= i)) | ((late == 0) & (j > i)))
    # The interpreter knows no direct way from booleans.
    return tl.exp2(_sums(way.to(tl.float32).to(tl.bfloat16), g, PARTS) * LOG2E)


@triton.jit
def _across(level, C: tl.constexpr):
    """The pairs t > s with that middle between them."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i >> level) ^ (j >> level)) == 1)


@triton.jit
def _merge(m, x, N: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of the diagonal blocks of 2 N rows of I + m, from those, x, of blocks of N rows."""
    i, j = tl.arange(0, m.shape[0])[:, None] // N, tl.arange(0, m.shape[0])[None, :] // N
    between = tl.where((i // 2 == j // 2) & (i > j), m, 0.0)
    between = tl.dot(between, x, input_precision=PRECISION)
    return x - tl.dot(x, between, input_precision=PRECISION)


@triton.jit
def _inverse(m, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + m)^-1 of a strictly lower m [C, C]: blocks of 16 by substitution, then by halves.

    Substitution and not a product of powers: with beta = 2 and like keys powers are large.
    """
    G: tl.constexpr = C // 16
    g = tl.arange(0, G)
    same = (g[:, None] == g[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(m, (G, 16, G, 16)), 0.0), 2)
    r = tl.arange(0, 16)
    row, column = r[None, :, None], r[None, None, :]
    x = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(blocks)
    for i in range(0, 15):  # row i is done, and leaves those below it
        by = tl.sum(tl.where(column == i, blocks, 0.0), 2)
        done = tl.sum(tl.where(row == i, x, 0.0), 1)
        x -= tl.expand_dims(by, 2) * tl.expand_dims(done, 1)
    x = tl.reshape(tl.where(same, tl.expand_dims(x, 2), 0.0), (C, C))
    if C >= 32:
        x = _merge(m, x, 16, PRECISION)
    if C >= 64:
        x = _merge(m, x, 32, PRECISION)
    return x


@triton.jit
def _is_far(ends, WIDE: tl.constexpr):
    """Whether a chunk that leaves so much of its channels is far.

    float32 takes sums of gates only where they have digits enough.
    """
    return tl.min(ends, 0) < (2.0**-32 if WIDE else 2.0**-120)


@triton.jit
def _is_far_any(
    ends, at, many, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr
):
    """Whether any of GROUP chunks of a head, from `at` on, is far."""
    r, d = at + tl.arange(0, GROUP)[:, None], tl.arange(0, KP)[None, :]
    left = tl.load(ends + r.to(tl.int64) * K + d, mask=(r < many) & (d < K), other=1.0)
    return _is_far(tl.min(left, 1), WIDE)


@triton.jit
def _keep_scores(
    P, L, beta, scores, inner, first, n, h,
    H: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes P, and N of L."""
    i = tl.arange(0, C)
    b = tl.load(beta + (first + i) * H + h, mask=i < n, other=0.0).to(tl.float32)
    scores += (first * H + h) * C
    inner += (first * H + h) * C
    P = tl.where(i[:, None] >= i[None, :], P, 0.0)
    _store(scores, P, i, i, H * C, n, C, False)
    L = tl.where(i[:, None] > i[None, :], L, 0.0)
    x = _inverse(L * b[None, :], C, PRECISION)
    _store(inner, tl.dot(x, L, input_precision=PRECISION), i, i, H * C, n, C, False)


@entry
@triton.jit
def prepare(
    q, k, beta, log_a, read, into, out, ends, scores, inner, ones, table,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """What the scans need of a chunk of a head: decayed q and k, P and N.

    read = q 2^b, into = k 2^b, out = k 2^(b_end - b), all [tokens, H, K]; ends = 2^b_end
    [chunks, H, K]. With SCORES: P and N, scores and inner [tokens, H, C], right of near chunks.
    """
    pid = tl.program_id(0)
    piece, h = (pid // H).to(tl.int64), pid % H
    first = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - first).to(tl.int32)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    q += (first * HK + h // (H // HK)) * K
    k += (first * HK + h // (H // HK)) * K
    at_gates = (first * H + h) * K
    P = tl.zeros((C, C), tl.float32)
    L = tl.zeros((C, C), tl.float32)
    own, later = _from(ones, 0, C), _from(ones, 1, C)
    for at in range(0, K, BK):
        # All are under way before the first is waited for.
        g = _load(log_a + at_gates, i, at + d, H * K, n, K, K % BK != 0)
        x = _load(q, i, at + d, HK * K, n, K, K % BK != 0)
        y = _load(k, i, at + d, HK * K, n, K, K % BK != 0)
        since, until, end = _decays(_gates(g), own, later, C, PARTS)
        x, y = x.to(tl.float32), y.to(tl.float32)
        xs, ys, yu = x * since, y * since, y * until
        _store(read + at_gates, xs, i, at + d, H * K, n, K, K % BK != 0)
        _store(into + at_gates, ys, i, at + d, H * K, n, K, K % BK != 0)
        _store(out + at_gates, yu, i, at + d, H * K, n, K, K % BK != 0)
        tl.store(ends + (piece * H + h) * K + at + d, tl.exp2(end), mask=at + d < K)
        if SCORES:
            z, rest = _middle(end)
            late, early = tl.exp2(-z)[None, :], tl.exp2(-rest)[None, :]
            keys = tl.trans((yu * early).to(OPERAND))
            P = tl.dot((xs * late).to(OPERAND), keys, P, input_precision=PRECISION)
            L = tl.dot((ys * late).to(OPERAND), keys, L, input_precision=PRECISION)
    if SCORES:
        _keep_scores(P, L, beta, scores, inner, first, n, h, H, C, PRECISION)


@entry
@triton.jit(do_not_specialize=["many"])
def far_scores(
    q, k, beta, log_a, ends, scores, inner, table, many,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """P and N again of what is far among GROUP chunks of a head, of `many` in all.

    A kernel of its own, as what it needs would leave few programs of `prepare` room.
    """
    begin = tl.program_id(0) * GROUP
    if not _is_far_any(ends, begin, many, K, KP, GROUP, WIDE):
        return
    i, d, every = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, KP)
    for chunk in range(begin, tl.minimum(begin + GROUP, many)):
        where = tl.zeros([], tl.int64) + chunk
        piece, h = where // H, where % H
        left = tl.load(ends + where * K + every, mask=every < K, other=1.0)
        if _is_far(left, WIDE):
            first = tl.load(table + piece * 3 + 1)
            n = (tl.load(table + piece * 3 + 2) - first).to(tl.int32)
            at_keys, at_gates = (first * HK + h // (H // HK)) * K, (first * H + h) * K
            P = tl.zeros((C, C), tl.float32)
            L = tl.zeros((C, C), tl.float32)
            for at in range(0, K, BK):
                g = _gates(_load(log_a + at_gates, i, at + d, H * K, n, K, K % BK != 0))
                x = _load(q + at_keys, i, at + d, HK * K, n, K, K % BK != 0).to(tl.float32)
                y = _load(k + at_keys, i, at + d, HK * K, n, K, K % BK != 0).to(tl.float32)
                P += tl.where(i[:, None] == i[None, :], tl.sum(x * y, 1)[:, None], 0.0)
                for level in range(0, LEVELS):
                    e = _border(g, level, C, PARTS)
                    keys = (y * e).to(OPERAND)
                    now = _across(level, C)
                    p = tl.dot((x * e).to(OPERAND), tl.trans(keys), input_precision=PRECISION)
                    P += tl.where(now, p, 0.0)
                    p = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
                    L += tl.where(now, p, 0.0)
            _keep_scores(P, L, beta, scores, inner, first, n, h, H, C, PRECISION)


@entry
@triton.jit(do_not_specialize=["enters"])
def forward(
    read, into, out, ends, v, beta, scores, inner, state, o, final, states, written, starts, before,
    enters,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, READ: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """All chunks of a sequence, or of a piece of one, and head, BV columns of the state.

    READ: gives o and the final state; else the states that enter chunks and E, for the backward.
    MAP: gives what a piece makes of a state S, states S + final; states [rows, H, K, K] are the
    columns beyond those of v, where nothing is written and the identity enters.
    Shapes: state, final [rows, H, K, V] (state only if `enters`); states [chunks, H, V, K];
    written, o [tokens, H, V].
    """
    pid = tl.program_id(0).to(tl.int64)
    OWN: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = OWN + ((K + BV - 1) // BV if MAP else 0)
    row, h, tile = pid // TILES // H, pid // TILES % H, (pid % TILES).to(tl.int32)
    first = tl.load(starts + row)
    length = (tl.load(starts + row + 1) - first).to(tl.int32)
    chunk = tl.load(before + row)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    keys, values, square = (first * H + h) * K, (first * H + h) * V, (first * H + h) * C
    read += keys
    into += keys
    out += keys
    v += values
    o += values
    written += values
    scores += square
    inner += square
    beta += first * H + h
    ends += (chunk * H + h) * K
    if not MAP:
        states += (chunk * H + h) * K * V
    height = tl.where(enters != 0, K, 0)
    S = tl.trans(_load(state + (row * H + h) * K * V, d, e, V, height, V, MAP or V % BV != 0))
    if MAP:
        S += tl.where((e - OWN * BV)[:, None] == d[None, :], 1.0, 0.0)
    for at in range(0, length, C):
        n = length - at
        asking = _load(into, i, d, H * K, n, K, K != BK)
        u = _load(v, i, e, H * V, n, V, MAP or V % BV != 0)
        a = _load(inner, i, i, H * C, n, C, False)
        b = tl.load(beta + i * H, mask=i < n, other=0.0).to(tl.float32)[None, :]
        writing = _load(out, i, d, H * K, n, K, K != BK)
        kept = tl.load(ends + d, mask=d < K, other=0.0)
        if READ:
            reading = _load(read, i, d, H * K, n, K, K != BK)
            p = _load(scores, i, i, H * C, n, C, False)
        s = S.to(OPERAND)
        if not READ and not MAP:
            _store(states, S, e, d, K, V, K, K != BK)
        asked = tl.dot(s, tl.trans(asking), input_precision=PRECISION)
        u = tl.trans(u).to(tl.float32) - asked
        # Errors of what is written stay in a state that one key writes again and again.
        u = _both_parts(u * -b, tl.trans(a), u, PRECISION)
        if not READ and not MAP:
            _store(written, tl.trans(u), i, e, H * V, n, V, MAP or V % BV != 0)
        u *= b
        if READ:
            y = tl.dot(s, tl.trans(reading), input_precision=PRECISION)
            y = tl.dot(u.to(OPERAND), tl.trans(p), y, input_precision=PRECISION)
            _store(o, tl.trans(y), i, e, H * V, n, V, MAP or V % BV != 0)
        S *= kept[None, :]
        S = _both_parts(u, writing, S, PRECISION)
        read += C * H * K
        into += C * H * K
        out += C * H * K
        v += C * H * V
        o += C * H * V
        written += C * H * V
        scores += C * H * C
        inner += C * H * C
        beta += C * H
        ends += H * K
        if not MAP:
            states += H * K * V
    if MAP:
        column = tl.where(e < OWN * BV, K, e - OWN * BV)
        _store(states + (row * H + h) * K * K, tl.trans(S), d, column, K, K, K, True)
    if READ or MAP:
        _store(final + (row * H + h) * K * V, tl.trans(S), d, e, V, K, V, MAP or V % BV != 0)


@entry
@triton.jit(do_not_specialize=["enters"])
def combine(
    maps, added, start, states, first, enters,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states that enter the pieces of a sequence, in the order in which a scan meets them.

    Each is the map of the piece before, applied to the state that entered there: maps [m, H, K, K],
    transposed with REVERSE, added and states [m, H, K, V]; first: the first piece of a sequence.
    """
    pid = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (V + BV - 1) // BV
    row, h, tile = pid // TILES // H, pid // TILES % H, (pid % TILES).to(tl.int32)
    begin = tl.load(first + row)
    count = (tl.load(first + row + 1) - begin).to(tl.int32)
    piece = begin
    if REVERSE:
        piece = begin + count - 1
    rows, inner, e = tl.arange(0, KP), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    height = tl.where(enters != 0, K, 0)
    S = _load(start + (row * H + h) * K * V, rows, e, V, height, V, True)
    _store(states + (piece * H + h) * K * V, S, rows, e, V, tl.where(count > 0, K, 0), V, True)
    for _ in range(1, count):
        tl.debug_barrier()  # what was stored is read by other threads
        at = (piece * H + h) * K
        S = _load(added + at * V, rows, e, V, K, V, True)
        for c in range(0, K, BK):
            if REVERSE:
                m = tl.trans(_load(maps + at * K, c + inner, rows, K, K, K, True))
            else:
                m = _load(maps + at * K, rows, c + inner, K, K, K, True)
            before = _load(states + at * V, c + inner, e, V, K, V, True)
            S = tl.dot(m, before, S, input_precision=PRECISION)
        piece += -1 if REVERSE else 1
        _store(states + (piece * H + h) * K * V, S, rows, e, V, K, V, True)


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
    for back in range(0, chunks):
        n = length - (chunks - 1 - back) * C
        writing = _load(out, i, d, H * K, n, K, K != BK)
        y = tl.trans(_load(do, i, e, H * V, n, V, V % BV != 0).to(OPERAND))
        p = _load(scores, i, i, H * C, n, C, False)
        a = _load(inner, i, i, H * C, n, C, False)
        b = tl.load(beta + i * H, mask=i < n, other=0.0).to(tl.float32)[None, :]
        reading = _load(read, i, d, H * K, n, K, K != BK)
        asking = _load(into, i, d, H * K, n, K, K != BK)
        kept = tl.load(ends + d, mask=d < K, other=0.0)
        if not MAP:
            _store(dstates, D, e, d, K, V, K, K != BK)
        u = tl.dot(D.to(OPERAND), tl.trans(writing), input_precision=PRECISION)
        u = tl.dot(y, p, u, input_precision=PRECISION)
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
        do -= C * H * V
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
