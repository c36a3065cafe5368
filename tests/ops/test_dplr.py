"""The dplr and wkv ops by themselves: all shapes, extremes, known identities, bad input."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan import algebra
from longscan.ops.delta import delta
from longscan.ops.dplr import dplr, dplr_chunked, dplr_reference, dplr_segment
from longscan.ops.wkv import wkv, wkv_chunked, wkv_reference, wkv_segment

F64 = torch.float64
some = settings(max_examples=30, deadline=None, database=None, derandomize=True)


def draw_dplr(seed, *, rows, length, heads=2, d_key=4, d_value=3, strength=3.0):
    """Random inputs (as a dict) and a random state: unit keys read, twice their half put back."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    shape = (rows, length, heads, d_key)
    kappa, a = unit(normal(*shape)), torch.rand(shape, dtype=F64, generator=g)
    x = {
        "q": normal(*shape),
        "k": normal(*shape),
        "v": normal(rows, length, heads, d_value),
        "log_a": -strength * torch.rand(shape, dtype=F64, generator=g),
        "erase": -kappa,
        "write": kappa * a,
    }
    return x, normal(rows, heads, d_key, d_value)


def draw_wkv(seed, *, rows, length, d=5, strength=3.0, size=3.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    x = {
        "k": size * normal(rows, length, d),
        "v": normal(rows, length, d),
        "log_a": -strength * torch.rand(d, dtype=F64, generator=g),
        "bonus": normal(d),
    }
    return x, (torch.stack([normal(rows, d), 1 + normal(rows, d).square()], -1), normal(rows, d))


def flat(state):
    return state if isinstance(state, tuple) else (state,)


def compare(op, x, state, **more):
    """Outputs, final states and all gradients of the two backends."""
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
        s = tuple(t.clone().requires_grad_() for t in flat(state))
        o, out = op(
            **leaves, state=s if isinstance(state, tuple) else s[0], backend=backend,
            **{k: v for k, v in more.items() if k != "chunk" or backend == "torch"},
        )  # fmt: skip
        found = [o, *flat(out)]
        g = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in found)
        results.append([*found, *torch.autograd.grad(loss, [*leaves.values(), *s])])
    names = ["o", *["state"] * len(flat(state)), *x, *["dstate"] * len(flat(state))]
    for name, a, b in zip(names, *results, strict=True):
        if name == "log_a" and a.abs().max() < 1:
            # Behind closed gates the true gradient is the vanishing difference of terms of
            # order one; what can be asked for is their rounding.
            assert (a - b).abs().max() < TOLERANCE["float64"]
        else:
            assert_close(b, a, "float64", name)


@some
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    d_key=st.integers(1, 9),
    d_value=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
)
def test_any_shape(seed, chunk, **shape):
    x, state = draw_dplr(seed, **shape)
    compare(dplr, x, state, chunk=chunk)


@some
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    chunk=st.sampled_from([None, 1, 4, 64]),
)
def test_any_shape_of_wkv(seed, chunk, rows, length):
    x, state = draw_wkv(seed, rows=rows, length=length)
    compare(wkv, x, state, chunk=chunk)


@some
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    chunk=st.sampled_from([4, 16]),
)
def test_any_packing(seed, lengths, chunk):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    for op, draw in ((dplr, draw_dplr), (wkv, draw_wkv)):
        x, _ = draw(seed, rows=1, length=sum(lengths))
        _, state = draw(seed + 1, rows=len(lengths), length=1)
        compare(op, x, state, chunk=chunk, cu_seqlens=cu)


def test_gradcheck_of_the_definitions():
    """T2."""
    x, state = draw_dplr(0, rows=1, length=3, heads=1, d_key=2, d_value=2, strength=1.0)
    args = [t.clone().requires_grad_() for t in (*x.values(), state)]
    assert torch.autograd.gradcheck(lambda *a: dplr_reference(*a[:-1], state=a[-1]), args)
    x, state = draw_wkv(0, rows=1, length=3, d=2)
    args = [t.clone().requires_grad_() for t in (*x.values(), *state)]
    assert torch.autograd.gradcheck(
        lambda *a: [(o := wkv_reference(*a[:-2], state=a[-2:]))[0], *o[1]], args
    )


