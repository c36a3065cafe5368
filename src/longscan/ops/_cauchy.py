"""Diagonal plus low rank (DPLR) systems of S4: discretisation, one step, kernels.

    z' = (Lambda - P P^H) z + B u,   y = C z

over N modes in conjugate pairs, of which one of each pair is kept, n = N / 2. As real numbers (re
and im of one mode after the other) the system is Lambda - 2 p p^T with p = (Re P, Im P), and
A + A^T <= 0 whenever Re(Lambda) <= 0: no discretised system can grow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longscan.algebra import SegmentMap
from longscan.ops import _across, _lti
from longscan.ops._check import check_state
from longscan.ops._lti import Weights, pairs, rows, toeplitz
from longscan.ops.dispatch import choose
from longscan.ops.lti import by_chunks, lti_reference

# Numbers in one [H, n, nodes] tensor of a kernel: 16 MB in complex128.
_BLOCK = 1 << 20


class Discrete(NamedTuple):
    """z_t = pole z_{t-1} + left^T Re(right z_{t-1}) + b u_t,   y_t = Re(c z_t)

    Shapes, all complex: pole, b [H, n]; left, right [H, rank, n]; c [M, H, n].
    """

    pole: Tensor
    left: Tensor
    right: Tensor
    b: Tensor
    c: Tensor


def discretise(values: Tensor, p: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> Discrete:
    """The bilinear discretisation, by inverting rank x rank matrices only.

    Abar = (I - dt/2 A)^-1 (I + dt/2 A) = 2 (I - dt/2 A)^-1 - I,  Bbar = (I - dt/2 A)^-1 dt B, and
    (E + dt p p^T)^-1 = E^-1 - E^-1 p (I/dt + p^T E^-1 p)^-1 p^T E^-1 with E = I - dt/2 Lambda.
    Shapes: values (Lambda), b [H, n]; p [rank, H, n]; c [M, H, n]; dt [H, 1].
    """
    solve = 1 / (1 - 0.5 * dt * values)
    p, wide, step = p.transpose(0, 1), solve.unsqueeze(1), dt.unsqueeze(-1)
    left, right = wide * p, wide * p.conj()  # E^-1 p and p^T E^-1
    inner = torch.eye(p.shape[1], dtype=dt.dtype, device=dt.device)
    inner = inner + step * (right @ p.mT).real
    right = 2 * step * (_inverse(inner).to(p.dtype) @ right)
    low = (right * b.unsqueeze(1)).sum(-1, keepdim=True).real
    b = dt * (solve * b - 0.5 * (left * low).sum(1))
    return Discrete(solve * (1 + 0.5 * dt * values), -left, right, b, 2 * c)


def _inverse(x: Tensor) -> Tensor:
    """Inverses of matrices [..., rank, rank], elementwise for rank 1 and 2."""
    if x.shape[-1] == 1:
        return 1 / x
    if x.shape[-1] > 2:
        return torch.linalg.inv(x)
    (a, b), (c, d) = (row.unbind(-1) for row in x.unbind(-2))
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def _with_poles(low: Tensor, pole: Tensor) -> Tensor:
    """low + the real matrix that multiplies states by pole; takes over `low` [H, N, N]."""
    blocks = torch.stack([pole.real, -pole.imag, pole.imag, pole.real], 1).unflatten(1, (2, 2))
    n = pole.shape[1]
    low.unflatten(2, (n, 2)).unflatten(1, (n, 2)).diagonal(0, 1, 3).add_(blocks)
    return low


def dense(s: Discrete) -> tuple[Tensor, Tensor, Tensor]:
    """Abar [H, N, N], Bbar [H, N] and C [M, H, N] in real numbers."""
    a = _with_poles(pairs(s.left).mT @ rows(s.right), s.pole)
    return a, pairs(s.b), rows(s.c)


class Stepper(NamedTuple):
    """What one token needs of systems: one product of `read` and the state gives right z and y.

    Shapes: pole [H, n] complex; real: read = (right | c Abar) [H, rank + M, N]; left [rank, H, N];
    b [H, N]; through = Re(c b) [M, H].
    """

    pole: Tensor
    read: Tensor
    left: Tensor
    b: Tensor
    through: Tensor


def stepper(s: Discrete) -> Stepper:
    """The numbers of `step`, rank >= 0."""
    c = s.c.transpose(0, 1)
    ahead = c * s.pole.unsqueeze(1) + (c @ s.left.mT).real.to(c.dtype) @ s.right
    read, left = rows(torch.cat([s.right, ahead], 1)), pairs(s.left).transpose(0, 1).contiguous()
    return Stepper(s.pole, read, left, pairs(s.b), (s.c * s.b).sum(-1).real)


def step(s: Stepper, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in O(N). Shapes: u [B, H]; state [B, H, n, 2]; y [B, M, H]."""
    state = state.contiguous()
    got = torch.bmm(s.read, state.flatten(2).permute(1, 2, 0)).permute(2, 1, 0)
    low, y = got.split([len(s.left), len(s.through)], 1)
    add = s.b * u.unsqueeze(-1)
    for column, weight in zip(s.left.unbind(), low.unbind(1), strict=True):
        add = torch.addcmul(add, column, weight.unsqueeze(-1))
    add = torch.view_as_complex(add.view(state.shape))
    z = torch.addcmul(add, s.pole, torch.view_as_complex(state))
    return torch.addcmul(y, s.through, u.unsqueeze(1)), torch.view_as_real(z)


