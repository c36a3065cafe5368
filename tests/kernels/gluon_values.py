"""Tensors in registers and in global memory, for gluon.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

TORCH = {
    tl.int1: torch.bool, tl.int8: torch.int8, tl.int16: torch.int16, tl.int32: torch.int32,
    tl.int64: torch.int64, tl.uint8: torch.uint8, tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64,
}  # fmt: skip
TRITON = {b: a for a, b in TORCH.items()}
RANK = {x: i for i, x in enumerate(TORCH.values())}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MEANING: dict[int, Callable] = {}
"""id of a builtin -> what stands for it."""

MANY = -2
now: Any = SimpleNamespace(program=None)
"""The program that runs, a gluon_shared.Program."""


class HazardError(AssertionError):
    """What may go wrong on a device."""


def means(*names: Any) -> Callable:
    """The decorated function is what these builtins of Gluon do."""

    def note(function: Callable) -> Callable:
        MEANING.update((id(name), function) for name in names)
        return function

    return note


class Memory:
    """The elements a tensor spans in global memory, and which program wrote and which read each.

    users: for each storage that a launch has met two tensors of programs, -1 for none, and MANY.
    """

    def __init__(self, x: Tensor, users: dict) -> None:
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        self.flat = x.detach().as_strided((span if x.numel() else 0,), (1,), x.storage_offset())
        place = x.untyped_storage().data_ptr(), x.dtype
        if place not in users:
            size = x.untyped_storage().nbytes() // x.element_size()
            users[place] = torch.full((2, size), -1, dtype=torch.int32)
        self.writer, self.reader = users[place][:, x.storage_offset() :]

    def access(self, offsets: Tensor, mask: Tensor | None, write: bool) -> Tensor:
        """Offsets that are accessed."""
        offsets = offsets.reshape(-1) if mask is None else offsets[mask]
        if not offsets.numel():
            return offsets
        low, high = (int(x) for x in torch.aminmax(offsets))
        if low < 0 or high >= self.flat.numel():
            raise HazardError(f"elements {low} to {high} of {self.flat.numel()} are accessed")
        own = now.program.serial
        writer, reader = self.writer[offsets], self.reader[offsets]
        if not ((writer == -1) | (writer == own)).all():
            raise HazardError("another program writes there")
        alone = (reader == -1) | (reader == own)
        if not write:
            self.reader[offsets] = torch.where(alone, own, MANY).int()
        elif not alone.all():
            raise HazardError("another program reads there")
        else:
            self.writer[offsets] = own
        return offsets


class Value:
    """A tensor in registers, or (with a base) of pointers: data are then offsets of elements."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Tensor, base: Memory | None = None) -> None:
        self.data, self.base = data, base

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def dtype(self) -> Any:
        if self.base is not None:
            return tl.pointer_type(TRITON[self.base.flat.dtype])
        return TRITON[self.data.dtype]

    @property
    def type(self) -> Any:
        kind = self.dtype
        element = kind.element_ty if self.base is not None and not self.shape else kind
        return SimpleNamespace(scalar=kind, element_ty=element, shape=self.shape, layout=None)

    def like(self, change: Callable[[Tensor], Tensor]) -> Value:
        """A view of it."""
        return Value(change(self.data), self.base)

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Value:
        if fp_downcast_rounding is not None:
            raise NotImplementedError("rounding other than to the nearest")
        kind = TORCH[plain(dtype)]
        return Value(self.data.view(kind) if bitcast else self.data.to(kind))

    cast = to

    def __getitem__(self, index: Any) -> Value:
        for i in index if isinstance(index, tuple) else (index,):
            if i is not None and i != slice(None):
                raise TypeError("a tensor in registers has no elements to choose from")
        return self.like(lambda x: x[index])

    def __bool__(self) -> bool:
        return bool(self.data.item())

    def __index__(self) -> int:
        if self.data.is_floating_point():
            raise TypeError("not a whole number")
        return int(self.data.item())

    def __int__(self) -> int:
        return self.__index__()

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __invert__(self) -> Value:
        return Value(~self.data)

    def __abs__(self) -> Value:
        return Value(self.data.abs())

    def permute(self, *order: Any) -> Value:
        return MEANING[id(gl.permute)](self, *order)

    def reshape(self, *shape: Any) -> Value:
        return MEANING[id(gl.reshape)](self, *shape)

    @property
    def T(self) -> Value:
        return MEANING[id(gl.permute)](self, (1, 0))

    def sum(self, axis: int | None = None, keep_dims: bool = False) -> Value:
        return MEANING[id(gl.sum)](self, axis, keep_dims)


