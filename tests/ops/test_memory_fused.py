"""The kernel of `memory`: every launch that ships, against float64, gradients of everything.

Run by `make test-gpu`.
"""

import pytest
import torch
from helpers import assert_close, unit

from longscan.ops._memory_fused import BIASES, LAUNCHES
from longscan.ops.dispatch import backend_of
from longscan.ops.memory import Rule, memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def call(backend, dtype, *, d, batch, length, bias, algorithm, chunk, cu=None, carry=False):
    """Outputs, states and all gradients, on the same numbers whatever the precision."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    heads, gate = 2, (batch, length, 2)
    leaves = {
        "q": unit(normal(batch, length, heads, d)),
        "k": unit(normal(batch, length, heads, d)),
        "v": normal(batch, length, heads, d),
        "eta": 0.1 * uniform(*gate),
        "log_a": -0.1 * uniform(*gate),
        "delta": d**0.5 * uniform(*gate),
        "log_mu": -uniform(*gate),
        "w0": 0.1 * normal(heads, 4 * d, d),
        "w1": 0.1 * normal(heads, d, 4 * d),
        "gamma": 1 + 0.1 * normal(heads, d),
        "beta": 0.1 * normal(heads, d),
    }
    unused = {"delta"} if not bias.startswith("huber") else set()
    unused |= {"log_mu"} if algorithm != "momentum" else set()
    x = {n: t.to("cuda", dtype).requires_grad_() for n, t in leaves.items() if n not in unused}
    rule = Rule(bias=bias, algorithm=algorithm, chunk=chunk)
    parts = (
        {"weights": [x["w0"], x["w1"]], "norm": (x["gamma"], x["beta"]), "rule": rule}
    )  # fmt: skip
    gates = [x["eta"], x["log_a"], x.get("delta"), x.get("log_mu")]
    cu = None if cu is None else torch.tensor(cu, device="cuda")
    y, state = memory(x["q"], x["k"], x["v"], *gates, **parts, cu_seqlens=cu, backend=backend)
    out = [y, *(t for t in state.flatten().values() if t.is_floating_point())]
    loss = sum((t * normal(*t.shape).to(t)).sum() for t in out)
    return [t.detach() for t in out], dict(
        zip(x, torch.autograd.grad(loss, list(x.values())), strict=True)
    )


def check(**case):
    got, grads = call("triton", torch.float32, **case)
    want, right = call("torch", torch.float64, **case)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, "float32", f"result {i}")
    for name in right:
        assert_close(grads[name], right[name], "float32", f"gradient of {name}")


@pytest.mark.parametrize("algorithm", ["gd", "momentum"])
@pytest.mark.parametrize("d", LAUNCHES)
def test_every_launch(d, algorithm):
    check(d=d, batch=2, length=150, bias="l2", algorithm=algorithm, chunk=16)


@pytest.mark.parametrize("chunk", [32, 64])
def test_longer_chunks(chunk):
    check(d=16, batch=2, length=150, bias="l2", algorithm="gd", chunk=chunk)


@pytest.mark.parametrize("bias", [b for b in BIASES if b != "huber_mix"])
def test_every_bias(bias):
    check(d=32, batch=2, length=100, bias=bias, algorithm="momentum", chunk=16)


def test_a_bias_that_amplifies_rounding():
    """Signs beyond a threshold: compared over few tokens, before rounding errors have grown."""
    check(d=32, batch=2, length=37, bias="huber_mix", algorithm="gd", chunk=16)


@pytest.mark.parametrize("algorithm", ["gd", "momentum"])
def test_packed_sequences(algorithm):
    cu = [0, 17, 20, 120, 150]
    check(d=32, batch=1, length=150, bias="l2", algorithm=algorithm, chunk=16, cu=cu)


def test_it_runs_by_default(monkeypatch):
    x = torch.zeros(1, device="cuda")
    assert backend_of("memory", x).name == "triton"
    assert backend_of("memory", x, "torch").name == "torch"
    assert backend_of("vq", x).name == "torch"
    with pytest.raises(ValueError, match="no Triton form"):
        backend_of("vq", x, "triton")
    monkeypatch.setenv("LONGSCAN_BACKEND", "torch")
    assert backend_of("memory", x).name == "torch"


def test_two_runs_are_bitwise_equal():
    case = {"d": 64, "batch": 2, "length": 100, "bias": "l2", "algorithm": "momentum", "chunk": 16}
    (a, da), (b, db) = (call("triton", torch.float32, **case) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert all(torch.equal(da[n], db[n]) for n in da)


def test_no_second_derivatives():
    x = torch.randn(1, 64, 2, 16, device="cuda", requires_grad=True)
    weights = [torch.randn(2, 64, 16, device="cuda"), torch.randn(2, 16, 64, device="cuda")]
    norm = (torch.ones(2, 16, device="cuda"), torch.zeros(2, 16, device="cuda"))
    eta = torch.full((1, 64, 2), 0.1, device="cuda")
    rule = Rule(retention="none")
    y, _ = memory(x, x, x, eta, weights=weights, norm=norm, rule=rule, backend="triton")
    with pytest.raises(RuntimeError, match="LONGSCAN_BACKEND=reference"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
