"""What `lti_chunked` is made of: powers of the state matrix, a Toeplitz matrix, the scan.

Two forms of a state matrix: dense A [H, N, N], or diagonal, given as its complex logarithm
a [H, N]. Inside, a state is S real numbers: N of them, or N pairs (re, im). Features come first,
so that every product is one batch of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Weights:
    """The matrices of a chunk of C tokens.

    write [H, C, S]: A^l b; read [H, M C, S]: rows r with r . s = Re(c A^(l + 1) s);
    kernel [H, M, C]: Re(c A^l b); end: A^C, complex [H, N] or [H, N, N]; powers: A, A^2, A^4, ...
    up to A^C.
    """

    write: Tensor
    read: Tensor
    kernel: Tensor
    end: Tensor
    powers: list[Tensor]


def weights(a: Tensor, b: Tensor, c: Tensor, n: int) -> Weights:
    """The matrices of chunks of n tokens. Shapes: a, b, c as `lti`."""
    c = c.transpose(0, 1)
    if a.is_complex():
        p, doubled = powers(a, n)
        first = (c * doubled[0].unsqueeze(1)).unsqueeze(2)
        write = pairs(b.unsqueeze(1) * p)
        read = pairs((first * p.unsqueeze(1)).conj()).flatten(1, 2)
    else:
        doubled = _squares(a, n)
        write = _krylov(doubled, b.unsqueeze(1), n).squeeze(1)
        read = _krylov([s.mT for s in doubled], c @ a, n).flatten(1, 2)
    return Weights(write, read, rows(c) @ write.mT, _product(doubled, n), doubled)


def kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """Re(c A^l b) for l < length. -> [H, M, length].

    With l = g n + i, one product of the rows c A^(g n) with the columns A^i b: about sqrt(length)
    of each, so that memory grows with N sqrt(length).
    """
    n = 1 << ((length - 1).bit_length() + 1) // 2
    blocks = -(-length // n)
    c = c.transpose(0, 1)
    if a.is_complex():
        columns = pairs(b.unsqueeze(1) * powers(a, n)[0])
        reads = pairs((c.unsqueeze(2) * powers(a, blocks, n)[0].unsqueeze(1)).conj())
    else:
        squares = _squares(a, n)
        columns = _krylov(squares, b.unsqueeze(1), n).squeeze(1)
        stride = _product(squares, n).mT
        reads = _krylov(_squares(stride, blocks - 1), c, blocks)
    k = reads.flatten(1, 2) @ columns.mT
    return k.view(k.shape[0], -1, blocks * n)[..., :length]


def powers(a: Tensor, count: int, stride: int = 1) -> tuple[Tensor, list[Tensor]]:
    """exp(l stride a) for l < count [H, count, N], and for l = 1, 2, 4, ... <= count [H, N].

    By doubling, from exp(2^i stride a) made in float64: the angles of long strides have no digits
    left in float32, and products of few factors keep theirs.
    """
    doubled = [_times(a, stride << i).exp().to(a.dtype) for i in range(count.bit_length())]
    p = torch.ones_like(a).unsqueeze(1)
    for factor in doubled:
        more = p[:, : count - p.shape[1]] if 2 * p.shape[1] > count else p
        p = torch.cat([p, more * factor.unsqueeze(1)], 1)
    return p, doubled


def whole(a: Tensor, length: int) -> Tensor:
    """A^length, in the form of a; angles stay within [-pi, pi]."""
    if not a.is_complex():
        return _product(_squares(a, length), length)
    total = _times(a, length)
    turns = torch.round(total.imag.detach() / (2 * math.pi))
    return torch.complex(total.real, total.imag - 2 * math.pi * turns).to(a.dtype)


def _times(a: Tensor, n: int) -> Tensor:
    """n a in complex128, also where a = -inf (as an eigenvalue of zero has)."""
    return torch.complex(a.real.double() * n, a.imag.double() * n)


def pairs(x: Tensor) -> Tensor:
    """Complex [..., N] -> real [..., 2 N], re and im side by side."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def rows(c: Tensor) -> Tensor:
    """c as rows r with r . s = Re(c s)."""
    return pairs(c.conj()) if c.is_complex() else c


def _squares(a: Tensor, n: int) -> list[Tensor]:
    """A^(2^i) for all 2^i <= n."""
    out = [a]
    while 1 << len(out) <= n:
        out.append(out[-1] @ out[-1])
    return out


def _product(doubled: list[Tensor], n: int) -> Tensor:
    """A^n, n >= 1, from A, A^2, A^4, ..."""
    first, *factors = (p for i, p in enumerate(doubled) if n >> i & 1)
    for p in factors:
        first = first * p if p.is_complex() else first @ p
    return first


def _krylov(squares: list[Tensor], x: Tensor, count: int) -> Tensor:
    """A^l x for l < count by doubling, x [H, M, N] -> [H, M, count, N]."""
    out = x.unsqueeze(2)
    for s in squares:
        n = out.shape[2]
        if n >= count:
            break
        more = out[:, :, : count - n]
        out = torch.cat([out, (more.flatten(1, 2) @ s.mT).view_as(more)], 2)
    return out


