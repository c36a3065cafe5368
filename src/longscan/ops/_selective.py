"""The fast form of the selective scan in PyTorch.

Time is walked in blocks. Inside a block everything that is elementwise is done for all tokens at
once, in a workspace small enough for the cache; only h = a h + b goes token by token, one kernel
each. Channels lie last, so that every kernel runs along memory. Rows are independent: rows of a
batch and packed sequences advance together, longest first, so that the rows still running are
always a prefix. The forward keeps the state that enters each block, the backward computes the
block again: memory does not grow with N T.

Layout inside: tokens M = all tokens of all rows, G groups, F = E / G channels in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops._layout import check_cu_seqlens


@dataclass(frozen=True)
class _Block:
    """Some steps of some rows.

    index: where the tokens lie, step by step; runs: (steps, rows) with a constant number of rows;
    first: the first row; rows: how many rows enter; slot: where their states are kept.
    """

    index: Tensor | slice
    runs: list[tuple[int, int]]
    first: int
    rows: int
    slot: int

    @property
    def tokens(self) -> int:
        return sum(steps * rows for steps, rows in self.runs)


def _blocks(
    starts: list[int], lengths: list[int], steps: int, width: int, device: torch.device
) -> list[_Block]:
    """Cut rows, sorted by falling length, into blocks of at most `steps` steps of `width` rows."""
    blocks: list[_Block] = []
    slot = 0
    for first in range(0, len(lengths), width):
        ends = lengths[first : first + width]
        at = torch.tensor(starts[first : first + width])
        rows, t = len(ends), 0
        while rows:
            entering, stop, runs, parts = rows, t + steps, [], []
            begin = t
            while rows and t < stop:
                end = min(stop, ends[rows - 1])
                runs.append((end - t, rows))
                parts.append((torch.arange(t, end).unsqueeze(1) + at[:rows]).flatten())
                t = end
                while rows and ends[rows - 1] == t:
                    rows -= 1
            index = torch.cat(parts).to(device)
            if len(ends) == 1:  # tokens of one row lie together: views instead of copies
                index = slice(starts[first] + begin, starts[first] + t)
            blocks.append(_Block(index, runs, first, entering, slot))
            slot += entering
    return blocks


def _slots(tokens: int, rows: int, steps: int) -> int:
    """How many states enter blocks, at most: known without the lengths of the rows."""
    return rows + (tokens - rows) // steps


def _plan(
    u: Tensor, rows: int, cu_seqlens: Tensor | None, steps: int, width: int
) -> tuple[list[_Block], Tensor | None]:
    """The blocks of the tokens u [M, ...], and the order of rows in them (None: the caller's)."""
    tokens, device = u.shape[0], u.device
    if cu_seqlens is None:
        length = tokens // rows
        starts = [i * length for i in range(rows)]
        return _blocks(starts, [length] * rows, steps, width, device), None
    bounds = check_cu_seqlens(cu_seqlens, 1, tokens)
    lengths = [b - a for a, b in pairwise(bounds)]
    order = sorted(range(rows), key=lambda i: -lengths[i])
    starts, lengths = [bounds[i] for i in order], [lengths[i] for i in order]
    return _blocks(starts, lengths, steps, width, device), torch.tensor(order, device=device)


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _tiling(rows: int, numel: int, device: torch.device) -> tuple[int, int]:
    """Steps and rows of a block, measured: one step should feed all threads (elementwise kernels
    of PyTorch give each at least 2^15 numbers), three blocks of 4 MB should stay in cache. On a
    GPU, where a step is a launch, all rows take it together."""
    if device.type != "cpu":
        return max(16, min(256, 2**25 // (rows * numel))), rows
    width = min(rows, max(1, 2**15 * min(_threads(), 8) // numel))
    return min(256, max(16, 2**20 // (width * numel))), width


def _take(x: Tensor, index: Tensor | slice) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _put(x: Tensor, index: Tensor | slice, value: Tensor) -> None:
    if isinstance(index, slice):
        x[index] = value
    else:
        x.index_copy_(0, index, value)


def _spread(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """x_t[e] w_t[n] for every state. w [m, G, N] per token, or [1, G, N, F] for all tokens."""
    return torch.mul(x.unsqueeze(2), w if w.ndim == 4 else w.unsqueeze(-1), out=out)


def _gather(w: Tensor, h: Tensor) -> Tensor:
    """sum_n w_t[n] h_t[n, e], the adjoint of `_spread` in x. -> [m, G, F]"""
    if w.ndim == 4:
        return (w * h).sum(2)
    tokens, groups, n, width = h.shape
    w = w.to(h.dtype).reshape(tokens * groups, 1, n)
    return torch.bmm(w, h.view(tokens * groups, n, width)).view(tokens, groups, width)


def _recompute(
    u: Tensor, dt: Tensor, rate: Tensor, B: Tensor, h: Tensor, block: _Block, a: Tensor, b: Tensor
) -> Tensor:
    """Fill a with the decays of a block and b with its states; h enters. -> dt u"""
    torch.mul(dt.unsqueeze(2), rate, out=a)
    a.exp_() if a.is_complex() else a.exp2_()
    drive = dt * u
    _spread(drive, B, b)
    at = 0
    for steps, rows in block.runs:
        end = at + steps * rows
        parts = (x[at:end].unflatten(0, (steps, rows)).unbind(0) for x in (a, b))
        h = h[:rows]
        for decay, state in zip(*parts, strict=True):
            h = state.addcmul_(decay, h)
        at = end
    return drive


def base2(A: Tensor) -> Tensor:
    """Rates for exponentials to the base 2: PyTorch computes these three times faster."""
    return A if A.is_complex() else A * math.log2(math.e)


@torch.library.custom_op("longscan::selective", mutates_args=())
def _selective(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    steps: int,
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, dt [M, G, F]; A [G, N, F]; B, C [M, G, N] or [1, G, N, F]; state [rows, G, N, F].
    -> y [M, G, F], final state, states that enter blocks (if keep)."""
    blocks, order = _plan(u, state.shape[0], cu_seqlens, steps, width)
    size = max(block.tokens for block in blocks)
    buffers = state.new_empty(2, size, *A.shape)
    y = torch.empty_like(u)
    entered = state.new_empty(_slots(u.shape[0], state.shape[0], steps) if keep else 0, *A.shape)
    now = state.clone() if order is None else state[order]
    rate = base2(A)
    with torch.autocast(u.device.type, enabled=False):
        for block in blocks:
            i = block.index
            a, states = buffers[:, : block.tokens].unbind(0)
            h = now[block.first : block.first + block.rows]
            if keep:
                entered[block.slot : block.slot + block.rows] = h
            Bb, Cb = (w if w.ndim == 4 else _take(w, i) for w in (B, C))
            _recompute(_take(u, i), _take(dt, i), rate, Bb, h, block, a, states)
            out = _gather(Cb, states)
            _put(y, i, 2 * out.real if out.is_complex() else out)
            at = 0
            for count, rows in block.runs:
                at += count * rows
                h[:rows] = states[at - rows : at]
    if order is None:
        return y, now, entered
    return y, torch.empty_like(now).index_copy_(0, order, now), entered


@_selective.register_fake
def _(u, dt, A, B, C, state, cu_seqlens, steps, width, keep):
    slots = _slots(u.shape[0], state.shape[0], steps) if keep else 0
    return torch.empty_like(u), torch.empty_like(state), state.new_empty(slots, *A.shape)


@torch.library.custom_op("longscan::selective_backward", mutates_args=())
def _selective_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entered: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dstate: Tensor,
    steps: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and the initial state. With g_t = dL/dh_t, right to left:
    g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}."""
    blocks, order = _plan(u, dstate.shape[0], cu_seqlens, steps, width)
    size = max(block.tokens for block in blocks)
    buffers = dstate.new_empty(3, size, *A.shape)
    du, ddt = torch.empty_like(u), torch.empty_like(dt)
    dA, dB, dC = (torch.zeros_like(x) for x in (A, B, C))
    after = dstate.clone() if order is None else dstate[order]
    rate = base2(A)
    if A.is_complex():
        dy = 2 * dy
    with torch.autocast(u.device.type, enabled=False):
        for block in reversed(blocks):
            i = block.index
            a, h, g = buffers[:, : block.tokens].unbind(0)
            ub, dtb, dyb = (_take(x, i) for x in (u, dt, dy))
            Bb, Cb = (w if w.ndim == 4 else _take(w, i) for w in (B, C))
            enter = entered[block.slot : block.slot + block.rows]
            drive = _recompute(ub, dtb, rate, Bb, enter, block, a, h)
            a.conj_physical_()
            _spread(dyb, Cb.conj(), g)
            _walk_back(a, g, after[block.first : block.first + block.rows], block)
            # a <- conj(a_t h_{t-1}) g_t, the gradient of the exponent dt_t A.
            a.mul_(g)
            last, at = enter, 0
            for count, rows in block.runs:
                end = at + count * rows
                a[at : at + rows].mul_(last[:rows].conj())
                a[at + rows : end].mul_(h[at : end - rows].conj())
                last, at = h[end - rows : end], end
            ddrive = _gather(Bb.conj(), g).real
            _add(dB, i, g, drive)
            _add(dC, i, h.conj_physical_(), dyb)
            _put(du, i, ddrive * dtb)
            through = torch.mul(a, A.conj(), out=h).sum(2).real
            _put(ddt, i, torch.addcmul(through, ddrive, ub))
            dA += a.mul_(dtb.unsqueeze(2)).sum(0)
    if order is not None:
        after = torch.empty_like(after).index_copy_(0, order, after)
    return du, ddt, dA, dB, dC, after


def _walk_back(a: Tensor, g: Tensor, after: Tensor, block: _Block) -> None:
    """Carry gradients through a block: g in place, `after` from its right edge to its left."""
    at = block.tokens
    for steps, rows in reversed(block.runs):
        begin = at - steps * rows
        decays, grads = (x[begin:at].unflatten(0, (steps, rows)).unbind(0) for x in (a, g))
        x = grads[-1].add_(after[:rows])
        for t in range(steps - 2, -1, -1):
            x = grads[t].addcmul_(decays[t + 1], x)
        torch.mul(decays[0], x, out=after[:rows])
        at = begin


def _add(grad: Tensor, index: Tensor | slice, h: Tensor, x: Tensor) -> None:
    """Gradient of B or C from that of `_spread(x, w)`; h is used up."""
    h = h.mul_(x.unsqueeze(2))
    if grad.ndim == 4:
        part = h.sum(0, keepdim=True)
        grad += part if grad.is_complex() else part.real
    else:
        part = h.sum(-1)
        _put(grad, index, part if grad.is_complex() else part.real)


@_selective_backward.register_fake
def _(u, dt, A, B, C, entered, cu_seqlens, dy, dstate, steps, width):
    return tuple(torch.empty_like(x) for x in (u, dt, A, B, C, dstate))


def _save(ctx, inputs, output) -> None:
    u, dt, A, B, C, _, cu_seqlens, steps, width, _ = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[2], cu_seqlens)
    ctx.tiling, ctx.rows = (steps, width), output[1].shape[0]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dstate: Tensor | None, _):
    *inputs, cu_seqlens = ctx.saved_tensors
    u, A = inputs[0], inputs[2]
    dy = torch.zeros_like(u) if dy is None else dy
    dstate = A.new_zeros(ctx.rows, *A.shape) if dstate is None else dstate
    grads = _selective_backward(*inputs, cu_seqlens, dy, dstate, *ctx.tiling)
    return (*grads, None, None, None, None)


_selective.register_autograd(_gradients, setup_context=_save)


def selective_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `selective`: blocks of tokens, recomputed in the backward."""
    batch, length, channels = u.shape
    n = A.shape[1]
    groups = max([x.shape[2] for x in (B, C) if x.ndim == 4], default=1)
    width = channels // groups
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1

    def states_last(x: Tensor) -> Tensor:
        return x.unflatten(-2, (groups, width)).transpose(-1, -2).contiguous()

    def weights(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return states_last(x).unsqueeze(0)
        x = x.unsqueeze(2) if x.ndim == 3 else x
        return x.expand(-1, -1, groups, -1).flatten(0, 1)

    if state is None:
        h = A.new_zeros(rows, groups, n, width)
    else:
        h = states_last(state)
    u, dt = (x.unflatten(-1, (groups, width)).flatten(0, 1) for x in (u, dt))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (u, dt, A, B, C, h))
    y, h, _ = _selective(
        u, dt, states_last(A), weights(B), weights(C), h, cu_seqlens,
        *_tiling(rows, channels * n, u.device), keep,
    )  # fmt: skip
    return y.view(batch, length, channels), h.transpose(-1, -2).flatten(1, 2)
