"""LSSL against the authors' layer, and its views against each other."""

import pytest
import torch
from helpers import assert_close, error, golden
from torch.func import functional_call

from longscan.mixers._hippo import hippo
from longscan.mixers.lssl import LSSL, from_authors
from longscan.ops.lti import lti_conv
from longscan.state import State

F64 = torch.float64
CASES = {
    "fixed_legs": {"learn": 0},
    "learn1_legs": {"learn": 1},
    "learn2_legs_jitter": {"learn": 2},
    "fixed_legt_M2": {"learn": 0, "measure": "legt", "channels": 2},
}
A = ("T_sub", "T_diag", "T_sup", "left", "right", "shift", "b", "log_dt")
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def stored():
    return {k: v.double() for k, v in golden("lssl/lssl").items()}


def case(stored, name):
    return {k[len(name) + 1 :]: v.clone() for k, v in stored.items() if k.startswith(f"{name}/")}


def tensors(file, kind):
    return {k[len(kind) + 1 :]: v for k, v in file.items() if k.startswith(f"{kind}/")}


def layer(name, file):
    m = LSSL(4, d_state=6, **CASES[name]).double()
    m.load_state_dict(from_authors(tensors(file, "param") | tensors(file, "buffer")))
    return m


@every_case
def test_layer_equals_authors(stored, name):
    file = case(stored, name)
    m = layer(name, file)
    leaves = {k: v.requires_grad_() for k, v in tensors(file, "param").items()}
    x = file["x"].requires_grad_()
    y, state = functional_call(m, from_authors(leaves | tensors(file, "buffer")), (x,))
    assert_close(y, file["y"], "golden32", "y")
    assert_close(state.tensor("s"), file["final_state"], "golden32", "state")
    got = torch.autograd.grad((y * file["dy"]).sum(), [x, *leaves.values()])
    assert_close(got[0], file["dx"], "golden32", "dx")
    for key, g in zip(leaves, got[1:], strict=True):
        assert_close(g, file[f"grad/{key}"], "golden32", key)
    assert {k for k, p in m.named_parameters() if not p.requires_grad} == (
        set(A) if m.learn == 0 else set()
    )


@every_case
def test_recurrence_before_the_activation_equals_authors(stored, name):
    file = case(stored, name)
    m = layer(name, file)
    m.activation, m.out_proj = None, torch.nn.Identity()
    y, _ = m(file["x"])
    assert_close(y.view_as(file["pre_activation"]), file["pre_activation"], "golden32", "v")


@every_case
def test_matrices_and_kernel_equal_authors(stored, name):
    file = case(stored, name)
    m = layer(name, file)
    a, b = m.continuous()
    assert_close(a, file["A_cont"], "golden32", "A")
    assert_close(b, file["B_cont"], "golden32", "B")
    k = m.kernel(file["x"].shape[1])
    assert_close(k.transpose(0, 1), file["kernel"], "golden32", "kernel")
    for alpha, key in ((0.5, ""), (0.0, "_alpha0.0"), (0.25, "_alpha0.25"), (1.0, "_alpha1.0")):
        m.alpha = alpha
        a, b = m.discretise()
        assert_close(a, file[f"A_bar{key}"], "golden32", f"Abar, alpha {alpha}")
        assert_close(b, file[f"B_bar{key}"], "golden32", f"Bbar, alpha {alpha}")


@pytest.mark.parametrize("n", [5, 64])
@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("learn", [1, 2])
def test_starts_as_hippo(measure, n, learn):
    a, b = LSSL(3, d_state=n, measure=measure, learn=learn).double().continuous()
    want_a, want_b = hippo(measure, n, window=1.0)
    assert_close(a, want_a.expand_as(a), "stored32", "A")
    assert_close(b, want_b.expand_as(b), "stored32", "B")


def build(**options):
    torch.manual_seed(0)
    m = LSSL(4, **{"d_state": 8, "activation": None, **options}).double()
    m.out_proj = torch.nn.Identity()
    return m


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize(("learn", "channels"), [(0, 1), (1, 3), (2, 2)])
def test_three_views(measure, learn, channels):
    """Convolution, recurrence step by step, chunks; lengths that are no power of two."""
    m = build(measure=measure, learn=learn, channels=channels)
    x = torch.randn(2, 77, 4, dtype=F64)
    chunks, final = m(x)
    v = lti_conv(x, m.kernel(77)).transpose(2, 3) + x.unsqueeze(-1) * m.D
    assert_close(v.flatten(2), chunks, "float64", "convolution")
    state, steps = None, []
    for t in range(77):
        y, state = m(x[:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), chunks, "float64", "recurrence")
    assert_close(state.tensor("s"), final.tensor("s"), "float64", "state")


def test_discretisation_keeps_its_gradients():
    """The bilinear matrices through one inverse, against solves with both sides."""
    m = build(learn=2)
    names = A
    inputs = [m.get_parameter(k) for k in names]
    a, b = m.continuous()
    dt = m.log_dt.exp().view(-1, 1, 1)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        m.alpha = alpha
        eye = torch.eye(8, dtype=F64)
        left, right = eye - alpha * dt * a, eye + (1 - alpha) * dt * a
        want = torch.linalg.solve(left, right), torch.linalg.solve(left, dt * b.unsqueeze(-1))
        got = m.discretise()
        weights = [torch.randn_like(x) for x in got]
        assert_close(got[0], want[0], "float64", "Abar")
        assert_close(got[1], want[1].squeeze(-1), "float64", "Bbar")
        loss, wanted = (
            (x[0] * weights[0]).sum() + (x[1].view_as(weights[1]) * weights[1]).sum()
            for x in (got, want)
        )
        g = torch.autograd.grad(loss, inputs, retain_graph=True)
        h = torch.autograd.grad(wanted, inputs, retain_graph=True)
        for name, x, y in zip(names, g, h, strict=True):
            assert_close(x, y, "float64", f"{name}, alpha {alpha}")


