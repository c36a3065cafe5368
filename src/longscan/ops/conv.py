"""Causal depthwise convolution over time, with its window as a state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.ops._check import check_floating, check_shape, check_state, compute_dtype
from longscan.ops._conv_fused import conv_fits, conv_fused
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


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `conv`. Shapes: x, y [B, E]; weight [E, W]; bias [E]; state [B, W - 1, E]."""
    window, wide = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1), compute_dtype(x)
    y = (window.to(wide) * weight.to(wide).mT).sum(1)
    return (y if bias is None else y + bias).to(x.dtype), window[:, 1:]


# ---------------------------------------------------------------------------------------------
# The fast form: W shifted multiply-adds over the row, in blocks that stay in cache while all taps
# pass. Packed sequences are convolved as one row; then the first W - 1 tokens of each, the only
# ones that would see a neighbour, are replaced by those of a small batch: heads behind windows.


def _blocks(x: Tensor):
    """Spans of time: on a CPU about 2^17 numbers, measured, and work for all threads; other
    devices want few large launches, of at most 2^24 numbers for the sake of memory."""
    on_cpu = x.device.type == "cpu"
    numbers = max(2**17, 2**15 * torch.get_num_threads()) if on_cpu else 2**24
    size = max(16, numbers // (x.shape[0] * x.shape[2]))
    return ((t, min(t + size, x.shape[1])) for t in range(0, x.shape[1], size))


def _pairs(x: Tensor, state: Tensor | None, taps: int, t: int, e: int):
    """What each tap w reads for the outputs [t, e): (w, where in the span, inputs)."""
    before = taps - 1
    for w in range(taps):
        shift = before - w
        lo = max(t, shift)
        if lo < e:
            yield w, slice(lo - t, e - t), x[:, lo - shift : e - shift]
        if t < shift and state is not None:
            hi = min(e, shift)
            yield w, slice(0, hi - t), state[:, t + w : hi + w]


def _forward(x: Tensor, taps: Tensor, bias: Tensor, state: Tensor | None) -> Tensor:
    """y [B, T, E]; taps [W, E] and bias in the wide type; state None: zeros."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for t, e in _blocks(x):
        wide = x.dtype == taps.dtype
        out = y[:, t:e] if wide else torch.empty_like(y[:, t:e], dtype=taps.dtype)
        out.copy_(bias)
        for w, part, inputs in _pairs(x, state, len(taps), t, e):
            out[:, part].addcmul_(inputs, taps[w])
        if not wide:
            y[:, t:e] = out
    return y


def _backward(
    g: Tensor, x: Tensor, taps: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, state, and of taps and bias together [W + 1, E]."""
    before, length = len(taps) - 1, x.shape[1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = None
    for t, e in _blocks(x):
        if partial is None:  # sums over time, kept apart for each place in a span until the end
            partial = taps.new_zeros(before + 2, x.shape[0], e - t, x.shape[2])
        wide = x.dtype == taps.dtype
        out = dx[:, t:e] if wide else torch.empty_like(dx[:, t:e], dtype=taps.dtype)
        torch.mul(g[:, t:e], taps[before], out=out)
        for shift in range(1, before + 1):
            hi = min(e, length - shift)
            if hi > t:
                out[:, : hi - t].addcmul_(g[:, t + shift : hi + shift], taps[before - shift])
        if not wide:
            dx[:, t:e] = out
        for w, part, inputs in _pairs(x, state, before + 1, t, e):
            partial[w, :, part].addcmul_(g[:, t + part.start : t + part.stop], inputs)
        partial[before + 1, :, : e - t].add_(g[:, t:e])
    assert partial is not None
    sums = partial.sum((1, 2))
    if state is None:
        return dx, None, sums
    dstate = torch.zeros_like(state, dtype=taps.dtype, memory_format=torch.contiguous_format)
    for w in range(before):
        k = min(before - w, length)
        dstate[:, w : w + k].addcmul_(g[:, :k], taps[w])
    return dx, dstate.to(state.dtype), sums


@dataclass(frozen=True)
class _Packing:
    """Tokens near the edges of packed sequences, as indices.

    heads [n, W - 1]: the first tokens, running on where a sequence is shorter; own: which of them
    are its own; tails [n, W - 1]: the last tokens; inside: which of them exist; kept [n, W - 1]:
    the slots of the old window that stand in for the others.
    """

    heads: Tensor
    own: Tensor
    tails: Tensor
    inside: Tensor
    kept: Tensor


def _packing(cu_seqlens: Tensor, length: int, before: int) -> _Packing:
    bounds = torch.tensor(check_cu_seqlens(cu_seqlens, 1, length), device=cu_seqlens.device)
    slot = torch.arange(before, device=bounds.device)
    start, end = bounds[:-1].unsqueeze(1), bounds[1:].unsqueeze(1)
    tails = end - before + slot
    return _Packing(
        (start + slot).clamp(max=length - 1), start + slot < end,
        tails.clamp(min=0), tails >= start, (slot + end - start).clamp(max=max(before - 1, 0)),
    )  # fmt: skip


@torch.library.custom_op("longscan::conv", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> y, the windows after the last tokens."""
    before, length = weight.shape[1] - 1, x.shape[1]
    taps = weight.mT.to(compute_dtype(x)).contiguous()
    first = taps.new_zeros(()) if bias is None else bias.to(taps.dtype)
    if cu_seqlens is None:
        end = torch.cat([state[:, length:], x[:, max(0, length - before) :]], 1)
        return _forward(x, taps, first, state), end
    y = _forward(x, taps, first, None)
    if before == 0:
        return y, state.clone()
    p = _packing(cu_seqlens, length, before)
    y[0, p.heads[p.own]] = _forward(x[0, p.heads], taps, first, state)[p.own]
    old = state.gather(1, p.kept.unsqueeze(-1).expand_as(state))
    return y, torch.where(p.inside.unsqueeze(-1), x[0, p.tails], old)


@_conv.register_fake
def _(x, weight, bias, state, cu_seqlens):
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("longscan::conv_backward", mutates_args=())
def _conv_backward(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias, state."""
    before, length = weight.shape[1] - 1, x.shape[1]
    taps = weight.mT.to(compute_dtype(x)).contiguous()
    if cu_seqlens is None or before == 0:
        dx, dstate, sums = _backward(dy, x, taps, state if cu_seqlens is None else None)
        dstate = torch.zeros_like(state) if dstate is None else dstate
        if dend is not None and before:
            new = min(length, before)
            dx[:, length - new :] += dend[:, before - new :]
            dstate[:, length:] += dend[:, : before - new]
    else:
        p = _packing(cu_seqlens, length, before)
        head = p.heads[p.own]
        rest = dy.clone(memory_format=torch.contiguous_format)
        rest[0, head] = 0
        dx, _, sums = _backward(rest, x, taps, None)
        g = dy[0, p.heads] * p.own.unsqueeze(-1)
        dheads, dstate, more = _backward(g, x[0, p.heads], taps, state)
        dx[0].index_add_(0, head, dheads[p.own])
        sums += more
        assert dstate is not None
        if dend is not None:
            there = p.inside.unsqueeze(-1)
            dx[0].index_add_(0, p.tails[p.inside], dend[p.inside])
            dstate.scatter_add_(1, p.kept.unsqueeze(-1).expand_as(dend), dend * ~there)
    *dweight, dbias = sums.to(weight.dtype).unbind(0)
    return dx, torch.stack(dweight, 1), dbias.clone(), dstate


@_conv_backward.register_fake
def _(x, weight, state, cu_seqlens, dy, dend):
    return (
        x.new_empty(x.shape), weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]), state.new_empty(state.shape),
    )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    x, weight, bias, state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, state, cu_seqlens)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dend: Tensor | None):
    x, weight, state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dstate = _conv_backward(x, weight, state, cu_seqlens, dy, dend)
    return dx, dweight, dbias if ctx.has_bias else None, dstate, None


