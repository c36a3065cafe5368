"""The RWKV mixers against their equations, token by token; shifts, values shared by layers."""

import math

import pytest
import torch
from helpers import assert_close
from torch.nn import functional as F

from longscan.mixers.rwkv4 import RWKV4
from longscan.mixers.rwkv5 import RWKV5
from longscan.mixers.rwkv7 import RWKV7
from longscan.mixers.rwkv_channel_mix import RWKVChannelMix

F64 = torch.float64
D, T = 16, 21


def build(cls, **settings):
    """A float64 mixer off its initial values, where several are zero."""
    torch.manual_seed(0)
    m = cls(D, **settings).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def tokens(rows=2, length=T, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, D, dtype=F64, generator=g)


def mixed(m, x):
    """For each token, the inputs of the projections: x_t + (x_{t-1} - x_t) mu."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return [x + (before - x) * mu for mu in m.mu]


def test_rwkv7_is_its_equations():
    m = build(RWKV7, d_head=4, value_residual=True)
    x, first = tokens(), tokens(seed=2)
    xr, xw, xk, xv, xa, xg = mixed(m, x)
    r, k, v = m.r_proj(xr), m.k_proj(xk), m.v_proj(xv)
    w = torch.exp(-0.606531 * torch.sigmoid(m.w0 + m.w_up(torch.tanh(m.w_down(xw)))))
    a = torch.sigmoid(m.a0 + m.a_up(m.a_down(xa)))
    v = v + (first - v) * torch.sigmoid(m.v0 + m.v_up(m.v_down(xv)))
    kappa = F.normalize((k * m.k_k).unflatten(-1, (4, 4)), dim=-1)
    k = k * (1 + (a - 1) * m.k_a)
    r, k, v, w, a = (t.unflatten(-1, (4, 4)) for t in (r, k, v, w, a))
    s, out = torch.zeros(2, 4, 4, 4, dtype=F64), []  # [value, key], as the authors write it
    for t in range(T):
        replaced = torch.einsum("bhvk,bhk->bhv", s, kappa[:, t])
        s = s * w[:, t].unsqueeze(-2)
        s = s - torch.einsum("bhv,bhk->bhvk", replaced, kappa[:, t] * a[:, t])
        s = s + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        out.append(torch.einsum("bhvk,bhk->bhv", s, r[:, t]).flatten(1))
    o = F.group_norm(torch.stack(out, 1).flatten(0, 1), 4, m.norm.weight, m.norm.bias, 64e-5)
    o = o.view(2, T, D) + ((r * k * m.r_k).sum(-1, keepdim=True) * v).flatten(-2)
    want = m.out_proj(o * m.g_up(torch.sigmoid(m.g_down(xg))))
    y, state, passed = m.mix(x, first=first)
    assert passed is first
    # The paper rounds e^-0.5 to six digits.
    assert (y - want).abs().max() < 1e-5 * want.abs().max()
    assert (state.tensor("s").mT - s).abs().max() < 1e-5 * s.abs().max()


def test_rwkv7_shares_the_first_layers_value():
    m, x = build(RWKV7, value_residual=True), tokens()
    y, _, first = m.mix(x)
    assert_close(first, m.v_proj(mixed(m, x)[3]), "float64", "its own value")
    assert torch.equal(y, m(x)[0])
    other = tokens(seed=2).requires_grad_()
    z, _, _ = m.mix(x, first=other)
    assert (z - y).abs().max() > 1e-3
    names = ["v0", "v_down.weight", "v_up.weight"]
    grads = torch.autograd.grad(z.square().sum(), [other, *(m.get_parameter(n) for n in names)])
    assert all(g.abs().max() > 0 for g in grads)
    a, state, _ = m.mix(x[:, :8], first=other[:, :8])
    b, _, _ = m.mix(x[:, 8:], state, first=other[:, 8:])
    assert_close(torch.cat([a, b], 1), z, "float64", "in two parts")
    with pytest.raises(ValueError, match="first must have shape"):
        m.mix(x, first=other[:, 1:])


def test_rwkv7_without_value_residual_passes_the_first_value_on():
    for m in (build(RWKV7), build(RWKV7, value_residual=True, layer=0, n_layers=2)):
        assert m.v0 is None
        x, first = tokens(), tokens(seed=2)
        y, _, passed = m.mix(x, first=first)
        assert passed is first
        assert torch.equal(y, m(x)[0])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_rwkv5_is_its_equations(per_channel, gate):
    m = build(RWKV5, d_head=8, decay_per_channel=per_channel, output_gate=gate)
    x = tokens()
    xr, xk, xv, *xg = mixed(m, x)
    r, k, v = (
        p(t).unflatten(-1, (2, 8)) for p, t in ((m.r_proj, xr), (m.k_proj, xk), (m.v_proj, xv))
    )
    w, u = (
        t.unsqueeze(-1) if per_channel else t[:, None, None]
        for t in ((-m.time_decay.exp()).exp(), m.u)
    )
    s, out = torch.zeros(2, 2, 8, 8, dtype=F64), []
    for t in range(T):
        kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s + u * kv).flatten(1))
        s = w * s + kv
    # The authors divide by 8 and use eps 1e-5.
    scaled = torch.stack(out, 1).flatten(0, 1) / 8
    o = F.group_norm(scaled, 2, m.norm.weight, m.norm.bias, 1e-5).view(2, T, D)
    want = m.out_proj(o * F.silu(m.g_proj(xg[0])) if gate else o)
    y, state = m(x)
    assert_close(y, want, "float64", "y")
    assert_close(state.tensor("s"), s, "float64", "state")


def test_rwkv4_is_its_equations():
    m, x = build(RWKV4), tokens()
    xr, xk, xv = mixed(m, x)
    r, k, v = torch.sigmoid(m.r_proj(xr)), m.k_proj(xk), m.v_proj(xv)
    num = den = torch.zeros(2, D, dtype=F64)
    out = []
    for t in range(T):
        now = (m.u + k[:, t]).exp()
        out.append((num + now * v[:, t]) / (den + now))
        weight, kept = k[:, t].exp(), (-m.time_decay.exp()).exp()
        num, den = kept * num + weight * v[:, t], kept * den + weight
    y, state = m(x)
    assert_close(y, m.out_proj(r * torch.stack(out, 1)), "float64", "y")
    sums = state.tensor("s") * state.tensor("m").exp().unsqueeze(-1)
    assert_close(sums, torch.stack([num, den], -1), "float64", "state")


@pytest.mark.parametrize("gated", [True, False])
def test_channel_mix_is_its_equations(gated):
    m, x = build(RWKVChannelMix, gated=gated, d_ff=24), tokens()
    xk, *xr = mixed(m, x)
    want = F.linear(F.relu(F.linear(xk, m.k_proj.weight)) ** 2, m.out_proj.weight)
    if gated:
        want = want * torch.sigmoid(F.linear(xr[0], m.r_proj.weight))
    y, state = m(x)
    assert_close(y, want, "float64", "y")
    assert torch.equal(state.tensor("shift"), x[:, -1:])


@pytest.mark.parametrize("cls", [RWKV4, RWKV5, RWKV7, RWKVChannelMix])
def test_initial_values_follow_the_depth(cls):
    """Mixes fall over the channels from 1 (the previous token), slower in later layers."""
    first, last = cls(64, layer=0, n_layers=5), cls(64, layer=4, n_layers=5)
    unknown = cls(64)
    for m in (first, unknown):
        assert (m.mu[:, 0] == 1).all()
        assert (m.mu.diff(dim=1) < 0).all()
    assert torch.equal(first.mu, unknown.mu)
    assert (last.mu[:, 1:] < first.mu[:, 1:]).all()
    assert first.out_proj.weight.abs().max() == 0, "a fresh layer adds nothing"


def test_initial_decays():
    """The ranges of the authors' code."""
    seven = RWKV7(128, layer=3, n_layers=4)
    log_w = -math.exp(-0.5) * torch.sigmoid(seven.w0)
    assert -0.6066 < log_w.min() < -0.55
    assert log_w.max() > -3e-4
    assert_close(seven.w0[[0, 127]], torch.tensor([-8.0, 3.0]), "float32", "w0")
    assert_close(seven.a0[[0, 127]], torch.tensor([-0.69, 0.31]), "float32", "a0")
    assert [seven.w_down.out_features, seven.g_down.out_features] == [32, 32]
    assert (seven.norm.weight == 1).all()
    assert_close(RWKV7(64, layer=1, n_layers=4).norm.weight[0], torch.tensor(0.5**0.7), "float32")
    five, four = RWKV5(128), RWKV4(128)
    assert_close(five.time_decay.flatten()[[0, 127]], torch.tensor([-6.0, -1.0]), "float32")
    assert_close(four.time_decay[[0, 127]], torch.tensor([-5.0, 3.0]), "float32")


def test_bad_settings_say_what_to_do():
    for cls in (RWKV5, RWKV7):
        with pytest.raises(ValueError, match="must divide d_model"):
            cls(64, d_head=48)
        assert cls(96).d_head == 32
    with pytest.raises(ValueError, match="counts from 0"):
        RWKV4(32, layer=2, n_layers=2)
    with pytest.raises(ValueError, match="or neither"):
        RWKVChannelMix(32, layer=2)
    m = RWKVChannelMix(32)
    with pytest.raises(ValueError, match="shift must have shape"):
        m(torch.zeros(2, 3, 32), m.init_state(1))
