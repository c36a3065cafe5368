"""HiPPO systems: the authors' matrices, the functions they stand for, normal plus low rank."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, assert_close, error, golden
from numpy.polynomial import Laguerre, Legendre
from torch import nn

from longscan.mixers._hippo import Kept, eigenvectors, hippo, low_rank, nplr

F64 = torch.float64
CASES = [(basis, n) for basis in ("legs", "legt", "fout") for n in (8, 32)]


@pytest.fixture(scope="module")
def stored():
    return golden("s4/hippo")


def case(stored, basis, n):
    """Tensors of one system; complex ones as such. The authors' fourier is rounded to float32."""
    key = f"{'fourier' if basis == 'fout' else basis}{n}/"
    out = {k[len(key) :]: v.double() for k, v in stored.items() if k.startswith(key)}
    for k in ("Lambda", "P", "Bc", "V"):
        out[k] = torch.complex(out[k][..., 0], out[k][..., 1])
    return out, "stored32" if basis == "fout" else "golden64"


@pytest.mark.parametrize(("basis", "n"), CASES)
def test_matrices_equal_authors(stored, basis, n):
    want, kind = case(stored, basis, n)
    a, b = hippo(basis, n)
    assert_close(a, want["A"], kind, "A")
    assert_close(b, want["B"], kind, "B")
    assert_close(low_rank(basis, n), want["P_real"], kind, "P")
    for t, state in zip(want["t"], want["expmAt_B"], strict=True):
        assert_close(torch.linalg.matrix_exp(a * t) @ b, state, kind, f"state at {t}")


@pytest.mark.parametrize(("basis", "n"), CASES)
def test_modes_equal_authors_up_to_phases(stored, basis, n):
    want, kind = case(stored, basis, n)
    values, p, b = nplr(basis, n)
    assert values.dtype == torch.complex128
    for got, w, what in (
        (values, want["Lambda"], "Lambda"),
        (b.abs(), want["Bc"].abs(), "|B|"),
        (p.abs(), want["P"].abs(), "|P|"),
        (b * p.conj(), want["Bc"] * want["P"].conj(), "B P*"),
    ):
        pairs = [(got.real, w.real), (got.imag, w.imag)] if got.is_complex() else [(got, w)]
        scale = w.abs().max()
        for x, y in pairs:
            assert (x - y).abs().max() <= TOLERANCE[kind] * scale, what
    _, v = eigenvectors(basis, n)
    u = want["V"]
    assert_close((v * values @ v.mH).real, (u * want["Lambda"] @ u.mH).real, kind, "normal part")


