"""RWKV-4 "Dove"."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longscan.mixers._rwkv import TokenShiftMixer
from longscan.ops._check import compute_dtype
from longscan.ops.wkv import first_state, wkv
from longscan.state import State


class RWKV4(TokenShiftMixer):
    """Each channel averages its past values, weighted by exp(key) and a constant decay.

    r, k, v = W_r x^r_t, W_k x^k_t, W_v x^v_t        x^c_t = x_t + (x_{t-1} - x_t) mu_c
    o_t = (sum_{i<t} p_ti v_i + e^(u + k_t) v_t) / (sum_{i<t} p_ti + e^(u + k_t))
    p_ti = e^(k_i - (t - 1 - i) w),   w = e^time_decay
    y_t = W_out (sigmoid(r) * o_t)

    Shapes: x, y [B, T, d_model]; mu rows [r | k | v]; time_decay, u [d_model]; state: shift
    [B, 1, d_model], the last token, s [B, d_model, 2], the sums of weighted values and of weights,
    both divided by exp(m), m [B, d_model].
    layer: which of the model's RWKV-4 layers this is, from 0; only the initialisation asks.
    n_layers: how many there are; None, as for layer: not known.
    Precision: time_decay, u, weights and state float32.
    Source: arXiv 2305.13048, time mixing.
    Differs: mu is the share of the previous token, as in RWKV-7; the checkpoints store 1 - mu.

    Reference: BlinkDL/RWKV-LM, Apache-2.0.
    """

    keep_float32 = ("time_decay", "u")

    def __init__(
        self, d_model: int, *, layer: int | None = None, n_layers: int | None = None
    ) -> None:
        super().__init__(d_model, 3, layer, n_layers)
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.time_decay = nn.Parameter(torch.empty(d_model))
        self.u = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_v orthogonal, the others zero; decays from exp(-exp(-5)) to exp(-exp(3)) over the
        channels, mixes and bonuses as the authors'."""
        nn.init.orthogonal_(self.v_proj.weight)
        for linear in (self.r_proj, self.k_proj, self.out_proj):
            nn.init.zeros_(linear.weight)
        self._init_mu([self._fall / 2, self._fall, self._fall], [0.0, 0.0, 0.3 * self._rise])
        self.time_decay.copy_(-5 + 8 * self._channels(self.u) ** (0.7 + 1.3 * self._rise))
        zigzag = torch.arange(1, self.d_model + 1, device=self.u.device) % 3 - 1
        self.u.copy_(math.log(0.3) + 0.5 * zigzag)

    def init_state(self, batch: int) -> State:
        s, m = first_state(self.u.detach().to(compute_dtype(self.u)), batch)
        return State(shift=self._no_shift(batch), s=s, m=m)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        (xr, xk, xv), shift = self._mixes(x, state, cu_seqlens)
        before = None if state is None else (state.tensor("s"), state.tensor("m"))
        k, v, log_a = self.k_proj(xk), self.v_proj(xv), -self.time_decay.exp()
        o, (s, m) = wkv(k, v, log_a, self.u, state=before, cu_seqlens=cu_seqlens)
        y = torch.sigmoid(self.r_proj(xr)) * o
        return self.out_proj(y.to(x.dtype)), State(shift=shift, s=s, m=m)
