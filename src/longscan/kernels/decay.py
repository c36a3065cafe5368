"""`decay` without a gate or with one number per head: one scan, and its mirror in time.

A program of `scan` holds a tile of the state of one head in registers and walks through a stretch
of tokens. What it reads and writes is named by role, so that one kernel serves three purposes:

    forward           S_t = e^g_t S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    states only       the same without o (READ = False)
    backward in time  R_t = e^g_{t+1} R_{t+1} + q_t do_t^T  dv_t = R_t^T k_t   (REVERSE = True)

A write may have a factor, k_t (s_t v_t)^T, and values a way around the state, o_t += d v_t (SCALED,
SKIPPED; Mamba-2's dt and D): factors of tokens, that the kernels take as they take the gates'.

Long sequences are cut into segments: a pass without reads gives what each adds, `combine` the
state that enters each. The backward writes the states that enter pieces, from the left (S) and
from the right (R, the gradient of the state); see `decay_gradients` for the rest.

Gates come as natural logarithms. `gates` sums them inside each chunk once, so that the kernels that
walk need no sums over tokens, which are slow (every warp waits for the others); `flows` does the
sums that their gradients need. Inside, logarithms have base 2 and, but for mild chunks, only
numbers <= 0 become exponents. A gate below the smallest number is zero in this precision: such
gates are counted, not summed, or the weak gates beside them would drown in rounding.

Most chunks are mild: their gates together leave more than 2^-MILD. The decay between two of their
tokens is then a factor of one times a factor of the other, both far from what overflows, and no
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
            # No branch: it would cost registers.
            tl.store(
                borders + (j // EVERY).to(tl.int64) * H * (DA * DC) + in_state,
                S.to(borders.dtype.element_ty),
                mask=real & enters,
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
