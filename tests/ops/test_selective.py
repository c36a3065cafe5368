"""The selective scan: golden vectors, and the block form against the definition."""

from itertools import pairwise

import pytest
import torch
from helpers import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan.ops import _selective as module
from longscan.ops.selective import (
    selective,
    selective_chunked,
    selective_reference,
    selective_segment,
    selective_step,
)

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture
def tiling(monkeypatch):
    """Small blocks, so that short sequences cross many edges."""

    def use(steps, width):
        monkeypatch.setattr(module, "_tiling", lambda rows, numel, device: (steps, width))

    return use


def _inputs(batch, length, channels=6, n=3, kinds="tt", rows=None, real=True, seed=0):
    """u, dt, A, B, C, state in float64; kinds of B and C: t(ime), g(roups of 3), c(onstant)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, real=True):
        kind = torch.float64 if real else torch.complex128
        return torch.randn(*shape, dtype=kind, generator=g)

    shapes = {"t": (batch, length, n), "g": (batch, length, 3, n), "c": (channels, n)}
    a = normal(channels, n, real=real)
    a = -a.abs() if real else torch.complex(-a.real.abs(), a.imag)
    x = [normal(batch, length, channels), normal(batch, length, channels).abs(), a]
    x += [normal(*shapes[k.lower()], real=real or k.islower()) for k in kinds]
    x += [normal(rows or batch, channels, n, real=real)]
    return [t.requires_grad_() for t in x]


def _gradients(run, inputs, seed=1):
    """Outputs, final state and all gradients, with random cotangents on both."""
    g = torch.Generator().manual_seed(seed)
    *x, state = inputs
    y, h = run(*x, state=state)
    loss = sum((o * torch.randn(o.shape, dtype=o.dtype, generator=g)).real.sum() for o in (y, h))
    return [y, h, *torch.autograd.grad(loss, inputs)]


NAMES = ["y", "state", "du", "ddt", "dA", "dB", "dC", "dstate"]


def _same(got, want, kind="float64"):
    for name, a, b in zip(NAMES, got, want, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        assert_close(a, b, kind, name)


def _complex_time(x):
    """[B, N, 2 T] with real and imaginary parts side by side -> [B, T, N]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).mT


@BACKENDS
@pytest.mark.parametrize("case", ["var", "grouped", "const", "complex", "noz_long"])
def test_golden(case, backend, tiling):
    tiling(4, 1)
    file = {
        k[len(case) + 1 :]: v.double()
        for k, v in golden("mamba/selective_scan").items()
        if k.startswith(case + "/")
    }
    x = {k: file[k].requires_grad_() for k in file if f"grad_{k}" in file}
    dt = x["delta"].mT
    if "delta_bias" in x:
        dt = dt + x["delta_bias"]
    dt = dt if case == "const" else F.softplus(dt)
    a, b, c = x["A"], x["B"], x["C"]
    if case == "complex":
        a, b, c = torch.view_as_complex(a), _complex_time(b), _complex_time(c)
    elif case == "grouped":
        b, c = b.permute(0, 3, 1, 2), c.permute(0, 3, 1, 2)
    elif case != "const":
        b, c = b.mT, c.mT
    u = x["u"].mT

    def finish(y, part=slice(None)):
        if "D" in x:
            y = y + x["D"] * u[:, part]
        return (y * F.silu(x["z"].mT[:, part]) if "z" in x else y).mT

    def plain(h):
        return torch.view_as_real(h.resolve_conj()) if h.is_complex() else h

    y, h = selective(u, dt, a, b, c, backend=backend)
    assert_close(finish(y), file["y"], "golden32", "y")
    if "last_state" in file:
        assert_close(plain(h), file["last_state"], "golden32", "state")
    first = (finish(y) * file["dy"]).sum()
    both = first + (plain(h) * file["dlast_state"]).sum()
    for prefix, loss in (("grad_", first), ("grad2_", both)):
        grads = torch.autograd.grad(loss, list(x.values()), retain_graph=True)
        for name, grad in zip(x, grads, strict=True):
            assert_close(grad, file[prefix + name], "golden32", prefix + name)
    # Start again from the authors' state after K steps.
    for key in [k for k in file if k.startswith("state_at_")]:
        k = int(key.rsplit("_", 1)[1])
        h = torch.view_as_complex(file[key]) if case == "complex" else file[key]
        parts = [t if t.ndim == 2 else t[:, k:] for t in (u, dt, a, b, c)]
        y, h = selective(*parts, state=h, backend=backend)
        assert_close(finish(y, slice(k, None)), file["y"][..., k:], "golden32", "rest")
        assert_close(plain(h), file["last_state"], "golden32", "state of the rest")


