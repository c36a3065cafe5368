"""`decay` with a gate per key channel: two scans over chunks, each in both directions of time.

S_t = diag(a_t) S_{t-1} + k_t v_t^T is the same recurrence, turned round in time, as that of its
gradient, dS_{t-1} = diag(a_t) (dS_t + q_t do_t^T). So `contract`, whose scores sum over the gated
channels, gives o (from q, k, v) and dv (reversed, from k, q, do); `expand`, whose results lie along
them, gives dq (from do, v, k) and dk (reversed, from v, do, q). In each, tokens of rows `x` read
what tokens of rows `y` wrote, and a token reads the state that enters its chunk, weakened by the
gates between. The state stays in registers; a program owns a piece of time, a head and a tile of
the values (contract) or keys (expand), which are the rows of its products: thus the state is their
left operand, which needs no way through shared memory.

Weights inside a chunk are 2^(b_t - b_s), with b the summed gates to the base 2. If b falls by less
than REACH in a chunk, they are split at one of its ends into factors that fit any float32 or
bfloat16, and nothing is lost: rounding is relative. If it falls further, scores are built by
halves as in `longscan.ops._scores`, from exponents <= 0 only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-87.0)  # of a gate: about the logarithm of the smallest float32
NEVER = tl.constexpr(-1e4)
REACH = tl.constexpr(64.0)  # leaves as many powers of two again above and below the values


@triton.jit
def _mask(rows, columns, SIZE: tl.constexpr, PADDED: tl.constexpr):
    mask = rows[:, None]
    if SIZE % PADDED != 0:
        mask = mask & (columns < SIZE)[None, :]
    return mask


@triton.jit
def _gates(at, mask):
    """Natural logarithms, raised to that of the smallest number: a gate below it is zero."""
    return tl.maximum(tl.load(at, mask=mask, other=0.0).to(tl.float32), FLOOR)


@triton.jit
def _upper(x):
    """The upper half of the bits of float32 numbers, as bfloat16, and what it leaves."""
    bits = x.to(tl.int32, bitcast=True)
    rest = x - (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), rest


@triton.jit
def _sums(which, g, PARTS: tl.constexpr):
    """which @ g for a matrix of booleans: sums over tokens, on the tensor cores.

    Gates are summed in this way and not taken as differences of cumulated sums: a closed gate must
    not swallow the digits of those behind it. g is taken apart into PARTS numbers of bfloat16: all
    of it with three, 16 bits with two.
    """
    which = which.to(tl.float32).to(tl.bfloat16)  # the interpreter knows no direct way
    if PARTS == 1:
        out = tl.dot(which, g.to(tl.bfloat16))
    else:
        high, rest = _upper(g)
        out = tl.dot(which, high)
        if PARTS == 3:
            middle, rest = _upper(rest)
            out = tl.dot(which, middle, out)
        out = tl.dot(which, rest.to(tl.bfloat16), out)
    return out


@triton.jit
def _sums_across(g, which, PARTS: tl.constexpr):
    """g @ which, as `_sums`."""
    which = which.to(tl.float32).to(tl.bfloat16)
    if PARTS == 1:
        out = tl.dot(g.to(tl.bfloat16), which)
    else:
        high, rest = _upper(g)
        out = tl.dot(high, which)
        if PARTS == 3:
            middle, rest = _upper(rest)
            out = tl.dot(middle, which, out)
        out = tl.dot(rest.to(tl.bfloat16), which, out)
    return out


@triton.jit
def _way(C: tl.constexpr, REVERSE: tl.constexpr, LEAVE: tl.constexpr):
    """Tokens whose gates lie between a token and the end of the chunk, or its start.

    From its start a token has passed its own gate too; to its end those behind it.
    """
    t = tl.arange(0, C)
    if REVERSE == LEAVE:
        way = t[:, None] >= t[None, :]
    else:
        way = t[:, None] < t[None, :]
    return way


@triton.jit
def _to_border(level, C: tl.constexpr):
    """Tokens whose gates lie between a token and the middle of its block of 2^(level + 1)."""
    t = tl.arange(0, C)
    late = ((t >> level) & 1 == 1)[:, None]
    i, j = t[:, None], t[None, :]
    return ((i >> level) == (j >> level)) & ((late & (j <= i)) | ((late == 0) & (j > i)))


@triton.jit
def _pairs(level, C: tl.constexpr, REVERSE: tl.constexpr):
    """[C, C]: where x lies in the one half and y in the other of a block of 2^(level + 1)."""
    t = tl.arange(0, C)
    half = t >> level
    if REVERSE:
        first, second = half[:, None], half[None, :]
    else:
        first, second = half[None, :], half[:, None]
    return (second == first + 1) & (first & 1 == 0)


@entry
@triton.jit
def survey(
    log_a, kept, far, table,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """kept [m, H, K]: what each chunk leaves of a state; far [m, H]: which are far."""
    pid = tl.program_id(0)
    head, chunk = pid % H, (pid // H).to(tl.int64)
    begin = tl.load(table + chunk * 3 + 1)
    n = tl.load(table + chunk * 3 + 2) - begin
    oc, ok = tl.arange(0, C), tl.arange(0, KP)
    at = log_a + (begin * H + head) * K + oc[:, None] * (H * K) + ok[None, :]
    whole = tl.sum(_gates(at, _mask(oc < n, ok, K, KP)), 0) * LOG2E
    tl.store(kept + (chunk * H + head) * K + ok, tl.exp2(whole), mask=ok < K)
    tl.store(far + chunk * H + head, (tl.max(-whole, 0) > REACH).to(tl.int32))


@entry
@triton.jit(do_not_specialize=["many"])
def halves(
    q, k, v, do, log_a, far, scores, near_q, near_k, table, many,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """What far chunks need: scores [N, H, C], and of dq, dk the part from inside the chunk.

    A program looks after GROUP chunks and heads. Every level pairs the halves of blocks: of queries
    and keys together, one half of the tokens each, only one product with itself is needed.
    """
    start = tl.program_id(0) * GROUP
    og = tl.arange(0, GROUP)
    some = tl.max(tl.load(far + start + og, mask=start + og < many, other=0), 0)
    if some != 0:
        oc, ok, ov = tl.arange(0, C), tl.arange(0, KP), tl.arange(0, VP)
        same = oc[:, None] == oc[None, :]
        for item in range(start, tl.minimum(start + GROUP, many)):
            if tl.load(far + item) != 0:
                head, chunk = item % H, item // H
                begin = tl.load(table + chunk * 3 + 1)
                rows = oc < tl.load(table + chunk * 3 + 2) - begin
                mask_k, mask_v = _mask(rows, ok, K, KP), _mask(rows, ov, V, VP)
                at = (begin * H + head) * K + oc[:, None] * (H * K) + ok[None, :]
                keys = (begin * HK + head // (H // HK)) * K
                keys += oc[:, None] * (HK * K) + ok[None, :]
                g = _gates(log_a + at, mask_k)
                qs = tl.load(q + keys, mask=mask_k, other=0.0).to(tl.float32)
                ks = tl.load(k + keys, mask=mask_k, other=0.0).to(tl.float32)
                near = tl.where(same, tl.sum(qs * ks, 1)[:, None], 0.0)
                if GRADIENTS:
                    values = (begin * H + head) * V + oc[:, None] * (H * V) + ov[None, :]
                    vs = tl.load(v + values, mask=mask_v, other=0.0).to(OPERAND)
                    ds = tl.load(do + values, mask=mask_v, other=0.0).to(OPERAND)
                    back = tl.dot(ds, tl.trans(vs), input_precision=PRECISION)
                    ahead = tl.dot(vs, tl.trans(ds), input_precision=PRECISION)
                    dq = tl.zeros([C, KP], tl.float32)
                    dk = tl.zeros([C, KP], tl.float32)
                for level in range(LEVELS):
                    e = tl.exp2(_sums(_to_border(level, C), g, PARTS) * LOG2E)
                    late = ((oc >> level) & 1 == 1)[:, None]
                    z = (tl.where(late, qs, ks) * e).to(OPERAND)
                    pairs = _pairs(level, C, False)
                    both = tl.dot(z, tl.trans(z), input_precision=PRECISION)
                    near += tl.where(pairs, both, 0.0)
                    if GRADIENTS:
                        part = tl.where(pairs, back, 0.0).to(OPERAND)
                        dq += e * tl.dot(part, z, input_precision=PRECISION)
                        part = tl.where(_pairs(level, C, True), ahead, 0.0).to(OPERAND)
                        dk += e * tl.dot(part, z, input_precision=PRECISION)
                square = (begin * H + head) * C + oc[:, None] * (H * C) + oc[None, :]
                tl.store(scores + square, near.to(OPERAND), mask=rows[:, None])
                if GRADIENTS:
                    tl.store(near_q + at, dq.to(near_q.dtype.element_ty), mask=mask_k)
                    tl.store(near_k + at, dk.to(near_k.dtype.element_ty), mask=mask_k)


@entry
@triton.jit(do_not_specialize=["has_enter", "split"])
def contract(
    x, y, v, log_a, kept, far, near, enter, out, leave, total,
    table, first, begins, lead, has_enter, split,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """out_t = sum over s of (x_t . 2^(b_t - b_s) y_s) v_s, and x_t against the entering state.

    x, y [N, HK, K]; v, out [N, H, V]; log_a [N, H, K]; enter, leave [.., H, K, V].
    table [m, 3]: sequence, first token, end of each piece; first: the first piece of a sequence.
    split: whether enter has a state for each piece, else for each sequence. With READ, leave has
    one for each sequence. Without, it takes what each piece adds to a state of zero (but the last
    of its sequence, after which nothing follows) and total [m, H, K] what it leaves of a state.
    """
    pid = tl.program_id(0)
    tile, head, piece = pid % TILES, pid // TILES % H, pid // (TILES * H)
    row = tl.load(table + piece * 3)
    begin = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - begin).to(tl.int32)
    if REVERSE:
        ends = tl.load(first + row) == piece
    else:
        ends = tl.load(first + row + 1) - 1 == piece
    if not READ:
        n = tl.where(ends, 0, n)
    piece = piece.to(tl.int64)
    chunk = tl.load(lead + row) + (begin - tl.load(begins + row)) // C
    kept += (chunk * H + head) * K
    far += chunk * H + head
    oc, ok, ov = tl.arange(0, C), tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    keys = oc[:, None] * (HK * K) + ok[None, :]
    gates = oc[:, None] * (H * K) + ok[None, :]
    values = oc[:, None] * (H * V) + ov[None, :]
    shared = head // (H // HK)
    x += (begin * HK + shared) * K
    y += (begin * HK + shared) * K
    log_a += (begin * H + head) * K
    v += (begin * H + head) * V
    out += (begin * H + head) * V
    near += (begin * H + head) * C
    square = ok[:, None] * V + ov[None, :]
    inner = (ok < K)[:, None] & (ov < V)[None, :]
    source = tl.where(split != 0, piece, row) * H + head
    state = tl.load(enter + source * (K * V) + square, mask=inner & (has_enter != 0), other=0.0)
    left = tl.full([KP], 1.0, tl.float32)
    if REVERSE:
        causal = oc[:, None] <= oc[None, :]
    else:
        causal = oc[:, None] >= oc[None, :]
    step = tl.full([], C, tl.int64)
    chunks = tl.cdiv(n, C)
    for j in range(chunks):
        i = j
        if REVERSE:
            i = chunks - 1 - j
        rows = i * C + oc < n
        here = i * step
        mask_k, mask_v = _mask(rows, ok, K, KP), _mask(rows, ov, V, BV)
        g = _gates(log_a + here * (H * K) + gates, mask_k)
        ys = tl.load(y + here * (HK * K) + keys, mask=mask_k, other=0.0)
        vs = tl.load(v + here * (H * V) + values, mask=mask_v, other=0.0).to(OPERAND)
        is_far = tl.load(far + i * (step // C * H)) != 0
        rest = tl.load(kept + i * (step // C * H * K) + ok, mask=ok < K, other=0.0)
        ey = _sums(_way(C, REVERSE, True), g, PARTS) * LOG2E
        ys = (ys.to(tl.float32) * tl.exp2(ey)).to(OPERAND)
        if READ:
            xs = tl.load(x + here * (HK * K) + keys, mask=mask_k, other=0.0)
            ex = -ey
            o = tl.zeros([C, BV], tl.float32)
            stored = tl.zeros([C, C], OPERAND)
            if is_far:  # the state is read as it enters, so that nothing need grow
                ex = _sums(_way(C, REVERSE, False), g, PARTS) * LOG2E
                weak = (xs.to(tl.float32) * tl.exp2(ex)).to(OPERAND)
                o = tl.dot(weak, state.to(OPERAND), input_precision=PRECISION)
                if REVERSE:
                    across, inside = oc[None, :] * (H * C) + oc[:, None], rows[None, :]
                else:
                    across, inside = oc[:, None] * (H * C) + oc[None, :], rows[:, None]
                stored = tl.load(near + here * (H * C) + across, mask=inside & causal, other=0.0)
                ex = tl.full([C, KP], NEVER, tl.float32)
            xs = (xs.to(tl.float32) * tl.exp2(ex)).to(OPERAND)
            scores = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
            scores = tl.where(causal, scores, 0.0).to(OPERAND) + stored
            state *= rest[:, None]
            o = tl.dot(xs, state.to(OPERAND), o, input_precision=PRECISION)
            o = tl.dot(scores, vs, o, input_precision=PRECISION)
            at = out + here * (H * V) + values
            tl.store(at, o.to(out.dtype.element_ty), mask=mask_v)
        else:
            left *= rest
            state *= rest[:, None]
        state = tl.dot(tl.trans(ys), vs, state, input_precision=PRECISION)
    if READ:
        target = row * H + head
        tl.store(leave + target * (K * V) + square, state, mask=inner & ends)
    else:
        target = piece * H + head
        tl.store(leave + target * (K * V) + square, state, mask=inner)
        tl.store(total + target * K + ok, left, mask=(ok < K) & (tile == 0))


@entry
@triton.jit(do_not_specialize=["has_start"])
def combine(
    states, total, start, first, has_start,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    TILES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each piece adds to a state becomes, in place, the state that enters it."""
    pid = tl.program_id(0)
    tile, head, row = pid % TILES, pid // TILES % H, (pid // (TILES * H)).to(tl.int64)
    ok, ov = tile * BK + tl.arange(0, BK), tl.arange(0, VP)
    square = ok[:, None] * V + ov[None, :]
    inner = (ok < K)[:, None] & (ov < V)[None, :]
    at = start + (row * H + head) * (K * V) + square
    state = tl.load(at, mask=inner & (has_start != 0), other=0.0)
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    count = (end - begin).to(tl.int32)
    for j in tl.range(count, num_stages=4):
        if REVERSE:
            piece = end - 1 - j
        else:
            piece = begin + j
        at = states + (piece * H + head) * (K * V) + square
        more = tl.load(at, mask=inner, other=0.0)
        tl.store(at, state, mask=inner)
        weight = tl.load(total + (piece * H + head) * K + ok, mask=ok < K, other=0.0)
        state = state * weight[:, None] + more


