"""Root-mean-square norms of rows of D numbers, with a weight and a gate, in one pass each way.

    y = scale * n * weight * act(gate),   n = x * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)

or, with the gate in front (FRONT), the norm of x * act(gate). Rows are read where they lie: row r
is head r % heads of token r // heads, at r // heads * x_token + r % heads * x_head. With PER_HEAD
each head has its own weight, and programs keep to one head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels._sigmoid import _sigmoid


@triton.jit
def _rows(tile, rows, heads, BLOCK_R: tl.constexpr, PER_HEAD: tl.constexpr):
    """Of a tile: tokens, heads, rows among all of them (all [BLOCK_R, 1]) and which exist."""
    at = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = at < rows
    if PER_HEAD:  # rows counts the rows of one head
        head = tl.zeros_like(at) + tl.program_id(1)
        token = at
    else:
        token = at // heads
        head = at - token * heads
    token = token.to(tl.int64)[:, None]
    return token, head[:, None], token * heads + head[:, None], ok[:, None]


@triton.jit
def _act(z, ACT: tl.constexpr):
    """The gate from what it is computed from, and its slope there."""
    if ACT == 0:
        out = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    else:
        s = _sigmoid(z)
        slope = s * (1 - s)
        out = s
        if ACT == 2:
            slope = s + z * slope
            out = z * s
    return out, slope


@entry
@triton.jit(do_not_specialize=["rows", "heads"])
def forward(
    x, gate, weight, y, rstds, rows, heads, x_token, x_head, g_token, g_head, eps, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHT: tl.constexpr, PER_HEAD: tl.constexpr,
    GATE: tl.constexpr, ACT: tl.constexpr, FRONT: tl.constexpr,
):  # fmt: skip
    """y and rstd, both [all rows, ...] side by side."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    token, head, row, ok = _rows(tl.program_id(0), rows, heads, BLOCK_R, PER_HEAD)
    mask = ok & (cols < D)
    v = tl.load(x + token * x_token + head * x_head + cols, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(gate + token * g_token + head * g_head + cols, mask=mask, other=0.0)
        factor, _ = _act(z.to(tl.float32), ACT)
        if FRONT:
            v = v * factor
    rstd = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
    out = v * (rstd * scale)
    if WEIGHT:
        w = weight + cols
        if PER_HEAD:
            w = w + tl.program_id(1) * D
        out = out * tl.load(w, mask=cols < D, other=0.0).to(tl.float32)
    if GATE and not FRONT:
        out = out * factor
    tl.store(y + row * D + cols, out.to(y.dtype.element_ty), mask=mask)
    tl.store(rstds + row, rstd, mask=ok)


@entry
@triton.jit(do_not_specialize=["rows", "heads"])
def backward(
    x, gate, weight, rstds, dy, dx, dgate, partial, rows, heads, x_token, x_head, g_token, g_head,
    dg_token, dg_head, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHT: tl.constexpr, PER_HEAD: tl.constexpr,
    GATE: tl.constexpr, ACT: tl.constexpr, FRONT: tl.constexpr,
):  # fmt: skip
    """dx side by side, dgate by distances as those of the gate; partial [programs, heads with a
    weight of their own, D]: what the rows of each program give to the gradient of weight."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    w = tl.full([1, BLOCK_D], 1.0, tl.float32)
    if WEIGHT:
        pointer = weight + cols
        if PER_HEAD:
            pointer = pointer + tl.program_id(1) * D
        w = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        token, head, row, ok = _rows(tile, rows, heads, BLOCK_R, PER_HEAD)
        mask = ok & inside
        v = tl.load(x + token * x_token + head * x_head + cols, mask=mask, other=0.0)
        g = tl.load(dy + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        v = v.to(tl.float32)
        if GATE:
            z = tl.load(gate + token * g_token + head * g_head + cols, mask=mask, other=0.0)
            factor, slope = _act(z.to(tl.float32), ACT)
        rstd = tl.load(rstds + row, mask=ok, other=0.0)
        if GATE and FRONT:
            n = v * factor * rstd
        else:
            n = v * rstd
        g = g * scale
        if GATE and not FRONT:
            dgate_out = g * n * w * slope
            g = g * factor
        if WEIGHT:
            sums += g * n
        g = g * w
        along = tl.sum(g * n, 1)[:, None] / D
        dv = rstd * (g - n * along)
        if GATE and FRONT:
            dgate_out = dv * v * slope
            dv = dv * factor
        tl.store(dx + row * D + cols, dv.to(dx.dtype.element_ty), mask=mask)
        if GATE:
            dgates = dgate + token * dg_token + head * dg_head + cols
            tl.store(dgates, dgate_out.to(dgate.dtype.element_ty), mask=mask)
    if WEIGHT:
        place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(
            partial + place * D + tl.arange(0, BLOCK_D),
            tl.sum(sums, 0),
            mask=tl.arange(0, BLOCK_D) < D,
        )
