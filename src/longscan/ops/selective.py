"""The selective scan of Mamba (S6): a diagonal state space whose step, input and output vary."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.algebra import SegmentMap
from longscan.ops import _across
from longscan.ops._check import (
    check_floating,
    check_shape,
    check_state,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._selective import base2, selective_chunked
from longscan.ops._selective_fused import selective_fits, selective_fused
from longscan.ops.dispatch import by_sequence, choose


def selective_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `selective`: a loop over time in the input dtype."""
    shape = (*u.shape, A.shape[1])
    B, C = (_per_channel(x, shape[2]).expand(shape) for x in (B, C))
    if cu_seqlens is not None:
        return by_sequence(
            lambda u, dt, B, C, state: selective_reference(u, dt, A, B, C, state=state),
            [u, dt, B, C], state, cu_seqlens,
        )  # fmt: skip
    h = A.new_zeros(shape[0], *A.shape) if state is None else state
    out = []
    for t in range(shape[1]):
        step = dt[:, t].unsqueeze(-1)
        h = (step * A).exp() * h + step * u[:, t].unsqueeze(-1) * B[:, t]
        y = (C[:, t] * h).sum(-1)
        out.append(2 * y.real if y.is_complex() else y)
    return torch.stack(out, 1), h


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """[.., N], [.., G, N] with time, or [E, N] without -> [.., E or 1, N]."""
    if x.ndim == 3:
        return x.unsqueeze(-2)
    if x.ndim == 4 and x.shape[2] > 1:
        return x.repeat_interleave(channels // x.shape[2], 2)
    return x


def selective_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `selective`.

    Shapes: u, dt, y [B, E]; A [E, N]; B, C [B or 1, G, N]; state [B, E, N].
    """
    channels = u.shape[1]
    B, C = (
        x if x.shape[1] in (1, channels) else x.repeat_interleave(channels // x.shape[1], 1)
        for x in (B, C)
    )
    # In place where autograd allows it: at these sizes a new buffer costs more than the arithmetic.
    a = dt.unsqueeze(-1) * base2(A)
    a = a.exp_() if a.is_complex() else a.exp2_()
    h = (a * state).addcmul_((dt * u).unsqueeze(-1), B)
    if C.shape[:2] == (len(u), 1) and not torch.is_autocast_enabled(u.device.type):
        y = torch.bmm(h, C.mT.to(h.dtype)).squeeze(-1)
    else:
        y = (h * C).sum(-1)
    return (2 * y.real if y.is_complex() else y), h


def selective_segment(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> SegmentMap:
    """The map of a whole stretch on the state: h_out = exp(A sum dt) h_in + U.

    Shapes: as `selective`; map axes [B, E, N, 1], so that a state [B, E, N] enters as
    `segment(state.unsqueeze(-1)).squeeze(-1)`.
    """
    with _across.within(None), full_precision(u):
        _, end = selective(u, dt, A, B, B)
        total = dt.to(compute_dtype(dt, A)).sum(1).unsqueeze(-1) * A
    return SegmentMap("diagonal", total, end.unsqueeze(-1))


def selective_entering(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor | None
) -> Tensor | None:
    """The states that a shard of tokens starts from (`ops._across.entering`)."""

    def segment(cut: slice) -> SegmentMap:
        return selective_segment(u[:, cut], dt[:, cut], A, B if B.ndim == 2 else B[:, cut])

    enters = _across.entering(segment, None if state is None else state.unsqueeze(-1))
    return None if enters is None else enters.squeeze(-1)


def selective(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of a diagonal state space whose step size, input and output maps follow the tokens.

    h_t[e, n] = exp(dt_t[e] A[e, n]) h_{t-1}[e, n] + dt_t[e] B_t[n] u_t[e]
    y_t[e] = sum_n C_t[n] h_t[e, n];   complex A: y_t = 2 Re(sum), conjugate pairs implied

    Shapes: u, dt, y [B, T, E], dt >= 0 (after softplus); A [E, N], real part <= 0; B, C
    [B, T, N], or [B, T, G, N] where group g serves channels g E / G and on, or [E, N] constant
    over time; state [B, E, N]. cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state
    then has n rows. With complex A the state is complex, B and C may be.
    Precision: everything in float32 (float64 for float64 inputs), y in u's dtype.
    Memory: backward keeps the inputs and one state per block of 16 to 256 tokens.
    Raises: ValueError, TypeError for shapes, dtypes, signs or cu_seqlens that do not fit.
    Source: Mamba (arXiv 2312.00752, algorithm 2), with the code's input rule dt B u.
    Differs: skip, gate and softplus belong to the mixer; both states are differentiable.
    """
    check_floating(u=u, dt=dt, A=A, B=B, C=C, state=state)
    _check_inputs(u, dt, A, B, C)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, *A.shape), "[rows, E, N]")
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, u.shape[0], u.shape[1])
    if _across.active() is not None:
        state = selective_entering(u, dt, A, B, state)
    wide, out = compute_dtype(u, dt, A, B, C, state), u.dtype
    forms = {
        "reference": selective_reference, "torch": selective_chunked, "triton": selective_fused
    }  # fmt: skip
    run = choose(
        "selective", u, backend, forms,
        lambda: wide is torch.float32 and selective_fits(u, dt, A, B, C),
    )  # fmt: skip
    if run is selective_fused and (u.shape[1] > 1 or cu_seqlens is not None):
        return run(u, dt, A, B, C, state=state, cu_seqlens=cu_seqlens)
    u, dt = u.to(wide), dt.to(wide)
    A, B, C = (x.to(wide.to_complex() if x.is_complex() else wide) for x in (A, B, C))
    state = None if state is None else state.to(A.dtype)
    if run is not selective_reference and u.shape[1] == 1 and cu_seqlens is None:
        if state is None:
            state = A.new_zeros(rows, *A.shape)
        B, C = (w.unsqueeze(0) if w.ndim == 2 else w.view(rows, -1, A.shape[1]) for w in (B, C))
        y, end = selective_step(u[:, 0], dt[:, 0], A, B, C, state)
        y = y.unsqueeze(1)
    else:
        y, end = run(u, dt, A, B, C, state=state, cu_seqlens=cu_seqlens)
    return y.to(out), end


