"""What the RWKV mixers share: the token shift and its initial mixes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers.base import Mixer
from longscan.ops import _across
from longscan.ops._check import check_state
from longscan.ops._layout import check_cu_seqlens
from longscan.state import State


def token_shift(x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token, and the last one as the next state.

    Shapes: x [B, T, D]; state["shift"] [rows, 1, D], zeros before a sequence begins.
    """
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    first = None
    if state is not None:
        first = state.tensor("shift").to(x.dtype)
        check_state("shift", first, (rows, 1, x.shape[2]), "[rows, 1, D]")
    first = _across.window(lambda cut: x[:, cut], 1, first)
    if first is None:
        first = x.new_zeros(rows, 1, x.shape[2])
    if cu_seqlens is None:
        # A copy: a view would keep the whole of x alive with the state.
        return torch.cat([first, x[:, :-1]], 1), x[:, -1:].clone()
    if not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    bounds = cu_seqlens.long()
    shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
    return shifted.index_copy(1, bounds[:-1], first.transpose(0, 1)), x[0, bounds[1:] - 1, None]


class TokenShiftMixer(Mixer):
    """A mixer whose projections read x_t + (x_{t-1} - x_t) mu, with a mu for each.

    mu [n, d_model] holds one row for each projection, the share of the previous token.
    layer, n_layers: which of the model's layers of this kind it is; None: not known.
    """

    no_weight_decay = ("mu",)
    shardable = True

    def __init__(
        self, d_model: int, n_mixes: int, layer: int | None = None, n_layers: int | None = None
    ) -> None:
        super().__init__()
        if (layer is None) != (n_layers is None):
            raise ValueError("give both layer and n_layers, or neither")
        if layer is not None and n_layers is not None and not 0 <= layer < n_layers:
            raise ValueError(f"layer ({layer}) must lie in 0..{n_layers - 1}: it counts from 0")
        self.d_model, self.layer, self.n_layers = d_model, layer, n_layers
        self.mu = nn.Parameter(torch.empty(n_mixes, d_model))

    @property
    def _rise(self) -> float:
        """0 in the first layer, 1 in the last."""
        return (self.layer or 0) / max(1, (self.n_layers or 1) - 1)

    @property
    def _fall(self) -> float:
        """1 in the first layer, almost 0 in the last."""
        return 1 - (self.layer or 0) / (self.n_layers or 1)

    def _channels(self, like: Tensor) -> Tensor:
        """0 for the first channel, 1 for the last."""
        steps = torch.arange(like.numel(), dtype=like.dtype, device=like.device)
        return (steps / max(1, like.numel() - 1)).view_as(like)

    @torch.no_grad()
    def _init_mu(self, powers: list[float], less: list[float] | None = None) -> None:
        """mu = 1 - (channel / d_model)^power - less, one row for each."""
        at = torch.arange(self.d_model, dtype=self.mu.dtype, device=self.mu.device) / self.d_model
        for row, power, minus in zip(self.mu, powers, less or [0.0] * len(powers), strict=True):
            row.copy_(1 - at**power - minus)

    def _mixes(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """What each projection reads, and the state of the shift."""
        self._check_input(x)
        before, shift = token_shift(x, state, cu_seqlens)
        change = before - x
        return [torch.addcmul(x, change, m) for m in self.mu.to(x.dtype)], shift

    def _no_shift(self, batch: int) -> Tensor:
        return self.mu.new_zeros(batch, 1, self.d_model)


def head_size(d_model: int, d_head: int | None) -> int:
    """d_head, or the largest of 64, 32, ... that divides d_model.

    Raises: ValueError if a given d_head does not divide it.
    """
    d_head = d_head or math.gcd(d_model, 64)
    if d_model % d_head:
        raise ValueError(f"d_head ({d_head}) must divide d_model ({d_model})")
    return d_head
