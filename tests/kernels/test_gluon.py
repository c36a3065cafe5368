"""What gluon.py finds in kernels on a CPU: right numbers, and each planted fault."""

import pytest
import torch

pytest.importorskip("triton")
from gluon import Emulated, HazardError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _offsets(L: gl.constexpr):
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, L))[:, None]
    return i * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def _sum_of_products(a, b, out, n, S: gl.constexpr, FAULT: gl.constexpr):
    """out [64, 64] = sum over n tiles of bf16(a_i b_i) b_i, with copies one tile ahead."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    o = _offsets(L)
    x = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], S)
    y = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], S)
    t = gl.allocate_shared_memory(gl.bfloat16, [64, 64], S)
    zero = gl.zeros([64, 64], gl.float32, layout=M)
    total = zero
    async_copy.async_copy_global_to_shared(x.index(0), a + o)
    async_copy.async_copy_global_to_shared(y.index(0), b + o)
    async_copy.commit_group()
    for i in range(0, n):
        if FAULT != "early copy":
            gl.thread_barrier()
        if FAULT == "copy over an operand":
            total = warpgroup_mma(t, y.index((i + 1) % 2), total, is_async=True)
        left = (o < 64 * 64) & (i + 1 < n)
        async_copy.async_copy_global_to_shared(x.index((i + 1) % 2), a + (i + 1) * 4096 + o, left)
        async_copy.async_copy_global_to_shared(y.index((i + 1) % 2), b + (i + 1) * 4096 + o, left)
        async_copy.commit_group()
        async_copy.wait_group(2 if FAULT == "no wait for copies" else 1)
        p = warpgroup_mma(x.index(i % 2), y.index(i % 2), zero, is_async=True)
        p = warpgroup_mma_wait(1 if FAULT == "no wait for a product" else 0, deps=[p])
        t.store(gl.convert_layout(p.to(gl.bfloat16), L))
        if FAULT == "barrier before the fence":
            gl.thread_barrier()
        if FAULT != "no fence":
            fence_async_shared()
        total = warpgroup_mma(t, y.index(i % 2), total, is_async=True)
        if FAULT == "store over an operand":
            t.store(gl.convert_layout(zero.to(gl.bfloat16), L))
        if FAULT == "early copy":
            gl.thread_barrier()
        total = warpgroup_mma_wait(0, deps=[total])
    gl.store(out + o, gl.convert_layout(total, L))


def run(fault, warps=8):
    torch.manual_seed(0)
    a, b = (torch.randn(3, 64, 64).bfloat16() for _ in range(2))
    out = torch.full((64, 64), torch.nan)
    kernel = Emulated(_sum_of_products.fn)
    kernel[(1,)](a, b, out, 3, S=SHARED, FAULT=fault, num_warps=warps)
    x, y = a.float(), b.float()
    return out, ((x @ y).bfloat16().float() @ y).sum(0)


def test_products_and_copies():
    out, wanted = run("")
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("copy over an operand", "reads it is under way"),
        ("store over an operand", "reads it is under way"),
        ("no wait for copies", "a copy to it is under way"),
        ("no wait for a product", "used before it is there"),
        ("no fence", "no fence_async_shared"),
        ("barrier before the fence", "no barrier behind the fence"),
        ("early copy", "a barrier is missing"),
    ],
)
def test_faults_are_found(fault, told):
    with pytest.raises(HazardError, match=told):
        run(fault)


def test_one_warp_group_needs_no_barrier_behind_its_wait():
    out, wanted = run("early copy", warps=4)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)


@gluon.jit
def _copied(x, out, n, FAULT: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.program_id(0) * 16 + gl.arange(0, 32 if FAULT == "shared" else 16, layout=L)
    v = gl.load(x + i + (4 if FAULT == "read" else 0), mask=i < n, other=1.0)
    if FAULT == "poison":
        v = gl.allocate_shared_memory(gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(
            L
        )
    gl.store(out + i, v, mask=None if FAULT == "outside" else i < n)


def test_global_memory():
    x, out = torch.arange(20.0), torch.zeros(20)
    kernel = Emulated(_copied.fn)
    kernel[(2,)](x, out, 20, FAULT="")
    assert torch.equal(x, out)
    with pytest.raises(HazardError, match="elements 16 to 31 of 20"):
        kernel[(2,)](x, out, 20, FAULT="outside")
    with pytest.raises(HazardError, match="another program writes"):
        kernel[(2,)](x, out, 20, FAULT="shared")
    both = torch.zeros(24)
    with pytest.raises(HazardError, match="another program reads"):
        kernel[(2,)](both, both, 20, FAULT="read")
    kernel[(2,)](x, out, 20, FAULT="poison")
    assert out.isnan().all()


@gluon.jit
def _turned(out, OTHER: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    y = x._reinterpret(gl.bfloat16, [64, 64], OTHER)
    x.store(gl.full([64, 64], 1.0, gl.bfloat16, layout=L))
    gl.store(out + _offsets(L), y.load(L))


def test_orders_of_elements():
    out = torch.zeros(64, 64).bfloat16()
    Emulated(_turned.fn)[(1,)](out, OTHER=SHARED)
    assert (out == 1).all()
    with pytest.raises(HazardError, match="another order"):
        Emulated(_turned.fn)[(1,)](out, OTHER=gl.NVMMASharedLayout(64, 16, 2))


@gluon.jit
def _packed(x, out):
    L: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    i = gl.arange(0, 64, layout=L)
    v = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $2; {.reg .f32 p; fma.rn.f32 p, $3, 0f40000000, 0f3F800000; "
        "mov.b32 $1, p;}", "=f,=f,f,f", [gl.load(x + i)], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip
    gl.store(out + i, v)


def test_assembler():
    x, out = torch.linspace(-3, 3, 64), torch.zeros(64)
    Emulated(_packed.fn)[(1,)](x, out)
    torch.testing.assert_close(out[::2], x[::2].exp2())
    torch.testing.assert_close(out[1::2], 2 * x[1::2] + 1)
