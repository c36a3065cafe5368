"""Launches that cost little: what Triton finds out again at each launch is remembered here.

Triton 3.6 takes 20 us for a launch of 20 arguments, most of it to ask each for what the kernel is
compiled for. An `entry` asks the same in a function written for its arguments, and hands what it
finds there straight to Triton's launcher in C. All that is not plain is left to Triton: the first
launch of a kind, hooks, debugging, other versions, arguments that are neither tensors nor numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.jit import JITFunction, KernelInterface

from longscan.ops import _rehearsal
from longscan.ops._rehearsal import here

try:
    from triton.backends.nvidia.driver import CudaLauncher
except ImportError:  # Triton for other devices
    CudaLauncher = None

K = TypeVar("K")
LOW, HIGH = -(2**31), 2**31 - 1
GONE = object()  # an argument that was not given


def entry(kernel: K) -> K:
    """Above @triton.jit or @gluon.jit of a kernel that is launched from Python.

    It stays the JITFunction that it was, but for how `kernel[grid](...)` and `run` launch it. Give
    constexprs by name, and all else by position: only such calls are remembered.
    """
    known_version = triton.__version__.startswith("3.6.") and CudaLauncher is not None
    if isinstance(kernel, JITFunction) and known_version:
        kernel.__class__ = _entry_class(type(kernel))
        kernel._forms = {}  # type: ignore[attr-defined]
        kernel._go = partial(_other, kernel, None)  # type: ignore[attr-defined]
    return kernel


@cache
def _entry_class(base: type) -> type:
    return type(base.__name__, (_Entry, base), {})


class _Entry:
    _go: Callable
    _forms: dict[tuple[type, ...], Callable | None]

    def __getitem__(self, grid: Any) -> Callable:
        watched = KernelInterface.__getitem__.__module__ != "triton.runtime.jit"
        if watched and here.noted is None:
            return KernelInterface.__getitem__(self, grid)  # type: ignore[arg-type]
        return partial(self._go, grid)

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup:
            return JITFunction.run(self, *args, grid=grid, warmup=True, **options)  # type: ignore
        return self._go(grid, *args, **options)


def _other(kernel: Any, refused: tuple | None, grid: Any, /, *args: Any, **options: Any) -> Any:
    """A launch that the form for arguments of the types `refused` does not make."""
    args = tuple(x for x in args if x is not GONE)
    kinds = tuple(map(type, args))
    form = None
    if kinds != refused:
        if kinds not in kernel._forms:
            kernel._forms[kinds] = _form(kernel, kinds)
        form = kernel._forms[kinds]
    if form is not None:
        kernel._go = form
        return form(grid, *args, **options)
    if here.noted is not None:
        return None
    return JITFunction.run(kernel, *args, grid=grid, warmup=False, **options)


def _form(kernel: Any, kinds: tuple[type, ...]) -> Callable | None:
    """A launch with arguments of these types, given by position; None if all is left to Triton.

    Its key holds at least what Triton specialises on: of tensors the dtype and whether their data
    begin at a multiple of 16 bytes, of integers what the kernel's declaration leaves (1, multiples
    of 16) and how wide they are, constexprs and options themselves, and the device.
    """
    if len(kinds) > len(kernel.params):
        return None
    if not all(p.is_constexpr for p in kernel.params[len(kinds) :]):
        return None
    names = [f"a{i}" for i in range(len(kinds))]
    pointers, whole, key, passed, right = [], [], [], [], ["not rest"]
    for a, kind, p in zip(names, kinds, kernel.params, strict=False):
        passed.append(a)
        if p.is_constexpr:
            key += [a, f"{a}.__class__"]
        elif kind in (Tensor, Parameter):
            pointers.append(a)
            key.append(f"{a}.dtype")
            passed[-1] = f"p{a}"
            right.append(f"{a}.is_cuda")
        elif kind is type(None):
            right.append(f"{a} is None")
        elif kind in (int, float, bool):
            right.append(f"{a}.__class__ is {kind.__name__}")
            if kind is int:
                whole.append(a)
                if not p.do_not_specialize:
                    aligned = not p.do_not_specialize_on_alignment
                    key.append(f"({a} == 1 or {a} % 16 == 0 and 16)" if aligned else f"{a} == 1")
        else:
            return None
    passed += ["None"] * (len(kernel.params) - len(kinds))  # constexprs: the launcher skips them
    each = "".join(f"{a}, " for a in names)
    source = f"""
