"""`conv`, with SiLU behind it where wanted, in one kernel each way."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import kernel_op
from longscan.ops._packed import pieces, starts

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 8


class Launch(NamedTuple):
    """Channels of a program, warps, tokens that are asked for together."""

    block: int
    warps: int
    unroll: int


# (taps up to, bytes of a number) -> launches of forward and backward.
LAUNCHES = {
    (4, 2): (Launch(256, 2, 8), Launch(256, 2, 4)),
    (4, 4): (Launch(256, 2, 4), Launch(256, 2, 4)),
    (8, 2): (Launch(256, 2, 8), Launch(128, 2, 4)),
    (8, 4): (Launch(256, 2, 4), Launch(128, 2, 4)),
}
# Programs that keep all multiprocessors busy, for two rounds. Fewer and longer pieces write fewer
# partial sums and read fewer tokens twice; from 256 tokens on the last round is seldom full.
PROGRAMS = 3072
SHORTEST, LONGEST = 16, 128


def conv_fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel computes this case."""
    return (
        x.dtype in DTYPES
        and weight.dtype in DTYPES
        and (bias is None or bias.dtype in DTYPES)
        and x.numel() > 0
        and 2 <= weight.shape[1] <= WIDEST
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.conv")


def _launches(x: Tensor, taps: int) -> tuple[Launch, Launch]:
    return LAUNCHES[4 if taps <= 4 else 8, x.element_size()]


def _flat(x: Tensor) -> Tensor:
    """x with tokens at equal distances, channels side by side: a slice of a projection is."""
    if x.is_contiguous():
        return x
    batch, length, _ = x.shape
    if x.stride(2) == 1 and (batch == 1 or x.stride(0) == length * x.stride(1)):
        return x
    return x.contiguous()


def _plan(x: Tensor, cu_seqlens: Tensor | None, launch: Launch) -> tuple[Tensor, Tensor, int]:
    """The pieces, where sequences begin, blocks of channels."""
    batch, length, channels = x.shape
    blocks = -(-channels // launch.block)
    size = SHORTEST
    while size < LONGEST and batch * length * blocks > PROGRAMS * size:
        size *= 2
    table, _ = pieces(batch, length, size, cu_seqlens, x.device)
    return table, starts(batch, length, cu_seqlens, x.device), blocks


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """-> y, the windows after the last tokens."""
    x = _flat(x)
    taps = weight.shape[1]
    launch = _launches(x, taps)[0]
    table, begin, blocks = _plan(x, cu_seqlens, launch)
    weight = weight.contiguous()
    y, end = _fake(x, weight, bias, state, cu_seqlens, silu)
    with torch.cuda.device_of(x):
        _kernels().forward[(table.shape[0] * blocks,)](
            x, weight, weight if bias is None else bias.contiguous(),
            end if state is None else state.contiguous(),
            y, end, table, begin, int(state is not None), x.stride(1), x.shape[2], blocks,
            W=taps, BIAS=bias is not None, SILU=silu,
            BLOCK=launch.block, UNROLL=launch.unroll, num_warps=launch.warps,
        )  # fmt: skip
    return y, end


def _fake(x, weight, bias, state, cu_seqlens, silu):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dy: Tensor,
    dend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias, state; the last two are empty where there is none."""
    x, dy = _flat(x), dy.contiguous()
    taps, has_bias = weight.shape[1], bias is not None
    launch = _launches(x, taps)[1]
    table, begin, blocks = _plan(x, cu_seqlens, launch)
    weight = weight.contiguous()
    dx, dw, dbias, dstate = _fake_backward(x, weight, bias, state, cu_seqlens, silu, dy, dend)
    partial = x.new_empty(table.shape[0], taps + has_bias, x.shape[2], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _kernels().backward[(table.shape[0] * blocks,)](
            x, weight, weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            dy, dy if dend is None else dend.contiguous(),
            dx, dx if state is None else dstate, partial, table, begin,
            int(state is not None), x.stride(1), x.shape[2], blocks,
            W=taps, BIAS=has_bias, SILU=silu, END=dend is not None,
            BLOCK=launch.block, UNROLL=launch.unroll, num_warps=launch.warps,
        )  # fmt: skip
    sums = partial.sum(0)
    dw.copy_(sums[:taps].mT)
    if has_bias:
        dbias.copy_(sums[taps])
    return dx, dw, dbias, dstate


def _fake_backward(x, weight, bias, state, cu_seqlens, silu, dy, dend):
    return (
        x.new_empty(x.shape), weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    )  # fmt: skip


def _keep(ctx, inputs, output) -> None:
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dy: Tensor | None, dend: Tensor | None):
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dw, db, ds = run(x, weight, bias, state, cu_seqlens, ctx.silu, dy, dend)
    return dx, dw, None if bias is None else db, None if state is None else ds, None, None


_conv = kernel_op("conv_fused", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def conv_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`conv_chunked`, or with `silu` the SiLU of it, where `conv_fits`."""
    if state is not None and state.dtype != x.dtype:
        state = state.to(x.dtype)
    return _conv(x, weight, bias, state, cu_seqlens, silu)
