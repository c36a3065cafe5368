"""The fast form of `longscan.ops.vq`: blocks of tokens side by side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops import _cache
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops._vq import (
    ENTRIES,
    Settings,
    Sums,
    attend,
    first_kept,
    running,
    running_back,
    window_bias,
)
from longscan.ops._vq_plan import even_plan, ragged_plan
from longscan.state import State


@dataclass(frozen=True)
class Tokens:
    """New tokens [B, T, H, ...]: q, k, v, codes, q_bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    codes: Tensor
    q_bias: Tensor | None

    def rows(self, count: int) -> Tokens:
        """As if packed sequences of equal length were a batch."""
        parts = (self.q, self.k, self.v, self.codes, self.q_bias)
        return Tokens(*(x if x is None else x.reshape(count, -1, *x.shape[2:]) for x in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Past:
    """What is known before the new tokens: rows' positions, and what a state remembers.

    k, v, codes [R, P, H, ...]: right-aligned, the last min(at, P) of a row valid; P = 0 and no
    state at the start of all sequences.
    """

    at: list[int]
    k: Tensor
    v: Tensor
    codes: Tensor
    state: State | None

    @staticmethod
    def read(state: State | None, rows: int, new: Tokens, block: int) -> Past:
        read = _cache.read(state, 2 * block, new.v.dtype)
        if read is None or state is None:
            k, v, codes = (
                x[:1, :0].expand(rows, -1, *x.shape[2:]) for x in (new.k, new.v, new.codes)
            )
            return Past([0] * rows, k, v, codes, None)
        codes = state.tensor("codes")
        codes = codes[:, codes.shape[1] - read.k.shape[1] :]
        return Past(read.counts, read.k, read.v, codes, state)

    @property
    def width(self) -> int:
        return self.k.shape[1]

    def cache(self, new: Tokens, size: int, drift: bool) -> Sums:
        """The sums by code of the tokens before the windows of the new ones' first."""
        if self.state is not None:
            return Sums.of_state(self.state)
        heads, d_key, d_value = *new.k.shape[2:], new.v.shape[-1]
        zeros = new.v.new_zeros(len(self.at), heads, size)
        shapes = [(), (d_value,), (d_key,), (d_key, d_value)]
        return Sums(*(zeros.new_zeros(*zeros.shape, *x) for x in shapes[: 4 if drift else 2]))


def vq_attention_blocks(
    q: Tensor,
    k_hat: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    q_bias: Tensor | None,
    settings: Settings,
    *,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The fast torch form of `vq_attention`: all blocks at once, caches by running sums."""
    shape, block = v.shape, settings.block
    new, sizes = Tokens(q, k_hat, v, codes, q_bias), [shape[1]] * shape[0]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, shape[0], shape[1])
        sizes = [b - a for a, b in pairwise(bounds)]
        if min(sizes) == max(sizes):
            new, cu_seqlens = new.rows(len(sizes)), None
    past = Past.read(state, len(sizes), new, block)
    if (
        settings.causal
        and cu_seqlens is None
        and max(a % block for a in past.at) + sizes[0] <= block
    ):
        o, after = _inside(new, past, codebook, bias, settings)
    else:
        o, after = _across(new, past, sizes, cu_seqlens, codebook, bias, settings)
    return o.reshape(shape), after


def _inside(
    new: Tokens, past: Past, book: Tensor, bias: Tensor | None, s: Settings
) -> tuple[Tensor, State]:
    """New tokens that lie in one block, in each row: then they have the same window."""
    block, n, width, device = s.block, new.q.shape[1], past.width, new.q.device
    keep = _cache.width(2 * block, width + n)
    keys, last_k = _cache.append(past.k if width else None, new.k, keep)
    values, last_v = _cache.append(past.v if width else None, new.v, keep)
    codes = torch.cat([past.codes, new.codes], 1) if width else new.codes
    before = [a - first_kept(a, block) for a in past.at]  # the window's tokens that are not new
    most = max(before)
    k, v = (x[:, width - most :].transpose(1, 2) for x in (keys, values))
    column = torch.arange(most + n, device=device)
    if not s.carry_gradient:
        begin = torch.tensor([most - a % block for a in past.at], device=device)
        own = (column >= begin[:, None])[:, None, :, None]
        k, v = (torch.where(own, x, x.detach()) for x in (k, v))
    q = new.q.transpose(1, 2)
    scores = q @ k.mT
    if bias is not None:
        q_bias = None if new.q_bias is None else new.q_bias.transpose(1, 2)
        scores = scores + window_bias(bias, q_bias, n, most, 0, True)
    if n > 1:
        scores = scores.masked_fill(column > column[most:, None], -torch.inf)
    if min(before) < most:
        begin = torch.tensor([most - b for b in before], device=device)
        scores = scores.masked_fill((column < begin[:, None])[:, None, None], -torch.inf)
    cache, means = None, None
    if past.state is not None and max(past.at) >= 2 * block:
        means = past.state.tensor("means")
        cache = Sums(past.state.tensor("counts"), means)
        if s.cache_straight_through:
            cache = Sums.of_state(past.state)
        if not s.carry_gradient:
            cache, means = cache.map(Tensor.detach), means.detach()
    o = attend(q, [scores], [v], book, cache, means).transpose(1, 2)
    seen = [a + n for a in past.at]

    def after() -> State:
        kept = {"k": last_k, "v": last_v, "codes": codes[:, width + n - keep :]}
        leave = [
            first_kept(b, block) > a - c for a, b, c in zip(past.at, seen, before, strict=True)
        ]
        if any(leave):
            index = torch.tensor([width - b for b in before], device=device)[:, None]
            index = (index + torch.arange(block, device=device)).clamp(max=width + n - 1)
            row = torch.arange(len(leave), device=device)[:, None]
            z, old_k, old_v = (x[row, index].transpose(1, 2) for x in (codes, keys, values))
            there = torch.tensor(leave, device=device)[:, None, None].expand(z.shape)
            old_v = torch.where(there.unsqueeze(-1), old_v, 0.0)
            more = Sums.of_tokens(z, old_k, old_v, there, book.shape[1], s.cache_straight_through)
            sums = past.cache(new, book.shape[1], s.cache_straight_through) + more
            cached = sums.to_state(past.state)
        elif past.state is not None:
            cached = {x: past.state.tensor(x) for x in ENTRIES if x in past.state}
        else:
            cached = past.cache(new, book.shape[1], s.cache_straight_through).to_state(None)
        length = _cache.with_counts(torch.tensor(seen, device=device), seen)
        return State(kept, **cached, length=length)

    return o, _cache.give(after)


def _across(
    new: Tokens,
    past: Past,
    sizes: list[int],
    cu_seqlens: Tensor | None,
    book: Tensor,
    bias: Tensor | None,
    s: Settings,
) -> tuple[Tensor, State]:
    """Sequences over any number of blocks."""
    block, size, drift, device = s.block, book.shape[1], s.cache_straight_through, new.v.device
    if cu_seqlens is None and len({a % block for a in past.at}) == 1:
        plan = even_plan(len(sizes), sizes[0], block, past.at, device)
    elif cu_seqlens is not None and past.state is None:
        plan = remembered(
            cu_seqlens, f"vq {block}", lambda: ragged_plan(sizes, past.at, 0, block, device)
        )
    else:
        plan = ragged_plan(sizes, past.at, past.width, block, device)
    q, steps = plan.split(new.q), len(plan.counts)
    k, v, z = (
        plan.window(plan.keys(x, y), s.causal)
        for x, y in ((new.k, past.k), (new.v, past.v), (new.codes, past.codes))
    )
    # what may be looked at: the keys that are there, and in its own block none to the right
    if s.causal:
        there = [(~plan.first)[:, None].expand(-1, block)]
        place = torch.arange(block, device=device)
        seen = [there[0][:, None, None], place <= place[:, None]]
    else:
        there = plan.window(plan.filled, False)
        seen = [x[:, None, None] for x in there]

    def caches() -> tuple[Sums, Sums]:
        """What leaves the window behind each block, and the cache that each block sees."""
        start = past.cache(new, size, drift)
        if plan.order is not None:
            start = start.map(lambda x: x[plan.order])
        leaving = summed(0)
        return leaving, running(leaving, start, plan.counts)

    def summed(i: int) -> Sums:
        return Sums.of_tokens(z[i], k[i], v[i], there[i][:, None].expand(z[i].shape), size, drift)

    made = caches() if steps > 2 or past.state is not None else None
    cache = None if made is None else made[1]
    if cache is not None and not s.causal:
        cache = cache + running_back(summed(2), plan.counts)
    near_k, near_v = k, v
    if not s.carry_gradient:
        near_k, near_v = ([x if i == 1 else x.detach() for i, x in enumerate(xs)] for xs in (k, v))
        cache = None if cache is None else cache.map(Tensor.detach)
    near = [q @ x.mT for x in near_k]
    if bias is not None:
        q_bias = None if new.q_bias is None else plan.split(new.q_bias)
        after = 0 if s.causal else block
        added = window_bias(bias, q_bias, block, block, after, s.causal).split(block, -1)
        near = [x + y for x, y in zip(near, added, strict=True)]
    near = [x.masked_fill(~y, -torch.inf) for x, y in zip(near, seen, strict=True)]
    o = plan.join(attend(q, near, near_v, book, cache), new.v.shape)
    if not s.causal:
        return o, State()

    def state() -> State:
        leaving, entering = made or caches()
        whole = plan.whole
        cached = entering.map(lambda x: x[plan.last]) + leaving.map(
            lambda x: torch.where(whole.view(-1, *[1] * (x.ndim - 1)), x[plan.last], 0.0)
        )
        ends = [a + n for a, n in zip(past.at, sizes, strict=True)]
        length = _cache.with_counts(torch.tensor(ends, device=device), ends)
        kept = _kept(new, past, sizes, cu_seqlens is not None, block)
        return State(kept, **cached.to_state(past.state), length=length)

    return o, _cache.give(state)


def _kept(new: Tokens, past: Past, sizes: list[int], packed: bool, block: int) -> dict[str, Tensor]:
    """The last tokens of each row, right-aligned: all that a later window may need."""
    pairs = {"k": (new.k, past.k), "v": (new.v, past.v), "codes": (new.codes, past.codes)}
    if not packed:
        keep = _cache.width(2 * block, past.width + sizes[0])
        out = {}
        for name, (x, y) in pairs.items():
            both = x if sizes[0] >= keep else torch.cat([y, x], 1)
            out[name] = both[:, both.shape[1] - keep :].contiguous()
        return out
    wide = past.width
    size, end = torch.tensor(sizes)[:, None], torch.tensor(sizes).cumsum(0)[:, None]
    valid = torch.tensor(past.at).clamp(max=wide)[:, None]
    keep = _cache.width(2 * block, int((size + valid).max()))
    ago, row = torch.arange(keep - 1, -1, -1), torch.arange(len(sizes))[:, None]
    total = sum(sizes)
    index = total + (row + 1) * wide - 1 - (ago - size)
    index = torch.where(ago < size, end - 1 - ago, index)
    index = torch.where(ago < size + valid, index, total + len(sizes) * wide).to(new.k.device)
    zero = {name: x.new_zeros(1, *x.shape[2:]) for name, (x, _) in pairs.items()}
    return {
        name: torch.cat([x[0], y.flatten(0, 1), zero[name]])[index]
        for name, (x, y) in pairs.items()
    }
