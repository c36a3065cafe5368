"""Kernels on a CPU: python interpreter.py KERNEL, or compiled MIXER, or pieces.

Of a kernel it prints a JSON line for each small case, then one of the launches that no case
chooses; of a mixer, how far its form under torch.compile is from the eager one; of pieces a line
for each case. Triton's own run in its interpreter, those in Gluon in gluon.py. This is a program
because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from importlib import import_module
from typing import Any


def mend() -> None:
    """Correct what Triton 3.6's interpreter gets wrong, and have gluon.py run kernels in Gluon.

    It makes an index of an array of one number, which numpy 2.4 refuses. It keeps bfloat16 as
    integers, which its matrix products then multiply, and it cuts digits off instead of rounding.
    """
    import gluon as emulator
    import torch
    import triton.language as tl
    from triton.experimental import gluon
    from triton.runtime import interpreter

    gluon.jit = emulator.jit
    builder = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, wide(a), wide(b), *more)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        before, after = src.dtype.scalar, dst_type.scalar
        if before == tl.float32 and after == tl.bfloat16:
            narrow = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(narrow, after)
        if before == tl.bfloat16 and after == tl.float32:
            return wide(src)
        return cast(self, src, dst_type)

    interpreter._patch_lang_tensor = patch_tensor
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def run(kernel: str) -> None:
    """All small cases in float32, the first of them in the narrow types."""
    proof, command = import_module("longscan.proof"), import_module("longscan.proof.command")
    launches = import_module("longscan.proof.launches")
    small = [c for c in proof.cases(kernel) if c.quick]
    proof.direct(kernel)
    for case in small:
        for dtype in case.dtypes if case is small[0] else ("fp32",):
            done = command.perform(command.Task(kernel, case.name, dtype, "cpu"))
            line = {"case": case.name, "dtype": dtype, "status": done.status, "what": done.what,
                    "error": done.error}  # fmt: skip
            print(json.dumps(line), flush=True)
    short = [c for c in proof.cases(kernel)
             if c.copies == 1 and not c.name.startswith(("T=", "packed", "gate"))]  # fmt: skip
    left = launches.unused(kernel, command.reached(kernel, short))
    print(json.dumps({"unused": {name: list(map(str, keys)) for name, keys in left.items()}}))


def compiled(mixer: str) -> None:
    """The output and the gradient of the input, of one graph for any length, against eager."""
    import torch

    os.environ["LONGSCAN_BACKEND"] = "triton"
    import_module("longscan.ops._projection_fused").LEAST = 1
    torch.manual_seed(0)
    m = import_module("longscan.registry").mixer_class(mixer)(64)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return m(x)[0]

    fast = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 20), (1, 37)):
        found = []
        for function in (fast, eager):
            x = torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(0))
            y = function(x.requires_grad_())
            found.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
        far = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]
        error = torch.tensor(far).max().item()  # NaN, too
        print(json.dumps({"batch": batch, "length": length, "error": error}), flush=True)


def pieces() -> None:
    """`selective` where sequences are cut into pieces, which few sequences of a GPU's size are."""
    proof, compare = import_module("longscan.proof"), import_module("longscan.proof.compare")
    launches = import_module("longscan.proof.launches")
    make = partial(import_module("longscan.proof.channels").selective_arguments, n=4)
    proof.direct("selective")  # imports the launcher, whose tables are watched
    import_module("longscan.ops._selective_fused")._size = lambda *_: 64
    packed = {"batch": 1, "length": 203, "cu": (0, 1, 70, 203), "channels": 9}
    for name, options in {"equal": {"length": 150, "channels": 20}, "packed": packed}.items():
        case, seen = proof.Case(name, partial(make, **options)), launches.Launches()
        with seen.watched():
            what, size = compare.worst(compare.prove("selective", case, "bf16", "cpu"))
        line = {"case": name, "what": what, "error": size, "ran": sorted(seen.names)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    mend()
    if sys.argv[1] == "compiled":
        compiled(sys.argv[2])
    elif sys.argv[1] == "pieces":
        pieces()
    else:
        run(sys.argv[1])
