"""Mamba-3: its op and layer against the authors' vectors and against the definition."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longscan.mixers.mamba3 import Mamba3
from longscan.ops import trapezoid as module
from longscan.ops.decay import decay
from longscan.ops.trapezoid import rotate, trapezoid, trapezoid_chunked, trapezoid_reference, wrap
from longscan.state import State

F64 = torch.float64
TOKENS = ("q", "k", "v", "log_a", "dt", "lam", "rate")


# --- the authors' vectors -----------------------------------------------------------------------


def _case(name, case):
    tensors = golden(f"mamba/{name}").items()
    return {k[len(case) + 1 :]: v.double() for k, v in tensors if k.startswith(case + "/")}


def _authors_call(f, backend=None):
    """The op as the authors call it, from a case's inputs (as leaves): y and the final state."""
    ranked = "MIMO_V" in f
    q, k = (f[x].transpose(2, 3) if ranked else f[x].unsqueeze(3) for x in "QK")
    v, bias = f["V"].unsqueeze(3), [f["Q_bias"], f["K_bias"]]
    if ranked:
        v = v * f["MIMO_V"]
    else:
        bias = [b.unsqueeze(1) for b in bias]
    state = None
    if "init_ssm_state" in f:
        parts = {x: f[f"init_{x}_state"] for x in "kv"}
        state = State(
            angle=f["init_angle_state"],
            s=f["init_ssm_state"].mT,
            **{x: t if ranked else t.unsqueeze(2) for x, t in parts.items()},
        )
    rate = math.pi * f["Angles"].tanh()
    gates = f["ADT"].mT, f["DT"].mT, f["Trap"].mT.sigmoid()
    y, state = trapezoid(q, k, v, *gates, rate, *bias, state=state, backend=backend)
    y = y + v * f["D"].view(-1, 1, 1)
    if "Z" in f:
        z = f["Z"].unsqueeze(3)
        y = y * F.silu(z * f["MIMO_Z"] if ranked else z)
    return (y * f["MIMO_O"]).sum(3) if ranked else y.squeeze(3), state


