"""Causal depthwise convolution: a program walks along a piece of a sequence with its window.

A thread keeps the last W inputs of a few channels in registers, so that every token is read once;
UNROLL tokens are asked for together, before the first of them is used. Row i of a piece is token
first + i; offsets inside a piece fit 32 bits, those of the piece itself need 64.

Channels come in up to three parts of n0, n1 and the other ones of D, each of them a tensor of its
own behind the convolution (q, k and v, say); a program has channels of one part.

With UNIT the first two parts consist of heads of UNIT channels, which divides BLOCK, and heads
are scaled to length UNIT^-0.5 (the first part, queries) and 1 (the second, keys):

    y = r h,   r = length / sqrt(sum(h^2) + EPS);      dh = r (dy - h (h . dy) / (sum(h^2) + EPS))
"""

# ruff: noqa: RUF005, SIM102  (Triton does not know (*a, b); a constant decides by itself)
from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels._sigmoid import _sigmoid

EPS = tl.constexpr(1e-6)  # of ops.norm.l2_norm


@triton.jit
def _place(table, starts, blocks):
    """Of this program: piece, sequence, first token and end of the piece, start and end of the
    sequence."""
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.load(table + piece * 3)
    first = tl.load(table + piece * 3 + 1)
    last = tl.load(table + piece * 3 + 2)
    return piece, row, first, last, tl.load(starts + row), tl.load(starts + row + 1)


@triton.jit
def _channels(y0, y1, y2, n0, n1, D, blocks, BLOCK: tl.constexpr):
    """Of this program: the tensor of its part, the part's width, channels within the part, among
    all, and which exist. Neighbours have neighbouring channels: they share the rows of memory."""
    block = tl.program_id(0) % blocks
    b0, b1 = tl.cdiv(n0, BLOCK), tl.cdiv(n1, BLOCK)
    second, third = block >= b0, block >= b0 + b1
    block -= tl.where(third, b0 + b1, tl.where(second, b0, 0))
    width = tl.where(third, D - n0 - n1, tl.where(second, n1, n0))
    y = tl.where(third, y2, tl.where(second, y1, y0))
    inner = block * BLOCK + tl.arange(0, BLOCK)
    cols = tl.where(third, n0 + n1, tl.where(second, n0, 0)) + inner
    return y, width, inner, cols, inner < width


