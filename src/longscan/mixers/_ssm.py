"""What mixers with one time-invariant system per feature share around the system."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.algebra import SegmentMap
from longscan.mixers._parts import softplus_inverse
from longscan.mixers.base import Mixer
from longscan.ops import _across, _cauchy
from longscan.ops._check import check_state, compute_dtype, full_precision
from longscan.ops._layout import remembered
from longscan.ops.dispatch import backend_of
from longscan.state import State

STEPS = {"exp": torch.exp, "softplus": F.softplus}
INVERSE_STEPS = {"exp": torch.log, "softplus": softplus_inverse}


class SystemMixer(Mixer):
    """A linear system per feature, a skip, an activation, a projection with a gate.

        v = lti(x) + D x;   y = GLU(out_proj(GELU(v)))

    d_state: N, even.
    channels: outputs per feature.
    n_ssm: independent copies of A and B; feature h uses copy h mod n_ssm; None: one per feature.
    dt_range: dt starts log-uniform in it; 1 / dt should cover local to the sequence length.
    dt_transform: dt = softplus(inv_dt) or exp(inv_dt); older checkpoints have exp.
    rate: multiplies dt, 2 for a sequence of which every second sample is left; may be set later.
    bidirectional: a second kernel on the strict future; then no state and no decoding.
    activation: gelu or None. output: glu, linear, or None for no projection at all.
    dropout: before and behind the activation. tie_dropout: one mask for all tokens of a sequence.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        channels: int,
        n_ssm: int | None,
        dt_range: tuple[float, float],
        dt_transform: str,
        rate: float,
        bidirectional: bool,
        activation: str | None,
        output: str | None,
        dropout: float,
        tie_dropout: bool,
    ) -> None:
        super().__init__()
        n_ssm = d_model if n_ssm is None else n_ssm
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and positive, not {d_state}")
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"n_ssm ({n_ssm}) must divide d_model ({d_model})")
        if dt_transform not in STEPS:
            raise ValueError(f"dt_transform must be softplus or exp; got {dt_transform!r}")
        if activation not in ("gelu", None):
            raise ValueError(f"activation must be 'gelu' or None; got {activation!r}")
        if output not in ("glu", "linear", None):
            raise ValueError(f"output must be 'glu', 'linear' or None; got {output!r}")
        if output is None and channels != 1:
            raise ValueError("output=None leaves the channels as they are: use channels=1")
        self.d_model, self.d_state, self.channels, self.n_ssm = d_model, d_state, channels, n_ssm
        self.dt_transform, self.rate, self.bidirectional = dt_transform, rate, bidirectional
        self.activation, self.output = activation, output
        self.dropout, self.tie_dropout = dropout, tie_dropout
        self._dt_range = dt_range
        half = d_state // 2
        self.inv_dt = nn.Parameter(torch.empty(d_model))
        self.A_real = nn.Parameter(torch.empty(n_ssm, half))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, half))
        self.C = nn.Parameter(torch.empty((1 + bidirectional) * channels, d_model, half, 2))
        self.D = nn.Parameter(torch.empty(channels, d_model))
        rows = d_model * (2 if output == "glu" else 1)
        self.out_proj = nn.Linear(channels * d_model, rows) if output else None

    @torch.no_grad()
    def _reset_common(self, values: Tensor) -> None:
        """Everything but B, from the eigenvalues of A [N/2] (one of each conjugate pair)."""
        self.A_real.copy_((-values.real).clamp(min=1e-4).log().expand_as(self.A_real))
        self.A_imag.copy_((-values.imag).clamp(min=1e-4).expand_as(self.A_imag))
        low, high = (math.log(x) for x in self._dt_range)
        dt = (torch.rand_like(self.inv_dt) * (high - low) + low).exp()
        self.inv_dt.copy_(INVERSE_STEPS[self.dt_transform](dt))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)
        if self.out_proj is not None:
            self.out_proj.reset_parameters()

    def system(self, dtype: torch.dtype) -> Any:
        """The discrete systems, in whatever form `recur` wants them."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def recur(
        self,
        system: Any,
        u: Tensor,
        rows: slice,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a system with the outputs C[rows]. Shapes: u [B, T, H]; -> [B, T, M, H], state."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def stepper(self, dtype: torch.dtype) -> _cauchy.Stepper:
        """The same systems for one token."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def step_sizes(self, dtype: torch.dtype) -> Tensor:
        """dt [H, 1], `rate` included."""
        return STEPS[self.dt_transform](self.inv_dt.to(dtype)).unsqueeze(-1) * self.rate

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        dtype = compute_dtype(x, self.C)
        wide = x.to(dtype)
        with full_precision(x):
            if self.bidirectional:
                v, state = self._both_ways(wide, state, cu_seqlens), State()
            else:
                s = None if state is None else state.tensor("s").to(dtype)
                one = x.shape[1] == 1 and cu_seqlens is None
                if one and backend_of("lti", x).name == "torch":
                    v, s = self._step(wide, s)
                else:
                    v, s = self.recur(self.system(dtype), wide, slice(None), s, cu_seqlens)
                state = State(s=s)
            v = torch.addcmul(v, wide.unsqueeze(2), self.D.to(dtype))
            v = self._drop(v.flatten(2).to(x.dtype), cu_seqlens)
        if self.activation is not None:
            v = self._drop(F.gelu(v), cu_seqlens)
        if self.out_proj is not None:
            v = self.out_proj(v.contiguous())  # a product with gaps in it takes three times as long
        return F.glu(v) if self.output == "glu" else v, state

    def _step(self, u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """`recur` for one token, with no work on the systems if they are kept."""
        shape = (len(u), self.d_model, self.d_state // 2, 2)
        check_state("s", s, shape, "[rows, H, N/2, 2]")
        s = u.new_zeros(shape) if s is None else s
        v, s = _cauchy.step(self.stepper(u.dtype), u.squeeze(1), s)
        return v.unsqueeze(1), s

    def _both_ways(self, u: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        """sum_j k0_j u_{t-j} + sum_j k1_j u_{t+1+j} within each sequence."""
        if state is not None and len(state):
            raise ValueError(
                f"a bidirectional {type(self).__name__} carries no state: give it whole sequences"
            )
        system, m = self.system(u.dtype), self.channels
        y, _ = self.recur(system, u, slice(m), None, cu_seqlens)
        mirrored = None
        if cu_seqlens is not None:
            mirrored = remembered(
                cu_seqlens, "mirrored", lambda: cu_seqlens[-1] - cu_seqlens.flip(0)
            )
        z, _ = self.recur(system, u.flip(1), slice(m, None), None, mirrored)
        z = F.pad(z.flip(1)[:, 1:], (0, 0, 0, 0, 0, 1))
        if cu_seqlens is not None:  # the last token of a sequence has no future
            z = z.index_fill(1, cu_seqlens[1:-1].long() - 1, 0)
        return y + z

    def _drop(self, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return v
        if not self.tie_dropout:
            return F.dropout(v, self.dropout)
        rows = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        mask = F.dropout(v.new_ones(rows, v.shape[2], 1), self.dropout)
        # A sequence keeps the mask of its first shard: a state that no token changes.
        same = SegmentMap("identity", None, torch.zeros_like(mask[: len(v)]))
        mask = _across.entering(lambda _: same, mask).squeeze(-1)
        if cu_seqlens is None:
            return v * mask.unsqueeze(1)
        return v * mask.repeat_interleave(cu_seqlens.diff(), 0, output_size=v.shape[1])

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            return State()
        w = self.A_real
        shape = (batch, self.d_model, self.d_state // 2, 2)
        return State(s=w.new_zeros(shape, dtype=compute_dtype(w)))
