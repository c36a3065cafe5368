"""sLSTM's kernel beside what the proof asks: which cases it takes, and what it costs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from longscan.ops._slstm_fused import LAUNCHES, SPLIT_LAUNCHES, slstm_fits, slstm_fused
from longscan.ops.slstm import slstm

triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(batch, length, heads, d, dtype=torch.float32, rows=None, device="cpu"):
    """gates, r, bias and a state, whose first row begins."""
    g = torch.Generator().manual_seed(0)
    gates = torch.randn(batch, length, heads, 4, d, generator=g) + 0.5
    r = torch.randn(heads, d, 4, d, generator=g) * 0.5 * d**-0.5
    bias = torch.randn(heads, 4, d, generator=g)
    state = torch.randn(rows or batch, 4, heads, d, generator=g).abs() + 0.3
    state[0] = 0
    return [x.to(device).requires_grad_() for x in (gates.to(dtype), r, bias, state)]


def results(run, gates, r, bias, state, **more):
    """Outputs and gradients; the final m, whose gradient has jumps, is not read."""
    y, end = run(gates, r, bias, state=state, **more)
    loss = (y.float() * torch.linspace(-1, 1, y[0].numel(), device=y.device).view(y[0].shape)).sum()
    grads = torch.autograd.grad(loss + end[:, :3].sum(), (gates, r, bias, state))
    return [y, end, *grads]


def test_what_fits():
    gates, r, bias, _ = draw(1, 2, 1, 64)
    assert slstm_fits(gates, r, bias)
    assert slstm_fits(gates.bfloat16(), r, bias)
    assert not slstm_fits(gates, r.double(), bias)
    assert not slstm_fits(gates[:0], r, bias)
    largest = {
        size: max(d for s, d in (*LAUNCHES, *SPLIT_LAUNCHES) if s == size) for size in (2, 4)
    }
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        for d in (largest[size], largest[size] + 1):
            wide = torch.empty(1, 1, 1, 4, d, dtype=dtype)
            assert slstm_fits(wide, torch.empty(1, d, 4, d), bias) == (d <= largest[size])


@triton
def test_in_the_interpreter():
    """Packed sequences in no order, more of them than a program has, in every dtype."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["case"] for line in lines} == {"packed", "odd", "no gradients"}
    for line in lines:
        assert line["error"] < {"float32": 2e-6, "bfloat16": 1e-2}[line["dtype"]], line


def interpreted():
    sys.path.insert(0, str(Path(__file__).parent))
    from interpreter import mend

    mend()

    def compare(case, dtype, got, want):
        errors = [((a.double() - b).abs().max() / b.abs().max()).item()
                  for a, b in zip(got, want, strict=True)]  # fmt: skip
        error = torch.tensor(errors).max().item()  # NaN, too
        print(json.dumps({"case": case, "dtype": str(dtype)[6:], "error": error}))

    def exact(*inputs, **more):
        wide = [x.detach().double().requires_grad_() for x in inputs]
        return results(lambda *x, **m: slstm(*x, **m, backend="torch"), *wide, **more)

    lengths = torch.tensor([2, 1, 4] + 15 * [1])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    for dtype in (torch.bfloat16, torch.float32):
        inputs = draw(1, len(lengths) + 4, 1, 16, dtype, rows=len(lengths))
        got = results(slstm_fused, *inputs, cu_seqlens=cu)
        compare("packed", dtype, got, exact(*inputs, cu_seqlens=cu))
    inputs = draw(2, 3, 3, 19)
    compare("odd", torch.float32, results(slstm_fused, *inputs), exact(*inputs))
    for d in (19, 136):
        inputs = draw(2, 3, 1, d)[:3]
        with torch.no_grad():
            got = slstm_fused(*inputs)
            want = slstm(*(x.double() for x in inputs), backend="torch")
        compare("no gradients", torch.float32, got, want)


@pytest.mark.gpu
@cuda
@triton
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_never_slower(d, dtype):
    """Forward and backward of 256 tokens against the torch form."""
    gates, r, bias, state = draw(16, 256, 4, d, dtype, device="cuda")
    if not slstm_fits(gates, r, bias):
        pytest.skip("left to torch")

    def milliseconds(backend):
        def call():
            results(lambda *x, **m: slstm(*x, **m, backend=backend), gates, r, bias, state)

        call()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        return a.elapsed_time(b)

    assert milliseconds("triton") < milliseconds("torch")


@pytest.mark.gpu
@cuda
@triton
def test_a_program_does_not_see_its_neighbours():
    """A row alone is bit by bit what it is among others."""
    gates, r, bias, state = draw(40, 60, 4, 64, torch.bfloat16, device="cuda")
    with torch.no_grad():
        y, end = slstm_fused(gates, r, bias, state=state)
        for i in (0, 15, 16, 39):
            own, last = slstm_fused(gates[i : i + 1], r, bias, state=state[i : i + 1])
            assert torch.equal(own, y[i : i + 1])
            assert torch.equal(last, end[i : i + 1])


if __name__ == "__main__":
    interpreted()
