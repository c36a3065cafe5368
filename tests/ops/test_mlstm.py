"""The mlstm op: the authors' numbers, all shapes, extremes, shards of a sequence, bad input."""

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan import algebra
from longscan.algebra import EMPTY, SegmentMap, adjoint, compose, identity
from longscan.ops.decay import decay
from longscan.ops.mlstm import mlstm, mlstm_chunked, mlstm_reference, mlstm_segment

F64 = torch.float64
many = settings(max_examples=50, deadline=None, database=None, derandomize=True)
NAMES = ("q", "k", "v", "i", "f")


def draw(seed, *, rows, length, heads, d_key, d_value, states=None, strength=2.0):
    """Random inputs (as a dict) and a random state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    x = {
        "q": normal(rows, length, heads, d_key),
        "k": normal(rows, length, heads, d_key),
        "v": normal(rows, length, heads, d_value),
        "i": strength * normal(rows, length, heads),
        "f": strength * normal(rows, length, heads) + 1,
    }
    states = states or rows
    return x, (normal(states, heads, d_key, d_value + 1), 2 * normal(states, heads, 1))


def results(x, state, **more):
    """Outputs, final state and all gradients, the gradients of the final state included."""
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    start = tuple(t.clone().requires_grad_() for t in state)
    h, (s, m) = mlstm(**leaves, state=start, **more)
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, dtype=F64, generator=g)).sum() for t in (h, s, m))
    return [h, s, m, *torch.autograd.grad(loss, [*leaves.values(), *start])]


def compare(x, state, *, chunk=64, cu_seqlens=None, eps=1e-6):
    got = results(x, state, chunk=chunk, cu_seqlens=cu_seqlens, eps=eps)
    want = results(x, state, backend="reference", cu_seqlens=cu_seqlens, eps=eps)
    for name, a, b in zip(["h", "s", "m", *NAMES, "ds", "dm"], got, want, strict=True):
        if name in ("i", "f", "dm") and b.abs().max() < 1:
            # Behind closed gates the true gradient is the vanishing difference of terms of
            # order one; what can be asked for is their rounding.
            assert (a - b).abs().max() < TOLERANCE["float64"], name
        else:
            assert_close(a, b, "float64", name)


def heads_inside(t):
    """[B, H, T, ...] of the golden files <-> [B, T, H, ...]."""
    return t.transpose(1, 2)


def cell(name):
    """Inputs, with K^-0.5 in q, first state and tensors of a golden file of the cell."""
    file = golden(f"xlstm/{name}")
    x = {n: heads_inside(file[f"in.{n}"]).clone() for n in NAMES}
    x["q"] *= x["q"].shape[-1] ** -0.5
    state = None
    if "in.C0" in file:
        state = (torch.cat([file["in.C0"], file["in.n0"].unsqueeze(-1)], -1), file["in.m0"])
    return x, state, file


@pytest.mark.parametrize("name", ["mlstm_cell", "mlstm_cell_init"])
@pytest.mark.parametrize("chunk", [None, 1, 8, 64])
def test_cell_equals_authors(name, chunk):
    """Outputs, final states, and gradients as full autograd gives them, through m and eps too."""
    x, state, file = cell(name)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    how = {"backend": "reference"} if chunk is None else {"chunk": chunk}
    h, (s, m) = mlstm(**leaves, state=state, **how)
    assert_close(heads_inside(h), file["out.h"], "golden64", "h")
    assert_close(s[..., :-1], file["out.C"], "golden64", "C")
    assert_close(s[..., -1], file["out.n"], "golden64", "n")
    assert_close(m, file["out.m"], "golden64", "m")
    h.backward(heads_inside(file["in.dh"]))
    for n, t in leaves.items():
        want = file[f"grad.{n}"] * (x["q"].shape[-1] ** 0.5 if n == "q" else 1)
        assert_close(heads_inside(t.grad), want, "golden64", n)
        if n in "qkif":
            assert error(heads_inside(t.grad), file[f"grad_official_custom.{n}"]) > 1e-2, (
                "the authors' backward leaves out the denominator"
            )


def test_parallel_form_of_the_authors():
    """It has another m, which changes h through eps only."""
    x, _, file = cell("mlstm_cell")
    h, _ = mlstm(**x)
    assert_close(heads_inside(h), file["out.h_parallel"], "stored32", "h")


@pytest.mark.parametrize("normalised", [True, False])
def test_sigmoid_input_gates(normalised):
    """mLSTMsig is a plain decay with the input gate in the keys; mlstm gives it up to eps."""
    x, _, file = cell("mlstm_cell")
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    k = x["k"] * x["i"].sigmoid().unsqueeze(-1)
    o, _ = decay(x["q"], k, F.pad(x["v"], (0, 1), value=1.0), F.logsigmoid(x["f"]), chunk=8)
    h, qn = o[..., :-1], o[..., -1:]
    if not normalised:
        assert_close(heads_inside(h), file["out.h_siging_unnormalized"], "golden64", "h")
        return
    h = h / (qn.abs().clamp(min=1) + 1e-6)
    assert_close(heads_inside(h), file["out.h_siging_normalized"], "golden64", "h")
    h.backward(heads_inside(file["in.dh"]))
    for n, t in leaves.items():
        want = file[f"grad_siging_normalized.{n}"] * (2 if n == "q" else 1)
        assert_close(heads_inside(t.grad), want, "golden64", n)
    also, _ = mlstm(**{**x, "i": F.logsigmoid(x["i"])})
    assert_close(also, h, "stored32", "mlstm with logsigmoid(i)")


@many
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    d_key=st.integers(1, 9),
    d_value=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
    eps=st.sampled_from([0.0, 1e-6, 0.3]),
)
def test_any_shape(seed, chunk, eps, **shape):
    x, state = draw(seed, **shape)
    compare(x, state, chunk=chunk, eps=eps)


@many
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    chunk=st.sampled_from([4, 16]),
)
def test_any_packing(seed, lengths, chunk):
    x, state = draw(
        seed, rows=1, length=sum(lengths), heads=2, d_key=3, d_value=4, states=len(lengths)
    )
    compare(x, state, chunk=chunk, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


def test_gradcheck_of_the_definition():
    """T2, through eps and the state's scale as well."""
    x, state = draw(0, rows=1, length=3, heads=1, d_key=2, d_value=2, strength=1.0)

    def f(s, m, *tensors):
        h, (s, m) = mlstm_reference(*tensors, state=(s, m), eps=0.1)
        return h, s, m

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (*state, *x.values())])


