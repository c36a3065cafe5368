"""S4D against the authors' layers, its initialisations and its options."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, golden
from torch.nn import functional as F

from longscan.mixers.s4d import INITS, S4D, discretise, initial
from longscan.ops import lti as op
from longscan.ops.lti import lti_conv
from longscan.state import State

F64 = torch.float64
CASES = {
    "diag-lin": {"init": "lin"},
    "diag-inv": {"init": "inv"},
    "diag-quad": {"init": "quad"},
    "legs": {"init": "legs"},
    "diag-real": {"init": "real"},
    "lin_bilinear": {"init": "lin", "method": "bilinear"},
}
# Where the stored float32 gradients are themselves off by more than the table says: digits lost
# in (exp(dt a) - 1) / a at dt = 1e-3. Finite differences in float64 agree with ours to 3e-6.
LOOSE = {
    "diag-inv": {"A_real": 3e-3, "A_imag": 1e-3},
    "legs": {"A_real": 2e-4, "A_imag": 2e-4},
}
OURS = {
    "inv_dt": "layer.kernel.inv_dt",
    "A_real": "layer.kernel.A_real",
    "A_imag": "layer.kernel.A_imag",
    "B": "layer.kernel.B",
    "C": "layer.kernel.C",
    "D": "layer.D",
    "out_proj.weight": "output_linear.0.weight",
    "out_proj.bias": "output_linear.0.bias",
}


def case(name):
    start = name + "/"
    return {
        k.removeprefix(start): t.double()
        for k, t in golden("s4/s4d").items()
        if k.startswith(start)
    }


def ours(file, prefix):
    """The authors' tensors under our names: one leading axis less for B, one trailing for dt."""
    out = {k: file[f"{prefix}/{theirs}"].clone() for k, theirs in OURS.items()}
    return out | {"inv_dt": out["inv_dt"].squeeze(-1), "B": out["B"].squeeze(0)}


