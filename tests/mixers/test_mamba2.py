"""Mamba-2 against the authors' layer, and its variants against the definition."""

import pytest
import torch
from helpers import assert_close, golden
from torch.nn import functional as F

from longscan.mixers.mamba2 import Mamba2
from longscan.ops.norm import rms_norm

CASES = {
    "base": {"d_state": 8, "d_head": 8},
    "g2": {"d_state": 4, "d_head": 4, "n_groups": 2},
}


def _layer(case):
    file = {
        k[len(case) + 1 :]: v.double()
        for k, v in golden("mamba/mamba2_layer").items()
        if k.startswith(case + "/")
    }
    layer = Mamba2(file["x"].shape[-1], **CASES[case]).double()
    layer.load_state_dict({k[6:]: v for k, v in file.items() if k.startswith("param/")})
    return layer, file


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
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


def test_prefill_and_decode():
    layer, file = _layer("base")
    y, state = layer(file["x"][:, :4])
    assert_close(y, file["prefill4/y"], "golden32", "prefill")
    assert_close(state["s"].mT, file["prefill4/ssm_state"], "golden32", "state")
    window = file["prefill4/conv_state"].mT
    assert_close(state["conv"], window[:, 1:], "golden32", "window")
    steps = []
    for t in range(4, file["x"].shape[1]):
        y, state = layer(file["x"][:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), file["decode_y"], "golden32", "decode")
    assert_close(state["s"].mT, file["final_ssm_state"], "golden32", "final state")
    assert_close(state["conv"], file["final_conv_state"].mT[:, 1:], "golden32", "final window")


@pytest.mark.parametrize(
    "options",
    [
        {"d_ssm": 16},
        {"norm": False},
        {"norm_before_gate": True, "n_groups": 2},
        {"skip_per_channel": True},
        {"dt_limit": (0.01, 0.05)},
    ],
    ids=str,
)
def test_variants_equal_the_definition(options):
    torch.manual_seed(0)
    m = Mamba2(16, d_state=4, d_head=8, **options).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    inner, d, g, h = 32, m.d_ssm, m.n_groups, m.n_heads
    z0, x0, z, xbc, dt = m.in_proj(x).split([inner - d, inner - d, d, d + 8 * g, h], -1)
    padded = F.pad(xbc, (0, 0, 3, 0)).mT
    xbc = F.silu(F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=padded.shape[1])).mT
    u, b, c = xbc.split([d, 4 * g, 4 * g], -1)
    dt = F.softplus(dt + m.dt_bias).clamp(*options.get("dt_limit", (0, float("inf"))))
    u = u.unflatten(-1, (h, 8))
    b, c = (t.unflatten(-1, (g, 4)).repeat_interleave(h // g, 2) for t in (b, c))
    s = torch.zeros(2, h, 4, 8, dtype=x.dtype)
    ys = []
    for t in range(9):
        a = torch.exp(-m.A_log.exp() * dt[:, t])
        s = a[..., None, None] * s + torch.einsum("bhn,bhp,bh->bhnp", b[:, t], u[:, t], dt[:, t])
        ys.append(torch.einsum("bhn,bhnp->bhp", c[:, t], s) + m.D.view(h, -1) * u[:, t])
    y = torch.stack(ys, 1).flatten(-2)

    def norm(t):
        assert m.norm is not None
        return rms_norm(t.unflatten(-1, (g, -1)), None, 1e-5).flatten(-2) * m.norm.weight

    if options.get("norm") is False:
        y = y * F.silu(z)
    elif options.get("norm_before_gate"):
        y = norm(y) * F.silu(z)
    else:
        y = norm(y * F.silu(z))
    want = m.out_proj(torch.cat([F.silu(z0) * x0, y], -1))
    got, _ = m(x)
    assert_close(got, want.detach(), "float64", "y")
    # The step form obeys the same limits and groups.
    state, steps = None, []
    for t in range(9):
        y, state = m(x[:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), want.detach(), "float64", "steps")


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="d_ssm"):
        Mamba2(16, d_ssm=20, d_head=8)
    with pytest.raises(ValueError, match="n_groups"):
        Mamba2(16, d_head=8, n_groups=3)
