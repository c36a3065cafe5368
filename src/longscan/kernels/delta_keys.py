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
two, from and to a decay by 2^REACH, and P and L one product each. Other chunks are far: there pairs
are taken by the halves of blocks that they lie in, so that no exponent is above zero.

Tokens of all sequences lie one after the other; tensors are [tokens, heads, ...]. The scans hold
the state transposed: it and all that is computed from it are then left operands, which stay in
registers, and decayed keys and queries are right ones, which come from memory as they are.

With three stages of a pipeline a chunk's loads are under way while the one before is computed; with
two, Triton 3.6 issues them behind its last product, and waits for them at once. What registers read
(v, do) is loaded a chunk ahead by hand, as two chunks of it would not fit these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
# A gate below 2^-150 is zero in float32; the floor admits -inf. It is a bfloat16.
FLOOR = tl.constexpr(-104.0)
# Half of what a near chunk decays by at most, as a power of two; and these powers.
REACH = tl.constexpr(60.0)
LATE = tl.constexpr(2.0**60)
EARLY = tl.constexpr(2.0**-60)


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
def _exponents(g, own, later, PARTS: tl.constexpr):
    """b and b_end - b: the decay since the chunk began, and until it ends. own, later: `_from` 0
    and 1."""
    since = _sums(tl.trans(own), g, PARTS) * LOG2E
    until = _sums(later, g, PARTS) * LOG2E
    return since, until


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
    for i in tl.static_range(0, 15):  # row i is done, and leaves those below it
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
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr,
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
    i, d, every = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, KP)
    q += (first * HK + h // (H // HK)) * K
    k += (first * HK + h // (H // HK)) * K
    at_gates = (first * H + h) * K
    g = _load(log_a + at_gates, i, d, H * K, n, K, K < BK)
    x = _load(q, i, d, HK * K, n, K, K < BK)
    y = _load(k, i, d, HK * K, n, K, K < BK)
    own, later = _from(ones, 0, C), _from(ones, 1, C)
    # All gates of the chunk: sums over its rows once, and further loads find them in the cache.
    left = _gates(_load(log_a + at_gates, i, every, H * K, n, K, K != KP))
    left = tl.exp2(tl.sum(left, 0) * LOG2E)
    tl.store(ends + (piece * H + h) * K + every, left, mask=every < K)
    P = tl.zeros((C, C), tl.float32)
    L = tl.zeros((C, C), tl.float32)
    for at in range(0, K, BK):
        since, until = _exponents(_gates(g), own, later, PARTS)
        decay = tl.exp2(since)
        xs, ys = x.to(tl.float32) * decay, y.to(tl.float32) * decay
        yu = y.to(tl.float32) * tl.exp2(until)
        if SCORES:
            # Only far chunks exceed the limit, and none of these products is of use there.
            keys = y.to(tl.float32) * EARLY * tl.exp2(tl.minimum(-since, 2 * REACH))
            keys = tl.trans(keys.to(OPERAND))
        # The next ones are under way while these are written and multiplied.
        g = _load(log_a + at_gates, i, at + BK + d, H * K, n, K, True)
        x = _load(q, i, at + BK + d, HK * K, n, K, True)
        y = _load(k, i, at + BK + d, HK * K, n, K, True)
        _store(read + at_gates, xs, i, at + d, H * K, n, K, K % BK != 0)
        _store(into + at_gates, ys, i, at + d, H * K, n, K, K % BK != 0)
        _store(out + at_gates, yu, i, at + d, H * K, n, K, K % BK != 0)
        if SCORES:
            P = tl.dot((xs * LATE).to(OPERAND), keys, P, input_precision=PRECISION)
            L = tl.dot((ys * LATE).to(OPERAND), keys, L, input_precision=PRECISION)
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
    follows = _load(v, i, e, H * V, length, V, MAP or V % BV != 0)
    for at in range(0, length, C):
        n = length - at
        asking = _load(into, i, d, H * K, n, K, K != BK)
        a = _load(inner, i, i, H * C, n, C, False)
        b = tl.load(beta + i * H, mask=i < n, other=0.0).to(tl.float32)[None, :]
        writing = _load(out, i, d, H * K, n, K, K != BK)
        if READ:
            reading = _load(read, i, d, H * K, n, K, K != BK)
            p = _load(scores, i, i, H * C, n, C, False)
        s = S.to(OPERAND)
        if not READ and not MAP:
            _store(states, S, e, d, K, V, K, K != BK)
        asked = tl.dot(s, tl.trans(asking), input_precision=PRECISION)
        u = tl.trans(follows).to(tl.float32) - asked
        v += C * H * V
        follows = _load(v, i, e, H * V, n - C, V, MAP or V % BV != 0)
        # Errors of what is written stay in a state that one key writes again and again.
        u = _both_parts(u * -b, tl.trans(a), u, PRECISION)
        kept = tl.load(ends + d, mask=d < K, other=0.0)
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
