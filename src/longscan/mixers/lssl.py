"""LSSL: the linear state-space layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._hippo import Kept
from longscan.mixers.base import Mixer
from longscan.ops._check import cast, compute_dtype, full_precision
from longscan.ops.lti import lti, lti_kernel
from longscan.state import State

MEASURES = ("legs", "legt", "lagt")
_A = ("T_sub", "T_diag", "T_sup", "left", "right", "shift", "b")


class LSSL(Mixer):
    """One linear system per feature, x' = A x + B u, with A dense in a class that holds HiPPO.

    A = -diag(left) (T^-1 + diag(shift)) diag(right),  B = left b,  T tridiagonal
    Abar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A),  Bbar = (I - alpha dt A)^-1 dt B
    s_t = Abar s_{t-1} + Bbar u_t,   v_t = C s_t + D u_t,   y = out_proj(GELU(v))

    Shapes: x, y [B, T, d_model]; H = d_model systems of N = d_state; T_diag, left, right, shift, b
    [N] (learn = 2: [H, N]), T_sub, T_sup [N - 1], log_dt [H], C [H, channels, N], D [H, channels];
    out_proj reads the channels of the first feature, then of the next; state: s [B, H, N].
    measure: legs (memory fades over 1 / dt tokens), legt (a window of 1 / dt tokens) or lagt.
    learn: 0 freezes A, B and dt (LSSL-fixed), 1 trains them with one A and B for all features,
    2 with a pair for each.
    channels: outputs per feature.
    alpha: 0 forward Euler, 1/2 bilinear, 1 backward Euler.
    dt_range: dt starts log-uniform in it; 1 / dt should cover local to the sequence length.
    dt_init: "random", or "even" over the features.
    rate: multiplies dt, 2 for a sequence of which every second sample is left; may be set later.
    rate_input: False leaves the dt of Bbar as it is, as the authors' code does at other rates.
    bias: a trained number per output of a system.
    activation: gelu or None. dropout: behind the activation.
    a_lr: largest learning rate of the vectors of A and B (`lr_limit`), None for none.
    dt_lr: that of log_dt.
    Precision: all parameters but out_proj and the state float32; Abar and Bbar from float64.
    Source: arXiv 2110.13985, section 3 and appendix D.
    Differs: any alpha; legt starts exact, without the authors' noise of 0.01 on T; states and
    single steps, which the authors' layer lacks. Sequences go through chunks of the recurrence,
    exactly causal; `kernel` is the convolutional view. For LSSL-fixed, and whenever no gradient is
    wanted, Abar and Bbar are kept until a parameter changes.
    Reference: state-spaces/s4, Apache-2.0.
    """

    shardable = True
    keep_float32 = (*_A, "log_dt", "C", "D", "bias")
    no_weight_decay = (*_A, "log_dt")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        measure: str = "legs",
        learn: int = 1,
        channels: int = 1,
        alpha: float = 0.5,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_init: str = "random",
        rate: float = 1.0,
        rate_input: bool = True,
        bias: bool = False,
        activation: str | None = "gelu",
        dropout: float = 0.0,
        a_lr: float | None = 1e-4,
        dt_lr: float | None = 1e-3,
    ) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
        if learn not in (0, 1, 2):
            raise ValueError(f"learn must be 0, 1 or 2; got {learn!r}")
        if dt_init not in ("random", "even"):
            raise ValueError(f"dt_init must be 'random' or 'even'; got {dt_init!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, not {d_state}")
        if activation not in ("gelu", None):
            raise ValueError(f"activation must be 'gelu' or None; got {activation!r}")
        self.d_model, self.d_state, self.channels = d_model, d_state, channels
        self.measure, self.learn, self.alpha = measure, learn, alpha
        self.rate, self.rate_input = rate, rate_input
        self.activation, self.dropout = activation, dropout
        self._dt = (*dt_range, dt_init)
        copies = (d_model,) if learn == 2 else ()
        for name in _A:
            size = d_state - (name in ("T_sub", "T_sup"))
            setattr(self, name, nn.Parameter(torch.empty(*copies, size), requires_grad=learn > 0))
        self.log_dt = nn.Parameter(torch.empty(d_model), requires_grad=learn > 0)
        self.C = nn.Parameter(torch.empty(d_model, channels, d_state))
        self.D = nn.Parameter(torch.empty(d_model, channels))
        self.bias = nn.Parameter(torch.empty(d_model, channels)) if bias else None
        self.out_proj = nn.Linear(d_model * channels, d_model)
        limits = dict.fromkeys(_A, a_lr) | {"log_dt": dt_lr}
        self.lr_limit = {k: v for k, v in limits.items() if v is not None}
        self._kept = Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A, B from HiPPO; log dt by dt_range and dt_init; C, D normal, bias 0; out_proj as
        torch.nn.Linear."""
        for name, values in _class_of(self.measure, self.d_state).items():
            p = self.get_parameter(name)
            p.copy_(values.expand_as(p))
        low, high, init = self._dt
        at = torch.rand_like(self.log_dt)
        if init == "even":
            at = torch.linspace(0, 1, self.d_model, dtype=at.dtype, device=at.device)
        self.log_dt.copy_(math.log(low) + at * (math.log(high) - math.log(low)))
        nn.init.normal_(self.C)
        nn.init.normal_(self.D)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.out_proj.reset_parameters()

    def init_state(self, batch: int) -> State:
        shape = (batch, self.d_model, self.d_state)
        return State(s=self.C.new_zeros(shape, dtype=compute_dtype(self.C)))

    def continuous(self) -> tuple[Tensor, Tensor]:
        """A [N, N] and B [N] of x' = A x + B u, in float64; learn = 2: [H, N, N] and [H, N]."""
        sub, diag, sup, left, right, shift, b = cast(
            torch.float64, *(getattr(self, name) for name in _A)
        )
        t = torch.diag_embed(diag) + torch.diag_embed(sub, -1) + torch.diag_embed(sup, 1)
        middle = torch.linalg.inv(t) + torch.diag_embed(shift)
        return -left.unsqueeze(-1) * middle * right.unsqueeze(-2), left * b

    def discretise(self, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """Abar [H, N, N] and Bbar [H, N] in float64, dt multiplied by `rate` and self.rate."""
        a, b = self.continuous()
        rate = rate * self.rate
        dt = self.log_dt.to(torch.float64).exp().view(-1, 1, 1)
        eye = torch.eye(self.d_state, dtype=a.dtype, device=a.device)

        def inverse(dt: Tensor) -> Tensor:
            return torch.linalg.inv(eye - self.alpha * dt * a)

        fast = inverse(dt * rate)
        # I + (1 - alpha) dt A is a multiple of I plus one of I - alpha dt A, unless alpha is 0.
        a_bar = eye + dt * rate * a
        if self.alpha:
            a_bar = fast / self.alpha - eye * ((1 - self.alpha) / self.alpha)
        if not self.rate_input and rate != 1:
            fast = inverse(dt)
        else:
            dt = dt * rate
        return a_bar, dt.squeeze(-1) * (fast @ b.unsqueeze(-1)).squeeze(-1)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The convolutional view: v = D u + sum_l k_l u_{t-l}. Shapes: [channels, H, length]."""
        k = lti_kernel(*self.discretise(rate), self.C.transpose(0, 1).to(torch.float64), length)
        return k.to(compute_dtype(self.C))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        dtype = compute_dtype(x, self.C)

        def make() -> list[Tensor]:
            return cast(dtype, *self.discretise())

        with full_precision(x):
            weights = [*(getattr(self, name) for name in _A), self.log_dt]
            a, b = self._kept.get(weights, (dtype, self.rate, self.rate_input), make)
            u, c, d = cast(dtype, x, self.C.transpose(0, 1), self.D)
            s = None if state is None else state.tensor("s")
            v, s = lti(u, a, b, c, state=s, cu_seqlens=cu_seqlens)
            v = v.transpose(2, 3) + u.unsqueeze(-1) * d
            if self.bias is not None:
                v = v + self.bias
            v = v.flatten(2).to(x.dtype)
        if self.activation is not None:
            v = F.gelu(v)
        return self.out_proj(F.dropout(v, self.dropout, self.training)), State(s=s)


def _class_of(measure: str, n: int) -> dict[str, Tensor]:
    """The vectors that stand for a HiPPO measure, with windows of length 1."""
    i = torch.arange(n, dtype=torch.float64)
    one = torch.ones_like(i)
    p = one if measure == "lagt" else (2 * i + 1).sqrt()
    # T = I - (a shift) has the inverse of ones on and below the diagonal.
    sub, diag, sup, shift = -one, one, 0 * one, -one / 2
    if measure == "legs":
        shift = -i / (2 * i + 1)
    if measure == "legt":
        sub, diag, sup, shift = -one / 2, 0 * one, one / 2, 0 * one
        diag[0] += 0.5
        diag[-1] += 0.5
    return {"T_sub": sub[1:], "T_diag": diag, "T_sup": sup[1:], "left": p, "right": p,
            "shift": shift, "b": one}  # fmt: skip


def from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of one layer from that of the authors' LSSL.

    tensors: parameters and buffers without any prefix before `transition.`.
    """
    t = {k.removeprefix("transition."): v for k, v in tensors.items()}
    return {
        "T_sub": t["dl"][..., 1:-1],
        "T_diag": t["d"],
        "T_sup": t["du"][..., 1:-1],
        "left": t["pl"],
        "right": t.get("pr", t["pl"]),  # fixed layers hold the two as one tensor
        "shift": t["c"],
        "b": t["b"],
        "log_dt": t["log_dt"],
        "C": t["C"],
        "D": t["D"],
        "out_proj.weight": t["output_linear.weight"],
        "out_proj.bias": t["output_linear.bias"],
    }