@triton.jit
def _taps(weight, cols, ok, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + cols * W + w, mask=ok, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _before(x, state, has_state, first, begin, stride, D, ok, W: tl.constexpr):
    """The W - 1 inputs before a piece: of the sequence, or of the state it began with.

    x points to the piece's first token, state to the sequence's window.
    """
    window = ()
    for i in tl.static_range(W - 1):
        inside = first - (W - 1 - i) >= begin
        slot = (first - begin + i).to(tl.int32)  # used only if outside, and then below W - 1
        new = tl.load(x - (W - 1 - i) * stride, mask=ok & inside, other=0.0).to(tl.float32)
        outside = ok & (has_state != 0) & (first - (W - 1 - i) < begin)
        new += tl.load(state + slot * D, mask=outside, other=0.0).to(tl.float32)
        window = window + (new,)
    return window


@triton.jit
def _rows(x, at, count, stride, ok, UNROLL: tl.constexpr):
    """UNROLL rows from row `at` on; zeros from row `count` on. All are asked for before the first
    is needed, which the compiler does not do by itself."""
    rows = ()
    for u in tl.static_range(UNROLL):
        here = ok & (at + u < count)
        rows = rows + (tl.load(x + (at + u) * stride, mask=here, other=0.0),)
    return rows


@triton.jit
def _convolved(window, taps, bias, W: tl.constexpr):
    z = bias
    for w in tl.static_range(W):
        z += window[w] * taps[w]
    return z


@triton.jit
def _length(n0, n1, blocks, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """The length of this program's heads; 0 in the third part, whose heads stay as they are."""
    block = tl.program_id(0) % blocks
    b0, b1 = tl.cdiv(n0, BLOCK), tl.cdiv(n1, BLOCK)
    return tl.where(block < b0, UNIT**-0.5, tl.where(block < b0 + b1, 1.0, 0.0))


@triton.jit
def _of_heads(z, UNIT: tl.constexpr):
    """The sum over a head, at each of its channels."""
    heads: tl.constexpr = z.shape[0] // UNIT
    sums = tl.sum(tl.reshape(z, [heads, UNIT]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [heads, UNIT]), z.shape)


@entry
@triton.jit(do_not_specialize=["has_state"])
def forward(
    x, weight, bias, state, y0, y1, y2, end, table, starts, has_state, stride, n0, n1, D, blocks,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y and the windows after the last tokens. Tokens of x are `stride` numbers apart."""
    _, row, first, last, begin, stop = _place(table, starts, blocks)
    y, width, inner, cols, ok = _channels(y0, y1, y2, n0, n1, D, blocks, BLOCK)
    taps = _taps(weight, cols, ok, W)
    b = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        b = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    xs = x + first * stride + cols
    ys = y + first * width + inner
    states = state + row * (W - 1) * D + cols
    window = _before(xs, states, has_state, first, begin, stride, D, ok, W)
    count = (last - first).to(tl.int32)
    length = _length(n0, n1, blocks, BLOCK, UNIT) if UNIT else 0.0
    for i in range(0, count, UNROLL):
        new = _rows(xs, i, count, stride, ok, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = window + (new[u].to(tl.float32),)
            z = _convolved(seen, taps, b, W)
            if SILU:
                z = z * _sigmoid(z)
            if UNIT:
                if length > 0:
                    z = z * (length * tl.rsqrt(_of_heads(z * z, UNIT) + EPS))
            tl.store(ys + (i + u) * width, z.to(y0.dtype.element_ty), mask=ok & (i + u < count))
            window = seen[1:]
    if last == stop:
        after = end + row * (W - 1) * D + cols
        tail = _before(x + stop * stride + cols, states, has_state, stop, begin, stride, D, ok, W)
        for j in tl.static_range(W - 1):
            tl.store(after + j * D, tail[j].to(end.dtype.element_ty), mask=ok)


@entry
@triton.jit(do_not_specialize=["has_state"])
def backward(
    x, weight, bias, state, dy0, dy1, dy2, dend, dx, dstate, partial, table, starts,
    has_state, stride, dx_stride, n0, n1, D, blocks,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr,
    END: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of x and state; partial [pieces, W + BIAS, D]: each piece's part of those of
    weight and bias.

    At row i the gradient of row i - (W - 1) is complete. The W - 1 rows behind a piece belong to
    the next one, and are gone through for that reason only. The rows before a sequence are those
    of the state it began with, by the same formula.
    """
    piece, row, first, last, begin, stop = _place(table, starts, blocks)
    dy, width, inner, cols, ok = _channels(dy0, dy1, dy2, n0, n1, D, blocks, BLOCK)
    taps = _taps(weight, cols, ok, W)
    b = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        b = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    xs = x + first * stride + cols
    gs = dy + first * width + inner
    outs = dx + first * dx_stride + cols
    states = state + row * (W - 1) * D + cols
    dstates = dstate + row * (W - 1) * D + cols
    dends = dend + row * (W - 1) * D + cols
    window = _before(xs, states, has_state, first, begin, stride, D, ok, W)
    count = (last - first).to(tl.int32)
    length = _length(n0, n1, blocks, BLOCK, UNIT) if UNIT else 0.0
    total = count + W - 1
    there = tl.minimum(stop - first, total).to(tl.int32)
    ahead = tl.minimum(stop - first, 2 * total).to(tl.int32)  # only if the end is near
    head = ok & (first == begin) & (has_state != 0)
    past = ()
    sums = ()
    for _ in tl.static_range(W - 1):
        past = past + (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    total_bias = tl.zeros([BLOCK], tl.float32)
    for i in range(0, total, UNROLL):
        new = _rows(xs, i, there, stride, ok, UNROLL)
        grads = _rows(gs, i, there, width, ok, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = window + (new[u].to(tl.float32),)
            g = grads[u].to(tl.float32)
            if SILU or UNIT:
                h = _convolved(seen, taps, b, W)
            if SILU:
                s = _sigmoid(h)
                slope = s + h * s * (1 - s)
                h = h * s
            if UNIT:
                if length > 0:
                    r = tl.rsqrt(_of_heads(h * h, UNIT) + EPS)
                    g = length * r * (g - h * (r * r * _of_heads(h * g, UNIT)))
            if SILU:
                g = g * slope
            own = tl.where(i + u < count, g, 0.0)
            more = ()
            for w in tl.static_range(W):
                more = more + (sums[w] + own * seen[w],)
            sums = more
            if BIAS:
                total_bias += own
            all_g = past + (g,)
            out = g * taps[0]
            for w in tl.static_range(1, W):
                out += all_g[W - 1 - w] * taps[w]
            target = i + u - (W - 1)
            if END:
                slot = target - ahead + (W - 1)
                late = ok & (slot >= 0) & (target < count)
                out += tl.load(dends + slot * D, mask=late, other=0.0).to(tl.float32)
            mine = ok & (target >= 0) & (target < count)
            tl.store(outs + target * dx_stride, out.to(dx.dtype.element_ty), mask=mine)
            tl.store(
                dstates + (i + u) * D, out.to(dstate.dtype.element_ty), mask=head & (target < 0)
            )
            window = seen[1:]
            past = all_g[1:]
    parts = partial + piece * (W + BIAS) * D + cols
    for w in tl.static_range(W):
        tl.store(parts + w * D, sums[w], mask=ok)
    if BIAS:
        tl.store(parts + W * D, total_bias, mask=ok)
