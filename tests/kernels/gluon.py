"""Kernels in Gluon on a CPU: their Python is run once for each program, on tensors of torch.

`jit` stands for gluon.jit; `Emulated(kernel.fn)` is one kernel. Layouts are not looked at: the
compiler checks them. What the compiler does not see is checked here, and raises a `HazardError`:
an access of global memory outside a tensor, or of what another program writes; shared memory that
is overwritten while a warp group's product still reads it, or that is read before a copy arrived;
a result that is used before it was waited for; a missing fence or barrier before products. Shared
memory that nobody wrote is NaN. Products of a narrow type are summed in float32.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import re
from collections.abc import Callable, Sequence
from itertools import product
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import triton.language as tl
from gluon_shared import Program
from gluon_values import (
    MEANING,
    RANK,
    TORCH,
    HazardError,
    Memory,
    Value,
    literal,
    means,
    now,
    number,
    pair,
    plain,
    tensor,
)
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime.jit import ConstexprFunction, JITCallable, KernelInterface

__all__ = ["Emulated", "HazardError", "jit"]


@means(gl.program_id)
def program_id(axis: int) -> Value:
    return Value(number(now.program.index[plain(axis)], int, torch.int32))


@means(gl.num_programs)
def num_programs(axis: int) -> Value:
    return Value(number(now.program.grid[plain(axis)], int, torch.int32))


@means(gl.arange)
def arange(start: int, end: int, layout: Any = None) -> Value:
    return Value(torch.arange(plain(start), plain(end), dtype=torch.int32))


@means(gl.full)
def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    kind, shape = TORCH[plain(dtype)], [plain(n) for n in shape]
    return Value(tensor(value, kind).to(kind).expand(shape).clone())


@means(gl.zeros)
def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype)


@means(gl.full_like)
def full_like(input: Value, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None):
    return full(shape or input.shape, value, dtype or input.dtype)


@means(gl.zeros_like)
def zeros_like(input: Value, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    return full_like(input, 0, shape, dtype)


@means(gl.convert_layout, gl.set_auto_layout)
def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    if not isinstance(value, Value):
        raise TypeError("not a tensor; a product must be waited for")
    now.program.perhaps_barrier()
    return value.like(lambda x: x)


@means(gl.multiple_of, gl.max_contiguous, gl.max_constancy)
def hint(value: Any, *_: Any) -> Any:
    return value


@means(gl.where)
def where(condition: Any, x: Any, y: Any) -> Value:
    x, y = pair(x, y)
    return Value(torch.where(tensor(condition).to(torch.bool), x, y))


@means(gl.permute)
def permute(input: Value, *order: Any) -> Value:
    order = order[0] if isinstance(order[0], list | tuple) else order
    return input.like(lambda x: x.permute([plain(i) for i in order]))


@means(gl.reshape)
def reshape(input: Value, *shape: Any, **_: Any) -> Value:
    shape = shape[0] if isinstance(shape[0], list | tuple) else shape
    return input.like(lambda x: x.reshape([plain(n) for n in shape]))


@means(gl.ravel)
def ravel(input: Value, can_reorder: bool = False) -> Value:
    return input.like(lambda x: x.reshape(-1))


@means(gl.expand_dims)
def expand_dims(input: Value, axis: Any) -> Value:
    return input.like(lambda x: x.unsqueeze(plain(axis)))


@means(gl.broadcast)
def broadcast(input: Value, other: Value) -> tuple[Value, Value]:
    x, y = torch.broadcast_tensors(input.data, other.data)
    return Value(x, input.base), Value(y, other.base)


@means(gl.join)
def join(a: Value, b: Value) -> Value:
    return Value(torch.stack([a.data, b.data], -1))


@means(gl.split)
def split(a: Value) -> tuple[Value, Value]:
    return Value(a.data[..., 0]), Value(a.data[..., 1])


@means(gl.gather)
def gather(src: Value, index: Value, axis: int) -> Value:
    return Value(src.data.gather(plain(axis), index.data.long()))


@means(gl.cast)
def cast(input: Value, dtype: Any, *_: Any, **more: Any) -> Value:
    return input.to(dtype, **more)


@means(gl.to_tensor)
def to_tensor(x: Any) -> Value:
    return x if isinstance(x, Value) else Value(tensor(x))


@means(gl.fma)
def fma(x: Any, y: Any, z: Any) -> Value:
    x, y = pair(x, y)
    x, z = pair(Value(x), z)
    return Value((x.double() * y.double() + z.double()).to(x.dtype))


@means(gl.cdiv)
def cdiv(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


@means(gl.num_warps)
def num_warps() -> int:
    return now.program.warps


@means(gl.static_assert, gl.device_assert)
def check(condition: Any, message: str = "", **_: Any) -> None:
    if not (condition.data.all() if isinstance(condition, Value) else condition):
        raise AssertionError(message)


@means(gl.static_print, gl.device_print, gl.assume)
def nothing(*_: Any, **__: Any) -> None:
    pass


def _elementwise() -> None:
    one = {
        "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2,
        "sin": torch.sin, "cos": torch.cos, "sqrt": torch.sqrt, "sqrt_rn": torch.sqrt,
        "rsqrt": torch.rsqrt, "abs": torch.abs, "floor": torch.floor, "ceil": torch.ceil,
        "erf": torch.erf,
    }  # fmt: skip
    two = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "fdiv": torch.div,
        "div_rn": torch.div, "maximum": _largest, "minimum": _smallest,
    }  # fmt: skip
    for name, f in one.items():
        means(getattr(gl, name))(lambda x, f=f: Value(f(tensor(x))))
    for name, f in two.items():
        means(getattr(gl, name))(lambda x, y, f=f, **_: Value(f(*pair(x, y))))


def _largest(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmax(x, y)


def _smallest(x: Tensor, y: Tensor) -> Tensor:
    return torch.fmin(x, y)


_elementwise()


def _reduced(x: Value, axis: Any, keep_dims: Any, function: Callable) -> Value:
    now.program.perhaps_barrier()
    axis, data = plain(axis), x.data
    if axis is None:
        axis, data = 0, data.reshape(-1)
    if data.dtype == torch.bfloat16:
        data = data.float()
    out = function(data, axis)
    return Value(out.unsqueeze(axis) if plain(keep_dims) else out)


@means(gl.sum)
def total(input: Value, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> Value:
    def add(x: Tensor, axis: int) -> Tensor:
        if dtype is not None:
            x = x.to(TORCH[plain(dtype)])
        kind = x.dtype if RANK[x.dtype] >= RANK[torch.int32] else torch.int32
        return x.sum(axis, dtype=kind)

    return _reduced(input, axis, keep_dims, add)


@means(gl.max)
def most(input: Value, axis: Any = None, keep_dims: Any = False, **_: Any) -> Value:
    return _reduced(input, axis, keep_dims, lambda x, i: x.amax(i))


@means(gl.min)
def least(input: Value, axis: Any = None, keep_dims: Any = False, **_: Any) -> Value:
    return _reduced(input, axis, keep_dims, lambda x, i: x.amin(i))


def _all(x: Any) -> tuple[tuple[Value, ...], bool]:
    single = isinstance(x, Value)
    return ((x,) if single else tuple(x)), single


def _slices(xs: tuple[Value, ...], axis: int) -> list[tuple[Value, ...]]:
    return [
        tuple(Value(x.data.select(axis, i)) for x in xs) for i in range(xs[0].shape[axis])
    ]  # fmt: skip


def _combined(function: Callable, a: tuple, b: tuple) -> tuple[Value, ...]:
    return _all(function(*a, *b))[0]


@means(gl.reduce)
def reduce(input: Any, axis: Any, combine_fn: Callable, keep_dims: Any = False) -> Any:
    now.program.perhaps_barrier()
    xs, single = _all(input)
    if plain(axis) is None:
        xs, axis = tuple(ravel(x) for x in xs), 0
    axis = plain(axis)
    parts = _slices(xs, axis)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [
            _combined(combine_fn, a, b) for a, b in zip(parts[:half], parts[half:], strict=True)
        ]
    out = tuple(Value(x.data.unsqueeze(axis)) if plain(keep_dims) else x for x in parts[0])
    return out[0] if single else out


@means(gl.associative_scan)
def associative_scan(input: Any, axis: Any, combine_fn: Callable, reverse: Any = False) -> Any:
    now.program.perhaps_barrier()
    xs, single = _all(input)
    axis = plain(axis)
    parts = _slices(xs, axis)[:: -1 if plain(reverse) else 1]
    done = parts[:1]
    for part in parts[1:]:
        done.append(_combined(combine_fn, done[-1], part))
    done = done[:: -1 if plain(reverse) else 1]
    out = tuple(Value(torch.stack([d[i].data for d in done], axis)) for i in range(len(xs)))
    return out[0] if single else out


# --- assembler ---------------------------------------------------------------------------------


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _float(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float32)


def _on_floats(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *xs: _bits(f(*map(_float, xs)))


PTX = {
    "ex2": _on_floats(torch.exp2), "lg2": _on_floats(torch.log2),
    "rcp": _on_floats(torch.reciprocal), "tanh": _on_floats(torch.tanh),
    "sqrt": _on_floats(torch.sqrt), "rsqrt": _on_floats(torch.rsqrt),
    "max": _on_floats(torch.fmax), "min": _on_floats(torch.fmin),
    "add": _on_floats(torch.add), "sub": _on_floats(torch.sub), "mul": _on_floats(torch.mul),
    "fma": _on_floats(lambda x, y, z: (x.double() * y.double() + z.double()).float()),
    "mov": lambda x: x, "add.s32": torch.add, "sub.s32": torch.sub,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
}  # fmt: skip
"""PTX's instructions on registers of 32 bits."""