def test_no_state_is_zeros_at_scale_one():
    x, _ = draw(3, rows=2, length=9, heads=2, d_key=3, d_value=4)
    zero = (torch.zeros(2, 2, 3, 5, dtype=F64), torch.zeros(2, 2, 1, dtype=F64))
    for backend in ("reference", "torch"):
        for length in (1, 9):
            part = {n: t[:, :length] for n, t in x.items()}
            h, (s, m) = mlstm(**part, backend=backend)
            h0, (s0, m0) = mlstm(**part, state=zero, backend=backend)
            assert torch.equal(h, h0)
            assert torch.equal(s, s0)
            assert torch.equal(m, m0)


def test_scale_of_a_state_is_free():
    """(s, m) and (s exp(c), m - c) are the same state, whatever c: h agrees but for eps."""
    x, (s, m) = draw(3, rows=2, length=30, heads=2, d_key=3, d_value=4)
    h, (s1, m1) = mlstm(**x, state=(s, m), eps=0.0)
    c = torch.tensor([5.0, -7.0], dtype=F64)[None, :, None]
    other, (s2, m2) = mlstm(**x, state=(s * c.exp().unsqueeze(-1), m - c), eps=0.0)
    assert_close(other, h, "float64", "h")
    assert_close(s2 * (m2 - m1).exp().unsqueeze(-1), s1, "float64", "s")