@pytest.mark.parametrize("n", [2, 8, 64, 256])
@pytest.mark.parametrize("basis", ["legs", "legt", "fout"])
def test_normal_plus_low_rank(basis, n):
    """A = V (Lambda - P P^*) V^* over all modes, exactly, and B = V B~."""
    values, p, b = nplr(basis, n)
    _, v = eigenvectors(basis, n)
    v = torch.cat([v, v.conj()], 1)
    values, p, b = (torch.cat([x, x.conj()], -1) for x in (values, p, b))
    middle = torch.diag(values) - p.mT @ p.conj()
    want_a, want_b = hippo(basis, n)
    assert_close((v @ middle @ v.mH).real, want_a, "float64", "A")
    assert_close((v @ b).real, want_b, "float64", "B")
    eye = torch.eye(n, dtype=F64)
    assert_close((v.mH @ v).real, eye, "float64", "V is unitary")
    assert (values.imag[: n // 2].diff() > 0).all(), "fastest first"
    assert (v[0].real >= 0).all()


@pytest.mark.parametrize("basis", ["legs", "legt", "lagt", "fout"])
def test_no_state_can_grow(basis):
    """A + A^T <= 0: the reason why powers of the discrete systems stay small."""
    a, _ = hippo(basis, 32)
    assert torch.linalg.eigvalsh(a + a.mT).max() < 1e-10


def response(basis, n, times, window=2.0):
    a, b = hippo(basis, n, window)
    return torch.stack([torch.linalg.matrix_exp(a * t) @ b for t in times], 1)


TIMES = torch.tensor([0.0, 0.1, 0.33, 0.7, 1.1, 1.6, 1.9], dtype=F64)


def polynomial(family, degree, at):
    return torch.from_numpy(family.basis(degree)(at.numpy()))


def test_legs_is_warped_legendre():
    got, warp = response("legs", 12, TIMES), torch.exp(-TIMES)
    for n in range(12):
        want = warp * (2 * n + 1) ** 0.5 * polynomial(Legendre, n, 2 * warp - 1)
        assert_close(got[n], want, "float64", f"n = {n}")


def test_lagt_is_laguerre():
    got = response("lagt", 12, TIMES)
    for n in range(12):
        want = torch.exp(-TIMES / 2) * polynomial(Laguerre, n, TIMES)
        assert_close(got[n], want, "float64", f"n = {n}")


@pytest.mark.parametrize("window", [1.0, 2.0])
@pytest.mark.parametrize("basis", ["legt", "fout"])
def test_windows(basis, window):
    """For many states: the basis inside the window (away from its edges), nothing behind it."""
    t = torch.tensor([0.3, 0.4, 0.55, 0.7], dtype=F64) * window
    got = response(basis, 128, t, window)
    for n in range(4):
        if basis == "legt":
            want = (2 * n + 1) ** 0.5 * polynomial(Legendre, n, 1 - 2 * t / window) / window
        else:
            angle = 2 * np.pi * (n // 2) * t / window
            wave = torch.sin(angle) if n % 2 else torch.cos(angle)
            want = wave * (1 if n < 2 else 2**0.5) / window
        assert (got[n] - want).abs().max() < 0.06 / window, f"n = {n}"
    after = response(basis, 128, torch.tensor([1.1, 1.5, 3.0]) * window, window)
    assert after[:4].abs().max() < 0.03 / window


def test_fout_has_a_dead_state():
    a, b = hippo("fout", 8)
    assert a[1].abs().max() == a[:, 1].abs().max() == b[1] == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown basis 'fourier'"):
        hippo("fourier", 8)
    with pytest.raises(ValueError, match="an even number"):
        hippo("fout", 7)
    with pytest.raises(ValueError, match="choose from legs, legt, fout"):
        nplr("lagt", 8)
    with pytest.raises(ValueError, match="conjugate pairs"):
        nplr("legs", 7)


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.kept, self.made = Kept(), 0

    def forward(self):
        def make():
            self.made += 1
            return 2 * self.w

        return self.kept.get([self.w], self.w.dtype, make)


def test_kept_values_follow_the_parameters():
    m = Doubler()
    assert m().requires_grad, "nothing is kept while gradients flow"
    m()
    assert m.made == 2
    with torch.no_grad():
        m(), m()
        assert m.made == 3
        m.w.add_(1)
        assert torch.equal(m(), torch.full((3,), 4.0))
        m.w.data.add_(1)
        assert torch.equal(m(), torch.full((3,), 6.0))
        m.w = nn.Parameter(torch.zeros(3))
        assert torch.equal(m(), torch.zeros(3))
        m.double()
        assert m().dtype == F64
    m.w.requires_grad_(False)
    made = m.made
    assert m() is m(), "frozen parameters need no gradient"
    assert m.made == made
    other = copy.deepcopy(m)
    assert error(other(), m() + 1) == 1
    assert other.made == made + 1, "copies start with nothing"


@pytest.mark.parametrize("size", [(3,), (), (4,), (2, 6)])
@pytest.mark.parametrize("gap", [0, 1])
def test_every_change_through_data_is_seen(size, gap):
    """Of any number, whether two are compared as one or each by itself."""
    m = Doubler()
    n = math.prod(size)
    m.w = nn.Parameter(torch.ones(n + gap)[gap:].view(size))
    with torch.no_grad():
        m()
        for i in range(n):
            made = m.made
            assert m() is m()
            assert m.made == made
            m.w.data.view(-1)[i] += 2.0**-20
            assert torch.equal(m(), 2 * m.w)
            assert m.made == made + 1
        m.w.data = m.w.data.double()
        assert m().dtype == F64


def test_kept_values_of_inference_serve_training():
    m = Doubler()
    m.w.requires_grad_(False)
    with torch.inference_mode():
        m()
    x = torch.ones(3, requires_grad=True)
    (x * m()).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert m.made == 1
