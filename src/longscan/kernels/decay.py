"""`decay` without a gate or with one number per head: one scan, its mirror in time, one gradient.

A program of `scan` holds a tile of the state of one head in registers and walks through a stretch
of tokens. What it reads and writes is named by role, so that one kernel serves three purposes:

    forward           S_t = e^g_t S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    states only       the same without o (READ = False)
    backward in time  R_t = e^g_{t+1} R_{t+1} + q_t do_t^T  dv_t = R_t^T k_t   (REVERSE = True)

Long sequences are cut into segments: a pass without reads gives what each adds, `combine` the
state that enters each. The backward writes the states that enter pieces of 64 or 128 tokens, from
the left (S) and from the right (R, the gradient of the state), and `gradients` does the rest
piece by piece.

Gates come as natural logarithms. `gates` sums them inside each chunk once, so that the kernels that
walk need no sums over tokens, which are slow (every warp waits for the others); `flows` does the
sums that their gradients need. Inside, logarithms have base 2 and only numbers <= 0 become
exponents. A gate below the smallest number is zero in this precision: such gates are counted, not
summed, or the weak gates beside them would drown in rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-126.0)
SHUT = tl.constexpr(-1e4)


@triton.jit(do_not_specialize=["H", "N"])
def gates(g, sums, pieces, H, N, C: tl.constexpr, BLOCK: tl.constexpr):
    """sums[0, h, t]: log2 gates from the first token of t's piece to t; [1]: how many were zero.

    g [N, H] natural log gates; sums [2, H, N]; pieces [m, 3] of at most C tokens.
    """
    pid = tl.program_id(0)
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


@triton.jit
def _decayed(scores, i, j, e, n, OWN: tl.constexpr):
    """scores times the decay between row and column; 0 where the column is not in the past.

    i, j, e: places and sums of gates; of the other sign, the column must not be in the future.
    n: how many gates were zero. OWN: whether a token's own score is kept.
    """
    past = (i[:, None] >= j[None, :]) if OWN else (i[:, None] > j[None, :])
    keep = past & (n[:, None] == n[None, :])
    return tl.where(keep, scores * tl.exp2(e[:, None] - e[None, :]), 0.0)


@triton.jit
def _causal(scores, i, j):
    return tl.where(i[:, None] >= j[None, :], scores, 0.0)


@triton.jit(do_not_specialize=["span", "H", "N"])
def scan(
    a, b, c, sums, init, out, ends, decay, borders,
    segments, first_piece, begins, span, H, N,
    R: tl.constexpr, DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
    C: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    STARTED: tl.constexpr, READ: tl.constexpr, ENDS: tl.constexpr, ALONE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_t = sum over s <= t (REVERSE: s >= t) of the decay between them, (a_t . b_s) c_s.

    a, b [N, H / R, DA]; c, out [N, H, DC]; sums [2, H, N]: see `gates`, of chunks of C tokens.
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
            before = tl.where(zeros == 0, tl.exp2(e), 0.0)
            after = tl.where(zeros == closed, tl.exp2(total - e), 0.0)
            total = tl.where(closed == 0, total, SHUT)
            read = after if REVERSE else before
            add = before if REVERSE else after
            if ALONE:
                all_gates += total
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
        if READ:
            P = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            if GATED:
                P = _decayed(P, places, places, e * way, zeros, True)
            else:
                P = _causal(P, places, places)
            o = tl.dot(x, S.to(x.dtype), input_precision=PRECISION)
            if GATED:
                o = o * read[:, None]
            o = tl.dot(P.to(z.dtype), z, o, input_precision=PRECISION)
            tl.store(out + t * (H * DC) + in_c, o.to(out.dtype.element_ty), mask=mask_c)
        if GATED:
            z = (z * add[:, None]).to(z.dtype)
            S = S * tl.exp2(total)
        S = tl.dot(tl.trans(y), z, S, input_precision=PRECISION)
    if ALONE:
        tl.store(ends + at + in_state, S, mask=real)
        tl.store(decay + segment * H + h, all_gates, mask=tile == 0)
    elif ENDS:
        tl.store(ends + (row * H + h) * (DA * DC) + in_state, S, mask=real & last)


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


@triton.jit(do_not_specialize=["H", "N"])
def gradients(
    q, k, v, do, sums, left, right, dq, dk, more_q, more_k, terms, inner, pieces, H, N,
    R: tl.constexpr, PARTS: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    FROM: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    GATED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gates' gradients of a piece of at most L tokens, summed over a group's heads.

    Half of the programs make dq, looking back, half dk, looking ahead: the same with other names.
        dq_t = sum over s <= t of the decay between them, (do_t . v_s) k_s, and S do_t
        dk_s = sum over t >= s of the decay between them, (v_s . do_t) q_t, and R v_s
    NEAR: the first part. Keys are shared, so that weights are summed over the heads before they
    meet them. FAR: the second. Apart, each needs few registers and much of it runs side by side.
    left, right [pieces, H, K, V]: S, the state that enters, and R, the gradient of what leaves.
    dq, dk [PARTS, N, H / R, K]: the R heads of a group in PARTS sums. more_q, more_k
    [FROM, N, H / R, K]: what is to be added to them.
    sums [2, H, N]: see `gates`, of these pieces.
    terms [2 (NEAR) and 2 (FAR) for each tile of K, H, N], inner [tiles of K, pieces, H]: what
    `flows` adds up.

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
        near_state, far_state, into, more = right, left, dk, more_k
    else:
        a, b, x, y = do, v, q, k
        near_state, far_state, into, more = left, right, dq, more_q
    past = (ot * way)[:, None] >= (ot * way)[None, :]
    of_head = sums + first.to(tl.int64) * N + lo
    mine = tl.load(x + in_k, mask=mask_k, other=0.0)
    if WIDE:
        mine = mine.to(tl.float32)
    acc = tl.zeros([L, BK], tl.float32)
    pairs = tl.zeros([L, L], tl.float32)
    if NEAR and GATED:
        other = tl.load(y + in_k, mask=mask_k, other=0.0)
        if WIDE:
            other = other.to(tl.float32)
        scores = tl.dot(mine, tl.trans(other), input_precision=PRECISION)
        scores = tl.where(past & (ot[:, None] != ot[None, :]), scores, 0.0)
    # Fetched a head ahead by hand: the compiler does so only with what products need. Sums beyond
    # the end of the piece, which are anything, meet rows of zeros only.
    if GATED:
        e_next = tl.load(of_head + ot)
    for r in range(0, heads):
        rows = tl.load(a + in_v + r * V, mask=mask_v, other=0.0)
        if WIDE:
            rows = rows.to(tl.float32)
        if GATED:
            e = e_next
            here = of_head + r * N.to(tl.int64)
            e_next = tl.load(of_head + tl.minimum(r + 1, heads - 1) * N.to(tl.int64) + ot)
            last = here + count - 1
            total, closed = tl.load(last), tl.load(last + size)
            into_terms = terms + (first + r).to(tl.int64) * N + lo + ot
        if NEAR:
            columns = tl.load(b + in_v + r * V, mask=mask_v, other=0.0)
            if WIDE:
                columns = columns.to(tl.float32)
            P = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
            if GATED:
                f = e * way
                # Where the column is in the future it is left out at last.
                P *= tl.exp2(tl.minimum(f[:, None] - f[None, :], 0.0))
                if closed > 0:
                    zeros = tl.load(here + size + ot)
                    P = tl.where(zeros[:, None] == zeros[None, :], P, 0.0)
                near = tl.sum(P * scores, 1) * way
                tl.store(into_terms + (2 * tile + ahead) * size, near, mask=inside)
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
                z *= reach[:, None]
                # What the last token adds to the state crosses no gate of this piece.
                far = tl.where((ahead == 1) & (ot == count - 1), 0.0, far)
                slot = (2 * tiles if NEAR else 0) + ahead * tiles + tile
                tl.store(into_terms + slot * size, far, mask=inside)
                # Outside of the branch: only then is D fetched ahead of its use.
                across = tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)
                if ahead == 0:
                    flow = tl.sum(across, 0)
                    flow = tl.where(closed == 0, flow * tl.exp2(total), 0.0)
                    tl.store(inner + (tile.to(tl.int64) * cut + piece) * H + first + r, flow)
            acc += z
    if NEAR:
        other = tl.load(y + in_k, mask=mask_k, other=0.0)
        if WIDE:
            other = other.to(tl.float32)
        pairs = tl.where(past, pairs, 0.0).to(other.dtype)
        acc = tl.dot(pairs, other, acc, input_precision=PRECISION)
    for i in tl.static_range(FROM):
        acc += tl.load(more + i * N.to(tl.int64) * groups * K + in_k, mask=mask_k, other=0.0)
    into += part.to(tl.int64) * N * groups * K
    tl.store(into + in_k, acc.to(dq.dtype.element_ty), mask=mask_k)


@triton.jit(do_not_specialize=["H", "N"])
def flows(
    terms, inner, dg, pieces, H, N,
    NEAR: tl.constexpr, TILES: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dg [N, H]: what flows over each token's gate, from what `gradients` left of each piece.

    terms [2 NEAR + 2 TILES, H, N], inner [TILES, pieces, H]: of so many tiles of keys.
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
    terms += heads[:, None].to(tl.int64) * N + lo + t
    inner += piece * H + heads
    ahead = tl.zeros([BLOCK, L], tl.float32)
    behind = tl.zeros([BLOCK, L], tl.float32)
    across = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(2 * NEAR + TILES):
        ahead += tl.load(terms + i * size, mask=real, other=0.0)
    terms += (2 * NEAR + TILES) * size
    for i in tl.static_range(TILES):
        behind += tl.load(terms + i * size, mask=real, other=0.0)
        across += tl.load(inner + i * cut.to(tl.int64) * H, mask=heads < H, other=0.0)
    flow = tl.cumsum(ahead, 1, reverse=True) + (tl.cumsum(behind, 1) - behind) + across[:, None]
    tl.store(dg + (lo + t) * H + heads[:, None], flow.to(dg.dtype.element_ty), mask=real)
