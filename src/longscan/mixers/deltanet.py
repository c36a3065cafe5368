"""DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.mixers._delta import DeltaMixer
from longscan.state import State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


class DeltaNet(DeltaMixer):
    """Linear attention that corrects its memory: it writes the difference to what it reads.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = K^-0.5 S_t^T q_t
    with unit q and k, beta_t = sigmoid(w x_t), doubled with negative_eigenvalues.

    Shapes: x, y [B, T, d_model]; heads of d_key and d_value, d_model / n_heads each by default;
    state [B, n_heads, d_key, d_value].
    qk_activation: silu, relu, elu (elu + 1) or identity, behind the convolution; v has SiLU.
    qk_norm: "l2" (unit length), or "sum" (entries sum to one, for positive activations).
    Precision: norms, beta and state float32.
    Source: arXiv 2406.06484, section 3.
    Differs: nothing known; mind the head norm's eps (the authors' layer 1e-5, models 1e-6).
    Reference: fla-org/flash-linear-attention, MIT.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        negative_eigenvalues: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        if qk_activation not in ACTIVATIONS:
            raise ValueError(f"qk_activation must be one of {', '.join(ACTIVATIONS)}")
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"qk_norm must be 'l2' or 'sum', not {qk_norm!r}")
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_heads,
            d_key=d_key or max(1, d_model // n_heads),
            d_value=d_value or max(1, d_model // n_heads),
            d_conv=d_conv,
            gate="silu" if output_gate else None,
            negative_eigenvalues=negative_eigenvalues,
            forget_gate=False,
            norm_eps=norm_eps,
        )
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.silu_behind_conv = qk_activation == "silu"
        self.reset_parameters()

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any] | None:
        usual = self.qk_activation == "silu" and self.qk_norm == "l2"
        return super().step_options(extras, state) if usual else None

    def activate(self, qkv: Tensor) -> Tensor:
        if self.qk_activation == "silu":
            return F.silu(qkv)
        qk, v = qkv.split([self._qkv[0] + self._qkv[1], self._qkv[2]], -1)
        return torch.cat([ACTIVATIONS[self.qk_activation](qk), F.silu(v)], -1)

    @property
    def unit_heads(self) -> bool:
        return self.qk_norm == "l2"

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm == "l2":
            return super().normalise(q, k)
        q, k = (x / x.sum(-1, keepdim=True) for x in (q, k))
        return q * self.d_key**-0.5, k