@pytest.mark.parametrize("gate", [-1e4, -80.0, 80.0, 1e4])
@pytest.mark.parametrize("forget", [-1e4, -30.0, 80.0])
def test_strong_gates(gate, forget):
    """T4: no overflow and finite gradients in float32; the right value while m has the digits."""
    x, state = draw(4, rows=1, length=100, heads=2, d_key=4, d_value=4, strength=1.0)
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    x["i"] += gate
    x["f"][:, ::3] += forget
    compare(x, state, chunk=32)
    leaves = {n: t.float().requires_grad_() for n, t in x.items()}
    start = tuple(t.float().requires_grad_() for t in state)
    h, (s, m) = mlstm(**leaves, state=start)
    if abs(gate) < 100:
        exact = {n: t.detach().double() for n, t in leaves.items()}
        want, _ = mlstm(**exact, state=tuple(t.double() for t in start), backend="reference")
        assert error(h, want) < TOLERANCE["float32"]
    grads = torch.autograd.grad(h.sum() + s.sum() + m.sum(), [*leaves.values(), *start])
    assert all(torch.isfinite(t).all() for t in (h, s, m, *grads))


def test_closed_gates_among_weak_ones():
    """Weak gates after closed ones keep their precision in float32."""
    x, state = draw(4, rows=1, length=90, heads=1, d_key=4, d_value=4, strength=0.3)
    x["f"][:, 3::7] = -1e5
    x = {n: t.float().double() for n, t in x.items()}
    compare(x, state)
    h, _ = mlstm(**{n: t.float() for n, t in x.items()}, state=tuple(t.float() for t in state))
    want, _ = mlstm(**x, state=state, backend="reference")
    assert error(h, want) < TOLERANCE["float32"]


@pytest.mark.parametrize("gates", ["scaled by 50", "+-80"])
def test_long_sequences_in_low_precision(gates):
    x, _ = draw(5, rows=1, length=8192, heads=1, d_key=8, d_value=8, strength=1.0)
    x["i"] = 50 * x["i"] if gates == "scaled by 50" else 80 * x["i"].sign()
    low = {n: t.to(torch.bfloat16 if n in "qkv" else torch.float32) for n, t in x.items()}
    leaves = {n: t.clone().requires_grad_() for n, t in low.items()}
    h, (s, m) = mlstm(**leaves)
    assert h.dtype == torch.bfloat16
    assert s.dtype == m.dtype == torch.float32
    grads = torch.autograd.grad(h.float().sum() + s.sum() + m.sum(), list(leaves.values()))
    assert all(torch.isfinite(t).all() for t in (h, s, m, *grads))
    with torch.no_grad():
        want, _ = mlstm_reference(*(t.double() for t in low.values()))
    assert_close(h, want, "bfloat16", "h")


def test_autocast_does_not_touch_the_recurrence():
    x, state = draw(3, rows=1, length=20, heads=1, d_key=4, d_value=3)
    x, state = {n: t.float() for n, t in x.items()}, tuple(t.float() for t in state)
    want = mlstm(**x, state=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mlstm(**x, state=state)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1][0], want[1][0])


def test_tokens_that_are_not_there_leave_no_trace():
    """A chunk that is not full: the rest of it neither decays, nor writes, nor moves m."""
    x, _ = draw(3, rows=1, length=5, heads=1, d_key=4, d_value=3)
    x["i"] -= 50
    _, (s, m) = mlstm_chunked(**x, chunk=64)
    want_s, want_m = mlstm_reference(**x)[1]
    assert_close(s, want_s, "float64", "s")
    assert_close(m, want_m, "float64", "m")


