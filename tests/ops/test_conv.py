"""The causal depthwise convolution: torch's own, the definition, packing, windows, gradients."""

from itertools import pairwise

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan.ops import conv as module
from longscan.ops._conv_fused import between, flat
from longscan.ops.conv import conv, conv_reference

NAMES = ["y", "window", "dx", "dweight", "dbias", "dstate"]


def _inputs(batch, length, channels=5, width=4, rows=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, length, channels), (channels, width), (channels,),
        (rows or batch, width - 1, channels),
    ]  # fmt: skip
    return [torch.randn(s, dtype=torch.float64, generator=g).requires_grad_() for s in shapes]


def _gradients(run, inputs, seed=1, **more):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias, state = inputs
    out = run(x, weight, bias, state=state, **more)
    # Cotangents are bfloat16 numbers, the same ones for every precision.
    cotangents = [torch.randn(o.shape, generator=g).bfloat16().to(o.dtype) for o in out]
    loss = sum((o * c).sum() for o, c in zip(out, cotangents, strict=True))
    return [*out, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def _same(got, want):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_close(a, b.detach(), "float64", name)


@pytest.fixture
def small_blocks(monkeypatch):
    """Spans of five tokens, so that short sequences cross their edges."""

    def blocks(x):
        return ((t, min(t + 5, x.shape[1])) for t in range(0, x.shape[1], 5))

    monkeypatch.setattr(module, "_blocks", blocks)


def test_equals_torch(small_blocks):
    x, weight, bias, _ = _inputs(2, 17)
    want = F.conv1d(F.pad(x.mT, (3, 0)), weight.unsqueeze(1), bias, groups=5).mT
    y, window = conv(x, weight, bias)
    assert_close(y, want.detach(), "float64", "y")
    assert torch.equal(window, x[:, -3:])
    assert window.untyped_storage().nbytes() < x.untyped_storage().nbytes()
    g = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, weight, bias), g),
        torch.autograd.grad(want, (x, weight, bias), g),
        strict=True,
    ):
        assert_close(a, b, "float64", "gradient")


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 12, 23])
def test_equals_the_definition(length, width, small_blocks):
    x = _inputs(2, length, width=width)
    _same(_gradients(conv, x), _gradients(conv_reference, x))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.integers(1, 5),
    cut=st.integers(0, 8),
)
def test_packed_and_split(lengths, width, cut):
    rows, total = len(lengths), sum(lengths)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu = torch.tensor(bounds)
    inputs = _inputs(1, total, width=width, rows=rows)
    got = _gradients(conv, inputs, cu_seqlens=cu)
    _same(got, _gradients(conv_reference, inputs, cu_seqlens=cu))
    x, weight, bias, state = inputs
    for i, (a, b) in enumerate(pairwise(bounds)):
        now, pieces = state[i : i + 1], []
        k = min(cut, b - a)
        for lo, hi in ((a, a + k), (a + k, b)):
            if hi > lo:
                y, now = conv(x[:, lo:hi], weight, bias, state=now)
                pieces.append(y)
        assert_close(torch.cat(pieces, 1), got[0][:, a:b].detach(), "float64", "split")
        assert_close(now, got[1][i : i + 1].detach(), "float64", "window")
    # Nothing leaks from one sequence into another.
    i = cut % rows
    y, _ = conv(x, weight, bias, state=state, cu_seqlens=cu)
    dx, dstate = torch.autograd.grad(y[:, bounds[i] : bounds[i + 1]].sum(), (x, state))
    outside = torch.ones(total, dtype=torch.bool)
    outside[bounds[i] : bounds[i + 1]] = False
    assert not dx[0, outside].any()
    assert dx[0, ~outside].any()
    assert not dstate[torch.arange(rows) != i].any()


def test_gradcheck():
    x = _inputs(2, 4, channels=2, width=3)
    assert torch.autograd.gradcheck(lambda x, w, b, s: conv(x, w, b, state=s), x)
    x = _inputs(1, 6, channels=2, width=3, rows=3)
    cu = torch.tensor([0, 1, 4, 6])
    assert torch.autograd.gradcheck(lambda x, w, b, s: conv(x, w, b, state=s, cu_seqlens=cu), x)


def test_low_precision_sums_are_wide():
    """bfloat16 rows are rounded once: the weight gradient of a long row stays exact to bfloat16."""
    x, weight, bias, state = (t.detach() for t in _inputs(1, 3000, channels=2))
    half = [t.bfloat16().requires_grad_() for t in (x, weight, bias, state)]
    wide = [t.detach().double().requires_grad_() for t in half]
    for got, want in zip(_gradients(conv, half), _gradients(conv_reference, wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() < 2**-7 * want.abs().max()


def test_registered_correctly():
    """PyTorch's own checks of the custom ops."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for cu, rows in ((None, 2), (torch.tensor([0, 2, 7]), 2)):
        batch = 2 if cu is None else 1
        x, weight, bias, state = (t.detach().float() for t in _inputs(batch, 7, rows=rows))
        for b in (None, bias):
            torch.library.opcheck(module._conv, (x, weight, b, state, cu), test_utils=tests)
        for end in (None, state):
            args = (x, weight, state, cu, x, end)
            torch.library.opcheck(module._conv_backward, args, test_utils=tests)


def test_mistakes_are_explained():
    x, weight, bias, state = _inputs(2, 5)
    with pytest.raises(ValueError, match="x must have shape"):
        conv(x[..., :3], weight, bias)
    with pytest.raises(ValueError, match="state must have shape"):
        conv(x, weight, bias, state=state[:, :2])
    with pytest.raises(TypeError, match="floating point"):
        conv(x.long(), weight)
    with pytest.raises(ValueError, match="batch must be 1"):
        conv(x, weight, cu_seqlens=torch.tensor([0, 5]))


def test_the_distance_of_tokens_that_are_alone_in_their_rows():
    x = torch.randn(1, 5, 8).transpose(0, 1)
    assert x.is_contiguous()
    assert x.stride(1) == 40
    assert flat(x) is x
    assert between(x) == 8
    assert between(flat(torch.randn(5, 3, 16)[:, :1, :8])) == 48
