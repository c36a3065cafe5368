"""Mega: against the authors' modules, against its definition, and what it refuses."""

import math

import pytest
import torch
from helpers import assert_close, golden
from torch.nn import functional as F

from longscan.mixers._ema import EMA
from longscan.mixers.mega import Mega
from longscan.ops.lti import lti
from longscan.state import State

F64 = torch.float64
CASES = {
    "mega_softmax_causal_simple": {"bias": "simple", "max_positions": 24},
    "mega_softmax_causal_rotary_chunk8": {"bias": "rotary", "chunk": 8},
    "mega_softmax_bi_rotary": {"bias": "rotary", "bidirectional": True},
    "mega_laplace_bi_simple": {
        "attention": "laplace", "bias": "simple", "max_positions": 24, "bidirectional": True,
    },
}  # fmt: skip


def part(vectors, prefix):
    return {k[len(prefix) :]: v for k, v in vectors.items() if k.startswith(prefix)}


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mover(m):
    """Off the initial values, so that no parameter is special."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g))
    return m


def mega(d=12, **settings):
    torch.manual_seed(0)
    return mover(Mega(d, **{"d_key": 8, "d_value": 16, "d_state": 4, **settings}).double())


# --- the authors' numbers -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ema", "ema_bi"])
def test_average_equals_the_authors(name):
    vectors = golden("longvq/mega_layer")
    g = part(vectors, f"{name}.")
    m = EMA(12, d_state=4, bidirectional=name == "ema_bi")
    m.load_state_dict({k: v.view(m.get_parameter(k).shape) for k, v in part(g, "param.").items()})
    x = vectors["ema.x"].transpose(0, 1).requires_grad_()
    y, state = m(x)
    assert_close(y.transpose(0, 1), g["y"], "golden32", "y")
    y.backward(g["dy"].transpose(0, 1))
    assert x.grad is not None
    assert_close(x.grad.transpose(0, 1), vectors[f"{name}.dx"], "golden32", "dx")
    for k, want in part(g, "grad.").items():
        grad = m.get_parameter(k).grad
        assert grad is not None
        assert_close(grad.view(want.shape), want, "golden32", k)
    if name == "ema_bi":
        assert len(state) == 0
        return
    assert_close(state.tensor("h"), g["state_final"], "golden32", "state")
    assert_close(m(x[:, :8])[1].tensor("h"), g["state_at_split"], "golden32", "state at 8")
    assert_close(m.average(x)[0].transpose(0, 1), g["conv_only"], "golden32", "sums alone")


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_authors(name):
    """The layer on its residual stream."""
    g = part(golden("longvq/mega_layer"), f"{name}.")
    m = Mega(12, d_key=8, d_value=16, d_state=4, **CASES[name])

    def ours(values):
        out = {k.replace("norm.norm", "norm"): v for k, v in values.items()}
        if "rel_pos_bias.alpha" in values:
            out["rel_bias"] = torch.cat([out.pop(f"rel_pos_bias.{k}") for k in ("alpha", "beta")])
        else:
            out["rel_bias"] = out.pop("rel_pos_bias.rel_pos_bias")
        return {k: v.view(m.get_parameter(k).shape) for k, v in out.items()}

    m.load_state_dict(ours(part(g, "param.")))
    x = g["x"].transpose(0, 1).requires_grad_()
    y = x + m(x)[0]
    assert_close(y.transpose(0, 1), g["y"], "golden32", "y")
    y.backward(g["dy"].transpose(0, 1))
    assert x.grad is not None
    assert_close(x.grad.transpose(0, 1), g["dx"], "golden32", "dx")
    for k, want in ours(part(g, "grad.")).items():
        grad = m.get_parameter(k).grad
        assert grad is not None
        assert_close(grad, want, "golden32", k)


# --- the definition -------------------------------------------------------------------------


def dense(m, x):
    """What the docstring says, one sequence [T, D] at a time, with all scores at once."""
    n, residual = len(x), x
    x = F.layer_norm(x, x.shape[-1:], m.norm.weight, m.norm.bias, 1e-5)
    rows = {k: getattr(m.move, k) for k in ("delta", "alpha", "beta", "gamma")}

    def average(x, rows):
        p, sums, h = rows["delta"].sigmoid(), [], torch.zeros_like(rows["delta"])
        for u in x:
            h = (1 - p * rows["alpha"].sigmoid()) * h + p * rows["beta"] * u[:, None]
            sums.append((rows["gamma"] * h).sum(1) * m.move.d_state**-0.5)
        return torch.stack(sums)

    sums = average(x, {k: v[: m.d_model] for k, v in rows.items()})
    if m.bidirectional:
        sums = sums + average(x.flip(0), {k: v[m.d_model :] for k, v in rows.items()}).flip(0)
    base = m.mx_proj(F.silu(sums + m.move.omega * x))
    u, z, r, hx = base.split([m.d_model, m.d_key, m.d_value, m.d_model], -1)
    z, r = F.silu(z), F.silu(r)
    q, k = z * m.gamma[0] + m.beta[0], z * m.gamma[1] + m.beta[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = (i // m.chunk == j // m.chunk) if m.chunk else torch.ones(n, n, dtype=torch.bool)
    if not m.bidirectional:
        seen = seen & (j <= i)
    bias = torch.zeros(n, n, dtype=x.dtype)
    if m.bias == "simple":
        bias = m.rel_bias[(m.max_positions - 1 + j - i).where(seen, 0)]
    elif m.bias == "rotary":
        half = m.d_key // 2
        turn = torch.exp(
            1j * torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(half, dtype=F64) / half)
        )
        a, b = (torch.complex(w[:half], w[half:]) * turn for w in m.rel_bias)
        bias = (a @ b.mH).real
    if m.attention == "softmax":
        s = q @ k.mT * m.d_key**-0.5 + bias
        weights = s.masked_fill(~seen, -torch.inf).softmax(-1)
    else:
        s = q @ k.mT / seen.sum(-1, keepdim=True) + bias
        form = {
            "laplace": lambda s: (1 + torch.erf((s - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
            "relu2": lambda s: s.relu() ** 2,
        }[m.attention]
        weights = form(s) * seen
    o = weights @ F.silu(m.v_proj(x))
    return u.sigmoid() * (F.silu(hx + m.h_proj(r * o)) - residual)


SETTINGS = [
    {"attention": "softmax", "bias": "simple", "max_positions": 300},
    {"attention": "softmax", "bias": "rotary"},
    {"attention": "softmax", "bias": None, "chunk": 16},
    {"attention": "laplace", "bias": "simple", "chunk": 16},
    {"attention": "laplace", "bias": "rotary"},
    {"attention": "relu2", "bias": "rotary", "chunk": 5},
    {"attention": "relu2", "bias": None},
]
every_setting = pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values()))
)


@every_setting
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_the_definition(settings, bidirectional, monkeypatch):
    """Outputs and all gradients, in a batch and packed; long enough for blocks of queries."""
    monkeypatch.setattr("longscan.mixers.mega._QUERIES", 32)
    m = mega(bidirectional=bidirectional, **settings)
    lengths = [1, 7, 70, 33, 16]
    parts = [randn(n, 12, seed=n) for n in lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    want = torch.cat([dense(m, p) for p in parts])
    dy = randn(*want.shape, seed=99)
    names = [k for k, _ in m.named_parameters()]
    gradients = torch.autograd.grad((want * dy).sum(), [*m.parameters()])
    packed, _ = m(torch.cat(parts)[None], cu_seqlens=cu)
    assert_close(packed[0], want, "float64", "packed")
    got = torch.autograd.grad((packed[0] * dy).sum(), [*m.parameters()])
    for name, a, b in zip(names, got, gradients, strict=True):
        assert_close(a, b, "float64", name)
    batch, _ = m(torch.stack([parts[2], parts[2].flip(0)]))
    assert_close(batch[0], want[8:78], "float64", "a row of a batch")


@every_setting
def test_any_cut_and_rows_of_any_age(settings):
    m = mega(**settings)
    whole = [randn(1, 60, 12, seed=i) for i in range(3)]
    want = [m(x)[0] for x in whole]
    ages = [0, 5, 37]
    states = [m(x[:, :a])[1] if a else m.init_state(1) for x, a in zip(whole, ages, strict=True)]
    state = State.cat(states)
    at = list(ages)
    for n in (1, 2, 7, 1, 9):  # together, as a batch
        x = torch.cat([w[:, a : a + n] for w, a in zip(whole, at, strict=True)])
        y, state = m(x, state)
        for i, a in enumerate(at):
            assert_close(y[i : i + 1], want[i][:, a : a + n], "float64", f"row {i} at {a}")
        at = [a + n for a in at]
    sizes = [10, 1, 3]  # and packed
    x = torch.cat([w[:, a : a + n] for w, a, n in zip(whole, at, sizes, strict=True)], 1)
    y, state = m(x, state, cu_seqlens=torch.tensor([0, 10, 11, 14]))
    expected = [w[:, a : a + n] for w, a, n in zip(want, at, sizes, strict=True)]
    assert_close(y, torch.cat(expected, 1), "float64", "packed")
    assert state.tensor("length").tolist() == [a + n for a, n in zip(at, sizes, strict=True)]


def test_average_is_a_linear_system():
    """The diagonal system of `ops.lti` with the same eigenvalues."""
    torch.manual_seed(0)
    m = EMA(6, d_state=3).double()
    p = m.delta.sigmoid()
    q, zero = 1 - p * m.alpha.sigmoid(), torch.zeros_like(p)
    a, b, c = (torch.complex(t, zero) for t in (q.log(), p * m.beta, m.gamma * 3**-0.5))
    x = randn(2, 100, 6)
    y, s = lti(x, a, b, c[None])
    ours, state = m.average(x)
    assert_close(ours, y.squeeze(2), "float64", "y")
    assert_close(state.tensor("h"), s[..., 0], "float64", "h")


def test_average_survives_saturated_gates():
    m = EMA(4, d_state=2)
    with torch.no_grad():
        m.delta.copy_(torch.tensor([100.0, -100.0]))
        m.alpha.fill_(100.0)
    x = randn(1, 70, 4).float().requires_grad_()
    m(x)[0].sum().backward()
    for t in (x.grad, *(p.grad for p in m.parameters())):
        assert t is not None
        assert torch.isfinite(t).all()


def test_narrow_weights_leave_the_average_wide():
    m = Mega(12).to(torch.bfloat16)
    assert {p.dtype for p in m.move.parameters()} == {torch.float32}
    y, state = m(randn(1, 5, 12).float())  # a residual stream is wider than the weights
    assert y.dtype == torch.float32
    assert {state.tensor(k).dtype for k in "hkv"} == {torch.float32}


def test_only_the_average_crosses_a_chunk():
    m = mega(chunk=8, bias="rotary")
    with torch.no_grad():
        m.move.gamma.zero_()
    x = randn(1, 20, 12).requires_grad_()
    (g,) = torch.autograd.grad(m(x)[0][:, 8:].sum(), x)
    assert g[:, :8].abs().max() == 0
    _, state = m(x)
    assert state.tensor("k").shape[1] == 4, "a state holds the running chunk only"


# --- what it refuses ------------------------------------------------------------------------


def test_a_table_of_biases_has_an_end():
    m = mega(bias="simple", max_positions=10)
    m(randn(1, 10, 12))
    with pytest.raises(ValueError, match="max_positions"):
        m(randn(1, 11, 12))
    _, state = m(randn(1, 9, 12))
    _, state = m(randn(1, 1, 12), state)
    with pytest.raises(ValueError, match="max_positions"):
        m(randn(1, 1, 12), state)
    m = mega(bias="simple", chunk=8)
    m(randn(1, 50, 12))


def test_bidirectional_has_no_state():
    m = mega(bidirectional=True)
    assert len(m.init_state(2)) == 0
    _, causal = mega()(randn(1, 3, 12))
    with pytest.raises(ValueError, match="carries no state"):
        m(randn(1, 3, 12), causal)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attention": "sigmoid"}, "attention"),
        ({"bias": "alibi"}, "bias"),
        ({"chunk": 0}, "chunk"),
        ({"max_positions": 0}, "max_positions"),
        ({"d_key": 7}, "even"),
        ({"d_value": 0}, "d_value"),
        ({"d_state": 0}, "d_state"),
        ({"norm": "batch"}, "norm"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Mega(12, **settings)
