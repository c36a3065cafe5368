"""Parts of `longscan.ops.vq`: biases by distance, sums by code, one softmax over both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.state import State


@dataclass(frozen=True)
class Settings:
    """What `vq_attention` was asked for, beside the tensors of tokens."""

    block: int
    causal: bool
    cache_straight_through: bool
    carry_gradient: bool


def first_kept(length: int, block: int) -> int:
    """The first token in the window of token `length`; the tokens before it are in the cache."""
    return max(0, length // block - 1) * block


def log_counts(n: Tensor) -> Tensor:
    """log n without gradient, minus infinity for codes that no token has."""
    return n.detach().log()


def bias_by_pair(bias: Tensor, q_bias: Tensor | None, distance: Tensor, causal: bool) -> Tensor:
    """The bias of every pair: distance [I, J] -> [H or 1, I, J]; q_bias [I, H, K']."""
    index = distance if causal else distance + bias.shape[1] // 2
    there = (index >= 0) & (index < bias.shape[1])
    index = index.clamp(0, bias.shape[1] - 1)
    if q_bias is None:
        by_pair = bias[:, index]
    else:
        rows = torch.einsum("ihk,hdk->hid", q_bias, bias.expand(q_bias.shape[1], -1, -1))
        by_pair = rows.gather(-1, index.expand(rows.shape[0], -1, -1))
    return torch.where(there, by_pair, 0.0)


def window_bias(
    bias: Tensor, q_bias: Tensor | None, n: int, before: int, after: int, causal: bool
) -> Tensor:
    """The bias of n queries towards `before` keys, their own n and `after` keys behind these.

    Shapes: bias, q_bias [..., H, n, K'] as in `vq_attention`; result [..., H or 1, n, W] with
    W = before + n + after. Entries for keys to the right of a causal query are anything.
    Row t has the entry of distance before + t - c in column c: the rows are windows of one falling
    list of distances, each a place further to the left than the row above.
    """
    wide = before + n + after
    high = before + n - 1
    low = 0 if causal and q_bias is not None else 1 - n - after
    lowest = 0 if causal else -(bias.shape[1] // 2)
    highest = lowest + bias.shape[1] - 1
    # distances low..high, those without an entry at either end being zeros
    left, right = lowest - low, high - highest
    inner = (0, 0) * (bias.ndim - 2)
    if q_bias is None:
        row = F.pad(bias, (*inner, left, right)).flip(1)
        return row.unfold(-1, wide, 1).flip(-2)
    row = F.pad(bias, (*inner, min(left, 0), min(right, 0))).flip(1)
    rows = F.pad(q_bias @ row.mT, (max(right, 0), max(left, 0) + 1))
    step = rows.shape[-1] - 1
    return rows.flatten(-2)[..., n - 1 : n - 1 + n * step].unflatten(-1, (n, step))[..., :wide]


def sums_by_code(codes: Tensor, x: Tensor, size: int) -> Tensor:
    """The sum of the vectors of each code: codes [..., L], x [..., L, V] -> [..., S, V]."""
    if x.is_cuda:  # adding at an index there is not reproducible
        return F.one_hot(codes, size).to(x.dtype).mT @ x
    lead = codes.shape[:-1]
    at = torch.arange(lead.numel(), device=x.device)[:, None] * size
    index = (codes.reshape(lead.numel(), -1) + at).flatten()
    out = x.new_zeros(lead.numel() * size, x.shape[-1])
    return out.index_add(0, index, x.flatten(0, -2)).unflatten(0, (*lead, size))


@dataclass
class Sums:
    """What a cache sums up by code, n tokens and their values v. Axes [..., H, S].

    drift [..., K], drift_v [..., K, V]: sums of k - sg k and of its outer product with the value,
    None unless asked for: zeros with the gradient of exp(q . k) = exp(q . c) (1 + q . drift).
    """

    n: Tensor
    v: Tensor
    drift: Tensor | None = None
    drift_v: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.n, self.v, self.drift, self.drift_v) if x is not None]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sums:
        """Every tensor through `fn`."""
        return Sums(*map(fn, self.tensors()))

    def __add__(self, more: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self.tensors(), more.tensors(), strict=True)))

    def split(self, sizes: list[int]) -> list[Sums]:
        """Cut along the first axis."""
        parts = (x.split(sizes) for x in self.tensors())
        return [Sums(*x) for x in zip(*parts, strict=True)]

    @staticmethod
    def cat(parts: list[Sums]) -> Sums:
        """Joined along the first axis."""
        return Sums(*(torch.cat(x) for x in zip(*(p.tensors() for p in parts), strict=True)))

    @staticmethod
    def of_tokens(
        codes: Tensor, k: Tensor, v: Tensor, there: Tensor, size: int, drift: bool
    ) -> Sums:
        """Of tokens: codes, there [G, H, L], k, v [G, H, L, ...], zero where nothing is there."""
        n = sums_by_code(codes, there.unsqueeze(-1).to(v.dtype), size).squeeze(-1)
        sums = Sums(n, sums_by_code(codes, v, size))
        if drift:
            zero = (k - k.detach()) * there.unsqueeze(-1)
            outer = (zero.unsqueeze(-1) * v.detach().unsqueeze(-2)).flatten(-2)
            sums.drift = sums_by_code(codes, zero, size)
            sums.drift_v = sums_by_code(codes, outer, size).unflatten(-1, (k.shape[-1], -1))
        return sums

    @staticmethod
    def of_state(state: State) -> Sums:
        """That a state's counts and means stand for."""
        n, *drift = (state.tensor(x) for x in ENTRIES if x in state and x != "means")
        return Sums(n, n.detach().unsqueeze(-1) * state.tensor("means"), *drift)

    def to_state(self, before: State | None) -> dict[str, Tensor]:
        """As entries of a state; codes without tokens keep the mean that stood there before."""
        n, v, *drift = self.tensors()
        old = 0.0 if before is None else before.tensor("means")
        means = v / n.detach().clamp(min=1).unsqueeze(-1)
        means = torch.where(n.unsqueeze(-1) > 0, means, old)
        return dict(zip(ENTRIES, (n, means, *drift), strict=False))


