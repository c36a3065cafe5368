"""Retention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longscan.mixers._heads import HeadMixer
from longscan.ops._check import compute_dtype, widen
from longscan.ops.decay import decay
from longscan.ops.rotary import rotary, rotary_factors
from longscan.ops.step import Decay, Rotary
from longscan.state import State


class Retention(HeadMixer):
    """Linear attention with a fixed decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = K^-0.5 S_t^T q_t,   gamma_h = 1 - 2^(-5 - h)
    with q and k turned by their positions.

    Shapes: x, y [B, T, d_model]; q, k heads of d_key = d_model / n_heads, v heads of
    d_value = 2 d_model / n_heads; state: s [B, n_heads, d_key, d_value], length [B] tokens seen.
    Precision: angles, decays and state float32.
    Source: arXiv 2307.08621, eqs. 5-8.
    Differs: pairs of channels are halves of a head, not neighbours (a fixed permutation of q's
    and k's rows), with RoPE's frequencies; the norm per head has a weight, as in the
    flash-linear-attention layer.
    Reference: microsoft/torchscale, MIT; checkpoint names of fla-org/flash-linear-attention, MIT.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        rope_theta: float = 10000.0,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        d_key = d_key or max(2, d_model // n_heads)
        if d_key % 2:
            raise ValueError(f"d_key must be even for rotary positions, not {d_key}")
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_heads,
            d_key=d_key,
            d_value=d_value or 2 * d_key,
            extras=[],
            d_conv=d_conv,
            gate="silu" if output_gate else None,
            norm_eps=norm_eps,
        )
        self.rope_theta = rope_theta
        self._constants: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @property
    def log_decay(self) -> Tensor:
        """log gamma of each head [n_heads], constant."""
        h = torch.arange(self.n_heads, dtype=torch.float64)
        return torch.log1p(-torch.exp2(-5 - h))

    def reset_parameters(self) -> None:
        """Xavier uniform with gain 2^-2.5 (out_proj 1/2), norms 1."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.in_proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)

    def init_state(self, batch: int) -> State:
        length = torch.zeros(batch, dtype=torch.long, device=next(self.parameters()).device)
        return State(super().init_state(batch), length=length)

    def _beside(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and angles per token as s is, kept: a step must not wait for copies."""
        kept = self._constants
        if kept is None or kept[0].device != s.device or kept[0].dtype != s.dtype:
            with torch.inference_mode(False), torch.no_grad():
                steps = torch.arange(0, self.d_key, 2, device=s.device, dtype=s.dtype)
                kept = self.log_decay.to(s), self.rope_theta ** (-steps / self.d_key)
                self._constants = kept
        return kept

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any]:
        length = state.tensor("length")
        decays, turns = self._beside(state.tensor("s"))
        return {
            "silu": self.conv1d is not None,
            "rotary": Rotary(length, turns),
            "q_scale": self.d_key**-0.5,
            "decay": Decay("given", decays.expand(len(length), -1)),
        }

    def _step(
        self, qkv: Tensor, state: State, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o, carried = super()._step(qkv, state, options)
        return o, {**carried, "length": state.tensor("length") + 1}

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        length = v.shape[1]
        cos, sin = rotary_factors(
            length,
            self.d_key,
            self.rope_theta,
            start=None if state is None else state.tensor("length").tolist(),
            cu_seqlens=cu_seqlens,
            dtype=compute_dtype(v),
            device=v.device,
        )
        q = rotary(widen(q), cos, sin) * self.d_key**-0.5
        k = rotary(widen(k), cos, sin)
        log_a = self.log_decay.to(q).expand(*v.shape[:2], -1)
        s = None if state is None else state.tensor("s")
        o, s = decay(q, k, v, log_a, state=s, cu_seqlens=cu_seqlens)
        seen = (
            torch.full((v.shape[0],), length, device=v.device)
            if cu_seqlens is None
            else cu_seqlens.diff().long()
        )
        return o, {"s": s, "length": seen if state is None else seen + state.tensor("length")}
