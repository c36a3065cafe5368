"""S4 against the authors' layer, and its three views against each other."""

import math

import pytest
import torch
from helpers import assert_close, error, golden
from torch.func import functional_call

from longscan.mixers._hippo import nplr
from longscan.mixers.s4 import S4, from_authors
from longscan.ops import _cauchy
from longscan.ops.lti import lti_reference
from longscan.state import State

F64 = torch.float64
CASES = {
    "legs": {},
    "fout": {"basis": "fout"},
    "legt": {"basis": "legt"},
    "bidir_glu": {"n_ssm": 1, "bidirectional": True, "dt_transform": "softplus"},
    "linear": {"basis": "fout", "activation": None, "output": None},
}
# What float32 did to the stored tensors, by their authors' README: (I - Abar^L) is nearly singular
# for fout, whose slowest mode (the last one stored) is lost in the gradient of A_imag and in dC.
KERNEL = {"legs": 1e-5, "legt": 1e-4, "fout": 2e-4, "linear": 1e-4, "bidir_glu": 1e-5}
GRADIENT = {"layer.kernel.P": 2e-3}


@pytest.fixture(scope="module")
def stored():
    return {k: v.double() for k, v in golden("s4/s4_dplr").items()}


def case(stored, name):
    return {k[len(name) + 1 :]: v for k, v in stored.items() if k.startswith(f"{name}/")}


def parameters(file, kind="param"):
    return {k[len(kind) + 1 :]: v.clone() for k, v in file.items() if k.startswith(f"{kind}/")}


def layer(name, file, tensors=None, **more):
    """Our layer of a golden case, by default with the parameters it ran with."""
    options = {"dt_transform": "exp", **CASES[name], **more}
    n = 2 * file["param/layer.kernel.C"].shape[-2]
    m = S4(file["x"].shape[-1], d_state=n, **options).double()
    tensors = parameters(file) if tensors is None else tensors
    m.load_state_dict(from_authors(tensors, dt_transform=options["dt_transform"]))
    return m


def pairs(x):
    return torch.complex(x[..., 0], x[..., 1])


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_authors(stored, name):
    """Outputs, and gradients of their parameters (of C~, where we train C) through the loader."""
    file = case(stored, name)
    m = layer(name, file)
    tensors = parameters(file)
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if not k.endswith("l_kernel")}
    ours = from_authors(tensors, dt_transform=m.dt_transform)
    x = file["x"].clone().requires_grad_()
    y, _ = functional_call(m, ours, (x,))
    assert_close(y, file["y"], "golden32", "y")
    grads = torch.autograd.grad((y * file["dy"]).sum(), [x, *leaves.values()])
    assert_close(grads[0], file["dx"], "golden32", "dx")
    for key, got in zip(leaves, grads[1:], strict=True):
        want = file[f"grad/{key}"]
        if key.endswith("A_imag") and m.basis == "fout":
            got, want = got[..., :-1], want[..., :-1]
        assert error(got, want) < GRADIENT.get(key, 1e-3), key


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_authors(stored, name):
    file = case(stored, name)
    m = layer(name, file)
    assert error(m.kernel(file["x"].shape[1]), file["kernel"]) < KERNEL[name]


@pytest.mark.parametrize("name", [n for n in CASES if n != "bidir_glu"])
def test_steps_and_states_equal_authors(stored, name):
    file = case(stored, name)
    m, half = layer(name, file), file["param/layer.kernel.C"].shape[-2]
    state, ys = None, []
    for t in range(file["x"].shape[1]):
        y, state = m(file["x"][:, t : t + 1], state)
        ys.append(y)
    assert error(torch.cat(ys, 1), file["step_y"]) < 1e-4
    final = torch.view_as_real(pairs(file["final_state"])[..., :half])
    assert_close(state.tensor("s"), final, "golden32", "state")


@pytest.mark.parametrize("name", [n for n in CASES if n != "bidir_glu"])
def test_discrete_system_equals_authors(stored, name):
    """Ours has one of each pair of modes: theirs the conjugates behind them, and a full matrix."""
    file = case(stored, name)
    m = layer(name, file)
    system = m.system(F64)
    full = torch.diag_embed(torch.cat([system.pole, system.pole.conj()], -1))
    left, right, b = (
        torch.cat([x, x.conj()], -1) for x in (system.left, system.right / 2, system.b)
    )
    full = full + left.mT @ right
    for got, key in ((full, "dA"), (b, "dB")):
        assert_close(torch.view_as_real(got), file[key], "golden32", key)
    got, want = m.C.detach(), file["dC"][:, :, : m.C.shape[2]]
    last = -1 if m.basis == "fout" else None
    assert error(got[:, :, :last], want[:, :, :last]) < 1e-3, "dC"


