"""Mamba against the authors' layer; its windows, steps, precision and initialisation."""

from itertools import pairwise

import pytest
import torch
from helpers import assert_close, golden
from torch.nn import functional as F

from longscan.mixers.mamba import Mamba
from longscan.ops.norm import rms_norm
from longscan.ops.selective import selective_reference
from longscan.state import State

CASES = {"base": ({"d_state": 4}, 4), "short": ({"d_state": 16}, 2)}


def _layer(case, dtype=torch.float64):
    file = {
        k[len(case) + 1 :]: v.to(dtype)
        for k, v in golden("mamba/mamba_layer").items()
        if k.startswith(case + "/")
    }
    layer = Mamba(file["x"].shape[-1], **CASES[case][0]).to(dtype)
    layer.load_state_dict({k[6:]: v for k, v in file.items() if k.startswith("param/")})
    return layer, file


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_outputs_and_gradients(case, backend, monkeypatch):
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    layer, file = _layer(case)
    x = file["x"].requires_grad_()
    y, _ = layer(x)
    assert_close(y, file["y"], "golden32", "y")
    (y * file["dy"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, file["dx"], "golden32", "dx")
    for name, p in layer.named_parameters():
        assert p.grad is not None
        assert_close(p.grad, file[f"grad/{name}"], "golden32", name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prefill_and_decode(case, dtype):
    layer, file = _layer(case, dtype)
    k = CASES[case][1]
    y, state = layer(file["x"][:, :k])
    assert_close(y, file[f"prefill{k}/y"], "golden32", "prefill")
    # Theirs keeps d_conv inputs, of which the next token needs the last d_conv - 1.
    window = file[f"prefill{k}/conv_state"].mT[:, 1:]
    assert_close(state["conv"], window, "golden32", "window")
    assert_close(state["ssm"], file[f"prefill{k}/ssm_state"], "golden32", "state")
    steps, now = [], state
    for t in range(k, file["x"].shape[1]):
        y, now = layer(file["x"][:, t : t + 1], now)
        steps.append(y)
    assert_close(torch.cat(steps, 1), file["decode_y"], "golden32", "decode")
    for got in (now, layer(file["x"][:, k:], state)[1]):
        assert_close(got["conv"], file["final_conv_state"].mT[:, 1:], "golden32", "final window")
        assert_close(got["ssm"], file["final_ssm_state"], "golden32", "final state")


@pytest.mark.parametrize(
    "options",
    [{}, {"bcdt_norm_eps": 1e-6}, {"conv_bias": False, "bias": True, "dt_rank": 3, "d_conv": 1}],
    ids=str,
)
def test_variants_equal_the_definition(options):
    torch.manual_seed(0)
    m = Mamba(16, d_state=4, **options).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    u, z = m.in_proj(x).chunk(2, -1)
    padded = F.pad(u, (0, 0, m.conv1d.weight.shape[-1] - 1, 0)).mT
    u = F.silu(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=32)).mT
    rank = m.dt_proj.in_features
    parts = m.x_proj(u).split([rank, 4, 4], -1)
    if "bcdt_norm_eps" in options:
        parts = [rms_norm(t, None, 1e-6) for t in parts]
    dt = F.softplus(parts[0] @ m.dt_proj.weight.T + m.dt_proj.bias)
    y, _ = selective_reference(u, dt, -m.A_log.exp(), parts[1], parts[2])
    want = m.out_proj((y + m.D * u) * F.silu(z)).detach()
    got, last = m(x)
    assert_close(got, want, "float64", "y")
    # One token at a time, from an explicit empty state and from none, and in two pieces.
    for state in (None, m.init_state(2)):
        steps = []
        for t in range(9):
            y, state = m(x[:, t : t + 1], state)
            steps.append(y)
        assert_close(torch.cat(steps, 1), want, "float64", "steps")
    first, state = m(x[:, :2])
    second, state = m(x[:, 2:], state)
    assert_close(torch.cat([first, second], 1), want, "float64", "split")
    for name in ("conv", "ssm"):
        assert_close(state[name], last[name].detach(), "float64", name)


def test_packed_equals_separate():
    torch.manual_seed(1)
    m = Mamba(8, d_state=4).double()
    bounds = [0, 1, 6, 8, 20]
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    start = m.init_state(4).map(torch.randn_like)
    y, state = m(x, start, cu_seqlens=torch.tensor(bounds))
    for i, (a, b) in enumerate(pairwise(bounds)):
        alone, last = m(x[:, a:b], start.select(i))
        assert_close(y[:, a:b], alone.detach(), "float64", "y")
        for name in ("conv", "ssm"):
            assert_close(state[name][i : i + 1], last[name].detach(), "float64", name)
    (grad,) = torch.autograd.grad(y[:, 6:8].sum(), x)
    assert grad[:, 6:8].any()
    assert not grad[:, :6].any()
    assert not grad[:, 8:].any()


def test_states_carry_gradients():
    """Gradients through the carried state equal those of the whole sequence."""
    torch.manual_seed(2)
    m = Mamba(8, d_state=4).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(m(x)[0].square().sum(), x)
    for cuts in ([3, 4], [1] * 7):
        state, total = None, torch.zeros((), dtype=torch.float64)
        for part in x.split(cuts, 1):
            y, state = m(part, state)
            total = total + y.square().sum()
        (got,) = torch.autograd.grad(total, x)
        assert_close(got, want, "float64", "dx")


def test_initialisation():
    torch.manual_seed(3)
    m = Mamba(64)
    assert m.dt_proj.in_features == 4
    assert torch.allclose(m.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert (m.D == 1).all()
    dt = F.softplus(m.dt_proj.bias)
    assert 1e-3 <= dt.min() < 3e-3
    assert 3e-2 < dt.max() <= 0.1 + 1e-6
    assert 0.4 < m.dt_proj.weight.abs().max() <= 0.5
    names = {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
        "dt_proj.bias", "A_log", "D", "out_proj.weight",
    }  # fmt: skip
    assert {n for n, _ in m.named_parameters()} == names
    with pytest.raises(ValueError, match="dt_rank"):
        Mamba(16, dt_rank="half")


def test_bfloat16_keeps_sensitive_parameters():
    torch.manual_seed(4)
    m = Mamba(16)
    x = torch.randn(1, 6, 16)
    want, _ = m(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = m(x)
        step, _ = m(x[:, :1], m.init_state(1))
    assert state.tensor("ssm").dtype == torch.float32
    assert (y.float() - want).abs().max() < 0.03 * want.abs().max()
    assert (step.float() - want[:, :1]).abs().max() < 0.03 * want.abs().max()
    bias = m.dt_proj.bias.detach().clone()
    m = m.bfloat16()
    wide = {n for n, p in m.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_proj.bias"}
    assert torch.equal(m.dt_proj.bias, bias)
    y, state = m(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.tensor("ssm").dtype == torch.float32
    y, state = m(x[:, :1].bfloat16(), state)
    assert y.dtype == torch.bfloat16
    assert state.tensor("ssm").dtype == torch.float32
    y.float().sum().backward()
    assert m.dt_proj.bias.grad is not None
    assert m.init_state(2).tensor("ssm").dtype == torch.float32


@pytest.mark.slow
def test_compiles_whole():
    """torch.compile finds one graph for training, and for a step with its state."""
    torch.manual_seed(5)
    m = Mamba(16, d_state=4)
    x = torch.randn(2, 40, 16)
    fast = torch.compile(m, fullgraph=True, backend="aot_eager")
    results = []
    for run in (m, fast):
        a = x.clone().requires_grad_()
        y, state = run(a)
        (y.square().sum() + state.tensor("ssm").sum()).backward()
        step, _ = run(x[:, :1], State({k: v.detach() for k, v in state.flatten().items()}))
        results.append([y, a.grad, step])
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want.detach(), "float32", "compiled")