def toeplitz(k: Tensor) -> Tensor:
    """[H, M, C] -> [H, C, M C] with k[i - j] at row j, column i, and zero where i < j.

    Rows of k and as many zeros, cut anew into rows that are shorter by one, shift by one each.
    """
    n = k.shape[-1]
    k = F.pad(k, (0, n)).unsqueeze(2).expand(-1, -1, n, -1).flatten(2)
    k = k[..., : n * (2 * n - 1)].unflatten(-1, (n, 2 * n - 1))[..., :n]
    return k.transpose(1, 2).flatten(2)


def advance(powers: list[Tensor], s: Tensor, steps: list[int]) -> Tensor:
    """A^steps[i] s for each row i of states [H, R, S], given A^1, A^2, A^4, ..."""
    for bit, p in enumerate(powers):
        rows = [n >> bit & 1 == 1 for n in steps]
        if any(rows):
            s_z = _numbers(s, p)
            moved = _reals(p.unsqueeze(1) * s_z if p.is_complex() else s_z @ p.mT)
            if not all(rows):
                moved = torch.where(torch.tensor(rows, device=s.device).unsqueeze(1), moved, s)
            s = moved
    return s


def scan(end: Tensor, drive: Tensor, state: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The states that enter chunks, S' = A S + drive, in the order of `algebra.scan`.

    One A for all chunks, of which `algebra.scan` would want a copy for each.
    Shapes: end complex [H, N] or [H, N, N]; drive [H, G, S]; state [H, R, S].
    Returns: the states that enter all chunks [H, G, S], and each row's last one [H, R, S].
    """
    return _forward(end, drive, state, counts)


def _numbers(x: Tensor, a: Tensor) -> Tensor:
    """States as the numbers that `a` multiplies."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if a.is_complex() else x


def _reals(x: Tensor) -> Tensor:
    return pairs(x) if x.is_complex() else x


def _advance(end: Tensor, s: Tensor, add: Tensor, out: Tensor) -> None:
    """out = A s + add, for states [H, rows, N]."""
    if end.is_complex():
        torch.addcmul(add, end.unsqueeze(1), s, out=out)
    else:
        out.copy_(torch.baddbmm(add, s, end.mT))


def _steps(counts: list[int]) -> list[tuple[slice, slice, slice, slice]]:
    """Of each step: chunks with a successor, these successors, chunks without, their rows."""
    out, at = [], 0
    for n, m in zip(counts, [*counts[1:], 0], strict=True):
        now, following = slice(at, at + m), slice(at + n, at + n + m)
        out.append((now, following, slice(at + m, at + n), slice(m, n)))
        at += n
    return out


@torch.library.custom_op("longscan::lti_scan", mutates_args=())
def _forward(end: Tensor, drive: Tensor, state: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    entering, last = torch.empty_like(drive), torch.empty_like(state)
    entering[:, : counts[0]] = state
    s, add = _numbers(entering, end), _numbers(drive, end)
    for now, following, ending, rows in _steps(counts):
        last[:, rows] = entering[:, ending]
        _advance(end, s[:, now], add[:, now], s[:, following])
    return entering, last


@_forward.register_fake
def _(end, drive, state, counts):
    return torch.empty_like(drive), torch.empty_like(state)


@torch.library.custom_op("longscan::lti_scan_backward", mutates_args=())
def _backward(
    end: Tensor, entering: Tensor, d_entering: Tensor, d_last: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of end, drive and state."""
    d_drive, d_state = torch.empty_like(entering), torch.empty_like(d_last)
    leaving, s, read = (_numbers(x, end) for x in (d_drive, entering, d_entering))
    # The gradient of the states that enter a step's chunks; of them, rows end in it.
    d, d_end = _numbers(d_state, end), torch.zeros_like(end)
    adjoint = end.conj().resolve_conj() if end.is_complex() else end.mT
    for now, _, ending, rows in reversed(_steps(counts)):
        m = rows.start
        leaving[:, now] = d[:, :m]
        leaving[:, ending] = 0
        _advance(adjoint, leaving[:, now], read[:, now], d[:, :m])
        d_state[:, rows] = d_entering[:, ending] + d_last[:, rows]
        if end.is_complex():  # while they are in cache
            d_end += (s[:, now].conj() * leaving[:, now]).sum(1)
    if not end.is_complex():
        d_end = leaving.mT @ s
    return d_end, d_drive, d_state


@_backward.register_fake
def _(end, entering, d_entering, d_last, counts):
    return torch.empty_like(end), torch.empty_like(entering), torch.empty_like(d_last)


def _save(ctx, inputs, output) -> None:
    end, _, _, ctx.counts = inputs
    ctx.save_for_backward(end, output[0])


def _gradients(ctx, d_entering: Tensor, d_last: Tensor):
    end, entering = ctx.saved_tensors
    given = d_entering.contiguous(), d_last.contiguous()
    return *_backward(end, entering, *given, ctx.counts), None


_forward.register_autograd(_gradients, setup_context=_save)


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def dense_gradient(x: Tensor) -> Tensor:
    """x, whose gradient will lie without gaps: products with a permuted one are slow."""
    return x if torch.compiler.is_compiling() else _DenseGradient.apply(x)