@entry
@triton.jit(do_not_specialize=["has_enter", "split"])
def expand(
    x, y, v, own, log_a, kept, far, near, enter, out, products, borders, dlog_a,
    table, begins, lead, lead_border, has_enter, split,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    EVERY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """out_t = sum over s of 2^(b_t - b_s) y_s (v_s . x_t), and the entering state times x_t.

    x, v [N, H, V]; y, own [N, HK, K]; out, log_a, products, dlog_a [N, H, K].
    enter [.., H, K, V]. own = q and out = dq, reversed own = k and out = dk.
    dlog_a_s = <S, dS> + sum of (q dq - k dk) from s to a border behind it, where <S, dS> is summed
    over the values. Forwards this writes products = q dq and, every EVERY chunks of a sequence,
    borders = S; reversed it reads them. What has passed no gate would cancel but for its rounding,
    and is left out of all three: what a token gives to itself, and the last one to the last state.
    begins: where sequences begin; lead: the first border of each.
    """
    pid = tl.program_id(0)
    tile, head, piece = pid % TILES, pid // TILES % H, (pid // (TILES * H)).to(tl.int64)
    row = tl.load(table + piece * 3)
    begin = tl.load(table + piece * 3 + 1)
    n = (tl.load(table + piece * 3 + 2) - begin).to(tl.int32)
    last = tl.where(tl.load(begins + row + 1) == begin + n, n - 1, n)
    chunk = tl.load(lead + row) + (begin - tl.load(begins + row)) // C
    kept += (chunk * H + head) * K
    far += chunk * H + head
    border = tl.load(lead_border + row) + (begin - tl.load(begins + row)) // (EVERY * C)
    oc, ov, ok = tl.arange(0, C), tl.arange(0, VP), tile * BK + tl.arange(0, BK)
    keys = ok[:, None] + oc[None, :] * (HK * K)
    gates = ok[:, None] + oc[None, :] * (H * K)
    values = oc[:, None] * (H * V) + ov[None, :]
    shared = head // (H // HK)
    x += (begin * H + head) * V
    v += (begin * H + head) * V
    y += (begin * HK + shared) * K
    own += (begin * HK + shared) * K
    log_a += (begin * H + head) * K
    out += (begin * H + head) * K
    near += (begin * H + head) * K
    products += (begin * H + head) * K
    dlog_a += (begin * H + head) * K
    square = ok[:, None] * V + ov[None, :]
    inner = (ok < K)[:, None] & (ov < V)[None, :]
    borders += (border * H + head) * (K * V) + square
    source = tl.where(split != 0, piece, row) * H + head
    state = tl.load(enter + source * (K * V) + square, mask=inner & (has_enter != 0), other=0.0)
    behind = tl.zeros([BK], tl.float32)
    if REVERSE:
        causal = oc[:, None] > oc[None, :]
    else:
        causal = oc[:, None] < oc[None, :]
    step = tl.full([], C, tl.int64)
    chunks = tl.cdiv(n, C)
    i = tl.where(REVERSE, chunks - 1, 0)
    coming = tl.load(far + i * (step // C * H), mask=chunks > 0, other=0)
    rest_coming = tl.load(
        kept + i * (step // C * H * K) + ok, mask=(ok < K) & (chunks > 0), other=0.0
    )
    for j in range(chunks):
        i = j
        then = j + 1
        if REVERSE:
            i = chunks - 1 - j
            then = i - 1
        is_far = coming != 0  # fetched a chunk ahead by hand: the compiler does not
        rest = rest_coming
        more = j + 1 < chunks
        coming = tl.load(far + then * (step // C * H), mask=more, other=0)
        rest_coming = tl.load(
            kept + then * (step // C * H * K) + ok, mask=(ok < K) & more, other=0.0
        )
        rows = i * C + oc < n
        here = i * step
        mask_k, mask_v = tl.trans(_mask(rows, ok, K, BK)), _mask(rows, ov, V, VP)
        g = _gates(log_a + here * (H * K) + gates, mask_k)
        ys = tl.load(y + here * (HK * K) + keys, mask=mask_k, other=0.0).to(tl.float32)
        gated = (i * C + oc != last)[None, :]
        mask = mask_k
        if REVERSE:
            mask = mask & gated
        mine = tl.load(own + here * (HK * K) + keys, mask=mask, other=0.0).to(tl.float32)
        xs = tl.load(x + here * (H * V) + values, mask=mask_v, other=0.0).to(OPERAND)
        vs = tl.load(v + here * (H * V) + values, mask=mask_v, other=0.0).to(OPERAND)
        at = here * (H * K) + gates
        at_border = borders + (i // EVERY) * (step // C * H * K * V)
        is_border = ((i + 1) % EVERY == 0) | (i == chunks - 1)
        if REVERSE:
            forward = tl.load(products + at, mask=mask_k, other=0.0).to(tl.float32)
            if is_border:
                behind = tl.sum(tl.load(at_border, mask=inner, other=0.0).to(tl.float32) * state, 1)
        weights = tl.dot(vs, tl.trans(xs), input_precision=PRECISION)
        itself = tl.sum(tl.where(oc[:, None] == oc[None, :], weights, 0.0), 0)[None, :]
        ey = _sums_across(g, tl.trans(_way(C, REVERSE, True)), PARTS) * LOG2E
        weights = tl.where(causal & (is_far == 0), weights, 0.0).to(OPERAND)
        written = (ys * tl.exp2(ey)).to(OPERAND)
        ex = -ey
        inside = tl.zeros([BK, C], tl.float32)
        if is_far:  # nothing may grow; what lies inside is in near
            ex = _sums_across(g, tl.trans(_way(C, REVERSE, False)), PARTS) * LOG2E
            inside += tl.load(near + at, mask=mask_k, other=0.0)
        o = tl.dot(state.to(OPERAND), tl.trans(xs), input_precision=PRECISION)
        o *= tl.where(is_far, 1.0, rest)[:, None]
        # The state comes first: waiting for o then waits for it too, before loads of the next chunk
        # may take the place of vs.
        state *= rest[:, None]
        passed = written
        if not REVERSE:
            passed = tl.where(gated, written, 0.0).to(OPERAND)
        state = tl.dot(passed, vs, state, input_precision=PRECISION)
        o = tl.dot(written, weights, o, input_precision=PRECISION)
        o = o * tl.exp2(ex) + inside
        product = mine * o
        o += itself * ys
        tl.store(out + at, o.to(out.dtype.element_ty), mask=mask_k)
        if REVERSE:
            product = forward - product
            dg = _sums_across(product, oc[:, None] >= oc[None, :], PRODUCTS) + behind[:, None]
            behind += tl.sum(product, 1)
            tl.store(dlog_a + at, dg.to(dlog_a.dtype.element_ty), mask=mask_k)
        else:
            tl.store(products + at, product.to(products.dtype.element_ty), mask=mask_k)
            if is_border:
                tl.store(at_border, state.to(borders.dtype.element_ty), mask=inner)
