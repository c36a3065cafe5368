"""Causal depthwise convolution over time, with its window as a state."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.ops._check import check_floating, check_shape, check_state
from longscan.ops._layout import check_cu_seqlens
from longscan.ops.dispatch import by_sequence, choose


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `conv`: a loop over time."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda x, state: conv_reference(x, weight, bias, state=state), [x], state, cu_seqlens
        )
    width = weight.shape[-1]
    window = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state
    out = []
    for t in range(x.shape[1]):
        window = torch.cat([window, x[:, t : t + 1]], 1)
        y = (window * weight.mT).sum(1)
        out.append(y if bias is None else y + bias)
        window = window[:, 1:]
    return torch.stack(out, 1), window


def conv_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `conv`: one multiply-add over all tokens for each tap."""
    batch, length, d = x.shape
    before = weight.shape[-1] - 1
    if cu_seqlens is not None:
        return _packed(x, weight, bias, state, cu_seqlens)
    if state is None:
        state = x.new_zeros(batch, before, d)
    x = torch.cat([state.to(x.dtype), x], 1)
    return _taps(x, weight, bias, length), x[:, length:]


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    y = x[:, :length] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for w in range(1, weight.shape[-1]):
        y = torch.addcmul(y, x[:, w : w + length], weight[:, w])
    return y


def _packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Lay each sequence behind its own window, convolve the long row, pick the tokens out."""
    bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    before, n = weight.shape[-1] - 1, len(bounds) - 1
    if state is None:
        state = x.new_zeros(n, before, x.shape[2])
    parts: list[Tensor] = []
    for i in range(n):
        parts += [state[i].to(x.dtype), x[0, bounds[i] : bounds[i + 1]]]
    row = torch.cat(parts).unsqueeze(0)
    y = _taps(row, weight, bias, row.shape[1] - before)[0]
    starts = [bounds[i] + i * before for i in range(n)]
    lengths = [bounds[i + 1] - bounds[i] for i in range(n)]
    out = torch.cat([y[s : s + t] for s, t in zip(starts, lengths, strict=True)])
    windows = [row[0, s + t : s + t + before] for s, t in zip(starts, lengths, strict=True)]
    return out.unsqueeze(0), torch.stack(windows)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution: each channel sees its own last W values.

    y_t = sum_w weight[:, w] * x_{t - (W - 1) + w} + bias; the last tap is the current token.

    Shapes: x, y [B, T, E]; weight [E, W]; bias [E]; state [B, W - 1, E], the last W - 1 inputs,
    oldest first (zeros before the first token); cu_seqlens [n + 1] packs n sequences on one row
    (B = 1), the state then has n rows.
    Precision: computed in x's dtype, as torch convolutions are.
    Raises: ValueError, TypeError for shapes or dtypes that do not fit.
    Source: the short convolution of H3 (arXiv 2212.14052) and Mamba (arXiv 2312.00752).
    """
    check_floating(x=x, weight=weight, bias=bias, state=state)
    check_shape("x", x, (None, None, weight.shape[0]), "[B, T, E]")
    check_shape("weight", weight, (None, None), "[E, W]")
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, weight.shape[1] - 1, x.shape[2]), "[rows, W - 1, E]")
    forms = {"reference": conv_reference, "torch": conv_chunked}
    return choose("conv", x, backend, forms)(x, weight, bias, state=state, cu_seqlens=cu_seqlens)