def chunk_weights(s: Discrete, n: int, tail: int) -> Weights:
    """The matrices of a chunk of n tokens, without a power of a dense matrix.

    tail: how many tokens the last chunks have, as bits; of Weights.powers only those are made.

    With D the poles, the rows v_i = right Abar^i obey a triangular system, and all else follows:
        v_i = right D^i + sum_{j<i} (right D^j left) v_{i-1-j}
        Abar^i b = D^i b + sum_{j<i} D^{i-1-j} left (v_j b)
        c Abar^i = c D^i + sum_{j<i} (c D^j left) v_{i-1-j}
        Abar^n = D^n + sum_{j<n} D^{n-1-j} left v_j
    No D^i, v_i or inverse is larger than what it starts from, as D and Abar are contractions.
    """
    heads, rank, _ = s.left.shape
    powers = torch.ones_like(s.pole).unsqueeze(1)
    factor = s.pole.unsqueeze(1)
    while (k := powers.shape[1]) <= n:
        powers = torch.cat([powers, powers[:, : n + 1 - k] * factor], 1)
        factor = factor * factor
    p = powers[:, :n].unsqueeze(2)  # [H, n, 1, N/2]
    left = pairs(p * s.left.unsqueeze(1)).flatten(1, 2)  # D^j left, [H, n rank, N]
    c = s.c.transpose(0, 1)
    read = left @ torch.cat([rows(s.right), rows(c)], 1).mT  # (right | c) D^j left
    read = read.view(heads, n, rank, -1).permute(0, 3, 2, 1)  # [H, rank + M, rank, n]
    inner, through = read[:, :rank], _lower(read[:, rank:])
    system = _lower(-F.pad(inner, (1, -1))).transpose(1, 2).reshape(heads, n * rank, n * rank)
    v = torch.linalg.solve_triangular(
        system, rows(p * s.right.unsqueeze(1)).flatten(1, 2), upper=False, unitriangular=True
    )
    b = pairs(s.b)
    g = (v @ b.unsqueeze(-1)).view(heads, n, rank).mT
    write = pairs(powers[:, :n] * s.b.unsqueeze(1))
    write = write + _lower(F.pad(g, (1, -1)).unsqueeze(1)).squeeze(1) @ left
    after = rows(powers[:, 1:].unsqueeze(1) * c.unsqueeze(2))
    after = after.flatten(1, 2) + through.flatten(1, 2) @ v
    reverse = left.view(heads, n, rank, -1).flip(1).flatten(1, 2)

    def power(m: int) -> Tensor:
        low = reverse[:, (n - m) * rank :].mT @ v[:, : m * rank]
        return _with_poles(low, powers[:, m])

    unused = left.new_empty(0)
    doubled = [power(1 << i) if tail >> i & 1 else unused for i in range(n.bit_length())]
    end = doubled[-1] if n & -n == n and tail & n else power(n)
    return Weights(write, after, rows(c) @ write.mT, end, doubled)


