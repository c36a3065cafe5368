"""Mamba-2 (state space duality)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import (
    RMSNorm,
    ShortConv,
    convolved_projection,
    init_a_log_,
    init_dt_bias_,
)
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype
from longscan.ops._gates_fused import gates_fits, gates_fused
from longscan.ops.decay import decay
from longscan.ops.dispatch import by_kernel
from longscan.ops.norm import gated_rms_norm
from longscan.ops.step import Conv, Decay, is_token, step
from longscan.state import State


class Mamba2(Mixer):
    """A selective state space with one decay per head, computed as masked linear attention.

    dt_t = clamp(softplus(raw_t + dt_bias), dt_limit);   log_a_t = -exp(A_log) dt_t
    h_t = exp(log_a_t) h_{t-1} + dt_t B_t x_t^T;   y_t = h_t^T C_t + D x_t
    out = out_proj(norm(y silu(z)))

    Shapes: x, y [B, T, d_model]; inner width E = expand d_model (d_ssm of it in the state space),
    H = d_ssm / d_head heads, n_groups pairs of B and C of d_state;
    in_proj rows [z0 | x0 | z | x B C | dt], z0 and x0 only if d_ssm < E;
    state: conv [B, d_conv - 1, d_ssm + 2 n_groups d_state], s [B, H, d_state, d_head].
    Precision: A_log, D, dt_bias, decays and state float32.
    Source: arXiv 2405.21060, listing 1 and section 7; parameter names of the authors' code.
    Differs: the step form clamps dt to dt_limit as the whole form does; s has the key axis first.
    Reference: state-spaces/mamba, Apache-2.0.
    """

    reads_by_product = True
    shardable = True
    keep_float32 = ("A_log", "D", "dt_bias")
    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        d_head: int = 64,
        d_ssm: int | None = None,
        n_groups: int = 1,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        skip_per_channel: bool = False,
        norm: bool = True,
        norm_before_gate: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        d_ssm = inner if d_ssm is None else d_ssm
        d_head = min(d_head, d_ssm)
        if not 0 < d_ssm <= inner or d_ssm % d_head:
            raise ValueError(
                f"d_ssm ({d_ssm}) must be a multiple of d_head ({d_head}) up to {inner}"
            )
        n_heads = d_ssm // d_head
        if n_heads % n_groups:
            raise ValueError(f"n_groups ({n_groups}) must divide the number of heads ({n_heads})")
        self.d_model, self.d_state, self.d_head = d_model, d_state, d_head
        self.n_heads, self.n_groups, self.d_ssm = n_heads, n_groups, d_ssm
        self.norm_before_gate, self.norm_eps = norm_before_gate, norm_eps
        self.dt_limit = dt_limit if tuple(dt_limit) != (0.0, float("inf")) else None
        self._a_range, self._dt = a_range, (*dt_range, dt_floor)
        states = n_groups * d_state
        self._xbc = [d_ssm, states, states]
        self._split = [inner - d_ssm, inner - d_ssm, d_ssm, sum(self._xbc), n_heads]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=bias)
        self.conv1d = ShortConv(sum(self._xbc), d_conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(d_ssm if skip_per_channel else n_heads))
        self.norm = RMSNorm(d_ssm, norm_eps) if norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear and Conv1d defaults of torch, biases of projections 0, A = U(a_range), D = 1."""
        for p in (self.in_proj, self.out_proj):
            nn.init.kaiming_uniform_(p.weight, a=math.sqrt(5))
            if p.bias is not None:
                nn.init.zeros_(p.bias)
        self.conv1d.reset_parameters()
        init_dt_bias_(self.dt_bias, *self._dt)
        init_a_log_(self.A_log, *self._a_range)
        nn.init.ones_(self.D)
        if self.norm is not None:
            self.norm.reset_parameters()

    def init_state(self, batch: int) -> State:
        w = self.A_log
        shape = (batch, self.n_heads, self.d_state, self.d_head)
        return State(
            conv=self.conv1d.init_state(batch), s=w.new_zeros(shape, dtype=compute_dtype(w))
        )

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        window = None if state is None else state.tensor("conv")
        if state is not None and is_token(x, state, cu_seqlens):
            z0, x0, z, xbc, dt = self.in_proj(x).split(self._split, -1)
            y, after = self._step(xbc[:, 0], dt[:, 0], state)
            return self._project(y, z, x0, z0, x), after
        (u, b, c), window, (z0, x0, z, dt) = convolved_projection(
            self.in_proj, self.conv1d, x, self._split, self._xbc, at=3, state=window,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        u = u.unflatten(-1, (self.n_heads, self.d_head))
        b, c = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (b, c))
        dt, log_a = self._steps(dt)
        per_head = self.D.numel() == self.n_heads
        y, s = decay(
            c,
            b,
            u,
            log_a,
            scale=dt,
            skip=self.D if per_head else None,
            state=None if state is None else state.tensor("s"),
            cu_seqlens=cu_seqlens,
        )
        if not per_head:
            y = torch.addcmul(y, u, self.D.view(self.n_heads, -1).to(u.dtype))
        return self._project(y.flatten(-2), z, x0, z0, x), State(conv=window, s=s)

    def _steps(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """dt and log_a [B, T, H]; by one kernel where there is one. (Compilers make one.)"""
        given = (None, raw, self.A_log, self.dt_bias)
        plain = self.dt_limit is None and not torch.compiler.is_compiling()
        if plain and by_kernel("decay", raw, lambda: gates_fits(*given)):
            return gates_fused(*given)
        dt = F.softplus(raw.to(self.dt_bias.dtype) + self.dt_bias)
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        return dt, dt * -self.A_log.exp()

    def _step(self, xbc: Tensor, dt: Tensor, state: State) -> tuple[Tensor, State]:
        """One token. xbc [B, channels]; dt [B, H]; y [B, 1, d_ssm]."""
        u, b, c = xbc.split(self._xbc, -1)
        low, high = self.dt_limit or (0.0, float("inf"))
        ends = self.d_ssm, self.d_ssm + self._xbc[1]
        done = step(
            c.unflatten(-1, (self.n_groups, -1)),
            b.unflatten(-1, (self.n_groups, -1)),
            u.unflatten(-1, (self.n_heads, -1)),
            state.tensor("s"),
            conv=Conv(
                state.tensor("conv"), self.conv1d.weight, self.conv1d.bias, (ends[1], ends[0], 0)
            ),
            silu=True,
            decay=Decay("softplus", dt, self.A_log, self.dt_bias, low=low, high=high),
            scale_by_dt=True,
            skip=self.D,
        )
        assert done.window is not None
        return done.o.flatten(1).unsqueeze(1), State(conv=done.window, s=done.s)

    def _project(self, y: Tensor, z: Tensor, x0: Tensor, z0: Tensor, x: Tensor) -> Tensor:
        """What follows the recurrence. Shapes: y, z [B, T, d_ssm]; out [B, T, d_model]."""
        if self.norm is None:
            y = y * F.silu(z)
        else:
            y = gated_rms_norm(
                y, z, self.norm.weight, self.norm_eps, activation="silu", n_groups=self.n_groups,
                gate_first=not self.norm_before_gate,
            )  # fmt: skip
        y = y.to(x.dtype)
        if x0.shape[-1]:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y)