def test_rows_do_not_touch_each_other():
    """Not even by a NaN."""
    x, state = draw(3, rows=2, length=70, heads=2, d_key=4, d_value=3)
    h, _ = mlstm(**x, state=state)
    x["i"][0] = float("nan")
    spoilt, (s, m) = mlstm(**x, state=state)
    assert torch.equal(spoilt[1], h[1])
    assert torch.isfinite(s[1]).all()
    assert torch.isfinite(m[1]).all()


# --- Segment maps -------------------------------------------------------------------------------


def scaled(n=1):
    a, m = -torch.rand(n, 3, 1, dtype=F64), 4 * torch.randn(n, 3, 1, dtype=F64)
    return SegmentMap("diagonal", a, torch.randn(n, 3, 4, 5, dtype=F64), m)


def true(state):
    return state[0] * state[1].exp().unsqueeze(-1)


def test_laws_of_scaled_maps():
    f, g, h = (scaled() for _ in range(3))
    s = (torch.randn(1, 3, 4, 5, dtype=F64), torch.randn(1, 3, 1, dtype=F64))
    plain = f.a.exp().unsqueeze(-1) * true(s) + true(f.offset)
    assert_close(true(f(s)), plain, "float64", "the pair stands for s exp(m)")
    assert_close(true(compose(g, f)(s)), true(g(f(s))), "float64", "composition")
    left, right = compose(compose(h, g), f), compose(h, compose(g, f))
    assert_close(true(left(s)), true(right(s)), "float64", "associativity")
    one = identity(f)
    for got in (compose(one, f)(s), compose(f, one)(s)):
        for a, b in zip(got, f(s), strict=True):
            assert_close(a, b, "float64", "neutral")
    for a, b in zip(one(s), s, strict=True):
        assert torch.equal(a, b)


def test_adjoint_of_a_scaled_map():
    """<A x, y> = <x, A* y> for true states x and gradients y, each a pair with its scale."""
    f = scaled()
    x, m = torch.randn(1, 3, 4, 5, dtype=F64), torch.randn(1, 3, 1, dtype=F64)
    _, m_out = f((x, m))
    y = torch.randn(1, 3, 4, 5, dtype=F64)
    back, scale = adjoint(f, torch.zeros_like(x), -m)((y, -m_out))
    assert_close(scale, -m, "float64", "the gradient is scaled as the state that enters")
    moved = f.transition((x, m))
    assert_close((true(moved) * true((y, -m_out))).sum(), (x * back).sum(), "float64", "transpose")
    with pytest.raises(ValueError, match="adjoint of a scaled map"):
        adjoint(f, x)
    with pytest.raises(ValueError, match="a scaled map with a diagonal map"):
        compose(SegmentMap("diagonal", f.a, f.u), f)
    with pytest.raises(ValueError, match="only diagonal"):
        SegmentMap("identity", None, f.u, f.m)


def test_scan_of_ragged_scaled_rows():
    maps = scaled(6)
    state = (torch.randn(3, 3, 4, 5, dtype=F64), torch.randn(3, 3, 1, dtype=F64))
    entering, final = algebra.scan(maps, state, [3, 2, 1])
    rows = [(state[0][r], state[1][r]) for r in range(3)]
    first = [maps[r](rows[r]) for r in range(3)]
    second = [maps[3](first[0]), maps[4](first[1])]
    for part in (0, 1):
        want = torch.stack([x[part] for x in (*rows, *first[:2], second[0])])
        assert torch.equal(entering[part], want)
        want = torch.stack([x[part] for x in (maps[5](second[0]), second[1], first[2])])
        assert torch.equal(final[part], want)


