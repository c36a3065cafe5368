"""linear_cross_entropy is F.cross_entropy of the logits it never holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan.ops.loss import linear_cross_entropy


def case(n=23, d=7, v=13, dtype=torch.float64, ignored=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    w = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    t = torch.randint(0, v, (n,), generator=g)
    t[torch.randperm(n, generator=g)[:ignored]] = -100
    return h, w, t


def whole(h, w, t, reduction, n_classes=None, cap=None):
    logits = h @ w.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[:, :n_classes], t, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("n_classes", "cap"), [(None, None), (11, None), (None, 2.5), (11, 0.7)])
def test_value_and_gradients_are_those_of_cross_entropy(reduction, n_classes, cap):
    h, w, t = case()
    t = t.where(t < (n_classes or 13), 0)
    g = torch.linspace(-1, 2, len(t), dtype=torch.float64) if reduction == "none" else 1.7
    for chunk in (1, 4, 23, 1000):
        options = {"reduction": reduction, "n_classes": n_classes, "logit_cap": cap}
        ours = linear_cross_entropy(h, w, t, **options, chunk=chunk)
        theirs = whole(h, w, t, reduction, n_classes, cap)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        got = torch.autograd.grad((ours * g).sum(), (h, w))
        want = torch.autograd.grad((theirs * g).sum(), (h, w))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    if n_classes:
        assert got[1][n_classes:].eq(0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.integers(1, 50), st.data())
def test_any_shape(n, d, v, chunk, data):
    ignored = data.draw(st.integers(0, n))
    h, w, t = case(n, d, v, ignored=ignored)
    ours = linear_cross_entropy(h, w, t, reduction="sum", chunk=chunk)
    torch.testing.assert_close(ours, whole(h, w, t, "sum"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction, cap):
    h, w, t = case(6, 3, 5, ignored=2)
    f = lambda h, w: linear_cross_entropy(  # noqa: E731
        h, w, t, reduction=reduction, logit_cap=cap, chunk=4
    )
    assert torch.autograd.gradcheck(f, (h, w))


def test_only_the_wanted_gradients_are_made():
    h, w, t = case()
    for a, b in ((h, w.detach()), (h.detach(), w)):
        for reduction in ("mean", "none"):
            linear_cross_entropy(a, b, t, reduction=reduction).sum().backward()
    want = torch.autograd.grad(whole(h, w, t, "mean") + whole(h, w, t, "sum"), (h, w))
    torch.testing.assert_close((h.grad, w.grad), want)
    assert not linear_cross_entropy(h.detach(), w.detach(), t).requires_grad


def test_a_batch_without_targets_costs_nothing():
    h, w, t = case(ignored=23)
    loss = linear_cross_entropy(h, w, t)
    assert loss.item() == 0
    loss.backward()
    assert h.grad.eq(0).all()
    assert w.grad.eq(0).all()
    assert linear_cross_entropy(h, w, t, reduction="none").eq(0).all()


def test_huge_logits_stay_finite():
    h, w, t = case(dtype=torch.float32, ignored=0)
    loss = linear_cross_entropy(h * 1e4, w * 1e4, t, reduction="none")
    want = whole(h.double() * 1e4, w.double() * 1e4, t, "none")
    assert loss.isfinite().all()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=50.0)
    loss.sum().backward()
    assert h.grad.isfinite().all()


def test_capped_logits_far_outside_the_cap():
    """tanh is 1 to the last digit there: the loss is bounded, and nothing is left to learn."""
    h, w, t = case(dtype=torch.float32, ignored=0)
    loss = linear_cross_entropy(h * 1e4, w * 1e4, t, reduction="none", logit_cap=5.0)
    assert loss.max() <= 10 + math.log(13)
    loss.sum().backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().max() < 1e-3


def test_ignore_index_may_be_any_number():
    h, w, t = case(ignored=0)
    want = F.cross_entropy(h @ w.T, t, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(h, w, t, ignore_index=3), want)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_weights_lose_no_more_than_their_own_rounding(reduction, cap):
    h, w, t = case(dtype=torch.float32)
    hb, wb = h.detach().bfloat16().requires_grad_(), w.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(hb, wb, t, reduction=reduction, logit_cap=cap, chunk=8)
    assert loss.dtype == torch.float32
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hb, wb))
    exact = whole(exact_h, exact_w, t, reduction, cap=cap)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(loss.sum(), (hb, wb))
    want = torch.autograd.grad(exact.sum(), (exact_h, exact_w))
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mean_over_many_tokens_survives_float16(reduction):
    """Its coefficients, 5e-5 here, would lose their digits before a loss scaler raises them."""
    n = 20_000
    h, w, t = case(n, 4, 5, dtype=torch.float32, ignored=0)
    half = h.detach().half().requires_grad_()
    loss = linear_cross_entropy(half, w.detach().half(), t, reduction=reduction)
    if reduction == "none":
        loss = loss.sum() / n
    (loss * 2**16).backward()
    exact = half.detach().double().requires_grad_()
    (whole(exact, w.detach().half().double(), t, "mean") * 2**16).backward()
    assert (half.grad.double() - exact.grad).norm() < 1e-3 * exact.grad.norm()


def test_autocast_rounds_operands_and_nothing_else():
    h, w, t = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, w, t, chunk=8)
        loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    rounded = linear_cross_entropy(h.detach().bfloat16(), w.detach().bfloat16(), t, chunk=8)
    assert loss.item() == rounded.item()


def test_peak_memory_is_one_piece_of_logits():
    """The largest tensor made is [chunk, V], beside the gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    h, w, t = case(n=512, d=4, v=300, dtype=torch.float32)
    for reduction in ("mean", "none"):
        with Largest() as seen:
            linear_cross_entropy(h, w, t, reduction=reduction, chunk=16).sum().backward()
        assert 16 * 300 <= seen.numel < 32 * 300


