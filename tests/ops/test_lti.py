"""The lti op: both forms, all views, any shape, any packing."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import TOLERANCE, assert_close, error
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.algebra import compose
from longscan.ops.lti import lti, lti_conv, lti_kernel, lti_reference, lti_segment

F64 = torch.float64
many = settings(max_examples=50, deadline=None, database=None, derandomize=True)
FORMS = ("dense", "diagonal")
both = pytest.mark.parametrize("form", FORMS)


def system(form, seed, h=2, n=3, m=1, slow=0.0):
    """Random stable weights: a, b, c. slow: everything hardly decays."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    if form == "dense":
        a = normal(h, n, n)
        a = a / torch.linalg.matrix_norm(a, 2)[:, None, None] * (1 - slow * 0.1)
        return a, normal(h, n), normal(m, h, n)
    rate = -torch.rand(h, n, dtype=F64, generator=g) * (slow or 1.0)
    return (
        torch.complex(rate, 5 * normal(h, n)),
        torch.complex(normal(h, n), normal(h, n)),
        torch.complex(normal(m, h, n), normal(m, h, n)),
    )


def inputs(form, seed, rows, length, h=2, n=3):
    g = torch.Generator().manual_seed(seed + 1000)
    state = (rows, h, n, 2) if form == "diagonal" else (rows, h, n)
    u = torch.randn(rows, length, h, dtype=F64, generator=g)
    return u, torch.randn(state, dtype=F64, generator=g)


def compare(u, weights, state, kind="float64", **more):
    """Outputs, final states and all gradients of the two backends."""
    results = []
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_() for x in (u, *weights, state)]
        y, out = lti(*leaves[:4], state=leaves[4], backend=backend, **more)
        g = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in (y, out))
        results.append([y, out, *torch.autograd.grad(loss, leaves)])
    for name, a, b in zip(["y", "state", "u", "a", "b", "c", "dstate"], *results, strict=True):
        a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a, b))
        assert_close(b, a, kind, name)


@many
@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    h=st.integers(1, 3),
    n=st.integers(1, 5),
    m=st.integers(1, 3),
    chunk=st.sampled_from([None, 1, 2, 5, 8, 16, 64]),
)
def test_any_shape(form, seed, rows, length, h, n, m, chunk):
    u, state = inputs(form, seed, rows, length, h, n)
    compare(u, system(form, seed, h, n, m), state, chunk=chunk)


@many
@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    chunk=st.sampled_from([3, 8, 16]),
)
def test_any_packing(form, seed, lengths, chunk):
    u, _ = inputs(form, seed, 1, sum(lengths))
    _, state = inputs(form, seed, len(lengths), 1)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    compare(u, system(form, seed, m=2), state, chunk=chunk, cu_seqlens=cu)


@many
@given(
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
    length=st.integers(2, 90),
    cut=st.integers(1, 89),
)
def test_split_and_steps_equal_whole(form, seed, length, cut):
    cut = 1 + cut % (length - 1)
    u, state = inputs(form, seed, 2, length)
    weights = system(form, seed)
    whole, final = lti(u, *weights, state=state)
    y1, s = lti(u[:, :cut], *weights, state=state)
    y2, s = lti(u[:, cut:], *weights, state=s)
    assert_close(torch.cat([y1, y2], 1), whole, "float64", "parts")
    assert_close(s, final, "float64", "state after parts")
    ys, s = [], state
    for t in range(length):
        y, s = lti(u[:, t : t + 1], *weights, state=s)
        ys.append(y)
    assert_close(torch.cat(ys, 1), whole, "float64", "steps")
    assert_close(s, final, "float64", "state after steps")


@many
@given(form=st.sampled_from(FORMS), seed=st.integers(0, 1000), length=st.integers(1, 300))
def test_convolutional_and_recurrent_views_agree(form, seed, length):
    """The kernel is the answer to an impulse, and its convolution the whole system."""
    weights = system(form, seed, m=2)
    u, _ = inputs(form, seed, 2, length)
    want, _ = lti_reference(u, *weights)
    k = lti_kernel(*weights, length)
    impulse = torch.zeros(1, length, 2, dtype=F64)
    impulse[:, 0] = 1
    assert_close(k, lti_reference(impulse, *weights)[0][0].permute(1, 2, 0), "float64", "kernel")
    assert_close(lti_conv(u, k), want, "float64", "convolution")
    assert_close(lti(u, *weights)[0], want, "float64", "chunks")


