"""Softmax attention over shards: keys and values of the ranks before are gathered (LASP-2H)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _cache
from longscan.ops._across import first_order_only
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
    their gradients; with a window only its tokens are sent. Late shards have more keys to look at
    than early ones: where one sequence spans all ranks, each of the later half lends its last
    queries to one of the earlier half, so that all have the same work.
    Source: LASP-2H (arXiv 2502.07563, section 3.4); lending as in DistFlashAttn (2310.03294).
    """
    kv, heads = torch.cat([k, v], -1).flatten(2), k.shape[2]
    sizes = [k.shape[3], v.shape[3]]

    def apart(x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = x.unflatten(-1, (heads, sum(sizes))).split(sizes, -1)
        return k, v

    first = None if state is None else (state.select(slice(0, 1)) if shards.packed else state)
    loan = Loan(shards) if window is None else None
    if window is not None:
        past, kv = _near(shards, kv, window - 1, state)
    else:
        past, kv = _Gathered.apply(shards, loan.upto if loan else shards.low, kv)  # type: ignore[misc]
    k, v = apart(kv)
    others = None
    if loan is not None and loan.tokens:
        # What is lent comes back made from all of these: so does its gradient, on both ranks.
        given = () if state is None else state.flatten().values()
        q, others = loan.queries(tied(q, kv, *(t for t in given if t.requires_grad)))
    own = first
    if shards.continues:
        near = past if window is not None else past[:, : shards.before]
        own = _remembered(shards, apart(near), first, shards.before, window)
    rows = len(shards.local) - 1
    cut = shards.local[1] if shards.packed else shards.length
    kept = min(cut, q.shape[1])
    o, after = attend(q[:, :kept], k[:, :kept], v[:, :kept], own, None)
    if loan is not None and loan.tokens:
        answer = None
        if loan.helps:
            assert others is not None
            at = past.shape[1] - loan.tokens
            theirs = _remembered(shards, apart(past[:, :at]), first, at, None)
            keys, values = apart(past[:, at:])
            answer, _ = attend(others, keys, values, theirs, None)
        o = loan.answered(o, answer, others)
        if not loan.helps:
            after = _cache.give(lambda: _whole(own, k, v))
    if rows == 1 or not shards.packed:
        return o, after
    # The first sequence went alone: only it has tokens on other ranks.
    bounds = torch.tensor([x - cut for x in shards.local[1:]], device=q.device)
    rest = None if state is None else state.select(slice(1, None))
    more, last = attend(q[:, cut:], k[:, cut:], v[:, cut:], rest, bounds)
    return torch.cat([o, more], 1), State.cat([after, last])


def _remembered(
    shards: Shards,
    kv: tuple[Tensor, Tensor],
    state: State | None,
    tokens: int,
    window: int | None,
) -> State:
    """What is known of the first local sequence before some token: k, v of its `tokens` tokens
    behind what was given at its start."""
    k, v = kv
    if state is not None and window is None:  # windows hold what was given already
        k = torch.cat([state.tensor("k").to(k.dtype), k], 1)
        v = torch.cat([state.tensor("v").to(v.dtype), v], 1)
    seen = [tokens] * len(k)
    if state is not None:  # its counts are those of the first local token
        seen = [n - shards.before + tokens for n in _cache.counts(state)]
    length = torch.tensor(seen, device=k.device)
    return State(k=k, v=v, length=_cache.with_counts(length, seen))


def _whole(state: State | None, k: Tensor, v: Tensor) -> State:
    """The cache behind all local tokens."""
    seen = [0] * len(k)
    if state is not None:
        k, v = torch.cat([state.tensor("k"), k], 1), torch.cat([state.tensor("v"), v], 1)
        seen = _cache.counts(state)
    n = k.shape[1] - (0 if state is None else state.tensor("k").shape[1])
    seen = [x + n for x in seen]
    return State(k=k, v=v, length=_cache.with_counts(torch.tensor(seen, device=k.device), seen))


class Loan:
    """Which queries of a later rank an earlier one answers: rank r and rank size - 1 - r together
    have as much work as any other two.

    tokens: how many, the last of the later shard; helps: whether this is the earlier rank; upto:
    the token of the row up to which this rank needs keys.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards, size, rank = shards, shards.wire.size, shards.wire.rank
        self.partner = size - 1 - rank
        self.helps, self.tokens, self.upto = rank < self.partner, 0, shards.low
        early, late = sorted((rank, self.partner))
        if size == 1 or early == late or len(shards.sequences) > 2:
            return
        work = [(a + b) * (b - a) / 2 for a, b in pairwise(shards.bounds)]
        much, end = (work[late] - work[early]) / 2, shards.bounds[late + 1]
        # The last x queries look at x end - x^2 / 2 keys.
        if much > 0:
            self.tokens = int(end - math.sqrt(end * end - 2 * much))
        if self.helps and self.tokens:
            self.upto = end

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The queries to answer first, and those lent (an empty tensor that stands for them) or
        borrowed."""
        if self.helps:
            size = (q.shape[0], self.tokens, *q.shape[2:])
            return q, _Borrow.apply(self, size, q)
        own, lent = q.split([q.shape[1] - self.tokens, self.tokens], 1)
        return own, _Lend.apply(self, lent)

    def answered(self, o: Tensor, answer: Tensor | None, lent: Tensor | None) -> Tensor:
        """The outputs of all local queries; the earlier rank sends those of borrowed ones."""
        if answer is not None:
            return _Lend.apply(self, answer, o)
        assert lent is not None
        size = (o.shape[0], self.tokens, *o.shape[2:])
        return torch.cat([o, _Borrow.apply(self, size, lent)], 1)


class _Lend(torch.autograd.Function):
    """Sends a tensor to the partner; backward receives its gradient. Returns `through`, or a token
    that whatever comes back must be made from."""

    @staticmethod
    def forward(ctx, loan: Loan, x: Tensor, through: Tensor | None = None) -> Tensor:
        ctx.loan, ctx.like, ctx.through = loan, x.shape, through is not None
        wire = loan.shards.wire

        def work(x: Tensor) -> None:
            wire.trade({loan.partner: x}, {}, "queries")

        loan.shards.over.later(wire.start(work, x.contiguous()))
        return x.new_empty(0) if through is None else through.view_as(through)

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        first_order_only()
        loan = ctx.loan
        found = _receive(loan, ctx.like, d)
        return None, found, d if ctx.through else None


class _Borrow(torch.autograd.Function):
    """Receives a tensor from the partner; backward sends its gradient. token: what was lent for it,
    or any tensor of the graph, without which autograd might not come by here."""

    @staticmethod
    def forward(ctx, loan: Loan, size: tuple[int, ...], token: Tensor) -> Tensor:
        ctx.loan, ctx.token = loan, token.numel() == 0
        return _receive(loan, size, token)

    @staticmethod
    def backward(ctx, d: Tensor):  # type: ignore[override]
        first_order_only()
        loan, wire = ctx.loan, ctx.loan.shards.wire

        def work(d: Tensor) -> None:
            wire.trade({loan.partner: d}, {}, "queries")

        loan.shards.over.later(wire.start(work, d.contiguous()))
        return None, None, d.new_zeros(0) if ctx.token else None


def _receive(loan: Loan, size: tuple[int, ...], like: Tensor) -> Tensor:
    wire = loan.shards.wire

    def work(like: Tensor) -> Tensor:
        into = like.new_empty(size)
        wire.trade({}, {loan.partner: into}, "queries")
        return into

    return wire.run(work, like)


def _near(shards: Shards, kv: Tensor, n: int, state: State | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the n tokens before, zeros where there are none; and kv."""
    if n == 0:
        return kv[:, :0], kv
    given, last = None, shards.last
    if state is not None:
        given = torch.cat([state.tensor("k"), state.tensor("v")], -1).flatten(2)[:, -n:]
        given = F.pad(given, (0, 0, n - given.shape[1], 0))
    tail = kv[:, max(last.start, last.stop - n) : last.stop]
    past = tokens_before(shards, tail, n, given)[: 1 if shards.packed else None]
    return past, kv if shards.continues else tied(kv, past)


def _places(shards: Shards, upto: int) -> list[tuple[int, int, int]]:
    """(rank, from, to): where the tokens of the first local sequence lie, up to one of the row."""
    start = shards.low - shards.before
    return [
        (r, max(start, a) - a, min(upto, b) - a)
        for r, (a, b) in enumerate(pairwise(shards.bounds))
        if a < upto and b > start
    ]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, upto: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the first local sequence up to a token [B, P, D], and kv itself."""
        ctx.shards, ctx.upto = shards, upto

        def work(kv: Tensor) -> Tensor:
            mine = kv.new_zeros(max(shards.lengths), kv.shape[0], kv.shape[2])
            mine[: shards.length] = kv.transpose(0, 1)
            everyone = shards.wire.gather(mine, "keys and values")
            parts = [everyone[r, a:b] for r, a, b in _places(shards, upto)]
            return torch.cat([everyone[0, :0], *parts]).transpose(0, 1)

        return shards.wire.run(work, kv), kv.view_as(kv)

    @staticmethod
    def backward(ctx, d: Tensor, dkv: Tensor):  # type: ignore[override]
        first_order_only()
        shards = ctx.shards

        def work(d: Tensor) -> Tensor:
            wide = d.new_zeros(shards.wire.size, max(shards.lengths), d.shape[0], d.shape[2])
            at = 0
            for r, a, b in _places(shards, ctx.upto):
                wide[r, a:b] = d[:, at : at + b - a].transpose(0, 1)
                at += b - a
            found = shards.wire.reduce(wide, "gradients of keys and values")
            return found[: shards.length].transpose(0, 1)

        return None, None, dkv + shards.wire.run(work, d)
