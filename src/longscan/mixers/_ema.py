"""The damped exponential moving average of Mega, and the gated layer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers._blockdiag import HeadLayerNorm
from longscan.mixers._parts import RMSNorm
from longscan.mixers.base import Mixer
from longscan.ops import _cache
from longscan.ops._check import cast, check_state, compute_dtype, full_precision
from longscan.ops._layout import remembered
from longscan.ops._lti import Weights
from longscan.ops.dispatch import choose
from longscan.ops.lti import by_chunks, lti_reference
from longscan.state import Leaf, State

# Makes the entries of the next state, if anyone reads it.
Entries: TypeAlias = Callable[[], Mapping[str, Leaf]]


class EMA(Mixer):
    """A diagonal linear system with real states per channel, a skip and a SiLU.

    p = sigmoid(delta),   q = 1 - p sigmoid(alpha)
    h_t = q h_{t-1} + p beta x_t,   y_t = SiLU(gamma . h_t / sqrt(N) + omega x_t)

    If bidirectional, gamma . h_t has a second summand: the same of a second set of parameters over
    the reversed sequence. Both sums include the token itself.
    Shapes: x, y [B, T, d_model]; delta, alpha, beta, gamma [d_model, N], N = d_state, twice the
    rows if bidirectional (those that look back first); omega [d_model]; state: h [B, d_model, N],
    none if bidirectional.
    Precision: everything inside float32.
    """

    keep_float32 = ("delta", "alpha", "beta", "gamma", "omega")

    def __init__(self, d_model: int, *, d_state: int = 16, bidirectional: bool = False) -> None:
        super().__init__()
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, not {d_state}")
        self.d_model, self.d_state, self.bidirectional = d_model, d_state, bidirectional
        rows = (2 if bidirectional else 1) * d_model
        self.delta, self.alpha, self.beta, self.gamma = (
            nn.Parameter(torch.empty(rows, d_state)) for _ in range(4)
        )
        self.omega = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """delta, alpha N(0, 0.2); beta +1, -1, +1, ... along the states plus N(0, 0.02); gamma,
        omega N(0, 1)."""
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        self.beta[:, ::2] += 1
        self.beta[:, 1::2] -= 1
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            return State()
        w = self.delta
        return State(h=w.new_zeros(batch, *w.shape, dtype=compute_dtype(w)))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        with full_precision(x):
            wide = x.to(compute_dtype(x, self.delta))
            y, state = self.average(wide, state, cu_seqlens=cu_seqlens)
            y = F.silu(torch.addcmul(y, wide, self.omega.to(wide.dtype)))
        return y.to(x.dtype), state

    def average(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The sums gamma . h / sqrt(N) alone."""
        d, (q, b, c) = self.d_model, self._system(x.dtype)
        if not self.bidirectional:
            h = None if state is None else state.tensor("h").to(x.dtype)
            y, h = _run(x, q, b, c, h, cu_seqlens)
            return y, State(h=h)
        if state is not None and len(state):
            raise ValueError("a bidirectional average carries no state: give it whole sequences")
        mirrored = None
        if cu_seqlens is not None:
            mirrored = remembered(
                cu_seqlens, "mirrored", lambda: cu_seqlens[-1] - cu_seqlens.flip(0)
            )
        y, _ = _run(x, q[:d], b[:d], c[:d], None, cu_seqlens)
        z, _ = _run(x.flip(1), q[d:], b[d:], c[d:], None, mirrored)
        return y + z.flip(1), State()

    def _system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, p beta and gamma / sqrt(N)."""
        delta, alpha, beta, gamma = cast(dtype, self.delta, self.alpha, self.beta, self.gamma)
        p = delta.sigmoid()
        return 1 - p * alpha.sigmoid(), p * beta, gamma * self.d_state**-0.5


def _run(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, h: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = q h_{t-1} + b x_t, y_t = c . h_t. Shapes: x, y [B, T, D]; q, b, c [D, N]."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("h", h, (rows, *q.shape), "[rows, d_model, d_state]")
    one = x.shape[1] == 1 and cu_seqlens is None
    forms = {"reference": _reference, "torch": _step if one else _chunked}
    return choose("lti", x, None, forms)(x, q, b, c, h, cu_seqlens)


def _reference(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, h: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, h = lti_reference(x, q.diag_embed(), b, c.unsqueeze(0), state=h, cu_seqlens=cu_seqlens)
    return y.squeeze(2), h


def _step(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, h: Tensor | None, cu_seqlens: None
) -> tuple[Tensor, Tensor]:
    drive = b * x.squeeze(1).unsqueeze(-1)
    h = drive if h is None else torch.addcmul(drive, q, h)
    return (c * h).sum(-1).unsqueeze(1), h


def _chunked(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, h: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, h = by_chunks(x, lambda n: _weights(q, b, c, n), h, cu_seqlens)
    return y.squeeze(2), h


def _weights(q: Tensor, b: Tensor, c: Tensor, n: int) -> Weights:
    """What `_lti.weights` makes of dense matrices diag(q), without a product of any two."""
    doubled, powers = [q], torch.ones_like(q).unsqueeze(1)
    while powers.shape[1] < n:
        powers = torch.cat([powers, powers * doubled[-1].unsqueeze(1)], 1)
        doubled.append(doubled[-1] * doubled[-1])
    powers = powers[:, :n]
    write, read = b.unsqueeze(1) * powers, (c * q).unsqueeze(1) * powers
    kernel = c.unsqueeze(1) @ write.mT
    matrices = [d.diag_embed() for d in doubled]
    return Weights(write, read, kernel, matrices[-1], matrices)


class AveragedAttention(Mixer):
    """What mixers with the gates of Mega share around their attention (see `Mega`)."""

    owns_norm: ClassVar[bool] = True

    def __init__(
        self, d_model: int, *, d_key: int | None, d_value: int | None, d_state: int,
        bidirectional: bool, norm: str, norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.bidirectional = d_model, bidirectional
        self.d_key = d_key = 2 * max(1, d_model // 4) if d_key is None else d_key
        self.d_value = d_value = 2 * d_model if d_value is None else d_value
        if d_key < 1 or d_value < 1:
            raise ValueError(f"d_key ({d_key}) and d_value ({d_value}) must be at least 1")
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm must be layer or rms, not {norm!r}")
        self.norm = (
            RMSNorm(d_model, norm_eps) if norm == "rms" else HeadLayerNorm(d_model, norm_eps, True)
        )
        self.move = EMA(d_model, d_state=d_state, bidirectional=bidirectional)
        self.v_proj = nn.Linear(d_model, d_value)
        self.mx_proj = nn.Linear(d_model, 2 * d_model + d_key + d_value)
        self.h_proj = nn.Linear(d_value, d_model)
        self.gamma = nn.Parameter(torch.empty(2, d_key))
        self.beta = nn.Parameter(torch.empty(2, d_key))

    def reset_parameters(self) -> None:
        """Linear weights and gamma N(0, 0.02), biases and beta 0, norm 1 and 0; of the moving
        average delta and alpha N(0, 0.2), beta +1, -1, +1, ... along its states plus N(0, 0.02),
        gamma and omega N(0, 1)."""
        self.norm.reset_parameters()
        self.move.reset_parameters()
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Entries]:
        """What the queries read [B, T, d_value], and what makes the entries of the next state."""
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        if self.bidirectional and state is not None and len(state):
            raise ValueError(
                f"a bidirectional {type(self).__name__} carries no state: give it whole sequences"
            )
        state = None if state is None or not len(state) else state
        normed = self.norm(x if isinstance(self.norm, RMSNorm) else x.unsqueeze(-2))
        m, averaged = self.move(normed, state, cu_seqlens=cu_seqlens)
        sizes = [self.d_model, self.d_key + self.d_value, self.d_model]
        u, zr, hx = self.mx_proj(m).split(sizes, -1)
        z, r = F.silu(zr).split([self.d_key, self.d_value], -1)
        q, k = (torch.addcmul(self.beta[i], z, self.gamma[i]) for i in (0, 1))
        o, entries = self.attend(q, k, F.silu(self.v_proj(normed)), state, cu_seqlens)
        h = F.silu(hx + self.h_proj(r * o.to(r.dtype)))
        y = u.sigmoid() * (h - x)
        return y, _cache.give(lambda: State(averaged, **entries()))


__all__ = ["EMA", "AveragedAttention", "Entries"]
