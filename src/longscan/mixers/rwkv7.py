"""RWKV-7 "Goose"."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longscan.mixers._blockdiag import HeadLayerNorm
from longscan.mixers._rwkv import TokenShiftMixer, head_size
from longscan.ops._check import check_shape, compute_dtype, widen
from longscan.ops.dplr import dplr
from longscan.ops.norm import l2_norm
from longscan.state import State

_STRONGEST = math.exp(-0.5)  # of log decays; exp(-0.6065) = 0.545


class RWKV7(TokenShiftMixer):
    """A delta rule with a decay and a write strength per key channel, between token shifts.

    r, k, v = W_r x^r_t, W_k x^k_t, W_v x^v_t        x^c_t = x_t + (x_{t-1} - x_t) mu_c
    log w = -e^-0.5 sigmoid(w0 + W_w2 tanh(W_w1 x^w_t))
    a = sigmoid(a0 + W_a2 W_a1 x^a_t),   g = W_g2 sigmoid(W_g1 x^g_t)
    kappa = unit_per_head(k * k_k),   k <- k * (1 + (a - 1) k_a)
    S_t = (diag(w) - (a * kappa) kappa^T) S_{t-1} + k v^T
    y_t = W_out (g * (norm_per_head(S_t^T r) + (sum_d r k r_k) v))

    With value_residual, in all layers but the first of a model,
    v <- v + (v_first - v) * sigmoid(v0 + W_v2 W_v1 x^v_t), where v_first is the first layer's v.

    Shapes: x, y [B, T, d_model]; H = d_model / d_head heads; mu rows [r | w | k | v | a | g];
    w0, a0, v0, k_k, k_a [d_model]; r_k [H, d_head]; state: shift [B, 1, d_model], the last token,
    s [B, H, d_head, d_head].
    d_head: channels of a head; None: 64, or the largest power of two below that divides d_model.
    value_residual: whether the layer can use the first layer's values; `mix` takes and gives them.
    None: where the layer knows its place in a model, as all but the first of one do.
    decay_rank: width of the decay's bottleneck; None: near 1.8 sqrt(d_model).
    a_rank: width of the bottleneck of a; None: as decay_rank.
    value_rank: width of the value residual's bottleneck; None: near 1.3 sqrt(d_model).
    gate_rank: width of the output gate's bottleneck; None: near 0.6 d_model^0.8. All four are
    then multiples of 32.
    layer: which of the model's RWKV-7 layers this is, from 0; the first has no value residual, and
    the initialisation changes with depth. n_layers: how many there are; None, as for layer: not
    known. norm_eps: added to the variance in the norm.
    Precision: w0, gates, norms and state float32.
    Source: arXiv 2503.14456, time mixing; parameters named as in the authors' code.
    Differs: alone (`forward`), every layer is a first layer. The authors train w0 at twice the
    learning rate.

    Reference: BlinkDL/RWKV-LM, Apache-2.0.
    """

    keep_float32 = ("w0",)
    no_weight_decay = (
        "mu", "r_k", *(f"{p}_{q}.weight" for p in "wavg" for q in ("down", "up")),
    )  # fmt: skip
    shares_value = True

    def __init__(
        self,
        d_model: int,
        *,
        d_head: int | None = None,
        value_residual: bool | None = None,
        decay_rank: int | None = None,
        a_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        layer: int | None = None,
        n_layers: int | None = None,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__(d_model, 6, layer, n_layers)
        self.d_head = head_size(d_model, d_head)
        self.n_heads = d_model // self.d_head
        decay_rank = decay_rank or _rank(1.8 * d_model**0.5)
        self.r_proj, self.k_proj, self.v_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(3)
        )
        self.w_down, self.w_up = _bottleneck(d_model, decay_rank)
        self.a_down, self.a_up = _bottleneck(d_model, a_rank or decay_rank)
        self.g_down, self.g_up = _bottleneck(d_model, gate_rank or _rank(0.6 * d_model**0.8))
        self.w0, self.a0, self.k_k, self.k_a = (
            nn.Parameter(torch.empty(d_model)) for _ in range(4)
        )
        self.r_k = nn.Parameter(torch.empty(self.n_heads, self.d_head))
        self.v0 = self.v_down = self.v_up = None
        if value_residual is None:
            value_residual = layer is not None
        if value_residual and layer != 0:
            self.v_down, self.v_up = _bottleneck(d_model, value_rank or _rank(1.3 * d_model**0.5))
            self.v0 = nn.Parameter(torch.empty(d_model))
        self.norm = HeadLayerNorm(d_model, norm_eps, bias=True)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_r, W_v orthogonal, W_k at a tenth of that, W_out zero; the inner matrices of the
        bottlenecks zero, the outer ones orthogonal at a tenth; decays, mixes and strengths spread
        over the channels, and with depth, as in the authors' code."""
        for linear, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(self.out_proj.weight)
        for name in "wavg":
            down, up = getattr(self, f"{name}_down"), getattr(self, f"{name}_up")
            if down is not None:
                nn.init.zeros_(down.weight)
                wide = max(1.0, up.in_features / up.out_features)
                nn.init.orthogonal_(up.weight, 0.1 * math.sqrt(wide))
        self._init_mu([p * self._fall for p in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])
        at = self._channels(self.w0)
        # From -1 to 1 over each head, flat in the middle.
        half = max(1.0, self.d_head - 1) / 2
        bend = (torch.arange(self.d_head, device=at.device) - (self.d_head - 1) / 2) / half
        bend = (bend * bend.abs()).repeat(self.n_heads)
        self.w0.copy_(-5.5 + 6 * at ** (1 + self._rise**0.3) + 2.5 * bend)
        self.a0.copy_(-0.19 + 0.3 * bend + 0.4 * (at - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (at - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        if self.v0 is not None:
            self.v0.copy_(0.73 - 0.4 * (at - 0.5))
        depth = 1.0 if self.layer is None else (1 + self.layer) / (self.n_layers or 1)
        self.norm.reset_parameters(depth**0.7)

    def init_state(self, batch: int) -> State:
        shape = (batch, self.n_heads, self.d_head, self.d_head)
        s = self.w0.new_zeros(shape, dtype=compute_dtype(self.w0))
        return State(shift=self._no_shift(batch), s=s)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, state, _ = self.mix(x, state, cu_seqlens=cu_seqlens)
        return y, state

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, State, Tensor]:
        """As `forward`, with the values of the model's first RWKV-7 layer.

        first [B, T, d_model]: what that layer returned; None in that layer itself, which then
        returns its own.
        """
        (xr, xw, xk, xv, xa, xg), shift = self._mixes(x, state, cu_seqlens)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        decay = self.w0 + widen(self.w_up(torch.tanh(self.w_down(xw))))
        log_a = -_STRONGEST * torch.sigmoid(decay)
        a = torch.sigmoid(self.a0 + widen(self.a_up(self.a_down(xa))))
        g = self.g_up(torch.sigmoid(self.g_down(xg)))
        shared: Tensor = v if first is None else first
        if first is not None and self.v0 is not None:
            assert self.v_down is not None
            assert self.v_up is not None
            check_shape("first", first, tuple(v.shape), "[B, T, d_model]")
            mixed = (self.v0 + self.v_up(self.v_down(xv))).sigmoid()
            v = torch.lerp(v, first.to(v.dtype), mixed.to(v.dtype))
        kappa = l2_norm(self._heads(k * self.k_k), eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, a, log_a = (self._heads(t) for t in (r, k, v, a, log_a))
        s = None if state is None else state.tensor("s")
        o, s = dplr(r, k, v, log_a, -kappa, kappa * a, state=s, cu_seqlens=cu_seqlens)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = self.norm(o) + bonus.flatten(-2)
        return self.out_proj((y * g).to(x.dtype)), State(shift=shift, s=s), shared

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.d_head))


def _rank(x: float) -> int:
    """The nearest multiple of 32, at least 32."""
    return max(32, round(x / 32) * 32)


def _bottleneck(d: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)
