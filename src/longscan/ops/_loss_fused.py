"""The pieces of `linear_cross_entropy` on a GPU: products by cuBLAS, all between in one kernel."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import device_of


class Launch(NamedTuple):
    """Logits of a token that are looked at together, warps."""

    block: int
    warps: int


LAUNCH = Launch(8192, 8)
BUDGET = 1 << 27
"""Logits of a piece, in numbers. The gradient of weight is read and written once for each piece,
which for less than about 1000 tokens takes longer than the product that it adds."""
HALF = (torch.float16, torch.bfloat16)


def loss_fits(h: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this case: both in one dtype, of 32 or 16 bits."""
    return (
        h.dtype == weight.dtype
        and h.dtype in (torch.float32, *HALF)
        and h.numel() > 0
        and weight.shape[0] < 2**30
    )


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.loss")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32."""
    if a.dtype not in HALF:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, without the product ever being there by itself."""
    if a.dtype not in HALF:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x [n, D] times one number, or times one for each row, in another dtype."""
    out = torch.empty_like(x, dtype=dtype) if out is None else out
    block = min(4096, max(16, 1 << (x.shape[1] - 1).bit_length()))
    with device_of(x):
        _kernels().scale[(x.shape[0], -(-x.shape[1] // block))](
            x, factor, out, x.shape[1], ROWS=factor.ndim > 0, BLOCK=block, num_warps=4
        )
    return out


def _pieces(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    coef: Tensor,
    n_classes: int,
    cap: float,
    chunk: int,
    want_h: bool,
    want_weight: bool,
    even: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `pieces_fused`, with cap 0 for none; what is not wanted is empty."""
    n, rows = h.shape[0], weight.shape[0]
    inside = ((targets >= 0) & (targets < n_classes)).all()
    torch._assert_async(inside, "a target is not among the classes")  # type: ignore
    h, weight, targets = h.contiguous(), weight.contiguous(), targets.contiguous()
    factor = coef.abs().amax()
    factor = factor.where(factor > 0, 1)
    coef = coef / factor
    losses = torch.empty_like(coef)
    dh = torch.empty_like(h) if want_h else h.new_empty(0)
    dw = None
    want = want_h or want_weight
    chunk = -(-n // -(-n // chunk))  # pieces of one size
    room = None
    if want and h.dtype in HALF:
        room = h.new_empty(chunk, rows)
    for a in range(0, n, chunk):
        part = slice(a, a + chunk)
        x, c = h[part], coef[part]
        logits = _product(x, weight.T)
        grad = logits if room is None else room[: len(c)]
        with device_of(h):
            _kernels().cross_entropy[(len(c),)](
                logits, targets[part], c, losses[part], grad, rows, n_classes, cap,
                CAP=cap > 0, GRAD=want, BLOCK=LAUNCH.block, num_warps=LAUNCH.warps,
            )  # fmt: skip
        if room is not None:
            del logits  # the products below may have its memory
        # The factor c goes to the narrow sides of the products, [chunk, D]. Where tokens are
        # alike it is 1, or 0 where the gradient is 0 already.
        if want_h:
            product = _product(grad, weight)
            if even:
                dh[part].copy_(product)
            else:
                scaled(product, c, h.dtype, dh[part])
            del product
        if want_weight:
            product = grad.T, x if even else scaled(x, c, h.dtype)
            if dw is None:
                dw = _product(*product)
            else:
                _add_product(dw, *product)
    return losses, dh, coef.new_empty(0) if dw is None else dw, factor


def _fake(h, weight, targets, coef, n_classes, cap, chunk, want_h, want_weight, even):
    return (
        coef.new_empty(coef.shape),
        h.new_empty(h.shape if want_h else 0),
        coef.new_empty(weight.shape if want_weight else 0),
        coef.new_empty(()),
    )


_op = torch.library.custom_op("longscan::cross_entropy_pieces", _pieces, mutates_args=())
_op.register_fake(_fake)


def pieces_fused(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    coef: Tensor,
    n_classes: int,
    cap: float | None,
    chunk: int,
    want: tuple[bool, bool],
    even: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`ops.loss._pieces` where `loss_fits`: for the autograd functions there, which call it.

    even: coef is one number, or 0. Beside the gradients, memory holds the logits of one piece in
    float32 and, for operands of 16 bits, their gradient in 16 bits.
    """
    run = _op if torch.compiler.is_compiling() else _pieces
    losses, dh, dw, factor = run(
        h, weight, targets, coef, n_classes, cap or 0.0, chunk, *want, even
    )
    return losses, dh if want[0] else None, dw if want[1] else None, factor
