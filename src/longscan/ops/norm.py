"""Normalisations around the recurrences; the statistics are always computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._add_norm_fused import add_norm_fits, add_norm_fused
from longscan.ops._check import compute_dtype
from longscan.ops._kernel_op import DTYPES
from longscan.ops._norm_fused import norm_fits, norm_fused
from longscan.ops.dispatch import by_kernel

ACTIVATIONS = {None: lambda gate: gate, "silu": F.silu, "sigmoid": torch.sigmoid}


class _Normalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * scale * weight in few passes: on a CPU autograd's take twice
    the time of these. (Compilers have fused norms of their own, CUDA has kernels.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.scale = eps, scale
        y = x * (rstd * scale)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through rstd as well
            rstd = (x.square().mean(-1, True) + ctx.eps).rsqrt()
        scaled = rstd * ctx.scale
        d_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                d_weight = (g * (x * scaled)).reshape(-1, x.shape[-1]).sum(0)
            g = g * weight
        along = (g * x).sum(-1, True).mul_(scaled * rstd.square() * (-1 / x.shape[-1]))
        return torch.addcmul(g * scaled, x, along), d_weight, None, None


def _fused(x: Tensor, weight: Tensor | None, gate: Tensor | None = None) -> bool:
    """Whether the kernels compute a norm. A compiler makes one of its own, with what is around."""
    if torch.compiler.is_compiling():
        return False
    return by_kernel("norm", x, lambda: norm_fits(x, weight, gate))


def _normalise(x: Tensor, weight: Tensor | None, eps: float, scale: float = 1.0) -> Tensor:
    dtype = compute_dtype(x)
    weight = None if weight is None else weight.to(dtype)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and torch.is_grad_enabled():
        return _Normalise.apply(x.to(dtype), weight, eps, scale).to(x.dtype)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], weight, eps)
    return (y if scale == 1.0 else y * scale).to(x.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the last axis.

    y = x / sqrt(mean(x^2) + eps) * weight

    Shapes: x [..., D]; weight [D] or None. A per-head norm is this on [..., H, D_head].
    Precision: statistics in float32 (float64 for float64 input); result in `dtype`, None: x's.
    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    if _fused(x, weight) and (weight is None or weight.shape == x.shape[-1:]):
        return norm_fused(x, weight, eps=eps, dtype=dtype)
    y = _normalise(x, weight, eps)
    return y if dtype is None else y.to(dtype)


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + branch), x + branch): a residual stream and the norm that the next part reads.

    Shapes: x, branch and both results [..., D]; weight [D]. By a kernel the stream is read and
    written once, forward and backward.
    Precision: as `rms_norm` of the sum, which has the wider dtype of x and branch.
    """
    if adds(x) and add_norm_fits(x, branch, weight):
        dtype = torch.promote_types(x.dtype, branch.dtype) if dtype is None else dtype
        return add_norm_fused(x, branch, weight, eps, dtype)
    x = x + branch
    return rms_norm(x, weight, eps, dtype=dtype), x


def adds(x: Tensor) -> bool:
    """Whether `add_rms_norm` is one kernel for streams like x, of sizes and dtypes that fit."""
    return not torch.compiler.is_compiling() and by_kernel("norm", x, lambda: x.dtype in DTYPES)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    n_groups: int = 1,
    gate_first: bool = False,
) -> Tensor:
    """RMSNorm of x times a gate: norm(x) * act(gate), or norm(x * act(gate)) with gate_first.

    Shapes: x, gate [..., D]; weight [D] or None; n_groups as in `head_rms_norm`.
    activation: of the gate, "silu" or "sigmoid" (default: none). Precision: as `rms_norm`.
    Raises: ValueError for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be None, "silu" or "sigmoid", not {activation!r}')
    same = weight is None or weight.shape == x.shape[-1:]
    if _fused(x, weight, gate) and same:
        return norm_fused(
            x, weight, gate, eps=eps, n_groups=n_groups, activation=activation,
            gate_first=gate_first,
        )  # fmt: skip
    gate = ACTIVATIONS[activation](gate)
    if gate_first:
        return head_rms_norm(x * gate, weight, n_groups, eps)
    return head_rms_norm(x, weight, n_groups, eps) * gate.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6, scale: float = 1.0) -> Tensor:
    """Scale vectors of the last axis to length `scale`.

    y = scale * x / sqrt(sum(x^2) + eps), eps inside the root: zero vectors stay zero.

    Shapes: x [..., D]. Precision: as `rms_norm`.
    """
    d = x.shape[-1]
    # x / sqrt(sum + eps) is the RMS norm with its mean undone.
    if _fused(x, None):
        return norm_fused(x, eps=eps / d, scale=scale * d**-0.5)
    return _normalise(x, None, eps / d, scale * d**-0.5)


def head_rms_norm(x: Tensor, weight: Tensor | None, n_groups: int, eps: float = 1e-5) -> Tensor:
    """RMSNorm over n_groups equal groups of the last axis, one weight per channel.

    Shapes: x [..., G * D]; weight [G * D] or None. Used by Mamba-2 (one norm group per B/C group).
    """
    if n_groups == 1:
        return rms_norm(x, weight, eps)
    if _fused(x, weight):
        return norm_fused(x, weight, eps=eps, n_groups=n_groups)
    y = rms_norm(x.unflatten(-1, (n_groups, -1)), None, eps).flatten(-2)
    return y if weight is None else (y * weight.to(compute_dtype(x))).to(x.dtype)


__all__ = ["add_rms_norm", "adds", "gated_rms_norm", "head_rms_norm", "l2_norm", "rms_norm"]
