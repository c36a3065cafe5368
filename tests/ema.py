"""A whole mixer from outside the package, as small as one can be: a moving average per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers.base import Mixer
from longscan.ops.decay import decay
from longscan.registry import Entry, register
from longscan.state import State


class MovingAverage(Mixer):
    """h_t = a h_{t-1} + (1 - a) in_proj(x_t), y_t = out_proj(h_t), with a learned a per channel.

    Shapes: x, y [B, T, d_model]; state s [B, d_model, 1, 1].
    """

    keep_float32 = ("rate",)
    no_weight_decay = ("table",)
    lr_limit = {"rate": 3e-4}  # noqa: RUF012

    def __init__(self, d_model: int, *, slowest: float = 64.0) -> None:
        super().__init__()
        self.d_model, self.slowest = d_model, slowest
        self.in_proj = nn.Linear(d_model, d_model)
        self.rate = nn.Parameter(torch.empty(d_model))
        self.table = nn.Parameter(torch.empty(1, d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        with torch.no_grad():
            times = torch.logspace(0, 1, self.d_model, self.slowest)
            self.rate.copy_(-times.log())
        nn.init.ones_(self.table)

    def init_state(self, batch: int) -> State:
        return State(s=self.rate.new_zeros(batch, self.d_model, 1, 1))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        u = (self.in_proj(x) * self.table).unsqueeze(-1)
        log_a = -self.rate.exp().expand(u.shape[:-1])
        v = u * -torch.expm1(log_a).unsqueeze(-1)
        one = torch.ones_like(v)
        h, s = decay(one, one, v, log_a, state=state and state.tensor("s"), cu_seqlens=cu_seqlens)
        return self.out_proj(h.squeeze(-1).to(x.dtype)), State(s=s)


register(
    Entry("ema", MovingAverage, "A moving average", "none", 2025, "linear, diagonal", mlp=False)
)