@both
def test_kernel_gradients_are_those_of_the_recurrence(form):
    leaves = [x.requires_grad_() for x in system(form, 3, m=2)]
    impulse = torch.zeros(1, 50, 2, dtype=F64)
    impulse[:, 0] = 1
    g = torch.randn(2, 2, 50, dtype=F64)
    y, _ = lti_reference(impulse, *leaves)
    want = torch.autograd.grad((y[0] * g.permute(2, 0, 1)).sum(), leaves)
    got = torch.autograd.grad((lti_kernel(*leaves, 50) * g).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert_close(torch.view_as_real(a) if a.is_complex() else a,
                     torch.view_as_real(b) if b.is_complex() else b, "float64")  # fmt: skip


@pytest.mark.parametrize("taps", [1, 7, 40, 60])
def test_convolution_with_kernels_of_any_length(taps):
    u, k = torch.randn(2, 40, 3, dtype=F64), torch.randn(2, 3, taps, dtype=F64)
    y = torch.zeros(2, 40, 2, 3, dtype=F64)
    for t in range(40):
        for j in range(min(t + 1, taps)):
            y[:, t] += k[:, :, j] * u[:, t - j].unsqueeze(1)
    assert_close(lti_conv(u, k), y, "float64")


@both
def test_gradcheck_of_the_definition(form):
    u, state = inputs(form, 0, 1, 3, 1, 2)
    leaves = [x.requires_grad_() for x in (u, *system(form, 0, 1, 2, 2), state)]
    assert torch.autograd.gradcheck(lambda *x: lti_reference(*x[:4], state=x[4]), leaves)


@both
def test_segment_maps_compose_to_the_whole(form):
    u, state = inputs(form, 5, 2, 60)
    a, b, c = system(form, 5)
    cuts = (0, 1, 20, 57, 60)
    maps = [lti_segment(u[:, i:j], a, b) for i, j in pairwise(cuts)]
    total = maps[0]
    for m in maps[1:]:
        total = compose(m, total)
    _, want = lti(u, a, b, c, state=state)
    pair = form == "diagonal"
    s = (torch.view_as_complex(state) if pair else state).unsqueeze(-1)
    for m in (total, lti_segment(u, a, b)):
        out = m(s).squeeze(-1)
        assert_close(torch.view_as_real(out) if pair else out, want, "float64", "state")


@both
def test_future_has_exactly_no_influence(form):
    u, _ = inputs(form, 1, 1, 90)
    y, _ = lti(u.requires_grad_(), *system(form, 1))
    (g,) = torch.autograd.grad(y[:, 40].sum(), u)
    assert g[:, 41:].abs().max() == 0
    assert g[:, :41].abs().min() > 0


def test_real_diagonal_systems():
    """Without imaginary parts the diagonal form is the dense one of a diagonal matrix."""
    a, b, c = (x.real for x in system("diagonal", 2, m=2))
    u, _ = inputs("diagonal", 2, 2, 45)
    want, _ = lti(u, torch.diag_embed(a.exp()), b, c)
    assert_close(lti(u, torch.complex(a, torch.zeros_like(a)), b, c)[0], want, "float64")


@pytest.mark.parametrize("length", [1000, 20000])
def test_long_memories_keep_their_digits_in_float32(length):
    """A resonance that hardly decays: the error must not grow with the angle l Im a."""
    a = torch.complex(torch.full((1, 4), -1e-5), torch.tensor([[0.1, 1.0, 3.0, 30.0]]))
    b, c = torch.ones(1, 4, dtype=torch.complex64), torch.ones(1, 1, 4, dtype=torch.complex64)
    want = lti_kernel(a.to(torch.complex128), b, c, length)
    steps = torch.arange(length, dtype=F64)
    exact = (a.to(torch.complex128).unsqueeze(-1) * steps).exp().sum(1).real
    assert_close(want[0], exact, "float64", "float64 kernel")
    assert error(lti_kernel(a, b, c, length), want) < 1e-5
    impulse = torch.zeros(1, length, 1)
    impulse[:, 0] = 1
    y, _ = lti(impulse, a, b, c)
    assert error(y[0, :, 0, 0], want[0, 0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("rate", [0.0, 1e-30, 50.0, 1e4, math.inf])
def test_extreme_decays_stay_finite(rate):
    a = torch.complex(torch.full((1, 2), -rate), torch.tensor([[0.0, 3.0]]))
    b, c = (torch.ones(1, 2) + 0j), (torch.ones(1, 1, 2) + 0j)
    leaves = [x.requires_grad_() for x in (torch.randn(1, 100, 1), a, b, c)]
    y, s = lti(*leaves)
    assert torch.isfinite(torch.view_as_real(lti_segment(*leaves[:3]).u)).all()
    want, _ = lti_reference(*(x.detach() for x in leaves))
    assert_close(y, want.double(), "float32")
    for g in torch.autograd.grad(y.sum() + s.sum(), leaves):
        assert torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all()


@both
def test_autocast_and_low_precision_inputs(form):
    u, state = inputs(form, 1, 2, 40)
    weights = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in system(form, 1)]
    want = lti(u.float(), *weights, state=state.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lti(u.float(), *weights, state=state.float())
    assert torch.equal(got[0], want[0])
    y, s = lti(u.bfloat16(), *weights)
    assert y.dtype == torch.bfloat16
    assert s.dtype == torch.float32


GOOD = {
    "u": torch.zeros(2, 5, 3),
    "a": torch.full((3, 4), -1 + 1j),
    "b": torch.zeros(3, 4) + 0j,
    "c": torch.zeros(1, 3, 4) + 0j,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5)}, "u must have shape"),
        ({"u": torch.zeros(2, 0, 3)}, "u must have shape"),
        ({"u": torch.zeros(2, 5, 3, dtype=torch.long)}, "floating point"),
        ({"a": torch.zeros(2, 4) + 0j}, "a must have shape"),
        ({"a": torch.zeros(3, 4)}, "a must have shape"),
        ({"a": torch.zeros(3, 4, 5)}, "a must have shape"),
        ({"a": torch.zeros(3, 4, 4)}, "b is complex"),
        ({"a": torch.full((3, 4), 0.5 + 1j)}, "real part <= 0"),
        ({"a": torch.full((3, 4), complex(math.nan, 0))}, "real part <= 0"),
        ({"b": torch.zeros(3, 5) + 0j}, "b must have shape"),
        ({"c": torch.zeros(3, 4) + 0j}, "c must have shape"),
        ({"state": torch.zeros(2, 3, 4)}, "state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch must be 1"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lti(**{**GOOD, **change})


def test_bad_kernels_are_refused():
    with pytest.raises(ValueError, match="length >= 1"):
        lti_kernel(GOOD["a"], GOOD["b"], GOOD["c"], 0)
    with pytest.raises(ValueError, match="kernel must have shape"):
        lti_conv(GOOD["u"], torch.zeros(1, 2, 5))
