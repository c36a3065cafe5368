"""How `memory` sees its tokens: cut into chunks, wherever in one each row begins."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.ops._layout import Layout, check_cu_seqlens, layout
from longscan.ops._memory_net import Coefficients, coefficients
from longscan.ops._scores import cumulative


class Tokens(NamedTuple):
    """What chunks need to know of their tokens, [G, H, C, ...] step by step, or [N, C, ...].

    q, k, v as in `memory`; delta [.., C, 1 or V] or None; eta, and cumulative logarithms (base 2)
    of retention b and momentum mu (or None), [.., C], or [.., D, C] with gates per channel;
    valid [.., C], whether a slot holds a token; fresh [.., 1, 1], whether the chunk begins with
    the first of its slots that holds one; both None if all do. The rest are the coefficients, if
    gates are per head: [.., C, C] numbers per channel are better made one chunk at a time.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor | None
    eta: Tensor
    b: Tensor | None
    mu: Tensor | None
    valid: Tensor | None
    fresh: Tensor | None
    d: Tensor | None = None
    beta: Tensor | None = None
    f: Tensor | None = None
    w: Tensor | None = None
    s: Tensor | None = None

    def coefficients(self) -> Coefficients:
        if self.d is not None and self.beta is not None:
            return Coefficients(self.d, self.beta, self.f, self.w, self.s)
        valid = None if self.valid is None else self.valid.unsqueeze(-2)
        return coefficients(self.eta, self.b, self.mu, valid)


def ages(
    rows: int, length: int, cu_seqlens: Tensor | None, age: Tensor | None, device: torch.device
) -> Tensor:
    """How many tokens into its first chunk every row has come."""
    if cu_seqlens is None:
        tokens = torch.full((rows,), length, device=device)
    else:
        tokens = cu_seqlens.diff().to(device, torch.int64)
    return tokens if age is None else age + tokens


def plan(
    batch: int, length: int, chunk: int, cu_seqlens: Tensor | None, age: Tensor | None
) -> Layout:
    """Chunks of every sequence; a row that begins `age` tokens into one leaves that room.

    Ages are not read, which would make a device wait: each row gets chunks enough for any age,
    and its last one may be empty.
    """
    if age is None or chunk == 1:
        return layout(batch, length, chunk, cu_seqlens)
    if cu_seqlens is None:
        if length == 1:
            return layout(batch, 1, 1, None)
        bounds = [i * length for i in range(batch + 1)]
    else:
        bounds = check_cu_seqlens(cu_seqlens, batch, length)
    starts = torch.tensor(bounds[:-1])
    lengths = torch.tensor(bounds).diff()
    steps = (lengths + 2 * chunk - 2) // chunk
    order = torch.argsort(steps, descending=True, stable=True)
    counts = [int((steps > i).sum()) for i in range(int(steps.max()))]
    step = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    row = order[torch.cat([torch.arange(n) for n in counts])]
    inverse = torch.argsort(order)
    offset = step[:, None] * chunk + torch.arange(chunk)
    token_row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    token = torch.arange(bounds[-1]) - starts[token_row]
    first = torch.tensor([0, *accumulate(counts)])
    place = (offset, row, starts, lengths, token_row, token, first, inverse, order)
    offset, row, starts, lengths, token_row, token, first, inverse, order = (
        t.to(age.device) for t in place
    )
    offset = offset - age[row, None]
    inside = (offset >= 0) & (offset < lengths[row, None])
    index = torch.where(inside, starts[row, None] + offset, bounds[-1]).flatten()
    token = token + age[token_row]
    back = (first[token // chunk] + inverse[token_row]) * chunk + token % chunk
    return Layout(1, bounds[-1], chunk, len(lengths), counts, index, back, order, inverse)


def _split(plan: Layout, x: Tensor) -> Tensor:
    """[B, T, ...] -> [G, C, ...]"""
    return plan.split(x if plan.index is None else x.reshape(1, -1, *x.shape[2:]))


def join(plan: Layout, x: Tensor, batch: int) -> Tensor:
    """[G, C, ...] -> [B, T, ...]"""
    x = plan.join(x)
    return x if plan.index is None else x.view(batch, -1, *x.shape[2:])


def tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_a: Tensor | None,
    delta: Tensor | None,
    log_mu: Tensor | None,
    plan: Layout,
    age: Tensor | None,
) -> Tokens:
    """The tokens of all chunks, with what follows from their gates."""
    gates = [eta, log_a, log_mu]
    wide = [x.shape[3] for x in gates if x is not None and x.ndim == 4]
    channels = wide[0] if wide else 0
    if channels:
        gates = [
            x if x is None else (x.unsqueeze(-1) if x.ndim == 3 else x).expand(-1, -1, -1, channels)
            for x in gates
        ]
    # [G, C, H] -> [G, H, C] and [G, C, H, D] -> [G, H, D, C]
    step, *logs = (None if x is None else _split(plan, x).movedim(1, -1) for x in gates)
    assert step is not None
    b, mu = (None if x is None else cumulative(x, -1) for x in logs)
    valid = fresh = None
    heads = v.shape[2]
    if plan.chunk * sum(plan.counts) != v.shape[0] * v.shape[1] and (
        age is not None or mu is not None
    ):
        ones = torch.ones(*v.shape[:2], 1, dtype=torch.bool, device=v.device)
        valid = _split(plan, ones).squeeze(-1).unsqueeze(1).expand(-1, heads, -1)
    if age is not None and valid is not None:
        fresh = valid[..., :1, None]  # a chunk that begins later is a running one, or is empty
    elif age is not None and plan.chunk == 1:
        fresh = (age == 0).view(-1, 1, 1, 1).expand(-1, heads, -1, -1)
    if delta is not None:
        delta = _split(plan, delta if delta.ndim == 4 else delta.unsqueeze(-1)).transpose(1, 2)
    q, k, v = (_split(plan, x).transpose(1, 2).contiguous() for x in (q, k, v))
    x = Tokens(q, k, v, delta, step, b, mu, valid, fresh)
    if channels:
        return x
    return x._replace(**coefficients(step, b, mu, valid)._asdict())
