"""Softmax attention: the fast form against the definition, caches, memory."""

import copy
import math

import pytest
import torch
from helpers import TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.ops._cache import Later
from longscan.ops.attention import (
    attention,
    attention_chunked,
    attention_reference,
    attention_step,
    attention_weights,
)
from longscan.state import State

F64 = torch.float64
D = 8
many = settings(max_examples=50, deadline=None, database=None, derandomize=True)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def qkv(rows, length, heads=2, groups=1, seed=0, dtype=F64):
    sizes = (heads, groups, groups)
    return [normal(rows, length, h, D, seed=3 * seed + i, dtype=dtype) for i, h in enumerate(sizes)]


def cache(ages, width, groups=1, seed=90):
    """A cache of rows of these ages, `width` slots wide."""
    length = torch.tensor(ages)
    valid = torch.arange(width) >= width - length[:, None].clamp(max=width)
    k, v = (
        normal(len(ages), width, groups, D, seed=seed + i) * valid[..., None, None] for i in (0, 1)
    )
    return State(k=k, v=v, length=length)


def packing(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def valid_slots(state):
    width = state["k"].shape[1]
    return (torch.arange(width) >= width - state["length"][:, None].clamp(max=width))[
        ..., None, None
    ]


def outcome(form, inputs, state, **more):
    """Output, state and the gradients of all inputs, the state's too."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    if state is not None:
        k, v = (state[n].clone().requires_grad_() for n in "kv")
        state = State(k=k, v=v, length=state["length"])
    o, after = form(*leaves, state=state, **more)
    leaves += [] if state is None else [state["k"], state["v"]]
    valid = valid_slots(after)
    loss = (o * normal(*o.shape, seed=7)).sum()
    for n in "kv":
        loss = loss + (after[n] * valid * normal(*after[n].shape, seed=8)).sum()
    return [o, *after.values(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def check(got, want, what):
    """As assert_close, for values made of numbers of order one that may cancel to zero."""
    assert got.shape == want.shape, what
    gap = (got - want).abs().max().item() if want.numel() else 0.0
    assert gap <= TOLERANCE["float64"] * max(1.0, want.abs().max().item() if gap else 0.0), what


def compare(inputs, state=None, **more):
    want = outcome(attention_reference, inputs, state, **more)
    got = outcome(attention_chunked, inputs, state, **more)
    names = ["o", "k", "v", "length", "dq", "dk", "dv", "dk_state", "dv_state"]
    assert len(got) == len(want) <= len(names)
    for name, a, b in zip(names, got, want, strict=False):
        check(a, b, name)
    with torch.inference_mode():  # another way to keep the cache
        o, after = attention_chunked(*inputs, state=state, **more)
    for name, a, b in zip(names, [o, *after.values()], want, strict=False):
        check(a, b, f"{name} without autograd")


WINDOWS = (None, 1, 7, 200)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 5, 71])
def test_equals_definition(length, heads, groups, window):
    compare(qkv(2, length, heads, groups), window=window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("ages", [(40, 60), (9, 30), (0, 1)])
def test_equals_definition_behind_a_cache(ages, length, window):
    width = min(max(ages), 30 if window is None else window - 1)
    compare(qkv(2, length, 4, 2), cache(ages, width, 2), window=window)


@many
@given(data=st.data())
def test_equals_definition_packed(data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    window = data.draw(st.sampled_from([None, 1, 2, 7, 40, 500]))
    state = None
    if data.draw(st.booleans()):
        ages = data.draw(st.lists(st.integers(0, 60), min_size=len(lengths), max_size=len(lengths)))
        state = cache(ages, min(max(ages), 500 if window is None else window - 1), 2)
    inputs = qkv(1, sum(lengths), 4, 2, seed=data.draw(st.integers(0, 99)))
    compare(inputs, state, window=window, cu_seqlens=packing(lengths))


def test_definition_by_hand():
    """Against the formula written with one T x T matrix."""
    q, k, v = qkv(1, 6, 1, 1)
    scores = q[0, :, 0] @ k[0, :, 0].T / math.sqrt(D)
    hidden = torch.ones(6, 6).triu(1).bool() | torch.ones(6, 6).tril(-3).bool()
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[0, :, 0]
    got, _ = attention_reference(q, k, v, window=3)
    assert_close(got[0, :, 0], want, "float64")
    weights = attention_weights(q, k, window=3)
    assert_close(weights[0, 0] @ v[0, :, 0], want, "float64")


def test_gradcheck_of_the_definition():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 1))
    past = [x.requires_grad_() for x in qkv(1, 3, 2, 1, seed=5)[1:]]

    def f(q, k, v, pk, pv):
        state = State(k=pk, v=pv, length=torch.tensor([2]))
        o, after = attention_reference(q, k, v, window=4, state=state)
        return o, after["k"], after["v"]

    assert torch.autograd.gradcheck(f, (q, k, v, *past))


@pytest.mark.parametrize("window", [None, 1, 6, 64])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_any_cut_equals_whole(mode, window):
    q, k, v = qkv(2, 150, 4, 2)
    with mode():
        want, final = attention(q, k, v, window=window)
        parts, state, a = [], None, 0
        for n in (1, 1, 70, 1, 3, 1, 1, 1, 71):
            part, state = attention(
                *(x[:, a : a + n] for x in (q, k, v)), window=window, state=state
            )
            parts.append(part)
            a += n
        assert_close(torch.cat(parts, 1), want, "float64")
        for name in final:
            assert_close(state[name], final[name], "float64", name)
        if window is not None:
            assert state["k"].shape[1] == window - 1


def test_step_is_attention_of_one_token():
    q, k, v = qkv(2, 9, 4, 2)
    want, _ = attention(q, k, v, window=5)
    _, state = attention(q[:, :3], k[:, :3], v[:, :3], window=5)
    for t in range(3, 9):
        o, state = attention_step(q[:, t], k[:, t], v[:, t], state, window=5)
        assert_close(o, want[:, t], "float64")


def test_documents_never_see_each_other():
    q, k, v = (x.requires_grad_() for x in qkv(1, 40, 2, 2))
    cu = packing([11, 3, 26])
    for window in (None, 4):
        o, state = attention(q, k, v, window=window, cu_seqlens=cu)
        for a, b in ((0, 11), (11, 14), (14, 40)):
            alone, _ = attention(q[:, a:b], k[:, a:b], v[:, a:b], window=window)
            assert_close(o[:, a:b], alone, "float64")
        gradients = torch.autograd.grad(o[:, 11:14].sum() + state["k"][1].sum(), (q, k, v))
        for g in gradients:
            assert g[:, 11:14].abs().max() > 0
            assert g[:, :11].abs().max() == 0
            assert g[:, 14:].abs().max() == 0


def test_states_stay_values_while_caches_grow():
    """Appending in place must not be seen by an older state, nor by a branch from it."""
    with torch.no_grad():
        _, root = attention(*qkv(2, 5))
        before = root.clone()
        _, left = attention(*qkv(2, 1, seed=1), state=root)
        left_before = left.clone()
        _, right = attention(*qkv(2, 1, seed=2), state=root)  # the place behind root is taken
        for i in range(100):
            _, right = attention(*qkv(2, 1, seed=3 + i), state=right)
        twin = copy.deepcopy(left)
        _, end = attention(*qkv(2, 1, seed=200), state=left)
        _, twin_end = attention(*qkv(2, 1, seed=201), state=twin)
        for now, then in ((root, before), (left, left_before)):
            assert all(torch.equal(now[n], then[n]) for n in then)
        assert torch.equal(end["k"][:, :6], twin_end["k"][:, :6])
        assert not torch.equal(end["k"][:, 6], twin_end["k"][:, 6])
        assert right["k"].shape[1] == 106
        assert torch.equal(right["k"][:, :5], before["k"])


def test_appending_does_not_copy_the_cache():
    with torch.no_grad():
        _, state = attention(*qkv(1, 100))
        places = set()
        for i in range(60):
            _, state = attention(*qkv(1, 1, seed=i), state=state)
            places.add(state["k"].untyped_storage().data_ptr())
        assert len(places) == 1
        _, state = attention(*qkv(1, 30), window=16)
        for i in range(200):
            _, state = attention(*qkv(1, 1, seed=i), window=16, state=state)
            assert state["k"].untyped_storage().nbytes() <= (16 + 64) * D * 8


def test_state_of_inference_mode_goes_on_elsewhere():
    with torch.inference_mode():
        _, state = attention(*qkv(1, 5))
        _, state = attention(*qkv(1, 1, seed=1), state=state)
    with torch.no_grad():
        o, state = attention(*qkv(1, 1, seed=2), state=state)
    with torch.inference_mode():
        _, state = attention(*qkv(1, 1, seed=3), state=state)
    q, k, v = (
        torch.cat(x, 1)
        for x in zip(qkv(1, 5), *(qkv(1, 1, seed=i) for i in (1, 2, 3)), strict=True)
    )
    assert_close(o, attention(q, k, v)[0][:, 6:7], "float64")
    assert_close(state["k"], k, "float64")


def test_rows_of_a_ragged_cache_can_be_chosen():
    q, k, v = qkv(1, 30)
    _, state = attention(q, k, v, cu_seqlens=packing([20, 3, 7]))
    probe = qkv(1, 2, seed=4)
    got, after = attention(*probe, state=state.select(1))
    alone = [torch.cat([x[:, 20:23], p], 1) for x, p in zip((q, k, v), probe, strict=True)]
    assert_close(got, attention(*alone)[0][:, 3:], "float64")
    assert after["k"].shape[1] == 5  # the padding of longer neighbours is dropped


def test_unread_states_are_never_made():
    q, k, v = (x.requires_grad_() for x in qkv(1, 50))
    _, state = attention(q, k, v, cu_seqlens=packing([40, *[1] * 10]))
    assert isinstance(state, Later)
    assert state._made is None
    leaves = pytree.tree_leaves(state)
    assert [tuple(x.shape) for x in leaves] == [(11, 40, 1, D), (11, 40, 1, D), (11,)]
    with torch.no_grad():
        _, again = attention(q, k, v, cu_seqlens=packing([40, *[1] * 10]))
        late = again["k"]
    assert not isinstance(again, Later)
    assert torch.equal(late, state["k"])
    _, state = attention(q, k, v, cu_seqlens=packing([40, 10]))
    with torch.no_grad():  # read where nothing is recorded, it still belongs to its graph
        keys = state["k"]
    assert torch.autograd.grad(keys.sum(), k)[0].eq(1).all()


class Largest(TorchDispatchMode):
    """Records the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("case", ["window", "packed", "window packed", "cache"])
def test_memory_grows_with_t(case):
    t, heads = 4096, 2
    inputs = [x.requires_grad_() for x in qkv(1, t, heads, heads, dtype=torch.float32)]
    window = 64 if "window" in case else None
    cu = packing([900, 1000, 1100, 96, 500, 500]) if "packed" in case else None
    state = None
    if case == "cache":
        _, state = attention(*(x[:, :100] for x in inputs))
    with Largest() as largest:
        o, _ = attention(*inputs, window=window, cu_seqlens=cu, state=state)
        o.sum().backward()
    # Four times a tensor of queries, and for a cache the mask of one block of them.
    bound = 4 * t * heads * D + (512 * (t + 100) if case == "cache" else 0)
    assert t * heads * D <= largest.numel <= bound < t * t / 4


def test_scale_and_dtypes():
    q, k, v = qkv(1, 12, 2, 1)
    want, _ = attention(q * 3, k, v, scale=0.1)
    assert_close(attention(q, k, v, scale=0.3)[0], want, "float64")
    low = [x.bfloat16() for x in (q, k, v)]
    o, state = attention(*low)
    assert o.dtype == torch.bfloat16
    assert state["k"].dtype == torch.float32
    exact, _ = attention(*(x.double() for x in low))
    assert (o.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_autocast_does_not_lower_precision():
    inputs = qkv(1, 20, dtype=torch.float32)
    want, _ = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention(*inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_float32_is_close_to_float64():
    inputs = qkv(2, 90, 4, 2)
    for window in (None, 9):
        want, _ = attention(*inputs, window=window)
        got, _ = attention(*(x.float() for x in inputs), window=window)
        assert_close(got, want, "float32")


@pytest.mark.parametrize("window", [None, 5])
def test_extremes_stay_finite(window):
    q, k, v = (x.requires_grad_() for x in qkv(1, 70, 2, 1, dtype=torch.float32))
    for factor in (0.0, 1e4, 1e15):
        o, _ = attention(q * factor, k * factor, v, window=window)
        assert o.isfinite().all()
        assert o.abs().max() <= v.abs().max() * 1.0001
    # Scores of some 1e3: nearly all weight on one key, and gradients are still right.
    o, _ = attention(q * 20, k * 20, v, window=window)
    got = torch.autograd.grad(o.sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o, _ = attention(exact[0] * 20, exact[1] * 20, exact[2], window=window)
    want = torch.autograd.grad(o.sum(), exact)
    assert all(x.isfinite().all() for x in got)
    assert_close(got[2], want[2], "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, D)}, "q must have shape"),
        ({"q": torch.zeros(1, 0, 4, D)}, "T >= 1"),
        ({"k": torch.zeros(1, 5, 2, D)}, "k must have shape"),
        ({"v": torch.zeros(1, 4, 1, D)}, "as k"),
        ({"q": torch.zeros(1, 4, 3, D)}, "multiple"),
        ({"window": 0}, "window must be at least 1"),
        ({"state": State(k=torch.zeros(2, 3, 2, D), v=torch.zeros(2, 3, 2, D),
                         length=torch.tensor([3, 3]))}, "state.k"),
        ({"state": State(k=torch.zeros(1, 3, 2, D), v=torch.zeros(1, 3, 2, D),
                         length=torch.tensor([3, 3]))}, "state.length"),
        ({"state": State(k=torch.zeros(1, 3, 2, D), v=torch.zeros(1, 2, 2, D),
                         length=torch.tensor([3]))}, "state.v"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens ends at 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "rise"),
        ({"backend": "trition"}, "unknown backend"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    good = {n: torch.zeros(1, 4, h, D) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    with pytest.raises(ValueError, match=message):
        attention(**{**good, **change})


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating"):
        attention(*(torch.zeros(1, 4, 2, D, dtype=torch.int64) for _ in range(3)))
