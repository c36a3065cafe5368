"""The few tokens before a shard: what short convolutions and token shifts see of other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.ops._across import first_order_only

if TYPE_CHECKING:
    from longscan.parallel.shards import Shards


def window(shards: Shards, tail: Tensor, n: int, state: Tensor | None) -> Tensor:
    """The n tokens before each local sequence [rows, n, D]; zeros before a sequence begins.

    tail: the last of the local tokens, of the last local sequence and n at most [B, t, D]; state:
    the windows of local sequences, of which the first counts only if that sequence begins here.
    """
    rows = tail.shape[0] if not shards.packed else len(shards.local) - 1
    if state is None:
        state = tail.new_zeros(rows, n, tail.shape[2])
    state = state.to(tail.dtype)
    first = state[:1] if shards.packed else state
    if not _passes(shards, shards.wire.rank):  # the last sequence begins here
        begins = state[-1:] if shards.packed else state
        tail = torch.cat([begins, tail], 1)[:, -n:]
    entering = _Halo.apply(shards, n, tail, first)
    return entering if len(state) == len(entering) else torch.cat([entering, state[1:]])


def _passes(shards: Shards, rank: int) -> bool:
    return shards.forward.passes[rank]


def _pieces(shards: Shards, n: int) -> list[tuple[int, int, int, int]]:
    """(from rank, to rank, where in the window, how many): who sends the last so many of its
    tokens to whom. A window reaches over several ranks where shards are shorter than it."""
    out = []
    for rank, continues in enumerate(shards.forward.receives):
        need, source = n if continues else 0, rank - 1
        while need:
            whole = not _passes(shards, source)
            take = need if whole else min(need, shards.lengths[source])
            need -= take
            out.append((source, rank, need, take))
            source -= 1
    return out


def tied(x: Tensor, *others: Tensor) -> Tensor:
    """x, whose backward comes by that of others too: all ranks must take part in it."""
    return _Tied.apply(x, *others)  # type: ignore[return-value]


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        ctx.likes = [(t.shape, t.dtype, t.device) for t in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        first_order_only()
        return d, *(torch.zeros(n, dtype=t, device=at) for n, t, at in ctx.likes)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, n: int, tail: Tensor, first: Tensor) -> Tensor:
        ctx.shards, ctx.n, ctx.tail = shards, n, tail.shape
        rank, pieces = shards.wire.rank, _pieces(shards, n)

        def work(tail: Tensor) -> Tensor | None:
            sends = {to: tail[:, tail.shape[1] - c :] for s, to, _, c in pieces if s == rank}
            into = {
                s: tail.new_empty(tail.shape[0], c, tail.shape[2])
                for s, to, _, c in pieces if to == rank
            }  # fmt: skip
            shards.wire.trade(sends, into, "halo")
            if not shards.continues:
                return None
            return torch.cat([into[s] for s in sorted(into)], 1)

        found = shards.tape.through(lambda: shards.wire.run(work, tail))
        return first.clone() if found is None else found

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        first_order_only()
        shards, rank = ctx.shards, ctx.shards.wire.rank
        pieces = _pieces(shards, ctx.n)

        def work(d: Tensor) -> Tensor:
            sends = {s: d[:, at : at + c] for s, to, at, c in pieces if to == rank}
            into = {
                to: d.new_empty(d.shape[0], c, d.shape[2])
                for s, to, _, c in pieces if s == rank
            }  # fmt: skip
            shards.wire.trade(sends, into, "halo gradient")
            tail = d.new_zeros(ctx.tail)
            for part in into.values():
                tail[:, tail.shape[1] - part.shape[1] :] += part
            return tail

        return None, None, shards.wire.run(work, d), None if shards.continues else d
