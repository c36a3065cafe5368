"""Causal depthwise convolution: a program walks along a piece of a sequence with its window.

A thread keeps the last W inputs of a few channels in registers, so that every token is read once;
UNROLL tokens are asked for together, before the first of them is used. Row i of a piece is token
first + i; offsets inside a piece fit 32 bits, those of the piece itself need 64.
"""

# ruff: noqa: RUF005  (Triton does not know (*a, b))
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(table, starts, blocks, BLOCK: tl.constexpr):
    """Of this program: piece, sequence, first token and end of the piece, start and end of the
    sequence, channels. Neighbours have neighbouring channels: they share the rows of memory."""
    program = tl.program_id(0)
    piece = (program // blocks).to(tl.int64)
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(table + piece * 3)
    first = tl.load(table + piece * 3 + 1)
    last = tl.load(table + piece * 3 + 2)
    return piece, row, first, last, tl.load(starts + row), tl.load(starts + row + 1), cols


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


@triton.jit(do_not_specialize=["has_state"])
def forward(
    x, weight, bias, state, y, end, table, starts, has_state, stride, D, blocks,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y and the windows after the last tokens. Tokens of x are `stride` numbers apart."""
    _, row, first, last, begin, stop, cols = _place(table, starts, blocks, BLOCK)
    ok = cols < D
    taps = _taps(weight, cols, ok, W)
    b = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        b = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    xs = x + first * stride + cols
    ys = y + first * D + cols
    states = state + row * (W - 1) * D + cols
    window = _before(xs, states, has_state, first, begin, stride, D, ok, W)
    count = (last - first).to(tl.int32)
    for i in range(0, count, UNROLL):
        new = _rows(xs, i, count, stride, ok, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = window + (new[u].to(tl.float32),)
            z = _convolved(seen, taps, b, W)
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(ys + (i + u) * D, z.to(y.dtype.element_ty), mask=ok & (i + u < count))
            window = seen[1:]
    if last == stop:
        after = end + row * (W - 1) * D + cols
        tail = _before(x + stop * stride + cols, states, has_state, stop, begin, stride, D, ok, W)
        for j in tl.static_range(W - 1):
            tl.store(after + j * D, tail[j].to(end.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["has_state"])
def backward(
    x, weight, bias, state, dy, dend, dx, dstate, partial, table, starts,
    has_state, stride, D, blocks,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, END: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of x and state; partial [pieces, W + BIAS, D]: each piece's part of those of
    weight and bias.

    At row i the gradient of row i - (W - 1) is complete. The W - 1 rows behind a piece belong to
    the next one, and are gone through for that reason only. The rows before a sequence are those
    of the state it began with, by the same formula.
    """
    piece, row, first, last, begin, stop, cols = _place(table, starts, blocks, BLOCK)
    ok = cols < D
    taps = _taps(weight, cols, ok, W)
    b = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        b = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    xs = x + first * stride + cols
    gs = dy + first * D + cols
    outs = dx + first * D + cols
    states = state + row * (W - 1) * D + cols
    dstates = dstate + row * (W - 1) * D + cols
    dends = dend + row * (W - 1) * D + cols
    window = _before(xs, states, has_state, first, begin, stride, D, ok, W)
    count = (last - first).to(tl.int32)
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
        grads = _rows(gs, i, there, D, ok, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = window + (new[u].to(tl.float32),)
            g = grads[u].to(tl.float32)
            if SILU:
                z = _convolved(seen, taps, b, W)
                s = tl.sigmoid(z)
                g = g * (s + z * s * (1 - s))
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
            tl.store(outs + target * D, out.to(dx.dtype.element_ty), mask=mine)
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