def layer_of(name, file):
    m = S4D(4, d_state=8, dt_transform="exp", **CASES[name]).double()
    m.load_state_dict(ours(file, "param"))
    return m


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_equals_authors(name, backend, monkeypatch):
    """Outputs, states, kernels, the discrete system, and every gradient."""
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    file = case(name)
    m = layer_of(name, file)
    x = file["x"].requires_grad_()
    y, state = m(x)
    assert_close(y, file["y"], "golden32", "y")
    assert_close(state.tensor("s"), file["final_state"], "golden32", "final state")
    (y * file["dy"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, file["dx"], "golden32", "dx")
    for key, want in ours(file, "grad").items():
        got = m.get_parameter(key).grad
        assert got is not None
        limit = LOOSE.get(name, {}).get(key, TOLERANCE["golden32"])
        assert error(got, want) < limit, key
    assert_close(m.kernel(x.shape[1]), file["kernel"], "golden32", "kernel")
    a, b, c = m.system(F64)
    for got, key in ((a.exp(), "dA"), (b, "dB"), (c / 2, "dC")):
        assert_close(torch.view_as_real(got), file[key], "golden32", key)


@pytest.mark.parametrize("name", CASES)
def test_steps_and_carried_states_equal_authors(name):
    file = case(name)
    m, x = layer_of(name, file), file["x"]
    y, state = m(x, State(s=file["state0"]))
    assert_close(y, file["state_y"], "golden32", "y from a given state")
    assert_close(state.tensor("s"), file["state1"], "golden32", "state from a given state")
    state, ys = None, []
    for t in range(x.shape[1]):
        y, state = m(x[:, t : t + 1], state)
        ys.append(y)
    assert_close(torch.cat(ys, 1), file["step_y"], "golden32", "steps")
    assert_close(state.tensor("s"), file["final_state"], "golden32", "state after steps")


@pytest.mark.parametrize("name", CASES)
def test_convolution_before_the_projection_equals_authors(name):
    """conv_out: kernel, skip and activation, without the last Linear."""
    file = case(name)
    m = S4D(4, d_state=8, dt_transform="exp", output=None, **CASES[name]).double()
    m.load_state_dict({k: t for k, t in ours(file, "param").items() if "out_proj" not in k})
    assert_close(m(file["x"])[0], file["conv_out"], "golden32", "conv_out")
    y = lti_conv(file["x"], m.kernel(13))[:, :, 0] + m.D * file["x"]
    assert_close(F.gelu(y), file["conv_out"], "golden32", "by FFT")


def test_minimal_layer_equals_authors():
    """The minimal S4D: B folded into C, features before time, conjugate eigenvalues."""
    file = case("minimal")

    def named(prefix):
        get = {k.removeprefix(f"{prefix}/"): t for k, t in file.items() if k.startswith(prefix)}
        return {
            "inv_dt": get["kernel.log_dt"],
            "A_real": get["kernel.log_A_real"],
            "A_imag": get["kernel.A_imag"],
            "C": (get["kernel.C"] * torch.tensor([1.0, -1.0])).unsqueeze(0),
            "D": get["D"].unsqueeze(0),
            "out_proj.weight": get["output_linear.0.weight"].squeeze(-1),
            "out_proj.bias": get["output_linear.0.bias"],
        }

    m = S4D(6, d_state=8, train_b=False, dt_transform="exp").double()
    m.load_state_dict(named("param"))
    x = file["x"].mT.requires_grad_()
    y, _ = m(x)
    assert_close(y.mT, file["y"], "golden32", "y")
    assert_close(m.kernel(15)[0], file["kernel"], "golden32", "kernel")
    (y.mT * file["dy"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad.mT, file["dx"], "golden32", "dx")
    for key, want in named("grad").items():
        got = m.get_parameter(key).grad
        assert got is not None
        assert_close(got, want, "golden32", key)


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("init", [i for i in INITS if i != "rand"])
def test_initialisations_equal_authors(init, n):
    """The authors' table (before the clamp), and what becomes of it in the parameters."""
    file = case(f"s4d_{init}{n}")
    values, b = initial(init, n)
    want = torch.view_as_complex(file["A"].clone())
    assert_close(values.imag, want.imag, "golden32", "Im A")
    assert_close(values.real, want.real, "golden32", "Re A")
    m = S4D(4, d_state=n, init=init, n_ssm=1).double()
    theirs = torch.view_as_complex(file["B"].clone())
    mine = torch.view_as_complex(m.B.detach()[0].clone())
    # Eigenvectors of LegS are known up to a sign: compare squares.
    assert_close((mine**2).real, (theirs**2).real, "golden32", "Re B^2")
    assert ((mine**2).imag - (theirs**2).imag).abs().max() < 1e-4
    assert_close(m.A_real.detach()[0], (-want.real).clamp(min=1e-4).log(), "golden32", "A_real")
    assert_close(m.A_imag.detach()[0], (-want.imag).clamp(min=1e-4), "golden32", "A_imag")
    folded = S4D(4, d_state=n, init=init, train_b=False)
    assert folded.B is None
    assert b.shape == (n // 2,)


@pytest.mark.parametrize("name", ["diag-lin", "legs", "lin_bilinear"])
def test_initial_parameters_equal_authors(name):
    file = ours(case(name), "init")
    m = S4D(4, d_state=8, dt_transform="exp", **CASES[name])
    assert_close(m.A_real, file["A_real"], "golden32", "A_real")
    assert_close(m.A_imag, file["A_imag"], "golden32", "A_imag")


def test_random_frequencies():
    torch.manual_seed(0)
    values, _ = initial("rand", 4000)
    assert (values.real == -0.5).all()
    assert abs((-values.imag).log().mean().item()) < 0.1
    assert abs((-values.imag).log().std().item() - 1) < 0.1


@pytest.mark.parametrize("transform", ["exp", "softplus"])
def test_step_sizes_cover_the_range(transform):
    torch.manual_seed(0)
    m = S4D(2000, d_state=2, dt_range=(1e-4, 1e-1), dt_transform=transform, output=None)
    dt = m.step_sizes(F64)
    assert dt.min() > 0.99e-4
    assert dt.max() < 1.01e-1
    assert abs(dt.log10().mean().item() + 2.5) < 0.1, "uniform in the logarithm"


def test_small_steps_keep_their_digits():
    """b = B (exp(dt a) - 1) / a in float32, where the difference would have three digits."""
    m = S4D(64, dt_range=(1e-5, 1e-4), dt_transform="exp")
    got = m.system(torch.float32)[1].detach()
    want = m.double().system(F64)[1].detach()
    assert ((got - want).abs() / want.abs()).max() < 1e-5


def test_bilinear_is_the_fraction_it_stands_for():
    a = torch.complex(-torch.rand(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64))
    dt = torch.rand(5, 1, dtype=F64)
    log, factor = discretise(a, dt, "bilinear")
    z = dt * a / 2
    assert_close(torch.view_as_real(log.exp()), torch.view_as_real((1 + z) / (1 - z)), "float64")
    assert_close(torch.view_as_real(factor), torch.view_as_real(dt / (1 - z)), "float64")
    # dt a = -2 is an eigenvalue of zero, whose logarithm must not spoil gradients.
    a = torch.tensor([[-2.0 + 0j, -1.9 + 0j, -0.5 - 1e-4j]], requires_grad=True)
    log, _ = discretise(a, torch.ones(1, 1), "bilinear")
    log.exp().abs().sum().backward()
    assert log.real.max() <= 0
    assert a.grad is not None
    assert torch.isfinite(torch.view_as_real(a.grad)).all()


def bidirectional(**options):
    torch.manual_seed(0)
    return S4D(4, d_state=6, channels=2, bidirectional=True, **options).double()


def test_bidirectional_equals_its_definition():
    """y_t = sum_j k0_j x_{t-j} + sum_j k1_j x_{t+1+j} + D x_t."""
    m = S4D(4, d_state=6, bidirectional=True, activation=None, output=None).double()
    x = torch.randn(2, 21, 4, dtype=F64)
    past, future = m.kernel(21)
    want = m.D * x
    for t in range(21):
        for j in range(t + 1):
            want[:, t] += past[:, j] * x[:, t - j]
        for j in range(20 - t):
            want[:, t] += future[:, j] * x[:, t + 1 + j]
    y, state = m(x)
    assert_close(y, want, "float64", "y")
    assert len(state) == 0
    one, _ = m(x[:, :1])
    assert_close(one, (past[:, 0] + m.D) * x[:, :1], "float64", "a single token")


def test_bidirectional_packed_equals_separate():
    m = bidirectional()
    lengths = [5, 1, 40, 33]
    x = torch.randn(1, sum(lengths), 4, dtype=F64, requires_grad=True)
    y, _ = m(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
    parts = x.split(lengths, 1)
    for got, part in zip(y.split(lengths, 1), parts, strict=True):
        assert_close(got, m(part)[0], "float64", "one document")
    (g,) = torch.autograd.grad(y[:, 6:46].sum(), x)
    assert g[:, :6].abs().max() == 0
    assert g[:, 46:].abs().max() == 0
    assert g[:, 6:46].abs().min() > 0
    assert_close(m(parts[2], m.init_state(1))[0], m(parts[2])[0], "float64", "empty state")


def test_bidirectional_refuses_a_state():
    with pytest.raises(ValueError, match="carries no state"):
        bidirectional()(torch.zeros(1, 3, 4, dtype=F64), State(s=torch.zeros(1, 4, 3, 2)))


def test_rate_is_a_longer_step():
    """With every second sample left and rate = 2 the layer sees the same time."""
    m = S4D(4, d_state=8, dt_range=(1e-2, 2e-2), dt_transform="exp").double()
    x = torch.sin(torch.arange(200, dtype=F64) / 25).view(1, -1, 1).expand(-1, -1, 4)
    full, _ = m(x)
    m.rate = 2.0
    half, _ = m(x[:, ::2])
    assert error(half, full[:, ::2]) < 0.05
    m.rate = 1.0
    assert error(m(x[:, ::2])[0], full[:, ::2]) > 0.2, "the test can fail"
    twice = S4D(4, d_state=8, rate=2.0, dt_transform="exp").double()
    twice.load_state_dict(m.state_dict())
    with torch.no_grad():
        m.inv_dt.add_(math.log(2))
    assert_close(twice.kernel(30), m.kernel(30), "float64", "kernel")


def test_copies_are_tiled():
    """Feature h uses copy h mod n_ssm."""
    torch.manual_seed(0)
    m = S4D(6, d_state=4, n_ssm=2, init="rand")
    with torch.no_grad():
        m.A_real.normal_()
        m.B.normal_()
    whole = S4D(6, d_state=4)
    state = m.state_dict()
    pick = torch.arange(6) % 2
    whole.load_state_dict(state | {k: state[k][pick] for k in ("A_real", "A_imag", "B")})
    x = torch.randn(2, 9, 6)
    assert torch.equal(m(x)[0], whole(x)[0])


def test_channels_are_slower_than_features_in_the_projection():
    m = S4D(3, d_state=4, channels=2, activation=None, output="linear").double()
    x = torch.randn(2, 9, 3, dtype=F64)
    v = lti_conv(x, m.kernel(9)) + m.D * x.unsqueeze(2)
    want = m.out_proj(torch.cat([v[:, :, 0], v[:, :, 1]], -1))
    assert_close(m(x)[0], want, "float64", "y")


def test_folded_b_starts_as_the_trained_one():
    kernels = []
    for train in (True, False):
        torch.manual_seed(0)
        kernels.append(S4D(4, d_state=8, init="legs", train_b=train).kernel(20))
    assert_close(kernels[1], kernels[0], "golden32", "kernel")


def test_learning_rates_and_decay():
    m = S4D(4)
    assert m.lr_limit == dict.fromkeys(("inv_dt", "A_real", "A_imag", "B"), 1e-3)
    assert set(m.lr_limit) == set(m.no_weight_decay)
    assert "B" not in S4D(4, train_b=False).lr_limit
    assert S4D(4, max_lr=None).lr_limit == {}


def test_tied_dropout_is_one_mask_per_sequence():
    torch.manual_seed(0)
    m = S4D(64, d_state=4, dropout=0.5, tie_dropout=True, output=None)
    x = 0.1 * torch.randn(2, 30, 64)  # GELU of less than -5 is zero as well
    y, _ = m(x)
    kept = y != 0
    assert (kept == kept[:, :1]).all()
    assert not torch.equal(kept[0], kept[1])
    assert 0.05 < kept.float().mean() < 0.5, "dropped in two places"
    y, _ = m(x[:1], cu_seqlens=torch.tensor([0, 10, 30]))
    kept = y[0] != 0
    assert (kept[:10] == kept[0]).all()
    assert (kept[10:] == kept[10]).all()
    assert not torch.equal(kept[0], kept[10])
    m.tie_dropout = False
    kept = m(x)[0] != 0
    assert not (kept == kept[:, :1]).all()
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])
    assert (m(x)[0] != 0).all()


def test_decoding_makes_no_matrices_of_chunks(monkeypatch):
    m = S4D(8, d_state=4)
    x = torch.randn(1, 6, 8)
    whole, _ = m(x)
    _, state = m(x[:, :5])
    monkeypatch.setattr(op, "by_chunks", None)
    y, _ = m(x[:, 5:], state)
    assert_close(y, whole[:, 5:].double(), "float32", "y")


def test_kept_matrices_follow_the_weights():
    """Without gradients the discrete system is kept, until a weight, rate or dtype changes."""
    m, x = S4D(8, d_state=4), torch.randn(1, 5, 8)
    with torch.no_grad():
        first, _ = m(x)
        assert torch.equal(m(x)[0], first)
        m.C.data.mul_(2)
        second, _ = m(x)
        assert error(second, first) > 1e-3
        m.rate = 0.5
        assert error(m(x)[0], second) > 1e-3
        m.rate = 1.0
        m.load_state_dict(S4D(8, d_state=4).state_dict())
        third, _ = m(x)
        assert error(third, second) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "hippo"}, "init must be one of"),
        ({"method": "euler"}, "method must be"),
        ({"d_state": 5}, "d_state must be even"),
        ({"n_ssm": 3}, "n_ssm"),
        ({"dt_transform": "relu"}, "dt_transform must be"),
        ({"activation": "relu"}, "activation must be"),
        ({"output": "none"}, "output must be"),
        ({"output": None, "channels": 2}, "channels=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(4, **options)
