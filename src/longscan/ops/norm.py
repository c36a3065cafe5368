"""Normalisations around the recurrences; the statistics are always computed in float32."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import compute_dtype


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square normalisation over the last axis.

    y = x / sqrt(mean(x^2) + eps) * weight

    Shapes: x [..., D]; weight [D] or None. A per-head norm is this on [..., H, D_head].
    Precision: statistics in float32 (float64 for float64 input); result in x's dtype.
    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    dtype = compute_dtype(x)
    w = None if weight is None else weight.to(dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], w, eps).to(x.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """RMSNorm of x, times a gate that is already activated: rms_norm(x) * gate.

    Shapes: x, gate [..., D]; weight [D] or None.
    Differs: Mamba-2 normalises the product instead; that is rms_norm(x * gate).
    """
    return rms_norm(x, weight, eps) * gate.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6, scale: float = 1.0) -> Tensor:
    """Scale vectors of the last axis to length `scale`.

    y = scale * x / sqrt(sum(x^2) + eps), eps inside the root: zero vectors stay zero.

    Shapes: x [..., D]. Precision: as `rms_norm`.
    """
    d = x.shape[-1]
    dtype = compute_dtype(x)
    # sum / sqrt(sum + eps) is the RMS norm with its mean undone.
    y = F.rms_norm(x.to(dtype), x.shape[-1:], None, eps / d)
    return (y * (scale * d**-0.5)).to(x.dtype)


def head_rms_norm(x: Tensor, weight: Tensor | None, n_groups: int, eps: float = 1e-5) -> Tensor:
    """RMSNorm over n_groups equal groups of the last axis, one weight per channel.

    Shapes: x [..., G * D]; weight [G * D] or None. Used by Mamba-2 (one norm group per B/C group).
    """
    y = rms_norm(x.unflatten(-1, (n_groups, -1)), None, eps).flatten(-2)
    return y if weight is None else (y * weight.to(compute_dtype(x))).to(x.dtype)


__all__ = ["gated_rms_norm", "head_rms_norm", "l2_norm", "rms_norm"]
