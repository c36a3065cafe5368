"""Gated linear units, act(gate) * up of rows [gate | up] of 2 F numbers, one kernel each way."""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry


@triton.jit
def _act(z, GELU: tl.constexpr):
    """The gate, SiLU or the exact GELU of z, and its slope there."""
    if GELU:
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)  # of a normal distribution
        out = z * below
        slope = below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        s = tl.sigmoid(z)
        out = z * s
        slope = s + out * (1 - s)
    return out, slope


@triton.jit
def _place(rows, F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of a program: rows (64 bits), columns, and which of both exist."""
    BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    row = (program // BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    col = (program % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    return row.to(tl.int64), col, (row < rows) & (col < F)


@entry
@triton.jit(do_not_specialize=["rows"])
def forward(
    x, y, rows,
    F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """x [rows, 2 F] -> y [rows, F]."""
    row, col, mask = _place(rows, F, BLOCK_F, BLOCK_R)
    at = x + row * (2 * F) + col
    z = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    out, _ = _act(z, GELU)
    tl.store(y + row * F + col, (out * up).to(y.dtype.element_ty), mask=mask)


@entry
@triton.jit(do_not_specialize=["rows"])
def backward(
    x, dy, dx, rows,
    F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """x [rows, 2 F], dy [rows, F] -> dx [rows, 2 F]."""
    row, col, mask = _place(rows, F, BLOCK_F, BLOCK_R)
    place = row * (2 * F) + col
    z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + place + F, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + row * F + col, mask=mask, other=0.0).to(tl.float32)
    out, slope = _act(z, GELU)
    tl.store(dx + place, (g * up * slope).to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + place + F, (g * out).to(dx.dtype.element_ty), mask=mask)
