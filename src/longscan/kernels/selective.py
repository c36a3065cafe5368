"""Mamba's selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t . h_t, per channel.

A program owns W warps of channels of one piece of a sequence and walks through its tokens in
chunks of BT. Everything per token and channel (softplus, gate, skip) is computed on tiles [BT, W,
channels] as they are loaded and handed over in shared memory; the loop over tokens then only
does what is needed per state. In it a thread holds RE channels x RN states, so that values read
per channel serve RN states, those read per state serve RE channels, and the sums over states or
channels cross few lanes. Rates become A log2(e): all exponentials are to the base 2 and of
numbers <= 0. Written in Gluon because nothing else fixes which thread holds which states.

Shapes: tokens M of all sequences, E channels, N states in NP (a power of two). u, dt, z, y [M, E];
B, C [M, G, N]; rate [E, N]; D, bias [E]; states of pieces [m, E, N]. table [m, 3]: sequence, first
token, end of each piece; begin [rows + 1]: where sequences begin, and the end; slots [rows]: the
first kept state of each, one for BT tokens.
"""

# ruff: noqa: RUF005  (Triton does not know (*a, b))
from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longscan.kernels._launch import entry

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _states(W, RE, RN, LN):
    """Layout of states [W, channels of a warp, NP]."""
    return gl.BlockedLayout([1, RE, RN], [1, 32 // LN, LN], [W, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _few(U, W, RE, RN, LN):
    """Layout of U tokens' states [U, W, channels of a warp, NP], tokens within a thread."""
    return gl.BlockedLayout([U, 1, RE, RN], [1, 1, 32 // LN, LN], [1, W, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def _tile(W, X):
    """Layout of a tile [BT, W, X], read and written along channels, 8 a thread."""
    v = min(8, X)
    return gl.BlockedLayout([1, 1, v], [32 * v // X, 1, X // v], [1, W, 1], [2, 1, 0])


@gluon.constexpr_function
def _weights(W, NP):
    """Layout of B and C [BT, NP]."""
    return gl.BlockedLayout([1, 4], [128 // NP, NP // 4], [W, 1], [1, 0])


@gluon.constexpr_function
def _parts(W, NP):
    """Layout of the warps' parts of a sum over channels [BT, W, NP]: the warps within a thread."""
    return gl.BlockedLayout([1, W, 4], [128 // NP, 1, NP // 4], [W, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _slice(dim, layout):
    return gl.SliceLayout(dim, layout)


@gluon.constexpr_function
def _plain(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def _history(U, W, RE, RN, LN):
    """Layout of U tokens' states [U, W, RE, 32 / LN, NP], a channel in two indices: neighbouring
    lanes then use neighbouring banks of shared memory."""
    return gl.BlockedLayout(
        [U, 1, RE, 1, RN], [1, 1, 1, 32 // LN, LN], [1, W, 1, 1, 1], [4, 3, 2, 1, 0]
    )


@gluon.jit
def _exp2(x):
    # Results below 2^-126 become 0, which spares the treatment of subnormal numbers.
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def _exp2_of_eight():
    """Eight exponentials, the last as a polynomial: the unit for the others is what one waits for.

    2^x = 2^n (1 + f q(f)) for the whole number n that is nearest to x, |f| <= 1/2; to 2.7e-7, and
    nothing is lost near 1. x is taken as within -126 and 127.
    """
    code = [f"ex2.approx.ftz.f32 ${i}, ${i + 8};" for i in range(7)]
    code += [
        "{.reg .f32 x, n, p; .reg .b32 i;",
        "max.f32 x, $15, 0fC2FC0000; min.f32 x, x, 0f42FE0000;",
        "add.rn.f32 n, x, 0f4B400000; mov.b32 i, n;",
        "add.rn.f32 n, n, 0fCB400000; sub.rn.f32 x, x, n;",
        "fma.rn.f32 p, x, 0f3AAFA467, 0f3C1E5FB5; fma.rn.f32 p, p, x, 0f3D635776;",
        "fma.rn.f32 p, p, x, 0f3E75FD25; fma.rn.f32 p, p, x, 0f3F317218;",
        "fma.rn.f32 p, p, x, 0f3F800000;",
        "{.reg .b32 j; mov.b32 j, p; shl.b32 i, i, 23; add.s32 j, j, i; mov.b32 $7, j;}}",
    ]
    return " ".join(code)


@gluon.constexpr_function
def _eight_to_eight():
    return ",".join(["=&f"] * 8 + ["f"] * 8)


@gluon.jit
def _exp2_mixed(x):
    return gl.inline_asm_elementwise(
        _exp2_of_eight(), _eight_to_eight(), [x], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _sigmoid(x):
    return _inverse(1.0 + _exp2(-LOG2E * x))


@gluon.jit
def _softplus(x):
    """log(1 + e^x) to full relative precision, also where it is tiny."""
    e = _exp2(-LOG2E * gl.abs(x))
    series = e * (1 - e * (0.5 - e * (0.3333333333 - 0.25 * e)))
    return gl.maximum(x, 0.0) + gl.where(e < 0.03, series, _log2(1 + e) * LN2)


@gluon.jit
def _put(tile, x, k, U: gl.constexpr, L: gl.constexpr):
    """Entry k of [U, a, b] becomes x; free where k is a constant and U lies in a thread."""
    u = gl.arange(0, U, layout=_slice(1, _slice(2, L)))[:, None][:, :, None]
    return gl.where(u == k, gl.convert_layout(x, _slice(0, L))[None, :, :], tile)


@gluon.jit
def _put_states(tile, x, k, U: gl.constexpr, L: gl.constexpr):
    """The same for [U, a, b, c, d]."""
    u = gl.arange(0, U, layout=_slice(1, _slice(2, _slice(3, _slice(4, L)))))
    u = u[:, None][:, :, None][:, :, :, None][:, :, :, :, None]
    return gl.where(u == k, gl.convert_layout(x, _slice(0, L))[None, :, :, :, :], tile)


@gluon.jit
def _by_channel(x):
    return x[:, :, None]


@gluon.jit
def _by_state(x):
    return x[None, :][:, None, :]


@gluon.jit
def _channels(e0, W: gl.constexpr, X: gl.constexpr, L: gl.constexpr):
    """Channels of a tile [?, W, X] in layout L, as [1, W, X]."""
    w = gl.arange(0, W, layout=_slice(0, _slice(2, L)))
    x = gl.arange(0, X, layout=_slice(0, _slice(1, L)))
    return (e0 + w[None, :][:, :, None] * X) + x[None, :][:, None, :]


@gluon.jit
def _tokens(t, BT: gl.constexpr, L: gl.constexpr):
    """Tokens of a tile [BT, W, X] in layout L, as [BT, 1, 1]."""
    return t + gl.arange(0, BT, layout=_slice(1, _slice(2, L)))[:, None][:, :, None]


@gluon.jit
def _load(x, stride, t, end, e0, E, BT: gl.constexpr, W: gl.constexpr, X: gl.constexpr):
    """A tile of tokens t, t + 1, ... before `end`; zero elsewhere."""
    L: gl.constexpr = _tile(W, X)
    m, e = _tokens(t, BT, L), _channels(e0, W, X, L)
    return gl.load(x + m * stride + e, mask=(m < end) & (e < E), other=0.0)


@gluon.jit
def _store(x, value, t, end, e0, E, BT: gl.constexpr, W: gl.constexpr, X: gl.constexpr):
    L: gl.constexpr = _tile(W, X)
    m, e = _tokens(t, BT, L), _channels(e0, W, X, L)
    gl.store(x + m * E + e, value.to(x.dtype.element_ty), mask=(m < end) & (e < E))


@gluon.jit
def _load_weights(
    x, stride, t, end, N: gl.constexpr, NP: gl.constexpr, BT: gl.constexpr, W: gl.constexpr
):
    L: gl.constexpr = _weights(W, NP)
    m = (t + gl.arange(0, BT, layout=_slice(1, L)))[:, None]
    n = gl.arange(0, NP, layout=_slice(0, L))[None, :]
    return gl.load(x + m * stride + n, mask=(m < end) & (n < N), other=0.0)


@gluon.jit
def _store_parts(x, parts, t, end, N: gl.constexpr, NP: gl.constexpr, BT: gl.constexpr,
                 W: gl.constexpr):  # fmt: skip
    """The sum over warps of parts [BT, W, NP] in shared memory, to x [M, N]."""
    L: gl.constexpr = _parts(W, NP)
    m = (t + gl.arange(0, BT, layout=_slice(1, _slice(1, L))))[:, None]
    n = gl.arange(0, NP, layout=_slice(0, _slice(1, L)))[None, :]
    part = gl.sum(parts._reinterpret(gl.float32, [BT, W, NP], _plain(3)).load(L), 1)
    gl.store(x + m * N + n, part, mask=(m < end) & (n < N))


@gluon.jit
def _load_channels(x, e0, E, W: gl.constexpr, X: gl.constexpr):
    """Numbers of channels, as [1, W, X] in the layout of tiles."""
    e = _channels(e0, W, X, _tile(W, X))
    return gl.load(x + e, mask=e < E, other=0.0).to(gl.float32)


@gluon.jit
def _where(e0, E, N: gl.constexpr, NP: gl.constexpr, W: gl.constexpr, X: gl.constexpr,
           L: gl.constexpr):  # fmt: skip
    """Offsets of states [W, X, NP] in [E, N], and which exist."""
    w = gl.arange(0, W, layout=_slice(1, _slice(2, L)))[:, None][:, :, None]
    x = gl.arange(0, X, layout=_slice(0, _slice(2, L)))[None, :][:, :, None]
    n = gl.arange(0, NP, layout=_slice(0, _slice(1, L)))[None, :][:, None, :]
    e = e0 + w * X + x
    return e * N + n, (e < E) & (n < N)


@gluon.jit
def _steps(dt, bias, t, end, e0, E, BT: gl.constexpr, W: gl.constexpr, X: gl.constexpr,
           HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr):  # fmt: skip
    """Step sizes, zero outside the sequence, and what softplus took."""
    raw = dt.to(gl.float32)
    if HAS_BIAS:
        raw += _load_channels(bias, e0, E, W, X)
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    if HAS_BIAS or SOFTPLUS:
        L: gl.constexpr = _tile(W, X)
        step = gl.where((_tokens(t, BT, L) < end) & (_channels(e0, W, X, L) < E), step, 0.0)
    return step, raw


@entry
@gluon.jit(do_not_specialize=["size"])
def scan(
    u, dt, rate, B, C, D, z, bias, enter, y, end, keep, total, table, begin, slots,
    su, sdt, sB, sC, sz, E, F, size,
    N: gl.constexpr, NP: gl.constexpr, W: gl.constexpr, RE: gl.constexpr, RN: gl.constexpr,
    BT: gl.constexpr, UNROLL: gl.constexpr, MODE: gl.constexpr, KEEP: gl.constexpr,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    ENTER: gl.constexpr,
):  # fmt: skip
    """MODE 0: outputs y and the state at the end of each piece, from `enter` (if ENTER).

    1: only the state at the end of each part of a piece, from zero, and the sum of steps; table is
    then that of the parts, and pieces have `size` tokens. 2: the same for gradients by states,
    which go backward in time: u is then the gradient of y, B is C. F: channels of a group of B, C.
    """
    LN: gl.constexpr = NP // RN
    X: gl.constexpr = RE * (32 // LN)
    L: gl.constexpr = _states(W, RE, RN, LN)
    LC: gl.constexpr = _slice(2, L)
    LB: gl.constexpr = _slice(0, _slice(1, L))
    LT: gl.constexpr = _tile(W, X)
    LF: gl.constexpr = _slice(3, _few(UNROLL, W, RE, RN, LN))
    blocks = (E + W * X - 1) // (W * X)
    block = gl.program_id(0) % blocks
    piece = (gl.program_id(0) // blocks).to(gl.int64)
    e0 = block * (W * X)
    row = gl.load(table + 3 * piece)
    t0 = gl.load(table + 3 * piece + 1)
    t1 = gl.load(table + 3 * piece + 2)
    B += (e0 // F) * N
    C += (e0 // F) * N
    o, there = _where(e0, E, N, NP, W, X, L)
    r = gl.load(rate + o, mask=there, other=0.0).to(gl.float32) * LOG2E
    states = piece * E * N
    h = gl.zeros([W, X, NP], gl.float32, layout=L)
    if ENTER:
        h = gl.load(enter + states + o, mask=there, other=0.0).to(gl.float32)
    if KEEP:
        keep += (gl.load(slots + row) + (t0 - gl.load(begin + row)) // BT) * E * N
    sums = gl.zeros([BT, W, X], gl.float32, layout=LT)
    steps = gl.allocate_shared_memory(gl.float32, [BT, W, X], _plain(2))
    drives = gl.allocate_shared_memory(gl.float32, [BT, W, X], _plain(2))
    outs = gl.allocate_shared_memory(gl.float32, [BT // UNROLL, UNROLL, W, X], _plain(3))
    bs = gl.allocate_shared_memory(gl.float32, [BT, NP], _plain(1))
    cs = gl.allocate_shared_memory(gl.float32, [BT, NP], _plain(1))

    chunks = (t1 - t0 + BT - 1) // BT
    t = t0
    way = BT
    if MODE == 2:
        t = t0 + (chunks - 1) * BT
        way = -BT
        # Nobody asks for those of the first piece, or below for those of the last.
        chunks = gl.where(t0 - gl.load(begin + row) < size, 0, chunks)
    elif MODE == 1:
        first = gl.load(begin + row)
        whole = (gl.load(begin + row + 1) - first - 1) // size * size
        chunks = gl.where(t0 - first >= whole, 0, chunks)
    ut = _load(u, su, t, t1, e0, E, BT, W, X)
    dtt = _load(dt, sdt, t, t1, e0, E, BT, W, X)
    bt = _load_weights(B, sB, t, t1, N, NP, BT, W)
    if MODE == 0:
        ct = _load_weights(C, sC, t, t1, N, NP, BT, W)
    if HAS_Z:
        zt = _load(z, sz, t, t1, e0, E, BT, W, X)
    for _ in range(0, chunks):
        if KEEP:
            gl.store(keep + o, h.to(keep.dtype.element_ty), mask=there)
            keep += E * N
        x = ut.to(gl.float32)
        step, _raw = _steps(dtt, bias, t, t1, e0, E, BT, W, X, HAS_BIAS, SOFTPLUS)
        if MODE == 2 and HAS_Z:
            gate = zt.to(gl.float32)
            gate *= _sigmoid(gate)
        if MODE != 0:
            sums += step
        drive = step * x
        if MODE == 2:
            drive = x
            if HAS_Z:
                drive *= gate
        steps._reinterpret(gl.float32, [BT, W, X], _plain(3)).store(step)
        drives._reinterpret(gl.float32, [BT, W, X], _plain(3)).store(drive)
        bs._reinterpret(gl.float32, [BT, NP], _plain(2)).store(bt.to(gl.float32))
        if MODE == 0:
            cs._reinterpret(gl.float32, [BT, NP], _plain(2)).store(ct.to(gl.float32))
        # The next chunk is on its way while this one is computed.
        before = ut
        if HAS_Z:
            gates = zt
        now = t
        t += way
        last = gl.where(t < t0, t, t1)  # nothing lies before the piece
        ut = _load(u, su, t, last, e0, E, BT, W, X)
        dtt = _load(dt, sdt, t, last, e0, E, BT, W, X)
        bt = _load_weights(B, sB, t, last, N, NP, BT, W)
        if MODE == 0:
            ct = _load_weights(C, sC, t, last, N, NP, BT, W)
        if HAS_Z:
            zt = _load(z, sz, t, last, e0, E, BT, W, X)
        for j in range(0, BT // UNROLL):
            few = gl.zeros([UNROLL, W, X], gl.float32, layout=LF)
            for k in gl.static_range(UNROLL):
                i = j * UNROLL + k
                if MODE == 2:
                    i = BT - 1 - i
                a = _by_channel(steps.index(i).load(LC)) * r
                if MODE != 0 and RE * RN % 8 == 0:
                    a = _exp2_mixed(a)
                else:
                    a = _exp2(a)
                g = _by_channel(drives.index(i).load(LC)) * _by_state(bs.index(i).load(LB))
                if MODE == 2:
                    h = a * (h + g)
                else:
                    h = a * h + g
                if MODE == 0:
                    out = gl.sum(h * _by_state(cs.index(i).load(LB)), 2)
                    few = _put(few, out, k, UNROLL, LF)
            if MODE == 0:
                outs.index(j).store(few)
        if MODE == 0:
            out = outs._reinterpret(gl.float32, [BT, W, X], _plain(3)).load(LT)
            if HAS_D:
                out += _load_channels(D, e0, E, W, X) * before.to(gl.float32)
            if HAS_Z:
                gate = gates.to(gl.float32)
                out *= gate * _sigmoid(gate)
            _store(y, out, now, t1, e0, E, BT, W, X)
    gl.store(end + states + o, h, mask=there)
    if MODE != 0:
        LS: gl.constexpr = _slice(0, LT)
        w = gl.arange(0, W, layout=_slice(1, LS))[:, None]
        e = e0 + w * X + gl.arange(0, X, layout=_slice(0, LS))[None, :]
        gl.store(total + piece * E + e, gl.sum(sums, 0), mask=e < E)


@entry
@gluon.jit(do_not_specialize=["M"])
def backward(
    u, dt, rate, B, C, D, z, bias, keep, dy, after, du, ddt, dz, dB, dC, dA, dD, dbias, before,
    table, begin, slots, su, sdt, sB, sC, sz, sdy, E, F, M,
    N: gl.constexpr, NP: gl.constexpr, W: gl.constexpr, RE: gl.constexpr, RN: gl.constexpr,
    BT: gl.constexpr, UNROLL: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr, AFTER: gl.constexpr,
):  # fmt: skip
    """All gradients. With g_t = dL/dh_t: g_t = C_t dy_t + a_{t+1} g_{t+1}, from `after` (if AFTER).

    Chunks go backward; within one, the states are found again from the one kept before it.
    dB, dC [blocks of channels, M, N], dA [m, E, N], dD, dbias [m, E] are parts of sums; before
    [rows, E, N] is the gradient of the states that enter sequences.
    """
    LN: gl.constexpr = NP // RN
    X: gl.constexpr = RE * (32 // LN)
    L: gl.constexpr = _states(W, RE, RN, LN)
    LC: gl.constexpr = _slice(2, L)
    LB: gl.constexpr = _slice(0, _slice(1, L))
    LT: gl.constexpr = _tile(W, X)
    LF: gl.constexpr = _few(UNROLL, W, RE, RN, LN)
    LQ: gl.constexpr = _history(UNROLL, W, RE, RN, LN)
    KD: gl.constexpr = keep.dtype.element_ty
    blocks = (E + W * X - 1) // (W * X)
    block = gl.program_id(0) % blocks
    piece = (gl.program_id(0) // blocks).to(gl.int64)
    e0 = block * (W * X)
    row = gl.load(table + 3 * piece)
    t0 = gl.load(table + 3 * piece + 1)
    t1 = gl.load(table + 3 * piece + 2)
    B += (e0 // F) * N
    C += (e0 // F) * N
    dB += block.to(gl.int64) * M * N
    dC += block.to(gl.int64) * M * N
    o, there = _where(e0, E, N, NP, W, X, L)
    r = gl.load(rate + o, mask=there, other=0.0).to(gl.float32) * LOG2E
    states = piece * E * N
    carry = gl.zeros([W, X, NP], gl.float32, layout=L)
    if AFTER:
        carry = gl.load(after + states + o, mask=there, other=0.0).to(gl.float32)
    dr = gl.zeros([W, X, NP], gl.float32, layout=L)
    chunks = (t1 - t0 + BT - 1) // BT
    keep += (gl.load(slots + row) + (t0 - gl.load(begin + row)) // BT + chunks - 1) * E * N
    LS: gl.constexpr = _slice(0, LT)
    sum_d = gl.zeros([W, X], gl.float32, layout=LS)
    sum_b = gl.zeros([W, X], gl.float32, layout=LS)
    t = t0 + (chunks - 1) * BT
    ut = _load(u, su, t, t1, e0, E, BT, W, X)
    dtt = _load(dt, sdt, t, t1, e0, E, BT, W, X)
    dyt = _load(dy, sdy, t, t1, e0, E, BT, W, X)
    bt = _load_weights(B, sB, t, t1, N, NP, BT, W)
    ct = _load_weights(C, sC, t, t1, N, NP, BT, W)
    if HAS_Z:
        zt = _load(z, sz, t, t1, e0, E, BT, W, X)
    ht = gl.load(keep + o, mask=there, other=0.0)
    for _ in range(0, chunks):
        x = ut.to(gl.float32)
        step, _raw = _steps(dtt, bias, t, t1, e0, E, BT, W, X, HAS_BIAS, SOFTPLUS)
        dout = dyt.to(gl.float32)
        if HAS_Z:
            gate = zt.to(gl.float32)
            dout *= gate * _sigmoid(gate)
        # Allocated here, so that buffers which are not in use together share memory.
        steps = gl.allocate_shared_memory(gl.float32, [BT, W, X], _plain(2))
        drives = gl.allocate_shared_memory(gl.float32, [BT, W, X], _plain(2))
        dys = gl.allocate_shared_memory(gl.float32, [BT, W, X], _plain(2))
        bs = gl.allocate_shared_memory(gl.float32, [BT, NP], _plain(1))
        cs = gl.allocate_shared_memory(gl.float32, [BT, NP], _plain(1))
        outs = gl.allocate_shared_memory(gl.float32, [BT // UNROLL, UNROLL, W, X], _plain(3))
        dcs = gl.allocate_shared_memory(gl.float32, [BT // UNROLL, UNROLL, W, NP], _plain(3))
        hs = gl.allocate_shared_memory(KD, [BT // UNROLL, UNROLL, W, RE, 32 // LN, NP], _plain(5))
        steps._reinterpret(gl.float32, [BT, W, X], _plain(3)).store(step)
        drives._reinterpret(gl.float32, [BT, W, X], _plain(3)).store(step * x)
        dys._reinterpret(gl.float32, [BT, W, X], _plain(3)).store(dout)
        bs._reinterpret(gl.float32, [BT, NP], _plain(2)).store(bt.to(gl.float32))
        cs._reinterpret(gl.float32, [BT, NP], _plain(2)).store(ct.to(gl.float32))
        h = ht.to(gl.float32)
        for j in range(0, BT // UNROLL):
            few = gl.zeros([UNROLL, W, X], gl.float32, layout=_slice(3, LF))
            fewc = gl.zeros([UNROLL, W, NP], gl.float32, layout=_slice(2, LF))
            fewh = gl.zeros([UNROLL, W, RE, 32 // LN, NP], KD, layout=LQ)
            for k in gl.static_range(UNROLL):
                i = j * UNROLL + k
                q = gl.permute(gl.reshape(h.to(KD), [W, 32 // LN, RE, NP]), [0, 2, 1, 3])
                fewh = _put_states(fewh, q, k, UNROLL, LQ)
                a = _exp2(_by_channel(steps.index(i).load(LC)) * r)
                h = a * h + _by_channel(drives.index(i).load(LC)) * _by_state(bs.index(i).load(LB))
                dc = gl.sum(h * _by_channel(dys.index(i).load(LC)), 1)
                fewc = _put(fewc, dc, k, UNROLL, _slice(2, LF))
                if HAS_Z:
                    out = gl.sum(h * _by_state(cs.index(i).load(LB)), 2)
                    few = _put(few, out, k, UNROLL, _slice(3, LF))
            hs.index(j).store(fewh)
            dcs.index(j).store(fewc)
            if HAS_Z:
                outs.index(j).store(few)
        _store_parts(dC, dcs, t, t1, N, NP, BT, W)
        # Tiles are read again, not kept: registers are what limits this kernel.
        if HAS_Z:
            whole = outs._reinterpret(gl.float32, [BT, W, X], _plain(3)).load(LT)
            if HAS_D:
                x = _load(u, su, t, t1, e0, E, BT, W, X).to(gl.float32)
                whole += _load_channels(D, e0, E, W, X) * x
            gate = _load(z, sz, t, t1, e0, E, BT, W, X).to(gl.float32)
            sig = _sigmoid(gate)
            whole *= _load(dy, sdy, t, t1, e0, E, BT, W, X).to(gl.float32)
            _store(dz, whole * sig * (1 + gate * (1 - sig)), t, t1, e0, E, BT, W, X)
        now = t
        t -= BT
        last = gl.where(t < t0, t, t1)  # nothing lies before the piece
        ut = _load(u, su, t, last, e0, E, BT, W, X)
        dtt = _load(dt, sdt, t, last, e0, E, BT, W, X)
        dyt = _load(dy, sdy, t, last, e0, E, BT, W, X)
        bt = _load_weights(B, sB, t, last, N, NP, BT, W)
        ct = _load_weights(C, sC, t, last, N, NP, BT, W)
        if HAS_Z:
            zt = _load(z, sz, t, last, e0, E, BT, W, X)
        keep -= E * N
        ht = gl.load(keep + o, mask=there & (t >= t0), other=0.0)
        dsteps = gl.allocate_shared_memory(gl.float32, [BT // UNROLL, UNROLL, W, X], _plain(3))
        dbs = gl.allocate_shared_memory(gl.float32, [BT // UNROLL, UNROLL, W, NP], _plain(3))
        # The gradients of drives take their place.
        ddrives = drives._reinterpret(gl.float32, [BT // UNROLL, UNROLL, W, X], _plain(3))
        befores = hs._reinterpret(KD, [BT, W, RE, 32 // LN, NP], _plain(4))
        for jj in range(0, BT // UNROLL):
            j = BT // UNROLL - 1 - jj
            few = gl.zeros([UNROLL, W, X], gl.float32, layout=_slice(3, LF))
            fewx = gl.zeros([UNROLL, W, X], gl.float32, layout=_slice(3, LF))
            fewb = gl.zeros([UNROLL, W, NP], gl.float32, layout=_slice(2, LF))
            for kk in gl.static_range(UNROLL):
                k = UNROLL - 1 - kk
                i = j * UNROLL + k
                s = _by_channel(steps.index(i).load(LC))
                a = _exp2(s * r)
                g = carry + _by_channel(dys.index(i).load(LC)) * _by_state(cs.index(i).load(LB))
                db = gl.sum(g * _by_channel(drives.index(i).load(LC)), 1)
                fewb = _put(fewb, db, k, UNROLL, _slice(2, LF))
                dx = gl.sum(g * _by_state(bs.index(i).load(LB)), 2)
                fewx = _put(fewx, dx, k, UNROLL, _slice(3, LF))
                carry = a * g
                old = gl.permute(befores.index(i).load(_slice(0, LQ)), [0, 2, 1, 3])
                g = carry * gl.convert_layout(gl.reshape(old, [W, X, NP]), L).to(gl.float32)
                dr += g * s
                ds = gl.sum(g * r, 2)
                few = _put(few, ds, k, UNROLL, _slice(3, LF))
            ddrives.index(j).store(fewx)
            dsteps.index(j).store(few)
            dbs.index(j).store(fewb)
        _store_parts(dB, dbs, now, t1, N, NP, BT, W)
        ddrive = ddrives._reinterpret(gl.float32, [BT, W, X], _plain(3)).load(LT)
        dstep = dsteps._reinterpret(gl.float32, [BT, W, X], _plain(3)).load(LT)
        dout = dys._reinterpret(gl.float32, [BT, W, X], _plain(3)).load(LT)
        x = _load(u, su, now, t1, e0, E, BT, W, X).to(gl.float32)
        tile = _load(dt, sdt, now, t1, e0, E, BT, W, X)
        step, raw = _steps(tile, bias, now, t1, e0, E, BT, W, X, HAS_BIAS, SOFTPLUS)
        dstep = dstep * LN2 + ddrive * x
        if SOFTPLUS:
            dstep *= _sigmoid(raw)
        if HAS_BIAS:
            sum_b += gl.sum(gl.where(_tokens(now, BT, LT) < t1, dstep, 0.0), 0)
        _store(ddt, dstep, now, t1, e0, E, BT, W, X)
        ddrive *= step
        if HAS_D:
            ddrive += _load_channels(D, e0, E, W, X) * dout
            sum_d += gl.sum(dout * x, 0)
        _store(du, ddrive, now, t1, e0, E, BT, W, X)
    first_one = t0 == gl.load(begin + row)
    gl.store(before + row * E * N + o, carry, mask=there & first_one)
    gl.store(dA + states + o, dr, mask=there)
    w = gl.arange(0, W, layout=_slice(1, LS))[:, None]
    e = e0 + w * X + gl.arange(0, X, layout=_slice(0, LS))[None, :]
    if HAS_D:
        gl.store(dD + piece * E + e, sum_d, mask=e < E)
    if HAS_BIAS:
        gl.store(dbias + piece * E + e, sum_b, mask=e < E)


@entry
@triton.jit
def combine(
    rate, total, parts, first, first_part, ends, enter, size, N: tl.constexpr,
    PARTS: tl.constexpr, ENDS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before each piece (after it, if REVERSE) from those of its PARTS, one by one.

    parts [m PARTS or less, size = E N]; total [.., E]: sums of steps; enter [m, size]; ends [rows,
    size] (if ENDS): the state that enters a sequence; first, first_part [rows + 1]: its first
    piece, its first part.
    """
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = o < size
    r = tl.load(rate + o, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
    begin, count = tl.load(first + row), tl.load(first + row + 1) - tl.load(first + row)
    begin_part, end_part = tl.load(first_part + row), tl.load(first_part + row + 1)
    h = tl.zeros([BLOCK], tl.float32)
    if ENDS:
        h = tl.load(ends + row * size + o, mask=there, other=0.0).to(tl.float32)
    for i in range(0, count):
        p = i
        if REVERSE:
            p = count - 1 - i
        tl.store(enter + (begin + p) * size + o, h, mask=there)
        steps = ()
        news = ()
        for j in tl.static_range(PARTS):
            part = begin_part + p * PARTS + (PARTS - 1 - j if REVERSE else j)
            ok = there & (part < end_part)
            steps = steps + (tl.load(total + part * (size // N) + o // N, mask=ok, other=0.0),)
            news = news + (tl.load(parts + part * size + o, mask=ok, other=0.0),)
        for j in tl.static_range(PARTS):
            h = tl.exp2(r * steps[j]) * h + news[j]