ENTRIES = ("counts", "means", "drift_k", "drift_kv")
"""The entries of a state that describe its cache."""


def attend(
    q: Tensor,
    near: list[Tensor],
    values: list[Tensor],
    book: Tensor,
    cache: Sums | None,
    means: Tensor | None = None,
) -> Tensor:
    """One softmax over the window and the cache.

    Shapes: q [G, H, L, K]; near: scores [G, H, L, ...]; values, for each of these [G, H, ..., V];
    book [H, S, K]; cache [G, H, S, ...]. means [G, H, S, V]: its values, if they are at hand.
    """
    sizes = [x.shape[-1] for x in near]
    if cache is None:
        p = (near[0] if len(near) == 1 else torch.cat(near, -1)).softmax(-1)
        parts, far = p.split(sizes, -1), None
    else:
        scores = torch.einsum("ghlk,hsk->ghls", q, book) + log_counts(cache.n).unsqueeze(-2)
        p = torch.cat([*near, scores], -1).softmax(-1)
        *parts, far = p.split([*sizes, scores.shape[-1]], -1)
    o = parts[0] @ values[0]
    for a, x in zip(parts[1:], values[1:], strict=True):
        o = o + a @ x
    if cache is None or far is None:
        return o
    each = far / cache.n.detach().clamp(min=1).unsqueeze(-2)
    o = o + (each @ cache.v if means is None else far @ means)
    if cache.drift is None or cache.drift_v is None:
        return o
    # Both terms are zero; their gradients are not.
    total = torch.einsum("ghls,ghlk,ghsk->ghl", each, q, cache.drift)
    more = (each.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2) @ cache.drift_v.flatten(-3, -2)
    return (o + more) / (1 + total.unsqueeze(-1))


def running(blocks: Sums, start: Sums, counts: list[int]) -> Sums:
    """What the cache holds before each block, `start` and what earlier steps added."""
    now, out = start, []
    for more in blocks.split(counts):
        if more.n.shape[0] < now.n.shape[0]:
            now = now.map(lambda x, n=more.n.shape[0]: x[:n])
        out.append(now)
        now = now + more
    return Sums.cat(out)


def running_back(blocks: Sums, counts: list[int]) -> Sums:
    """The sum over the later steps of each block's sequence."""
    now, out = blocks.map(lambda x: torch.zeros_like(x[:0])), []
    for more in reversed(blocks.split(counts)):
        new = more.n.shape[0] - now.n.shape[0]
        if new:
            now = now.map(lambda x, n=new: torch.cat([x, x.new_zeros(n, *x.shape[1:])]))
        out.append(now)
        now = now + more
    return Sums.cat(out[::-1])
