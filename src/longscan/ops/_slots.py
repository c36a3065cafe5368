"""What happens inside the chunks of `slots`, and the read of a fixed bank, without their scores.

Both are custom ops with a written-out backward, which go through their work in blocks that stay in
cache and compute again what autograd would keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers in one tensor of gates or scores of a block. On a CPU 1 MB of float32, measured; other
# devices want few large launches.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 22


def _blocks(rows: int, size: int, device: torch.device) -> Iterator[slice]:
    """Slices of `rows` rows of `size` numbers each."""
    step = max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // size)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


# ---------------------------------------------------------------------------------------------
# Chunks. Between a later token t and an earlier j slot m decays by 2^(b_tm - b_jm), which only
# between two neighbouring halves of 1, 2, 4, ... tokens factors through their border into two
# numbers <= 1 (see `_scores.vector_scores`).


@dataclass(frozen=True)
class _Level:
    """The decays between neighbouring halves of `half` tokens.

    late: from the border to each token of the second half [N, n, half, M]; early: from each token
    of the first half to the border; written: early * w.
    """

    half: int
    late: Tensor
    early: Tensor
    written: Tensor


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The first and the second halves [N, n, half, M] of x [N, C, M]."""
    first, second = x.unflatten(1, (-1, 2, half)).unbind(2)
    return first, second


def _corners(p: Tensor, half: int) -> Tensor:
    """The entries of p [N, C, C] that join a second half (rows) to its first: [N, n, half, half]"""
    pairs = p.unflatten(2, (-1, 2 * half)).unflatten(1, (-1, 2 * half))
    return pairs.diagonal(0, 1, 3).movedim(-1, 1)[:, :, half:, :half]


def _levels(b: Tensor, w: Tensor) -> list[_Level]:
    levels, half = [], 1
    while half < b.shape[1]:
        first, second = _halves(b, half)
        border = first[:, :, -1:]
        late, early = (second - border).exp2_(), (border - first).exp2_()
        levels.append(_Level(half, late, early, early * _halves(w, half)[0]))
        half *= 2
    return levels


def _sums(p: Tensor, w: Tensor, levels: list[_Level]) -> Tensor:
    """sum_{j <= t} p_tj w_jm 2^(b_tm - b_jm). Shapes: p [N, C, C]; w and result [N, C, M]."""
    out = w * p.diagonal(0, 1, 2).unsqueeze(-1)
    for level in levels:
        corner = _corners(p, level.half)
        cross = corner * level.written if level.half == 1 else corner @ level.written
        _halves(out, level.half)[1].addcmul_(cross, level.late)
    return out


def _sums_back(p: Tensor, x: Tensor, levels: list[_Level]) -> Tensor:
    """sum_{t >= j} p_tj x_tm 2^(b_tm - b_jm): what `_sums` sends back to w, x its gradient."""
    out = x * p.diagonal(0, 1, 2).unsqueeze(-1)
    for level in levels:
        corner, read = _corners(p, level.half), _halves(x, level.half)[1] * level.late
        cross = corner * read if level.half == 1 else corner.mT @ read
        _halves(out, level.half)[0].addcmul_(cross, level.early)
    return out


def _scores(x: Tensor, w: Tensor, levels: list[_Level]) -> Tensor:
    """sum_m x_tm w_jm 2^(b_tm - b_jm), zero for j > t. Shapes: x, w [N, C, M]; [N, C, C]."""
    c = x.shape[1]
    out = x.new_zeros(x.shape[0], c, c)
    out.diagonal(0, 1, 2).copy_((x * w).sum(-1))
    for level in levels:
        read = _halves(x, level.half)[1] * level.late
        if level.half == 1:
            cross = (read * level.written).sum(-1, keepdim=True)
        else:
            cross = read @ level.written.mT
        _corners(out, level.half).copy_(cross)
    return out


def _rows(at: slice, *tensors: Tensor) -> list[Tensor]:
    """Some of the chunks, [g, H, ...] -> [g H, ...]."""
    return [x[at].flatten(0, 1) for x in tensors]


@torch.library.custom_op("longscan::slots_inside", mutates_args=())
def slots_inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    entering: Tensor,
    bank: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """-> o, and if `keep` for the backward: the slots' logits less the bank's, tokens' weights.

    Shapes: q, k [G, H, C, K]; v, o [G, H, C, V]; w, b [G, H, C, M], b from `_scores.cumulative`;
    entering [G, H, M, K + V], bank [H, M, K + V]; kept [G, H, C, M] and [G, H, C, C].
    """
    d = q.shape[-1]
    inputs = (q, k, v, w, b, entering)
    g, h, c, m = w.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    logits, weights = (w.new_empty(g if keep else 0, h, c, n) for n in (m, c))
    for at in _blocks(g, h * c * m, q.device):
        q, k, v, w, b, s = _rows(at, *inputs)
        levels, since = _levels(b, w), b.exp2()
        logit = (q @ s[..., :d].mT).mul_(since).add_(_sums(q @ k.mT, w, levels))
        fixed = None if bank is None else bank.repeat(o[at].shape[0], 1, 1)
        p = (logit if fixed is None else logit.baddbmm(q, fixed[..., :d].mT)).softmax(-1)
        weight = _scores(p, w, levels)
        (out,) = _rows(at, o)
        torch.bmm(weight, v, out=out)
        if fixed is not None:
            out.baddbmm_(p, fixed[..., d:])
        out.baddbmm_(p.mul_(since), s[..., d:])
        if keep:
            logits[at], weights[at] = (x.unflatten(0, (-1, h)) for x in (logit, weight))
    return [o, logits, weights]


