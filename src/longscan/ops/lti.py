"""Time-invariant linear systems, one per feature: LSSL, S4, S4D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.algebra import SegmentMap
from longscan.ops import _across, _lti
from longscan.ops._check import (
    cast,
    check_floating,
    check_shape,
    check_state,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import Layout, check_cu_seqlens, layout, remembered
from longscan.ops._lti import Weights
from longscan.ops.dispatch import by_sequence, choose


def lti_reference(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `lti`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        return by_sequence(lti_reference, [u], state, cu_seqlens, a=a, b=b, c=c)
    s = u.new_zeros(u.shape[0], *_state_shape(b)) if state is None else state
    out = []
    for t in range(u.shape[1]):
        y, s = lti_step(u[:, t], a, b, c, s)
        out.append(y)
    return torch.stack(out, 1), s


def lti_step(u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `lti`. Shapes: u [B, H]; y [B, M, H]."""
    drive = b * u.unsqueeze(-1)
    if a.is_complex():
        # As a.exp(), which is slow for complex numbers.
        s = torch.polar(a.real.exp(), a.imag) * torch.view_as_complex(state) + drive
        state = torch.view_as_real(s)
    else:
        state = s = torch.einsum("hnk,bhk->bhn", a, state) + drive
    y = torch.einsum("mhn,bhn->bmh", c, s)
    return (y.real if y.is_complex() else y), state