@means(gl.inline_asm_elementwise)
def inline_asm_elementwise(asm: str, constraints: str, args: Sequence[Value], dtype: Any,
                           is_pure: bool, pack: int) -> Any:  # fmt: skip
    """Instructions in order; of what is packed, neighbours in the order of elements."""
    asm, pack, dtypes = plain(asm), plain(pack), plain(dtype)
    single = not isinstance(dtypes, list | tuple)
    dtypes = [dtypes] if single else [plain(d) for d in dtypes]
    datas = torch.broadcast_tensors(*(tensor(x) for x in args))
    shape = datas[0].shape
    if any(x.dtype.itemsize != 4 for x in datas) or any(TORCH[d].itemsize != 4 for d in dtypes):
        raise NotImplementedError("instructions on other than 32 bits")
    if datas[0].numel() % pack:
        raise NotImplementedError(f"{datas[0].numel()} elements in packs of {pack}")
    inputs = [_bits(x).reshape(-1, pack)[:, i] for x in datas for i in range(pack)]
    registers: dict[str, Any] = {f"${len(dtypes) * pack + i}": x for i, x in enumerate(inputs)}

    def operand(word: str) -> Tensor:
        if word.startswith("0f"):
            bits = int(word[2:], 16)
            return torch.full_like(inputs[0], bits - 2**32 if bits >= 2**31 else bits)
        if word.lstrip("-").isdigit():
            return torch.full_like(inputs[0], int(word))
        return registers[word]

    for line in re.sub(r"[{}]", ";", asm).split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, _, kind = words[0].partition(".")
        whole = name in ("add", "sub", "max", "min", "mul", "fma") and not kind.endswith("f32")
        f = PTX.get(f"{name}.{kind}" if whole else name)
        if f is None:
            raise NotImplementedError(f"the instruction {words[0]}")
        registers[words[1]] = f(*map(operand, words[2:]))
    out = []
    for i, d in enumerate(dtypes):
        packs = [registers[f"${i * pack + k}"] for k in range(pack)]
        out.append(Value(torch.stack(packs, -1).view(TORCH[d]).reshape(shape)))
    return out[0] if single else tuple(out)


