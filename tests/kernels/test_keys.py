"""What kernels are compiled for: never for a length. Triton's own keys, taken without a device."""

import random

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime import jit  # noqa: E402

from longscan.proof import CASES, cases, direct  # noqa: E402
from longscan.proof.case import Size  # noqa: E402
from longscan.proof.kernels import KERNELS  # noqa: E402

# Few rows that are long are split in time, which is another role of some kernels.
ROLES = ((4, 256), (1, 4096))


@pytest.fixture
def keys(monkeypatch):
    """The keys (kernel, key) of all launches, which do nothing; a call empties them."""
    found, binders = set(), {}
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def item(kernel, grid):
        def launch(*args, **more):
            if kernel not in binders:
                binders[kernel] = jit.create_function_from_signature(
                    kernel.signature, kernel.params, backend
                )
            _, special, options = binders[kernel](*args, **more)
            found.add((kernel.fn.__name__, str(special), str(sorted(options.items()))))

        return launch

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", item)

    def taken():
        now = set(found)
        found.clear()
        return now

    return taken


def launch(kernel, batch, length):
    """Forward and backward in bfloat16; numbers are not computed."""
    make = next(c for c in cases(kernel) if c.name == "T=150").make
    size = {"size": Size(length, batch)} if "size" in make.keywords else {
        "length": length, "batch": batch}  # fmt: skip
    how, arguments = KERNELS[kernel], {}
    for name, x in make(torch.Generator().manual_seed(0), **size).items():
        wide = name.split(".")[0] in (*how.wide, *how.gates)
        dtype = torch.float32 if wide else torch.bfloat16
        parts = tuple(
            t.to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t
            for t in (x if isinstance(x, tuple) else (x,))
        )
        arguments[name] = parts if isinstance(x, tuple) else parts[0]
    o, _ = how.run(arguments, direct(kernel))
    o.float().sum().backward()


@pytest.mark.parametrize("kernel", [k for k in CASES if k not in ("norm", "loss")])
def test_no_length_is_compiled_for(kernel, keys):
    """20 random batches need no kernel that two did not need."""
    for batch, length in ROLES:
        launch(kernel, batch, length)
    known = keys()
    assert known
    r = random.Random(0)
    for _ in range(20):
        launch(kernel, r.randint(1, 5), r.choice((r.randint(2, 70), r.randint(70, 3000))))
    assert keys() <= known


def test_a_length_that_is_compiled_for_is_seen(keys):
    """The test above can fail: an argument that Triton specialises on gives other keys."""

    @triton.jit
    def kernel(x, length):
        pass

    x = torch.zeros(4)
    kernel[(1,)](x, 160, num_warps=4)
    known = keys()
    kernel[(1,)](x, 150, num_warps=4)
    assert keys() - known
