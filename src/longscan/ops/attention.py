"""Causal softmax attention, whole or in a sliding window, with its keys and values as a state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from longscan.ops import _across, _cache
from longscan.ops._check import check_floating, check_shape, compute_dtype
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops.dispatch import choose
from longscan.state import State

# Queries that meet a cache together: bounds the mask to so many rows.
_QUERIES = 512


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition of `attention`: a loop over sequences and query positions."""
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
        spans = [(0, a, b) for a, b in pairwise(bounds)]
    out, keys, values, seen = [], [], [], []
    for row, (b, start, end) in enumerate(spans):
        ks, vs, before = k[b, start:end], v[b, start:end], 0
        if state is not None:
            before = int(state.tensor("length")[row])
            old = max(0, state.tensor("k").shape[1] - before)
            ks = torch.cat([state.tensor("k")[row, old:], ks])
            vs = torch.cat([state.tensor("v")[row, old:], vs])
        for i in range(start, end):
            last = len(ks) - (end - 1 - i)
            near = slice(0 if window is None else max(0, last - window), last)
            kn, vn = ks[near].repeat_interleave(group, 1), vs[near].repeat_interleave(group, 1)
            p = (torch.einsum("hd,shd->hs", q[b, i], kn) * factor).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", p, vn))
        seen.append(before + end - start)
        keys.append(ks[len(ks) - _cache.width(window, len(ks)) :])
        values.append(vs[len(vs) - _cache.width(window, len(vs)) :])
    wide = max(len(x) for x in keys)
    kept = [torch.stack([F.pad(x, (0, 0, 0, 0, wide - len(x), 0)) for x in xs])
            for xs in (keys, values)]  # fmt: skip
    length = torch.tensor(seen, device=q.device)
    return torch.stack(out).view(q.shape), State(k=kept[0], v=kept[1], length=length)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, State]:
    """One token of `attention`. Shapes: q, o [B, H, D]; k, v [B, Hkv, D]."""
    q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    o, state = attention_chunked(q, k, v, window=window, scale=scale, state=state)
    return o.squeeze(1), state


def attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The fast torch form of `attention`: fused kernels on batches of sequences or of blocks."""
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
        sizes = [b - a for a, b in pairwise(bounds)]
        if min(sizes) != max(sizes):
            return _ragged(q, k, v, window, scale, state, cu_seqlens)
        shape = q.shape
        q, k, v = (x.reshape(len(sizes), sizes[0], *x.shape[2:]) for x in (q, k, v))
        o, state = attention_chunked(q, k, v, window=window, scale=scale, state=state)
        return o.reshape(shape), state
    batch, n = q.shape[:2]
    past = _cache.read(state, window, k.dtype)
    total = n if past is None else past.k.shape[1] + n
    keep = _cache.width(window, total)
    keys, last_keys = _cache.append(None if past is None else past.k, k, keep)
    values, last_values = _cache.append(None if past is None else past.v, v, keep)
    if past is None:
        length, seen = k.new_full((batch,), n, dtype=torch.int64), [n] * batch
    else:
        length, seen = past.length + n, [c + n for c in past.counts]
    length = _cache.with_counts(length, seen)
    o = _attend(q, keys, values, None if past is None else past.first, window, scale)
    return o, _cache.give(lambda: State(k=last_keys, v=last_values, length=length))


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor | None,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Queries [B, T, H, D] against their own keys and those before, [B, P + T, Hkv, D].

    first [B]: the first valid key of each row, None if all are.
    """
    n, total = q.shape[1], keys.shape[1]
    before = total - n
    if window is not None and total > window:
        return _blocks(q, keys, values, first, window, scale)
    if before == 0:
        return _fused(q, keys, values, scale, causal=True)
    if n > 1 and first is None and _flash(q):
        return _fused(q, keys, values, scale, causal_lower_right(n, total))
    slot = torch.arange(total, device=q.device)
    valid = None if first is None else (slot >= first[:, None])[:, None, None]
    if n == 1:
        return _fused(q, keys, values, scale, valid)
    out = []
    for a in range(0, n, _QUERIES):
        b = min(a + _QUERIES, n)
        mask = slot[: before + b] <= slot[before + a : before + b, None]
        if valid is not None:
            mask = mask & valid[..., : before + b]
        end = before + b
        out.append(_fused(q[:, a:b], keys[:, :end], values[:, :end], scale, mask))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _flash(q: Tensor) -> bool:
    """Whether a kernel sees that a mask is causal, aligned to the last query and key."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and not torch.compiler.is_compiling()


def _blocks(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor | None, window: int, scale: float | None
) -> Tensor:
    """Sliding window: blocks of queries, each with its own keys and the window before them.

    Memory and time grow with T, as all blocks but the first share one small mask.
    """
    n, near = q.shape[1], window - 1
    before = keys.shape[1] - n
    block = min(n, max(near // 2, 64))
    count = -(-n // block)
    pad = count * block - n
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (count, block))
    keys, values = (F.pad(x, (0, 0, 0, 0, near - before, pad)) for x in (keys, values))
    # [B, count, Hkv, D, near + block] -> [B, count, near + block, Hkv, D]
    keys, values = (x.unfold(1, near + block, block).movedim(-1, 2) for x in (keys, values))
    i = torch.arange(block, device=q.device)[:, None]
    j = torch.arange(near + block, device=q.device)
    band = (i <= j) & (j <= i + near)
    start = near - before if first is None else (near - before + first)[:, None, None, None]
    o = _fused(q[:, 0], keys[:, 0], values[:, 0], scale, band & (j >= start)).unsqueeze(1)
    if count > 1:
        q, keys, values = (x[:, 1:].flatten(0, 1) for x in (q, keys, values))
        rest = _fused(q, keys, values, scale, band).unflatten(0, (-1, count - 1))
        o = torch.cat([o, rest], 1)
    o = o.flatten(1, 2)
    return o[:, :n] if pad else o


def _fused(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """torch's fused attention on [B, T, H, D]. mask: True where a query may look."""
    heads, groups = q.shape[2], keys.shape[2]
    shape = q.shape
    if heads != groups and q.shape[1] == 1:
        # One query for each head of a group is the same as a group of queries for one head.
        q = q.reshape(shape[0], groups, -1, shape[3]).transpose(1, 2)
        causal, heads = False, groups
    elif heads != groups and mask is not None and q.is_cuda:
        # No fused CUDA kernel takes both a mask and grouped heads.
        keys, values = (x.repeat_interleave(heads // groups, 2) for x in (keys, values))
        groups = heads
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups,
    )  # fmt: skip
    return (o if shape[1] == 1 else o.transpose(1, 2)).reshape(shape)


@dataclass(frozen=True)
class _Buckets:
    """Packed sequences sorted into batches of similar length, padded on the right.

    Causal attention needs no mask there: nothing looks to the right.
    parts: (sequences [G], tokens [G * t] with the row's length as padding, t); back [T]: where
    each token lies in the parts joined.
    """

    parts: list[tuple[Tensor, Tensor, int]]
    back: Tensor


def _buckets(bounds: list[int], device: torch.device) -> _Buckets:
    sizes = [b - a for a, b in pairwise(bounds)]
    order = sorted(range(len(sizes)), key=lambda r: -sizes[r])
    groups: list[list[int]] = []
    for r in order:
        widest = sizes[groups[-1][0]] if groups else 0
        # Padding a sequence by a third costs less than one more call of the kernel.
        if not groups or (widest > 32 and sizes[r] * 4 < widest * 3):
            groups.append([])
        groups[-1].append(r)
    parts = []
    back = torch.empty(bounds[-1] + 1, dtype=torch.long)
    at = 0
    for rows in groups:
        t = sizes[rows[0]]
        offset = torch.arange(t)
        size = torch.tensor([sizes[r] for r in rows])[:, None]
        start = torch.tensor([bounds[r] for r in rows])[:, None]
        index = torch.where(offset < size, start + offset, bounds[-1]).flatten()
        back[index] = torch.arange(at, at + index.numel())
        at += index.numel()
        parts.append((torch.tensor(rows).to(device), index.to(device), t))
    return _Buckets(parts, back[:-1].to(device))


def _ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    state: State | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, State]:
    """Packed sequences of different lengths on one row."""
    bounds = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    plan = remembered(cu_seqlens, "buckets", lambda: _buckets(bounds, cu_seqlens.device))
    past = _cache.read(state, window, k.dtype)
    padded = [F.pad(x[0], (0, 0, 0, 0, 0, 1)) for x in (q, k, v)]
    out = []
    for rows, index, t in plan.parts:
        qs, ks, vs = (x[index].unflatten(0, (-1, t)) for x in padded)
        first = None
        if past is not None:
            ks, vs = torch.cat([past.k[rows], ks], 1), torch.cat([past.v[rows], vs], 1)
            first = None if past.first is None else past.first[rows]
        out.append(_attend(qs, ks, vs, first, window, scale).flatten(0, 1))
    o = torch.cat(out)[plan.back].unsqueeze(0)
    return o, _cache.give(lambda: _packed_state(k, v, past, window, bounds))


