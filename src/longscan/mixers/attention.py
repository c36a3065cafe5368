"""Softmax attention, the companion of linear mixers in hybrids: full, or in a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.ops._cache import counts
from longscan.ops._check import compute_dtype
from longscan.ops.attention import attention, attention_weights
from longscan.ops.rotary import rotary_factors, rotary_heads
from longscan.state import State


class Attention(Mixer):
    """Causal multi-head softmax attention with rotary positions and grouped key/value heads.

    q | k | v = in_proj(x);  q, k = rope(norm(q)), rope(norm(k))      the norm only with qk_norm
    o_i = sum_{j <= i} softmax_j(D^-0.5 q_i . k_j) v_j;  y = out_proj(o)

    Shapes: x, y [B, T, d_model]. Rows of in_proj: q (n_heads d_head) | k (n_kv_heads d_head) |
    v (n_kv_heads d_head), heads being the slower index. State: k, v [B, L, n_kv_heads, d_head]
    with k already turned, and length [B], see `ops.attention`.
    n_kv_heads: None means n_heads. d_head: None means d_model / n_heads. window: tokens each
    token sees, itself included; None means all before it. rope_theta: None for no positions.
    rotary_fraction: share of d_head that is turned, rounded down to an even number.
    qk_norm: RMSNorm over each head of q and k, with one weight for all heads.
    Precision: scores, softmax and rotary factors in float32.
    Raises: ValueError for sizes that do not divide.
    Source: arXiv 1706.03762; RoPE 2104.09864; GQA 2305.13245; layer as in Qwen3 (2505.09388).
    Differs: one fused input projection.
    Reference: Hugging Face transformers (Qwen3), Apache-2.0.
    """

    reads_by_product = True
    shardable = True

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        window: int | None = None,
        rope_theta: float | None = 10000.0,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if n_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads})")
        if d_head is None and d_model % n_heads:
            raise ValueError(
                f"n_heads ({n_heads}) must divide d_model ({d_model}), unless d_head is given"
            )
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 or None, not {window}")
        if not 0 <= rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must lie in [0, 1], not {rotary_fraction}")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.d_head = d_head or d_model // n_heads
        self.window, self.rope_theta = window, rope_theta
        # A share such as 0.58 of 100 is 57.99999999999999 and must not lose a pair to rounding.
        self.rotary_dim = 2 * int(self.d_head * rotary_fraction / 2 + 1e-6)
        self._rows = (n_heads + 2 * n_kv_heads) * self.d_head
        self.in_proj = nn.Linear(d_model, self._rows, bias=bias)
        self.q_norm = RMSNorm(self.d_head, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.d_head, norm_eps) if qk_norm else None
        self.out_proj = nn.Linear(n_heads * self.d_head, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02), biases 0, norms 1."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def init_state(self, batch: int) -> State:
        w = self.in_proj.weight
        k = w.new_zeros(batch, 0, self.n_kv_heads, self.d_head, dtype=self._cache_dtype())
        length = torch.zeros(batch, dtype=torch.int64, device=w.device)
        return State(k=k, v=k, length=length)

    def _cache_dtype(self) -> torch.dtype:
        w = self.in_proj.weight
        return w.dtype if w.is_cuda else compute_dtype(w)

    def _heads(
        self, y: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and what else there is from in_proj's output, q and k normed and turned."""
        cos, sin = None, None
        if self.rope_theta is not None and self.rotary_dim:
            cos, sin = rotary_factors(
                y.shape[1],
                self.rotary_dim,
                self.rope_theta,
                start=None if state is None else counts(state),
                cu_seqlens=cu_seqlens,
                dtype=compute_dtype(y),
                device=y.device,
            )
        norms, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        return rotary_heads(
            y, cos, sin, norms, heads=self.n_heads, groups=self.n_kv_heads, d_head=self.d_head,
            eps=eps,
        )  # fmt: skip

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        q, k, v, _ = self._heads(self.in_proj(x), state, cu_seqlens)
        o, state = attention(q, k, v, window=self.window, state=state, cu_seqlens=cu_seqlens)
        return self.out_proj(o.flatten(-2)), state

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities [B, n_heads, T, T] on fresh sequences, to look at them."""
        self._check_input(x)
        q, k, _, _ = self._heads(self.in_proj(x), None, None)
        return attention_weights(q, k, window=self.window)


class SlidingAttention(Attention):
    """`Attention` in which each token sees itself and the window - 1 tokens before it.

    Time and memory grow with T window, and the state never holds more than window - 1 tokens.

    Shapes, arguments, precision: as `Attention`.
    Source: Longformer (arXiv 2004.05150), one-sided as in Mistral (arXiv 2310.06825).
    Differs: causal only, without Longformer's global tokens.
    Reference: Hugging Face transformers (Mistral), Apache-2.0.
    """

    def __init__(
        self,
        d_model: int,
        *,
        window: int = 512,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        rope_theta: float | None = 10000.0,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            window=window,
            rope_theta=rope_theta,
            rotary_fraction=rotary_fraction,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
        )


__all__ = ["Attention", "SlidingAttention"]
