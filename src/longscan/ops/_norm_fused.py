"""The norms of `ops.norm`, with a gate and its nonlinearity where wanted, one kernel each way."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op
from longscan.ops._place import place_of

ACTIVATIONS = {None: 0, "sigmoid": 1, "silu": 2}
WIDEST = 8192


class Launch(NamedTuple):
    """Numbers of a tile, at least one row of them; numbers that a warp has of it."""

    tile: int
    per_warp: int


# Launches of forward and of backward; a row longer than `tile` is a tile of its own.
LAUNCHES = (Launch(2048, 512), Launch(2048, 512))
# Of the backward with a gate, for rows up to a tile: it has three numbers to read for one.
GATED = Launch(1024, 256)
# Programs of the backward: each adds up its part of the gradient of weight.
PROGRAMS = 132 * 8
GATED_PROGRAMS = 132 * 6  # where they take more than 64 registers: all run at once


def norm_fits(x: Tensor, weight: Tensor | None = None, gate: Tensor | None = None) -> bool:
    """Whether the kernels compute this case; the last axis is that of the norm."""
    return (
        x.dtype in DTYPES
        and (weight is None or weight.dtype in DTYPES)
        and (gate is None or (gate.dtype in DTYPES and gate.shape == x.shape))
        and 0 < x.shape[-1] <= WIDEST
        and 0 < x.numel() // x.shape[-1] < 2**31 - 2**20
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.norm")


def _lying(x: Tensor, heads: int) -> tuple[Tensor, int, int]:
    """x with rows at regular places: itself if it can be; distances of tokens and of heads."""
    d = x.shape[-1]
    if x.is_contiguous():
        return x, heads * d, d
    try:
        x = x.view(-1, heads, d)
    except RuntimeError:
        x = x.contiguous().view(-1, heads, d)
    if x.stride(2) != 1 and d > 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def _heads(x: Tensor, gate: Tensor | None, per_head: bool) -> int:
    """Rows of a token: 1 where all rows are alike and side by side."""
    alike = x.is_contiguous() and (gate is None or gate.is_contiguous())
    return 1 if x.ndim < 2 or (alike and not per_head) else x.shape[-2]


@lru_cache(maxsize=256)
def _constants(d: int, weight: bool, gate: bool, launch: Launch, per_head: bool, act: int,
               front: bool) -> dict:  # fmt: skip
    block = max(16, 1 << (d - 1).bit_length())
    rows = max(1, launch.tile // block)
    return {
        "D": d, "BLOCK_D": block, "BLOCK_R": rows, "WEIGHT": weight, "PER_HEAD": per_head,
        "GATE": gate, "ACT": act, "FRONT": front and gate,
        "num_warps": min(16, max(1, rows * block // launch.per_warp)),
    }  # fmt: skip


@cache
def _backward_launch(d: int, gate: bool, front: bool) -> tuple[Launch, int]:
    """The launch and the number of programs."""
    if not gate or d > GATED.tile:
        return LAUNCHES[1], PROGRAMS
    return GATED, GATED_PROGRAMS if front or d <= 128 else PROGRAMS


def _forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    scale: float,
    per_head: bool,
    act: int,
    front: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """-> y in `dtype`, rstd [rows].

    per_head: weight is [heads * D], one part for each entry of the last axis but one of x.
    """
    heads, d = _heads(x, gate, per_head), x.shape[-1]
    y, rstd = _fake(x, weight, gate, eps, scale, per_head, act, front, dtype)
    rows = rstd.shape[0]
    constants = _constants(
        d, weight is not None, gate is not None, LAUNCHES[0], per_head, act, front
    )
    flat, *apart = _lying(x, heads)
    other, *gate_apart = (flat, *apart) if gate is None else _lying(gate, heads)
    rows = rows // heads if per_head else rows
    grid = (-(-rows // constants["BLOCK_R"]), heads if per_head else 1)
    with device_of(x):
        _kernels().forward[grid](
            flat, other, y if weight is None else weight.contiguous(), y, rstd, rows, heads,
            *apart, *gate_apart, eps, scale, **constants,
        )  # fmt: skip
    return y, rstd


def _fake(x, weight, gate, eps, scale, per_head, act, front, dtype):
    y = x.new_empty(x.shape, dtype=dtype)
    return y, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _backward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    scale: float,
    per_head: bool,
    act: int,
    front: bool,
    dgate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, gate; the last two are empty where there is none.

    dgate: where that of the gate is written, if its rows lie at regular places.
    """
    heads, d = _heads(x, gate, per_head), x.shape[-1]
    dx = x.new_empty(x.shape)
    if dgate is None:
        dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    launch, most = _backward_launch(d, gate is not None, front)
    constants = _constants(d, weight is not None, gate is not None, launch, per_head, act, front)
    flat, *apart = _lying(x, heads)
    other, *gate_apart = (flat, *apart) if gate is None else _lying(gate, heads)
    d_other, *d_apart = (dx, *apart) if gate is None else _lying(dgate, heads)
    groups = heads if per_head else 1
    rows = rstd.shape[0] // groups
    programs = min(-(-rows // constants["BLOCK_R"]), max(1, most // groups))
    partial = rstd if weight is None else rstd.new_empty(programs, groups * d)
    with device_of(x):
        _kernels().backward[(programs, groups)](
            flat, other, dx if weight is None else weight.contiguous(), rstd, dy.contiguous(),
            dx, d_other, partial, rows, heads, *apart, *gate_apart, *d_apart, scale, **constants,
        )  # fmt: skip
    if gate is not None and d_other.data_ptr() != dgate.data_ptr():  # rows did not lie regularly
        dgate = d_other.view(gate.shape)
    if weight is None:
        return dx, rstd.new_empty(0), dgate
    return dx, partial.sum(0).to(weight.dtype).view(weight.shape), dgate


def _fake_backward(x, weight, gate, rstd, dy, scale, per_head, act, front, dgate=None):
    return (
        x.new_empty(x.shape),
        rstd.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, gate, _, *ctx.options, _ = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.place = None if gate is None else place_of(gate)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, run, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 9
    x, weight, gate, rstd = ctx.saved_tensors
    place = None if ctx.place is None else ctx.place(gate)
    more = () if place is None else (place,)
    dx, dweight, dgate = run(x, weight, gate, rstd, dy, *ctx.options, *more)
    dweight = None if weight is None else dweight
    return dx, dweight, None if gate is None else dgate, *(None,) * 6


_norm = kernel_op("norm", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def norm_fused(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    n_groups: int = 1,
    activation: str | None = None,
    gate_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """All of them: norm(x) * weight * act(gate), or with gate_first norm(x * act(gate)) * weight.

    Shapes: x, gate [..., D]; weight [D], or [H, D] or [H * D] for x [..., H, D], a weight for each
    head. n_groups: norms over that many equal parts of the last axis, as in `head_rms_norm`.
    activation: None (the gate is given), "sigmoid" or "silu" (of the gate). dtype: of the result
    (default: x's), so that a float32 stream comes out ready for a bfloat16 product.
    """
    shape, act = x.shape, ACTIVATIONS[activation]
    if n_groups > 1:
        x = x.unflatten(-1, (n_groups, -1))
        gate = None if gate is None else gate.unflatten(-1, (n_groups, -1))
    per_head = weight is not None and weight.numel() != x.shape[-1]
    dtype = x.dtype if dtype is None else dtype
    y = _norm(x, weight, gate, eps, scale, per_head, act, gate_first, dtype)[0]
    return y.view(shape) if n_groups > 1 else y