@pytest.mark.parametrize("strength", [0.0, 1e-6, 30.0, 1000.0])
def test_gates_near_zero_and_one(strength):
    """T4: no overflow however strong the gate, and no loss however weak (float64 and float32)."""
    for op, draw in ((dplr, draw_dplr), (wkv, draw_wkv)):
        x, state = draw(4, rows=1, length=100, strength=strength)
        compare(op, x, state, chunk=64)
        leaves = {k: t.float().requires_grad_() for k, t in x.items()}
        small = tuple(t.float() for t in flat(state))
        o, s = op(**leaves, state=small if op is wkv else small[0])
        want, _ = op(**x, state=state, backend="reference")
        assert error(o, want) < TOLERANCE["float32"]
        loss = o.sum() + sum(t.sum() for t in flat(s))
        for grad in torch.autograd.grad(loss, list(leaves.values())):
            assert torch.isfinite(grad).all()


def test_closed_gates_among_weak_ones():
    """log_a = -inf is a gate of 0; the weak gates around it keep their precision in float32."""
    x, state = draw_dplr(4, rows=1, length=90, strength=0.02)
    x["log_a"][:, 3::7] = -math.inf
    compare(dplr, x, state, chunk=64)
    want, s_want = dplr(**x, state=state, backend="reference")
    o, s = dplr(**{k: t.float() for k, t in x.items()}, state=state.float())
    assert error(o, want) < TOLERANCE["float32"]
    assert error(s, s_want) < TOLERANCE["float32"]


def test_weights_beyond_any_float():
    """Keys of +-1000: exp of them is no number, the average is one of the values' size."""
    x, _ = draw_wkv(4, rows=2, length=50, size=1000.0)
    want, _ = wkv(**x, backend="reference")
    assert_close(wkv(**x)[0], want, "float64", "o")
    leaves = {k: t.float().requires_grad_() for k, t in x.items()}
    o, (s, _) = wkv(**leaves)
    assert error(o, want) < TOLERANCE["float32"]
    assert s[..., 1].min() >= 1 - 1e-6, "the largest weight is 1 at the state's own scale"
    for grad in torch.autograd.grad(o.sum() + s.sum(), list(leaves.values())):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("gate", [0.0, 0.3, 3.0])
def test_delta_rule_is_a_special_case(gate):
    """(I - beta k k^T) diag(a) = diag(a) - beta k (a k)^T: erase = -a k, write = beta k."""
    x, state = draw_dplr(7, rows=2, length=75, strength=gate)
    q, v, log_a = x["q"], x["v"], x["log_a"]
    k = unit(x["k"])
    beta = 2 * torch.rand(*v.shape[:3], 1, dtype=F64)
    want, s_want = delta(q, k, v, beta.squeeze(-1), log_a, state=state)
    o, s = dplr(q, beta * k, v, log_a, -log_a.exp() * k, beta * k, state=state)
    assert_close(o, want, "float64", "o")
    assert_close(s, s_want, "float64", "state")


def test_erase_reads_before_the_decay():
    """One token by hand: S' = diag(a) S + w (e^T S) + k v^T."""
    x, state = draw_dplr(8, rows=1, length=1, heads=1)
    q, k, v, log_a, e, w = (t[0, 0, 0] for t in x.values())
    s = state[0, 0]
    want = torch.diag(log_a.exp()) @ s + torch.outer(w, e @ s) + torch.outer(k, v)
    for backend in ("reference", "torch"):
        o, got = dplr(**x, state=state, backend=backend)
        assert_close(got[0, 0], want, "float64", "state")
        assert_close(o[0, 0, 0], want.mT @ q, "float64", "o")


def test_segments_compose():
    x, state = draw_dplr(3, rows=2, length=50)
    parts = [{k: t[:, a:b] for k, t in x.items() if k != "q"} for a, b in ((0, 17), (17, 50))]
    joined = algebra.compose(dplr_segment(**parts[1]), dplr_segment(**parts[0]))
    _, want = dplr(**x, state=state)
    assert_close(joined(state), want, "float64", "dplr")
    x, state = draw_wkv(3, rows=2, length=50)
    k, v, log_a = x["k"], x["v"], x["log_a"]
    joined = algebra.compose(
        wkv_segment(k[:, 17:], v[:, 17:], log_a), wkv_segment(k[:, :17], v[:, :17], log_a)
    )
    _, want = wkv(**x, state=state)
    for a, b in zip(joined(state), want, strict=True):
        assert_close(a, b, "float64", "wkv")


