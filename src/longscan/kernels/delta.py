"""`delta` with no gate or one gate per head: kernels over chunks of C rows.

A row is one write of a token (a token with n steps has n rows); names as in `delta_chunked`. In a
chunk with decays D_ij = exp(b_i - b_j), and L0 the strict lower part of K K^T, `solve` finds

    G = -(I + L0 diag(beta))^-1 L0 * D    for E = R + G diag(beta) R, the errors at each row,
                                          V' = diag(beta) E what is written

without a division by beta, which may be zero; decays multiply G in the end, as they are a change
of basis of the solve; its unit diagonal stays in float32. The transpose serves the backward: with
dV' the gradient of V' outside the chunk's own solve, Z = dV' + G^T diag(beta) dV' is the whole one,
dv = diag(beta) Z and dbeta = rowsum(Z * E).

`scan` and `passes` go through the chunks of a sequence for one tile of columns of v, with the
transposed state [V, K] in registers: all that depends on the state is then a left operand, which
tensor cores take from registers, and all right operands come from memory. `delta_gradients` runs
all chunks at once from the states and gradients of states between them; where there are enough wide
heads, `delta_reverse` needs the forward half of `passes` alone.

Few sequences leave multiprocessors idle, and are cut into segments. `maps` finds what each makes of
a state S, A S + U, all at once; `combine` has the states between segments of these, and the scans
take segments for sequences. Backward it is A^T D + W for the gradients D of states.

In a pipelined loop a load is an operand of products and nothing else: Triton 3.6 gives one that is
also used in registers a buffer less, and then fills it while a product still reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
# Gates are raised to 2^-32: what is left of a state is below a rounding error of float32, and
# sums of logarithms stay so small that a weak gate after a closed one does not drown in them.
CLOSED = tl.constexpr(-32.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _rows(base, index, ok, step, j, W: tl.constexpr, BW: tl.constexpr):
    """A tile [rows, columns]; columns from W on and rows that are not ok are zero."""
    mask = ok[:, None]
    if BW != W:
        mask = mask & (j < W)[None, :]
    return tl.load(base + index[:, None] * step + j[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(base, index, ok, step, j, W: tl.constexpr, BW: tl.constexpr):
    """The same tile as [columns, rows]."""
    mask = ok[None, :]
    if BW != W:
        mask = mask & (j < W)[:, None]
    return tl.load(base + index[None, :] * step + j[:, None], mask=mask, other=0.0)


@triton.jit
def _put_rows(base, x, index, ok, step, j, W: tl.constexpr, BW: tl.constexpr):
    mask = ok[:, None]
    if BW != W:
        mask = mask & (j < W)[None, :]
    tl.store(base + index[:, None] * step + j[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _put_columns(base, x, index, ok, step, j, W: tl.constexpr, BW: tl.constexpr):
    mask = ok[None, :]
    if BW != W:
        mask = mask & (j < W)[:, None]
    tl.store(base + index[None, :] * step + j[:, None], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _queries(i, ok, STEPS: tl.constexpr):
    """Where the rows of a chunk find their query and output: the last row of each token."""
    if STEPS > 1:
        ok = ok & (i % STEPS == STEPS - 1)
        i = i // STEPS
    return i, ok


@triton.jit
def _decays(bi, bj, keep):
    """exp(b_i - b_j) where `keep`, else zero."""
    return tl.where(keep, tl.exp2(tl.minimum(bi - bj, 0.0)), 0.0)


@triton.jit
def _merge(g, low, beta_i, beta_j, i, j, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """G of blocks of 2 SIZE rows from that of blocks of SIZE rows.

    With B what L0 has between the two: G - (I + G diag(beta)) B (I + diag(beta) G).
    """
    between = (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE > j // SIZE)
    b = tl.where(between, low, 0.0)
    x = _dot(b, beta_i * g, b, PRECISION)
    return g - _dot(g * beta_j, x, x, PRECISION)


@entry
@triton.jit(do_not_specialize=["N"])
def solve(
    k, beta, log_a, g, factors, table, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    STEPS: tl.constexpr, GATED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G [N, H, C] of all chunks, and beta and b of their rows as factors [2, H, N] in float32."""
    pid = tl.program_id(0).to(tl.int64)
    piece, h = pid // H, pid % H
    begin = tl.load(table + piece * 3 + 1) * STEPS
    n = (tl.load(table + piece * 3 + 2) * STEPS - begin).to(tl.int32)
    i = tl.arange(0, C)
    ok = i < n
    r, c = i[:, None], i[None, :]
    be = tl.load(beta + (begin + i) * H + h, mask=ok, other=0.0).to(tl.float32)
    to = factors + h * N + begin + i
    tl.store(to, be, mask=ok)
    if GATED:
        index, first = i, ok
        if STEPS > 1:
            index, first = i // STEPS, ok & (i % STEPS == 0)
        a = tl.load(log_a + (begin // STEPS + index) * H + h, mask=first, other=0.0)
        a = tl.maximum(a.to(tl.float32) * LOG2E, CLOSED)
        b = tl.cumsum(a, 0)
        tl.store(to + N.to(tl.int64) * H, b, mask=ok)
    keys = k + (begin * HK + h // (H // HK)) * K
    if k.dtype.element_ty == tl.bfloat16:
        x = _rows(keys, i, ok, HK * K, tl.arange(0, BK), K, BK)
        low = tl.dot(x, tl.trans(x))
    else:
        # Any error of k.k adds up over time where keys repeat and reflections let nothing die out:
        # after 150 tokens 1e-7 of it, as float32 sums have, are 2e-5. So the sums of float32, whose
        # products are not exact, are float64.
        FULL: tl.constexpr = tl.float64 if k.dtype.element_ty == tl.float32 else DT
        sums = tl.zeros([C, C], FULL)
        for k0 in range(0, BK, 16):
            x = _rows(keys, i, ok, HK * K, k0 + tl.arange(0, 16), K, BK).to(FULL)
            sums = tl.dot(x, tl.trans(x), sums, input_precision=PRECISION, out_dtype=FULL)
        low = sums.to(tl.float32)

    # Diagonal blocks by substitution, row after row, which no cancellation can spoil.
    NB: tl.constexpr = C // BLOCK
    nb = tl.arange(0, NB)
    on = (nb[:, None] == nb[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(on, tl.reshape(low, [NB, BLOCK, NB, BLOCK]), 0.0), 2)
    low = tl.where(r > c, low, 0.0)
    inside = tl.arange(0, BLOCK)
    # [rows, columns, blocks]: a thread has the rows of a column, and sums over them.
    r3, c3 = inside[:, None, None], inside[None, :, None]
    blocks = tl.permute(blocks, (2, 1, 0))
    be3 = tl.trans(tl.reshape(be, [NB, BLOCK]))[:, None, :]
    a3 = tl.where(r3 == c3, 1.0, tl.zeros([BLOCK, BLOCK, NB], tl.float32))  # I + diag(beta) G
    g3 = tl.zeros([BLOCK, BLOCK, NB], tl.float32)
    for s in tl.static_range(1, BLOCK):
        this = tl.gather(blocks, tl.full([BLOCK, 1, NB], s, tl.int32), 1)  # row s of L0
        # L0 is zero from s on. That x + -0.0 is x the compiler knows, and leaves these rows out.
        row = -tl.sum(tl.where(r3 < s, this * a3, -0.0), 0)[None, :, :]
        g3 = tl.where(r3 == s, row, g3)
        a3 = tl.where(r3 == s, a3 + be3 * row, a3)
    g3 = tl.permute(g3, (2, 0, 1))
    out = tl.reshape(tl.where(on, g3[:, :, None, :], 0.0), [C, C])
    if BLOCK < 16:
        out = _merge(out, low, be[:, None], be[None, :], r, c, 8, MERGE)
    if C >= 32:
        out = _merge(out, low, be[:, None], be[None, :], r, c, 16, MERGE)
    if C >= 64:
        out = _merge(out, low, be[:, None], be[None, :], r, c, 32, MERGE)
    if GATED:
        out *= _decays(b[:, None], b[None, :], r >= c)
    _put_rows(g + (begin * H + h) * C, out, i, ok, H * C, i, C, C)


@triton.jit
def _segment(segments, row):
    """Which sequence a segment is of, and whether it is the first and the last there."""
    code = tl.load(segments + row)
    return code // 4, code % 2 == 1, code % 4 >= 2


@triton.jit
def _forth(
    pid, q, k, v, g, factors, state, o, e, states, final, starts, first, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    ENTERS: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr, EVERY: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, MAP: tl.constexpr = False,
    CUT: tl.constexpr = False,
):  # fmt: skip
    """Through the chunks of a sequence, for one head and BV columns of v.

    ENTERS: whether a state enters. READ: write o and the final state, CUT: only that of a last
    segment, for its sequence; KEEP: write the errors e [N, H, V] and the state [V, K] that enters
    each piece of EVERY chunks. MAP: of a segment, U as its final state, and A as states, from
    tiles of columns beyond those of v, where the identity enters and nothing is written; first,
    CUT or MAP: what `_segment` reads.
    """
    OWN: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = OWN + ((K + BV - 1) // BV if MAP else 0)
    WIDE: tl.constexpr = TILES * BV
    ROWS: tl.constexpr = C // STEPS * STEPS
    v0, h, row = (pid % TILES * BV).to(tl.int32), pid // TILES % H, pid // TILES // H
    hk = h // (H // HK)
    begin = tl.load(starts + row) * STEPS
    length = (tl.load(starts + row + 1) * STEPS - begin).to(tl.int32)
    i, kk, vv = tl.arange(0, C), tl.arange(0, BK), v0 + tl.arange(0, BV)
    r, c = i[:, None], i[None, :]
    every = kk < K
    s = tl.zeros([BV, BK], tl.float32)
    source, enters = row, every
    if MAP:
        source, begins, ends = _segment(first, row)
        enters = every & begins
        # Nothing asks for what the last segment does, or for what the first does to other states.
        length = tl.where(ends | (begins & (v0 >= V)), 0, length)
    if ENTERS:
        s = _columns(state + (source * H + h) * K * V, kk, enters, V, vv, V, WIDE).to(tl.float32)
    if MAP:
        s += tl.where((vv - OWN * BV)[:, None] == kk[None, :], 1.0, 0.0)
    piece = 0
    if KEEP:
        piece = tl.load(first + row)
    values = v + (begin * H + h) * V
    ahead = _columns(values, i, i < tl.minimum(length, ROWS), H * V, vv, V, WIDE)
    for step in range((length + ROWS - 1) // ROWS):
        at = begin + step * ROWS
        n = tl.minimum(length - step * ROWS, ROWS)
        ok = i < n
        # The compiler prefetches operands of products; v, which is none, one iteration ahead here.
        wrong = ahead.to(tl.float32)
        values += ROWS * H * V
        ahead = _columns(values, i, i < length - (step + 1) * ROWS, H * V, vv, V, WIDE)
        x = _rows(k + (at * HK + hk) * K, i, ok, HK * K, kk, K, BK).to(DT)
        gt = _columns(g + (at * H + h) * C, i, ok, H * C, i, C, C)
        by = factors + h * N + at
        beta = tl.load(by + i, mask=ok, other=0.0)
        if GATED:
            by += N.to(tl.int64) * H
            b = tl.load(by + i, mask=ok, other=0.0)
            last = tl.load(by + n - 1, mask=n > 0, other=0.0)
        if READ:
            iq, okq = _queries(i, ok, STEPS)
            y = _rows(q + (at // STEPS * HK + hk) * K, iq, okq, HK * K, kk, K, BK).to(DT)
            scores = _dot(x, tl.trans(y), None, PRECISION)
            if GATED:
                scores *= _decays(b[None, :], b[:, None], r <= c)
            else:
                scores = tl.where(r <= c, scores, 0.0)
            scores = scores.to(DT)
        if KEEP:  # noqa: SIM102
            if step % EVERY == 0:
                to = states + ((piece + step // EVERY) * H + h) * V * K
                _put_rows(to, s, vv, vv < V, K, kk, K, BK)
        sb = s.to(DT)
        asked = _dot(sb, tl.trans(x), None, PRECISION)
        if READ:
            out = _dot(sb, tl.trans(y), None, PRECISION)
        decay = 1.0
        if GATED:
            reads = tl.exp2(b)[None, :]
            asked *= reads
            decay = tl.exp2(last)
        wrong -= asked
        wrong = _dot((wrong * beta[None, :]).to(DT), gt, wrong, PRECISION)
        if KEEP:
            _put_columns(e + (at * H + h) * V, wrong, i, ok, H * V, vv, V, WIDE)
        wrong *= beta[None, :]
        if READ:
            if GATED:
                out *= reads
            out = _dot(wrong.to(DT), scores, out, PRECISION)
            _put_columns(o + (at // STEPS * H + h) * V, out, iq, okq, H * V, vv, V, WIDE)
        if GATED:
            wrong *= tl.exp2(tl.minimum(last - b, 0.0))[None, :]
        # Not accumulated in s: a product still running when the next iteration begins makes the
        # compiler wait for each product in turn.
        s = tl.fma(s, decay, _dot(wrong.to(DT), x, None, PRECISION))
    if MAP:
        by, of, kept = states + (row * H + h) * 2 * K * K, vv - OWN * BV, every & (v0 >= OWN * BV)
        high = s.to(states.dtype.element_ty)
        _put_columns(by, high, kk, kept, K, of, K, WIDE)
        _put_columns(by + K * K, s - high.to(tl.float32), kk, kept, K, of, K, WIDE)
    if READ or MAP:
        goes, kept = row, every
        if CUT:
            goes, _, ends = _segment(first, row)
            kept = every & ends
        _put_columns(final + (goes * H + h) * K * V, s, kk, kept, V, vv, V, WIDE)


@triton.jit
def _back(
    pid, q, k, g, factors, do, d_final, zs, leaving, d_state, starts, first, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    ENTERS: tl.constexpr, EVERY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    MAP: tl.constexpr = False,
):  # fmt: skip
    """From the last chunk of a sequence to the first: Z, and the gradients of states.

    ENTERS: whether the final state has a gradient. Writes zs [N, H, V], the gradient [V, K] of the
    state that leaves each piece of EVERY chunks, and that of the state that entered the sequence.
    MAP: the latter alone, which is W of a segment.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    WIDE: tl.constexpr = TILES * BV
    ROWS: tl.constexpr = C // STEPS * STEPS
    v0, h, row = (pid % TILES * BV).to(tl.int32), pid // TILES % H, pid // TILES // H
    hk = h // (H // HK)
    begin = tl.load(starts + row) * STEPS
    length = (tl.load(starts + row + 1) * STEPS - begin).to(tl.int32)
    i, kk, vv = tl.arange(0, C), tl.arange(0, BK), v0 + tl.arange(0, BV)
    r, c = i[:, None], i[None, :]
    every = kk < K
    d = tl.zeros([BV, BK], tl.float32)
    source, enters = row, every
    if MAP:
        source, begins, ends = _segment(first, row)
        enters = every & ends
        length = tl.where(begins, 0, length)
    if ENTERS:
        d = _columns(d_final + (source * H + h) * K * V, kk, enters, V, vv, V, WIDE).to(tl.float32)
    if not MAP:
        piece = tl.load(first + row)
    steps = (length + ROWS - 1) // ROWS
    for back in range(steps):
        step = steps - 1 - back
        at = begin + step * ROWS
        n = tl.minimum(length - step * ROWS, ROWS)
        ok = i < n
        iq, okq = _queries(i, ok, STEPS)
        x = _rows(k + (at * HK + hk) * K, i, ok, HK * K, kk, K, BK).to(DT)
        y = _rows(q + (at // STEPS * HK + hk) * K, iq, okq, HK * K, kk, K, BK).to(DT)
        dot = _columns(do + (at // STEPS * H + h) * V, iq, okq, H * V, vv, V, WIDE).to(DT)
        gs = _rows(g + (at * H + h) * C, i, ok, H * C, i, C, C)
        by = factors + h * N + at
        beta = tl.load(by + i, mask=ok, other=0.0)
        scores = _dot(y, tl.trans(x), None, PRECISION)
        if GATED:
            by += N.to(tl.int64) * H
            b = tl.load(by + i, mask=ok, other=0.0)
            last = tl.load(by + n - 1, mask=n > 0, other=0.0)
            scores *= _decays(b[:, None], b[None, :], r >= c)
        else:
            scores = tl.where(r >= c, scores, 0.0)
        scores = scores.to(DT)
        if not MAP:  # noqa: SIM102
            if (step % EVERY == EVERY - 1) | (back == 0):
                to = leaving + ((piece + step // EVERY) * H + h) * V * K
                _put_rows(to, d, vv, vv < V, K, kk, K, BK)
        db = d.to(DT)
        dz = _dot(db, tl.trans(x), None, PRECISION)
        d_read, decay = dot, 1.0
        if GATED:
            dz *= tl.exp2(tl.minimum(last - b, 0.0))[None, :]
            reads = tl.exp2(b)[None, :]
            d_read = (dot * reads).to(DT)
            decay = tl.exp2(last)
        dz = _dot(dot, scores, dz, PRECISION)
        dz = _dot((dz * beta[None, :]).to(DT), gs, dz, PRECISION)
        if not MAP:
            _put_columns(zs + (at * H + h) * V, dz, i, ok, H * V, vv, V, WIDE)
        dz *= -beta[None, :]
        if GATED:
            dz *= reads
        more = _dot(d_read, y, None, PRECISION)
        d = tl.fma(d, decay, _dot(dz.to(DT), x, more, PRECISION))
    _put_columns(d_state + (row * H + h) * K * V, d, kk, every, V, vv, V, WIDE)


@entry
@triton.jit(do_not_specialize=["N"])
def scan(
    q, k, v, g, factors, state, o, final, starts, segments, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    ENTERS: tl.constexpr, CUT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final states of sequences, or CUT of segments and of their sequences."""
    _forth(
        tl.program_id(0).to(tl.int64), q, k, v, g, factors, state, o, o, o, final, starts, segments,
        N, H, HK, K, V, BK, BV, C, STEPS, GATED, ENTERS, True, False, 1, DT, PRECISION, False, CUT,
    )  # fmt: skip


@entry
@triton.jit(do_not_specialize=["N"])
def passes(
    q, k, v, g, factors, state, do, d_final, e, states, zs, leaving, d_state, starts, first, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    ENTERS: tl.constexpr, ENDS: tl.constexpr, EVERY: tl.constexpr, ROLE: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both scans of the backward: they need nothing of each other, and each alone may leave
    multiprocessors idle. ROLE: both (2), or only that forward (0) or backward (1) in time.
    """
    pid = tl.program_id(0).to(tl.int64)
    role = ROLE
    if ROLE == 2:
        role = (pid % 2).to(tl.int32)
        pid = pid // 2
    if role == 0:
        _forth(
            pid, q, k, v, g, factors, state, e, e, states, e, starts, first, N, H, HK, K, V,
            BK, BV, C, STEPS, GATED, ENTERS, False, True, EVERY, DT, PRECISION,
        )  # fmt: skip
    else:
        _back(
            pid, q, k, g, factors, do, d_final, zs, leaving, d_state, starts, first, N, H, HK,
            K, V, BK, BV, C, STEPS, GATED, ENDS, EVERY, DT, PRECISION,
        )  # fmt: skip


@entry
@triton.jit(do_not_specialize=["N"])
def maps(
    q, k, v, g, factors, state, do, sums, a, starts, segments, N,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
    ENTERS: tl.constexpr, REVERSE: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What segments make of states: sums [m, H, K, V] is U and a [m, H, 2, K, K] is A, rounded and
    what that leaves, or REVERSE sums is W. The state that enters the first segment of a sequence is
    in its U, and the gradient of that which leaves the last in its W.
    """
    pid = tl.program_id(0).to(tl.int64)
    if REVERSE:
        _back(
            pid, q, k, g, factors, do, state, q, q, sums, starts, segments, N, H, HK, K, V, BK,
            BV, C, STEPS, GATED, ENTERS, 1, DT, PRECISION, True,
        )  # fmt: skip
    else:
        _forth(
            pid, q, k, v, g, factors, state, q, q, a, sums, starts, segments, N, H, HK, K, V, BK,
            BV, C, STEPS, GATED, ENTERS, False, False, 1, DT, PRECISION, True,
        )  # fmt: skip


@entry
@triton.jit
def combine(
    a, sums, start, out, first,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ENTERS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states that enter segments, or REVERSE the gradients of those that leave them.

    first [rows + 1]: the first segment of each sequence; start [rows, H, K, V] enters there, or at
    its last segment, if ENTERS. States and maps are multiplied in two parts of bfloat16 each, which
    leaves an error of 2^-16 of a product.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    WIDE: tl.constexpr = TILES * BV
    pid = tl.program_id(0).to(tl.int64)
    v0, h, row = (pid % TILES * BV).to(tl.int32), pid // TILES % H, pid // TILES // H
    kk, vv = tl.arange(0, BK), v0 + tl.arange(0, BV)
    every = kk < K
    at = tl.load(first + row)
    count = (tl.load(first + row + 1) - at).to(tl.int32)
    way = 1
    if REVERSE:
        at += count - 1
        way = -1
    # The sums of the first segment hold what entered there.
    s = _columns(sums + (at * H + h) * K * V, kk, every & (count > 1), V, vv, V, WIDE)
    ahead = _columns(sums + ((at + way) * H + h) * K * V, kk, every & (count > 2), V, vv, V, WIDE)
    begin = tl.zeros([BV, BK], tl.float32)
    if ENTERS:
        begin = _columns(start + (row * H + h) * K * V, kk, every, V, vv, V, WIDE).to(tl.float32)
    _put_columns(out + (at * H + h) * K * V, begin, kk, every, V, vv, V, WIDE)
    at += way
    _put_columns(out + (at * H + h) * K * V, s, kk, every & (count > 1), V, vv, V, WIDE)
    for i in range(2, count):
        more = ahead
        by = a + (at * H + h) * 2 * K * K
        if REVERSE:
            m = _rows(by, kk, every, K, kk, K, BK)
            rest = _rows(by + K * K, kk, every, K, kk, K, BK)
        else:
            m = _columns(by, kk, every, K, kk, K, BK)
            rest = _columns(by + K * K, kk, every, K, kk, K, BK)
        at += way
        ok = every & (i + 1 < count)
        ahead = _columns(sums + (at * H + h) * K * V, kk, ok, V, vv, V, WIDE)
        high = s.to(a.dtype.element_ty)
        low = (s - high.to(tl.float32)).to(a.dtype.element_ty)
        s = tl.dot(high, rest, more)
        s = tl.dot(low, m, s)
        s = tl.dot(high, m, s)
        _put_columns(out + (at * H + h) * K * V, s, kk, every, V, vv, V, WIDE)
