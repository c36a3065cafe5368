"""The fast form of `slstm`: a loop over time in each direction, with a written-out backward.

The recurrence is not linear, so tokens must follow one another. What can be done is to make a
step cheap: a few kernels into memory that is already there, and no graph. Rows of a batch and
packed sequences advance side by side, longest first, so that the rows still running are always a
prefix. What does not wait for the step before is done for a block of steps at once.

The backward uses that c_t and n_t are exp(-m_t) times numbers that do not depend on m at all.
With e_t = dm_t - c_t dc_t - n_t dn_t, the part of a gradient that sees m itself,

    dc_{t-1} = f' dc_t,   dn_{t-1} = f' dn_t
    d log f_t = f' (c_{t-1} dc_t + n_{t-1} dn_t)    (+ e_t, and e_{t-1} = e_t, if i' < 1)
    d i_t     = i' (z_t dc_t + dn_t)                (+ e_t, and e_{t-1} = 0,   otherwise)

which is what autograd makes of the definition, without its branches. y does not see m: e is zero
unless a gradient comes in through the final state.

Layout inside: steps S, heads N, rows R, channels D; one step of the gates is [N, R, 4 D].
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._layout import Layout, layout

# Numbers in one [S, N, R, D] tensor of a block. On a CPU 256 KB of float32, measured; other
# devices want few large launches.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ELSEWHERE = 1 << 24

# What the forward keeps of a token: i', f', c, n, sigmoid(o), log sigmoid(f), tanh(z).
_KEPT = 7


class _Block(NamedTuple):
    """Steps `first` and on of the first `rows` rows; its tokens begin at `at`, step by step."""

    first: int
    steps: int
    rows: int
    at: int


def _plan(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Layout, list[_Block]]:
    """The order of tokens x [B, T, N, D], and blocks of steps with a constant number of rows."""
    plan = layout(x.shape[0], x.shape[1], 1, cu_seqlens)
    enough = _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE)
    blocks: list[_Block] = []
    first = at = 0
    for rows, run in groupby(plan.counts):
        left = len(list(run))
        most = max(1, enough // (rows * x.shape[2] * x.shape[-1]))
        while left:
            steps = min(left, most)
            blocks.append(_Block(first, steps, rows, at))
            first, at, left = first + steps, at + steps * rows, left - steps
    return plan, blocks


def _sorted(x: Tensor, plan: Layout) -> Tensor:
    """Packed tokens [1, T, ...] step by step; the rows of a batch stay as they are."""
    return x if plan.index is None else x[:, plan.index]


def _unsorted(x: Tensor, plan: Layout) -> Tensor:
    """The inverse of `_sorted`."""
    return x if plan.back is None else x[:, plan.back]


def _of(x: Tensor, plan: Layout, block: _Block) -> Tensor:
    """A view of the block's tokens in what `_sorted` made: [S, N, R, ...]."""
    if plan.index is None:
        return x[:, block.first : block.first + block.steps].movedim(0, 2)
    tokens = x[0, block.at : block.at + block.steps * block.rows]
    return tokens.unflatten(0, (block.steps, block.rows)).transpose(1, 2)


def _kept_of(kept: Tensor, block: _Block, heads: int, d: int) -> Tensor:
    """The block's part of what the forward keeps: [S, 7, N, R, D]."""
    tokens = kept[block.at : block.at + block.steps * block.rows]
    return tokens.view(block.steps, _KEPT, heads, block.rows, d)


def _heads_first(state: Tensor, plan: Layout) -> Tensor:
    """States of the caller [R, 4, N, D] -> a copy [4, N, R, D] in the layout's order of rows."""
    return plan.rows_in(state).permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)


def _rows_first(state: Tensor, plan: Layout) -> Tensor:
    """The inverse of `_heads_first`."""
    return plan.rows_out(state.permute(2, 0, 1, 3)).contiguous()


