"""Kimi Delta Attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.mixers._delta import DeltaMixer
from longscan.mixers._parts import softplus_gate
from longscan.ops._check import widen
from longscan.ops.step import Decay


class KimiDeltaAttention(DeltaMixer):
    """The delta rule with a forget gate per key channel.

    log alpha_t = -exp(A_log) softplus(W2 W1 x_t + dt_bias)
               or gate_floor sigmoid(exp(A_log) (W2 W1 x_t + dt_bias))     with a gate_floor < 0
    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-0.5 S_t^T q_t

    Shapes: x, y [B, T, d_model]; n_heads q/k heads of d_key = d_model / n_heads, n_value_heads
    heads of d_value; state [B, n_value_heads, d_key, d_value].
    Extras of in_proj: b (n_value_heads), the forget gate's bottleneck (d_value). The output gate
    is a sigmoid of its own bottleneck of d_value, with a bias if gate_bias.
    gate_floor: e.g. -5, a lower bound on the log gate.
    Precision: A_log, dt_bias, gates, norms and state float32.
    Source: arXiv 2510.26692, eqs. 1 and 10.
    Differs: nothing known; published implementations disagree on gate_bias.
    Reference: fla-org/flash-linear-attention, MIT.
    """

    a_log_range = (1.0, 16.0)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_value_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        gate_floor: float | None = None,
        gate_bias: bool = True,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        if gate_floor is not None and not gate_floor < 0:
            raise ValueError(f"gate_floor bounds a log decay: it must be < 0, not {gate_floor}")
        n_value_heads = n_value_heads or n_heads
        d_key = d_key or max(1, d_model // n_heads)
        d_value = d_value or d_key
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_value_heads,
            d_key=d_key,
            d_value=d_value,
            extras=[n_value_heads, d_value],
            d_conv=d_conv,
            gate="sigmoid",
            gate_rank=d_value,
            gate_bias=gate_bias,
            negative_eigenvalues=negative_eigenvalues,
            forget_gate=True,
            norm_eps=norm_eps,
        )
        self.gate_floor = gate_floor
        self.decay_proj = nn.Linear(d_value, n_value_heads * d_key, bias=False)
        self.reset_parameters()

    def gate_sizes(self) -> tuple[int, int]:
        return self.n_value_heads, self.n_value_heads * self.d_key

    def reset_parameters(self) -> None:
        """As DeltaMixer; A_log = log U(1, 16), or 0 with a gate_floor."""
        super().reset_parameters()
        if self.gate_floor is not None and self.A_log is not None:
            nn.init.zeros_(self.A_log)

    def step_decay(self, extras: list[Tensor]) -> Decay:
        raw, floor = self._heads(self.decay_proj(extras[1]), self.d_key), self.gate_floor
        kind, factor = ("softplus", 1.0) if floor is None else ("bounded", floor)
        return Decay(kind, raw, self.A_log, self.dt_bias, factor)

    def log_decay(self, extras: list[Tensor]) -> Tensor:
        assert self.A_log is not None
        assert self.dt_bias is not None
        raw = self._heads(self.decay_proj(extras[1]), self.d_key)
        a_log, bias = self.A_log.unsqueeze(-1), self.dt_bias.view(-1, self.d_key)
        if self.gate_floor is None:
            return softplus_gate(raw, a_log, bias)
        return self.gate_floor * torch.sigmoid(a_log.exp() * (widen(raw) + bias))