@slots_inside.register_fake
def _(q, k, v, w, b, entering, bank, keep):
    g, h, c, m = w.shape
    return [v.new_empty(v.shape), *(w.new_empty(g if keep else 0, h, c, n) for n in (m, c))]


@torch.library.custom_op("longscan::slots_inside_backward", mutates_args=())
def _inside_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    entering: Tensor,
    bank: Tensor | None,
    logits: Tensor,
    weights: Tensor,
    do: Tensor,
) -> list[Tensor]:
    """Gradients of the tensors given among the first seven, from that of o.

    b needs no sums of its own: where t reads j the decay grows with b_t, as the reader, and falls
    with b_j, as the writer, so db_t is reader times its gradient less writer times its gradient.
    """
    d = q.shape[-1]
    inputs = (q, k, v, w, b, entering)
    grads = [x.new_empty(x.shape) for x in inputs]
    d_bank = None if bank is None else torch.zeros_like(bank)
    saved = (*inputs, logits, weights, do)
    g, h, c, m = w.shape
    for at in _blocks(g, h * c * m, q.device):
        q, k, v, w, b, s, logit, weight, do = _rows(at, *saved)
        dq, dk, dv, dw, db, ds = _rows(at, *grads)
        levels, since = _levels(b, w), b.exp2()
        fixed = None if bank is None else bank.repeat(grads[0][at].shape[0], 1, 1)
        p = (logit if fixed is None else logit.baddbmm(q, fixed[..., :d].mT)).softmax(-1)
        # The read of the values.
        torch.bmm(weight.mT, do, out=dv)
        d_weight = do @ v.mT
        dp = (do @ s[..., d:].mT).mul_(since).add_(_sums(d_weight, w, levels))
        dw.copy_(_sums_back(d_weight, p, levels))
        ds[..., d:] = (p * since).mT @ do
        torch.mul(p, dp, out=db)
        if fixed is not None:
            dp.baddbmm_(do, fixed[..., d:].mT)
        # The softmax, and the read of the keys.
        d_logit = dp.mul_(p)
        d_logit.addcmul_(p, d_logit.sum(-1, keepdim=True), value=-1)
        products = q @ k.mT
        d_products = _scores(d_logit, w, levels)
        dw += _sums_back(products, d_logit, levels)
        torch.bmm(d_products, k, out=dq)
        torch.bmm(d_products.mT, q, out=dk)
        if fixed is not None and d_bank is not None:
            dq.baddbmm_(d_logit, fixed[..., :d])
            sent = torch.cat([d_logit.mT @ q, p.mT @ do], -1)
            d_bank += sent.unflatten(0, (-1, h)).sum(0)
        db.addcmul_(d_logit, logit).addcmul_(dw, w, value=-1).mul_(math.log(2))
        d_logit *= since
        ds[..., :d] = d_logit.mT @ q
        dq.baddbmm_(d_logit, s[..., :d])
    return grads if d_bank is None else [*grads, d_bank]


@_inside_backward.register_fake
def _(q, k, v, w, b, entering, bank, logits, weights, do):
    inputs = (q, k, v, w, b, entering, bank)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _save_inside(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.set_materialize_grads(False)  # what is only kept for the backward has no gradient


def _inside_gradients(ctx, grads: list[Tensor]):
    if grads[0] is None:
        return (None,) * 8
    found = _inside_backward(*ctx.saved_tensors, grads[0].contiguous())
    return *found, *(None,) * (8 - len(found))


slots_inside.register_autograd(_inside_gradients, setup_context=_save_inside)


# ---------------------------------------------------------------------------------------------
# A bank that nothing writes.


@torch.library.custom_op("longscan::slots_read", mutates_args=())
def read_fixed(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q keys^T) values. Shapes: q [N, H, K]; keys [H, M, K]; values [H, M, V]."""
    heads, m = keys.shape[:2]
    o = q.new_empty(q.shape[0], heads, values.shape[-1])
    for at in _blocks(q.shape[0], heads * m, q.device):
        p = (q[at].transpose(0, 1) @ keys.mT).softmax(-1)
        o[at] = (p @ values).transpose(0, 1)
    return o


@read_fixed.register_fake
def _(q, keys, values):
    return q.new_empty(q.shape[0], keys.shape[0], values.shape[-1])


@torch.library.custom_op("longscan::slots_read_backward", mutates_args=())
def _read_backward(
    q: Tensor, keys: Tensor, values: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkeys, dvalues = (x.new_zeros(x.shape) for x in (keys, values))
    for at in _blocks(q.shape[0], keys.shape[0] * keys.shape[1], q.device):
        x, g = q[at].transpose(0, 1), do[at].transpose(0, 1)
        p = (x @ keys.mT).softmax(-1)
        ds = (g @ values.mT).mul_(p)
        ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
        dq[at] = (ds @ keys).transpose(0, 1)
        dkeys.baddbmm_(ds.mT, x)
        dvalues.baddbmm_(p.mT, g)
    return dq, dkeys, dvalues


@_read_backward.register_fake
def _(q, keys, values, do):
    return q.new_empty(q.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _save_read(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _read_gradients(ctx, do: Tensor):
    return _read_backward(*ctx.saved_tensors, do)


read_fixed.register_autograd(_read_gradients, setup_context=_save_read)