# torch's own compiler makes an instance of Function, against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_agrees():
    h, w, t = case()
    f = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    got = f(h, w, t, chunk=8)
    torch.testing.assert_close(got, whole(h, w, t, "mean"))
    got.backward()
    want = torch.autograd.grad(whole(h, w, t, "mean"), (h, w))
    torch.testing.assert_close((h.grad, w.grad), want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda h, w, t: (h, w, t.index_fill(0, torch.tensor(3), 13)), ValueError, "target 13 at"),
        (lambda h, w, t: (h, w, t.index_fill(0, torch.tensor(0), -1)), ValueError, "outside 0..12"),
        (lambda h, w, t: (h, w, t[1:]), ValueError, "targets must have shape"),
        (lambda h, w, t: (h, w[:, 1:], t), ValueError, "weight must have shape"),
        (lambda h, w, t: (h[None], w, t), ValueError, "h must have shape"),
        (lambda h, w, t: (h, w, t.int()), TypeError, "int64"),
        (lambda h, w, t: (h.long(), w, t), TypeError, "floating"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        linear_cross_entropy(*change(*case(ignored=0)))


def test_bad_options():
    h, w, t = case()
    for options, words in (
        ({"reduction": "max"}, "reduction"),
        ({"n_classes": 14}, "n_classes"),
        ({"chunk": 0}, "chunk"),
        ({"logit_cap": 0.0}, "logit_cap"),
        ({"logit_cap": math.inf}, "logit_cap"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(h, w, t, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gpu_half_precision(reduction):
    h, w, t = case(n=300, d=64, v=1000, dtype=torch.float32)
    hb, wb = (x.detach().cuda().bfloat16().requires_grad_() for x in (h, w))
    loss = linear_cross_entropy(hb, wb, t.cuda(), reduction=reduction, chunk=128)
    hd, wd = (x.detach().double().requires_grad_() for x in (hb, wb))
    exact = whole(hd, wd, t.cuda(), reduction)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(loss.sum(), (hb, wb))
    want = torch.autograd.grad(exact.sum(), (hd, wd))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()
    assert math.isfinite(loss.sum().item())