@torch.library.custom_op("longscan::slstm", mutates_args=())
def _forward(
    gates: Tensor, r: Tensor, bias: Tensor, state: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gates [B, T, N, 4 D], r [N, D, 4 D], bias [N, 4 D], state [rows, 4, N, D]
    -> y [B, T, N, D], the final state, what the backward reads [tokens, 7 N D]."""
    heads, d = r.shape[:2]
    y = gates.new_empty(*gates.shape[:3], d)
    plan, blocks = _plan(y, cu_seqlens)
    kept = y.new_empty(y.shape[0] * y.shape[1] if keep else 0, _KEPT * heads * d)
    gates = _sorted(gates, plan)
    now = _heads_first(state, plan)
    for block in blocks:
        given, out = _of(gates, plan, block), _of(y, plan, block)
        parts = _kept_of(kept, block, heads, d) if keep else None
        running = now[:, :, : block.rows]
        running.copy_(_steps(given, r, bias, running, parts, out, not block.first))
    return _unsorted(y, plan), _rows_first(now, plan), kept


def _steps(
    given: Tensor, r: Tensor, bias: Tensor, state: Tensor, kept: Tensor | None, ys: Tensor,
    first: bool,
) -> Tensor:  # fmt: skip
    """Walk through a block: fill `ys` and, if given, `kept`; -> the state behind it.

    Shapes: given [S, N, R, 4 D]; state [4, N, R, D]; kept [S, 7, N, R, D]; ys [S, N, R, D].
    """
    # All steps use the same memory: it stays in cache, and views of it are made once.
    heads, rows, d = state.shape[1:]
    product, slots = state.new_empty(heads, rows, 4 * d), state.new_ones(_KEPT + 1, heads, rows, d)
    raw = product.view(heads, rows, 4, d).permute(2, 0, 1, 3)
    raw_i, raw_f, raw_z, raw_o = raw.unbind(0)
    raw_if, gains, cell, write, keep = raw[:2], slots[:2], slots[2:4], slots[6:], slots[:_KEPT]
    i, f, c, n, o, log_f, z, _ = slots.unbind(0)  # the last is 1: what n is written
    y, m, b = state[0].clone(), state[3].clone(), bias.unsqueeze(1)
    cell.copy_(state[1:3])
    to_keep = [None] * len(ys) if kept is None else kept.unbind(0)
    for gates, out, to in zip(given.unbind(0), ys.unbind(0), to_keep, strict=True):
        torch.baddbmm(gates, y, r, out=product).add_(b)
        F.logsigmoid(raw_f, out=log_f)  # type: ignore[call-arg]
        torch.add(log_f, m, out=raw_f)
        torch.maximum(raw_i, raw_f, out=m)
        if first:  # nothing is remembered yet where n = 0, whatever m says
            torch.where(n == 0, raw_i, m, out=m)
            torch.minimum(raw_f, m, out=raw_f)
            first = False
        torch.sub(raw_if, m, out=gains).exp_()
        torch.tanh(raw_z, out=z)
        torch.sigmoid(raw_o, out=o)
        cell.mul_(f).addcmul_(i, write)
        torch.div(c, n, out=y).mul_(o)
        out.copy_(y)
        if to is not None:
            to.copy_(keep)
    return torch.stack([y, c, n, m])


@_forward.register_fake
def _(gates, r, bias, state, cu_seqlens, keep):
    heads, d = r.shape[:2]
    batch, length = gates.shape[:2]
    size = (batch * length if keep else 0, _KEPT * heads * d)
    y = gates.new_empty(batch, length, heads, d)
    return y, torch.empty_like(state), gates.new_empty(size)


@torch.library.custom_op("longscan::slstm_backward", mutates_args=())
def _backward(
    r: Tensor,
    state: Tensor,
    y: Tensor,
    final: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, r, bias and the initial state."""
    heads, d = r.shape[:2]
    plan, blocks = _plan(y, cu_seqlens)
    start = _heads_first(state, plan)
    if dstate is None:
        after, sees_m = torch.zeros_like(start), None
    else:
        after, end = _heads_first(dstate, plan), _heads_first(final, plan)
        sees_m = after[3] - end[1] * after[1] - end[2] * after[2]
    dy, dgates = _sorted(dy, plan), y.new_empty(*y.shape[:3], 4 * d)
    back = r.mT.contiguous()
    for k in range(len(blocks) - 1, -1, -1):
        block = blocks[k]
        parts = _kept_of(kept, block, heads, d)
        if k:
            before = _kept_of(kept, blocks[k - 1], heads, d)[-1, 2:4, :, : block.rows]
        else:
            before = start[1:3]
        extra = None if sees_m is None else _through_m(sees_m[:, : block.rows], parts)
        given, out = _of(dy, plan, block), _of(dgates, plan, block)
        _steps_back(parts, before, back, given, after[:3, :, : block.rows], extra, out)
    after[3] = start[1] * after[1] + start[2] * after[2]
    if sees_m is not None:
        after[3] += sees_m
    dgates = _unsorted(dgates, plan)
    y_before = torch.cat([y[:, :1], y[:, :-1]], 1)
    if cu_seqlens is None:
        y_before[:, 0] = state[:, 0]
    else:
        y_before[0, cu_seqlens[:-1]] = state[:, 0]
    ys, each = (x.flatten(0, 1).transpose(0, 1) for x in (y_before, dgates))
    return dgates, ys.mT @ each, each.sum(1), _rows_first(after, plan)


def _through_m(e: Tensor, kept: Tensor) -> Tensor:
    """Gradients of i and f [S, N, R, 2, D] through m; e [N, R, D] moves to the block's start.

    e passes through a step along the larger of i and f + m, which is where the gain is one.
    """
    stays = (kept[:, 0] < 1).to(e.dtype)
    right = torch.cat([torch.ones_like(stays[:1]), stays.flip(0)[:-1]]).cumprod(0).flip(0)
    es = e * right
    e.copy_(es[0] * stays[0])
    return torch.stack([es * (1 - stays), -es * stays * kept[:, 5].expm1()], 3)


def _steps_back(
    kept: Tensor, before: Tensor, back: Tensor, dys: Tensor, running: Tensor,
    extra: Tensor | None, dgates: Tensor,
) -> None:  # fmt: skip
    """Walk back through a block: fill `dgates`, move `running` to its start.

    Shapes: kept [S, 7, N, R, D]; before (c, n) [2, N, R, D]; back [N, 4 D, D]; dys [S, N, R, D];
    running (gradients of y, c, n) [3, N, R, D]; extra [S, N, R, 2, D]; dgates [S, N, R, 4 D].
    """
    i, f, c, n, o, log_f, z = kept.unbind(1)
    h = c / n
    to_o = h * (o - o * o)
    to_c = o / n
    to_cell = torch.stack([to_c, -to_c * h], 1)
    through_f = -f * log_f.expm1()  # f' sigmoid(-f)
    c_before, n_before = torch.cat([before.unsqueeze(0), kept[:-1, 2:4]]).unbind(1)
    of_c = torch.stack([i * z, through_f * c_before, i * (1 - z * z)], 3)
    of_n = torch.stack([i, through_f * n_before], 3)
    dcell, product = running[1:].clone(), torch.empty_like(dgates[0]).contiguous()
    dc, dn = dcell.unsqueeze(3).unbind(0)
    draw = product.unflatten(2, (4, -1))
    d_ifz, d_if, d_o = draw[:, :, :3], draw[:, :, :2], draw[:, :, 3]
    dy = dys[-1] + running[0]
    each = zip(*(x.unbind(0) for x in (f, to_cell, of_c, of_n, to_o, dgates)), strict=True)
    for t, (f_t, to_cell_t, of_c_t, of_n_t, to_o_t, out) in reversed(list(enumerate(each))):
        dcell.addcmul_(dy, to_cell_t)
        torch.mul(dc, of_c_t, out=d_ifz)
        d_if.addcmul_(dn, of_n_t)
        if extra is not None:
            d_if.add_(extra[t])
        torch.mul(dy, to_o_t, out=d_o)
        out.copy_(product)
        dcell.mul_(f_t)
        if t:
            torch.baddbmm(dys[t - 1], product, back, out=dy)
    running[0] = torch.bmm(product, back)
    running[1:] = dcell


@_backward.register_fake
def _(r, state, y, final, kept, cu_seqlens, dy, dstate):
    heads, d = r.shape[:2]
    dgates = y.new_empty(*y.shape[:3], 4 * d)
    return dgates, torch.empty_like(r), y.new_empty(heads, 4 * d), torch.empty_like(state)


def _save(ctx, inputs, output) -> None:
    _, r, _, state, cu_seqlens, _ = inputs
    ctx.save_for_backward(r, state, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dstate: Tensor | None, _):
    r, state, y, final, kept, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    return *_backward(r, state, y, final, kept, cu_seqlens, dy, dstate), None, None


_forward.register_autograd(_gradients, setup_context=_save)


def slstm_fast(
    gates: Tensor,
    r: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `slstm`: the same steps without a graph of them."""
    if state is None:
        rows = gates.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = gates.new_zeros(rows, 4, *r.shape[:2])
    inputs = (gates.flatten(3), r.flatten(2), bias.flatten(1), state)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final, _ = _forward(*inputs, cu_seqlens, keep)
    return y, final
