"""`decay` without a gate or with one number per head: one scan, its mirror in time, one gradient.

A program of `scan` holds a tile of the state of one head in registers and walks through a stretch
of tokens. What it reads and writes is named by role, so that one kernel serves three purposes:

    forward           S_t = e^g_t S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    states only       the same without o (READ = False)
    backward in time  R_t = e^g_{t+1} R_{t+1} + q_t do_t^T  dv_t = R_t^T k_t   (REVERSE = True)

A write may have a factor, k_t (s_t v_t)^T, and values a way around the state, o_t += d v_t (SCALED,
SKIPPED; Mamba-2's dt and D): factors of tokens, that the kernels take as they take the gates'.

Long sequences are cut into segments: a pass without reads gives what each adds, `combine` the
state that enters each. The backward writes the states that enter pieces of 64 or 128 tokens, from
the left (S) and from the right (R, the gradient of the state), and `gradients` does the rest
piece by piece, or half of it, where heads share keys, and `far` the other half.

Gates come as natural logarithms. `gates` sums them inside each chunk once, so that the kernels that
walk need no sums over tokens, which are slow (every warp waits for the others); `flows` does the
sums that their gradients need. Inside, logarithms have base 2 and only numbers <= 0 become
exponents. A gate below the smallest number is zero in this precision: such gates are counted, not
summed, or the weak gates beside them would drown in rounding.

Where the gates of a chunk together leave more than 2^-MILD, as most do, the decay between two of
its tokens is a factor of one times a factor of the other, both far from what overflows, and no
score needs an exponential of its own. The other chunks take a branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-126.0)
SHUT = tl.constexpr(-1e4)
MILD = tl.constexpr(80.0)
PADDING = tl.constexpr(64)


@entry
@triton.jit(do_not_specialize=["H", "N"])
def gates(g, scale, sums, pieces, H, N, SCALED: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """sums[0, h, t]: log2 gates from the first token of t's piece to t; [1]: how many were zero;
    [2], if SCALED: the token's factor.

    g [N, H] natural log gates, scale [N, H]; sums [2 or 3, H, N] and PADDING zeros, for whoever
    reads pieces whole; pieces [m, 3] of at most C tokens.
    """
    pid = tl.program_id(0)
    if pid == 0:
        end = (3 if SCALED else 2) * H.to(tl.int64) * N
        tl.store(sums + end + tl.arange(0, PADDING), tl.zeros([PADDING], tl.float32))
    blocks = (H + BLOCK - 1) // BLOCK
    piece = (pid // blocks).to(tl.int64)
    lo = tl.load(pieces + piece * 3 + 1)
    count = (tl.load(pieces + piece * 3 + 2) - lo).to(tl.int32)
    t = tl.arange(0, C)[:, None]
    h = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    real = (t < count) & (h < H)
    x = tl.load(g + lo * H + t * H + h, mask=real, other=0.0).to(tl.float32) * LOG2E
    x = tl.maximum(x, FLOOR)
    shut = (x <= FLOOR).to(tl.float32)
    x = tl.where(x <= FLOOR, 0.0, x)
    sums += lo + h.to(tl.int64) * N + t
    tl.store(sums, tl.cumsum(x, 0), mask=real)
    tl.store(sums + H.to(tl.int64) * N, tl.cumsum(shut, 0), mask=real)
    if SCALED:
        factor = tl.load(scale + lo * H + t * H + h, mask=real, other=0.0).to(tl.float32)
        tl.store(sums + 2 * H.to(tl.int64) * N, factor, mask=real)


@triton.jit
def _decayed(scores, i, j, e, n):
    """scores times the decay between row and column; 0 where the column is in the future.

    i, j, e: places and sums of gates; of the other sign, the future is the past.
    n: how many gates were zero.
    """
    keep = (i[:, None] >= j[None, :]) & (n[:, None] == n[None, :])
    return tl.where(keep, scores * tl.exp2(e[:, None] - e[None, :]), 0.0)


@triton.jit
def _causal(scores, i, j):
    return tl.where(i[:, None] >= j[None, :], scores, 0.0)


@entry
@triton.jit(do_not_specialize=["span", "H", "N"])
def scan(
    a, b, c, sums, skip, init, out, ends, decay, borders,
    segments, first_piece, begins, span, H, N,
    R: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
    C: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, SKIPPED: tl.constexpr, STARTED: tl.constexpr, READ: tl.constexpr,
    ENDS: tl.constexpr, ALONE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_t = sum over s <= t (REVERSE: s >= t) of the decay between them, (a_t . b_s) c_s.

    a, b [N, H / R, DA]; c, out [N, H, DC]; sums [2 or 3, H, N]: see `gates`, of chunks of C tokens.
    SCALED: c_s has a factor, or, if REVERSE, out_t. SKIPPED: skip [H] times c_t is added to out_t.
    init [segments, H, DA, DC]: the state a segment begins its walk with (STARTED).
    ends: the state at the end of a sequence's walk [sequences, H, DA, DC] (ENDS). ALONE: what each
    segment adds, [segments, H, DA, DC], and the log2 of its decay [segments, H]; those in the last
    `span` tokens of a walk, if all are such stretches but this one, are left out.
    borders [pieces, H, DA, DC]: the state before every EVERY-th chunk of the walk; EVERY = 0: none.
    segments [m, 3]: sequence, first token, end; begins, first_piece: of each sequence.
    WIDE: operands of products are raised to float32. READ = False: neither a nor out is touched.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = (DC + BC - 1) // BC
    tile = pid % tiles
    h = (pid // tiles) % H
    segment = (pid // (tiles * H)).to(tl.int64)
    row = tl.load(segments + segment * 3)
    lo = tl.load(segments + segment * 3 + 1)
    hi = tl.load(segments + segment * 3 + 2)
    begin, stop = tl.load(begins + row), tl.load(begins + row + 1)
    if REVERSE:
        last = lo == begin
    else:
        last = hi == stop
    if ALONE:
        if REVERSE:
            unused = lo - begin < span
        else:
            unused = (lo - begin) // span == (stop - 1 - begin) // span
        if unused:
            return
    length = (hi - lo).to(tl.int32)
    n = tl.cdiv(length, C)
    oc = tl.arange(0, C)
    oa = tl.arange(0, BA)
    ov = tile * BC + tl.arange(0, BC)
    wide = H // R * DA
    in_a = oc[:, None] * wide + oa[None, :]
    in_c = oc[:, None] * (H * DC) + ov[None, :]
    whole_a: tl.constexpr = DA == BA
    whole_c: tl.constexpr = DC % BC == 0
    a += (h // R) * DA
    b += (h // R) * DA
    c += h * DC
    out += h * DC
    sums += h.to(tl.int64) * N + lo
    shut = sums + H.to(tl.int64) * N
    scale = shut + H.to(tl.int64) * N
    if SKIPPED:
        around = tl.load(skip + h).to(tl.float32)
    in_state = oa[:, None] * DC + ov[None, :]
    real = (oa[:, None] < DA) & (ov[None, :] < DC)
    at = (segment * H + h) * (DA * DC)
    if EVERY > 0:
        piece = tl.load(first_piece + row) + (lo - begin) // (C * EVERY)
        borders += (piece * H + h) * (DA * DC)
    if STARTED:
        S = tl.load(init + at + in_state, mask=real, other=0.0)
    else:
        S = tl.zeros([BA, BC], tl.float32)
    way: tl.constexpr = -1 if REVERSE else 1
    places = oc * way
    all_gates = 0.0
    for i in range(0, n):
        j = n - 1 - i if REVERSE else i
        t = lo + j * C
        inside = oc < length - j * C
        mask_a = inside[:, None] if whole_a else inside[:, None] & (oa[None, :] < DA)
        mask_c = inside[:, None] if whole_c else inside[:, None] & (ov[None, :] < DC)
        y = tl.load(b + t * wide + in_a, mask=mask_a, other=0.0)
        z = tl.load(c + t * (H * DC) + in_c, mask=mask_c, other=0.0)
        if READ:
            x = tl.load(a + t * wide + in_a, mask=mask_a, other=0.0)
        if WIDE:
            y = y.to(tl.float32)
            z = z.to(tl.float32)
            if READ:
                x = x.to(tl.float32)
        if GATED:
            # Beyond the end, the last token's: no difference is positive where it is kept.
            at_token = tl.maximum(tl.minimum(j * C + oc, length - 1), 0)
            end = tl.maximum(tl.minimum(j * C + C, length) - 1, 0)
            e, zeros = tl.load(sums + at_token), tl.load(shut + at_token)
            total, closed = tl.load(sums + end), tl.load(shut + end)
            strong = (closed > 0) | (total < -MILD)
            stays = tl.where(closed == 0, tl.exp2(total), 0.0)
            # What c_s has at the end of the chunk, or, if mild and forward, at its begin.
            if REVERSE:
                add = tl.where(zeros == 0, tl.exp2(e), 0.0)
            elif READ:
                add = tl.where(zeros == closed, tl.exp2(tl.where(strong, total, 0.0) - e), 0.0)
            else:
                add = tl.where(zeros == closed, tl.exp2(total - e), 0.0)
            if SCALED and not REVERSE:
                add *= tl.load(scale + at_token)
            if ALONE:
                all_gates += tl.where(closed == 0, total, SHUT)
        if EVERY > 0:
            if REVERSE:
                enters = ((j + 1) % EVERY == 0) | (i == 0)
            else:
                enters = j % EVERY == 0
            if enters:
                tl.store(
                    borders + (j // EVERY).to(tl.int64) * H * (DA * DC) + in_state,
                    S.to(borders.dtype.element_ty),
                    mask=real,
                )
        w = z
        if GATED:
            w = (z * add[:, None]).to(z.dtype)
            if REVERSE and READ:
                S = S * tl.where(strong, 1.0, stays)
            elif not READ:
                S = S * stays
        if READ:
            P = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            o = tl.dot(x, S.to(x.dtype), input_precision=PRECISION)
            if GATED:  # noqa: SIM102, for Triton these are two
                if strong:
                    # Loaded once more, of another kind: else what this branch alone needs, in the
                    # layout of scores' columns, is fetched ahead by everyone.
                    f = tl.load(sums + at_token, cache_modifier=".ca")
                    zeros = tl.load(shut + at_token, cache_modifier=".ca")
                    if REVERSE:
                        read = tl.where(zeros == closed, tl.exp2(total - f), 0.0)
                    else:
                        read = tl.where(zeros == 0, tl.exp2(f), 0.0)
                    D = _decayed(P, places, places, f * way, zeros)
                    if SCALED and not REVERSE:
                        D *= tl.load(scale + at_token)[None, :]
                    o = tl.dot(D.to(z.dtype), z, o * read[:, None], input_precision=PRECISION)
                    S = S * stays
                    P = tl.zeros_like(P)
            P = _causal(P, places, places)
            o = tl.dot(P.to(z.dtype), w, o, input_precision=PRECISION)
            if GATED:
                reach = tl.exp2(tl.where(strong, 0.0, e * way))
                if SCALED and REVERSE:
                    reach *= tl.load(scale + at_token)
                o *= reach[:, None]
            if SKIPPED:
                o += around * z.to(tl.float32)
            tl.store(out + t * (H * DC) + in_c, o.to(out.dtype.element_ty), mask=mask_c)
        S = tl.dot(tl.trans(y), w, S, input_precision=PRECISION)
        if GATED and READ and not REVERSE:
            S = S * tl.where(strong, 1.0, stays)
    if ALONE:
        tl.store(ends + at + in_state, S, mask=real)
        tl.store(decay + segment * H + h, all_gates, mask=tile == 0)
    elif ENDS:
        tl.store(ends + (row * H + h) * (DA * DC) + in_state, S, mask=real & last)


@entry
@triton.jit(do_not_specialize=["parts", "H"])
def combine(
    ends, decay, init, enters, first, first_part, parts, H,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    STARTED: tl.constexpr,
):  # fmt: skip
    """enters [segments, H, SIZE]: the state that enters each segment.

    ends [m, H, SIZE], decay [m, H]: what parts of segments add to it and how they weaken it; each
    segment has `parts`, but the last of a sequence may have fewer. first, first_part: of each
    sequence. init [sequences, H, SIZE]: the state before.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = offs < SIZE
    h = (pid // blocks) % H
    row = (pid // (blocks * H)).to(tl.int64)
    begin, begin_part = tl.load(first + row), tl.load(first_part + row)
    n = (tl.load(first + row + 1) - begin).to(tl.int32)
    n_parts = (tl.load(first_part + row + 1) - begin_part).to(tl.int32)
    at = (row * H + h) * SIZE + offs
    if STARTED:
        S = tl.load(init + at, mask=real, other=0.0)
    else:
        S = tl.zeros([BLOCK], tl.float32)
    used = n_parts - parts if REVERSE else (n - 1) * parts
    for i in range(0, used):
        part = n_parts - 1 - i if REVERSE else i
        place = (begin_part + part) * H + h
        more = tl.load(ends + place * SIZE + offs, mask=real, other=0.0)
        if REVERSE:
            enters_here = ((part + 1) % parts == 0) | (i == 0)
        else:
            enters_here = part % parts == 0
        into = enters + ((begin + part // parts) * H + h) * SIZE + offs
        tl.store(into, S, mask=real & enters_here)
        if GATED:
            S = S * tl.exp2(tl.load(decay + place))
        S += more
    segment = begin if REVERSE else begin + n - 1
    tl.store(enters + (segment * H + h) * SIZE + offs, S, mask=real)


@entry
@triton.jit(do_not_specialize=["H", "N"])
def gradients(
    q, k, v, do, sums, left, right, dq, dk, terms, inner, pieces, H, N,
    R: tl.constexpr, PARTS: tl.constexpr, FAR: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, SKIPPED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gates' gradients of a piece of at most L tokens, summed over a group's heads.

    Half of the programs make dq, looking back, half dk, looking ahead: the same with other names.
        dq_t = sum over s <= t of the decay between them, (do_t . v_s) k_s, and S do_t
        dk_s = sum over t >= s of the decay between them, (v_s . do_t) q_t, and R v_s
    SCALED: v_s with its factor.
    Keys are shared, so that weights inside the piece are summed over the heads before they meet
    them. FAR: with the second part; else `far` makes it. Apart, each needs few registers.
    left, right [pieces, H, K, V]: S, the state that enters, and R, the gradient of what leaves.
    dq, dk [PARTS, N, H / R, K]: the R heads of a group in PARTS sums.
    sums [2 or 3, H, N]: see `gates`, of these pieces.
    terms [.., H, N], for each tile of K: 1 (SCALED), 2, 2 more of the second part, and 1 (SKIPPED);
    inner [tiles of K, pieces, H]: what `flows` adds up. Those that look ahead are without v's
    factor, whose gradient they are.

    What flows over a token's gate comes from four kinds of pairs (s before, t not before the
    token): both in the piece, one of them, none. Nothing cancels but pairs inside the piece, and
    there the tokens' own pairs (s = t) are left out: no gate is between them.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = (K + BK - 1) // BK
    heads: tl.constexpr = R // PARTS
    ahead = pid % 2
    way = 1 - 2 * ahead
    tile = (pid // 2) % tiles
    groups = H // R
    lane = (pid // (2 * tiles)) % (groups * PARTS)
    group = lane // PARTS
    part = lane % PARTS
    piece = (pid // (2 * tiles * groups * PARTS)).to(tl.int64)
    lo = tl.load(pieces + piece * 3 + 1)
    count = (tl.load(pieces + piece * 3 + 2) - lo).to(tl.int32)
    cut = tl.num_programs(0) // (2 * tiles * groups * PARTS)
    ot = tl.arange(0, L)
    size = H.to(tl.int64) * N
    ok = tile * BK + tl.arange(0, BK)
    ov = tl.arange(0, BV)
    inside = ot < count
    whole_k: tl.constexpr = K % BK == 0
    whole_v: tl.constexpr = V == BV
    mask_k = inside[:, None] if whole_k else inside[:, None] & (ok[None, :] < K)
    mask_v = inside[:, None] if whole_v else inside[:, None] & (ov[None, :] < V)
    mask_s = (ok[:, None] < K) & (ov[None, :] < V)
    first = group * R + part * heads
    in_k = (lo * groups + group) * K + ot[:, None] * (groups * K) + ok[None, :]
    in_v = (lo * H + first) * V + ot[:, None] * (H * V) + ov[None, :]
    in_s = (piece * H + first) * (K * V) + ok[:, None] * V + ov[None, :]
    if ahead == 1:
        a, b, x, y = v, do, k, q
        near_state, far_state, into = right, left, dk
    else:
        a, b, x, y = do, v, q, k
        near_state, far_state, into = left, right, dq
    past = (ot * way)[:, None] >= (ot * way)[None, :]
    of_head = sums + first.to(tl.int64) * N + lo
    mine = tl.load(x + in_k, mask=mask_k, other=0.0)
    if WIDE:
        mine = mine.to(tl.float32)
    acc = tl.zeros([L, BK], tl.float32)
    pairs = tl.zeros([L, L], tl.float32)
    if GATED:
        other = tl.load(y + in_k, mask=mask_k, other=0.0)
        if WIDE:
            other = other.to(tl.float32)
        scores = tl.dot(mine, tl.trans(other), input_precision=PRECISION)
        own = ot[:, None] == ot[None, :]
        if SCALED:
            own_scores = tl.sum(tl.where(own, scores, 0.0), 1)
        scores = tl.where(past & ~own, scores, 0.0)
    # Fetched a head ahead by hand: the compiler does so only with what products need. Sums beyond
    # the end of the piece, which are anything, meet rows of zeros only.
    if GATED:
        e_next = tl.load(of_head + ot)
        if SCALED:
            factor_next = tl.load(of_head + 2 * size + ot)
    for r in range(0, heads):
        rows = tl.load(a + in_v + r * V, mask=mask_v, other=0.0)
        if WIDE:
            rows = rows.to(tl.float32)
        if GATED:
            e = e_next
            here = of_head + r * N.to(tl.int64)
            next = of_head + tl.minimum(r + 1, heads - 1) * N.to(tl.int64)
            e_next = tl.load(next + ot)
            if SCALED:
                factor = factor_next
                factor_next = tl.load(next + 2 * size + ot)
            last = here + count - 1
            total, closed = tl.load(last), tl.load(last + size)
            into_terms = terms + (first + r).to(tl.int64) * N + lo + ot
        columns = tl.load(b + in_v + r * V, mask=mask_v, other=0.0)
        if WIDE:
            columns = columns.to(tl.float32)
        P = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
        if GATED:
            if (SCALED or SKIPPED) and ahead == 1:
                own_pairs = tl.sum(tl.where(own, P, 0.0), 1)
                if SCALED:
                    tl.store(into_terms + tile * size, own_pairs * own_scores, mask=inside)
                if SKIPPED and tile == 0:
                    slot = tiles if SCALED else 0
                    tl.store(into_terms + slot * size, own_pairs, mask=inside)
            f = e * way
            # Where the column is in the future it is left out at last.
            P *= tl.exp2(tl.minimum(f[:, None] - f[None, :], 0.0))
            if closed > 0:
                zeros = tl.load(here + size + ot)
                P = tl.where(zeros[:, None] == zeros[None, :], P, 0.0)
            if SCALED and ahead == 0:
                # Beyond the end is another sequence's: of NaN the minimum makes a number.
                P *= tl.minimum(factor, 3e38)[None, :]
            near = tl.sum(P * scores, 1) * way
            slot = (tiles if SCALED else 0) + (1 if SKIPPED else 0) + 2 * tile + ahead
            tl.store(into_terms + slot * size, near, mask=inside)
            if SCALED:
                P *= tl.where(ahead == 1, factor, 1.0)[:, None]
        pairs += P
        if FAR:
            at = in_s + r * (K * V)
            if whole_k and whole_v:
                S = tl.load(near_state + at)
            else:
                S = tl.load(near_state + at, mask=mask_s, other=0.0)
            if GATED:
                if whole_k and whole_v:
                    D = tl.load(far_state + at, mask=ahead == 0, other=0.0)
                else:
                    D = tl.load(far_state + at, mask=mask_s & (ahead == 0), other=0.0)
            z = tl.dot(rows, tl.trans(S), input_precision=PRECISION)
            if GATED:
                reach = tl.exp2(tl.where(ahead == 1, total - e, e))
                if closed > 0:
                    zeros = tl.load(here + size + ot)
                    reach = tl.where(zeros == tl.where(ahead == 1, closed, 0.0), reach, 0.0)
                far = tl.sum(mine.to(tl.float32) * z, 1) * reach
                if SCALED:
                    reach *= tl.where(ahead == 1, factor, 1.0)
                z *= reach[:, None]
                slot = ((3 if SCALED else 2) + ahead) * tiles + tile + (1 if SKIPPED else 0)
                tl.store(into_terms + slot * size, far, mask=inside)
                # Outside of the branch: only then is D fetched ahead of its use.
                across = tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)
                if ahead == 0:
                    flow = tl.sum(across, 0)
                    flow = tl.where(closed == 0, flow * tl.exp2(total), 0.0)
                    tl.store(inner + (tile.to(tl.int64) * cut + piece) * H + first + r, flow)
            acc += z
    other = tl.load(y + in_k, mask=mask_k, other=0.0)
    if WIDE:
        other = other.to(tl.float32)
    pairs = tl.where(past, pairs, 0.0).to(other.dtype)
    acc = tl.dot(pairs, other, acc, input_precision=PRECISION)
    into += part.to(tl.int64) * N * groups * K
    tl.store(into + in_k, acc.to(dq.dtype.element_ty), mask=mask_k)


@triton.jit
def _reached(x, rows, S, reach, factor):
    """Of x [L, BK] and `rows`, with the state S that meets them: the sum's term, x's weights."""
    z = tl.dot(rows, tl.trans(S))
    weight = tl.sum(x.to(tl.float32) * z, 1) * reach
    return z * (reach * factor)[:, None], weight


@entry
@triton.jit(do_not_specialize=["H", "N"])
def far(
    q, k, v, do, sums, left, right, dq, dk, more_q, more_k, terms, inner, pieces, H, N,
    R: tl.constexpr, PARTS: tl.constexpr, FROM: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The second part of `gradients`, which see, through the states at the borders of a piece.

    A program makes dq and dk, so that it reads each state once. Operands are bfloat16.
    more_q, more_k [FROM, N, H / R, K]: what is to be added to dq, dk. terms [2 * tiles, H, N].
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = (K + BK - 1) // BK
    heads: tl.constexpr = R // PARTS
    tile = pid % tiles
    groups = H // R
    lane = (pid // tiles) % (groups * PARTS)
    group = lane // PARTS
    part = lane % PARTS
    piece = (pid // (tiles * groups * PARTS)).to(tl.int64)
    lo = tl.load(pieces + piece * 3 + 1)
    count = (tl.load(pieces + piece * 3 + 2) - lo).to(tl.int32)
    cut = tl.num_programs(0) // (tiles * groups * PARTS)
    ot = tl.arange(0, L)
    size = H.to(tl.int64) * N
    ok = tile * BK + tl.arange(0, BK)
    ov = tl.arange(0, BV)
    inside = ot < count
    whole: tl.constexpr = (K % BK == 0) & (V == BV)
    mask_k = inside[:, None] if K % BK == 0 else inside[:, None] & (ok[None, :] < K)
    mask_v = inside[:, None] if V == BV else inside[:, None] & (ov[None, :] < V)
    mask_s = (ok[:, None] < K) & (ov[None, :] < V)
    first = group * R + part * heads
    in_k = (lo * groups + group) * K + ot[:, None] * (groups * K) + ok[None, :]
    in_v = ot[:, None] * (H * V) + ov[None, :]
    in_s = ok[:, None] * V + ov[None, :]
    do += (lo * H + first) * V
    v += (lo * H + first) * V
    left += (piece * H + first) * (K * V)
    right += (piece * H + first) * (K * V)
    of_head = sums + first.to(tl.int64) * N + lo
    queries = tl.load(q + in_k, mask=mask_k, other=0.0)
    keys = tl.load(k + in_k, mask=mask_k, other=0.0)
    sum_q = tl.zeros([L, BK], tl.float32)
    sum_k = tl.zeros([L, BK], tl.float32)
    diagonal = tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :]
    # Fetched a head ahead by hand, as in `gradients`.
    if GATED:
        e_next = tl.load(of_head + ot)
        if SCALED:
            factor_next = tl.load(of_head + 2 * size + ot)
    for r in range(0, heads):
        if whole:
            S = tl.load(left + r * (K * V) + in_s)
            D = tl.load(right + r * (K * V) + in_s)
        else:
            S = tl.load(left + r * (K * V) + in_s, mask=mask_s, other=0.0)
            D = tl.load(right + r * (K * V) + in_s, mask=mask_s, other=0.0)
        back = tl.load(do + r * V + in_v, mask=mask_v, other=0.0)
        ahead = tl.load(v + r * V + in_v, mask=mask_v, other=0.0)
        if GATED:
            e = e_next
            here = of_head + r * N.to(tl.int64)
            next = of_head + tl.minimum(r + 1, heads - 1) * N.to(tl.int64)
            e_next = tl.load(next + ot)
            factor = 1.0
            if SCALED:
                factor = factor_next
                factor_next = tl.load(next + 2 * size + ot)
            last = here + count - 1
            total, closed = tl.load(last), tl.load(last + size)
            came, goes = tl.exp2(e), tl.exp2(total - e)
            if closed > 0:
                zeros = tl.load(here + size + ot)
                came = tl.where(zeros == 0, came, 0.0)
                goes = tl.where(zeros == closed, goes, 0.0)
            # <S, D> as the diagonal of a product: no operand has to come to registers. First, while
            # they are free.
            flow = tl.sum(tl.where(diagonal, tl.dot(S, tl.trans(D)), 0.0))
            more, read = _reached(queries, back, S, came, 1.0)
            sum_q += more
            more, written = _reached(keys, ahead, D, goes, factor)
            sum_k += more
            into = terms + tile * size + (first + r).to(tl.int64) * N + lo + ot
            tl.store(into, read, mask=inside)
            tl.store(into + tiles * size, written, mask=inside)
            flow = tl.where(closed == 0, flow * tl.exp2(total), 0.0)
            tl.store(inner + (tile.to(tl.int64) * cut + piece) * H + first + r, flow)
        else:
            sum_q = tl.dot(back, tl.trans(S), sum_q)
            sum_k = tl.dot(ahead, tl.trans(D), sum_k)
    for i in tl.static_range(FROM):
        plane = i * N.to(tl.int64) * groups * K
        sum_q += tl.load(more_q + plane + in_k, mask=mask_k, other=0.0)
        sum_k += tl.load(more_k + plane + in_k, mask=mask_k, other=0.0)
    in_k += part.to(tl.int64) * N * groups * K
    tl.store(dq + in_k, sum_q.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dk + in_k, sum_k.to(dk.dtype.element_ty), mask=mask_k)


@entry
@triton.jit(do_not_specialize=["H", "N"])
def flows(
    terms, inner, sums, dg, dscale, dskip, pieces, H, N,
    NEAR: tl.constexpr, TILES: tl.constexpr, SCALED: tl.constexpr, SKIPPED: tl.constexpr,
    L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `gradients` left of each piece, added up.

    dg [N, H]: what flows over each token's gate. dscale [N, H]: the gradient of its factor
    (SCALED). dskip [pieces, H]: that of `skip`, of each piece (SKIPPED).
    terms [.., H, N], inner [TILES, pieces, H]: see `gradients`, of so many tiles of keys, NEAR of
    them for pairs inside pieces. sums [2 or 3, H, N]: see `gates`.
    """
    pid = tl.program_id(0)
    blocks = (H + BLOCK - 1) // BLOCK
    cut = tl.num_programs(0) // blocks
    piece = (pid // blocks).to(tl.int64)
    lo = tl.load(pieces + piece * 3 + 1)
    count = (tl.load(pieces + piece * 3 + 2) - lo).to(tl.int32)
    t = tl.arange(0, L)[None, :]
    heads = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = (t < count) & (heads[:, None] < H)
    size = H.to(tl.int64) * N
    of_head = heads[:, None].to(tl.int64) * N + lo + t
    terms += of_head
    inner += piece * H + heads
    into = (lo + t) * H + heads[:, None]
    alone = tl.zeros([BLOCK, L], tl.float32)  # what a factor's gradient has more than the gate's
    behind = tl.zeros([BLOCK, L], tl.float32)
    written = tl.zeros([BLOCK, L], tl.float32)
    passed = tl.zeros([BLOCK, L], tl.float32)
    across = tl.zeros([BLOCK], tl.float32)
    if SCALED:
        for i in tl.static_range(NEAR):
            alone += tl.load(terms + i * size, mask=real, other=0.0)
        terms += NEAR * size
    if SKIPPED:
        pairs = tl.load(terms, mask=real, other=0.0)
        tl.store(dskip + piece * H + heads, tl.sum(pairs, 1), mask=heads < H)
        terms += size
    for i in tl.static_range(NEAR):
        behind += tl.load(terms + 2 * i * size, mask=real, other=0.0)
        written += tl.load(terms + (2 * i + 1) * size, mask=real, other=0.0)
    terms += 2 * NEAR * size
    for i in tl.static_range(TILES):
        behind += tl.load(terms + i * size, mask=real, other=0.0)
        passed += tl.load(terms + (TILES + i) * size, mask=real, other=0.0)
        across += tl.load(inner + i * cut.to(tl.int64) * H, mask=heads < H, other=0.0)
    if SCALED:
        found = alone - written + passed
        tl.store(dscale + into, found.to(dscale.dtype.element_ty), mask=real)
        factor = tl.load(sums + 2 * size + of_head, mask=real, other=0.0)
        written *= factor
        passed *= factor
    # What the last token adds to the state crosses no gate of this piece.
    passed = tl.where(t == count - 1, 0.0, passed)
    flow = tl.cumsum(behind + written, 1, reverse=True) + (tl.cumsum(passed, 1) - passed)
    flow += across[:, None]
    tl.store(dg + into, flow.to(dg.dtype.element_ty), mask=real)