def _check_inputs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"u must have shape [B, T >= 1, E], got {list(u.shape)}")
    batch, length, channels = u.shape
    check_shape("dt", dt, (batch, length, channels), "[B, T, E], as u")
    check_shape("A", A, (channels, None), "[E, N]")
    n = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        if x.ndim == 2:
            check_shape(name, x, (channels, n), "[E, N]")
        elif x.ndim == 3:
            check_shape(name, x, (batch, length, n), "[B, T, N]")
        else:
            check_shape(name, x, (batch, length, None, n), "[B, T, G, N]")
            if channels % x.shape[2]:
                raise ValueError(f"{x.shape[2]} groups of {name} cannot serve {channels} channels")
        if x.is_complex() and not A.is_complex():
            raise TypeError(f"{name} is complex but A is real: pass A as a complex tensor too")
    groups = {x.shape[2] for x in (B, C) if x.ndim == 4 and x.shape[2] > 1}
    if len(groups) > 1:
        raise ValueError(f"B and C must have the same number of groups, got {sorted(groups)}")
    if u.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = dt.detach().amin().item(), A.detach().real.amax().item()
        if not least >= 0:
            raise ValueError(f"dt must be >= 0 (apply softplus first); found {least:.3g}")
        if not most <= 0:
            raise ValueError(f"A must have a real part <= 0, such as -exp(A_log); found {most:.3g}")


__all__ = [
    "selective",
    "selective_chunked",
    "selective_reference",
    "selective_segment",
    "selective_step",
]
