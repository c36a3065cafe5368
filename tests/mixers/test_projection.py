"""Which projections are computed with the convolution behind them, and that others are not."""

import pytest
import torch
from torch import nn

from longscan.mixers._parts import ShortConv, convolved_projection
from longscan.ops import _projection_fused as fused
from longscan.ops._conv_fused import unit_fits
from longscan.ops._projection_fused import product_dtype, projection_fits
from longscan.ops.norm import l2_norm

X = torch.randn(2, 300, 16)


def linear(**options):
    return nn.Linear(16, 21, **{"bias": False, **options})


def test_a_plain_product_of_many_tokens_fits():
    assert projection_fits(linear(), X)
    assert not projection_fits(linear(), X[:, :100])
    assert not projection_fits(linear(bias=True), X)
    assert not projection_fits(linear(dtype=torch.float64), X.double())


def test_modules_that_do_more_than_a_product_do_not_fit():
    class Adapter(nn.Linear):
        pass

    hooked, changed, sharded = linear(), linear(), linear()
    hooked.register_forward_pre_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(changed)
    del sharded.weight
    sharded.weight = torch.zeros(21, 16)  # as FullyShardedDataParallel does
    for module in (Adapter(16, 21, bias=False), nn.Sequential(linear()), hooked, changed, sharded):
        assert not projection_fits(module, X)


def test_the_dtype_is_that_of_linear():
    weight = linear().weight
    assert product_dtype(X, weight) == torch.float32
    assert product_dtype(X.bfloat16(), weight) is None
    assert not projection_fits(linear(), X.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        for x in (X, X.bfloat16()):
            assert (
                product_dtype(x, weight) == torch.bfloat16 == nn.functional.linear(x, weight).dtype
            )
            assert projection_fits(linear(), x)


@pytest.mark.parametrize(("rows", "wide"), [(4620, 4624), (4624, 4624), (4384, 4384), (3, 16)])
def test_rows_are_padded_where_they_are_not_aligned(rows, wide):
    weight = torch.randn(rows, 2)
    padded = fused._padded(weight, torch.bfloat16)
    assert padded.shape == (wide, 2)
    assert torch.equal(padded[:rows], weight.bfloat16())
    assert not padded[rows:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "width"), [(0, 8), (8, 16), (3, 8), (8, 5), (24, 0)])
def test_slices_are_copied_whole(dtype, start, width):
    wide, x = torch.zeros(2, 5, 24, dtype=dtype), torch.randn(2, 5, width).to(dtype)
    want = wide.clone()
    want[..., start : start + width] = x
    fused._copy(wide[..., start : start + width], x)
    assert torch.equal(wide, want)
    fused._copy(wide[..., start : start + width], x.mT.contiguous().mT)
    assert torch.equal(wide, want)


def test_parts_without_kernels():
    """On a CPU it is what it says: a product, cut, and a convolution of one of the parts."""
    conv, layer = ShortConv(12, 4, bias=True).double(), linear(dtype=torch.float64)
    x = X.double()
    (a, b), window, (before, after) = convolved_projection(layer, conv, x, [4, 12, 5], [5, 7], at=1)
    p = layer(x)
    y, want = conv.activated(p[..., 4:16], None, None)
    for got, expected in ((a, y[..., :5]), (b, y[..., 5:]), (window, want),
                          (before, p[..., :4]), (after, p[..., 16:])):  # fmt: skip
        torch.testing.assert_close(got, expected)
    g = torch.autograd.grad(before.square().sum(), layer.weight, create_graph=True)[0]
    assert torch.autograd.grad(g.square().sum(), layer.weight)[0].isfinite().all()


def test_heads_of_unit_length():
    """Behind the convolution, wherever it is computed: queries 1 / sqrt(K), keys 1."""
    conv, layer = ShortConv(20, 4).double(), linear(dtype=torch.float64)
    (q, k, v), _, _ = convolved_projection(layer, conv, X.double(), [20, 1], [8, 8, 4], unit=4)
    (q0, k0, v0), _, _ = convolved_projection(layer, conv, X.double(), [20, 1], [8, 8, 4])
    assert torch.equal(q, l2_norm(q0.unflatten(-1, (2, 4)), scale=0.5).flatten(-2))
    assert torch.equal(k, l2_norm(k0.unflatten(-1, (2, 4))).flatten(-2))
    assert torch.equal(v, v0)


@pytest.mark.parametrize(
    ("unit", "sizes", "fits"),
    [
        (128, (768, 768, 1536), True), (64, (64, 128), True), (8, (8, 16, 3), True),
        (0, (8, 8, 8), False), (12, (24, 24, 24), False), (256, (256, 256, 256), False),
        (8, (8, 12, 8), False), (8, (8,), False),
    ],
)  # fmt: skip
def test_units_that_kernels_scale(unit, sizes, fits):
    assert unit_fits(unit, sizes) is fits
