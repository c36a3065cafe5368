"""What Titans' patterns share: a memory beside softmax attention that sees persistent tokens.

Persistent tokens are learned. They have keys and values but no place in the sequence: they stay
visible when the window has moved on, and are not part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.mixers.memories import Titans
from longscan.ops import _cache
from longscan.ops._check import check_shape, compute_dtype, full_precision
from longscan.ops._layout import check_cu_seqlens, remembered
from longscan.ops.attention import _buckets, _packed_state
from longscan.state import State

# Queries that meet all keys together: bounds the mask to so many rows.
_QUERIES = 512


def attention_dtype(x: Tensor) -> torch.dtype:
    """What keys and values are multiplied and cached in: as they are for half ones on CUDA."""
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return x.dtype if half else compute_dtype(x)


def attend(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Softmax attention over a prefix that every query sees, and keys where `mask` is True.

    Shapes: q [B, T, H, D]; k, v [B, S, H, D]; prefix: k, v [N, H, D]; mask broadcasts against
    [B, H, T, S], None: everything is seen; returns [B, T, H, D].
    """
    front = prefix[0].shape[0]
    if front:
        k, v = (
            torch.cat([p.expand(x.shape[0], -1, -1, -1), x], 1)
            for p, x in zip(prefix, (k, v), strict=True)
        )
        mask = None if mask is None else F.pad(mask, (front, 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _windows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: tuple[Tensor, Tensor],
    first: Tensor | None,
    window: int,
) -> Tensor:
    """Queries [B, T, H, D] against the prefix and the window before each, of [B, P + T, H, D].

    first [B]: the first valid key of each row, None if all are. Time and memory grow with
    T window: blocks of queries meet their own keys and the window - 1 before these.
    """
    n, total = q.shape[1], keys.shape[1]
    before, near = total - n, window - 1
    if total <= window:
        slot = torch.arange(total, device=q.device)
        valid = None if first is None else (slot >= first[:, None])[:, None, None]
        if n == 1:
            return attend(q, keys, values, prefix, valid)
        out = []
        for a in range(0, n, _QUERIES):
            end = before + min(a + _QUERIES, n)
            mask = slot[:end] <= slot[before + a : end, None]
            mask = mask if valid is None else mask & valid[..., :end]
            rows = q[:, a : a + _QUERIES]
            out.append(attend(rows, keys[:, :end], values[:, :end], prefix, mask))
        return out[0] if len(out) == 1 else torch.cat(out, 1)
    block = min(n, max(near // 2, 64))
    count = -(-n // block)
    pad = count * block - n
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (count, block))
    keys, values = (F.pad(x, (0, 0, 0, 0, near - before, pad)) for x in (keys, values))
    # [B, count, H, D, near + block] -> [B, count, near + block, H, D]
    keys, values = (x.unfold(1, near + block, block).movedim(-1, 2) for x in (keys, values))
    i = torch.arange(block, device=q.device)[:, None]
    j = torch.arange(near + block, device=q.device)
    band = (i <= j) & (j <= i + near)
    start = near - before if first is None else (near - before + first)[:, None, None, None]
    # Only the first block can look before the first token; the others share one small mask.
    o = [attend(q[:, 0], keys[:, 0], values[:, 0], prefix, band & (j >= start)).unsqueeze(1)]
    if count > 1:
        q, keys, values = (x[:, 1:].flatten(0, 1) for x in (q, keys, values))
        o.append(attend(q, keys, values, prefix, band).unflatten(0, (-1, count - 1)))
    return torch.cat(o, 1).flatten(1, 2)[:, :n]


def persistent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor],
    *,
    window: int,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`ops.attention` in a window, with a prefix that every token sees as well.

    o_i = sum_j softmax_j(D^-0.5 q_i . k_j) v_j over the prefix and over i - window < j <= i

    Shapes: q, k, v, o [B, T, H, D]; prefix: k, v [N, H, D]; state and cu_seqlens as in
    `ops.attention`. Precision: as there.
    """
    out, dtype = q.dtype, attention_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    prefix = prefix[0].to(dtype), prefix[1].to(dtype)
    if state is not None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        axes = (rows, None, *k.shape[2:])
        check_shape("state.k", state.tensor("k"), axes, "[rows, L, H, D]")
        check_shape("state.v", state.tensor("v"), axes, "[rows, L, H, D]")
        check_shape("state.length", state.tensor("length"), (rows,), "[rows]")
    with full_precision(q):
        o, after = _run(q, k, v, prefix, window, state, cu_seqlens)
    return o.to(out), after


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor],
    window: int,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State]:
    past = _cache.read(state, window, k.dtype)
    if cu_seqlens is None:
        batch, n = q.shape[:2]
        total = n if past is None else past.k.shape[1] + n
        keep = _cache.width(window, total)
        keys, last_keys = _cache.append(None if past is None else past.k, k, keep)
        values, last_values = _cache.append(None if past is None else past.v, v, keep)
        if past is None:
            length, seen = k.new_full((batch,), n, dtype=torch.int64), [n] * batch
        else:
            length, seen = past.length + n, [c + n for c in past.counts]
        length = _cache.with_counts(length, seen)
        o = _windows(q, keys, values, prefix, None if past is None else past.first, window)
        return o, _cache.give(lambda: State(k=last_keys, v=last_values, length=length))
    bounds = check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if len({b - a for a, b in pairwise(bounds)}) == 1:
        q, k, v = (x.unflatten(1, (len(bounds) - 1, -1)).squeeze(0) for x in (q, k, v))
        o, after = _run(q, k, v, prefix, window, state, None)
        return o.flatten(0, 1).unsqueeze(0), after
    # Sequences sorted into batches of similar length: nothing looks at the padding to the right.
    plan = remembered(cu_seqlens, "buckets", lambda: _buckets(bounds, cu_seqlens.device))
    padded = [F.pad(x[0], (0, 0, 0, 0, 0, 1)) for x in (q, k, v)]
    parts = []
    for rows, index, t in plan.parts:
        qs, ks, vs = (x[index].unflatten(0, (-1, t)) for x in padded)
        first = None
        if past is not None:
            ks, vs = torch.cat([past.k[rows], ks], 1), torch.cat([past.v[rows], vs], 1)
            first = None if past.first is None else past.first[rows]
        parts.append(_windows(qs, ks, vs, prefix, first, window).flatten(0, 1))
    o = torch.cat(parts)[plan.back].unsqueeze(0)
    return o, _cache.give(lambda: _packed_state(k, v, past, window, bounds))


class PersistentMixer(Mixer):
    """Base of the patterns: heads of attention, persistent tokens and a memory.

    n_heads: heads of attention; d_model / n_heads each.
    n_persistent: learned tokens that every token sees.
    rope_theta: base of the rotary positions of attention, None for none; persistent tokens lie at
    position 0.
    memory: settings of the memory, those of `Titans`, such as {"n_heads": 8, "chunk": 64}.
    norm_eps: added to the mean square in the norms of the pattern.
    """

    no_weight_decay = ("persistent",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_persistent: int,
        rope_theta: float | None,
        memory: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model})")
        if n_persistent < 0:
            raise ValueError(f"n_persistent must be 0 or more, not {n_persistent}")
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, d_model // n_heads
        if rope_theta is not None and self.d_head % 2:
            raise ValueError(f"rotary positions need an even d_model / n_heads, not {self.d_head}")
        self.rope_theta = rope_theta
        self.memory = Titans(d_model, **memory)
        self.persistent = nn.Parameter(torch.empty(n_persistent, d_model))
        self.kv_proj = nn.Linear(d_model, 2 * d_model, bias=False)

    def reset_parameters(self) -> None:
        """Linear weights and persistent tokens N(0, 0.02), norms 1; the memory as `Titans`."""
        for m in self.children():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
            elif isinstance(m, RMSNorm | Mixer):
                m.reset_parameters()
        nn.init.normal_(self.persistent, std=0.02)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [..., n_heads, d_head] of tokens: of the sequence, persistent or retrieved."""
        k, v = self.kv_proj(x).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def _cache_dtype(self) -> torch.dtype:
        return attention_dtype(self.persistent)


__all__ = ["PersistentMixer", "attend", "attention_dtype", "persistent_attention"]
