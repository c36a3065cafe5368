"""Titans' memory as a gate (MAG) and as a layer (MAL), with softmax attention in a window."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from longscan.mixers._parts import RMSNorm
from longscan.mixers._persistent import PersistentMixer, persistent_attention
from longscan.ops._cache import counts
from longscan.ops._check import compute_dtype
from longscan.ops.rotary import rotary, rotary_factors
from longscan.state import State


class _WindowPattern(PersistentMixer):
    """A memory and attention in a window.

    window: tokens each token sees, itself included, besides the persistent ones.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        window: int,
        n_persistent: int,
        rope_theta: float | None,
        memory: Mapping[str, Any],
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_persistent=n_persistent,
            rope_theta=rope_theta,
            memory=memory,
        )
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.window = window
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        w = self.persistent
        k = w.new_zeros(batch, 0, self.n_heads, self.d_head, dtype=self._cache_dtype())
        length = torch.zeros(batch, dtype=torch.int64, device=w.device)
        return State(attention=State(k=k, v=k, length=length), memory=self.memory.init_state(batch))

    def _attend(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        """Attention's heads side by side [B, T, d_model], before a projection."""
        q = self._heads(self.in_proj(x))
        k, v = self._keys_values(x)
        if self.rope_theta is not None:
            cos, sin = rotary_factors(
                x.shape[1],
                self.d_head,
                self.rope_theta,
                start=None if state is None else counts(state),
                cu_seqlens=cu_seqlens,
                dtype=compute_dtype(x),
                device=x.device,
            )
            q, k = rotary(torch.cat([q, k], 2), cos, sin).chunk(2, 2)
        prefix = self._keys_values(self.persistent)
        o, state = persistent_attention(
            q, k, v, prefix, window=self.window, state=state, cu_seqlens=cu_seqlens
        )
        return o.flatten(-2), state


class TitansMAG(_WindowPattern):
    """Memory as a gate: a memory of all tokens gates softmax attention to the last ones.

    a_t = attention of x_t to [persistent | x_{t-window+1} ... x_t],   m = memory(x)
    y = out_proj(norm(a) * sigmoid(norm(m)))

    The window is an exact short memory, the other a fading long one; they see the same input and
    run side by side. See `Titans` for the memory.

    Shapes: x, y [B, T, d_model]; rows of in_proj: q, of kv_proj: k | v, heads of
    d_model / n_heads being the slower index; persistent [n_persistent, d_model]; state: attention
    (k, v [B, L < window, n_heads, d_head], length [B]) and memory (see `Titans`).
    Precision: scores, softmax and rotary factors in float32; the memory as `Titans`.
    Raises: ValueError for sizes that do not divide, and what `Titans` refuses.
    Source: arXiv 2501.00663, section 4.2 and figure 3b; norms, gates 4.4.
    Differs: the memory does not read the persistent tokens: the weights that it starts from are
    learned already. Where the paper is silent: RMSNorm, and a sigmoid on the memory's side only.
    Reference: none by the authors, no code was published; lucidrains/titans-pytorch, MIT, is an
    independent one.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        window: int = 512,
        n_persistent: int = 4,
        rope_theta: float | None = 10000.0,
        memory: Mapping[str, Any] = MappingProxyType({}),
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            window=window,
            n_persistent=n_persistent,
            rope_theta=rope_theta,
            memory=memory,
        )
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.memory_norm = RMSNorm(d_model, norm_eps)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        parts = (None, None) if state is None else (state.child("attention"), state.child("memory"))
        a, attention = self._attend(x, parts[0], cu_seqlens)
        m, memory = self.memory(x, parts[1], cu_seqlens=cu_seqlens)
        y = self.attention_norm(a) * self.memory_norm(m).sigmoid()
        return self.out_proj(y.to(x.dtype)), State(attention=attention, memory=memory)


class TitansMAL(_WindowPattern):
    """Memory as a layer: softmax attention in a window to what a memory made of the tokens.

    u = x + memory(x),   a_t = attention of norm(u)_t to [persistent | norm(u)_{t-window+1} ...]
    y = out_proj(a)

    The pattern "titans,sliding_attention" of a model is its unfused relative: two blocks, each
    with its own residual connection and MLP, and no persistent tokens.

    Shapes, precision, state: as `TitansMAG`.
    Raises: ValueError for sizes that do not divide, and what `Titans` refuses.
    Source: arXiv 2501.00663, section 4.3; residual connections and norms 4.4.
    Differs: the persistent tokens are seen by attention at any distance and not read by the
    memory, where the paper puts them before the memory's input. Where the paper is silent: one
    residual connection and an RMSNorm between memory and attention.
    Reference: none by the authors, no code was published; lucidrains/titans-pytorch, MIT, is an
    independent one of the memory.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        window: int = 512,
        n_persistent: int = 4,
        rope_theta: float | None = 10000.0,
        memory: Mapping[str, Any] = MappingProxyType({}),
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            window=window,
            n_persistent=n_persistent,
            rope_theta=rope_theta,
            memory=memory,
        )
        self.norm = RMSNorm(d_model, norm_eps)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        parts = (None, None) if state is None else (state.child("attention"), state.child("memory"))
        m, memory = self.memory(x, parts[1], cu_seqlens=cu_seqlens)
        a, attention = self._attend(self.norm(x + m), parts[0], cu_seqlens)
        return self.out_proj(a), State(attention=attention, memory=memory)


__all__ = ["TitansMAG", "TitansMAL"]
