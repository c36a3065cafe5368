"""Rotary position embedding (RoPE), rotate-half form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops._check import compute_dtype
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops._rotary_fused import rotary_fits, rotary_fused, rotary_heads_fused
from longscan.ops.dispatch import by_kernel
from longscan.ops.norm import rms_norm

# Positions below this are looked up in a table shared by all layers, later ones are computed.
_TABLE_END = 1 << 16
_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def rotary_at(
    positions: Tensor, dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The factors (cos, sin) that `rotary` needs at the given positions.

    angle[p, i] = p * theta^(-2 i / dim);  cos = [cos, cos], sin = [-sin, sin] over the halves.

    Shapes: positions [...] integers; cos, sin [..., dim], dim even.
    Precision: angles and factors in `dtype`, float32 or float64.
    Source: RoFormer (arXiv 2104.09864), in the rotate-half order of GPT-NeoX, Llama and Qwen.
    Differs: the sign of "rotate half" sits in `sin`, so that applying it needs no negation.
    """
    if dim % 2 or dim < 2:
        raise ValueError(f"rotary embedding turns pairs of dimensions: dim must be even, not {dim}")
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=dtype)
    angle = positions.to(dtype).unsqueeze(-1) * theta ** (-steps / dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _table(
    end: int, dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factors of positions 0 .. end - 1 at least, kept for the next call."""
    if torch.compiler.is_compiling():
        return rotary_at(torch.arange(end, device=device), dim, theta, dtype)
    key = (dim, theta, dtype, device)
    table = _tables.get(key)
    if table is None or table[0].shape[0] < end:
        rows = max(256, 1 << (end - 1).bit_length())
        # A tensor made in inference mode could never take part in training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            table = rotary_at(torch.arange(rows, device=device), dim, theta, dtype)
        _tables[key] = table
    return table


def rotary_factors(
    length: int,
    dim: int,
    theta: float = 10000.0,
    *,
    start: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of a batch or a packed row of `length` tokens, shaped for x [B, T, H, D].

    start: tokens each row (or packed sequence) has already seen, its first position; None: 0.
    Shapes: cos, sin [T, 1, dim] when all rows agree, else [B, T, 1, dim].
    """
    device = torch.device(device)
    if cu_seqlens is None:
        if start is None or all(s == start[0] for s in start):
            first = start[0] if start else 0
            if first + length <= _TABLE_END:
                cos, sin = _table(first + length, dim, theta, dtype, device)
                cos, sin = cos[first : first + length], sin[first : first + length]
            else:
                positions = torch.arange(first, first + length, device=device)
                cos, sin = rotary_at(positions, dim, theta, dtype)
            return cos.unsqueeze(-2), sin.unsqueeze(-2)
        positions = torch.tensor(start, device=device)[:, None] + torch.arange(
            length, device=device
        )
        return _looked_up(positions, max(start) + length, dim, theta, dtype)
    bounds = check_cu_seqlens(cu_seqlens, 1, length)
    if start is not None or torch.compiler.is_compiling():
        return _packed(bounds, start, dim, theta, dtype, device)

    def made() -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return _packed(bounds, None, dim, theta, dtype, device)

    # Every layer asks for the same.
    return remembered(cu_seqlens, f"rotary {dim} {theta} {dtype} {device}", made)


def _packed(
    bounds: list[int],
    start: Sequence[int] | None,
    dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Factors [1, T, 1, dim] of the sequences on a packed row."""
    sizes = [b - a for a, b in pairwise(bounds)]
    begin = [0] * len(sizes) if start is None else start
    end = max(s + n for s, n in zip(begin, sizes, strict=True))
    shift = torch.tensor([s - a for s, a in zip(begin, bounds, strict=False)])
    shift = shift.repeat_interleave(torch.tensor(sizes)).to(device)
    positions = (torch.arange(bounds[-1], device=device) + shift).unsqueeze(0)
    return _looked_up(positions, end, dim, theta, dtype)


def _looked_up(
    positions: Tensor, end: int, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Factors of positions [B, T] below `end`, shaped [B, T, 1, dim]."""
    if end <= _TABLE_END:
        cos, sin = (t[positions] for t in _table(end, dim, theta, dtype, positions.device))
    else:
        cos, sin = rotary_at(positions, dim, theta, dtype)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first `dim` entries of each head by its position; the rest passes through.

    y = x * cos + [x2, x1] * sin with x = [x1, x2] the halves of the turned part.

    Shapes: x [..., T, H, D]; cos, sin [..., T, 1, dim] from `rotary_factors`, dim <= D.
    Precision: in float32 (float64 for float64 x), result in x's dtype.
    """
    if x.ndim == 4 and _fused(x, x.shape[-1], cos, sin):
        return rotary_fused(x, cos, sin)
    dim = cos.shape[-1]
    dtype = compute_dtype(x)
    part = x if dim == x.shape[-1] else x[..., :dim]
    part, cos, sin = part.to(dtype), cos.to(dtype), sin.to(dtype)
    y = torch.addcmul(part * cos, part.roll(dim // 2, -1), sin).to(x.dtype)
    return y if dim == x.shape[-1] else torch.cat([y, x[..., dim:]], -1)


def rotary_heads(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: tuple[Tensor, Tensor] | None = None,
    *,
    heads: int,
    groups: int,
    d_head: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention reads, from its projection x = [q | k | v | rest]: (q, k, v, rest).

    q and k are normed, where there are weights for it, and turned, where there are factors.

    Shapes: x [B, T, (heads + 2 groups) d_head + rest]; cos, sin as in `rotary`, or None; weights
    of the norms of q and of k: both [d_head]; q [B, T, heads, d_head]; k, v [B, T, groups, d_head].
    Precision: as `rotary` and `rms_norm`; by a kernel, which writes one gradient for all of x, q
    and k are rounded once.
    """
    if _fused(x, d_head, cos, sin):
        q_weight, k_weight = (None, None) if weights is None else weights
        return rotary_heads_fused(
            x, cos, sin, q_weight, k_weight, heads=heads, groups=groups, d_head=d_head, eps=eps
        )
    both = (heads + groups) * d_head
    qk, v = x[..., :both], x[..., both : both + groups * d_head]
    qk, v = qk.unflatten(-1, (-1, d_head)), v.unflatten(-1, (-1, d_head))
    if weights is not None:
        rows = zip(weights, (heads, groups), strict=True)
        weight = torch.cat([w.expand(n, -1) for w, n in rows])
        dtype = compute_dtype(qk)
        qk = (rms_norm(qk.to(dtype), None, eps) * weight.to(dtype)).to(qk.dtype)
    if cos is not None and sin is not None:
        qk = rotary(qk, cos, sin)
    q, k = qk.split([heads, groups], 2)
    return q, k, v, x[..., both + groups * d_head :]


def _fused(x: Tensor, d_head: int, cos: Tensor | None, sin: Tensor | None) -> bool:
    if torch.compiler.is_compiling():  # which makes kernels of its own, with what is around
        return False
    return by_kernel("rotary", x, lambda: rotary_fits(x, d_head, cos, sin))


__all__ = ["rotary", "rotary_at", "rotary_factors", "rotary_heads"]
