"""Gated linear units by one kernel each way; the gradient of [gate | up] is one tensor."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op

TILE, WIDTH = 2048, 1024
"""Numbers of the result that a program of 4 warps makes, and of those at most from one row."""


def glu_fits(x: Tensor) -> bool:
    """Whether the kernels compute this case."""
    half = x.shape[-1] // 2
    return x.dtype in DTYPES and half > 0 and x.numel() // half < 2**31 - TILE


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.glu")


@cache
def _constants(half: int, gelu: bool) -> tuple[int, dict]:
    """Tiles of a row; the constants of the kernels."""
    block = min(WIDTH, max(16, 1 << (half - 1).bit_length()))
    return -(-half // block), {
        "F": half, "BLOCK_F": block, "BLOCK_R": TILE // block, "GELU": gelu, "num_warps": 4,
    }  # fmt: skip


def _forward(x: Tensor, gelu: bool) -> Tensor:
    y = _fake(x, gelu)
    half = y.shape[-1]
    rows = y.numel() // half
    blocks, constants = _constants(half, gelu)
    with device_of(x):
        _kernels().forward[(-(-rows // constants["BLOCK_R"]) * blocks,)](
            x.contiguous(), y, rows, **constants
        )
    return y


def _fake(x, gelu):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _backward(x: Tensor, dy: Tensor, gelu: bool) -> Tensor:
    dx = _fake_backward(x, dy, gelu)
    half = dy.shape[-1]
    rows = dy.numel() // half
    blocks, constants = _constants(half, gelu)
    with device_of(x):
        _kernels().backward[(-(-rows // constants["BLOCK_R"]) * blocks,)](
            x.contiguous(), dy.contiguous(), dx, rows, **constants
        )
    return dx


def _fake_backward(x, dy, gelu):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:
    x, ctx.gelu = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, run, dy: Tensor):
    return run(*ctx.saved_tensors, dy, ctx.gelu), None


_glu = kernel_op("glu", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def glu_fused(x: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up of x = [gate | up], [..., 2 F] -> [..., F]. activation: silu or gelu."""
    return _glu(x, activation == "gelu")