def plain(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


@cache
def number(value: Any, kind: type, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def literal(value: Any, other: torch.dtype | None) -> Tensor:
    """A Python number beside a tensor of this dtype."""
    if isinstance(value, bool):
        dtype = torch.bool if other is None else other
    elif isinstance(value, int):
        dtype = torch.int32 if -(2**31) <= value < 2**31 else torch.int64
        if other is not None and other != torch.bool:
            dtype = other if other != torch.int32 else dtype
    else:
        dtype = other if other is not None and other.is_floating_point else torch.float32
    return number(value, type(value), dtype)


def tensor(x: Any, other: torch.dtype | None = None) -> Tensor:
    x = plain(x)
    if isinstance(x, Value):
        if x.base is not None:
            raise TypeError("a pointer is no number")
        return x.data
    if not isinstance(x, bool | int | float):
        raise TypeError(f"a {type(x).__name__} is no number; a product must be waited for")
    return literal(x, other)


def pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both in the dtype that Triton computes them in."""
    a, b = plain(a), plain(b)
    kinds = [x.data.dtype if isinstance(x, Value) else None for x in (a, b)]
    x, y = tensor(a, kinds[1]), tensor(b, kinds[0])
    if x.ndim != y.ndim and x.ndim and y.ndim:
        raise TypeError(f"shapes {list(x.shape)} and {list(y.shape)}")
    if x.dtype != y.dtype:
        wide = x.dtype if RANK[x.dtype] > RANK[y.dtype] else y.dtype
        if {x.dtype, y.dtype} == {torch.float16, torch.bfloat16}:
            wide = torch.float32
        x, y = x.to(wide), y.to(wide)
    return x, y


def _operators() -> None:
    def divide(x: Tensor, y: Tensor) -> Tensor:
        return x / y if x.is_floating_point() else x.float() / y.float()

    def whole(x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            raise TypeError("// of numbers that are not whole")
        return torch.div(x, y, rounding_mode="trunc")

    def along(pointer: Value, offset: Any, sign: int) -> Value:
        offset = tensor(offset, torch.int64).to(torch.int64)
        return Value(pointer.data + sign * offset, pointer.base)

    table = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": divide,
        "floordiv": whole, "mod": torch.fmod, "and": torch.bitwise_and, "or": torch.bitwise_or,
        "xor": torch.bitwise_xor, "lshift": torch.bitwise_left_shift,
        "rshift": torch.bitwise_right_shift, "lt": torch.lt, "le": torch.le, "gt": torch.gt,
        "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    }  # fmt: skip

    def make(name: str, function: Callable, turned: bool) -> Callable:
        def method(self: Value, other: Any) -> Any:
            if name in ("add", "sub") and (self.base or getattr(other, "base", None)):
                if self.base is None:
                    return along(other, self, 1)
                return along(self, other, 1 if name == "add" else -1)
            x, y = pair(other, self) if turned else pair(self, other)
            return Value(function(x, y))

        return method

    for name, function in table.items():
        setattr(Value, f"__{name}__", make(name, function, False))
        if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(Value, f"__r{name}__", make(name, function, True))


_operators()


def _where(pointer: Value, mask: Any) -> tuple[Memory, Tensor, Tensor | None]:
    """The memory, offsets and which of them count."""
    if not isinstance(pointer, Value) or pointer.base is None:
        raise TypeError("not a pointer")
    if mask is None:
        return pointer.base, pointer.data, None
    offsets, there = torch.broadcast_tensors(pointer.data, tensor(mask).to(torch.bool))
    return pointer.base, offsets, there


@means(gl.load)
def load(pointer: Value, mask: Any = None, other: Any = None, *_: Any, **__: Any) -> Value:
    base, offsets, there = _where(pointer, mask)
    flat = base.flat
    data = flat[base.access(offsets, there, write=False)]
    if there is None:
        return Value(data.reshape(offsets.shape))
    out = torch.full(offsets.shape, torch.nan if flat.is_floating_point() else -1).to(flat.dtype)
    if other is not None:
        out.copy_(tensor(other, flat.dtype).to(flat.dtype).expand(out.shape))
    out[there] = data
    return Value(out)


@means(gl.store)
def store(pointer: Value, value: Any, mask: Any = None, *_: Any, **__: Any) -> None:
    base, offsets, there = _where(pointer, mask)
    data = tensor(value, base.flat.dtype).to(base.flat.dtype).expand(offsets.shape)
    data = data.reshape(-1) if there is None else data[there]
    base.flat[base.access(offsets, there, write=True)] = data