def test_c_is_what_it_was_before_the_first_call(stored):
    """Undoing (I - Abar^L)^T gives the C the authors' layer was initialised with."""
    for name in ("legs", "legt", "bidir_glu"):
        file = case(stored, name)
        at_first = layer(name, file, parameters(file, "init"))
        assert_close(layer(name, file).C, at_first.C, "golden32", name)
    file = case(stored, "legs")
    doubled = parameters(file) | {
        "layer.kernel.C": file["C_after_doubling"],
        "layer.kernel.l_kernel": torch.tensor(64.0),
    }
    assert_close(layer("legs", file, doubled).C, layer("legs", file).C, "golden32", "doubled")
    assert_close(layer("legs", file).kernel(40), file["kernel_len40"], "golden32", "longer")


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_rates_equal_authors(stored, rate):
    """Theirs takes C~ of one step for that of another: the same when C comes from that."""
    file = case(stored, "legs")
    want = file[f"kernel_rate{rate}"]
    tensors = parameters(file) | {"layer.kernel.l_kernel": torch.tensor(want.shape[-1])}
    m = layer("legs", file)
    exact = m.kernel(want.shape[-1], rate)
    m.load_state_dict(from_authors(tensors, dt_transform="exp", rate=rate))
    assert_close(m.kernel(want.shape[-1], rate), want, "golden32", "kernel")
    m.rate = rate
    assert_close(m.kernel(want.shape[-1]), want, "golden32", "rate of the layer")
    assert error(exact, want) < 5e-3, "with the C of rate 1 it is near"


def test_carried_state_equals_authors(stored):
    file = case(stored, "legs")
    m = layer("legs", file)
    first = State(s=torch.view_as_real(pairs(file["state0"])[..., :4]))
    y, state = m(file["x"], first)
    assert_close(y, file["state_y"], "golden32", "y")
    want = torch.view_as_real(pairs(file["state1"])[..., :4])
    assert_close(state.tensor("s"), want, "golden32", "state")


def build(seed=0, d=6, n=16, **options):
    torch.manual_seed(seed)
    return S4(d, d_state=n, activation=None, output=None, dt_range=(0.01, 0.2), **options).double()


def convolve(k, x):
    """sum_l k_l x_{t-l}: k [H, L], x [B, L, H]."""
    out = torch.zeros_like(x)
    for lag in range(x.shape[1]):
        out[:, lag:] += k[:, lag] * x[:, : x.shape[1] - lag]
    return out


BASES = pytest.mark.parametrize("basis", ["legs", "legt", "fout"])


@BASES
@pytest.mark.parametrize("length", [1, 2, 33, 150])
@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_convolutional_view(basis, length, rate):
    """Cauchy sums on a circle give the kernel of the recurrence, for any length and rate."""
    m = build(basis=basis)
    x = torch.randn(2, length, 6, dtype=F64)
    want = convolve(m.kernel(length, rate)[0], x) + m.D * x
    m.rate = rate
    assert_close(m(x)[0], want, "float64", "v")
    assert_close(m.kernel(length), m.kernel(400)[..., :length], "float64", "longer")


@BASES
def test_gradients_of_the_convolutional_view(basis, monkeypatch):
    """Block by block, they are those of the recurrence."""
    m = build(basis=basis, n_ssm=2, rate=1.5)
    weight = torch.randn(1, 6, 70, dtype=F64)
    impulse = torch.zeros(1, 70, 6, dtype=F64)
    impulse[:, 0] = 1
    names = ("inv_dt", "A_real", "A_imag", "B", "P", "C")
    inputs = [m.get_parameter(k) for k in names]
    y, _ = m(impulse)
    want = torch.autograd.grad(((y - m.D * impulse).mT * weight).sum(), inputs)
    for block in (1 << 20, 6 * 8 * 7):
        monkeypatch.setattr(_cauchy, "_BLOCK", block)
        got = torch.autograd.grad((m.kernel(70) * weight).sum(), inputs)
        for name, a, b in zip(names, got, want, strict=True):
            assert_close(a, b, "float64", name)


