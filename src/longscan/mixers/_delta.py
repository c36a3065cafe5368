"""What the delta-rule mixers share: write strength, forget gate, unit keys and queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._heads import HeadMixer
from longscan.mixers._parts import init_a_log_, init_dt_bias_, softplus_gate
from longscan.ops._check import widen
from longscan.ops._gates_fused import gates_fits, gates_fused
from longscan.ops.delta import delta
from longscan.ops.dispatch import by_kernel
from longscan.ops.norm import l2_norm
from longscan.ops.step import Decay, Delta
from longscan.state import State


class DeltaMixer(HeadMixer):
    """A HeadMixer around `ops.delta`, with an optional forget gate of one number per head.

    Extras of in_proj: b (steps n_value_heads, the step the slower index), then a (n_value_heads)
    with a forget gate.
        beta = sigmoid(b), doubled with negative_eigenvalues
        log_a = -exp(A_log) softplus(a + dt_bias)
    """

    keep_float32 = ("A_log", "dt_bias")
    no_weight_decay = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        n_value_heads: int,
        negative_eigenvalues: bool,
        forget_gate: bool,
        steps: int = 1,
        **heads: Any,
    ) -> None:
        if steps < 1:
            raise ValueError(f"a token needs at least one delta-rule step, not {steps}")
        extras = [steps * n_value_heads] + ([n_value_heads] if forget_gate else [])
        heads = {"extras": extras, **heads}
        super().__init__(d_model, n_value_heads=n_value_heads, steps=steps, **heads)
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        sizes = self.gate_sizes() if forget_gate else (None, None)
        for name, n in zip(("A_log", "dt_bias"), sizes, strict=True):
            self.register_parameter(name, None if n is None else nn.Parameter(torch.empty(n)))
        self.A_log: nn.Parameter | None
        self.dt_bias: nn.Parameter | None

    a_log_range = (0.0, 16.0)

    def gate_sizes(self) -> tuple[int, int]:
        """Lengths of A_log and dt_bias."""
        return self.n_value_heads, self.n_value_heads

    def reset_parameters(self) -> None:
        """As HeadMixer; A_log = log U(range), softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        super().reset_parameters()
        if self.A_log is not None and self.dt_bias is not None:
            init_a_log_(self.A_log, *self.a_log_range)
            init_dt_bias_(self.dt_bias)

    def activate(self, qkv: Tensor) -> Tensor:
        return F.silu(qkv)

    @property
    def unit_heads(self) -> bool:
        return type(self).normalise is DeltaMixer.normalise

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys, queries of length K^-0.5."""
        return l2_norm(q, scale=self.d_key**-0.5), l2_norm(k)

    def log_decay(self, extras: list[Tensor]) -> Tensor | None:
        """The log forget gate, or None."""
        if self.A_log is None or self.dt_bias is None:
            return None
        return softplus_gate(extras[1], self.A_log, self.dt_bias)

    def gates(self, extras: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """beta and `log_decay`, by one kernel where there is one. (Compilers make one.)"""
        per_head = type(self).log_decay is DeltaMixer.log_decay
        if per_head and self.A_log is not None and self.dt_bias is not None:
            b, a = extras
            given = (b, a, self.A_log, self.dt_bias)
            eager = not torch.compiler.is_compiling()
            if eager and by_kernel("delta", b, lambda: gates_fits(*given)):
                return gates_fused(*given, scale=self.beta_max)
        return self.beta_max * widen(extras[0]).sigmoid(), self.log_decay(extras)

    def step_decay(self, extras: list[Tensor]) -> Decay | None:
        """`log_decay` for `ops.step`."""
        if self.A_log is None or self.dt_bias is None:
            return None
        return Decay("softplus", extras[1], self.A_log, self.dt_bias)

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any] | None:
        if self.steps > 1:
            return None
        return {
            "silu": True,
            "unit": True,
            "q_scale": self.d_key**-0.5,
            "decay": self.step_decay(extras),
            "rule": Delta(extras[0], self.beta_max),
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
        beta, log_a = self.gates(extras)
        if self.steps > 1:
            beta = beta.unflatten(-1, (self.steps, -1))
        s = None if state is None else state.tensor("s")
        o, s = delta(q, k, v, beta, log_a, state=s, cu_seqlens=cu_seqlens)
        return o, {"s": s}
