"""Softmax attention over shards: keys and values of the ranks before are gathered (LASP-2H)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.ops._cache import counts, with_counts
from longscan.parallel.halo import tied
from longscan.parallel.halo import window as tokens_before
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel.shards import Shards

Attend = Callable[[Tensor, Tensor, Tensor, State | None, Tensor | None], tuple[Tensor, State]]
"""(q, k, v, state, cu_seqlens) -> (o, state): attention of whole sequences."""


def gathered_attention(
    shards: Shards,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    state: State | None,
    attend: Attend,
) -> tuple[Tensor, State]:
    """`ops.attention` of the local queries to all keys of their sequences.

    Forward one all-gather of keys and values (heads not repeated), backward one reduce-scatter of
    their gradients; with a window only its tokens are sent.
    Source: LASP-2H (arXiv 2502.07563, section 3.4).
    """
    kv, heads, wide = torch.cat([k, v], -1).flatten(2), k.shape[2], k.shape[3] + v.shape[3]
    first = None if state is None else (state.select(slice(0, 1)) if shards.packed else state)
    if window is not None:
        past, kv = _near(shards, kv, window - 1, first, heads)
    else:
        past, kv = _all(shards, kv)
    k, v = kv.unflatten(-1, (heads, wide)).split([k.shape[3], v.shape[3]], -1)
    if shards.continues:
        past_k, past_v = past.unflatten(-1, (heads, wide)).split([k.shape[3], v.shape[3]], -1)
        first = _entering(shards, past_k, past_v, first, window)
    rows = len(shards.local) - 1
    if not shards.packed or rows == 1:
        return attend(q, k, v, first, None)
    # The first sequence alone: only it has tokens on other ranks.
    cut = shards.local[1]
    o, after = attend(q[:, :cut], k[:, :cut], v[:, :cut], first, None)
    rest = None if state is None else state.select(slice(1, None))
    bounds = torch.tensor([x - cut for x in shards.local[1:]], device=q.device)
    others, last = attend(q[:, cut:], k[:, cut:], v[:, cut:], rest, bounds)
    return torch.cat([o, others], 1), State.cat([after, last])


def _entering(
    shards: Shards, k: Tensor, v: Tensor, state: State | None, window: int | None
) -> State:
    """What the first local sequence remembers: what was given at its start, and what came."""
    rows = k.shape[0]
    if state is None:
        seen = [shards.before] * rows
        length = torch.tensor(seen, device=k.device)
    else:
        seen, length = counts(state), state.tensor("length")
        if window is None:  # windows hold what was given already
            k = torch.cat([state.tensor("k").to(k.dtype), k], 1)
            v = torch.cat([state.tensor("v").to(v.dtype), v], 1)
    return State(k=k, v=v, length=with_counts(length, seen))


def _near(
    shards: Shards, kv: Tensor, n: int, state: State | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of the n tokens before, zeros where there are none."""
    given = None
    if state is not None:
        given = torch.cat([state.tensor("k"), state.tensor("v")], -1).flatten(2)[:, -n:]
        given = torch.nn.functional.pad(given, (0, 0, n - given.shape[1], 0))
    if given is not None and shards.packed:
        rows = len(shards.local) - 1
        given = torch.cat([given, given.new_zeros(rows - 1, *given.shape[1:])])
    if n == 0:
        return kv[:, :0], kv
    last = shards.last
    tail = kv[:, max(last.start, last.stop - n) : last.stop]
    past = tokens_before(shards, tail, n, given)[: 1 if shards.packed else None]
    return past, kv if shards.continues else tied(kv, past)


def _all(shards: Shards, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the first local sequence on the ranks before [B, P, D], and kv itself."""
    return _Gathered.apply(shards, kv)  # type: ignore[return-value]


def _places(shards: Shards) -> list[tuple[int, int, int]]:
    """(rank, from, to): which tokens of which ranks lie before the first local sequence."""
    if not shards.continues:
        return []
    rank, start = shards.wire.rank, shards.low - shards.before
    return [
        (r, max(start, a) - a, b - a)
        for r, (a, b) in enumerate(zip(shards.bounds, shards.bounds[1:], strict=False))
        if r < rank and b > start
    ]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, kv: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shards = shards

        def work(kv: Tensor) -> Tensor:
            mine = kv.new_zeros(max(shards.lengths), kv.shape[0], kv.shape[2])
            mine[: shards.length] = kv.transpose(0, 1)
            everyone = shards.wire.gather(mine, "keys and values")
            parts = [everyone[r, a:b] for r, a, b in _places(shards)]
            return torch.cat([everyone[0, :0], *parts]).transpose(0, 1)

        return shards.wire.run(work, kv), kv.view_as(kv)

    @staticmethod
    def backward(ctx, d: Tensor, dkv: Tensor):  # type: ignore[override]
        shards = ctx.shards

        def work(d: Tensor) -> Tensor:
            wide = d.new_zeros(shards.wire.size, max(shards.lengths), d.shape[0], d.shape[2])
            at = 0
            for r, a, b in _places(shards):
                wide[r, a:b] = d[:, at : at + b - a].transpose(0, 1)
                at += b - a
            found = shards.wire.reduce(wide, "gradients of keys and values")
            return found[: shards.length].transpose(0, 1)

        return None, dkv + shards.wire.run(work, d)