def form(grid, {"".join(f"{a}=GONE, " for a in names)}/, *rest, **options):
    try:
        {"; ".join(f"p{a} = {a}.data_ptr()" for a in pointers) or "pass"}
        device, values = current_device(), options.values()
        apart = ({" | ".join(f"p{a}" for a in pointers) or "0"}) & 15
        key = {" and ".join(right)} and (
            device, apart and ({"".join(f"p{a} % 16 == 0, " for a in pointers)}),
            {" and ".join(f"LOW <= {a} <= HIGH" for a in whole) or "True"}
            or ({"".join(f"_width({a}), " for a in whole)}),
            {"".join(f"{part}, " for part in key)}*options, *values, *map(type, values),
        )
    except (AttributeError, TypeError):
        key = None
    if not (
        key
        and grid.__class__ is tuple
        and not hooks
        and not runtime.debug
        and not compilation.instrumentation_mode
        and _idle(runtime.launch_enter_hook)
        and _idle(runtime.launch_exit_hook)
    ):
        return other(grid, {each}*rest, **options)
    last, found = latest[0]
    if key != last:
        found = known.get(key)
        if found is not None:
            latest[0] = key, found
    if found is None or _rehearsal.under_way and here.noted is not None:
        return _first(kernel, known, key, grid, options, ({each}))
    launch, compiled, function, cooperative, dependent, packed = found
    n = len(grid)
    launch(
        grid[0], grid[1] if n > 1 else 1, grid[2] if n > 2 else 1, current_stream(device), function,
        cooperative, dependent, None, None, packed, None, None, None, {", ".join(passed)}
    )
    return compiled
"""
    space = {
        **globals(), "kernel": kernel, "known": {}, "latest": [(None, None)],
        "other": partial(_other, kernel, kinds), "hooks": kernel.pre_run_hooks,
        "runtime": knobs.runtime, "compilation": knobs.compilation,
        "current_device": getattr(torch._C, "_cuda_getDevice", None),
        "current_stream": getattr(torch._C, "_cuda_getCurrentRawStream", None),
    }  # fmt: skip
    exec(source, space)
    return space["form"]


def _idle(hook: Any) -> bool:
    return hook is None or getattr(hook, "calls", hook) == []


def _width(n: int) -> int:
    """0 for 32 bits, 1 for 64 bits, 2 for 64 bits without a sign, 3 for none."""
    if LOW <= n <= HIGH:
        return 0
    return 1 if -(2**63) <= n < 2**63 else 2 if 0 <= n < 2**64 else 3


def _first(kernel: Any, known: dict, key: tuple, grid: tuple, options: dict, args: tuple) -> Any:
    """A launch by Triton, which compiles what is not there yet; it is remembered under the key."""
    if here.noted is not None:
        return _note(kernel, known, key, options, args)
    if key not in known:
        _rehearsal.rehearse()
    with _rehearsal.one:  # Triton brings a kernel to a device unguarded
        compiled = JITFunction.run(kernel, *args, grid=grid, warmup=False, **options)
    launcher = getattr(compiled, "run", None)
    if (
        isinstance(launcher, CudaLauncher)  # type: ignore[arg-type]
        and not launcher.global_scratch_size
        and not launcher.profile_scratch_size
        and all(p.is_constexpr for p in kernel.params if p.name in options)
    ):
        known[key] = (
            launcher.launch, compiled, compiled.function,
            launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
        )  # fmt: skip
    return compiled


# --- rehearsals -----------------------------------------------------------------------------


class _Like:
    """What Triton compiles for when it gets a tensor, without its memory."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.address = x.dtype, x.data_ptr()

    def data_ptr(self) -> int:
        return self.address


def _note(kernel: Any, known: dict, key: tuple, options: dict, args: tuple) -> None:
    if key not in known:
        args = tuple(_Like(x) if isinstance(x, Tensor) else x for x in args)
        device = key[0]
        kernel.device_caches[device]  # made here: threads would make one each
        here.noted[id(known), key] = partial(_prepare, kernel, options, args, device)


def _prepare(kernel: Any, options: dict, args: tuple, device: int) -> None:
    """Compile a kernel and bring it to the device."""
    with torch.cuda.device(device):
        compiled = JITFunction.run(kernel, *args, grid=None, warmup=True, **options)
        compiled.run  # noqa: B018 (Triton builds the launcher when asked for it)