@pytest.mark.parametrize("kinds", ["tt", "gg", "gt", "tc", "cc", "cg"])
@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_blocks_equal_the_definition(kinds, real, tiling):
    tiling(4, 2)
    x = _inputs(3, 13, kinds=kinds, real=real)
    _same(_gradients(selective, x), _gradients(selective_reference, x))
    # Packed: rows of unequal length, some ending inside a block, some at its edge.
    cuts = torch.tensor([0, 3, 11, 12, 29, 33])
    x = _inputs(1, 33, kinds=kinds, real=real, rows=5)
    got, want = (
        _gradients(lambda *a, f=f, **k: f(*a, cu_seqlens=cuts, **k), x)
        for f in (selective, selective_reference)
    )
    _same(got, want)


@pytest.mark.parametrize("kinds", ["TT", "Gc", "CT"])
def test_complex_weights(kinds, tiling):
    tiling(4, 1)
    x = _inputs(2, 9, kinds=kinds, real=False)
    _same(_gradients(selective, x), _gradients(selective_reference, x))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    steps=st.integers(1, 5),
    width=st.integers(1, 4),
    cut=st.integers(0, 8),
)
def test_packed_split_and_stepped(lengths, steps, width, cut):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tiling", lambda rows, numel, device: (steps, width))
        total, rows = sum(lengths), len(lengths)
        x = _inputs(1, total, kinds="tg", rows=rows)
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        *tokens, state = x
        y, h = selective(*tokens, state=state, cu_seqlens=torch.tensor(bounds))
        for i, (a, b) in enumerate(pairwise(bounds)):
            part = [t if t.ndim == 2 else t[:, a:b] for t in tokens]
            alone, last = selective(*part, state=state[i : i + 1])
            assert_close(y[:, a:b], alone.detach(), "float64", "separate")
            assert_close(h[i : i + 1], last.detach(), "float64", "separate state")
            # The same sequence in two pieces, then token by token.
            k = min(cut, b - a)
            now, pieces = state[i : i + 1], []
            for lo, hi in ((0, k), (k, b - a)):
                if hi > lo:
                    sub = [t if t.ndim == 2 else t[:, lo:hi] for t in part]
                    o, now = selective(*sub, state=now)
                    pieces.append(o)
            assert_close(torch.cat(pieces, 1), alone.detach(), "float64", "split")
            assert_close(now, last.detach(), "float64", "split state")
            now, pieces = state[i : i + 1], []
            for t in range(b - a):
                u, dt, A, B, C = (p if p.ndim == 2 else p[:, t] for p in part)
                o, now = selective_step(u, dt, A, B.unsqueeze(1), C, now)
                pieces.append(o)
            assert_close(torch.stack(pieces, 1), alone.detach(), "float64", "steps")
        # Nothing leaks from one sequence into another.
        i = cut % rows
        loss = y[:, bounds[i] : bounds[i + 1]].square().sum()
        grads = torch.autograd.grad(loss, [tokens[0], tokens[1], state])
        inside = torch.zeros(total, dtype=torch.bool)
        inside[bounds[i] : bounds[i + 1]] = True
        for grad in grads[:2]:
            assert not grad[0, ~inside].any()
            assert grad[0, inside].any()
        assert not grads[2][torch.arange(rows) != i].any()


def test_gradcheck():
    *x, state = _inputs(2, 3, channels=3, n=2, kinds="tg")
    for run in (selective_reference, selective_chunked):
        assert torch.autograd.gradcheck(lambda *a, run=run: run(*a[:5], state=a[5]), (*x, state))


def test_one_token():
    """T = 1 takes the step form, and its gradients are those of the definition."""
    for kinds, real in (("tt", True), ("gc", True), ("cg", False)):
        x = _inputs(3, 1, kinds=kinds, real=real)
        _same(_gradients(selective, x), _gradients(selective_reference, x))


def test_segments_compose():
    """Two stretches as maps: the second after the first carries any state as the whole does."""
    u, dt, A, B, C, state = _inputs(2, 11, kinds="gt")
    maps = [selective_segment(u[:, s], dt[:, s], A, B[:, s]) for s in (slice(4), slice(4, 11))]
    carried = maps[1](maps[0](state.unsqueeze(-1))).squeeze(-1)
    _, want = selective_reference(u, dt, A, B, C, state=state)
    assert_close(carried, want.detach(), "float64", "state")
    whole = selective_segment(u, dt, A, B)
    assert_close(whole(state.unsqueeze(-1)).squeeze(-1), want.detach(), "float64", "whole")


