"""Write strengths or steps, and forget gates, one kernel each way instead of twenty."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longscan.ops._conv_fused import between, flat
from longscan.ops._kernel_op import DTYPES, device_of
from longscan.ops._memory_net import first_order_only
from longscan.ops._place import place_of

TILE = 1024
"""Numbers that a program has at a time."""
PROGRAMS = 132 * 2
"""Of the backward: each adds up its part of the gradients of A_log and dt_bias."""
MOST_HEADS = 512


def gates_fits(b: Tensor | None, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> bool:
    """Whether the kernels compute this case."""
    return (
        (b is None or (b.dtype in DTYPES and 0 < b.shape[-1] <= MOST_HEADS))
        and a.dtype in DTYPES
        and a_log.dtype == dt_bias.dtype == torch.float32
        and a_log.shape == dt_bias.shape == a.shape[-1:]
        and a.numel() > 0
        and a.shape[-1] <= MOST_HEADS
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.gates")


@cache
def _constants(b_heads: int, heads: int) -> dict[str, int]:
    """b_heads: 0 for steps."""
    block = 1 << (max(b_heads, heads) - 1).bit_length()
    return {
        "STEP": b_heads == 0, "HB": b_heads, "H": heads, "BLOCK_H": block,
        "BLOCK_R": TILE // block, "num_warps": 4,
    }  # fmt: skip


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, b: Tensor | None, a: Tensor, a_log: Tensor, dt_bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.places = None if b is None else place_of(b), place_of(a)
        a = flat(a)
        b = None if b is None else flat(b)
        own = a if b is None else b
        constants = _constants(0 if b is None else b.shape[-1], a.shape[-1])
        rows = a.shape[0] * a.shape[1]
        beta = own.new_empty(own.shape, dtype=torch.float32)
        log_a = a.new_empty(a.shape, dtype=torch.float32)
        with device_of(a):
            _kernels().forward[(-(-rows // constants["BLOCK_R"]),)](
                own, a, a_log, dt_bias, beta, log_a, rows, between(own), between(a), scale,
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
        constants = _constants(0 if b is None else b.shape[-1], a.shape[-1])
        rows = a.shape[0] * a.shape[1]
        programs = min(PROGRAMS, -(-rows // constants["BLOCK_R"]))
        da = _room(a, ctx.places[1])
        db = None if b is None else _room(b, ctx.places[0])
        own, d_own = (a, da) if b is None or db is None else (b, db)
        partial = a_log.new_empty(programs, 2, a.shape[-1])
        with device_of(a):
            _kernels().backward[(programs,)](
                own, a, a_log, dt_bias, dbeta, dlog, d_own, da, partial, rows, between(own),
                between(a), between(d_own), between(da), ctx.scale, **constants,
            )  # fmt: skip
        d_log, d_bias = partial.sum(0).unbind(0)
        return db, da, d_log, d_bias, None


def _room(x: Tensor, place: Callable[[Tensor], Tensor | None] | None) -> Tensor:
    """For the gradient of x, whose tokens lie at equal distances."""
    out = None if place is None else place(x)
    return x.new_empty(x.shape) if out is None else out


def gates_fused(
    b: Tensor | None, a: Tensor, a_log: Tensor, dt_bias: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """beta = scale sigmoid(b) and log_a = -exp(A_log) softplus(a + dt_bias), where `gates_fits`;
    without b the steps dt = softplus(a + dt_bias) in beta's place, and log_a = -exp(A_log) dt.

    Shapes: b [B, T, steps H], a [B, T, H]; a_log, dt_bias [H]. Precision: float32 for any b and a.
    Raises: RuntimeError in a backward that is to be differentiated itself.
    """
    return _Gates.apply(b, a, a_log, dt_bias, scale)