def test_one_state_is_a_gated_recurrence():
    """Lemma 3.1: A = -1, B = 1, backward Euler, dt = exp(z): s <- (1 - g) s + g u, g = sig(z)."""
    z = torch.tensor([-2.0, 0.0, 0.7, 3.0], dtype=F64)
    m = build(d_state=1, alpha=1.0)
    with torch.no_grad():
        for p in (m.shift, m.D):
            p.zero_()
        for p in (m.T_diag, m.left, m.right, m.b, m.C):
            p.fill_(1)
        m.log_dt.copy_(z)
    u = torch.randn(1, 20, 4, dtype=F64)
    g, s, want = torch.sigmoid(z), torch.zeros(4, dtype=F64), []
    for t in range(20):
        s = (1 - g) * s + g * u[0, t]
        want.append(s)
    assert_close(m(u)[0][0], torch.stack(want), "float64", "s")


def test_rate():
    """Another sampling rate is another dt, everywhere; the authors' code leaves Bbar behind."""
    m, x = build(), torch.randn(1, 30, 4, dtype=F64)
    kernel = m.kernel(30, 2.0)
    m.rate = 2.0
    y, _ = m(x)
    official = build(rate_input=False)
    a, b = official.discretise()
    official.rate = 2.0
    fast, same = official.discretise()
    assert torch.equal(same, b)
    assert torch.equal(fast, m.discretise()[0])
    with torch.no_grad():
        m.log_dt.add_(torch.tensor(2.0, dtype=F64).log())
    m.rate = 1.0
    assert_close(y, m(x)[0], "float64", "y")
    assert_close(kernel, m.kernel(30), "float64", "kernel")
    assert error(a, fast) > 1e-3


def test_resampling_keeps_the_output():
    """Of a slow signal, every second sample with dt doubled gives every second output."""
    m = build(dt_range=(5e-3, 1e-2))
    with torch.no_grad():
        m.D.zero_()
    t = torch.arange(400, dtype=F64).view(1, -1, 1)
    x = torch.sin(t / 40 + torch.arange(4))
    want, _ = m(x)
    m.rate = 2.0
    assert error(m(x[:, ::2])[0][:, 50:], want[:, 100::2]) < 0.02
    m.rate = 1.0
    assert error(m(x[:, ::2])[0][:, 50:], want[:, 100::2]) > 0.2


def test_settings():
    torch.manual_seed(0)
    m = LSSL(5, d_state=4, channels=2, bias=True, dt_init="even", dt_range=(1e-3, 1e-1))
    want = torch.logspace(-3, -1, 5)
    assert_close(m.log_dt.exp(), want, "float32", "dt")
    assert m.bias.shape == (5, 2)
    x = torch.randn(1, 3, 5)
    y, _ = m(x)
    with torch.no_grad():
        m.bias.add_(1)
    assert error(m(x)[0], y) > 1e-2
    limits = dict.fromkeys(A[:-1], 1e-4) | {"log_dt": 1e-3}
    assert m.lr_limit == limits
    assert LSSL(4, a_lr=None).lr_limit == {"log_dt": 1e-3}
    assert set(LSSL.no_weight_decay) == set(A)
    for options, words in (
        ({"measure": "fout"}, "legs, legt, lagt"),
        ({"learn": 3}, "0, 1 or 2"),
        ({"dt_init": "uniform"}, "even"),
        ({"alpha": 2}, "alpha"),
        ({"d_state": 0}, "at least 1"),
        ({"activation": "relu"}, "gelu"),
    ):
        with pytest.raises(ValueError, match=words):
            LSSL(4, **options)


def test_dropout():
    torch.manual_seed(0)
    m = build(dropout=0.5)
    x = torch.randn(1, 50, 4, dtype=F64)
    zeros = (m(x)[0] == 0).double().mean()
    assert 0.3 < zeros < 0.7
    assert (m.eval()(x)[0] != 0).all()


def test_discretisation_is_kept_and_never_stale(monkeypatch):
    """Decoding does not invert a matrix per token; frozen layers not even in training."""
    calls = []
    real = LSSL.discretise
    monkeypatch.setattr(LSSL, "discretise", lambda m, *a: (calls.append(1), real(m, *a))[1])
    m, x = build(), torch.randn(1, 6, 4, dtype=F64)
    with torch.no_grad():
        _, state = m(x)
        for _ in range(3):
            _, state = m(x[:, :1], state)
        assert len(calls) == 1
        s = State(s=torch.ones(1, 4, 8, dtype=F64))
        before, _ = m(x[:, :1], s)
        m.shift.add_(0.1)
        after, _ = m(x[:, :1], s)
        assert len(calls) == 2
        assert error(after, before) > 1e-4
    m(x)[0].sum().backward()
    assert len(calls) == 3
    assert m.shift.grad.abs().max() > 0
    m = build(learn=0)
    for _ in range(3):
        m(x)[0].sum().backward()
    assert len(calls) == 4
    assert m.C.grad.abs().max() > 0


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_float32_holds_over_long_sequences(measure):
    """Powers of these matrices, far from normal, stay small; N = 128 as in the paper."""
    m = build(d_state=128, measure=measure)
    x = torch.randn(1, 2000, 4, dtype=F64)
    with torch.no_grad():
        want, final = m(x)
        m = m.float()
        y, state = m(x.float())
    assert_close(y, want, "float32", "y")
    assert_close(state.tensor("s"), final.tensor("s"), "float32", "state")
