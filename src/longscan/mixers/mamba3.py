"""Mamba-3: a turning state, written by the trapezoidal rule, with one or several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import RMSNorm, init_dt_bias_
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype
from longscan.ops.norm import rms_norm
from longscan.ops.trapezoid import PAIRS, state_shapes, trapezoid
from longscan.state import State


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0, 1 / (1 - x) for x < 0: positive, linear above, slow to vanish below."""
    return F.relu(x) + (1 + F.relu(-x)).reciprocal()


A_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "heavy_tail": heavy_tail,
    "softplus": F.softplus,
}


class Mamba3(Mixer):
    """A selective state space whose state also turns, read and written at two points per token.

    dt_t = softplus(raw + dt_bias);   A_t = -max(f(raw), a_floor);   lam_t = sigmoid(raw)
    B_t, C_t = RMSNorm(raw) + bias of each head, their first pairs turned by theta_t;
    theta_t = theta_{t-1} + dt_t pi tanh(raw)
    h_t = exp(dt_t A_t) (h_{t-1} + (1 - lam_t) dt_t B_{t-1} x_{t-1}^T) + lam_t dt_t B_t x_t^T
    y_t = h_t^T C_t + D x_t;   out = out_proj(norm(y) silu(z))

    With mimo_rank = R there are R pairs B, C per head and R of x_r = x mimo_x_r and
    z_r = z mimo_z_r; h takes the sum of their writes, and
    out = out_proj(sum_r mimo_o_r norm(y_r) silu(z_r)).

    Shapes: x, out [B, T, d_model]; inner width E = expand d_model in H = E / d_head heads (d_head
    at most E), n_groups sets of B and C of d_state; S = d_state rope_fraction / 2 angles, shared
    by the heads before the product with dt; in_proj rows [z | x | B | C | dt | A | lam | angle] of
    E, E, R n_groups d_state (twice; the rank the slowest index), H, H, H, S; B_bias, C_bias
    [H, R, d_state], mimo_x, mimo_z, mimo_o [H, R, d_head];
    state: angle [B, H, S], s [B, H, d_state, d_head], and of the last token k = turned B
    [B, H, R, d_state] and v = x_r [B, H, R, d_head].
    n_groups: sets of B and C, each serving H / n_groups consecutive heads.
    rope_fraction: share of d_state that turns, 0.5 or 1.
    rotation: which entries turn as a pair, "neighbours" (2i, 2i + 1) or "halves"
    (i, d_state / 2 + i); None: neighbours without ranks, halves with, as the authors' kernels.
    A checkpoint needs the one it was trained with.
    mimo_rank: ranks of the multi-input multi-output form (the authors use 4); None: without it.
    a_activation: f, "heavy_tail" (1 + x above 0, 1 / (1 - x) below) or "softplus" as in
    flash-linear-attention, whose checkpoints have the same names and shapes.
    a_floor: smallest -A.
    norm: whether an RMSNorm over each head comes before the gate.
    Precision: dt_bias, D, B_bias, C_bias, gates, angles and state float32; angles are added up in
    float64 and kept in [-pi, pi].
    Source: arXiv 2603.15569; parameter names of the authors' code.
    Differs: takes a state with any number of tokens; s has the key axis first, and v holds all
    ranks. A token's own write is never mixed with the next token's (see `ops.trapezoid`).
    Reference: state-spaces/mamba, Apache-2.0.
    """

    reads_by_product = True
    shardable = True
    keep_float32 = ("dt_bias", "D", "B_bias", "C_bias")
    no_weight_decay = ("dt_bias", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: int = 2,
        d_head: int = 64,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        rotation: str | None = None,
        mimo_rank: int | None = None,
        a_activation: str = "heavy_tail",
        a_floor: float = 1e-4,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        d_head = min(d_head, inner)
        ranks = 1 if mimo_rank is None else mimo_rank
        if rotation is None:
            rotation = "neighbours" if mimo_rank is None else "halves"
        if inner % d_head or (inner // d_head) % n_groups:
            raise ValueError(
                f"d_head ({d_head}) must divide expand d_model ({inner}), and n_groups "
                f"({n_groups}) the number of heads"
            )
        if ranks < 1:
            raise ValueError(f"mimo_rank must be at least 1, or None; got {mimo_rank}")
        if rope_fraction not in (0.5, 1.0) or d_state % 2 or d_state * rope_fraction < 2:
            raise ValueError(
                f"rope_fraction must be 0.5 or 1 and d_state even, with a pair to turn; got "
                f"{rope_fraction} of {d_state}"
            )
        if rotation not in PAIRS:
            raise ValueError(f"rotation must be one of {', '.join(PAIRS)}; got {rotation!r}")
        if a_activation not in A_ACTIVATIONS:
            raise ValueError(
                f"a_activation must be {' or '.join(A_ACTIVATIONS)}; got {a_activation!r}"
            )
        self.d_model, self.d_state, self.d_head = d_model, d_state, d_head
        self.n_heads, self.n_groups, self.ranks = inner // d_head, n_groups, ranks
        self.n_angles, self.rotation = int(d_state * rope_fraction) // 2, rotation
        self.a_activation, self.a_floor, self.norm_eps = a_activation, a_floor, norm_eps
        self._dt = (*dt_range, dt_floor)
        h, bc = self.n_heads, ranks * n_groups * d_state
        self._split = [inner, inner, bc, bc, h, h, h, self.n_angles]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.B_bias = nn.Parameter(torch.empty(h, ranks, d_state))
        self.C_bias = nn.Parameter(torch.empty(h, ranks, d_state))
        self.B_norm = RMSNorm(d_state, norm_eps)
        self.C_norm = RMSNorm(d_state, norm_eps)
        self.mimo_x, self.mimo_z, self.mimo_o = (
            None if mimo_rank is None else nn.Parameter(torch.empty(h, ranks, d_head))
            for _ in range(3)
        )
        self.D = nn.Parameter(torch.empty(h))
        self.norm = RMSNorm(inner, norm_eps) if norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear defaults of torch, biases of B and C and D = 1, softplus(dt_bias) log-uniform in
        dt_range, mimo_x = mimo_o = 1 / mimo_rank, mimo_z = 1."""
        for p in (self.in_proj, self.out_proj):
            nn.init.kaiming_uniform_(p.weight, a=math.sqrt(5))
        init_dt_bias_(self.dt_bias, *self._dt)
        for p in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(p)
        for p, value in (
            (self.mimo_x, 1 / self.ranks), (self.mimo_z, 1.0), (self.mimo_o, 1 / self.ranks),
        ):  # fmt: skip
            if p is not None:
                nn.init.constant_(p, value)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()

    def init_state(self, batch: int) -> State:
        w = self.dt_bias
        shapes = state_shapes(self.n_heads, self.ranks, self.d_state, self.d_head, self.n_angles)
        return State(
            {k: w.new_zeros(batch, *shape, dtype=compute_dtype(w)) for k, shape in shapes.items()}
        )

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        z, u, b, c, *gates = self.in_proj(x).split(self._split, -1)
        dt, a, lam, angle = (t.to(self.dt_bias.dtype) for t in gates)
        dt = F.softplus(dt + self.dt_bias)
        a = A_ACTIVATIONS[self.a_activation](a).clamp(min=self.a_floor)
        # [B, T, group or head, rank, channel]
        b, c = (t.unflatten(-1, (self.ranks, self.n_groups, -1)).transpose(2, 3) for t in (b, c))
        z, u = (t.unflatten(-1, (self.n_heads, 1, self.d_head)) for t in (z, u))
        if self.mimo_x is not None and self.mimo_z is not None:
            z, u = z * self.mimo_z, u * self.mimo_x
        y, state = trapezoid(
            self.C_norm(c),
            self.B_norm(b),
            u,
            -a * dt,
            dt,
            lam.sigmoid(),
            (math.pi * angle.tanh()).unsqueeze(2),
            self.C_bias,
            self.B_bias,
            state=state,
            cu_seqlens=cu_seqlens,
            pairs=self.rotation,
        )
        y = torch.addcmul(y, u, self.D.view(-1, 1, 1))
        if self.norm is not None:
            y = rms_norm(y, None, self.norm_eps) * self.norm.weight.view(-1, 1, self.d_head)
        y = y * F.silu(z)
        y = y.squeeze(-2) if self.mimo_o is None else (y * self.mimo_o).sum(-2)
        return self.out_proj(y.flatten(-2).to(x.dtype)), state
