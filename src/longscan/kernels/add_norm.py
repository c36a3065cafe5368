"""A branch added to the residual stream, and the root-mean-square norm of the sum, in one pass each
way: total = x + branch, y = total * rstd * weight, rstd = 1 / sqrt(mean(total^2) + eps)."""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


@triton.jit
def _tile(tile, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of a tile of rows that lie side by side: rows, places (64 bits), and which exist of each."""
    row = (tile * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    ok = row < rows
    return row, row.to(tl.int64) * D + cols, ok, ok & (cols < D)


@entry
@triton.jit(do_not_specialize=["rows"])
def forward(
    x, branch, weight, y, total, rstds, rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total = x + branch; y, the norm of it times weight; rstd. All [rows, D] side by side."""
    row, at, ok, mask = _tile(tl.program_id(0), rows, D, BLOCK_D, BLOCK_R)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    v = v.to(total.dtype.element_ty)
    tl.store(total + at, v, mask=mask)
    v = v.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y + at, (v * rstd * w).to(y.dtype.element_ty), mask=mask)
    tl.store(rstds + row, rstd, mask=ok)


@entry
@triton.jit(do_not_specialize=["rows"])
def backward(
    total, weight, rstds, dy, dtotal, dx, dbranch, partial, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    LATER: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """dx, the gradient of the sum: through the norm and, LATER, dtotal; TWO: also as dbranch, in
    another dtype. partial [programs, D]: what the rows of each program give to the
    gradient of weight."""
    cols = tl.arange(0, BLOCK_D)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row, at, ok, mask = _tile(tile, rows, D, BLOCK_D, BLOCK_R)
        v = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=ok, other=0.0)
        n = v * rstd
        sums += g * n
        g = g * w
        dv = rstd * (g - n * (tl.sum(g * n, 1)[:, None] / D))
        if LATER:
            dv += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, dv.to(dx.dtype.element_ty), mask=mask)
        if TWO:
            tl.store(dbranch + at, dv.to(dbranch.dtype.element_ty), mask=mask)
    place = tl.program_id(0).to(tl.int64) * D
    tl.store(partial + place + cols, tl.sum(sums, 0), mask=cols < D)