# --- kernels -------------------------------------------------------------------------------------


class Language:
    """A module of Triton as a kernel here sees it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = translated(getattr(self._module, name))
        setattr(self, name, found)
        return found


def translated(x: Any) -> Any:
    """What stands here for what a kernel's code mentions."""
    if id(x) in MEANING:
        return MEANING[id(x)]
    if isinstance(x, ModuleType) and x.__name__.startswith("triton"):
        return Language(x)
    if x is tl.static_range or x is tl.range:
        return lambda *bounds, **_: range(*(operator.index(plain(b)) for b in bounds))
    if x is tl.constexpr:
        return plain
    if x is tl.tensor:
        return Value
    if isinstance(x, tl.constexpr):
        return x.value
    if isinstance(x, JITCallable) and not isinstance(x, ConstexprFunction):
        return Emulated(x.fn)
    if getattr(x, "__triton_builtin__", False):
        raise NotImplementedError(f"{x.__module__}.{x.__qualname__}")
    return x


class Emulated(KernelInterface):
    """A function in Gluon: kernel[grid](...) launches it, and kernels call it."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.__name__, self.__doc__ = fn, fn.__name__, fn.__doc__
        self._function: Callable | None = None

    def __call__(self, *args: Any, **more: Any) -> Any:
        if self._function is None:
            self._function = self._translate()
        return self._function(*args, **more)

    def _translate(self) -> Callable:
        """The same code, with Gluon's builtins replaced."""
        fn: Any = self.fn
        names, codes = set(), [fn.__code__]
        for code in codes:
            names.update(code.co_names)
            codes += [c for c in code.co_consts if inspect.iscode(c)]
        space = {n: translated(fn.__globals__[n]) for n in names if n in fn.__globals__}
        space |= {"__builtins__": builtins, "__name__": fn.__module__}
        cells = tuple(CellType(translated(c.cell_contents)) for c in fn.__closure__ or ())
        defaults = tuple(plain(d) for d in fn.__defaults__ or ())
        new = FunctionType(fn.__code__, space, fn.__name__, defaults or None, cells or None)
        new.__kwdefaults__ = fn.__kwdefaults__
        return new

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """All programs of a launch, one after the other."""
        signature = inspect.signature(self.fn)
        warps = options.get("num_warps", 4)
        given = signature.bind(
            *args, **{n: x for n, x in options.items() if n in signature.parameters}
        )
        given.apply_defaults()
        users: dict = {}
        for name, x in given.arguments.items():
            if "constexpr" not in str(signature.parameters[name].annotation):
                given.arguments[name] = _argument(x, users)
        grid = grid(dict(given.arguments)) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        if warmup:
            return
        for serial, index in enumerate(product(*map(range, grid))):
            now.program = Program(index, grid, serial, warps)
            try:
                self(*given.args, **given.kwargs)
            finally:
                now.program = None


def _argument(x: Any, users: dict) -> Any:
    if isinstance(x, Tensor):
        return Value(torch.zeros((), dtype=torch.int64), Memory(x, users))
    if isinstance(x, bool | int | float):
        return Value(literal(x, None))
    return plain(x)


def jit(fn: Callable | None = None, **options: Any) -> Any:
    """For gluon.jit."""
    return Emulated if fn is None else Emulated(fn)
