"""HiPPO systems x' = A x + B u, whose state holds the past as coefficients of a basis.

K_n(t) = (e^{tA} B)_n is how much of the input of t time units ago is in state n:

    legs   e^{-t} sqrt(2n+1) P_n(2 e^{-t} - 1): Legendre polynomials of a warped, endless past
    legt   sqrt(2n+1) P_n(1 - 2t / w) / w on [0, w]: Legendre polynomials of a window w
    lagt   e^{-t/2} L_n(t): Laguerre functions of an endless past
    fout   1, sqrt2 cos(2 pi m t / w), sqrt2 sin(2 pi m t / w), all / w, on [0, w]: Fourier

(legt and fout for large N, P_n and L_n the Legendre and Laguerre polynomials.) The papers of LMU
and LSSL use the window w = 1, the code of S4 uses w = 2; a step dt then remembers w / dt tokens.
States of fout are ordered cos 0, none, cos 1, sin 1, cos 2, sin 2, ...; the second stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BASES = ("legs", "legt", "lagt", "fout")
NPLR_BASES = ("legs", "legt", "fout")


def hippo(basis: str, n: int, window: float = 2.0) -> tuple[Tensor, Tensor]:
    """A and B of a basis with n states.

    Shapes: A [n, n], B [n], float64. window: the length remembered by legt and fout.
    Raises: ValueError for an unknown basis, or an odd n with fout.
    Source: HiPPO (arXiv 2008.07669, theorems 1 and 2); HTTYH (arXiv 2206.12037, section 4).
    """
    _check(basis, n, BASES)
    i = torch.arange(n, dtype=torch.float64)
    if basis == "lagt":
        return -torch.ones(n, n, dtype=torch.float64).tril() + torch.eye(n) / 2, torch.ones_like(i)
    if basis == "fout":
        w = _fourier_input(n)
        a = -torch.outer(w, w)
        m = torch.arange(n // 2)
        a[2 * m, 2 * m + 1] -= math.pi * m.double()
        a[2 * m + 1, 2 * m] += math.pi * m.double()
        return a * (2 / window), w * (2 / window)
    b = (2 * i + 1).sqrt()
    a = -torch.outer(b, b)
    if basis == "legs":
        return a.tril(-1) - torch.diag(i + 1), b
    sign = 1 - 2 * ((i[:, None] + i) % 2)  # (-1)^(n - k)
    return (a.tril() + a.triu(1) * sign) / window, b / window


def _check(basis: str, n: int, known: tuple[str, ...]) -> None:
    if basis not in known:
        raise ValueError(f"unknown basis {basis!r}; choose from {', '.join(known)}")
    if n < 1 or (basis == "fout" and n % 2):
        raise ValueError(f"{basis} needs {'an even' if basis == 'fout' else 'a'} number of states "
                         f"above zero, not {n}")  # fmt: skip


def _fourier_input(n: int) -> Tensor:
    """B of fout with window 2: 1 for cos 0, sqrt2 for the other cosines, 0 for sines."""
    w = torch.zeros(n, dtype=torch.float64)
    w[::2] = math.sqrt(2)
    w[0] = 1
    return w


def low_rank(basis: str, n: int) -> Tensor:
    """P [rank, n] with A + P^T P normal (window 2): -1/2 I + skew for legs, skew for the others.

    Source: S4 (arXiv 2111.00396, theorem 1 and appendix C.1).
    """
    _check(basis, n, NPLR_BASES)
    if basis == "fout":
        return _fourier_input(n).unsqueeze(0)
    i = torch.arange(n, dtype=torch.float64)
    p = (i + 0.5).sqrt()
    if basis == "legs":
        return p.unsqueeze(0)
    return torch.stack([p * (i % 2), p * ((i + 1) % 2)])


def eigenvectors(basis: str, n: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n / 2] of the normal part of a basis, and their eigenvectors as columns.

    Only one of each conjugate pair, the one with negative imaginary part, fastest first. The first
    component of every eigenvector is real and not negative, so that none depends on the machine.
    """
    _check(basis, n, NPLR_BASES)
    if n % 2:
        raise ValueError(f"conjugate pairs need an even number of states, not {n}")
    half = n // 2
    if basis == "fout":  # 2 x 2 blocks, known in closed form; the pair m = 0 has no frequency
        m = torch.arange(half - 1, -1, -1)
        re, im = torch.zeros(2, n, half, dtype=torch.float64)
        re[2 * m, torch.arange(half)] = im[2 * m + 1, torch.arange(half)] = math.sqrt(0.5)
        return -1j * math.pi * m.to(torch.complex128), torch.complex(re, im)
    a, _ = hippo(basis, n)
    p = low_rank(basis, n)
    normal = a + p.mT @ p
    skew = (normal - normal.mT) / 2
    w, v = torch.linalg.eigh(-1j * skew)  # real eigenvalues, ascending
    v = v[:, :half]
    v = v * (v[:1].conj() / v[:1].abs())
    real = torch.full_like(w[:half], -0.5 if basis == "legs" else 0.0)
    return torch.complex(real, w[:half]), v


def nplr(basis: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A basis as a diagonal plus low rank system: A = V (Lambda - P^H P) V^H, B = V B~.

    In the coordinates V^H x the system is z' = (Lambda - P^T conj(P)) z + B~ u, over all n modes.
    Shapes: Lambda [n / 2], P [rank, n / 2], B~ [n / 2], complex128: one mode of each conjugate
    pair, negative imaginary parts, fastest first. Legt and fout have the window 2.
    Source: S4 (arXiv 2111.00396, section 3.2).
    Differs: phases of the modes are fixed (see `eigenvectors`); nothing is clipped.
    """
    values, v = eigenvectors(basis, n)
    _, b = hippo(basis, n)
    vh = v.mH
    return values, low_rank(basis, n).to(vh.dtype) @ vh.mT, vh @ b.to(vh.dtype)


class Kept:
    """What was last made of some tensors, given again for as long as they keep their values.

    Nothing is kept while gradients flow into the tensors, nor in a compiled graph.
    """

    def __init__(self) -> None:
        self._from: list[tuple[Tensor, int, Tensor]] = []
        self._key: Hashable = None
        self._made: Any = None

    def __reduce__(self):  # a copied or stored module starts with nothing kept
        return Kept, ()

    def get(self, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, or what it gave for the same tensors and key."""
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if grad or torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make()
        if self._key != key or not self._same(tensors):
            with torch.inference_mode(False), torch.no_grad():
                self._from = [(t, t._version, _bits(t.detach()).clone()) for t in tensors]
                self._key, self._made = key, make()
        return self._made

    def _same(self, tensors: Sequence[Tensor]) -> bool:
        if len(tensors) != len(self._from):
            return False
        for t, (kept, version, old) in zip(tensors, self._from, strict=True):
            if t is not kept or t._version != version:
                return False
            now = _bits(t)
            if now.dtype != old.dtype or now.device != old.device:
                return False
            # Changes through `.data` are not counted; looking at values is free on a CPU only.
            if now.device.type == "cpu" and not torch.equal(now, old):
                return False
        return True


def _bits(t: Tensor) -> Tensor:
    """Two float32 as one whole number where they lie so: these compare in half the time."""
    even = t.ndim > 0 and t.shape[-1] % 2 == 0 and t.storage_offset() % 2 == 0
    pairs = t.dtype is torch.float32 and even and t.is_contiguous()
    return t.view(torch.int64) if pairs else t
