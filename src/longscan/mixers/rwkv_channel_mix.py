"""RWKV's channel mix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._rwkv import TokenShiftMixer
from longscan.state import State


class RWKVChannelMix(TokenShiftMixer):
    """An MLP with a squared ReLU that reads a mix of each token and the one before it.

    k_t = W_k (x_t + (x_{t-1} - x_t) mu_k),   y_t = W_out max(k_t, 0)^2

    With `gated`, as in RWKV-4 and 5, y_t is multiplied by a sigmoid of W_r on a mix of its own.

    Shapes: x, y [B, T, d_model]; k of d_ff; mu rows [k | r], r only if gated;
    state: shift [B, 1, d_model], the last token.
    d_ff: hidden width; None: 4 d_model. gated: whether a sigmoid gate multiplies the output.
    layer: which of the model's channel mixes this is, from 0; only the initialisation asks.
    n_layers: how many there are; None, as for layer: not known.
    Precision: the weights'.
    Source: arXiv 2305.13048 (gated) and 2503.14456 (not), channel mixing.
    Differs: mu is the share of the previous token, as in RWKV-7; RWKV-4 and 5 store 1 - mu.

    Reference: BlinkDL/RWKV-LM, Apache-2.0.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        gated: bool = False,
        layer: int | None = None,
        n_layers: int | None = None,
    ) -> None:
        super().__init__(d_model, 2 if gated else 1, layer, n_layers)
        d_ff = d_ff or 4 * d_model
        self.k_proj = nn.Linear(d_model, d_ff, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False) if gated else None
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_k orthogonal, W_out and W_r zero; mu falls over the channels, less in later layers."""
        nn.init.orthogonal_(self.k_proj.weight)
        nn.init.zeros_(self.out_proj.weight)
        if self.r_proj is None:
            self._init_mu([self._fall**4])
        else:
            nn.init.zeros_(self.r_proj.weight)
            self._init_mu([self._fall] * 2)

    def init_state(self, batch: int) -> State:
        return State(shift=self._no_shift(batch))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        mixes, shift = self._mixes(x, state, cu_seqlens)
        y = self.out_proj(F.relu(self.k_proj(mixes[0])).square())
        if self.r_proj is not None:
            y = torch.sigmoid(self.r_proj(mixes[1])) * y
        return y, State(shift=shift)
