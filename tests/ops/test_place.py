"""Gradients that are written where they belong: in one buffer, once, and never over others'."""

from types import SimpleNamespace

import pytest
import torch

from longscan.ops import _gates_fused, _norm_fused
from longscan.ops._gates_fused import gates_fused
from longscan.ops._norm_fused import norm_fused
from longscan.ops._place import Whole, is_at, place_of

SIZES = [4, 6, 2]


class Cut(torch.autograd.Function):
    """2 x, cut; its backward notes which gradients lay in the buffer already."""

    there: list[bool]

    @staticmethod
    def forward(ctx, x):
        whole = 2 * x
        ctx.whole = Whole(whole, SIZES, {0: 0, 1: 1, 2: 2})
        ctx.set_materialize_grads(False)
        return tuple(whole.split(SIZES, -1))

    @staticmethod
    def backward(ctx, *grads):
        buffer, slices = ctx.whole.take(grads)
        Cut.there = [g is not None and is_at(g, s) for g, s in zip(grads, slices, strict=True)]
        for g, s, there in zip(grads, slices, Cut.there, strict=True):
            if not there:
                s.zero_() if g is None else s.copy_(g)
        return 2 * buffer


class Square(torch.autograd.Function):
    """x^2, whose backward writes to the place of x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.place = place_of(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        place = None if ctx.place is None else ctx.place(x)
        return torch.mul(2 * x, g, out=place)


def parts(x):
    return Cut.apply(x)


@pytest.fixture
def x():
    return torch.randn(3, 5, sum(SIZES), requires_grad=True)


def test_gradients_are_written_where_they_belong(x):
    a, b, c = parts(x)
    y = Square.apply(a).sum() + Square.apply(b.unflatten(-1, (3, 2))).sum() + (c * c).sum()
    assert torch.allclose(torch.autograd.grad(y, x)[0], 8 * x)
    assert Cut.there == [True, True, False]


def test_two_who_want_one_place_are_added(x):
    a, b, _ = parts(x)
    y = Square.apply(a).sum() + Square.apply(a.unflatten(-1, (2, 2))).sum() + Square.apply(b).sum()
    want = 8 * x * torch.tensor([2.0] * 4 + [1.0] * 6 + [0.0] * 2)
    assert torch.allclose(torch.autograd.grad(y, x)[0], want)
    assert Cut.there == [False, False, False]


def test_a_gradient_that_was_handed_out_stays(x):
    """What autograd adds to it does not go where it lies."""
    a, b, _ = parts(x)
    v = a.unflatten(-1, (2, 2))
    y = Square.apply(v).sum() + (3 * a).sum() + Square.apply(b).sum()
    dv, dx = torch.autograd.grad(y, (v, x))
    assert torch.equal(dv, 2 * v)
    assert torch.allclose(dx, torch.cat([4 * a + 6, 4 * b, torch.zeros(3, 5, 2)], -1))


def test_what_changes_a_part_is_no_place(x):
    a, b, c = parts(x)
    assert place_of(a) is not None
    assert place_of(x) is None
    for changed in (a.mT, a[..., 1:], a.float() + 1, b.transpose(1, 2)):
        assert place_of(changed) is None
    y = Square.apply(a[..., 1:]).sum() + Square.apply(c.mT).sum()
    want = 8 * x * torch.tensor([0.0] + [1.0] * 3 + [0.0] * 6 + [1.0] * 2)
    assert torch.allclose(torch.autograd.grad(y, x)[0], want)


def test_each_backward_pass_has_a_buffer_of_its_own(x):
    a, b, _ = parts(x)
    y = Square.apply(a).sum() + Square.apply(b).sum()
    first = torch.autograd.grad(y, (a, x), retain_graph=True)
    kept = [g.clone() for g in first]
    (only,) = torch.autograd.grad(y, b, retain_graph=True)  # `take` is not reached
    held = only.clone()
    again = torch.autograd.grad(3 * y, (a, x))
    assert torch.allclose(only, 2 * b)
    assert torch.equal(only, held)
    assert all(map(torch.equal, first, kept))
    assert torch.allclose(again[1], 3 * first[1])
    assert place_of(a)(a) is None  # type: ignore[misc]  # no backward is under way


class Kernels(SimpleNamespace):
    """Launches that do nothing."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    forward = backward = Nothing()


def test_gates_and_gated_norms_write_there(monkeypatch):
    for module in (_norm_fused, _gates_fused):
        monkeypatch.setattr(module, "_kernels", Kernels)
    x = torch.randn(2, 5, sum(SIZES), requires_grad=True)
    gate, b, a = parts(x)
    o = torch.randn(2, 5, 2, 2, requires_grad=True)
    y = norm_fused(o, torch.ones(2), gate.unflatten(-1, (2, 2)), activation="silu").sum()
    beta, log_a = gates_fused(b, a, torch.ones(2), torch.ones(2))
    (y + beta.sum() + log_a.sum()).backward()
    assert Cut.there == [True, True, True]
    gate, _, a = parts(x)
    dt, log_a = gates_fused(None, a, torch.ones(2), torch.ones(2))
    z = norm_fused(torch.randn(2, 5, 4), None, gate, gate_first=True, activation="sigmoid")
    (z.sum() + dt.sum() + log_a.sum()).backward()
    assert Cut.there == [True, False, True]
    gate, *_ = parts(x)  # rows that no distance of tokens and one of heads can say
    y = norm_fused(torch.randn(2, 5, 2, 1, 2), None, gate.unflatten(-1, (2, 1, 2)))
    y.sum().backward()
    assert Cut.there == [False, False, False]
