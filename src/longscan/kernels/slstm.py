"""The sLSTM cell, for few channels of a head in one program that keeps R on the chip.

Tokens follow one another, so the time of a step is all that counts. A program has one head of ROWS
sequences and walks through their tokens; state and R stay in registers. Programs do not meet.

What the backward needs of a token are five numbers, of which three may be rounded. With
h = c / n, the mean of what was written, and a the share of the newest token in it, b = 1 - a,

    h_t = b h_{t-1} + a z_t,   y_t = o h_t,   l_t = logaddexp(log f_t + l_{t-1}, i_t)

for l = log n + m. So with P and E the gradients by h and by l

    w = a b (z - h_{t-1}) P;   di = w + a E;   dlog f = b E - w;   dz = a P
    P <- b P;   E <- b E - w

Only the final state sees m itself: the gradient by m goes back along log f to the last token whose
i was m, the `last` of each channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

TINY = tl.constexpr(1e-37)


@triton.jit
def _sigmoid(x):
    """sigmoid(x), sigmoid(-x), and exp(-|x|)."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x < 0, e * r, r), tl.where(x < 0, r, e * r), e


@triton.jit
def _log_sigmoid(x, e):
    """log sigmoid(x) with e = exp(-|x|); log(1 + e) by its series where 1 + e loses digits."""
    series = e * (1 - e * (0.5 - e * (0.33333333 - 0.25 * e)))
    return tl.minimum(x, 0.0) - tl.where(e < 0.015625, series, tl.log(1 + e))


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _cell(i, f, z, o, c, n, m, low):
    """One token of every channel: the new c, n, m, low, y, and what is kept.

    m + low is m to twice as many digits: at an open gate a step moves m by less than its rounding,
    always in one direction.
    """
    _f, shut, e = _sigmoid(f)
    decay = _log_sigmoid(f, e) + low
    kept = m + decay
    back = kept - m
    low = (m - (kept - back)) + (decay - back)
    ahead = (i - kept) - low
    takes = (n == 0) | (ahead >= 0)  # where n = 0 nothing is remembered, and m says nothing
    gain = tl.exp(-tl.abs(ahead))
    write = tl.where(takes, 1.0, gain)
    keep = tl.where(takes & (ahead >= 0), gain, 1.0)
    m = tl.where(takes, i, kept)
    low = tl.where(takes, 0.0, low)
    z = _tanh(z)
    o, _o, _e = _sigmoid(o)
    held = keep * n
    n = held + write
    c = keep * c + write * z
    r = 1 / n
    h = c * r
    a, b = write * r, held * r
    share = tl.where(a <= 0.5, a, -tl.maximum(b, TINY))
    return c, n, m, low, o * h, h, share, z, o, shut, keep * r, takes


@triton.jit
def _shares(share):
    """a and b, of which the smaller one is kept, b as a negative number."""
    other = 1 - tl.abs(share)
    return tl.where(share >= 0, share, other), tl.where(share >= 0, other, -share)


@triton.jit
def _mix(y, R, P: tl.constexpr, PRECISION: tl.constexpr):
    """y [ROWS, .] times R [., 4 P] -> four [ROWS, P]; see `forward` for R's order."""
    out = tl.dot(y.to(R.dtype), R, input_precision=PRECISION)
    i_z, f_o = tl.split(tl.reshape(out, (y.shape[0], P, 2, 2)))
    i, z = tl.split(i_z)
    f, o = tl.split(f_o)
    return i, f, z, o


