"""The slots op by itself: all shapes, packings, extremes, known identities, bad input."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan.algebra import compose
from longscan.ops import _slots
from longscan.ops.decay import decay
from longscan.ops.slots import slots, slots_read, slots_reference, slots_segment

F64 = torch.float64
many = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def draw(seed, *, rows, length, heads, d_key, d_value, n_slots, bank=True, strength=2.0):
    """Random inputs (as a dict) and a random state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    x = {
        "q": normal(rows, length, heads, d_key),
        "k": normal(rows, length, heads, d_key),
        "v": normal(rows, length, heads, d_value),
        "w": normal(rows, length, heads, n_slots),
        "log_a": -strength * torch.rand(rows, length, heads, n_slots, dtype=F64, generator=g),
    }
    if bank:
        x["bank"] = normal(heads, n_slots, d_key + d_value)
    return x, normal(rows, heads, n_slots, d_key + d_value)


def compare(x, state, *, chunk=64, cu_seqlens=None):
    """Outputs, final states and all gradients of the two backends."""
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
        s = state.clone().requires_grad_()
        o, out = slots(**leaves, state=s, backend=backend, chunk=chunk, cu_seqlens=cu_seqlens)
        g = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in (o, out))
        results.append([o, out, *torch.autograd.grad(loss, [*leaves.values(), s])])
    for name, a, b in zip(["o", "state", *x, "dstate"], *results, strict=True):
        if name == "log_a" and a.abs().max() < 1:
            # Behind closed gates the true gradient is the vanishing difference of terms of
            # order one; what can be asked for is their rounding.
            assert (a - b).abs().max() < TOLERANCE["float64"]
        elif name == "q" and x["w"].shape[-1] == 1:
            assert b.abs().max() < TOLERANCE["float64"], "one slot is read whatever q is"
        else:
            assert_close(b, a, "float64", name)


@many
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(2, 70),
    heads=st.integers(1, 3),
    d_key=st.integers(1, 7),
    d_value=st.integers(1, 7),
    n_slots=st.integers(2, 7),
    bank=st.booleans(),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
)
def test_any_shape(seed, chunk, **shape):
    compare(*draw(seed, **shape), chunk=chunk)