@pytest.mark.parametrize(
    ("name", "case"), [("mamba3_siso", "base"), ("mamba3_siso", "init"), ("mamba3_mimo", "r2")]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_op_equals_authors(name, case, backend):
    f = _case(name, case)
    gradients = {k[5:]: v for k, v in f.items() if k.startswith("grad_")}
    for k in gradients:
        f[k].requires_grad_()
    y, state = _authors_call(f, backend)
    assert_close(y, f["y"], "golden32", "y")
    gap = wrap(state["angle"] - f["final_angle_state"])  # theirs may lie whole turns away
    assert gap.abs().max() < TOLERANCE["golden32"]
    assert_close(state["s"].mT, f["final_ssm_state"], "golden32", "s")
    for x in "kv":
        last = state[x] if name == "mamba3_mimo" else state[x].squeeze(2)
        assert_close(last, f[f"final_{x}_state"], "golden32", x)
    got = torch.autograd.grad((y * f["dy"]).sum(), [f[k] for k in gradients])
    for (k, want), ours in zip(gradients.items(), got, strict=True):
        assert_close(ours, want, "golden32", k)


def test_layer_equals_authors():
    f = _case("mamba3_siso", "layer")
    layer = Mamba3(16, d_state=8, d_head=8).double()
    layer.load_state_dict({k[6:]: v for k, v in f.items() if k.startswith("param/")})
    x = f["x"].requires_grad_()
    y, _ = layer(x)
    assert_close(y, f["y"], "golden32", "y")
    (y * f["dy"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, f["dx"], "golden32", "dx")
    for name, p in layer.named_parameters():
        assert p.grad is not None
        assert_close(p.grad, f[f"grad/{name}"], "golden32", name)


# --- the layer by its definition ----------------------------------------------------------------

OPTIONS = {
    "groups": {"n_groups": 2},
    "all turn, halves": {"rope_fraction": 1.0, "rotation": "halves"},
    "fla": {"a_activation": "softplus", "a_floor": 0.8},
    "norm": {"norm": True},
    "ranks": {"mimo_rank": 3, "n_groups": 2},
    "ranks, norm, neighbours": {"mimo_rank": 2, "norm": True, "rotation": "neighbours"},
    "ranks, all turn": {"mimo_rank": 2, "rope_fraction": 1.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def _layer(options, d_model=16):
    torch.manual_seed(0)
    m = Mamba3(d_model, d_state=8, d_head=8, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


def _definition(m, x, floor, softplus):
    """The layer as the paper writes it: one token, head and rank at a time, turns as matrices."""
    e, n, h, r, g = 2 * m.d_model, m.d_state, m.n_heads, m.ranks, m.n_groups
    sizes = [e, e, r * g * n, r * g * n, h, h, h, m.n_angles]
    y = torch.zeros(*x.shape[:2], h, m.d_head, dtype=F64)
    for row in range(len(x)):
        theta = torch.zeros(h, m.n_angles, dtype=F64)
        state = torch.zeros(h, m.d_head, n, dtype=F64)
        before = [[None] * r for _ in range(h)]
        for t in range(x.shape[1]):
            z, u, b, c, dt, a, lam, angle = (m.in_proj.weight @ x[row, t]).split(sizes)
            dt, lam = torch.log1p((dt + m.dt_bias).exp()), 1 / (1 + (-lam).exp())
            a = -(
                F.softplus(a)
                if softplus
                else torch.where(a >= 0, 1 + a, 1 / (1 - a.abs() * a.sign()))
            )
            a = a.clamp(max=-floor)
            alpha = (dt * a).exp()
            theta = theta + dt[:, None] * math.pi * angle.tanh()
            for j in range(h):
                turn = _turn_matrix(theta[j], n, m.rotation)
                new = alpha[j] * state[j]
                q, v = [], []
                for i in range(r):
                    kv = []
                    for raw, norm, bias in ((b, m.B_norm, m.B_bias), (c, m.C_norm, m.C_bias)):
                        w = raw.view(r, g, n)[i, j // (h // g)]
                        w = w / (w.square().mean() + 1e-5).sqrt() * norm.weight + bias[j, i]
                        kv.append(turn @ w)
                    q.append(kv[1])
                    v.append(u.view(h, -1)[j] * (1 if m.mimo_x is None else m.mimo_x[j, i]))
                    write = torch.outer(v[i], kv[0])
                    new = new + lam[j] * dt[j] * write
                    if before[j][i] is not None:
                        new = new + (1 - lam[j]) * dt[j] * alpha[j] * before[j][i]
                    before[j][i] = write
                state = torch.cat([state[:j], new[None], state[j + 1 :]])
                for i in range(r):
                    o = new @ q[i] + m.D[j] * v[i]
                    if m.norm is not None:
                        weight = m.norm.weight.view(h, -1)[j]
                        o = o / (o.square().mean() + 1e-5).sqrt() * weight
                    zi = z.view(h, -1)[j] * (1 if m.mimo_z is None else m.mimo_z[j, i])
                    o = o * zi / (1 + (-zi).exp())
                    y[row, t, j] = y[row, t, j] + (o if m.mimo_o is None else o * m.mimo_o[j, i])
    return y.flatten(-2) @ m.out_proj.weight.T


def _turn_matrix(theta, n, rotation):
    rows = list(torch.eye(n, dtype=F64))
    for i, t in enumerate(theta):
        one, two = (2 * i, 2 * i + 1) if rotation == "neighbours" else (i, i + n // 2)
        e1, e2 = (torch.eye(n, dtype=F64)[j] for j in (one, two))
        rows[one], rows[two] = t.cos() * e1 - t.sin() * e2, t.sin() * e1 + t.cos() * e2
    return torch.stack(rows)


@every_option
def test_layer_equals_the_definition(options):
    m = _layer(options)
    x = torch.randn(2, 6, 16, dtype=F64, requires_grad=True)
    floor, softplus = options.get("a_floor", 1e-4), options.get("a_activation") == "softplus"
    want, got = _definition(m, x, floor, softplus), m(x)[0]
    assert_close(got, want.detach(), "float64", "y")
    leaves = [x, *m.parameters()]
    cot = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(y, leaves, cot) for y in (got, want)), strict=True)
    for name, (a, b) in zip(["x", *dict(m.named_parameters())], pairs, strict=True):
        assert b.abs().max() > 0, name
        assert_close(a, b, "float64", name)


@every_option
def test_any_cut_and_any_packing(options):
    """Stretches with a carried state, single tokens and packed sequences equal the whole."""
    m, x = _layer(options), torch.randn(2, 40, 16, dtype=F64)
    whole, final = m(x)
    for cuts in ([17, 23], [1] * 5 + [35], [39, 1]):
        state, ys = m.init_state(2), []
        for part in x.split(cuts, 1):
            y, state = m(part, state)
            ys.append(y)
        assert_close(torch.cat(ys, 1), whole, "float64", f"y {cuts}")
        for k in final:
            assert_close(state[k], final[k], "float64", f"{k} {cuts}")
    cu = torch.tensor([0, 1, 24, 40], dtype=torch.int32)
    warm = State.cat([m(x[:1, : 3 + i])[1] for i in range(3)])
    packed, ends = m(x[1:], warm, cu_seqlens=cu)
    for i in range(3):
        part = x[1:, cu[i] : cu[i + 1]]
        y, end = m(part, warm.select(i))
        assert_close(packed[:, cu[i] : cu[i + 1]], y, "float64", f"packed {i}")
        for k in end:
            assert_close(ends[k][i : i + 1], end[k], "float64", f"packed {k} {i}")


def test_one_rank_with_neutral_weights_is_no_rank():
    plain = _layer({})
    ranked = Mamba3(16, d_state=8, d_head=8, mimo_rank=1, rotation="neighbours").double()
    ranked.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, 16, dtype=F64)
    assert_close(ranked(x)[0], plain(x)[0], "float64")


def test_compiled_with_ranks():
    torch._dynamo.reset()
    m, x = _layer({"mimo_rank": 2, "norm": True}), torch.randn(1, 40, 16, dtype=F64)
    compiled = torch.compile(lambda x: m(x)[0], fullgraph=True, backend="aot_eager")
    params = list(m.parameters())
    pairs = [(y, *torch.autograd.grad(y.square().sum(), params)) for y in (compiled(x), m(x)[0])]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, "float64")


def test_initial_values_and_names():
    """Shapes as in the authors' checkpoints; steps log-uniform in their range."""
    torch.manual_seed(0)
    m = Mamba3(256, d_head=8, mimo_rank=4, norm=True)
    shapes = {k: tuple(p.shape) for k, p in m.named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * 512 + 2 * 4 * 128 + 3 * 64 + 32, 256),
        "dt_bias": (64,),
        "B_bias": (64, 4, 128),
        "C_bias": (64, 4, 128),
        "B_norm.weight": (128,),
        "C_norm.weight": (128,),
        "mimo_x": (64, 4, 8),
        "mimo_z": (64, 4, 8),
        "mimo_o": (64, 4, 8),
        "D": (64,),
        "norm.weight": (512,),
        "out_proj.weight": (256, 512),
    }
    dt = F.softplus(m.dt_bias)
    assert 1e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.4
    for p, value in ((m.B_bias, 1), (m.C_bias, 1), (m.D, 1), (m.mimo_x, 0.25), (m.mimo_z, 1)):
        assert p is not None
        assert (p == value).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_head": 7}, "d_head"),
        ({"n_groups": 3}, "n_groups"),
        ({"rope_fraction": 0.25}, "rope_fraction"),
        ({"d_state": 2}, "a pair to turn"),
        ({"rotation": "all"}, "rotation"),
        ({"mimo_rank": 0}, "mimo_rank"),
        ({"a_activation": "exp"}, "a_activation"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba3(16, **{"d_state": 8, "d_head": 8, **options})


# --- the op -------------------------------------------------------------------------------------


def draw(seed, rows, length, groups, repeat, ranks, pairs_turned, spare, d_value, n_states=None):
    """Inputs by name and a state in the middle of a sequence."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    heads, n = groups * repeat, 2 * (pairs_turned + spare)
    x = {
        "q": normal(rows, length, groups, ranks, n),
        "k": normal(rows, length, groups, ranks, n),
        "v": normal(rows, length, heads, ranks, d_value),
        "log_a": -normal(rows, length, heads).square(),
        "dt": normal(rows, length, heads).exp(),
        "lam": normal(rows, length, heads).sigmoid(),
        "rate": 3 * normal(rows, length, 1 if seed % 2 else heads, pairs_turned),
        "q_bias": normal(heads, ranks, n),
        "k_bias": normal(heads, ranks, n),
    }
    shapes = module.state_shapes(heads, ranks, n, d_value, pairs_turned)
    n_states = rows if n_states is None else n_states
    return x, State({k: normal(n_states, *s) for k, s in shapes.items()})


def outputs(x, state, **more):
    """y, the new state and the gradients of all inputs and of the state."""
    leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
    state = state.map(lambda t: t.clone().requires_grad_())
    y, end = trapezoid(**leaves, state=state, **more)
    g = torch.Generator().manual_seed(1)
    outs = [y, *end.values()]
    loss = sum((t * torch.randn(t.shape, dtype=F64, generator=g)).sum() for t in outs)
    return [*outs, *torch.autograd.grad(loss, [*leaves.values(), *state.values()])]


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    packed=st.booleans(),
    groups=st.integers(1, 2),
    repeat=st.integers(1, 2),
    ranks=st.integers(1, 3),
    turned=st.integers(1, 3),
    spare=st.integers(0, 2),
    d_value=st.integers(1, 4),
    pairs=st.sampled_from(module.PAIRS),
    chunk=st.sampled_from([1, 4, 16, 64]),
    block=st.sampled_from([1, 1 << 9, 1 << 20]),
)
def test_any_shape_and_packing(
    seed, lengths, packed, groups, repeat, ranks, turned, spare, d_value, pairs, chunk, block
):
    """T1: chunks in any blocks equal the loop, all gradients included."""
    rows, length = (1, sum(lengths)) if packed else (2, max(lengths))
    n_states = len(lengths) if packed else 2
    x, state = draw(seed, rows, length, groups, repeat, ranks, turned, spare, d_value, n_states)
    cu = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    want = outputs(x, state, cu_seqlens=cu, pairs=pairs, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        got = outputs(x, state, cu_seqlens=cu, pairs=pairs, chunk=chunk)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, "float64", f"tensor {i}")


def test_gradcheck_of_the_definition():
    """T2."""
    x, state = draw(2, 1, 3, 1, 2, 2, 1, 1, 2)
    names = list(x)

    def f(*tensors):
        given_ = dict(zip(names, tensors[: len(names)], strict=True))
        rest = State(dict(zip(state, tensors[len(names) :], strict=True)))
        y, end = trapezoid_reference(**given_, state=rest, pairs="halves")
        return y, *end.values()

    leaves = [t.clone().requires_grad_() for t in (*x.values(), *state.values())]
    assert torch.autograd.gradcheck(f, leaves)


def test_second_derivatives():
    x, state = draw(3, 2, 9, 1, 2, 2, 2, 1, 3)
    results = []
    for form in (trapezoid_reference, trapezoid_chunked):
        leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
        y, _ = form(**leaves, state=state, pairs="halves")
        first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        g = torch.Generator().manual_seed(1)
        loss = sum((d * torch.randn(d.shape, dtype=F64, generator=g)).sum() for d in first)
        results.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, b in zip(*results, strict=True):
        assert_close(b, a, "float64")


@pytest.mark.parametrize("ranks", [1, 2])
def test_causal_in_every_input(ranks):
    """An output's gradient to all later inputs is exactly zero, steps and weights included."""
    x, state = draw(4, 1, 40, 1, 2, ranks, 2, 1, 3)
    for t in (15, 16, 30):  # inside a chunk and around its border
        leaves = {k: x[k].clone().requires_grad_() for k in TOKENS}
        y, _ = trapezoid(**{**x, **leaves}, state=state, chunk=16 * ranks)
        gradients = torch.autograd.grad(y[:, t].sum(), list(leaves.values()))
        for k, g in zip(TOKENS, gradients, strict=True):
            assert g[:, t + 1 :].abs().max() == 0, k
            assert g[:, t].abs().max() > 0, k


def test_without_turns_and_with_whole_weight_it_is_decay():
    x, state = draw(6, 2, 70, 1, 3, 1, 2, 1, 4)
    x["rate"] = torch.zeros_like(x["rate"])
    x["lam"] = torch.ones_like(x["lam"])
    state = State({**state, "angle": torch.zeros_like(state["angle"])})
    y, end = trapezoid(**x, state=state)
    q, k = ((x[n] + x[n + "_bias"]).squeeze(3) for n in "qk")
    v = x["v"].squeeze(3) * x["dt"].unsqueeze(-1)
    want, s = decay(q, k, v, x["log_a"], state=state["s"])
    assert_close(y.squeeze(3), want, "float64", "y")
    assert_close(end["s"], s, "float64", "s")


def test_half_turns_count_parity():
    """What the turning state is for: a bit turns the frame by pi, so that a constant key written
    once is read with the sign of the parity, and without decay for ever."""
    bits = torch.randint(0, 2, (1, 5000, 1, 1), generator=torch.Generator().manual_seed(0))
    length = bits.shape[1]
    one = torch.ones(1, length, 1)
    pair = torch.tensor([1.0, 0.0]).expand(1, length, 1, 1, 2)
    v = torch.zeros(1, length, 1, 1, 1)
    v[:, 0] = 1
    none = torch.zeros(1, 1, 2)
    bits[:, 0] = 0
    y, _ = trapezoid(pair, pair, v, 0 * one, one, one, math.pi * bits, none, none)
    assert_close(y.flatten(), 1.0 - 2 * (bits.flatten().cumsum(0) % 2), "float32")


def test_angles_of_long_sequences():
    """64k tokens: float32 angles, whole and in stretches, lie within a few roundings of exact
    ones. (Plain float32 sums would not.)"""
    g = torch.Generator().manual_seed(0)
    length, heads = 1 << 16, 2
    dt = torch.rand(1, length, heads, generator=g) * 0.2
    rate = math.pi * torch.rand(1, length, 1, 3, generator=g)
    x = {
        "q": torch.zeros(1, length, 1, 1, 6),
        "k": torch.zeros(1, length, 1, 1, 6),
        "v": torch.zeros(1, length, heads, 1, 1),
        "log_a": -torch.ones(1, length, heads),
        "dt": dt,
        "lam": dt,
        "rate": rate,
    }
    bias = torch.zeros(heads, 1, 6)
    bias[..., 0] = 1
    exact = (rate.double() * dt.double().unsqueeze(-1)).sum(1)
    _, state = trapezoid(**x, q_bias=bias, k_bias=bias)
    assert wrap(state["angle"].double() - exact).abs().max() < 1e-5
    plain = (rate * dt.unsqueeze(-1)).cumsum(1)[:, -1]
    assert wrap(plain.double() - exact).abs().max() > 1e-4, "the test would notice"
    state = None
    for i in range(0, length, 4096):
        part = {k: t[:, i : i + 4096] for k, t in x.items()}
        _, state = trapezoid(**part, q_bias=bias, k_bias=bias, state=state)
    assert wrap(state["angle"].double() - exact).abs().max() < 1e-5
    assert torch.equal(state["k"][0, :, 0, 0], state["angle"][0, :, 0].cos())


def test_angles_of_many_single_tokens():
    """A float32 turn taken off each time would leave 4000 equal errors."""
    length, rate = 4000, torch.tensor([5.0, -6.0]).view(1, 1, 1, 2)
    one, key = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1, 4)
    bias, state = torch.zeros(1, 1, 4), None
    for _ in range(length):
        _, state = trapezoid(key, key, key[..., :1], -one, one, one, rate, bias, bias, state=state)
    exact = length * rate.flatten().double()
    assert wrap(state["angle"].flatten().double() - exact).abs().max() < 1e-4
    naive = torch.zeros(2)
    for _ in range(length):
        naive = naive + rate.flatten()
        naive = naive - (naive / (2 * math.pi)).round() * (2 * math.pi)
    assert wrap(naive.double() - exact).abs().max() > 3e-4, "the test would notice"


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("dt", [0.0, 1e-6, 1e4])
def test_extremes(lam, dt):
    """T4: the ends of the two-point rule, no time and much time per token, closed gates."""
    x, state = draw(8, 2, 50, 1, 2, 2, 2, 1, 3)
    x["lam"].fill_(lam)
    x["dt"].fill_(dt)
    x["log_a"] = -x["dt"] * 3
    x["log_a"][:, 7::9] = -math.inf
    want = outputs(x, state, backend="reference")
    for a, b in zip(outputs(x, state, chunk=16), want, strict=True):
        assert torch.isfinite(a).all()
        if b.abs().max() > 1e-9:
            assert_close(a, b, "float64")
    leaves = {k: t.float().requires_grad_() for k, t in x.items()}
    y, end = trapezoid(**leaves, state=state.to(dtype=torch.float32))
    for t in torch.autograd.grad(y.sum() + end["s"].sum(), list(leaves.values())):
        assert torch.isfinite(t).all()


def test_rotation_keeps_products_and_composes():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 8, dtype=F64, generator=g)
    a, b = torch.randn(2, 5, 3, dtype=F64, generator=g)
    for pairs in module.PAIRS:
        both = (rotate(x, a, pairs) * rotate(y, a, pairs)).sum(-1)
        assert_close(both, (x * y).sum(-1), "float64", "products")
        twice = rotate(rotate(x, a, pairs), b, pairs)
        assert_close(twice, rotate(x, wrap(a + b + 40 * math.pi), pairs), "float64", "sums")
        assert error(rotate(x, a, pairs), x) > 0.1


def test_autocast_does_not_touch_the_recurrence():
    x, state = draw(5, 2, 20, 1, 2, 1, 2, 1, 3)
    x, state = {k: t.float() for k, t in x.items()}, state.to(dtype=torch.float32)
    want = trapezoid(**x, state=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = trapezoid(**x, state=state)
    for a, b in zip([got[0], *got[1].values()], [want[0], *want[1].values()], strict=True):
        assert torch.equal(a, b)


def test_a_state_holds_no_sequence():
    """Nothing in a state is a view of the tokens it came from."""
    m = Mamba3(32, d_state=8)
    with torch.no_grad():
        for x in (torch.randn(1, 100, 32), torch.randn(1, 1, 32)):
            _, state = m(x)
            for k, t in state.items():
                assert t.untyped_storage().nbytes() <= 2 * t.nbytes, k


def _good():
    x, state = draw(7, 2, 5, 1, 2, 2, 2, 1, 3)
    return {**x, "state": state}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 5, 2, 3)}, "v must have shape"),
        ({"q": torch.zeros(2, 4, 1, 2, 6)}, "q must have shape"),
        ({"k": torch.zeros(2, 5, 1, 2, 4)}, "k must have shape"),
        ({"dt": torch.zeros(2, 5, 3)}, "dt must have shape"),
        ({"rate": torch.zeros(2, 5, 3, 2)}, "rate must have shape"),
        ({"rate": torch.zeros(2, 5, 1, 4)}, "turn"),
        ({"q_bias": torch.zeros(2, 1, 6)}, "q_bias must have shape"),
        ({"log_a": torch.full((2, 5, 2), 0.5)}, "log decays <= 0"),
        ({"lam": torch.zeros(2, 5, 2, dtype=torch.long)}, "floating point"),
        ({"pairs": "some"}, "pairs must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "state angle must have shape"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "batch must be 1"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trapezoid(**{**_good(), **change})