@pytest.mark.parametrize("dt", [1e-30, 1e-7, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("a", [-1e4, -1.0, -1e-20, 0.0])
def test_extremes_are_finite(dt, a):
    u, _, _, B, C, state = (t.detach().float() for t in _inputs(1, 40, n=4))
    x = [u, torch.full_like(u, dt), torch.full((6, 4), a), B, C, state]
    if dt > 1e4:
        x[0] = u / dt  # the input dt B u itself must be a float32 number
    x = [t.requires_grad_() for t in x]
    for got, want in zip(_gradients(selective, x), _gradients(selective_reference, x), strict=True):
        # dA and ddt may overflow where the definition does: exp(0) sums dt over all tokens.
        assert torch.equal(got.isfinite(), want.isfinite())
    y, h = selective(*(t.detach() for t in x[:5]), state=x[5].detach())
    assert y.isfinite().all()
    assert h.isfinite().all()


def test_precision_and_dtypes():
    x = _inputs(2, 50)
    want = _gradients(selective_reference, x)
    single = [t.detach().float().requires_grad_() for t in x]
    got = _gradients(selective, single)
    assert all(t.dtype == torch.float32 for t in got)
    want_y, want_h = selective_reference(
        *(t.double() for t in single[:5]), state=single[5].double()
    )
    assert_close(got[0], want_y.detach(), "float32", "y")
    assert_close(got[1], want_h.detach(), "float32", "state")
    assert want[0].dtype == torch.float64
    # bfloat16 inputs: states and sums stay float32; autocast changes nothing.
    half = [t.detach().bfloat16() for t in single]
    y, h = selective(half[0], single[1], single[2], half[3], half[4], state=single[5])
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    plain = [t.detach() for t in single]
    for length in (1, 50):
        part = [t if t.ndim == 2 else t[:, :length] for t in plain[:5]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, h = selective(*part, state=plain[5])
        again, last = selective(*part, state=plain[5])
        assert_close(y, again, "float32", "autocast")
        assert_close(h, last, "float32", "autocast state")


def test_memory_is_flat():
    """Backward keeps the inputs and one state per block, never the states of all tokens."""
    x = [t.detach().float() for t in _inputs(1, 2048, channels=64, n=8)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        selective(x[0].requires_grad_(), *x[1:5])
    inputs = sum(t.numel() for t in x[:5])
    assert inputs <= sum(kept) < inputs + 2048 * 64 * 8 / 16


def test_two_runs_are_bitwise_equal():
    x = [t.detach().float().requires_grad_() for t in _inputs(2, 300, channels=64, n=8)]
    for a, b in zip(_gradients(selective, x), _gradients(selective, x), strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_explained():
    u, dt, A, B, C, state = (t.detach() for t in _inputs(2, 5))
    with pytest.raises(ValueError, match="apply softplus first"):
        selective(u, -dt, A, B, C)
    with pytest.raises(ValueError, match="real part <= 0"):
        selective(u, dt, -A, B, C)
    with pytest.raises(ValueError, match="dt must be >= 0"):
        selective(u, dt * torch.nan, A, B, C)
    with pytest.raises(ValueError, match=r"B must have shape"):
        selective(u, dt, A, B[:, :4], C)
    with pytest.raises(ValueError, match="4 groups of C"):
        selective(u, dt, A, B, C.unsqueeze(2).expand(-1, -1, 4, -1))
    two, three = (C.unsqueeze(2).expand(-1, -1, g, -1) for g in (2, 3))
    with pytest.raises(ValueError, match="same number of groups"):
        selective(u, dt, A, two, three)
    with pytest.raises(ValueError, match="state must have shape"):
        selective(u, dt, A, B, C, state=state.mT)
    with pytest.raises(TypeError, match="A is real"):
        selective(u, dt, A, B.to(torch.complex128), C)
    with pytest.raises(TypeError, match="floating point"):
        selective(u.long(), dt, A, B, C)
    with pytest.raises(ValueError, match="cu_seqlens ends at 4"):
        selective(u[:1], dt[:1], A, B[:1], C[:1], cu_seqlens=torch.tensor([0, 4]))


def test_registered_correctly():
    """PyTorch's own checks of the custom ops: schema, shapes without data, autograd."""
    x = [t.detach().float() for t in _inputs(2, 9, kinds="tt")]
    u, dt, A, B, C, state = x
    args = [
        u.flatten(0, 1).unsqueeze(1),
        dt.flatten(0, 1).unsqueeze(1),
        A.mT.unsqueeze(0).contiguous(),
        B.flatten(0, 1).unsqueeze(1),
        C.flatten(0, 1).unsqueeze(1),
        state.mT.unsqueeze(1).contiguous(),
    ]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for keep in (False, True):
        torch.library.opcheck(module._selective, (*args, None, 4, 2, keep), test_utils=tests)
    y, h, entered = module._selective(*args, None, 4, 2, True)
    torch.library.opcheck(
        module._selective_backward, (*args[:5], entered, None, y, h, 4, 2), test_utils=tests
    )