@BASES
@pytest.mark.parametrize("length", [2, 31, 32, 100])
def test_chunks_equal_the_dense_recurrence(basis, length):
    """The matrices of a chunk, found without a power of a matrix, against the loop."""
    m = build(basis=basis, n=8)
    s = m.system(F64)
    u, state = torch.randn(2, length, 6, dtype=F64), torch.randn(2, 6, 8, dtype=F64)
    want = lti_reference(u, *_cauchy.dense(s), state=state)
    got = _cauchy.dplr_chunked(u, s, state=state)
    for a, b, what in zip(got, want, ("y", "state"), strict=True):
        assert_close(a, b, "float64", what)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_step_equals_the_dense_one(rank):
    torch.manual_seed(0)
    pole, b = torch.randn(2, 4, 5, dtype=torch.complex128)
    left, right = torch.randn(2, 4, rank, 5, dtype=torch.complex128)
    s = _cauchy.Discrete(pole, left, right, b, torch.randn(3, 4, 5, dtype=torch.complex128))
    u, state = torch.randn(2, 4, dtype=F64), torch.randn(2, 4, 5, 2, dtype=F64)
    y, last = lti_reference(u.unsqueeze(1), *_cauchy.dense(s), state=state.flatten(2))
    got = _cauchy.step(_cauchy.stepper(s), u, state)
    assert_close(got[0], y.squeeze(1), "float64", "y")
    assert_close(got[1].flatten(2), last, "float64", "state")


def test_bilinear_discretisation():
    """Woodbury's form against solves with the whole matrix, ranks 1, 2 and 3."""
    torch.manual_seed(0)
    for rank in (1, 2, 3):
        values = -torch.rand(4, 5, dtype=F64) + 3j * torch.randn(4, 5, dtype=F64)
        p = torch.randn(rank, 4, 5, dtype=torch.complex128)
        b, c = torch.randn(2, 4, 5, dtype=torch.complex128)
        dt = torch.rand(4, 1, dtype=F64)
        full = torch.diag_embed(torch.cat([values, values.conj()], -1))
        wide = torch.cat([p, p.conj()], -1).transpose(0, 1)
        full = full - wide.mT @ wide.conj()
        half, eye = dt.unsqueeze(-1) / 2 * full, torch.eye(10)
        want = torch.linalg.solve(eye - half, eye + half)
        s = _cauchy.discretise(values, p, b, c.unsqueeze(0), dt)
        left, right = (torch.cat([x, x.conj()], -1) for x in (s.left, s.right / 2))
        got = torch.diag_embed(torch.cat([s.pole, s.pole.conj()], -1)) + left.mT @ right
        assert_close(torch.view_as_real(got), torch.view_as_real(want), "float64", "Abar")
        drive = torch.cat([b, b.conj()], -1) * dt
        want = torch.linalg.solve(eye - half, drive.unsqueeze(-1))[:, :5, 0]
        assert_close(torch.view_as_real(s.b), torch.view_as_real(want), "float64", "Bbar")


def test_bidirectional_is_two_kernels():
    m = build(bidirectional=True, channels=1)
    x = torch.randn(2, 40, 6, dtype=F64)
    past, future = m.kernel(40)
    mirrored = convolve(future, x.flip(1)).flip(1)
    want = convolve(past, x) + m.D * x
    want[:, :-1] += mirrored[:, 1:]
    y, state = m(x)
    assert_close(y, want, "float64", "y")
    assert len(state) == len(m.init_state(2)) == 0
    cu = torch.tensor([0, 1, 14, 40])
    packed, _ = m(x[:1], cu_seqlens=cu)
    for a, b in ((0, 1), (1, 14), (14, 40)):
        assert_close(packed[:, a:b], m(x[:1, a:b])[0], "float64", f"tokens {a} to {b}")
    with pytest.raises(ValueError, match="no state"):
        m(x, State(s=torch.zeros(2, 6, 8, 2, dtype=F64)))


def test_channels_and_copies():
    """Channels are the slower index of out_proj's inputs; feature h uses copy h mod n_ssm."""
    m = build(channels=1, n_ssm=2)
    with torch.no_grad():
        for p in (m.A_imag, m.B, m.P):
            p.add_(torch.randn_like(p))
        m.inv_dt.fill_(-3)
        m.C.copy_(m.C[:, :1].expand_as(m.C))
    k = m.kernel(20)
    assert_close(k[:, 2:4], k[:, :2], "float64", "copies")
    assert error(k[:, 1], k[:, 0]) > 1e-2
    torch.manual_seed(0)
    m = S4(6, d_state=8, channels=3, activation=None, output="linear").double()
    x = torch.randn(1, 9, 6, dtype=F64)
    v = torch.stack([convolve(k, x) for k in m.kernel(9)], 2) + x.unsqueeze(2) * m.D
    assert_close(m(x)[0], m.out_proj(v.flatten(2)), "float64", "y")