@triton.jit
def _load4(p, step, mask):
    a = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p + step, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(p + 2 * step, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, tl.load(p + 3 * step, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store4(p, step, a, b, c, d, mask):
    kind = p.dtype.element_ty
    tl.store(p, a.to(kind), mask=mask)
    tl.store(p + step, b.to(kind), mask=mask)
    tl.store(p + 2 * step, c.to(kind), mask=mask)
    tl.store(p + 3 * step, d.to(kind), mask=mask)


@triton.jit
def _where(starts, order, rows, pid, heads, ROWS: tl.constexpr):
    """The head of a program, its sequences, the first token and the length of each, the longest."""
    head = (pid % heads).to(tl.int64)
    at = (pid // heads) * ROWS + tl.arange(0, ROWS)
    there = at < rows
    row = tl.load(order + at, mask=there, other=0)
    first = tl.load(starts + row, mask=there, other=0)
    length = tl.load(starts + row + 1, mask=there, other=0) - first
    length = tl.where(there, length, 0).to(tl.int32)
    return head, row[:, None], first[:, None], length[:, None], tl.max(length, 0), there[:, None]


@entry
@triton.jit(do_not_specialize=["rows", "tokens"])
def forward(
    gates, r, bias, state, y, final, exact, rough, carried, last, starts, order,
    rows, tokens, heads,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y and the final state; what the backward reads if KEEP.

    exact: h and share [2, tokens, heads, D] float32, and behind them h before the first tokens
    [rows, heads, D]; rough: tanh z, sigmoid(o), sigmoid(-f) [3, tokens, heads, D]; carried:
    dc_0 / d(c_1 / n_1); last: tokens up to the last take-over.
    """
    head, row, first, length, longest, there = _where(
        starts, order, rows, tl.program_id(0), heads, ROWS
    )
    d, k = tl.arange(0, P), tl.arange(0, P)
    inside = d[None, :] < D
    kind = gates.dtype.element_ty
    # As R and y hardly change, their rounding is the same at every step and adds up in log f:
    # bfloat16 would be too coarse. |y| <= 1.
    operand = tl.float16 if kind == tl.bfloat16 else tl.float32
    # A channel's four gates lie side by side: then a thread has them all, and nothing that
    # follows the product needs an exchange.
    j = tl.arange(0, 4 * P)
    weights = r + (head * D + k[:, None]) * (4 * D) + (j % 4 * D + j // 4)[None, :]
    square = (k[:, None] < D) & (j // 4 < D)[None, :]
    R = tl.load(weights, mask=square, other=0.0).to(operand)
    bi, bf, bz, bo = _load4(bias + head * (4 * D) + d[None, :], D, inside)
    mine = (row * 4 * heads + head) * D + d[None, :]  # in states [rows, 4, heads, D]
    own = (row * heads + head) * D + d[None, :]
    part = heads * D
    size = tokens.to(tl.int64) * part
    valid = there & inside
    v = tl.zeros([ROWS, P], tl.float32)
    c, n, m, low, begun = v, v, v, v, v
    if STATE:
        v, c, n, m = _load4(state + mine, part, valid)
    if KEEP:
        zeroth = tl.where(n == 0, 0.0, c / tl.where(n == 0, 1.0, n))
        tl.store(exact + 2 * size + own, zeroth, mask=valid)
    took = tl.zeros([ROWS, P], tl.int32)
    for t in tl.range(0, longest, num_stages=STAGES):
        runs = (t < length) & inside
        g = gates + (first + t) * (4 * part) + head * (4 * D) + d[None, :]
        gi, gf, gz, go = _load4(g, D, runs)
        i, f, z, o = _mix(v, R, P, PRECISION)
        c1, n1, m1, low1, v1, h, share, z, o, shut, ratio, takes = _cell(
            i + gi + bi, f + gf + bf, z + gz + bz, o + go + bo, c, n, m, low
        )
        c, n = tl.where(runs, c1, c), tl.where(runs, n1, n)
        m, low = tl.where(runs, m1, m), tl.where(runs, low1, low)
        v = tl.where(runs, v1, v)
        to = ((first + t) * heads + head) * D + d[None, :]
        tl.store(y + to, v1.to(kind), mask=runs)
        if KEEP:
            _keep(exact, rough, to, size, h, share, z, o, shut, runs)
            begun = tl.where(t == 0, ratio, begun)
            took = tl.where(runs & takes, t + 1, took)
    _store4(final + mine, part, v, c, n, m, valid)
    if KEEP:
        tl.store(carried + own, begun, mask=valid)
        tl.store(last + own, took, mask=valid)


@triton.jit
def _keep(exact, rough, to, size, h, share, z, o, shut, mask):
    kind = rough.dtype.element_ty
    tl.store(exact + to, h, mask=mask)
    tl.store(exact + size + to, share, mask=mask)
    tl.store(rough + to, z.to(kind), mask=mask)
    tl.store(rough + size + to, o.to(kind), mask=mask)
    tl.store(rough + 2 * size + to, shut.to(kind), mask=mask)


@triton.jit
def _kept(exact, rough, to, size, before, mask):
    """What `_keep` stored, all 0 where masked; before: where h of the token before lies."""
    h = tl.load(exact + to, mask=mask, other=0.0)
    last = tl.load(exact + before, mask=mask, other=0.0)
    share = tl.load(exact + size + to, mask=mask, other=0.0)
    z = tl.load(rough + to, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(rough + size + to, mask=mask, other=0.0).to(tl.float32)
    shut = tl.load(rough + 2 * size + to, mask=mask, other=0.0).to(tl.float32)
    return h, last, share, z, o, shut


@triton.jit
def _ends(final, dfinal, mine, part, valid):
    """Gradients by y, h, log n + m, and by m with n and c exp(m) held, of a final state."""
    c = tl.load(final + mine + part, mask=valid, other=0.0)
    n = tl.load(final + mine + 2 * part, mask=valid, other=1.0)
    dy, dc, dn, dm = _load4(dfinal + mine, part, valid)
    E = n * dn + c * dc
    return dy, n * dc, E, dm - E


@triton.jit
def _cell_back(g, h, before, share, z, o, shut, P_, E, e, took, t, END: tl.constexpr):
    """The backward of `_cell`; g: by y. Where a sequence has ended all that was kept is 0: a = 0
    and b = 1 leave P and E as they are."""
    P_ += g * o
    P1, Q1 = P_, E - h * P_  # n times the gradients by c and n
    a, b = _shares(share)
    w = a * b * (z - before) * P_
    di = w + a * E
    E = b * E - w
    df = E
    if END:
        di += tl.where(took == t + 1, e, 0.0)
        df += tl.where(took <= t, e, 0.0)
    dz = a * P_ * (1 - z * z)
    return di, df * shut, dz, g * h * (o * (1 - o)), b * P_, E, P1, Q1


@triton.jit
def _begin(state, carried, dstate, mine, own, part, valid, back, P1, Q1, e, took,
           END: tl.constexpr):  # fmt: skip
    """Stores the gradient of the initial state."""
    ratio = tl.load(carried + own, mask=valid, other=0.0)
    c = tl.load(state + mine + part, mask=valid, other=0.0)
    n = tl.load(state + mine + 2 * part, mask=valid, other=0.0)
    dc, dn = ratio * P1, ratio * Q1
    dm = c * dc + n * dn
    if END:
        dm += tl.where(took == 0, e, 0.0)
    _store4(dstate + mine, part, back, dc, dn, dm, valid)


@entry
@triton.jit(do_not_specialize=["rows", "tokens"])
def backward(
    r, state, final, exact, rough, carried, last, dy, dfinal, dgates, dstate, starts, order,
    rows, tokens, heads,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, END: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates, and of the initial state if STATE; END: there is a dfinal."""
    head, row, first, length, longest, there = _where(
        starts, order, rows, tl.program_id(0), heads, ROWS
    )
    d, k = tl.arange(0, P), tl.arange(0, P)
    inside = d[None, :] < D
    kind = dgates.dtype.element_ty
    weights = r + (head * D + d[None, :]) * (4 * D) + k[:, None]
    square = (k[:, None] < D) & inside
    Ri = tl.load(weights, mask=square, other=0.0).to(kind)
    Rf = tl.load(weights + D, mask=square, other=0.0).to(kind)
    Rz = tl.load(weights + 2 * D, mask=square, other=0.0).to(kind)
    Ro = tl.load(weights + 3 * D, mask=square, other=0.0).to(kind)
    mine = (row * 4 * heads + head) * D + d[None, :]
    own = (row * heads + head) * D + d[None, :]
    part = heads * D
    size = tokens.to(tl.int64) * part
    valid = there & inside
    P_ = tl.zeros([ROWS, P], tl.float32)
    E, e, back, P1, Q1 = P_, P_, P_, P_, P_
    took = tl.zeros([ROWS, P], tl.int32)
    if END:
        back, P_, E, e = _ends(final, dfinal, mine, part, valid)
        took = tl.load(last + own, mask=valid, other=0)
    kinds = tl.arange(0, 4)[None, None, :]
    for s in tl.range(0, longest, num_stages=STAGES):
        t = longest - 1 - s
        runs = (t < length) & inside
        to = ((first + t) * heads + head) * D + d[None, :]
        g = tl.load(dy + to, mask=runs, other=0.0).to(tl.float32)
        before = tl.where(t > 0, to - part, 2 * size + own)
        h, before, share, z, o, shut = _kept(exact, rough, to, size, before, runs)
        di, df, dz, do, P_, E, P1, Q1 = _cell_back(
            g + back, h, before, share, z, o, shut, P_, E, e, took, t, END
        )
        di, df, dz, do = di.to(kind), df.to(kind), dz.to(kind), do.to(kind)
        # As one tile, which is brought into the order of memory at once.
        each = tl.reshape(tl.join(tl.join(di, dz), tl.join(df, do)), (ROWS, P, 4))
        to = (first + t) * (4 * part) + head * (4 * D) + d[None, :]
        tl.store(dgates + to[:, :, None] + kinds * D, each, mask=runs[:, :, None] & (kinds < 4))
        mixed = tl.dot(di, Ri, input_precision=PRECISION)
        mixed = tl.dot(df, Rf, mixed, input_precision=PRECISION)
        mixed = tl.dot(dz, Rz, mixed, input_precision=PRECISION)
        mixed = tl.dot(do, Ro, mixed, input_precision=PRECISION)
        back = tl.where(runs, mixed, back)
    if STATE:
        _begin(state, carried, dstate, mine, own, part, valid, back, P1, Q1, e, took, END)


# --- many channels: a head's channels are cut among programs that wait for one another ------------
#
# Every step each program computes its channels of all four gates from all of y before, and all
# programs of a head meet. They are launched cooperatively: the driver runs either all of them at
# once or none, so no one waits for a program that cannot start. What is sent is written before the
# count goes up (bar.sync, then a release by one thread at the scope of the GPU) and read after a
# thread has seen the full count (an acquire by every thread), past the first-level cache.


@triton.jit
def _arrive(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, goal, met):
    """Whether `goal` programs have arrived. Gives up after seconds, once and for all, rather than
    hang a device if a driver should not keep what it promises; all results are NaN then."""
    seen = _seen(counter)
    polls = 0
    while met & (seen < goal):
        seen = _seen(counter)
        polls += 1
        met = polls < 8000000
    tl.debug_barrier()
    return met


@triton.jit
def _seen(counter):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@entry
@triton.jit(do_not_specialize=["rows", "tokens", "group", "begin"])
def forward_split(
    gates, r, bias, state, y, final, exact, rough, carried, last, lows, sent, counters,
    starts, order, rows, tokens, heads, group, begin,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
    PROGRAMS: tl.constexpr, STATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    MEET: tl.constexpr,
):  # fmt: skip
    """As `forward`, for the groups from `group` on, PROGRAMS for each. sent: y [2, rows, heads, D].

    Without MEET one token, number `begin`, of every sequence: the launch is the meeting then.
    """
    pid = tl.program_id(0)
    own_group = group + pid // PROGRAMS
    head, row, first, length, longest, there = _where(starts, order, rows, own_group, heads, ROWS)
    k = tl.arange(0, P)
    d = (pid % PROGRAMS) * SLICE + tl.arange(0, SLICE)
    inside = d[None, :] < D
    kind = gates.dtype.element_ty
    operand = sent.dtype.element_ty
    j = tl.arange(0, 4 * SLICE)
    channel = (pid % PROGRAMS) * SLICE + j // 4
    weights = r + (head * D + k[:, None]) * (4 * D) + (j % 4 * D + channel)[None, :]
    square = (k[:, None] < D) & (channel < D)[None, :]
    R = tl.load(weights, mask=square, other=0.0).to(operand)
    bi, bf, bz, bo = _load4(bias + head * (4 * D) + d[None, :], D, inside)
    mine = (row * 4 * heads + head) * D + d[None, :]
    own = (row * heads + head) * D + d[None, :]
    all_own = (row * heads + head) * D + k[None, :]
    part = heads * D
    valid = there & inside
    all_valid = there & (k[None, :] < D)
    size = tokens.to(tl.int64) * part
    slot = rows.to(tl.int64) * part
    v = tl.zeros([ROWS, SLICE], tl.float32)
    c, n, m, low, begun = v, v, v, v, v
    full = tl.zeros([ROWS, P], operand)
    took = tl.zeros([ROWS, SLICE], tl.int32)
    if STATE:
        v, c, n, m = _load4(state + mine, part, valid)
        full = tl.load(state + (row * 4 * heads + head) * D + k[None, :], mask=all_valid, other=0.0)
        full = full.to(operand)
    end = longest
    if not MEET:
        end = tl.minimum(longest, begin + 1)
        if begin > 0:
            v, c, n, m = _load4(final + mine, part, valid)
            low = tl.load(lows + own, mask=valid, other=0.0)
            full = tl.load(sent + (begin + 1) % 2 * slot + all_own, mask=all_valid, other=0.0)
            if KEEP:
                begun = tl.load(carried + own, mask=valid, other=0.0)
                took = tl.load(last + own, mask=valid, other=0)
    if KEEP:
        zeroth = tl.where(n == 0, 0.0, c / tl.where(n == 0, 1.0, n))
        tl.store(exact + 2 * size + own, zeroth, mask=valid & (begin == 0))
    counter = counters + own_group
    met = True
    p = gates + (first + begin) * (4 * part) + head * (4 * D) + d[None, :]
    gi, gf, gz, go = _load4(p, D, (begin < length) & inside)
    for t in tl.range(begin, end, num_stages=1):
        runs = (t < length) & inside
        i, f, z, o = _mix(full, R, SLICE, PRECISION)
        c1, n1, m1, low1, v1, h, share, z, o, shut, ratio, takes = _cell(
            i + gi + bi, f + gf + bf, z + gz + bz, o + go + bo, c, n, m, low
        )
        tl.store(sent + t % 2 * slot + own, v1.to(operand), mask=runs)
        if MEET:
            _arrive(counter)
        c, n = tl.where(runs, c1, c), tl.where(runs, n1, n)
        m, low = tl.where(runs, m1, m), tl.where(runs, low1, low)
        v = tl.where(runs, v1, v)
        to = ((first + t) * heads + head) * D + d[None, :]
        tl.store(y + to, v1.to(kind), mask=runs)
        if KEEP:
            _keep(exact, rough, to, size, h, share, z, o, shut, runs)
            begun = tl.where(t == 0, ratio, begun)
            took = tl.where(runs & takes, t + 1, took)
        if MEET:
            p = gates + (first + t + 1) * (4 * part) + head * (4 * D) + d[None, :]
            gi, gf, gz, go = _load4(p, D, (t + 1 < length) & inside)
            met = _wait(counter, (t + 1) * PROGRAMS, met)
            full = tl.load(
                sent + t % 2 * slot + all_own, mask=all_valid, other=0.0, cache_modifier=".cg"
            )
            full = tl.where(met, full, float("nan"))
    _store4(final + mine, part, v, c, n, m, valid)
    if not MEET:
        tl.store(lows + own, low, mask=valid)
    if KEEP:
        tl.store(carried + own, begun, mask=valid)
        tl.store(last + own, took, mask=valid)


@triton.jit
def _gathered(dgates, R, first, t, length, head, heads, D: tl.constexpr, P: tl.constexpr,
              PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """All gradients of the gates of token t times R [PARTS, 4 P / PARTS, SLICE], each part in a
    warp of its own: [ROWS, SLICE]."""
    j = tl.arange(0, PARTS)[:, None] * (4 * P // PARTS) + tl.arange(0, 4 * P // PARTS)[None, :]
    at = (((first + t) * heads + head) * (4 * D))[None, :, :] + (j // P * D + j % P)[:, None, :]
    mask = (t < length)[None, :, :] & (j % P < D)[:, None, :]
    x = tl.load(dgates + at, mask=mask, other=0.0, cache_modifier=".cg")
    y = tl.permute(tl.dot(x, R, input_precision=PRECISION), (1, 2, 0))
    y = tl.reshape(y, (y.shape[0], y.shape[1], 2, 2, 2))  # of 8 parts
    # Halves added to halves: so a thread gets its channels' parts, and its share of what follows.
    a, b = tl.split(y)
    a, b = tl.split(a + b)
    a, b = tl.split(a + b)
    return a + b


@entry
@triton.jit(do_not_specialize=["rows", "tokens", "group", "end"])
def backward_split(
    r, state, final, exact, rough, carried, last, dy, dfinal, dgates, dstate, moved, counters,
    starts, order, rows, tokens, heads, group, end,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
    PROGRAMS: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr, END: tl.constexpr,
    PRECISION: tl.constexpr, MEET: tl.constexpr,
):  # fmt: skip
    """As `backward`, for the groups from `group` on. What is sent are the gradients of the gates.

    Without MEET one token, number end - 1, of every sequence; `moved` [5, rows, heads, D] holds
    what goes on to the one before it. With end = 0 the gradient of the state is left to do.
    """
    pid = tl.program_id(0)
    own_group = group + pid // PROGRAMS
    head, row, first, length, longest, there = _where(starts, order, rows, own_group, heads, ROWS)
    d = (pid % PROGRAMS) * SLICE + tl.arange(0, SLICE)
    inside = d[None, :] < D
    kind = dgates.dtype.element_ty
    j = tl.arange(0, PARTS)[:, None] * (4 * P // PARTS) + tl.arange(0, 4 * P // PARTS)[None, :]
    weights = r + (head * D + d[None, None, :]) * (4 * D) + (j // P * D + j % P)[:, :, None]
    square = (j % P < D)[:, :, None] & (d < D)[None, None, :]
    R = tl.load(weights, mask=square, other=0.0).to(kind)
    mine = (row * 4 * heads + head) * D + d[None, :]
    own = (row * heads + head) * D + d[None, :]
    part = heads * D
    valid = there & inside
    size = tokens.to(tl.int64) * part
    slot = rows.to(tl.int64) * part
    P_ = tl.zeros([ROWS, SLICE], tl.float32)
    E, e, back, P1, Q1 = P_, P_, P_, P_, P_
    took = tl.zeros([ROWS, SLICE], tl.int32)
    if END:
        back, P_, E, e = _ends(final, dfinal, mine, part, valid)
        took = tl.load(last + own, mask=valid, other=0)
    begin = 0
    if MEET:
        end = longest
    else:
        begin = tl.maximum(end - 1, 0)
        if end < longest:
            back, P_, E, P1 = _load4(moved + own, slot, valid)
            Q1 = tl.load(moved + 4 * slot + own, mask=valid, other=0.0)
        end = tl.minimum(end, longest)
    counter = counters + own_group
    met = True
    for s in tl.range(0, end - begin, num_stages=1):
        t = end - 1 - s
        runs = (t < length) & inside
        to = ((first + t) * heads + head) * D + d[None, :]
        g = tl.load(dy + to, mask=runs, other=0.0).to(tl.float32)
        before = tl.where(t > 0, to - part, 2 * size + own)
        h, before, share, z, o, shut = _kept(exact, rough, to, size, before, runs)
        if MEET:  # at the first token there is nothing to wait for
            met = _wait(counter, s * PROGRAMS, met)
        y = _gathered(dgates, R, first, t + 1, length, head, heads, D, P, PARTS, PRECISION)
        back = tl.where(t + 1 < length, tl.where(met, y, float("nan")), back)
        di, df, dz, do, P_, E, P1, Q1 = _cell_back(
            g + back, h, before, share, z, o, shut, P_, E, e, took, t, END
        )
        p = dgates + (first + t) * (4 * part) + head * (4 * D) + d[None, :]
        _store4(p, D, di, df, dz, do, runs)
        if MEET:
            _arrive(counter)
    if MEET or end == 0:
        if MEET:
            met = _wait(counter, end * PROGRAMS, met)
        if STATE:
            y = _gathered(dgates, R, first, 0, length, head, heads, D, P, PARTS, PRECISION)
            y = tl.where(met, y, float("nan"))
            _begin(state, carried, dstate, mine, own, part, valid, y, P1, Q1, e, took, END)
    if not MEET:
        _store4(moved + own, slot, back, P_, E, P1, valid)
        tl.store(moved + 4 * slot + own, Q1, mask=valid)
