"""The norms against their formulas, gradients included."""

import pytest
import torch
from helpers import assert_close

from longscan.ops.norm import add_rms_norm, gated_rms_norm, head_rms_norm, l2_norm, rms_norm

F64 = torch.float64


def _same(f, formula, *inputs):
    grads = []
    for g in (f, formula):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = g(*leaves)
        torch.manual_seed(1)
        (y * torch.randn_like(y)).sum().backward()
        grads.append([y, *(x.grad for x in leaves)])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "float64")


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 6)])
def test_rms_norm(shape):
    x, w = torch.randn(shape, dtype=F64), torch.randn(shape[-1], dtype=F64)

    def formula(x, w):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w

    _same(lambda x, w: rms_norm(x, w, 1e-3), formula, x, w)
    _same(lambda x: rms_norm(x, None, 1e-3), lambda x: formula(x, 1.0), x)


def test_add_rms_norm():
    """The norm of a sum, and the sum: both differentiable, in the dtypes asked for."""
    x, b, w = (torch.randn(2, 3, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64),
               torch.randn(8, dtype=F64))  # fmt: skip
    _same(
        lambda x, b, w: torch.cat(add_rms_norm(x, b, w, 1e-3)),
        lambda x, b, w: torch.cat([rms_norm(x + b, w, 1e-3), x + b]),
        x, b, w,
    )  # fmt: skip
    y, total = add_rms_norm(x.float(), b.bfloat16(), w.float(), dtype=torch.bfloat16)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert rms_norm(x.float(), w.float(), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_l2_norm(scale):
    x = torch.randn(4, 3, 8, dtype=F64)
    _same(
        lambda x: l2_norm(x, 1e-2, scale),
        lambda x: scale * x / (x.square().sum(-1, keepdim=True) + 1e-2).sqrt(),
        x,
    )
    assert torch.equal(l2_norm(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_gated_rms_norm():
    x, g, w = torch.randn(3, 2, 8, dtype=F64), torch.randn(3, 2, 8, dtype=F64), torch.ones(8)
    _same(
        lambda x, g, w: gated_rms_norm(x, g, w, 1e-2),
        lambda x, g, w: x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * w * g,
        x,
        g,
        w.double(),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_head_rms_norm(groups):
    x, w = torch.randn(3, 8, dtype=F64), torch.randn(8, dtype=F64)

    def formula(x, w):
        parts = x.unflatten(-1, (groups, -1))
        return (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w

    _same(lambda x, w: head_rms_norm(x, w, groups), formula, x, w)


def test_second_derivatives():
    x, w = torch.randn(2, 3, dtype=F64), torch.randn(3, dtype=F64)
    inputs = [t.requires_grad_() for t in (x, w)]
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-2), inputs)


def test_precision():
    """Statistics in float32: large bfloat16 values neither overflow nor lose the mean."""
    x = (torch.randn(5, 64) * 1e15).to(torch.bfloat16)
    y = rms_norm(x, torch.ones(64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_close(y.float().square().mean(-1), torch.ones(5), "bfloat16")