def _lower(k: Tensor) -> Tensor:
    """[H, X, rank, n] -> [H, X, n, n rank]: k[i - j] at row i, columns of j; zero where i < j."""
    heads, x, rank, n = k.shape
    t = toeplitz(k.flatten(1, 2)).view(heads, n, x, rank, n)  # row j, column i
    return t.permute(0, 2, 4, 1, 3).reshape(heads, x, n, n * rank)


def dplr_chunked(
    u: Tensor, s: Discrete, *, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`dplr` in chunks, with the matrices of `chunk_weights`. Shapes: state [rows, H, N]."""

    def weights(n: int) -> Weights:
        tail = (u.shape[1] - 1) % n + 1 if cu_seqlens is None else 2 * n - 1
        return chunk_weights(s, n, tail)

    return by_chunks(u, weights, state, cu_seqlens)


def dplr_reference(
    u: Tensor, s: Discrete, *, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `dplr`: `lti_reference` of the dense matrices."""
    return lti_reference(u, *dense(s), state=state, cu_seqlens=cu_seqlens)


def dplr_segment(u: Tensor, s: Discrete) -> SegmentMap:
    """The map of a whole stretch on the state: S_out = Abar^T S_in + U, as real numbers.

    Shapes: u [B, T, H]; map "matrix" with a [1, H, N, N] and u [1, H, N, B], as all rows have the
    same transition: their states are columns.
    """
    length = u.shape[1]
    n = 1 << min(5 if u.device.type == "cpu" else 6, (length - 1).bit_length())
    full = (length - 1) // n
    tail = length - full * n
    w = chunk_weights(s._replace(c=s.c[:0].detach()), n, tail)
    _, last = by_chunks(u, lambda _: w, None, None, n)
    a = _lti._product(w.powers, tail)
    if full:
        a = a @ _lti._product(_lti._squares(w.end, full), full)
    return SegmentMap("matrix", a.unsqueeze(0), last.permute(1, 2, 0).unsqueeze(0))


def _entering(u: Tensor, s: Discrete, state: Tensor, packed: bool) -> Tensor:
    """The states [rows, H, n, 2] that a shard of tokens starts from."""
    first = state.flatten(2)
    first = first.unsqueeze(-1) if packed else first.permute(1, 2, 0).unsqueeze(0)
    first = _across.entering(lambda cut: dplr_segment(u[:, cut], s), first)
    first = first.squeeze(-1) if packed else first.squeeze(0).permute(2, 0, 1)
    return first.reshape(state.shape)


def dplr(
    u: Tensor, s: Discrete, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run discrete systems: u [B, T, H] -> y [B, T, M, H] and the state [rows, H, n, 2]."""
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (rows, *s.pole.shape, 2)
    check_state("state", state, shape, "[rows, H, N/2, 2]")
    first = u.new_zeros(shape) if state is None else state.to(u.dtype)
    if _across.active() is not None:
        first = _entering(u, s, first, cu_seqlens is not None)
    run = choose("lti", u, None, {"reference": dplr_reference, "torch": dplr_chunked})
    if u.shape[1] == 1 and cu_seqlens is None and run is dplr_chunked:
        y, last = step(stepper(s), u[:, 0], first)
        return y.unsqueeze(1), last
    y, last = run(u, s, state=first.flatten(2), cu_seqlens=cu_seqlens)
    return y, last.unflatten(2, (-1, 2))


def cauchy_kernel(
    values: Tensor, p: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int
) -> Tensor:
    """The first `length` entries of the impulse response, in O(N length).

    K(w) = sum_l k_l w^l = 2 / (1 + w) [r(C, B) - r(C, P) (I + r(P*, P))^-1 r(P*, B)],
    r(x, y) = sum over all N modes of dt x y / (z - dt lambda),  z = 2 (1 - w) / (1 + w),
    is evaluated at points w of a circle and transformed back.

    Shapes: values, b [H, n]; p [rank, H, n]; c [M, H, n], complex128; dt [H, 1]; -> [M, H, length]
    Precision: about 1e-10 of the largest entry.
    Source: S4 (arXiv 2111.00396, section 3.3, lemma C.4).
    Differs: the circle is smaller than 1 and has twice as many points as the kernel entries, so
    that what follows the entries folds back 1e-11 fold. The authors take the unit circle and must
    know (I - Abar^L)^T C instead of C, and treat w = -1 apart.
    """
    points = max(2 * length, 16)
    log_radius = math.log(1e-11) / points
    half = points // 2 + 1
    angle = torch.arange(half, device=dt.device, dtype=torch.float64) * (2 * math.pi / points)
    w = torch.polar(torch.full_like(angle, math.exp(log_radius)), -angle)
    poles = dt * values
    left = torch.cat([c, p.conj()]).unsqueeze(1)  # C, P* against B, P
    v = dt * (left * torch.cat([b.unsqueeze(0), p]))  # [M + rank, 1 + rank, H, n]
    # v / (z - l) + conj(v / (z - l)) over real z would be 2 (z Re v - Re(v l*)) / |z - l|^2.
    weights = torch.stack([2 * v.real, -2 * (v * poles.conj()).real])
    at = max(1, _BLOCK // values.numel())
    spectrum = []
    for part in (2 * (1 - w) / (1 + w)).split(at):
        if weights.requires_grad or poles.requires_grad:
            made = checkpoint(_response, poles, weights, part, use_reentrant=False)
            assert isinstance(made, Tensor)
            spectrum.append(made)
        else:
            spectrum.append(_response(poles, weights, part))
    k = torch.fft.irfft(torch.cat(spectrum, -1) * (2 / (1 + w)), n=points)[..., :length]
    back = torch.arange(length, device=dt.device, dtype=torch.float64) * -log_radius
    return k * back.exp()


def _response(poles: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """r(C, B) - r(C, P) (I + r(P*, P))^-1 r(P*, B). [M, H, nodes]

    Shapes: poles [H, n]; weights [2, M + rank, 1 + rank, H, n]; z [nodes].
    """
    _, n_rows, n_columns, heads, _ = weights.shape
    l = poles.unsqueeze(-1)
    d = 1 / ((z - l.real).square() + l.imag.square())  # 1 / ((z - l)(z - l*)), [H, n, nodes]
    d = torch.view_as_real(d).flatten(2)
    sums = weights.permute(3, 0, 1, 2, 4).flatten(1, 3) @ d
    sums = torch.view_as_complex(sums.view(heads, -1, z.shape[0], 2))
    first, second = sums.unflatten(1, (2, n_rows, n_columns)).unbind(1)
    r = z * first + second  # [H, M + rank, 1 + rank, nodes]
    rank = n_columns - 1
    channels = n_rows - rank
    cb, cp = r[:, :channels, 0], r[:, :channels, 1:]
    qb, qp = r[:, channels:, 0], r[:, channels:, 1:].permute(0, 3, 1, 2)
    eye = torch.eye(rank, dtype=qp.dtype, device=qp.device)
    x = _inverse(eye + qp) @ qb.mT.unsqueeze(-1)  # [H, nodes, rank, 1]
    low = (cp * x.squeeze(-1).permute(0, 2, 1).unsqueeze(1)).sum(2)
    return (cb - low).transpose(0, 1)


def recover_c(system: Discrete, length: int) -> Tensor:
    """C from what the authors train, C~ = (I - Abar^length)^T C, as it stands in `system`.

    Use float64: an eigenvalue of Abar near 1, such as fout has, makes the matrix nearly singular.
    Shapes: [M, H, n] complex, for the continuous system.
    """
    a, _, c = dense(system)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    left = (eye - torch.linalg.matrix_power(a, length)).mT
    c = torch.linalg.solve(left, c.permute(1, 2, 0)).permute(2, 0, 1) / 2
    return torch.complex(c[..., ::2], -c[..., 1::2])
