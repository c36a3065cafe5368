"""A branch added to the residual stream and the norm of the sum, one kernel each way."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op
from longscan.ops._norm_fused import PROGRAMS, WIDEST, Launch

# Launches of forward and of backward, whose 8 programs an SM (PROGRAMS) so fit in its registers.
LAUNCHES = (Launch(2048, 512), Launch(1024, 256))


def add_norm_fits(x: Tensor, branch: Tensor, weight: Tensor) -> bool:
    """Whether the kernels compute this case."""
    return (
        x.dtype in DTYPES
        and branch.dtype in DTYPES
        and weight.dtype in DTYPES
        and x.shape == branch.shape
        and weight.shape == x.shape[-1:]
        and 0 < x.shape[-1] <= WIDEST
        and 0 < x.numel() // x.shape[-1] < 2**31 - 2**20
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.add_norm")


@cache
def _constants(d: int, launch: Launch) -> dict[str, int]:
    block = max(16, 1 << (d - 1).bit_length())
    rows = max(1, launch.tile // block)
    warps = min(16, max(1, rows * block // launch.per_warp))
    return {"D": d, "BLOCK_D": block, "BLOCK_R": rows, "num_warps": warps}


def _forward(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y in `dtype`, x + branch, rstd [rows]."""
    y, total, rstd = _fake(x, branch, weight, eps, dtype)
    rows = rstd.shape[0]
    constants = _constants(x.shape[-1], LAUNCHES[0])
    with device_of(x):
        _kernels().forward[(-(-rows // constants["BLOCK_R"]),)](
            x.contiguous(), branch.contiguous(), weight.contiguous(), y, total, rstd, rows, eps,
            **constants,
        )  # fmt: skip
    return y, total, rstd


def _fake(x, branch, weight, eps, dtype):
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype)),
        x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32),
    )


def _backward(
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    dtype: torch.dtype,
    branch: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x in `dtype`, of the branch (empty where that is the same), of weight."""
    dx, dbranch, _ = _fake_backward(total, weight, rstd, dy, dtotal, dtype, branch)
    d, rows = total.shape[-1], rstd.shape[0]
    constants = _constants(d, LAUNCHES[1])
    programs = min(-(-rows // constants["BLOCK_R"]), PROGRAMS)
    partial = rstd.new_empty(programs, d)
    with device_of(total):
        _kernels().backward[(programs,)](
            total, weight.contiguous(), rstd, dy.contiguous(),
            dx if dtotal is None else dtotal.contiguous(), dx,
            dx if dtype == branch else dbranch, partial, rows,
            LATER=dtotal is not None, TWO=dtype != branch, **constants,
        )  # fmt: skip
    return dx, dbranch, partial.sum(0).to(weight.dtype)


def _fake_backward(total, weight, rstd, dy, dtotal, dtype, branch):
    return (
        total.new_empty(total.shape, dtype=dtype),
        total.new_empty(0 if dtype == branch else total.shape, dtype=branch),
        weight.new_empty(weight.shape),
    )


def _keep(ctx: Any, inputs, output) -> None:
    x, branch, weight, _, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.dtypes = x.dtype, branch.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, run, dy: Tensor | None, dtotal: Tensor | None, _):
    own, branch = ctx.dtypes
    if dy is None:  # nobody read the norm
        whole = [None if dtotal is None else dtotal.to(t) for t in ctx.dtypes]
        return *whole, None, None, None
    total, weight, rstd = ctx.saved_tensors
    dx, dbranch, dweight = run(total, weight, rstd, dy, dtotal, own, branch)
    return dx, dx if own == branch else dbranch, dweight, None, None


_add_norm = kernel_op("add_norm", _forward, _fake, _keep, _backward, _fake_backward, _differentiate)


def add_norm_fused(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(the RMS norm of x + branch in `dtype` (default: branch's), x + branch in the wider dtype).

    Shapes: x, branch, both results [..., D]; weight [D].
    """
    y, total, _ = _add_norm(x, branch, weight, eps, branch.dtype if dtype is None else dtype)
    return y, total
