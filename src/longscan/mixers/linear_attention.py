"""Linear attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from longscan.mixers._heads import HeadMixer
from longscan.ops._check import widen
from longscan.ops.decay import decay
from longscan.state import State


class LinearAttention(HeadMixer):
    """Attention with a kernel phi(q) . phi(k) in place of the softmax, as a recurrence.

    S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t)),   phi(x) = elu(x) + 1

    Shapes: x, y [B, T, d_model]; heads of d_key and d_value, d_model / n_heads each by default;
    state [B, n_heads, d_key, d_value + 1], whose last column is z.
    Precision: state and normaliser float32.
    Source: arXiv 2006.16236, eqs. 7 and 16-20.
    Differs: no biases in the projections; eps 1e-6 in the divisor, as the authors' code.
    Reference: idiap/fast-transformers, MIT; checkpoint names of fla-org/flash-linear-attention,
    MIT.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_heads,
            d_key=d_key or max(1, d_model // n_heads),
            d_value=d_value or max(1, d_model // n_heads),
            extras=[],
            d_conv=d_conv,
            gate=None,
            norm_eps=None,
        )
        self.eps = eps
        self.reset_parameters()

    def init_state(self, batch: int) -> State:
        state = super().init_state(batch)
        return State(state, s=F.pad(state.tensor("s"), (0, 1)))

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any]:
        return {
            "silu": self.conv1d is not None, "feature": True, "divide": True, "eps": self.eps
        }  # fmt: skip

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k = (F.elu(widen(x)) + 1 for x in (q, k))
        v = F.pad(widen(v), (0, 1), value=1.0)
        s = None if state is None else state.tensor("s")
        o, s = decay(q, k, v, state=s, cu_seqlens=cu_seqlens)
        o, total = o.split([self.d_value, 1], -1)
        return o / (total + self.eps), {"s": s}
