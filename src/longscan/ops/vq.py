"""Softmax attention in linear time: keys from a codebook, tokens that share a code summed up."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _cache, _vq
from longscan.ops._check import (
    cast,
    check_floating,
    check_shape,
    check_values,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._vq_blocks import vq_attention_blocks
from longscan.ops.dispatch import choose
from longscan.state import State


def quantise(k: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword of every key.

    z = argmin_s |k - c_s|^2, the lowest index where several are equally near.

    Shapes: k [B, T, H, K]; codebook [H, S, K]; codes [B, T, H] int64.
    Precision: distances in float32 (float64 if either is), as a code is a decision; no gradient.
    """
    check_floating(k=k, codebook=codebook)
    if k.ndim != 4:
        raise ValueError(f"k must have shape [B, T, H, K], got {list(k.shape)}")
    check_shape("codebook", codebook, (k.shape[2], None, k.shape[3]), "[H, S, K]")
    with torch.no_grad(), full_precision(k):
        k, c = cast(compute_dtype(k, codebook), k, codebook)
        # |k|^2 is the same for all codewords
        far = c.square().sum(-1).unsqueeze(1) - 2 * (k.flatten(0, 1).transpose(0, 1) @ c.mT)
        return far.argmin(-1).T.reshape(k.shape[:3])


def codewords(codes: Tensor, codebook: Tensor) -> Tensor:
    """The codewords [B, T, H, K] of codes [B, T, H]."""
    heads, size, _ = codebook.shape
    row = codes + torch.arange(heads, device=codes.device) * size
    return F.embedding(row, codebook.detach().flatten(0, 1))


