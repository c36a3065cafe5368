"""The backward of decay in bfloat16: heads that share keys, heads alone."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from longscan.ops import _decay_fused as fused
from longscan.ops.decay import decay_chunked

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# Batch, length, heads, heads of keys, K, V, borders of packed sequences, gates, factors, and for
# how many programs the backward is planned.
CASES = {
    "two slabs": (2, 200, 4, 1, 16, 32, None, True, True, 4),
    "many sums": (1, 130, 8, 2, 16, 16, None, True, True, 264),
    "packed": (1, 200, 4, 1, 24, 16, (0, 1, 65, 193, 200), True, True, 8),
    "no gate": (1, 130, 4, 2, 16, 16, None, False, False, 8),
    "split in time": (1, 600, 2, 1, 16, 16, None, True, False, 8),
    "alone": (2, 130, 2, 2, 40, 24, None, True, False, 4),
    "alone, no gate": (1, 70, 2, 2, 16, 16, None, False, False, 4),
}
NAMES = ("q", "k", "v", "log_a", "scale", "skip", "state")


def draw(batch, length, heads, groups, d_key, d_value, cu, gated, scaled):
    g = torch.Generator().manual_seed(0)
    rows = batch if cu is None else len(cu) - 1
    dt = F.softplus(torch.randn(batch, length, heads, generator=g) - 2)
    log_a = -dt * torch.rand(heads, generator=g) * 8
    log_a = torch.where(torch.rand(log_a.shape, generator=g) < 0.02, -1e4, log_a)
    keys = (batch, length, groups, d_key)
    return {
        "q": (torch.randn(keys, generator=g) * d_key**-0.25).bfloat16(),
        "k": (torch.randn(keys, generator=g) * d_key**-0.25).bfloat16(),
        "v": torch.randn(batch, length, heads, d_value, generator=g).bfloat16(),
        "log_a": log_a if gated else None,
        "scale": dt if scaled else None,
        "skip": torch.randn(heads, generator=g) if scaled else None,
        "state": torch.randn(rows, heads, d_key, d_value, generator=g) * 0.3,
    }


def gradients(run, x, dtype=None):
    x = {n: t.to(dtype or t.dtype).requires_grad_() for n, t in x.items() if t is not None}
    o, final = run(*(x.get(n) for n in NAMES))
    g = torch.Generator().manual_seed(1)
    loss = torch.stack([(y * torch.randn(y.shape, generator=g)).sum() for y in (o, final)]).sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))


def far_off(name):
    """Of each gradient its largest error, relative to its largest entry."""
    *sizes, slots = CASES[name]
    x, cu = draw(*sizes), None if sizes[6] is None else torch.tensor(sizes[6])
    fused.slots = lambda device: slots

    def kernels(q, k, v, log_a, scale, skip, state):
        return fused.decay_fused(q, k, v, log_a, scale=scale, skip=skip, state=state, cu_seqlens=cu)

    def plain(q, k, v, log_a, scale, skip, state):
        u = v if scale is None else v * scale.unsqueeze(-1)
        o, final = decay_chunked(q, k, u, log_a, state=state, cu_seqlens=cu)
        return o if skip is None else o + skip.unsqueeze(-1) * v, final

    got, want = gradients(kernels, x), gradients(plain, x, torch.float64)
    return {n: float((got[n] - w).abs().max() / w.abs().max()) for n, w in want.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, name],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout)
    assert all(error < 1e-2 for error in errors.values()), errors


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import_module("interpreter").mend()
    print(json.dumps(far_off(sys.argv[1])))
