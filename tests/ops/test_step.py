"""One fused token: the same as the mixers' own forms, which take any number of tokens.

As a program: the kernels in Triton's interpreter, which it chooses when it is imported.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from longscan.ops import _step_fused, dispatch
from longscan.ops import step as ops
from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.ops.mlstm import mlstm
from longscan.registry import mixer_class

GROUPED = {"n_heads": 2, "n_value_heads": 4, "d_key": 12, "d_value": 20}
CASES = {
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet grouped": ("gated_deltanet", {**GROUPED, "negative_eigenvalues": True}),
    "deltanet": ("deltanet", {}),
    "deltanet without conv": ("deltanet", {"d_conv": 0, "output_gate": True}),
    "kda": ("kda", {}),
    "kda bounded": ("kda", {"gate_floor": -5.0, "n_heads": 2, "n_value_heads": 4}),
    "gla": ("gla", {}),
    "gla shared": ("gla", {"n_kv_heads": 2, "d_conv": 4, "gate_floor": -0.1}),
    "retention": ("retention", {}),
    "retention with conv": ("retention", {"d_conv": 4}),
    "linear_attention": ("linear_attention", {}),
    "linear_attention with conv": ("linear_attention", {"d_conv": 3}),
    "mamba2": ("mamba2", {"d_state": 32, "d_head": 16}),
    "mamba2 grouped": (
        "mamba2",
        {"d_state": 16, "d_head": 8, "n_groups": 2, "skip_per_channel": True, "d_ssm": 64,
         "dt_limit": (0.01, 0.05), "norm_before_gate": True},
    ),
    "mamba": ("mamba", {}),
    "mamba normed": ("mamba", {"d_state": 5, "bcdt_norm_eps": 1e-6, "conv_bias": False}),
    "mlstm": ("mlstm", {}),
    "mlstm_large": ("mlstm_large", {}),
    "slstm": ("slstm", {"d_conv": 4}),
}  # fmt: skip
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def enable(set_attribute):
    """As though the kernels' machine were here: what `step` may do, it does."""
    set_attribute(dispatch, "KERNELS", ("step",))


