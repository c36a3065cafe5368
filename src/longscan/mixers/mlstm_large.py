"""The mLSTM layer of xLSTM-7B: no up-projection, no convolution, soft-capped gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers._blockdiag import HeadLayerNorm, small_init_
from longscan.mixers.base import Mixer
from longscan.mixers.mlstm import mlstm_token
from longscan.ops._check import compute_dtype
from longscan.ops.mlstm import mlstm
from longscan.ops.step import is_token
from longscan.state import State


class MLSTMLarge(Mixer):
    """A matrix memory with exponential gates, read through a sigmoid gate.

    q | k | v | o | i | f = in_proj(x);   i, f = gate_cap tanh((i, f + gate_bias) / gate_cap)
    h, state = mlstm(K^-0.5 q, k, v, i, f, state)                see `longscan.ops.mlstm`
    y = out_proj(norm(h) sigmoid(o)),   norm = LayerNorm of each head

    Shapes: x, y [B, T, d_model]; heads of d_key = d_model / (2 n_heads) and
    d_value = d_model / n_heads; in_proj rows [q | k | v | o | i | f], i and f one per head;
    state: s = [C | n] exp(-m) [B, n_heads, d_key, d_value + 1], m [B, n_heads, 1].
    n_heads: heads of queries, keys and values alike.
    gate_cap: bound of the gates' pre-activations.
    norm_eps: added to the variance in the norm of the heads.
    Precision: gates, their biases and the state float32.
    Source: arXiv 2503.13427, section 3.
    Differs: one projection for all that reads x; out_proj starts as in_proj and the model divides
    it by the root of its number of branches, where the authors divide by the number of blocks
    (equal at 20 blocks); gradients are exact (see the op).
    Reference: NX-AI/xlstm (xlstm_large) and transformers, Apache-2.0.
    """

    reads_by_product = True
    shardable = True
    keep_float32 = ("gate_bias",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        gate_cap: float = 15.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not gate_cap > 0:
            raise ValueError(f"gate_cap must be above 0, not {gate_cap}")
        self.d_model, self.n_heads, self.gate_cap = d_model, n_heads, gate_cap
        self.d_key = d_key or max(1, d_model // (2 * n_heads))
        self.d_value = d_value or max(1, d_model // n_heads)
        keys, values = n_heads * self.d_key, n_heads * self.d_value
        self._split = [keys, keys, values, values, 2 * n_heads]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=False)
        self.gate_bias = nn.Parameter(torch.empty(2 * n_heads))
        self.norm = HeadLayerNorm(values, norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """q, k, v and out_proj N(0, 2 / (5 d_model)); o, i and f 0, with biases -10 for i and 3 to
        6 for f; norm 1."""
        small_init_(self.in_proj.weight, self.d_model)
        small_init_(self.out_proj.weight, self.d_model)
        self.in_proj.weight[sum(self._split[:3]) :] = 0
        i, f = self.gate_bias.chunk(2)
        i.fill_(-10)
        f.copy_(torch.linspace(3, 6, self.n_heads))
        self.norm.reset_parameters()

    def init_state(self, batch: int) -> State:
        w, heads = self.gate_bias, self.n_heads
        dtype = compute_dtype(w)
        return State(
            s=w.new_zeros(batch, heads, self.d_key, self.d_value + 1, dtype=dtype),
            m=w.new_zeros(batch, heads, 1, dtype=dtype),
        )

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        q, k, v, o, gates = self.in_proj(x).split(self._split, -1)
        gates = gates.to(self.gate_bias.dtype) + self.gate_bias
        i, f = (self.gate_cap * (gates / self.gate_cap).tanh()).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        if state is not None and is_token(q, state, cu_seqlens):
            h, s, m = mlstm_token(q, k, v, i, f, state, q_scale=self.d_key**-0.5)
        else:
            h, (s, m) = mlstm(
                q * self.d_key**-0.5,
                k,
                v,
                i,
                f,
                state=None if state is None else (state.tensor("s"), state.tensor("m")),
                cu_seqlens=cu_seqlens,
            )
        return self.out_proj((self.norm(h) * o.sigmoid()).to(x.dtype)), State(s=s, m=m)
