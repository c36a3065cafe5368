"""No loop of a kernel loads over what a product still reads: compiled for an H100 without one."""

import pytest
import torch
from pipelines import hazards

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime import jit  # noqa: E402

from longscan.proof import cases, direct  # noqa: E402
from longscan.proof.compare import run_once  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
# Sizes that have launches of their own, and a sequence that is split in time.
NAMES = (
    "T=150",
    "K=16 V=64",
    "K=32 V=64",
    "K=128 V=128",
    "K=256 V=256",
    "T=4096 usual, K=V=128",
    "D=128",
    "D=256",
)
# Those in Triton with products; selective is in Gluon, which says itself when it waits.
KERNELS = ("decay", "decay_keys", "delta", "delta_keys", "mlstm", "slstm")


def ttgir(kernel, args, more):
    """The kernel as Triton hands it to LLVM, for an H100."""
    backend = make_backend(HOPPER)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, options = binder(*args, **more)
    options, signature, constants, attributes = kernel._pack_args(
        backend, more, bound, special, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=HOPPER, options=options.__dict__).asm["ttgir"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_load_overwrites_an_operand(kernel, dtype, monkeypatch):
    launches = {}

    def item(function, grid):
        def launch(*args, **more):
            constants = {k: v for k, v in more.items() if not isinstance(v, torch.Tensor)}
            launches[function.fn.__name__, str(constants)] = (function, args, more)

        return launch

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", item)
    for case in cases(kernel):
        if case.name in NAMES:
            run_once(kernel, case, dtype, "cpu", direct(kernel))
    assert launches
    found = {name: hazards(ttgir(*launch)) for name, launch in launches.items()}
    assert not any(found.values()), {k: v for k, v in found.items() if v}


@triton.jit
def shared(x, y, out, sums, D: tl.constexpr, APART: tl.constexpr):
    """Products of rows, and their sums: of the loads in the loop, or of others."""
    i, d = tl.arange(0, 64), tl.arange(0, 64)
    p, s = tl.zeros([64, 64], tl.float32), tl.zeros([64], tl.float32)
    for at in range(0, D, 64):
        a = tl.load(x + i[:, None] * D + at + d[None, :])
        b = tl.load(y + i[:, None] * D + at + d[None, :])
        p = tl.dot(a, tl.trans(b), p)
        if not APART:
            s += tl.sum(a.to(tl.float32), 1)
    if APART:
        for at in range(0, D, 64):
            s += tl.sum(tl.load(x + i[:, None] * D + at + d[None, :]).to(tl.float32), 1)
    tl.store(out + i[:, None] * 64 + i[None, :], p)
    tl.store(sums + i, s)


def test_what_triton_gets_wrong_is_seen():
    x, y = (torch.zeros(64, 512, dtype=torch.bfloat16) for _ in range(2))
    out, sums = torch.zeros(64, 64), torch.zeros(64)
    for apart in (False, True):
        more = {"D": 512, "APART": apart, "num_warps": 4, "num_stages": 3}
        assert bool(hazards(ttgir(shared, (x, y, out, sums), more))) is not apart
