"""Cross entropy of a linear head, without the logits ever being whole in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.ops._check import check_floating, check_shape
from longscan.ops._loss_fused import BUDGET, loss_fits, pieces_fused, scaled
from longscan.ops.dispatch import by_kernel

IGNORE = -100
# Logits of a piece, in numbers. On a CPU they should stay in the cache; a GPU wants big matmuls.
_BUDGET = {"cpu": 1 << 20, "gpu": 1 << 26}


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = IGNORE,
    n_classes: int | None = None,
    logit_cap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross entropy of softmax(h @ weight^T), computed some tokens at a time.

        loss_n = log sum_v exp(z_nv) - z_n,target(n),   z_nv = h_n . w_v

    Shapes: h [N, D], weight [V, D], targets [N] int64 in [0, n_classes) or `ignore_index`.
    n_classes: rows of `weight` from there on are padding and take no part (default: V, none).
    logit_cap: z_nv = cap tanh(h_n . w_v / cap) instead, which lies in (-cap, cap).
    chunk: tokens per piece; beside the gradients, memory holds the logits [chunk, V] of one piece
    and their logarithmic softmax, with logit_cap a third tensor of that size (default: 2^20
    logits on a CPU, 2^26 on a GPU, where that is as fast as whole logits or faster; with the
    kernel 2^27, and in place of the softmax the gradient in the operands' dtype).
    reduction: "none" gives [N] (0 where ignored), "sum", or "mean" over the tokens not ignored.
    Precision: products in the dtype of the operands (autocast's, where it is on), accumulated and
    kept in float32 from there on; float64 throughout for float64. Half-precision operands are
    multiplied in float32 on a CPU, where that is also the faster way.
    Raises: ValueError, TypeError for wrong shapes and dtypes; ValueError for a target out of range
    on a CPU (on a GPU, where looking would stall the device, the device's own assertion).
    Differs: from torch's cross_entropy only in that the mean over no token at all is 0, not NaN,
    so that a batch without targets does no harm. First derivatives only.
    """
    check_floating(h=h, weight=weight)
    check_shape("h", h, (None, None), "[N, D]")
    check_shape("weight", weight, (None, h.shape[1]), "[V, D]")
    check_shape("targets", targets, (h.shape[0],), "[N]")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", not {reduction!r}')
    rows = weight.shape[0]
    n_classes = rows if n_classes is None else n_classes
    if not 0 < n_classes <= rows:
        raise ValueError(f"n_classes must lie in 1..{rows} (the rows of weight), not {n_classes}")
    valid = targets != ignore_index
    _check_targets(targets, valid, n_classes, ignore_index)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    if logit_cap is not None and not 0 < logit_cap < math.inf:
        raise ValueError(f"logit_cap must be a number above 0, or None, not {logit_cap}")

    device = h.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if torch.float64 not in (h.dtype, weight.dtype):
            h, weight = h.to(dtype), weight.to(dtype)
    dtype = torch.promote_types(h.dtype, weight.dtype)
    h, weight = h.to(dtype), weight.to(dtype)
    if chunk is None:
        budget = BUDGET if _fused(h, weight) else _BUDGET["cpu" if device == "cpu" else "gpu"]
        # Each piece also touches the gradient of weight once: not too few tokens for that.
        chunk = max(256, budget // rows)
    targets = targets.where(valid, 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coef = valid.to(wide)
    if reduction == "none":
        return _PerToken.apply(h, weight, targets, coef, n_classes, logit_cap, chunk)
    if reduction == "mean":
        coef = coef / coef.sum().clamp(min=1)
    return _Total.apply(h, weight, targets, coef, n_classes, logit_cap, chunk)


def _check_targets(targets: Tensor, valid: Tensor, n_classes: int, ignore_index: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = valid & ((targets < 0) | (targets >= n_classes))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"target {int(targets[at])} at position {at} is outside 0..{n_classes - 1}; mark "
            f"tokens without a target by {ignore_index}, and check that the model's vocab_size is "
            "the tokenizer's"
        )


def _fused(h: Tensor, weight: Tensor) -> bool:
    return by_kernel("loss", h, lambda: loss_fits(h, weight))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 or wider."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _pieces(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    coef: Tensor,
    n_classes: int,
    cap: float | None,
    chunk: int,
    want: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The losses [N] and, where wanted, the gradients of sum(coef * losses) to h and weight.

    The gradients still lack a common factor, returned last: 16 bits would lose the small numbers
    that a mean over many tokens, before a loss scaler acts, consists of.
    """
    factor = coef.abs().amax() if coef.numel() else coef.new_ones(())
    factor = factor.where(factor > 0, 1)
    coef = coef / factor
    losses = torch.empty_like(coef)
    dh = torch.empty_like(h) if want[0] else None
    dw = torch.zeros_like(weight, dtype=coef.dtype) if want[1] else None
    for a in range(0, h.shape[0], chunk):
        part = slice(a, a + chunk)
        target = targets[part, None]
        logits = _mm(h[part], weight.T)
        bent = None
        if cap is not None:
            bent = logits.div_(cap).tanh_()
            logits = bent * cap
        if n_classes < weight.shape[0]:
            logits[:, n_classes:] = -torch.inf
        log_p = logits.log_softmax(-1)
        del logits
        picked = log_p.gather(1, target)
        losses[part] = -picked.squeeze(1)
        if dh is None and dw is None:
            continue
        # softmax - one hot; the entry of the target apart, as 1 - p loses digits in 16 bits.
        # The factor coef goes to the narrow sides of the products, [chunk, D].
        narrow = log_p if log_p.dtype == h.dtype else torch.empty_like(log_p, dtype=h.dtype)
        grad = torch.exp(log_p, out=narrow)
        grad.scatter_(1, target, torch.expm1(picked).to(h.dtype))
        if bent is not None:
            grad.mul_(bent.square_().neg_().add_(1))  # the slope of cap tanh(z / cap)
        c = coef[part, None]
        if dh is not None:
            dh[part] = (_mm(grad, weight) * c).to(h.dtype)
        if dw is not None:
            scaled = (h[part] * c).to(h.dtype)
            if dw.dtype == h.dtype:
                dw.addmm_(grad.T, scaled)
            else:
                dw += _mm(grad.T, scaled)
    # What an ignored token was measured against (class 0) means nothing.
    losses = losses.where(coef != 0, 0)
    return losses, dh, dw, factor


def _choose(
    h: Tensor, weight: Tensor, *args: Any, even: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`_pieces` by the kernel, where it runs; even: coef is one number, or 0."""
    if _fused(h, weight):
        return pieces_fused(h, weight, *args, even=even)
    return _pieces(h, weight, *args)


def _times(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if grad is None:
        return None
    if _fused(grad, grad) and not torch.compiler.is_compiling():
        return scaled(grad, factor, dtype)
    return (grad.to(factor.dtype) * factor).to(dtype)


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


class _Total(torch.autograd.Function):
    """sum(coef * losses): the gradients are known up to a factor, and made in the same pass."""

    @staticmethod
    def forward(ctx: Any, h, weight, targets, coef, n_classes, cap, chunk):  # type: ignore[override]
        want = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        with _no_autocast(h.device):
            losses, dh, dw, factor = _choose(
                h, weight, targets, coef, n_classes, cap, chunk, want, even=True
            )
        ctx.save_for_backward(dh, dw, factor)
        ctx.dtype = weight.dtype
        return (losses * coef).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):  # type: ignore[override]
        dh, dw, factor = ctx.saved_tensors
        dh, dw = (_times(d, factor * g, ctx.dtype) for d in (dh, dw))
        return dh, dw, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """Losses one by one: their weights are known only in backward, which computes logits anew."""

    @staticmethod
    def forward(ctx: Any, h, weight, targets, coef, n_classes, cap, chunk):  # type: ignore[override]
        with _no_autocast(h.device):
            losses, *_ = _choose(
                h, weight, targets, coef, n_classes, cap, chunk, (False, False), even=True
            )
        ctx.save_for_backward(h, weight, targets, coef)
        ctx.options = n_classes, cap, chunk
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):  # type: ignore[override]
        h, weight, targets, coef = ctx.saved_tensors
        want = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        with _no_autocast(h.device):
            n_classes, cap, chunk = ctx.options
            _, dh, dw, factor = _choose(
                h, weight, targets, coef * g, n_classes, cap, chunk, want, even=False
            )
        dh, dw = (_times(d, factor, weight.dtype) for d in (dh, dw))
        return dh, dw, None, None, None, None, None


__all__ = ["IGNORE", "linear_cross_entropy"]
