"""The backward of delta that is one kernel, in few programs: on a CPU, and compiled for an H100."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.ops import _delta_fused as fused
from longscan.ops.delta import delta

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
NAMES = ("q", "k", "v", "beta", "log_a", "state")
# Length, K, V, heads, borders of packed sequences, gates, whether states enter and are asked for.
CASES = {
    "two pieces": (96, 40, 72, 1, None, "some closed", True),
    "packed": (99, 64, 80, 1, (0, 1, 34, 99), "usual", True),
    "no gate": (33, 128, 128, 2, None, None, False),
}


def draw(length, d_key, d_value, heads, cu, gate, state):
    g = torch.Generator().manual_seed(0)
    shape, rows = (1, length, heads), 1 if cu is None else len(cu) - 1
    a = torch.nn.functional.logsigmoid(torch.randn(*shape, generator=g) + 2)
    if gate == "some closed":
        a = torch.where(torch.rand(*shape, generator=g) < 0.1, -1e4, a)
    x = {
        "q": torch.randn(*shape, d_key, generator=g) * d_key**-0.5,
        "k": torch.nn.functional.normalize(torch.randn(*shape, d_key, generator=g), dim=-1),
        "v": torch.randn(*shape, d_value, generator=g),
        "beta": 2 * torch.rand(*shape, generator=g),
        "log_a": None if gate is None else a,
        "state": torch.randn(rows, heads, d_key, d_value, generator=g) if state else None,
    }
    ends = torch.randn(rows, heads, d_key, d_value, generator=g) if state else None
    for name in ("q", "k", "v"):
        x[name] = x[name].bfloat16()
    return x, torch.randn(*shape, d_value, generator=g).bfloat16(), ends


def gradients(run, x, do, d_final, cu, dtype=None):
    x = {
        n: None if t is None else t.to(dtype or t.dtype).clone().requires_grad_()
        for n, t in x.items()
    }
    cu = None if cu is None else torch.tensor(cu)
    o, final = run(*(x[n] for n in NAMES[:5]), state=x["state"], cu_seqlens=cu)
    loss = (o * do.to(o.dtype)).sum()
    if d_final is not None:
        loss = loss + (final * d_final.to(final.dtype)).sum()
    leaves = {n: t for n, t in x.items() if t is not None}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def emulates(device):
    """A CPU has the products of a Hopper GPU here."""
    return True


def interpreted():
    sys.path.insert(0, str(Path(__file__).parent))
    import_module("interpreter").mend()
    launches = import_module("longscan.proof.launches").Launches
    for name, case in CASES.items():
        x, do, d_final = draw(*case)
        for enough in (1, 10**9):
            fused.ENOUGH, fused._hopper, seen = enough, emulates, launches()
            with seen.watched():
                got = gradients(fused.delta_fused, x, do, d_final, case[4])
            want = gradients(
                lambda *a, **k: delta(*a, **k, backend="torch"), x, do, d_final, case[4],
                torch.float64,
            )  # fmt: skip
            errors = {
                n: float((got[n].double() - w).abs().max() / w.abs().max()) for n, w in want.items()
            }
            names = sorted(n.rpartition(".")[2] for n in seen.names)
            print(json.dumps({"case": name, "kernels": names, "errors": errors}))
    one_step(*draw(*CASES["no gate"]))


def one_step(x, do, d_final):
    """An axis of one write a token changes nothing but shapes."""
    fused.ENOUGH = 1
    want = gradients(fused.delta_fused, x, do, d_final, None)
    x |= {n: x[n].unsqueeze(2) for n in ("k", "v", "beta")}
    got = gradients(fused.delta_fused, x, do, d_final, None)
    for name, w in want.items():
        assert torch.equal(got[name], w.view(x[name].shape)), name


def test_in_the_interpreter():
    """As exact as the kernels that it replaces, and each takes its own cases."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == [c for c in CASES for _ in range(2)]
    for one, many in zip(lines[::2], lines[1::2], strict=True):
        assert "reverse" in one["kernels"]
        assert "gradients" not in one["kernels"]
        assert "gradients" in many["kernels"]
        for name, error in one["errors"].items():
            assert error < 1e-2, (one["case"], name, error)
            assert error < 1.2 * many["errors"][name], (one["case"], name, error)


@pytest.mark.parametrize(("d_key", "d_value", "gated"), [(128, 128, True), (64, 80, False)])
def test_it_fits_a_multiprocessor(d_key, d_value, gated):
    """Compiled without a device: 227 KB of shared memory are what a program may have."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from longscan.kernels.delta_reverse import reverse

    given = {"K": d_key, "V": d_value, "BK": 128 if d_key > 64 else 64, "H": 4,
             "GATED": gated, "ENDS": gated}  # fmt: skip
    wide = ("factors", "d_final", "d_log_a", "d_state")
    types, constants, aligned = {}, {}, {}
    for i, name in enumerate(reverse.arg_names):
        if name in given:
            types[name], constants[i,] = "constexpr", given[name]
        elif name == "N":
            types[name] = "i32"
        else:
            kind = "i64" if name in ("starts", "first") else "fp32" if name in wide else "bf16"
            types[name], aligned[i,] = f"*{kind}", [["tt.divisibility", 16]]
    source = GluonASTSource(reverse, types, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert code.metadata.shared <= 232448
    # All copies are of 16 bytes but for beta and b, which are numbers.
    copies = code.asm["ptx"].count("cp.async.cg.shared.global")
    assert copies > 10 * code.asm["ptx"].count("cp.async.ca.shared.global")


def test_no_length_is_compiled_for(monkeypatch):
    """Batches of any length and size need the same kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), set()

    def item(kernel, grid):
        def launch(*args, **more):
            bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
            if kernel.fn.__name__ == "reverse":
                keys.add(str(bind(*args, **more)[1:]))

        return launch

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", item)
    monkeypatch.setattr(fused, "ENOUGH", 1)
    monkeypatch.setattr(fused, "_hopper", emulates)
    for length, cu in ((16, None), (33, None), (64, None), (1000, None), (70, (0, 1, 70))):
        x, do, d_final = draw(length, 64, 128, 2, cu, "usual", True)
        gradients(fused.delta_fused, x, do, d_final, cu)
    assert len(keys) == 1


def test_what_it_takes(monkeypatch):
    """Wide heads in bfloat16, enough of them, one write a token, rows of whole 16 bytes."""
    monkeypatch.setattr(fused, "ENOUGH", 4)
    monkeypatch.setattr(fused, "_hopper", emulates)

    def takes(heads=4, key_heads=None, d_key=128, d_value=128, dtype=torch.bfloat16, off=0):
        k = torch.zeros(1 + 2 * (key_heads or heads) * d_key, dtype=dtype)
        k = k[off : k.numel() - 1 + off].view(1, 2, key_heads or heads, d_key)
        v = torch.zeros(1, 2, heads, d_value, dtype=dtype)
        return fused._reverses(fused._case(k, k, v, None, None), k, k, v)

    assert takes()
    assert takes(d_key=40, d_value=72)
    refused: tuple[dict[str, Any], ...] = (
        {"heads": 3}, {"key_heads": 2}, {"d_key": 32}, {"d_key": 136}, {"d_value": 64},
        {"d_value": 136}, {"d_key": 44}, {"dtype": torch.float32}, {"off": 1},
    )  # fmt: skip
    for case in refused:
        assert not takes(**case), case


if __name__ == "__main__":
    interpreted()
