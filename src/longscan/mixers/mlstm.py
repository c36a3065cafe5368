"""The mLSTM layer of xLSTM: gated up-projection, convolution, matrix memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._blockdiag import HeadLayerNorm, HeadwiseLinear, small_init_
from longscan.mixers._parts import ShortConv
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype
from longscan.ops.mlstm import mlstm
from longscan.ops.step import Decay, Exponential, is_token, step
from longscan.state import State


def mlstm_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    *,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of `ops.mlstm` by `ops.step`: h, s, m. Shapes: as there with T = 1."""
    q, k, v, i, f = (t[:, 0] for t in (q, k, v, i, f))
    done = step(
        q, k, v, state.tensor("s"), decay=Decay("logsigmoid", f),
        rule=Exponential(i, state.tensor("m")), divide=True, q_scale=q_scale, k_scale=k_scale,
    )  # fmt: skip
    assert done.m is not None
    return done.o.unsqueeze(1), done.s, done.m


class MLSTM(Mixer):
    """A matrix memory with exponential gates between an up- and a down-projection.

    u | z = in_proj(x);   c = silu(conv(u))
    q, k = q_proj(c), k_proj(c);   v = v_proj(u)                 block-diagonal maps
    i | f = gate_proj(q | k | v) + gate_bias                     one of each per head
    h, state = mlstm(q, K^-0.5 k, v, i, f, state)                see `longscan.ops.mlstm`
    y = out_proj((norm(h) + skip c) silu(z)),   norm = LayerNorm of each head

    Shapes: x, y [B, T, d_model]; inner width E = expand d_model rounded up to a multiple of 64,
    heads of K = V = E / n_heads; in_proj rows [u | z], gate_proj rows [i | f];
    state: conv [B, d_conv - 1, E], s = [C | n] exp(-m) [B, n_heads, K, K + 1], m [B, n_heads, 1].
    expand: inner width as a multiple of d_model, before rounding.
    qkv_block: channels that one block of q_proj, k_proj and v_proj maps onto themselves.
    norm_eps: added to the variance in the norm of the heads.
    Precision: gates, their biases and the state float32.
    Source: arXiv 2405.04517, eq. 19-27 and figure 11.
    Differs: norm.weight is the weight, which the authors store minus one; out_proj starts as
    in_proj and the model divides it by the root of its number of branches, where the authors
    divide by the number of blocks (equal at 10 blocks); gradients are exact (see the op).
    Reference: NX-AI/xlstm, Apache-2.0.
    """

    reads_by_product = True
    shardable = True
    keep_float32 = ("gate_bias",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand: float = 2.0,
        d_conv: int = 4,
        qkv_block: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = -(-int(expand * d_model) // 64) * 64
        if inner % n_heads or inner % qkv_block:
            raise ValueError(
                f"n_heads ({n_heads}) and qkv_block ({qkv_block}) must divide the inner width, "
                f"which is {inner}: expand d_model rounded up to a multiple of 64"
            )
        self.d_model, self.n_heads, self.d_head = d_model, n_heads, inner // n_heads
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = ShortConv(inner, d_conv, bias=True)
        self.q_proj, self.k_proj, self.v_proj = (
            HeadwiseLinear(inner, inner // qkv_block) for _ in range(3)
        )
        self.gate_proj = nn.Linear(3 * inner, 2 * n_heads, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(2 * n_heads))
        self.norm = HeadLayerNorm(inner, norm_eps)
        self.skip = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Projections N(0, 2 / (5 d_model)); gates 0 with biases N(0, 0.1) for i and 3 to 6 for
        f; the convolution as torch.nn.Conv1d; norm and skip 1."""
        for p in (self.in_proj, self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            small_init_(p.weight, self.d_model)
        self.conv1d.reset_parameters()
        nn.init.zeros_(self.gate_proj.weight)
        i, f = self.gate_bias.chunk(2)
        nn.init.normal_(i, std=0.1)
        f.copy_(torch.linspace(3, 6, self.n_heads))
        self.norm.reset_parameters()
        nn.init.ones_(self.skip)

    def init_state(self, batch: int) -> State:
        w, d = self.gate_bias, self.d_head
        dtype = compute_dtype(w)
        return State(
            conv=self.conv1d.init_state(batch),
            s=w.new_zeros(batch, self.n_heads, d, d + 1, dtype=dtype),
            m=w.new_zeros(batch, self.n_heads, 1, dtype=dtype),
        )

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        u, z = self.in_proj(x).chunk(2, -1)
        window = None if state is None else state.tensor("conv")
        c, window = self.conv1d.activated(u, window, cu_seqlens)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        gates = self.gate_proj(torch.cat([q, k, v], -1)).to(self.gate_bias.dtype) + self.gate_bias
        i, f = gates.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.n_heads, self.d_head)) for t in (q, k, v))
        if state is not None and is_token(q, state, cu_seqlens):
            h, s, m = mlstm_token(q, k, v, i, f, state, k_scale=self.d_head**-0.5)
        else:
            h, (s, m) = mlstm(
                q,
                k * self.d_head**-0.5,
                v,
                i,
                f,
                state=None if state is None else (state.tensor("s"), state.tensor("m")),
                cu_seqlens=cu_seqlens,
            )
        y = torch.addcmul(self.norm(h), self.skip, c) * F.silu(z)
        return self.out_proj(y.to(x.dtype)), State(conv=window, s=s, m=m)
