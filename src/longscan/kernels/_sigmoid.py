"""The logistic function, where instructions decide how fast a kernel is."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) in float32, to its last three bits: a root and its square take a third of
    the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2E))
    return root * root