@BASES
def test_initial_values(basis):
    torch.manual_seed(0)
    m = S4(64, d_state=16, basis=basis, n_ssm=4, dt_range=(1e-3, 0.1))
    dt = m.step_sizes(torch.float32)
    assert 1e-3 * 0.999 <= dt.min() < 3e-3
    assert 0.03 < dt.max() <= 0.1 * 1.001
    values, p, b = nplr(basis, 16)
    real = (-values.real).clamp(min=1e-4)
    assert_close(m.A_real[2].exp(), real, "float32", "Re")
    assert_close(m.A_imag[3], (-values.imag).clamp(min=1e-4), "float32", "Im")
    assert_close(m.P[:, 1], torch.view_as_real(p), "float32", "P")
    assert b.imag.abs().max() > 2 or basis != "legs"
    assert_close(m.B[1, :, 1], b.imag.clamp(-2, 2), "float32", "clipped")
    free = S4(64, d_state=16, basis=basis, n_ssm=4, b_clip=None)
    assert_close(free.B[1], torch.view_as_real(b), "float32", "B")
    assert abs(m.C.std() - math.sqrt(0.5)) < 0.03


def test_learning_rates():
    names = {"inv_dt", "A_real", "A_imag", "B", "P"}
    assert S4(4).lr_limit == dict.fromkeys(names, 1e-3)
    assert S4(4, max_lr=None).lr_limit == {}
    assert set(S4.no_weight_decay) == names


@BASES
def test_float32_holds_over_long_sequences(basis):
    """Thousands of tokens, states carried; the dead mode of fout does no harm."""
    m = build(d=4, n=64, basis=basis)
    x = torch.randn(1, 3000, 4, dtype=F64)
    want, final = m(x)
    m = m.float()
    with torch.no_grad():
        y1, state = m(x[:, :1500].float())
        y2, state = m(x[:, 1500:].float(), state)
    assert_close(torch.cat([y1, y2], 1), want, "float32", "y")
    assert_close(state.tensor("s"), final.tensor("s"), "float32", "state")


def test_decoding_follows_the_parameters():
    """The discrete system is kept between tokens, but never that of other parameters."""
    m, x = build(), torch.randn(1, 4, 6, dtype=F64)
    with torch.no_grad():
        _, state = m(x)
        before, _ = m(x[:, :1], state)
        assert m.system(F64) is m.system(F64)
        m.inv_dt.add_(0.5)
        after, _ = m(x[:, :1], state)
        assert error(after, before) > 1e-3
        m.rate = 2.0
        assert error(m(x[:, :1], state)[0], after) > 1e-3
    whole, _ = m(x)
    assert whole.requires_grad
    _, s = m(x[:, :2])
    with torch.no_grad():
        y3, _ = m(x[:, 2:3], s)
    assert_close(y3, whole[:, 2:3], "float64", "after both")


@pytest.mark.parametrize("tie", [False, True])
def test_dropout(tie):
    torch.manual_seed(0)
    m = build(d=64, dropout=0.5, tie_dropout=tie)
    x = torch.randn(1, 30, 64, dtype=F64)
    y, _ = m(x, cu_seqlens=torch.tensor([0, 10, 30]))
    zero = y[0] == 0
    assert 0.3 < zero.double().mean() < 0.7
    for part in (zero[:10], zero[10:]):
        assert torch.equal(part.all(0), part.any(0)) == tie
    assert not torch.equal(zero[0], zero[10])
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])


def test_wrong_settings_are_refused():
    for options, words in (
        ({"basis": "lagt"}, "legs, legt, fout"),
        ({"d_state": 7}, "even"),
        ({"n_ssm": 5}, "divide"),
        ({"dt_transform": "relu"}, "softplus or exp"),
        ({"output": "mlp"}, "glu"),
        ({"output": None, "channels": 2}, "channels=1"),
        ({"activation": "relu"}, "gelu"),
    ):
        with pytest.raises(ValueError, match=words):
            S4(8, **options)