_conv.register_autograd(_gradients, setup_context=_save)


def conv_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `conv`: multiply-adds over blocks of tokens, one for each tap."""
    if state is None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
    if x.shape[1] == 1 and cu_seqlens is None:
        y, state = conv_step(x[:, 0], weight, bias, state)
        return y.unsqueeze(1), state
    return _conv(x, weight, bias, state.to(x.dtype), cu_seqlens)


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
    Precision: products are summed in float32 (float64 for float64 inputs), y in x's dtype.
    Raises: ValueError, TypeError for shapes or dtypes that do not fit.
    Source: the short convolution of H3 (arXiv 2212.14052) and Mamba (arXiv 2312.00752).
    """
    check_floating(x=x, weight=weight, bias=bias, state=state)
    check_shape("x", x, (None, None, weight.shape[0]), "[B, T, E]")
    check_shape("weight", weight, (None, None), "[E, W]")
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, weight.shape[1] - 1, x.shape[2]), "[rows, W - 1, E]")
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    forms = {"reference": conv_reference, "torch": conv_chunked, "triton": conv_fused}
    run = choose("conv", x, backend, forms, lambda: conv_fits(x, weight, bias))
    if run is conv_fused and x.shape[1] == 1 and cu_seqlens is None:
        run = conv_chunked
    return run(x, weight, bias, state=state, cu_seqlens=cu_seqlens)
