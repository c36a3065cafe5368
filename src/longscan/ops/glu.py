"""Gated linear units, the middle of gated MLPs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._glu_fused import glu_fits, glu_fused
from longscan.ops.dispatch import by_kernel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def glu(x: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, with gate and up side by side in the last axis of x.

    Shapes: x [..., 2 F]; y [..., F]. activation: silu (SwiGLU) or gelu (GEGLU, with the exact
    error function).
    Precision: in x's dtype; by a kernel in float32, rounded once. LONGSCAN_BACKEND decides; a
    compiler makes a kernel of its own.
    Raises: ValueError for another activation, or where there is no gate for each number.
    Source: Shazeer, arXiv 2002.05202.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "silu" or "gelu", not {activation!r}')
    if x.shape[-1] % 2:
        raise ValueError(f"gates and values must be as many: x has {x.shape[-1]} columns")
    if not torch.compiler.is_compiling() and by_kernel("glu", x, lambda: glu_fits(x)):
        return glu_fused(x, activation)
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


__all__ = ["ACTIVATIONS", "glu"]