@many
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    bank=st.booleans(),
    chunk=st.sampled_from([4, 16]),
)
def test_any_packing(seed, lengths, bank, chunk):
    x, _ = draw(
        seed, rows=1, length=sum(lengths), heads=2, d_key=3, d_value=4, n_slots=5, bank=bank
    )
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(len(lengths), 2, 5, 7, dtype=F64, generator=g)
    compare(x, state, chunk=chunk, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


def test_one_slot_is_a_decayed_sum():
    """The softmax of one slot is 1: q and k do not matter, and the read is `decay`'s."""
    x, state = draw(0, rows=2, length=30, heads=2, d_key=3, d_value=4, n_slots=1, bank=False)
    compare(x, state, chunk=16)
    o, s = slots(**x, state=state)
    one = torch.ones_like(x["w"])
    want, s_want = decay(one, x["w"], x["v"], x["log_a"], state=state[..., 3:].contiguous())
    assert_close(o, want, "float64", "o")
    assert_close(s[..., 3:], s_want, "float64", "state")


def test_one_token_from_nothing():
    """T = 1 without a state: all slots hold w times the token."""
    x, _ = draw(1, rows=2, length=1, heads=1, d_key=3, d_value=4, n_slots=5, bank=False)
    o, s = slots(**x)
    w, k, v = x["w"].unsqueeze(-1), x["k"].unsqueeze(-2), x["v"].unsqueeze(-2)
    assert_close(s, (w * torch.cat([k, v], -1)).squeeze(1), "float64", "state")
    scores = x["w"] * (x["q"] * x["k"]).sum(-1, keepdim=True)
    want = (scores.softmax(-1).unsqueeze(-1) * w * v).sum(-2)
    assert_close(o, want, "float64", "o")


def test_a_slot_per_token_is_softmax_attention():
    """ABC's limit: token t writes slot t, nothing is forgotten. Slots not yet written hold zeros
    and take part in the softmax, so only the last token sees softmax attention proper."""
    t = 20
    x, _ = draw(2, rows=2, length=t, heads=2, d_key=4, d_value=4, n_slots=t, bank=False)
    x["w"] = torch.eye(t, dtype=F64)[:, None].expand(2, t, 2, t).contiguous()
    x["log_a"] = torch.zeros_like(x["w"])
    o, _ = slots(**x, chunk=8)
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    want = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
    assert_close(o[:, -1], want[:, -1], "float64", "the last token")


def test_closed_gates_forget_all_but_the_token():
    x, state = draw(3, rows=1, length=40, heads=1, d_key=3, d_value=2, n_slots=4, bank=False)
    x["log_a"] = torch.full_like(x["log_a"], -math.inf)
    compare(x, state, chunk=16)
    o, _ = slots(**x, state=state, chunk=16)
    alone, _ = slots(**{n: t.transpose(0, 1) for n, t in x.items()})
    assert_close(o, alone.transpose(0, 1), "float64", "o")


def test_a_bank_that_nothing_writes_is_read_alone():
    x, _ = draw(4, rows=2, length=40, heads=2, d_key=3, d_value=2, n_slots=4)
    x["w"] = torch.zeros_like(x["w"])
    o, s = slots(**x, chunk=16)
    keys, values = x["bank"].split([3, 2], -1)
    assert_close(o, slots_read(x["q"], keys, values), "float64", "o")
    assert s.abs().max() == 0


def test_a_bank_is_a_state_that_nothing_forgets():
    x, state = draw(5, rows=2, length=40, heads=2, d_key=3, d_value=2, n_slots=4)
    x["log_a"] = torch.zeros_like(x["log_a"])
    o, s = slots(**x, state=state, chunk=16)
    bank = x.pop("bank")
    want, s_want = slots(**x, state=state + bank, chunk=16)
    assert_close(o, want, "float64", "o")
    assert_close(s + bank, s_want, "float64", "state")


def test_segment_maps():
    """One map for the keys and the values of the slots; two compose to that of both stretches."""
    x, state = draw(6, rows=2, length=50, heads=2, d_key=3, d_value=2, n_slots=4, bank=False)
    parts = [{n: t[:, at] for n, t in x.items() if n != "q"} for at in (slice(20), slice(20, 50))]
    first, second = (slots_segment(**p) for p in parts)
    _, want = slots(**x, state=state)
    assert_close(second(first(state)), want, "float64", "one after the other")
    assert_close(compose(second, first)(state), want, "float64", "composed")


@pytest.mark.parametrize("bank", [False, True])
def test_gradcheck_of_the_definition(bank):
    """T2."""
    x, state = draw(
        7, rows=1, length=3, heads=1, d_key=2, d_value=2, n_slots=2, bank=bank, strength=1.0
    )
    names = list(x)

    def f(state, *tensors):
        return slots_reference(**dict(zip(names, tensors, strict=True)), state=state)

    args = [state, *x.values()]
    assert torch.autograd.gradcheck(f, [a.clone().requires_grad_() for a in args])


@pytest.mark.parametrize("strength", [0.0, 1e-6, 30.0, 1000.0])
def test_gates_near_zero_and_one(strength):
    """T4: no overflow however strong the gate, and no loss however weak (float64 and float32)."""
    x, state = draw(
        8, rows=1, length=100, heads=1, d_key=4, d_value=4, n_slots=4, strength=strength
    )
    x["w"] = -torch.expm1(x["log_a"])
    compare(x, state)
    leaves = {k: t.float().requires_grad_() for k, t in x.items()}
    o, s = slots(**leaves, state=state.float())
    want, _ = slots(**x, state=state, backend="reference")
    assert error(o, want) < TOLERANCE["float32"]
    for grad in torch.autograd.grad(o.sum() + s.sum(), list(leaves.values())):
        assert torch.isfinite(grad).all()


def test_closed_gates_among_weak_ones():
    """log_a = -inf is a gate of 0; the weak gates around it keep their precision in float32."""
    x, state = draw(9, rows=1, length=90, heads=1, d_key=4, d_value=4, n_slots=4, strength=0.02)
    x["log_a"][:, 3::7] = -math.inf
    compare(x, state)
    want, s_want = slots(**x, state=state, backend="reference")
    o, s = slots(**{k: t.float() for k, t in x.items()}, state=state.float())
    assert error(o, want) < TOLERANCE["float32"]
    assert error(s, s_want) < TOLERANCE["float32"]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_extreme_inputs_stay_finite(scale):
    x, _ = draw(10, rows=1, length=70, heads=1, d_key=4, d_value=4, n_slots=4)
    leaves = {k: t.float() * (1 if k == "log_a" else scale) for k, t in x.items()}
    leaves = {k: t.requires_grad_() for k, t in leaves.items()}
    o, s = slots(**leaves)
    for t in (o, s, *torch.autograd.grad(o.sum() + s.sum(), list(leaves.values()))):
        assert torch.isfinite(t).all()


def test_the_future_is_not_seen():
    x, _ = draw(11, rows=1, length=50, heads=1, d_key=3, d_value=3, n_slots=4)
    leaves = [t.requires_grad_() for t in x.values()]
    o, _ = slots(**x, chunk=32)
    for name, g in zip(x, torch.autograd.grad(o[:, 20].sum(), leaves), strict=True):
        if name != "bank":
            assert g[:, 21:].abs().max() == 0, name
            assert g[:, 20].abs().max() > 0, name


def test_blocks_do_not_change_the_result(monkeypatch):
    """Whether chunks and tokens are handled at once or one after the other."""
    x, state = draw(12, rows=2, length=50, heads=2, d_key=3, d_value=3, n_slots=4)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 50, 2, 3, dtype=F64, generator=g)
    results = []
    for size in (1, 100, 1 << 18):
        monkeypatch.setitem(_slots._BLOCK, "cpu", size)
        leaves = [t.clone().requires_grad_() for t in (*x.values(), q)]
        bank = leaves[-2]
        o, s = slots(*leaves[:-1], state=state, chunk=8)
        read = slots_read(leaves[-1], bank[..., :3], bank[..., 3:])
        loss = o.square().sum() + s.square().sum() + read.square().sum()
        results.append([o, s, read, *torch.autograd.grad(loss, leaves)])
    for other in results[:-1]:
        for i, (a, b) in enumerate(zip(other, results[-1], strict=True)):
            assert_close(a, b, "float64", f"tensor {i}")