def _packed_state(
    k: Tensor, v: Tensor, past: _cache.Past | None, window: int | None, bounds: list[int]
) -> State:
    """The right-aligned cache of packed sequences: row r takes its last tokens, then its past."""
    before = 0 if past is None else past.k.shape[1]
    sizes = [b - a for a, b in pairwise(bounds)]
    counts = [0] * len(sizes) if past is None else past.counts
    old = [min(c, before) for c in counts]
    wide = _cache.width(window, max(s + n for s, n in zip(sizes, old, strict=True)))
    size, valid, end = (torch.tensor(x)[:, None] for x in (sizes, old, bounds[1:]))
    ago = torch.arange(wide - 1, -1, -1)
    row = torch.arange(len(sizes))[:, None]
    index = bounds[-1] + row * before + before - 1 - (ago - size)
    index = torch.where(ago < size, end - 1 - ago, index)
    index = torch.where(ago < size + valid, index, bounds[-1] + len(sizes) * before)
    index = index.to(k.device)

    def gather(new: Tensor, cached: Tensor | None) -> Tensor:
        pool = [new[0], new.new_zeros(1, *new.shape[2:])]
        if cached is not None:
            pool.insert(1, cached.flatten(0, 1))
        return torch.cat(pool)[index]

    seen = [c + s for c, s in zip(counts, sizes, strict=True)]
    return State(
        k=gather(k, None if past is None else past.k),
        v=gather(v, None if past is None else past.v),
        length=_cache.with_counts(torch.tensor(seen, device=k.device), seen),
    )


def attention_weights(
    q: Tensor, k: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """The probabilities [B, H, T, T] of `attention` on a fresh sequence, for looking at them.

    Takes O(T^2) memory. The mean of [..., 0] is the attention sink (F-Attn of arXiv 2505.06708).
    """
    dtype = compute_dtype(q, k)
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype) * factor, k.to(dtype))
    ago = torch.arange(q.shape[1], device=q.device)
    ago = ago[:, None] - ago
    hidden = (ago < 0) if window is None else (ago < 0) | (ago >= window)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Causal softmax attention: every token reads the values of the tokens up to itself.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j over j <= i, and over i - window < j if windowed.

    Shapes: q, o [B, T, H, D]; k, v [B, T, Hkv, D], each k/v head serving H / Hkv consecutive
    query heads. state: k, v [B, L, Hkv, D] and length [B] int64, the tokens seen so far. The
    cache is right-aligned: the last min(length, L) entries of a row are valid, earlier ones zero.
    With a window L never exceeds window - 1. cu_seqlens [n + 1] packs n sequences on one row
    (B = 1), the state then has n rows.
    scale: None means D^-0.5.
    Precision: scores and softmax in float32 (float64 for float64 inputs); on CUDA, half inputs
    are multiplied and cached as they are. o in q's dtype. torch's fused kernels compute the
    probabilities anew in backward: float32 gradients fade into noise where scores reach 1e6.
    Raises: ValueError, TypeError for shapes, dtypes, windows, states or cu_seqlens that do not fit.
    Source: Attention Is All You Need (arXiv 1706.03762, eq. 1); GQA (arXiv 2305.13245); window
    as in Longformer (arXiv 2004.05150), one-sided as in Mistral (arXiv 2310.06825).
    """
    _check(q, k, v, window, state, cu_seqlens)
    out = q.dtype
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    dtype = q.dtype if half and q.dtype == k.dtype == v.dtype else compute_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    run = choose(
        "attention", v, backend, {"reference": attention_reference, "torch": attention_chunked}
    )
    autocast = torch.is_autocast_enabled(q.device.type)
    shards = _across.active()
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        if shards is not None:
            o, after = shards.attention(
                q, k, v, window=window, state=state,
                attend=lambda q, k, v, state, bounds: run(
                    q, k, v, window=window, scale=scale, state=state, cu_seqlens=bounds
                ),
            )  # fmt: skip
        else:
            o, after = run(q, k, v, window=window, scale=scale, state=state, cu_seqlens=cu_seqlens)
    return o.to(out), after


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_floating(q=q, k=k, v=v)
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q must have shape [B, T >= 1, H, D], got {list(q.shape)}")
    batch, n, heads, dim = q.shape
    check_shape("k", k, (batch, n, None, dim), "[B, T, Hkv, D]")
    check_shape("v", v, tuple(k.shape), "[B, T, Hkv, D], as k")
    groups = k.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{groups} key/value heads cannot serve {heads} query heads: "
            "the second number must be a multiple of the first"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself) or None, not {window}")
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        ks, vs = state.tensor("k"), state.tensor("v")
        check_shape("state.k", ks, (rows, None, groups, dim), "[rows, L, Hkv, D]")
        check_shape("state.v", vs, tuple(ks.shape), "[rows, L, Hkv, D], as state.k")
        check_shape("state.length", state.tensor("length"), (rows,), "[rows]")


__all__ = [
    "attention",
    "attention_chunked",
    "attention_reference",
    "attention_step",
    "attention_weights",
]