def test_four_shards():
    """Maps, states and gradients of four shards, against a recurrence over the whole."""
    file = golden("seq_parallel/mlstm")
    x = {n: file[f"in.{n}"].clone().requires_grad_() for n in NAMES}
    scale = x["q"].shape[-1] ** -0.5
    start = (file["in.Cn0"].clone().requires_grad_(), file["in.m0"].unsqueeze(-1))
    h, (s, m) = mlstm(x["q"] * scale, *list(x.values())[1:], state=start, eps=0.0)
    assert_close(h, file["out.o"], "golden64", "h")
    assert_close(s, file["out.Cn_final"], "golden64", "final s")
    assert_close(m.squeeze(-1), file["out.m_final"], "golden64", "final m")
    # These gradients hold every m constant, that of the final state too.
    constant = s * (m - m.detach()).exp().unsqueeze(-1)
    loss = (h * file["in.do"]).sum() + (constant * file["in.dCn_final"]).sum()
    grads = torch.autograd.grad(loss, [*x.values(), start[0]])
    for n, grad in zip([*NAMES, "Cn0"], grads, strict=True):
        assert_close(grad, file[f"grad.{n}"], "golden64", n)

    state, at, maps, scales = start, 0, [], []
    for r, n in enumerate(file["lens"].tolist()):
        part = slice(at, at + n)
        f = mlstm_segment(*(x[name][:, part] for name in NAMES[1:]))
        assert_close(f.a.squeeze(-1), file[f"rank{r}.F"], "golden64", f"decay of shard {r}")
        assert_close(f.m.squeeze(-1), file[f"rank{r}.m_loc"], "golden64", f"scale of shard {r}")
        assert_close(f.u, file[f"rank{r}.Cn_loc"], "golden64", f"U of shard {r}")
        for side in ("in", "out"):
            assert_close(state[0], file[f"rank{r}.Cn_{side}"], "golden64", f"s {side} {r}")
            assert_close(state[1].squeeze(-1), file[f"rank{r}.m_{side}"], "golden64", f"m {side}")
            scales.append(state[1])
            state = f(state) if side == "in" else state
        maps.append(f)
        at += n
    whole = compose(compose(maps[3], maps[2]), compose(maps[1], maps[0]))
    assert_close(whole(start)[0], file["out.Cn_final"], "golden64", "tree of compositions")
    grad = (file["in.dCn_final"], -scales[-1])
    for r in reversed(range(4)):
        assert_close(grad[0], file[f"rank{r}.dCn_out"], "golden64", f"gradient leaving shard {r}")
        grad = adjoint(maps[r], file[f"rank{r}.dCn_loc"], -scales[2 * r])(grad)
        assert_close(grad[0], file[f"rank{r}.dCn_in"], "golden64", f"gradient entering shard {r}")


def test_a_closed_map_forgets_everything():
    """A sequence that starts inside a stretch: log decay EMPTY, and nothing that enters leaves."""
    f = scaled()
    closed = SegmentMap("diagonal", torch.full_like(f.a, EMPTY), f.u, f.m)
    s = (torch.randn(1, 3, 4, 5, dtype=F64), torch.randn(1, 3, 1, dtype=F64))
    for a, b in zip(closed(s), f.offset, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 3)}, "k must have shape"),
        ({"q": torch.zeros(2, 5, 1, 4), "k": torch.zeros(2, 5, 1, 4)}, "k must have shape"),
        ({"v": torch.zeros(2, 5, 3)}, "v must have shape"),
        ({"i": torch.zeros(2, 5, 3)}, "i must have shape"),
        ({"f": torch.zeros(2, 4, 2)}, "f must have shape"),
        ({"f": torch.zeros(2, 5, 2, dtype=torch.long)}, "floating point"),
        ({"state": torch.zeros(2, 2, 4, 4)}, "the pair"),
        ({"state": (torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 1))}, "s must have shape"),
        ({"state": (torch.zeros(2, 2, 4, 4), torch.zeros(2, 2))}, "m must have shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch must be 1"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    x, _ = draw(3, rows=2, length=5, heads=2, d_key=4, d_value=3)
    with pytest.raises((ValueError, TypeError), match=message):
        mlstm(**{**x, **change})