def straight_through(k: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Keys replaced by their codewords, with the gradient passed on to k: c_z + (k - sg k).

    Shapes: k, result [B, T, H, K]; codebook [H, S, K], without gradient; codes [B, T, H].
    Precision: the result in float32 (float64 if k is), exactly the codeword.
    """
    k = k.to(compute_dtype(k, codebook))
    return codewords(codes, codebook).to(k.dtype) + (k - k.detach())


def init_vq_state(
    batch: int, codebook: Tensor, d_value: int, *, cache_straight_through: bool = False
) -> State:
    """The state of `vq_attention` before the first token."""
    heads, size, dim = codebook.shape
    zeros = codebook.new_zeros(batch, 1, dtype=compute_dtype(codebook))
    drift = {}
    if cache_straight_through:
        drift["drift_k"] = zeros.new_zeros(batch, heads, size, dim)
        drift["drift_kv"] = zeros.new_zeros(batch, heads, size, dim, d_value)
    return State(
        k=zeros.new_zeros(batch, 0, heads, dim),
        v=zeros.new_zeros(batch, 0, heads, d_value),
        codes=zeros.new_zeros(batch, 0, heads, dtype=torch.int64),
        counts=zeros.new_zeros(batch, heads, size),
        means=zeros.new_zeros(batch, heads, size, d_value),
        **drift,
        length=zeros.new_zeros(batch, dtype=torch.int64),
    )


def vq_attention_reference(
    q: Tensor,
    k_hat: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    q_bias: Tensor | None,
    settings: _vq.Settings,
    *,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition of `vq_attention`: a softmax over all pairs, sequence by sequence."""
    spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
        spans = [(0, a, b) for a, b in pairwise(bounds)]
    block, straight = settings.block, settings.cache_straight_through
    carried = (lambda x: x) if settings.carry_gradient else Tensor.detach
    if state is None:
        state = init_vq_state(len(spans), codebook, v.shape[-1], cache_straight_through=straight)
    outs, states = [], []
    for row, (b, start, end) in enumerate(spans):
        past = state.select(row).map(lambda x: x[0])
        at, old = int(past.tensor("length")), past.tensor("k").shape[0]
        old = slice(max(0, old - at), None)
        ks, vs, zs = (
            torch.cat([past.tensor(name)[old], x[b, start:end]])
            for name, x in (("k", k_hat), ("v", v), ("codes", codes))
        )
        i = torch.arange(at, at + end - start, device=q.device)
        j = torch.arange(at + end - start - len(ks), at + end - start, device=q.device)
        blocks = i[:, None] // block - j // block
        seen = (j >= _vq.first_kept(at, block)).expand_as(blocks)  # others are in the cache
        seen = seen & (i[:, None] >= j) if settings.causal else seen
        own, near = blocks == 0, blocks.abs() <= 1
        query = q[b, start:end]
        far_k = carried(ks) if straight else ks.detach()
        scores = [torch.einsum("ihk,jhk->hij", query, x) for x in (ks, carried(ks), far_k)]
        pairs = torch.where(own, scores[0], torch.where(near, scores[1], scores[2]))
        if bias is not None:
            rows = None if q_bias is None else q_bias[b, start:end]
            added = _vq.bias_by_pair(bias, rows, i[:, None] - j, settings.causal)
            pairs = pairs + torch.where(near, added, 0.0)
        pairs = pairs.masked_fill(~seen, -torch.inf)
        n, mean = past.tensor("counts").detach(), past.tensor("means")
        cached = torch.einsum("ihk,hsk->his", query, codebook) + _vq.log_counts(n)[:, None]
        p = torch.cat([pairs, cached], -1).softmax(-1)
        pairs, cached = p[..., : len(ks)], p[..., len(ks) :]
        o = torch.einsum("hij,jhv->ihv", pairs * own, vs)
        o = o + torch.einsum("hij,jhv->ihv", pairs * ~own, carried(vs))
        o = o + torch.einsum("his,hsv->ihv", cached, carried(mean))
        if straight:  # terms that are zero, but not their gradients
            each = cached / n.clamp(min=1)[:, None]
            more = torch.einsum("his,ihk,hskv->ihv", each, query, carried(past.tensor("drift_kv")))
            total = torch.einsum("his,ihk,hsk->ih", each, query, carried(past.tensor("drift_k")))
            o = (o + more) / (1 + total.unsqueeze(-1))
        outs.append(o)
        leave = (j >= _vq.first_kept(at, block)) & (j < _vq.first_kept(at + end - start, block))
        hot = F.one_hot(zs, codebook.shape[1]).to(v.dtype) * leave[:, None, None]
        total = n + hot.sum(0)
        sums = n.unsqueeze(-1) * mean + torch.einsum("jhs,jhv->hsv", hot, vs)
        mean = torch.where(total.unsqueeze(-1) > 0, sums / total.clamp(min=1).unsqueeze(-1), mean)
        after: dict[str, Tensor] = {"counts": past.tensor("counts") + hot.sum(0), "means": mean}
        if straight:
            drift = ks - ks.detach()
            after["drift_k"] = past.tensor("drift_k") + torch.einsum("jhs,jhk->hsk", hot, drift)
            more = torch.einsum("jhs,jhk,jhv->hskv", hot, drift, vs)
            after["drift_kv"] = past.tensor("drift_kv") + more
        keep = slice(len(ks) - _cache.width(2 * block, len(ks)), None)
        length = torch.tensor(at + end - start, device=q.device)
        after |= {"k": ks[keep], "v": vs[keep], "codes": zs[keep], "length": length}
        states.append(State({x: after[x].unsqueeze(0) for x in state}))
    o = torch.stack(outs) if cu_seqlens is None else torch.cat(outs).unsqueeze(0)
    return o, State.cat(states) if settings.causal else State()


def vq_attention(
    q: Tensor,
    k_hat: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    block: int,
    bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    cache_straight_through: bool = False,
    carry_gradient: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Softmax attention over quantised keys: near tokens one by one, far ones code by code.

    Blocks of `block` tokens are counted from the start of each sequence. The window of query i is
    its own block and the previous one (causal: up to i itself), or previous, own and next block.

    score_ij = q_i . k_hat_j + bias(i - j)        for j in the window of i
    score_is = q_i . c_s + log n_s                for code s; n_s tokens outside the window have it
    o_i = sum_j p_ij v_j + sum_s p_is mean_s      p: softmax over both; mean_s of those n_s values

    It equals softmax attention with keys k_hat over all tokens, in time O(T (2 block + S)).

    Shapes: q, k_hat [B, T, H, K]; codes [B, T, H] int64, from `quantise`; v, o [B, T, H, V];
    codebook [H, S, K]. cu_seqlens [n + 1] packs n sequences on one row (B = 1): each has its own
    blocks and cache. State (n or B rows): k, v, codes [B, W, ...], the last W <= 2 block - 1
    tokens, right-aligned; counts [B, H, S], means [B, H, S, V] of the tokens that have left the
    window of the next token; length [B] int64. Not causal: no state in, an empty one out.
    bias: added by distance, [H or 1, D]; causal: entry d is for distance i - j = d >= 0; else D is
    odd and entry D // 2 is for distance 0. Distances without an entry get 0.
    q_bias: with it bias is [H or 1, D, K'], and what is added is q_bias_i . bias_{i-j};
    q_bias [B, T, H, K'].
    cache_straight_through: pass gradients to the keys outside of the window too, which makes the
    gradient that of the full softmax but costs time and memory O(S K V) a block; the state then
    also has drift_k [B, H, S, K] and drift_kv [B, H, S, K, V], zeros that carry gradients.
    carry_gradient: pass gradients on to tokens of other blocks; if not, keys, values and means
    that come from another block than the query's are constants.
    The codebook and the counts of codes get no gradient.
    Precision: float32 (float64 for float64 inputs), o in v's dtype; counts are exact up to 2^24
    tokens of a code. Sums only grow, so nothing cancels, and the state keeps means, which stay as
    large as values are. Nothing is scaled: multiply q where the architecture asks for it.
    Raises: ValueError, TypeError for shapes, dtypes, biases, states or cu_seqlens that do not fit.
    Source: Transformer-VQ (arXiv 2309.16354, section 3); both directions as in LongVQ
    (arXiv 2404.11163).
    Differs: packed sequences never share a cache; a sequence may be cut inside a block.
    """
    _check(q, k_hat, codes, v, codebook, block, bias, q_bias, state, cu_seqlens, causal)
    if state is not None and ("drift_k" in state) != cache_straight_through:
        raise ValueError("a state belongs to one setting of cache_straight_through")
    settings = _vq.Settings(block, causal, cache_straight_through, carry_gradient)
    dtype, out = compute_dtype(q, k_hat, v, bias, q_bias), v.dtype
    with full_precision(v):
        q, k_hat, v, bias, q_bias, book = cast(dtype, q, k_hat, v, bias, q_bias, codebook.detach())
        if state is not None:
            state = state.to(dtype=dtype)
        forms = {"reference": vq_attention_reference, "torch": vq_attention_blocks}
        run = choose("vq", v, backend, forms)
        o, after = run(
            q, k_hat, codes, v, book, bias, q_bias, settings, state=state, cu_seqlens=cu_seqlens
        )
    return o.to(out), after


def _check(
    q: Tensor,
    k_hat: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    block: int,
    bias: Tensor | None,
    q_bias: Tensor | None,
    state: State | None,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> None:
    check_floating(q=q, k_hat=k_hat, v=v, codebook=codebook, bias=bias, q_bias=q_bias)
    batch, n, heads, d_value = check_values(v)
    check_shape("q", q, (batch, n, heads, None), "[B, T, H, K]")
    d_key = q.shape[3]
    check_shape("k_hat", k_hat, tuple(q.shape), "[B, T, H, K], as q")
    check_shape("codes", codes, (batch, n, heads), "[B, T, H]")
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be int64, as `quantise` returns them, not {codes.dtype}")
    check_shape("codebook", codebook, (heads, None, d_key), "[H, S, K]")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    if q_bias is not None and bias is None:
        raise ValueError("q_bias reads bias: give both, or bias alone")
    if bias is not None:
        inner = () if q_bias is None else (None,)
        axes = "[H or 1, D]" if q_bias is None else "[H or 1, D, K'] beside q_bias"
        check_shape("bias", bias, (None, None, *inner), axes)
        if bias.shape[0] not in (1, heads):
            raise ValueError(f"bias must be for 1 or {heads} heads, not {bias.shape[0]}")
        if not causal and bias.shape[1] % 2 == 0:
            raise ValueError(
                f"a bias for both directions has an odd number of entries, not {bias.shape[1]}: "
                "the middle one is for distance 0"
            )
        if q_bias is not None:
            check_shape("q_bias", q_bias, (batch, n, heads, bias.shape[2]), "[B, T, H, K']")
    if state is not None:
        if not causal:
            raise ValueError("attention in both directions cannot continue a state: pass None")
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        size = codebook.shape[1]
        ks = state.tensor("k")
        wide = None if ks.ndim < 2 else ks.shape[1]
        check_shape("state.k", ks, (rows, None, heads, d_key), "[rows, W, H, K]")
        check_shape("state.v", state.tensor("v"), (rows, wide, heads, d_value), "[rows, W, H, V]")
        check_shape("state.codes", state.tensor("codes"), (rows, wide, heads), "[rows, W, H]")
        check_shape("state.counts", state.tensor("counts"), (rows, heads, size), "[rows, H, S]")
        want = (rows, heads, size, d_value)
        check_shape("state.means", state.tensor("means"), want, "[rows, H, S, V]")
        check_shape("state.length", state.tensor("length"), (rows,), "[rows]")


__all__ = [
    "codewords",
    "init_vq_state",
    "quantise",
    "straight_through",
    "vq_attention",
    "vq_attention_reference",
]
