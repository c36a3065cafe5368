"""The decay and delta ops against golden vectors: outputs, states and all gradients."""

import pytest
import torch
from helpers import assert_close, golden
from torch.nn import functional as F

from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.ops.norm import l2_norm


def _inputs(file):
    return {k[3:]: v.double().requires_grad_() for k, v in file.items() if k.startswith("in_")}


def _check(file, inputs, outputs):
    loss = torch.zeros((), dtype=torch.float64)
    for name, value in outputs.items():
        assert_close(value, file[f"out_{name}"], "golden64", name)
        loss = loss + (value * file[f"cot_{name}"]).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        assert_close(grad, file[f"grad_{name}"], "golden64", f"d{name}")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["div16_T64", "div16_T37_h0", "stronggate_T50_h0"])
def test_gla(case, backend):
    file = golden(f"gla/op_{case}")
    x = _inputs(file)
    q = x["q"] * x["q"].shape[-1] ** -0.5
    o, ht = decay(q, x["k"], x["v"], x["gk"], state=x.get("h0"), backend=backend, chunk=16)
    _check(file, x, {"o": o, "ht": ht})


def _unit(x):
    return l2_norm(x["q"], scale=x["q"].shape[-1] ** -0.5), l2_norm(x["k"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["T64", "T37_h0", "neg_T50_h0"])
def test_delta_rule(case, backend):
    file = golden(f"deltanet/op_delta_rule_{case}")
    x = _inputs(file)
    o, ht = delta(*_unit(x), x["v"], x["beta"], state=x.get("h0"), backend=backend)
    _check(file, x, {"o": o, "ht": ht})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["T64", "T75_h0", "gva_T40_h0"])
def test_gated_delta_rule(case, backend):
    file = golden(f"deltanet/op_gated_delta_rule_{case}")
    x = _inputs(file)
    g = -x["A_log"].exp() * F.softplus(x["a"] + x["dt_bias"])
    beta = x["b"].sigmoid()
    o, ht = delta(*_unit(x), x["v"], beta, g, state=x.get("h0"), backend=backend)
    _check(file, x, {"o": o, "ht": ht, "g": g, "beta": beta})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["T64", "T37_h0", "gva_lb5_T40_h0"])
def test_kda(case, backend):
    file = golden(f"deltanet/op_kda_{case}")
    x = _inputs(file)
    raw = x["f"] + x["dt_bias"].view(x["f"].shape[2:])
    a = x["A_log"].exp().unsqueeze(-1)
    g = -5 * (a * raw).sigmoid() if "lb5" in case else -a * F.softplus(raw)
    beta = x["b"].sigmoid()
    o, ht = delta(*_unit(x), x["v"], beta, g, state=x.get("h0"), backend=backend)
    _check(file, x, {"o": o, "ht": ht, "g": g})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("case", "n"), [("n2_T32", 2), ("n2_gate_T33_h0", 2), ("n3_T21_h0", 3)])
def test_deltaproduct(case, n, backend):
    file = golden(f"deltaproduct/op_{case}")
    x = _inputs(file)
    q, k = _unit(x)
    k, v, beta = (t.unflatten(1, (-1, n)) for t in (k, x["v"], x["beta"]))
    o, ht = delta(q, k, v, beta, x.get("g"), state=x.get("h0"), backend=backend)
    _check(file, x, {"o": o, "ht": ht})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["c4", "c8_noinit"])
def test_ssd(case, backend):
    file = {k.split("/")[1]: v for k, v in golden("mamba/ssd").items() if k.startswith(case + "/")}
    names = {"X": "X", "A": "A", "B": "B", "C": "C"}
    if "initial_state" in file:
        names["initial_state"] = "initial_state"
    x = {n: file[n].requires_grad_() for n in names}
    h0 = x["initial_state"].mT if "initial_state" in x else None
    y, s = decay(x["C"], x["B"], x["X"], x["A"], state=h0, backend=backend, chunk=8)
    assert_close(y, file["Y"], "golden64", "Y")
    assert_close(s.mT, file["final_state"], "golden64", "final_state")
    loss = (y * file["dY"]).sum() + (s.mT * file["dfinal_state"]).sum()
    for name, grad in zip(x, torch.autograd.grad(loss, list(x.values())), strict=True):
        assert_close(grad, file[f"grad_{name}"], "golden64", f"d{name}")


@pytest.mark.parametrize("case", ["g1", "g2z"])
def test_ssd_with_groups(case):
    every = golden("mamba/ssd")
    file = {k.split("/")[1]: v for k, v in every.items() if k.startswith(case + "/")}
    x = {k: file[k].double().requires_grad_() for k in file if f"grad_{k}" in file}
    dt = F.softplus(x["dt"] + x["dt_bias"])
    u = x["x"]
    o, s = decay(x["C"], x["B"], u * dt.unsqueeze(-1), dt * x["A"])
    y = o + u * x["D"].view(u.shape[2], -1)
    if "z" in x:
        y = y * F.silu(x["z"])
    assert_close(y, file["y"], "golden32", "y")
    assert_close(s.mT, file["final_state"], "golden32", "final_state")
    grads = torch.autograd.grad((y * file["dy"]).sum(), list(x.values()))
    for name, grad in zip(x, grads, strict=True):
        assert_close(grad, file[f"grad_{name}"], "golden32", f"d{name}")
    assert len(x) >= 6
