"""`conv`, with SiLU and heads of unit length behind it where wanted, in one kernel each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op
from longscan.ops._packed import pieces, starts

WIDEST = 8
LARGEST_UNIT = 128  # channels of a warp, in the usual launches: sums over a head stay within it
PARTS = 3


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


def unit_fits(unit: int, sizes: Sequence[int]) -> bool:
    """Whether the kernels scale heads of `unit` channels, in the first two parts of `sizes`."""
    power = 0 < unit <= LARGEST_UNIT and unit & (unit - 1) == 0
    return power and 2 <= len(sizes) <= PARTS and not any(n % unit for n in sizes[:2])


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.conv")


def _launches(x: Tensor, taps: int) -> tuple[Launch, Launch]:
    return LAUNCHES[4 if taps <= 4 else 8, x.element_size()]


def flat(x: Tensor) -> Tensor:
    """x with tokens at equal distances, channels side by side: a slice of a projection is."""
    batch, length, _ = x.shape
    if x.stride(2) == 1 and (batch == 1 or x.stride(0) == length * between(x)):
        return x
    return x.contiguous()


def between(x: Tensor) -> int:
    """The distance of tokens in `flat` x; where a row has only one, its stride says nothing."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _plan(
    x: Tensor, cu_seqlens: Tensor | None, launch: Launch, sizes: list[int]
) -> tuple[Tensor, Tensor, int]:
    """The pieces, where sequences begin, blocks of channels."""
    batch, length, _ = x.shape
    blocks = sum(-(-n // launch.block) for n in sizes)
    size = SHORTEST
    while size < LONGEST and batch * length * blocks > PROGRAMS * size:
        size *= 2
    table, _ = pieces(batch, length, size, cu_seqlens, x.device)
    return table, starts(batch, length, cu_seqlens, x.device), blocks


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    sizes: list[int],
    unit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y in up to three parts of `sizes`, the others empty; the windows after the last tokens."""
    x = flat(x)
    taps = weight.shape[1]
    launch = _launches(x, taps)[0]
    table, begin, blocks = _plan(x, cu_seqlens, launch, sizes)
    weight = weight.contiguous()
    *ys, end = _fake(x, weight, bias, state, cu_seqlens, silu, sizes, unit)
    with device_of(x):
        _kernels().forward[(table.shape[0] * blocks,)](
            x, weight, weight if bias is None else bias.contiguous(),
            end if state is None else state.contiguous(),
            *ys, end, table, begin, int(state is not None), between(x), *_widths(sizes),
            x.shape[2], blocks,
            W=taps, BIAS=bias is not None, SILU=silu, UNIT=unit,
            BLOCK=launch.block, UNROLL=launch.unroll, num_warps=launch.warps,
        )  # fmt: skip
    return ys[0], ys[1], ys[2], end


def _widths(sizes: list[int]) -> tuple[int, int]:
    """Of the first two parts."""
    return sizes[0], sizes[1] if len(sizes) > 1 else 0


def _fake(x, weight, bias, state, cu_seqlens, silu, sizes, unit):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    batch, length, channels = x.shape
    ys = [
        x.new_empty(batch, length, sizes[i]) if i < len(sizes) else x.new_empty(0)
        for i in range(PARTS)
    ]
    return *ys, x.new_empty(rows, weight.shape[1] - 1, channels)


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    unit: int,
    dys: list[Tensor],
    dend: Tensor | None,
    dx: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of weight, bias, state, from those of the parts; that of x is written to dx.

    dx: [B, T, channels] with tokens at equal distances, such as a slice of wider rows.
    """
    x, dys = flat(x), [dy.contiguous() for dy in dys]
    sizes = [dy.shape[2] for dy in dys]
    taps, has_bias = weight.shape[1], bias is not None
    launch = _launches(x, taps)[1]
    table, begin, blocks = _plan(x, cu_seqlens, launch, sizes)
    weight = weight.contiguous()
    dstate = None if state is None else state.new_empty(state.shape)
    partial = x.new_empty(table.shape[0], taps + has_bias, x.shape[2], dtype=torch.float32)
    with device_of(x):
        _kernels().backward[(table.shape[0] * blocks,)](
            x, weight, weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            *dys, *dys[:1] * (PARTS - len(dys)), x if dend is None else dend.contiguous(),
            dx, dx if dstate is None else dstate, partial, table, begin,
            int(state is not None), between(x), between(dx), *_widths(sizes), x.shape[2], blocks,
            W=taps, BIAS=has_bias, SILU=silu, UNIT=unit, END=dend is not None,
            BLOCK=launch.block, UNROLL=launch.unroll, num_warps=launch.warps,
        )  # fmt: skip
    sums = partial.sum(0)
    dw = weight.new_empty(weight.shape).copy_(sums[:taps].mT)
    return dw, None if bias is None else sums[taps].to(bias.dtype, copy=True), dstate


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    unit: int,
    dys: list[Tensor],
    dend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias, state; the last two are empty where there is none."""
    dx = x.new_empty(x.shape)
    dw, db, ds = conv_backward(x, weight, bias, state, cu_seqlens, silu, unit, dys, dend, dx)
    return dx, dw, weight.new_empty(0) if db is None else db, x.new_empty(0) if ds is None else ds


def _fake_backward(x, weight, bias, state, cu_seqlens, silu, unit, dys, dend):
    return (
        x.new_empty(x.shape), weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    )  # fmt: skip


def _keep(ctx, inputs, output) -> None:
    *tensors, silu, sizes, unit = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu, ctx.sizes, ctx.unit = silu, sizes, unit
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dy0, dy1, dy2, dend: Tensor | None):
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dys = filled((dy0, dy1, dy2), x, ctx.sizes)
    dx, dw, db, ds = run(x, weight, bias, state, cu_seqlens, ctx.silu, ctx.unit, dys, dend)
    db, ds = None if bias is None else db, None if state is None else ds
    return dx, dw, db, ds, *(None,) * 4


def filled(dys: Sequence[Tensor | None], x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The gradients of the parts, zeros where there is none."""
    return [
        x.new_zeros(*x.shape[:2], n) if dy is None else dy
        for dy, n in zip(dys, sizes, strict=False)
    ]


_conv = kernel_op(
    "conv_fused", conv_forward, _fake, _keep, _backward, _fake_backward, _differentiate
)


def conv_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    unit: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """`conv_fused` with y in at most three parts of `sizes` channels, contiguous each.

    unit: if `unit_fits`, the first two parts, of heads of that many channels, are scaled as by
    `l2_norm`, heads of the first to length unit^-0.5, those of the second to 1.
    """
    if state is not None and state.dtype != x.dtype:
        state = state.to(x.dtype)
    *ys, end = _conv(x, weight, bias, state, cu_seqlens, silu, sizes, unit)
    return ys[: len(sizes)], end


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
    (y,), end = conv_parts(
        x, weight, bias, [x.shape[2]], state=state, cu_seqlens=cu_seqlens, silu=silu
    )
    return y, end
