"""Write strengths and forget gates of a delta rule, one kernel each way instead of twenty."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longscan.ops._conv_fused import DTYPES, between, flat
from longscan.ops._memory_net import first_order_only

TILE = 1024
"""Numbers that a program has at a time."""
PROGRAMS = 132 * 2
"""Of the backward: each adds up its part of the gradients of A_log and dt_bias."""
MOST_HEADS = 512


def gates_fits(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> bool:
    """Whether the kernels compute this case."""
    return (
        b.dtype in DTYPES
        and a.dtype in DTYPES
        and a_log.dtype == dt_bias.dtype == torch.float32
        and a_log.shape == dt_bias.shape == a.shape[-1:]
        and a.numel() > 0
        and 0 < b.shape[-1] <= MOST_HEADS
        and a.shape[-1] <= MOST_HEADS
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.gates")


@cache
def _constants(b_heads: int, heads: int) -> dict[str, int]:
    block = 1 << (max(b_heads, heads) - 1).bit_length()
    return {"HB": b_heads, "H": heads, "BLOCK_H": block, "BLOCK_R": TILE // block, "num_warps": 4}


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        b, a = flat(b), flat(a)
        constants = _constants(b.shape[-1], a.shape[-1])
        rows = a.shape[0] * a.shape[1]
        beta = b.new_empty(b.shape, dtype=torch.float32)
        log_a = a.new_empty(a.shape, dtype=torch.float32)
        with torch.cuda.device_of(b):
            _kernels().forward[(-(-rows // constants["BLOCK_R"]),)](
                b, a, a_log, dt_bias, beta, log_a, rows, between(b), between(a), scale,
                **constants,
            )  # fmt: skip
        ctx.save_for_backward(b, a, a_log, dt_bias)
        ctx.scale = scale
        return beta, log_a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first_order_only()
        b, a, a_log, dt_bias = ctx.saved_tensors
        dbeta, dlog = (g.contiguous() for g in grads)
        constants = _constants(b.shape[-1], a.shape[-1])
        rows = a.shape[0] * a.shape[1]
        programs = min(PROGRAMS, -(-rows // constants["BLOCK_R"]))
        db, da = b.new_empty(b.shape), a.new_empty(a.shape)
        partial = a_log.new_empty(programs, 2, a.shape[-1])
        with torch.cuda.device_of(b):
            _kernels().backward[(programs,)](
                b, a, a_log, dt_bias, dbeta, dlog, db, da, partial, rows, between(b), between(a),
                ctx.scale, **constants,
            )  # fmt: skip
        d_log, d_bias = partial.sum(0).unbind(0)
        return db, da, d_log, d_bias, None


def gates_fused(
    b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """beta = scale sigmoid(b) and log_a = -exp(A_log) softplus(a + dt_bias), where `gates_fits`.

    Shapes: b [B, T, steps H], a [B, T, H]; a_log, dt_bias [H]. Precision: float32 for any b and a.
    Raises: RuntimeError in a backward that is to be differentiated itself.
    """
    return _Gates.apply(b, a, a_log, dt_bias, scale)
