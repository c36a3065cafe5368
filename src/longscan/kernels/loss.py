"""Cross entropy of a block of logits, and its gradient by them: a program has one token.

A row is read twice, the second time from the second-level cache. Logarithms and exponentials are
those of base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longscan.kernels._launch import entry

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e30)


@triton.jit
def _tanh(x):
    s = x * x
    near = x * (1 - s * (1 / 3) * (1 - s * 0.4 * (1 - s * (17 / 42))))
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - t) / (1 + t)
    return tl.where(s < 0.01, near, tl.where(x < 0, -t, t))


@triton.jit
def _minus_one(x):
    """exp(x) - 1 for x <= 0, which keeps its digits near 0."""
    near = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * 0.25 * (1 + x * 0.2 * (1 + x / 6)))))
    return tl.where(x > -0.3, near, tl.exp2(x * LOG2E) - 1)


@triton.jit
def _bent(z, cap, CAP: tl.constexpr):
    """The logits that count, to base 2, and their slope."""
    slope = 1.0
    if CAP:
        t = _tanh(z / cap)
        slope = 1 - t * t
        z = t * cap
    return z * LOG2E, slope


@entry
@triton.jit
def cross_entropy(
    logits, targets, coef, losses, grad, V, n_classes, cap,
    CAP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [rows] and, with GRAD, softmax - one hot (times the slope of the cap) [rows, V].

    Tokens with coef 0 are not looked at: both are 0 there. grad may be logits itself.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if tl.load(coef + row) == 0:
        tl.store(losses + row, 0.0)
        if GRAD:
            for j in range(0, V, BLOCK):
                nothing = tl.zeros([BLOCK], grad.dtype.element_ty)
                tl.store(grad + row * V + j + cols, nothing, mask=j + cols < V)
    else:
        target = tl.load(targets + row)
        base = logits + row * V
        # Each lane keeps the largest of its own logits and a sum relative to it.
        top = tl.full([BLOCK], LOW, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for j in range(0, n_classes, BLOCK):
            z = tl.load(base + j + cols, mask=j + cols < n_classes, other=LOW)
            z, _ = _bent(z, cap, CAP)
            if CAP:
                z = tl.where(j + cols < n_classes, z, LOW)
            larger = tl.maximum(top, z)
            total = total * tl.exp2(top - larger) + tl.exp2(z - larger)
            top = larger
        highest = tl.max(top, 0)
        log_sum = tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
        picked, _ = _bent(tl.load(base + target), cap, CAP)
        loss = ((highest - picked) + log_sum) * LN2
        tl.store(losses + row, loss)
        if GRAD:
            tl.debug_barrier()  # all have read the target's logit before it may be overwritten
            at_target = _minus_one(-loss)
            for j in range(0, V, BLOCK):
                y = tl.load(base + j + cols, mask=j + cols < n_classes, other=LOW)
                y, slope = _bent(y, cap, CAP)
                p = tl.exp2((y - highest) - log_sum)
                p = tl.where(j + cols < n_classes, p, 0.0)
                p = tl.where(j + cols == target, at_target, p) * slope
                tl.store(grad + row * V + j + cols, p.to(grad.dtype.element_ty), mask=j + cols < V)


@entry
@triton.jit
def scale(x, factor, out, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * factor, in out's dtype: a number for each row of D if ROWS, or one for all."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(factor + row) if ROWS else tl.load(factor)
    v = tl.load(x + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + cols, (v * f).to(out.dtype.element_ty), mask=cols < D)