def test_wkv_is_a_softmax_average():
    """o_t weighs v_i by softmax over i of k_i - (t - 1 - i) w, and of bonus + k_t."""
    x, _ = draw_wkv(6, rows=2, length=40)
    k, v, log_a, bonus = x.values()
    t = torch.arange(40)
    age = (t[:, None] - 1 - t).clamp(min=0)
    logits = k.unsqueeze(1) + age.unsqueeze(-1) * log_a
    own = (k + bonus).unsqueeze(1).expand_as(logits)
    logits = torch.where((t[:, None] == t).unsqueeze(-1), own, logits)
    logits = logits.masked_fill((t[:, None] < t).unsqueeze(-1), -math.inf)
    want = (logits.softmax(2) * v.unsqueeze(1)).sum(2)
    assert_close(wkv(**x)[0], want, "float64", "o")


def test_no_gradient_from_the_future_or_other_documents():
    """Exactly zero, not merely small."""
    cu = torch.tensor([0, 13, 50])
    for op, draw in ((dplr, draw_dplr), (wkv, draw_wkv)):
        x, _ = draw(2, rows=1, length=50)
        leaves = {k: t.requires_grad_() for k, t in x.items() if t.ndim > 1}
        o, _ = op(**x)
        for name, grad in zip(
            leaves, torch.autograd.grad(o[:, 20].sum(), list(leaves.values())), strict=True
        ):
            assert grad[:, 21:].abs().max() == 0
            assert (grad[:, :20].abs().max() > 0) == (name != "q")
        o, _ = op(**x, cu_seqlens=cu)
        for grad in torch.autograd.grad(o[:, 13:].sum(), list(leaves.values())):
            assert grad[:, :13].abs().max() == 0


def test_chunk_size_does_not_matter():
    x, state = draw_dplr(3, rows=1, length=100)
    want, _ = dplr_chunked(**x, state=state, chunk=64)
    for chunk in (1, 4, 32):
        got, _ = dplr_chunked(**x, state=state, chunk=chunk)
        assert_close(got, want, "float64", str(chunk))
    x, state = draw_wkv(3, rows=1, length=100)
    want, _ = wkv_chunked(**x, state=state)
    for chunk in (1, 4, 128):
        got, _ = wkv_chunked(**x, state=state, chunk=chunk)
        assert_close(got, want, "float64", str(chunk))


def test_autocast_does_not_touch_the_recurrence():
    for op, draw in ((dplr, draw_dplr), (wkv, draw_wkv)):
        x, _ = draw(3, rows=1, length=20)
        x = {k: t.float() for k, t in x.items()}
        want, s_want = op(**x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, s = op(**x)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(flat(s), flat(s_want), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 3)}, "q must have shape"),
        ({"k": torch.zeros(2, 5, 3, 4)}, "k must have shape"),
        ({"v": torch.zeros(2, 5, 3)}, "v must have shape"),
        ({"log_a": torch.zeros(2, 5, 2)}, "log_a must have shape"),
        ({"log_a": torch.full((2, 5, 2, 4), 0.5)}, "log decays <= 0"),
        ({"erase": torch.zeros(2, 5, 2, 5)}, "erase must have shape"),
        ({"write": torch.zeros(2, 4, 2, 4)}, "write must have shape"),
        ({"state": torch.zeros(1, 2, 4, 3)}, "state must have shape"),
        ({"q": torch.zeros(2, 5, 2, 4, dtype=torch.long)}, "floating point"),
        ({"state": None, "cu_seqlens": torch.tensor([0, 5])}, "batch must be 1"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    x, state = draw_dplr(3, rows=2, length=5)
    with pytest.raises((ValueError, TypeError), match=message):
        dplr(**{**x, "state": state, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 0, 5)}, "v must have shape"),
        ({"k": torch.zeros(2, 5, 4)}, "k must have shape"),
        ({"log_a": torch.zeros(2, 5, 5)}, "log_a must have shape"),
        ({"log_a": torch.ones(5)}, "log decays <= 0"),
        ({"bonus": torch.zeros(4)}, "bonus must have shape"),
        ({"state": (torch.zeros(1, 5, 2), torch.zeros(1, 5))}, "s must have shape"),
        ({"state": (torch.zeros(2, 5, 2), torch.zeros(2, 1))}, "m must have shape"),
    ],
)
def test_bad_input_of_wkv(change, message):
    x, state = draw_wkv(3, rows=2, length=5)
    with pytest.raises(ValueError, match=message):
        wkv(**{**x, "state": state, **change})