@pytest.mark.parametrize("shape", [(2, 9, 1, 5, 3, 4), (1, 1, 3, 2, 7, 1), (2, 300, 2, 4, 4, 6)])
def test_read_of_a_fixed_bank(shape):
    batch, length, heads, n_slots, d_key, d_value = shape
    g = torch.Generator().manual_seed(0)
    sizes = [(batch, length, heads, d_key), (heads, n_slots, d_key), (heads, n_slots, d_value)]
    x = [torch.randn(s, dtype=F64, generator=g).requires_grad_() for s in sizes]
    results = []
    for backend in ("reference", "torch"):
        o = slots_read(*x, backend=backend)
        cot = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        results.append([o, *torch.autograd.grad((o * cot).sum(), x)])
    for name, a, b in zip(["o", "q", "keys", "values"], *results, strict=True):
        assert_close(b, a, "float64", name)


def test_read_keeps_no_scores():
    """What autograd holds on to is the inputs, not [T, M] numbers."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 512, 1, 8, generator=g).requires_grad_()
    bank = torch.randn(1, 4096, 8, generator=g).requires_grad_()
    held = []

    def pack(x):
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        slots_read(q, bank, bank)
    assert 0 < sum(held) <= q.numel() + 2 * bank.numel()


def test_low_precision_inputs():
    x, _ = draw(13, rows=1, length=40, heads=1, d_key=4, d_value=4, n_slots=4)
    low = {k: t.bfloat16() for k, t in x.items()}
    o, s = slots(**low)
    assert o.dtype == torch.bfloat16
    assert s.dtype == torch.float32
    want, s_want = slots(**{k: t.double() for k, t in low.items()})
    assert_close(o, want, "bfloat16", "o")
    assert_close(s, s_want, "float32", "state")
    read = slots_read(low["q"], low["bank"][..., :4], low["bank"][..., 4:])
    assert read.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": torch.zeros(2, 8, 1, 4)}, ValueError, "k must have shape"),
        ({"q": torch.zeros(2, 8, 2, 3), "k": torch.zeros(2, 8, 2, 3)}, ValueError, "q must have"),
        ({"w": torch.zeros(2, 7, 1, 5)}, ValueError, "w must have shape"),
        ({"log_a": torch.zeros(2, 8, 1, 4)}, ValueError, "log_a must have shape"),
        ({"log_a": torch.ones(2, 8, 1, 5)}, ValueError, "log decays <= 0"),
        ({"w": torch.zeros(2, 8, 1, 5, dtype=torch.int64)}, TypeError, "floating"),
        ({"bank": torch.zeros(1, 5, 6)}, ValueError, "bank must have shape"),
        ({"state": torch.zeros(3, 1, 5, 7)}, ValueError, "state must have shape"),
        ({"chunk": 48}, ValueError, "power of two"),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "batch must be 1"),
    ],
)
def test_bad_input_is_refused(change, error, match):
    x = {
        "q": torch.zeros(2, 8, 1, 3),
        "k": torch.zeros(2, 8, 1, 3),
        "v": torch.zeros(2, 8, 1, 4),
        "w": torch.zeros(2, 8, 1, 5),
        "log_a": torch.zeros(2, 8, 1, 5),
    }
    with pytest.raises(error, match=match):
        slots(**{**x, **change})


def test_bad_banks_are_refused():
    q = torch.zeros(2, 8, 2, 3)
    with pytest.raises(ValueError, match="keys must have shape"):
        slots_read(q, torch.zeros(1, 5, 3), torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="values must have shape"):
        slots_read(q, torch.zeros(2, 5, 3), torch.zeros(2, 4, 3))
