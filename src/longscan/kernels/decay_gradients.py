"""The gradients of `decay`'s keys, queries and gates, from states at the borders of pieces.

`gradients` makes those of a piece from S, the state that enters, and R, the gradient of what
leaves, both written by `decay.scan`. Where the heads of a group share keys, pairs of tokens weigh
the same keys for all of them: weights are summed over the heads before they meet keys. In bfloat16
two kernels then do the work: `gradients`, pairs of tokens, and `far`, S and R. Where no head
shares, `alone` does all of it in bfloat16. `flows` adds up what they leave for the gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


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
    terms [.., H, N]: one for each tile of K (SCALED), one (SKIPPED), two for each tile, and two for
    each of the second part; inner [tiles of K, pieces, H]: what `flows` adds up. Terms that look
    ahead are without v's factor, whose gradient they are.

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
        last = of_head + count - 1
        total_next, closed_next = tl.load(last), tl.load(last + size)
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
            total, closed = total_next, closed_next
            last = next + count - 1
            total_next, closed_next = tl.load(last), tl.load(last + size)
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


@entry
@triton.jit(do_not_specialize=["H", "N"])
def alone(
    q, k, v, do, sums, left, right, dq, dk, terms, inner, pieces, H, N,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """`gradients`, which see, of heads with keys of their own, without factors of values.

    A program makes dq and dk of a tile of keys, as there is nothing to sum over heads: pairs of
    tokens and states come to it once. Operands are bfloat16.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = (K + BK - 1) // BK
    tile = pid % tiles
    h = (pid // tiles) % H
    piece = (pid // (tiles * H)).to(tl.int64)
    lo = tl.load(pieces + piece * 3 + 1)
    count = (tl.load(pieces + piece * 3 + 2) - lo).to(tl.int32)
    cut = tl.num_programs(0) // (tiles * H)
    ot = tl.arange(0, L)
    size = H.to(tl.int64) * N
    ok = tile * BK + tl.arange(0, BK)
    ov = tl.arange(0, BV)
    inside = ot < count
    mask_k = inside[:, None] if K % BK == 0 else inside[:, None] & (ok[None, :] < K)
    mask_v = inside[:, None] if V == BV else inside[:, None] & (ov[None, :] < V)
    mask_s = (ok[:, None] < K) & (ov[None, :] < V)
    in_k = (lo * H + h) * K + ot[:, None] * (H * K) + ok[None, :]
    in_v = (lo * H + h) * V + ot[:, None] * (H * V) + ov[None, :]
    in_s = (piece * H + h) * (K * V) + ok[:, None] * V + ov[None, :]
    slopes = tl.load(do + in_v, mask=mask_v, other=0.0)
    values = tl.load(v + in_v, mask=mask_v, other=0.0)
    queries = tl.load(q + in_k, mask=mask_k, other=0.0)
    keys = tl.load(k + in_k, mask=mask_k, other=0.0)
    S = tl.load(left + in_s, mask=mask_s, other=0.0)
    D = tl.load(right + in_s, mask=mask_s, other=0.0)
    P = tl.dot(slopes, tl.trans(values))
    if GATED:
        here = sums + h.to(tl.int64) * N + lo
        e = tl.load(here + ot)
        total, closed = tl.load(here + count - 1), tl.load(here + count - 1 + size)
        came, goes = tl.exp2(e), tl.exp2(total - e)
        # Sums beyond the end, which are anything, meet zeros: of NaN the minimum makes a number.
        P *= tl.exp2(tl.minimum(e[:, None] - e[None, :], 0.0))
        if closed > 0:
            zeros = tl.load(here + size + ot)
            P = tl.where(zeros[:, None] == zeros[None, :], P, 0.0)
            came = tl.where(zeros == 0, came, 0.0)
            goes = tl.where(zeros == closed, goes, 0.0)
        near = tl.dot(queries, tl.trans(keys))
        near = tl.where(ot[:, None] > ot[None, :], P * near, 0.0)
        of_head = terms + h.to(tl.int64) * N + lo + ot
        tl.store(of_head + 2 * tile * size, tl.sum(near, 1), mask=inside)
        tl.store(of_head + (2 * tile + 1) * size, -tl.sum(near, 0), mask=inside)
        of_head += (2 * tiles + tile) * size
        flow = tl.sum(tl.sum(S.to(tl.float32) * D.to(tl.float32), 1), 0)
        flow = tl.where(closed == 0, flow * tl.exp2(total), 0.0)
        tl.store(inner + (tile.to(tl.int64) * cut + piece) * H + h, flow)
    weights = tl.where(ot[:, None] >= ot[None, :], P, 0.0).to(keys.dtype)
    z = tl.dot(slopes, tl.trans(S))
    if GATED:
        tl.store(of_head, tl.sum(queries.to(tl.float32) * z, 1) * came, mask=inside)
        z *= came[:, None]
    z = tl.dot(weights, keys, z)
    tl.store(dq + in_k, z.to(dq.dtype.element_ty), mask=mask_k)
    z = tl.dot(values, tl.trans(D))
    if GATED:
        written = tl.sum(keys.to(tl.float32) * z, 1) * goes
        tl.store(of_head + tiles * size, written, mask=inside)
        z *= goes[:, None]
    z = tl.dot(tl.trans(weights), queries, z)
    tl.store(dk + in_k, z.to(dk.dtype.element_ty), mask=mask_k)


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
        last = of_head + count - 1
        total_next, closed_next = tl.load(last), tl.load(last + size)
        if SCALED:
            factor_next = tl.load(of_head + 2 * size + ot)
    for r in range(0, heads):
        if whole:
            S = tl.load(left + r * (K * V) + in_s)
            D = tl.load(right + r * (K * V) + in_s)
        else:
            S = tl.load(left + r * (K * V) + in_s, mask=mask_s, other=0.0)
            D = tl.load(right + r * (K * V) + in_s, mask=mask_s, other=0.0)
        slopes = tl.load(do + r * V + in_v, mask=mask_v, other=0.0)
        values = tl.load(v + r * V + in_v, mask=mask_v, other=0.0)
        if GATED:
            e = e_next
            here = of_head + r * N.to(tl.int64)
            next = of_head + tl.minimum(r + 1, heads - 1) * N.to(tl.int64)
            e_next = tl.load(next + ot)
            factor = 1.0
            if SCALED:
                factor = factor_next
                factor_next = tl.load(next + 2 * size + ot)
            total, closed = total_next, closed_next
            last = next + count - 1
            total_next, closed_next = tl.load(last), tl.load(last + size)
            came, goes = tl.exp2(e), tl.exp2(total - e)
            if closed > 0:
                zeros = tl.load(here + size + ot)
                came = tl.where(zeros == 0, came, 0.0)
                goes = tl.where(zeros == closed, goes, 0.0)
            # <S, D> as the diagonal of a product: no operand has to come to registers. First, while
            # they are free.
            flow = tl.sum(tl.where(diagonal, tl.dot(S, tl.trans(D)), 0.0))
            more, read = _reached(queries, slopes, S, came, 1.0)
            sum_q += more
            more, written = _reached(keys, values, D, goes, factor)
            sum_k += more
            into = terms + tile * size + (first + r).to(tl.int64) * N + lo + ot
            tl.store(into, read, mask=inside)
            tl.store(into + tiles * size, written, mask=inside)
            flow = tl.where(closed == 0, flow * tl.exp2(total), 0.0)
            tl.store(inner + (tile.to(tl.int64) * cut + piece) * H + first + r, flow)
        else:
            sum_q = tl.dot(slopes, tl.trans(S), sum_q)
            sum_k = tl.dot(values, tl.trans(D), sum_k)
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
    own = tl.zeros([BLOCK, L], tl.float32)  # what a factor's gradient has more than the gate's
    behind = tl.zeros([BLOCK, L], tl.float32)
    written = tl.zeros([BLOCK, L], tl.float32)
    passed = tl.zeros([BLOCK, L], tl.float32)
    across = tl.zeros([BLOCK], tl.float32)
    if SCALED:
        for i in tl.static_range(NEAR):
            own += tl.load(terms + i * size, mask=real, other=0.0)
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
        found = own - written + passed
        tl.store(dscale + into, found.to(dscale.dtype.element_ty), mask=real)
        factor = tl.load(sums + 2 * size + of_head, mask=real, other=0.0)
        written *= factor
        passed *= factor
    # What the last token adds to the state crosses no gate of this piece.
    passed = tl.where(t == count - 1, 0.0, passed)
    flow = tl.cumsum(behind + written, 1, reverse=True) + (tl.cumsum(passed, 1) - passed)
    flow += across[:, None]
    tl.store(dg + into, flow.to(dg.dtype.element_ty), mask=real)
