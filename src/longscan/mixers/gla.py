"""Gated Linear Attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._heads import HeadMixer
from longscan.ops._check import widen
from longscan.ops.decay import decay
from longscan.ops.step import Decay
from longscan.state import State


class GatedLinearAttention(HeadMixer):
    """Linear attention whose state forgets by a learned gate, one number per key channel.

    alpha_t = sigmoid(W2 W1 x_t + b)^(1 / gate_temperature)
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = K^-0.5 S_t^T q_t

    Shapes: x, y [B, T, d_model]; q, k heads of d_key = d_model / (2 n_heads), v heads of
    d_value = d_model / n_heads; state [B, n_heads, d_key, d_value].
    n_kv_heads: fewer heads for k, v and the gate, each serving consecutive query heads.
    gate_rank: width of the gate's bottleneck. gate_floor: lower clamp on the log gate, or None.
    d_conv: taps of the short convolution on q, k, v, 0 for none (then without activation).
    Precision: gates and state float32.
    Source: arXiv 2312.06635, eq. 3 and section 4.4.
    Differs: RMSNorm where the paper writes LayerNorm, as its code does; no bias on the gate g.
    Reference: fla-org/flash-linear-attention, MIT.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        gate_floor: float | None = None,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        n_kv_heads = n_kv_heads or n_heads
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads})")
        d_key = d_key or max(1, d_model // (2 * n_heads))
        d_value = d_value or max(1, d_model // n_heads)
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_heads,
            d_key=d_key,
            d_value=d_value,
            extras=[gate_rank],
            d_conv=d_conv,
            gate="silu" if output_gate else None,
            norm_eps=norm_eps,
            n_kv_heads=n_kv_heads,
        )
        self.gate_temperature, self.gate_floor = gate_temperature, gate_floor
        self.decay_proj = nn.Linear(gate_rank, n_kv_heads * d_key)
        self.reset_parameters()

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any]:
        raw = self._heads(self.decay_proj(extras[0]), self.d_key)
        low = -float("inf") if self.gate_floor is None else self.gate_floor
        return {
            "silu": self.conv1d is not None,
            "q_scale": self.d_key**-0.5,
            "decay": Decay("logsigmoid", raw, factor=1 / self.gate_temperature, low=low),
        }

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raw = self._heads(self.decay_proj(extras[0]), self.d_key)
        log_a = F.logsigmoid(widen(raw)) / self.gate_temperature
        if self.gate_floor is not None:
            log_a = log_a.clamp(min=self.gate_floor)
        r = self.n_heads // k.shape[2]
        if r > 1:
            k, v, log_a = (x.repeat_interleave(r, 2) for x in (k, v, log_a))
        s = None if state is None else state.tensor("s")
        o, s = decay(q * self.d_key**-0.5, k, v, log_a, state=s, cu_seqlens=cu_seqlens)
        return o, {"s": s}