def lti_chunked(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast torch form of `lti`: three products per chunk, a scan of states across chunks.

    With i, j counting the C tokens of a chunk, k the kernel and S the state that enters it:

        y_i = sum_j k[i - j] u_j + Re(c A^(i + 1) S)
        S'  = A^C S + sum_j A^(C - 1 - j) b u_j

    The matrices depend on the weights alone and serve all chunks of all rows. A token gets
    exactly nothing from its future, not a rounding error as from an FFT.
    """
    s = None if state is None else state.flatten(2)
    y, s = by_chunks(u, lambda n: _lti.weights(a, b, c, n), s, cu_seqlens, chunk)
    return y, s.unflatten(-1, _state_shape(b)[1:])


def by_chunks(
    u: Tensor,
    weights_of: Callable[[int], Weights],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`lti_chunked` with the matrices of chunks of n tokens, whatever makes them.

    Shapes: u [B, T, H]; state [rows, H, S] real; y [B, T, M, H].
    """
    chunk = chunk or (32 if u.device.type == "cpu" else 64)
    plan = layout(u.shape[0], u.shape[1], chunk, cu_seqlens)
    w = weights_of(plan.chunk)
    if state is None:
        state = u.new_zeros(plan.rows, u.shape[2], w.write.shape[2])
    tokens = plan.split(u).permute(2, 0, 1).contiguous()
    drive, first = tokens @ w.write.flip(1), plan.rows_in(state).transpose(0, 1)
    entering, last = _lti.scan(w.end, drive, first, plan.counts)
    y = torch.baddbmm(entering @ w.read.mT, tokens, _lti.toeplitz(w.kernel))
    y = _lti.dense_gradient(y).unflatten(-1, w.kernel.shape[1:]).permute(1, 3, 2, 0)
    # A last chunk that is not full must not decay through its padding: its tokens again.
    sizes, tail = _tails(u, plan, cu_seqlens)
    tail = tail.permute(2, 0, 1).contiguous()
    final = _lti.advance(w.powers, last, sizes)
    final = torch.baddbmm(final, tail, w.write[:, : tail.shape[2]].flip(1))
    return plan.join(y), plan.rows_out(final.transpose(0, 1))


def _tails(u: Tensor, plan: Layout, cu_seqlens: Tensor | None) -> tuple[list[int], Tensor]:
    """Of each row's last chunk: how many tokens it has, and the tokens [R, C, H].

    Tokens are aligned at the end, zeros before them. Rows in the layout's order.
    """
    n = plan.chunk
    if cu_seqlens is None:
        size = plan.length - (len(plan.counts) - 1) * n
        return [size] * plan.rows, u[:, -size:]

    def find() -> tuple[list[int], Tensor]:
        bounds = torch.tensor(check_cu_seqlens(cu_seqlens, 1, plan.length))
        assert plan.order is not None
        ends, lengths = (x[plan.order.cpu()] for x in (bounds[1:], bounds.diff()))
        sizes, slot = (lengths - 1) % n + 1, torch.arange(n) - n
        index = (ends.unsqueeze(1) + slot).where(slot >= -sizes.unsqueeze(1), plan.length)
        return sizes.tolist(), index.to(u.device)

    sizes, index = remembered(cu_seqlens, f"lti tails {n}", find)
    return sizes, F.pad(u[0], (0, 0, 0, 1))[index]


def _state_shape(b: Tensor) -> tuple[int, ...]:
    """The shape of a row's state, complex numbers as pairs."""
    return (*b.shape, 2) if b.is_complex() else tuple(b.shape)


def _matched(dtype: torch.dtype, *weights: Tensor) -> list[Tensor]:
    """a, b and c in real numbers of `dtype`, or complex ones made of two if a is complex."""
    if weights[0].is_complex():
        dtype = torch.complex128 if dtype is torch.float64 else torch.complex64
    return cast(dtype, *weights)


def _check_weights(a: Tensor, b: Tensor, c: Tensor | None, heads: int | None = None) -> None:
    check_floating(a=a, b=b, c=c)
    if a.is_complex():
        check_shape("a", a, (heads, None), "[H, N], complex logarithms of eigenvalues")
        shape = tuple(a.shape)
    else:
        n = a.shape[-1]
        check_shape("a", a, (heads, n, n), "[H, N, N], or [H, N] of complex logarithms")
        shape = tuple(a.shape[:2])
    for name, x in (("b", b), ("c", c)):
        if x is not None and x.is_complex() and not a.is_complex():
            raise TypeError(f"{name} is complex but a is a real matrix: pass all real or diagonal")
    check_shape("b", b, shape, "[H, N]")
    if c is not None:
        check_shape("c", c, (None, *shape), "[M, H, N]")


def _check_stable(a: Tensor) -> None:
    """Raise ValueError if an eigenvalue exceeds 1; looked at only where that is free."""
    if a.is_complex() and a.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = a.detach().real.amax().item()
        if not largest <= 0:
            raise ValueError(
                f"a must be logarithms of eigenvalues in the unit disc, real part <= 0; "
                f"found {largest:.3g}. Pass dt * A with Re A < 0, not the eigenvalues themselves"
            )


def lti_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """The convolutional view of `lti`: its response to an impulse, k_l = Re(c . A^l b).

    Shapes: as `lti`; k [M, H, length]. O(N length) work, memory of N sqrt(length) per feature.
    Precision: float32 (float64 for float64 weights).
    Raises: ValueError, TypeError as `lti`; ValueError for length < 1.
    """
    _check_weights(a, b, c)
    _check_stable(a)
    if length < 1:
        raise ValueError(f"a kernel needs length >= 1, not {length}")
    with full_precision(a):
        a, b, c = _matched(compute_dtype(a, b, c), a, b, c)
        return _lti.kernel(a, b, c, length).transpose(0, 1)


def lti_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """A causal convolution with long kernels by FFT, y_t = sum_{j <= t} k_j u_{t - j}.

    An FFT spreads rounding errors over all tokens: what a token gets from its future is of
    their size, not zero. `lti` has no such leak, and is faster unless M N is large.

    Shapes: u [B, T, H]; kernel [M, H, L], any L; y [B, T, M, H].
    Precision: float32 (float64 for float64 inputs), y in u's dtype.
    Raises: ValueError for shapes that do not fit.
    """
    check_shape("u", u, (None, None, None), "[B, T, H]")
    check_shape("kernel", kernel, (None, u.shape[2], None), "[M, H, L]")
    length = u.shape[1]
    with full_precision(u):
        x, k = cast(compute_dtype(u, kernel), u, kernel[..., :length])
        n = 1 << (length + k.shape[-1] - 2).bit_length()
        spectrum = torch.fft.rfft(x.mT.unsqueeze(1), n) * torch.fft.rfft(k, n)
        y = torch.fft.irfft(spectrum, n)[..., :length]
    return y.permute(0, 3, 1, 2).to(u.dtype)


def lti_segment(u: Tensor, a: Tensor, b: Tensor, *, chunk: int | None = None) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = A^T S_in + U.

    Shapes: as `lti`; dense: states [B, H, N, 1], map "matrix" with a [B, H, N, N]; diagonal:
    complex states [B, H, N, 1], `torch.view_as_complex(state).unsqueeze(-1)`, map "diagonal".
    """
    _check_weights(a, b, None, u.shape[2])
    _check_stable(a)
    with full_precision(u):
        dtype = compute_dtype(u, a, b)
        u, (a, b) = u.to(dtype), _matched(dtype, a, b)
        _, s = lti_chunked(u, a, b, b.new_zeros(0, *b.shape), chunk=chunk)
        total = _lti.whole(a, u.shape[1]).expand(u.shape[0], *a.shape)
    if a.is_complex():
        return SegmentMap("diagonal", total, torch.view_as_complex(s).unsqueeze(-1))
    return SegmentMap("matrix", total, s.unsqueeze(-1))


def _entering(u: Tensor, a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """The states that a shard of tokens starts from."""
    if state is not None:
        state = (torch.view_as_complex(state) if a.is_complex() else state).unsqueeze(-1)
    enters = _across.entering(lambda cut: lti_segment(u[:, cut], a, b), state).squeeze(-1)
    return torch.view_as_real(enters) if a.is_complex() else enters


def lti(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear system per feature, the same at all times: one input, N states, M outputs.

    s_t = A s_{t-1} + b u_t,   y_t = Re(c . s_t)

    Dense form: A real matrices. Diagonal form: A = diag(exp(a)), complex; of a conjugate pair
    pass one with 2 c.
    Shapes: u [B, T, H]; y [B, T, M, H]; dense: a [H, N, N], b [H, N], c [M, H, N], all real, state
    [B, H, N]; diagonal: a, b [H, N], c [M, H, N], a complex, state [B, H, N, 2] (re, im).
    cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    chunk: tokens handled by one set of matrix products; changes speed, not the result. None: 32
    on a CPU, 64 elsewhere.
    Precision: states, powers and products in float32 (float64 for float64 inputs), powers of a
    diagonal A from float64; y in u's dtype.
    Raises: ValueError, TypeError for shapes, dtypes, eigenvalues beyond 1 or cu_seqlens that do
    not fit.
    Source: S4 (arXiv 2111.00396, eq. 3 to 5), LSSL (2110.13985), S4D (2206.11893).
    Differs: chunks instead of an FFT of the whole length: causal to the last bit, any length,
    states in and out; `lti_kernel` and `lti_conv` are the authors' view.
    """
    check_floating(u=u, state=state)
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"u must have shape [B, T >= 1, H], got {list(u.shape)}")
    batch, length, heads = u.shape
    _check_weights(a, b, c, heads)
    dtype, out = compute_dtype(u, a, b, c, state), u.dtype
    with full_precision(u):
        u, state = cast(dtype, u, state)
        a, b, c = _matched(dtype, a, b, c)
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        axes = "[rows, H, N, 2]" if a.is_complex() else "[rows, H, N]"
        check_state("state", state, (rows, *_state_shape(b)), axes)
        if _across.active() is not None:
            state = _entering(u, a, b, state)
        run = choose("lti", u, backend, {"reference": lti_reference, "torch": lti_chunked})
        if length > 1:
            _check_stable(a)
        if run is lti_reference:
            y, s = run(u, a, b, c, state=state, cu_seqlens=cu_seqlens)
        elif length == 1 and cu_seqlens is None:
            s = u.new_zeros(batch, *_state_shape(b)) if state is None else state
            y, s = lti_step(u[:, 0], a, b, c, s)
            y = y.unsqueeze(1)
        else:
            y, s = run(u, a, b, c, state=state, cu_seqlens=cu_seqlens, chunk=chunk)
    return y.to(out), s