def build(name, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    kind, settings = CASES[name]
    m = mixer_class(kind)(64, **settings).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m.to(device, dtype)


def error(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def compare(name, dtype, device="cpu"):
    """Largest relative errors of outputs and states: three tokens by steps, and as one piece."""
    m = build(name, dtype, device)
    exact = build(name, torch.float64, device)
    exact.load_state_dict(m.state_dict())
    x = torch.randn(3, 7, 64).to(device, dtype)
    with torch.no_grad():
        _, state = m(x[:, :4])
        doubles = {
            k: t.double() if t.is_floating_point() else t for k, t in state.flatten().items()
        }
        want, end = exact(x[:, 4:].double(), type(state).unflatten(doubles))
        ys = []
        for t in range(4, 7):
            y, state = m(x[:, t : t + 1], state)
            ys.append(y)
    found = {"y": error(torch.cat(ys, 1), want)}
    return found | {k: error(t, end.flatten()[k]) for k, t in state.flatten().items()}


def token(q, k, v, s, log_a, rule=None, **more):
    """`step` as the op has its arguments: o, s and m."""
    kind = "logsigmoid" if isinstance(rule, _step_fused.Exponential) else "given"
    decay = _step_fused.Decay(kind, log_a[:, 0])
    done = ops.step(q[:, 0], k[:, 0], v[:, 0], s, decay=decay, rule=rule, **more)
    return done.o.unsqueeze(1), done.s, done.m


def compare_op(name, dtype, device="cpu"):
    """The same of the ops themselves, at one token."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(device)

    q, k, v = (draw(3, 1, h, d).to(dtype) for h, d in ((2, 20), (2, 20), (4, 12)))
    s, f, i = draw(3, 4, 20, 12 + (name == "mlstm")), draw(3, 1, 4), draw(3, 1, 4)
    log_a = -draw(3, 1, 4, *([20] if "keys" in name else [])).exp()
    wide = [x.double() for x in (q, k, v)]
    if name == "mlstm":
        q, k = (x.repeat_interleave(2, 2) for x in (q, k))
        wide = [x.double() for x in (q, k, v)]
        m = draw(3, 4, 1)
        want, (ws, wm) = mlstm(*wide, i.double(), f.double(), state=(s.double(), m.double()))
        rule = _step_fused.Exponential(i[:, 0], m)
        got = token(q, k, v, s, f, rule, divide=True)
        return {"o": error(got[0], want), "s": error(got[1], ws), "m": error(got[2], wm)}
    if "delta" in name:
        beta = draw(3, 1, 4).sigmoid()
        want, end = delta(*wide, beta.double(), log_a.double(), state=s.double())
        got = token(q, k, v, s, log_a, _step_fused.Delta(beta[:, 0]))
    else:
        want, end = decay(*wide, log_a.double(), state=s.double())
        got = token(q, k, v, s, log_a)
    assert got[0].shape == want.shape
    return {"o": error(got[0], want), "s": error(got[1], end)}


OPS = ("decay", "decay keys", "delta", "delta keys", "mlstm")


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_what_the_mixers_do(name, monkeypatch):
    enable(monkeypatch.setattr)
    monkeypatch.setattr(dispatch, "fused", lambda op, x: op == "step")
    calls = []
    real = ops.step_torch
    monkeypatch.setattr(ops, "step_torch", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = compare(name, torch.float64)
    assert max(found.values()) < 1e-12
    assert len(calls) == (0 if name.startswith(("mamba normed", "slstm")) or name == "mamba" else 3)


def test_gradients_take_the_mixers_own_way(monkeypatch):
    enable(monkeypatch.setattr)
    monkeypatch.setattr(dispatch, "fused", lambda op, x: op == "step")
    monkeypatch.setattr(ops, "step_torch", lambda *a, **k: pytest.fail("has no gradients"))
    m = build("gated_deltanet")
    _, state = m(torch.randn(2, 3, 64).double())
    y, _ = m(torch.randn(2, 1, 64).double(), state)
    y.sum().backward()
    assert all(p.grad is not None for p in m.parameters())


def test_a_new_state_lies_where_its_twin_does():
    s = torch.zeros(2, 3)
    new = torch.zeros(2, 3)
    assert _step_fused._new(s).data_ptr() not in (s.data_ptr(), new.data_ptr())
    with ops.twins([(s, new)]):
        assert _step_fused._new(s) is new
    assert _step_fused._new(s) is not new


@cache
def interpreted():
    """What this file prints as a program."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", [*CASES, *OPS])
def test_in_the_interpreter(name):
    assert any(line["name"] == name for line in interpreted())
    for line in interpreted():
        if line["name"] == name:
            assert line["calls"] > 0
            limit = LIMITS[getattr(torch, line["dtype"])]
            assert max(line["errors"].values()) < limit, line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(name, dtype, monkeypatch):
    enable(monkeypatch.setattr)
    found = compare(name, dtype, "cuda")
    assert max(found.values()) < max(LIMITS[dtype], 2e-5), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_ops_on_the_device(name, dtype, monkeypatch):
    enable(monkeypatch.setattr)
    found = compare_op(name, dtype, "cuda")
    assert max(found.values()) < max(LIMITS[dtype], 2e-5), found


def main():
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
    from interpreter import mend

    mend()
    enable(setattr)
    calls = []
    for name in ("step_fused", "scan_fused", "window_fused"):
        for module in (ops, sys.modules["longscan.mixers.mamba"]):
            if real := getattr(module, name, None):

                def spy(*args, real=real, **more):
                    calls.append(1)
                    return real(*args, **more)

                setattr(module, name, spy)
    for name in CASES:
        for dtype in LIMITS if name in ("kda", "mamba2", "mamba", "mlstm") else (torch.float32,):
            calls.clear()
            found = compare(name, dtype)
            line = {"name": name, "dtype": str(dtype)[6:], "errors": found, "calls": len(calls)}
            print(json.dumps(line), flush=True)
    for name in OPS:
        for dtype in LIMITS:
            calls.clear()
            with torch.no_grad():
                found = compare_op(name, dtype)
            line = {"name": name, "dtype": str(dtype)[6:], "errors": found, "calls": len(calls)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    import longscan.mixers.mamba  # noqa: F401  (spied upon)

    main()
