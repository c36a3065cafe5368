"""A projection and the convolution of one of its parts, as one differentiable function.

    p = x weight^T, cut into parts of `sizes`;   y = act(conv(p[at])), cut into parts of `inner`

(and with `unit`, the heads of the first two of these scaled to unit length, as in `conv_parts`).

Apart, the backward of each cut copies all gradients once more, side by side. Here the backward has
one buffer, into which the convolution's kernel writes its part, as do those kernels behind the
other parts that can (`ops._place`). And rows that matrix products read are aligned, whatever the
number of a projection's outputs: products of misaligned rows run on the instructions of two
generations ago, at 40 % of the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longscan.ops._conv_fused import PARTS, conv_backward, conv_forward, filled
from longscan.ops._kernel_op import DTYPES
from longscan.ops._memory_net import first_order_only
from longscan.ops._place import Whole, is_at

MULTIPLE = 16
"""Outputs are padded to multiples of this: 8 are what products want, and Triton loads numbers one
by one unless it knows that rows are 16 apart."""
LEAST = 512
"""Tokens below which nothing is gained."""


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What torch.nn.functional.linear computes in; None where it would refuse."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype if x.dtype == weight.dtype else None


def projection_fits(linear: nn.Module, x: Tensor) -> bool:
    """Whether a module is nothing but a product with a matrix, of many tokens.

    Not so: adapters and quantised, sharded or parametrised weights, modules with hooks, biases.
    """
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and linear.weight.dtype in DTYPES
        and linear.weight.device == x.device
        and x.dtype in DTYPES
        and x.shape[0] * x.shape[1] >= LEAST
        and product_dtype(x, linear.weight) in DTYPES
    )


def _width(rows: int) -> int:
    """Numbers of a row of the product, with padding."""
    return -(-rows // MULTIPLE) * MULTIPLE


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` with rows of zeros behind its own."""
    rows, wide = weight.shape[0], _width(weight.shape[0])
    if rows == wide:
        return weight.to(dtype)
    out = weight.new_empty(wide, weight.shape[1], dtype=dtype)
    out[:rows].copy_(weight)
    out[rows:].zero_()
    return out


def _copy(into: Tensor, x: Tensor) -> None:
    """into = x for slices of rows: PyTorch copies these number by number, so take larger ones."""
    large = torch.int64
    per = large.itemsize // x.element_size()
    fit = x.dtype == into.dtype and all(
        t.stride(-1) == 1 and all(n % per == 0 for n in (t.shape[-1], *t.stride()[:-1]))
        and t.storage_offset() % per == 0
        for t in (into, x)
    )  # fmt: skip
    if fit:
        into, x = into.view(large), x.view(large)
    into.copy_(x)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; sums are kept in float32."""
    if dtype == torch.float32 and a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        taps: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        sizes: list[int],
        at: int,
        inner: list[int],
        unit: int,
        dtype: torch.dtype,
    ) -> Any:
        """-> y in PARTS parts, the windows, the other parts of the projection."""
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        padded = _padded(weight, dtype)
        p = torch.mm(rows, padded.mT).view(*x.shape[:-1], padded.shape[0])
        cut = [*sizes, padded.shape[0] - weight.shape[0]]
        parts = list(p.split(cut, -1)[:-1])
        part = parts.pop(at)
        if state is not None:
            state = state.to(dtype)
        out = conv_forward(part, taps, bias, state, cu_seqlens, silu, inner, unit)
        # Autocast keeps what it casts, too; other weights may be gathered anew (FSDP).
        kept = None if weight.dtype == dtype else padded
        ctx.save_for_backward(rows, weight, kept, part, taps, bias, state, cu_seqlens)
        ctx.silu, ctx.at, ctx.inner, ctx.unit, ctx.dtype = silu, at, inner, unit, x.dtype
        others = (i for i in range(len(sizes)) if i != at)
        ctx.whole = Whole(p, cut, {PARTS + 1 + n: i for n, i in enumerate(others)})
        ctx.set_materialize_grads(False)
        return *out, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        first_order_only()
        rows, weight, padded, part, taps, bias, state, cu_seqlens = ctx.saved_tensors
        dp, slices = ctx.whole.take(grads)
        dys, dend = filled(grads[:PARTS], part, ctx.inner), grads[PARTS]
        d_taps, d_bias, d_state = conv_backward(
            part, taps, bias, state, cu_seqlens, ctx.silu, ctx.unit, dys, dend,
            slices.pop(ctx.at),
        )  # fmt: skip
        for into, g in zip(slices, (*grads[PARTS + 1 :], None), strict=True):
            if g is None:
                into.zero_()
            elif not is_at(g, into):
                _copy(into, g)
        dp = dp.view(-1, dp.shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            padded = _padded(weight, dp.dtype) if padded is None else padded
            dx = _product(dp, padded, ctx.dtype)
            dx = dx.view(*part.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dw = _product(dp.mT, rows, weight.dtype)[: weight.shape[0]]
        return dx, dw, d_taps, d_bias, d_state, *(None,) * 7


def projection_fused(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int],
    at: int,
    inner: Sequence[int],
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
    unit: int = 0,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The parts of y, the windows after the last tokens, the parts of the projection but `at`.

    Shapes: x [B, T, D]; weight [sum(sizes), D]; taps [sizes[at], W] and bias of the convolution;
    inner: at most three sizes, together sizes[at]; state and cu_seqlens as in `ops.conv.conv`;
    unit: as in `conv_parts`.
    Precision: products in what autocast says, else in x's dtype; y and parts in the same. Where x
    or weight is float32, the sums of its gradient are not rounded on their way.
    Raises: RuntimeError in a backward that is to be differentiated itself.
    """
    dtype = product_dtype(x, weight)
    out = _Projection.apply(
        x, weight, taps, bias, state, cu_seqlens, silu, list(sizes), at, list(inner), unit,
        dtype,
    )  # fmt: skip
    return list(out[: len(inner)]), out[PARTS], list(out[PARTS + 1 :])
