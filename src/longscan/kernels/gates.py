"""Write strengths and forget gates of a delta rule, all heads of some tokens at a time.

beta = scale sigmoid(b)            [rows, HB]
log_a = -exp(A_log) softplus(a + bias)      [rows, H]

STEP: the steps of Mamba-2 are the strengths, beta = softplus(a + bias), and there is no b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry
from longscan.kernels.step import _softplus


@entry
@triton.jit(do_not_specialize=["rows"])
def forward(
    b, a, a_log, bias, beta, log_a, rows, b_row, a_row, scale, STEP: tl.constexpr,
    HB: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of b and a are b_row and a_row numbers apart, those of beta and log_a side by side."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    head = tl.arange(0, BLOCK_H)
    cols = head[None, :]
    if not STEP:
        mine = (row < rows) & (cols < HB)
        x = tl.load(b + row * b_row + cols, mask=mine, other=0.0).to(tl.float32)
        tl.store(beta + row * HB + cols, scale * tl.sigmoid(x), mask=mine)
    mine = (row < rows) & (cols < H)
    rate = tl.exp(tl.load(a_log + head, mask=head < H, other=0.0))[None, :]
    z = tl.load(a + row * a_row + cols, mask=mine, other=0.0).to(tl.float32)
    z += tl.load(bias + head, mask=head < H, other=0.0)[None, :]
    dt = _softplus(z)
    if STEP:
        tl.store(beta + row * H + cols, dt, mask=mine)
    tl.store(log_a + row * H + cols, -rate * dt, mask=mine)


@entry
@triton.jit(do_not_specialize=["rows"])
def backward(
    b, a, a_log, bias, dbeta, dlog, db, da, partial, rows, b_row, a_row, db_row, da_row, scale,
    STEP: tl.constexpr,
    HB: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of b and a, whose rows are db_row and da_row numbers apart; partial
    [programs, 2, H]: each program's part of those of A_log and bias."""
    head = tl.arange(0, BLOCK_H)
    cols = head[None, :]
    rate = tl.exp(tl.load(a_log + head, mask=head < H, other=0.0))[None, :]
    shift = tl.load(bias + head, mask=head < H, other=0.0)[None, :]
    d_rate = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    d_shift = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        if not STEP:
            mine = (row < rows) & (cols < HB)
            x = tl.load(b + row * b_row + cols, mask=mine, other=0.0).to(tl.float32)
            g = tl.load(dbeta + row * HB + cols, mask=mine, other=0.0).to(tl.float32)
            s = tl.sigmoid(x)
            g = scale * g * s * (1 - s)
            tl.store(db + row * db_row + cols, g.to(db.dtype.element_ty), mask=mine)
        mine = (row < rows) & (cols < H)
        z = tl.load(a + row * a_row + cols, mask=mine, other=0.0).to(tl.float32) + shift
        g = -rate * tl.load(dlog + row * H + cols, mask=mine, other=0.0).to(tl.float32)
        d_rate += g * _softplus(z)
        if STEP:
            g += tl.load(dbeta + row * H + cols, mask=mine, other=0.0).to(tl.float32)
        g = g * tl.sigmoid(z)
        d_shift += g
        tl.store(da + row * da_row + cols, g.to(da.dtype.element_ty), mask=mine)
    parts = partial + tl.program_id(0) * 2 * H + head
    tl.store(parts, tl.sum(d_rate, 0), mask=head < H)
    tl.store(parts + H, tl.sum(d_shift, 0), mask=head < H)
