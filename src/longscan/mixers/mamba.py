"""Mamba (S6, selective state space)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._parts import ShortConv, convolved_projection, init_dt_bias_
from longscan.mixers.base import Mixer
from longscan.ops import _across
from longscan.ops._check import compute_dtype
from longscan.ops._selective_fused import selective_fits, selective_fused
from longscan.ops._step_fused import scan_fits, scan_fused
from longscan.ops.conv import conv_step
from longscan.ops.dispatch import backend_of, by_kernel
from longscan.ops.norm import rms_norm
from longscan.ops.selective import selective, selective_entering, selective_step
from longscan.ops.step import is_token, window_step
from longscan.state import State


class StepProjection(nn.Linear):
    """The projection to step sizes; its bias stays float32, for bfloat16 steps are too coarse."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.bias.dtype:
            return super().forward(input)
        return F.linear(input, self.weight).to(self.bias.dtype) + self.bias

    def _apply(self, fn, recurse: bool = True):
        kept = self.bias.data
        super()._apply(fn, recurse)
        if self.bias.dtype in (torch.float16, torch.bfloat16):
            self.bias.data = kept.to(self.bias.device, torch.float32)
        return self


class Mamba(Mixer):
    """A state space per channel whose step size, input and output maps follow the tokens.

    u, z = in_proj(x);   u = silu(conv(u));   r, B, C = x_proj(u);   dt = softplus(dt_proj(r))
    h_t[e, n] = exp(-dt_t[e] exp(A_log[e, n])) h_{t-1}[e, n] + dt_t[e] B_t[n] u_t[e]
    y_t[e] = sum_n C_t[n] h_t[e, n] + D[e] u_t[e];   out = out_proj(y silu(z))

    Shapes: x, out [B, T, d_model]; inner width E = expand d_model; r has dt_rank numbers
    ("auto": d_model / 16, rounded up), B and C d_state; in_proj rows [u | z], x_proj rows
    [r | B | C]; state: conv [B, d_conv - 1, E], ssm [B, E, d_state].
    bcdt_norm_eps: if given, r, B and C pass an RMSNorm without weights (FalconMamba).
    Precision: A_log, D, dt_proj.bias, steps and state float32.
    Source: arXiv 2312.00752, section 3.4 and algorithm 2; parameter names of the authors' code.
    Differs: takes a state with any number of tokens; the window holds d_conv - 1 inputs, theirs
    d_conv.
    Reference: state-spaces/mamba, Apache-2.0.
    """

    reads_by_product = True
    shardable = True
    keep_float32 = ("A_log", "D")
    no_weight_decay = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
        bcdt_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dt_rank, str):
            if dt_rank != "auto":
                raise ValueError(f'dt_rank must be a number or "auto", not {dt_rank!r}')
            dt_rank = math.ceil(d_model / 16)
        self.d_model, self.d_state, self.d_inner = d_model, d_state, expand * d_model
        self.bcdt_norm_eps = bcdt_norm_eps
        self._split = [dt_rank, d_state, d_state]
        self._dt, self._dt_scale = (dt_min, dt_max, dt_init_floor), dt_scale
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = ShortConv(inner, d_conv, bias=conv_bias)
        self.x_proj = nn.Linear(inner, sum(self._split), bias=False)
        self.dt_proj = StepProjection(dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear and Conv1d defaults of torch, biases of projections 0, A = -1, ..., -d_state,
        D = 1, dt_proj U(-s, s) with s = dt_scale / sqrt(dt_rank), its bias such that dt is
        log-uniform in [dt_min, dt_max]."""
        for p in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.kaiming_uniform_(p.weight, a=math.sqrt(5))
            if p.bias is not None:
                nn.init.zeros_(p.bias)
        self.conv1d.reset_parameters()
        bound = self._dt_scale * self._split[0] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_dt_bias_(self.dt_proj.bias, *self._dt)
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def init_state(self, batch: int) -> State:
        w = self.in_proj.weight
        h = w.new_zeros(batch, self.d_inner, self.d_state, dtype=compute_dtype(w))
        return State(conv=self.conv1d.init_state(batch), ssm=h)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        one_token = x.shape[1] == 1 and cu_seqlens is None
        if state is not None and one_token and backend_of("selective", x).name != "reference":
            return self._step(x, state)
        (u,), window, (z,) = convolved_projection(
            self.in_proj, self.conv1d, x, [self.d_inner] * 2, [self.d_inner],
            state=None if state is None else state.tensor("conv"), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        r, b, c = self.x_proj(u).split(self._split, -1)
        if self.bcdt_norm_eps is not None:
            r, b, c = (rms_norm(t, None, self.bcdt_norm_eps) for t in (r, b, c))
        a, h = -self.A_log.exp(), None if state is None else state.tensor("ssm")
        steps, more = self.dt_proj(r), {"D": self.D, "z": z}
        if by_kernel("selective", u, lambda: selective_fits(u, steps, a, b, c, state=h, **more)):
            if _across.active() is not None:
                h = selective_entering(u, F.softplus(steps), a, b, h)
            y, h = selective_fused(
                u, steps, a, b, c, state=h, cu_seqlens=cu_seqlens, softplus=True, **more
            )
        else:
            y, h = selective(u, F.softplus(steps), a, b, c, state=h, cu_seqlens=cu_seqlens)
            y = torch.addcmul(y, u, self.D) * F.silu(z)
        return self.out_proj(y.to(z.dtype)), State(conv=window, ssm=h)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: the same maths without the checks and layouts of whole sequences, which
        would cost more than the token itself."""
        u, z = self.in_proj(x[:, 0]).chunk(2, -1)
        taps, bias, window = self.conv1d.weight.squeeze(1), self.conv1d.bias, state.tensor("conv")
        kernels = is_token(x, state, None)
        done = window_step(u, taps, bias, window, silu=True) if kernels else None
        if done is None:
            u, window = conv_step(u, taps, bias, window)
            u = F.silu(u)
        else:
            u, window = done
        r, b, c = self.x_proj(u).split(self._split, -1)
        if self.bcdt_norm_eps is not None:
            r, b, c = (rms_norm(t, None, self.bcdt_norm_eps) for t in (r, b, c))
        h, p = state.tensor("ssm"), self.dt_proj
        if kernels and scan_fits(u, p.bias, self.A_log, b, self.D, z, state=h):
            raw = F.linear(r, p.weight)
            y, h = scan_fused(u, raw, p.bias, self.A_log, b, c, self.D, z, h)
            return self.out_proj(y).unsqueeze(1), State(conv=window, ssm=h)
        dt = F.softplus(self.dt_proj(r))
        wide = dt.dtype
        y, h = selective_step(
            u.to(wide), dt, -self.A_log.exp(), b.to(wide).unsqueeze(1), c.to(wide).unsqueeze(1), h,
        )  # fmt: skip
        y = torch.addcmul(y, u, self.D) * F.silu(z)
        return self.out_proj(y.to(z.dtype)).unsqueeze(1), State(conv=window, ssm=h)
