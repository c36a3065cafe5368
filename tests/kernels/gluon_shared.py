"""Shared memory, copies to it and products of what it holds, for gluon.py, and their hazards.

Barriers are those that Triton 3.6 inserts: one behind each wait for copies, and one before an
access that conflicts with an earlier one since the last barrier. It takes a product to have read
its operands when it is issued; with several warp groups a barrier before the wait for it then
hides that one is missing after it.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from gluon_values import BITS, TORCH, TRITON, HazardError, Value, load, means, now, plain
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

FORMS: dict[Any, int] = {}
"""Orders of elements in shared memory, by number."""


class Shared:
    """Shared memory, or a view of it.

    tensors: the data, and two of integers of the same form: one to compare views, and the order of
    elements in which each was written (0: not yet).
    """

    def __init__(
        self, tensors: Sequence[Tensor], layout: Any, form: int, of: Shared | None, cut: bool
    ) -> None:
        self.data, self.shadow, self.written = self.tensors = tuple(tensors)
        self.layout, self.form, self.cut = layout, form, cut
        self.whole = self if of is None else of.whole

    def view(self, change: Callable[[Tensor], Tensor], cut: bool = False) -> Shared:
        tensors = map(change, self.tensors)
        return Shared(tensors, self.layout, self.form, self, cut or self.cut)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return TRITON[self.data.dtype]

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=self.dtype, shape=self.shape, layout=self.layout)

    def overlaps(self, other: Shared) -> bool:
        if self.whole is not other.whole:
            return False
        self.shadow.fill_(1)
        found = bool(other.shadow.any())
        self.shadow.zero_()
        return found

    def index(self, i: Any) -> Shared:
        i = operator.index(plain(i))
        if not 0 <= i < self.shape[0]:
            raise HazardError(f"index {i} of {self.shape[0]} in shared memory")
        return self.view(lambda x: x[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        start, length, dim = plain(start), plain(length), plain(dim)
        return self.view(lambda x: x.narrow(dim, start, length), cut=True)

    def permute(self, order: Sequence[int]) -> Shared:
        return self.view(lambda x: x.permute([plain(i) for i in order]))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self.view(lambda x: x.view([plain(n) for n in shape]))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        shape, kind = [plain(n) for n in shape], TORCH[plain(dtype)]
        layout = plain(layout)

        def change(x: Tensor) -> Tensor:
            return x.view(kind if x is self.data else BITS[kind.itemsize]).view(shape)

        return Shared(map(change, self.tensors), layout, _form(layout, shape), self, self.cut)

    def _keep_alive(self) -> None:
        pass

    def load(self, layout: Any = None) -> Value:
        return Value(self.read().clone())

    def store(self, value: Value) -> None:
        if value.shape != self.shape or value.data.dtype != self.data.dtype:
            raise TypeError(f"{value.shape} {value.dtype} into {self.shape} {self.dtype}")
        now.program.write(self, by_registers=True)
        self.put(value.data)

    def read(self, product: bool = False) -> Tensor:
        now.program.read(self, product)
        if ((self.written != self.form) & (self.written != 0)).any():
            raise HazardError("read in another order of elements than it was written")
        return self.data

    def put(self, data: Tensor) -> None:
        self.data.copy_(data)
        self.written.fill_(self.form)


def _form(layout: Any, shape: Sequence[int]) -> int:
    """A number for the order of elements of shared memory in this layout."""
    key: Any = repr(layout), tuple(shape[-getattr(layout, "rank", len(shape)) :])
    if isinstance(layout, gl.SwizzledSharedLayout):
        order = list(layout.order)
        if layout.max_phase == 1 and order == sorted(order, reverse=True):
            key = "one row after the other"
    return FORMS.setdefault(key, len(FORMS) + 1)


class Access:
    """Of shared memory, since the last barrier that Triton knows of. sure: whether there was none
    since that it might have inserted."""

    def __init__(self, what: Shared, write: bool) -> None:
        self.what, self.write, self.sure = what, write, True

    def meets(self, other: Access) -> bool:
        """Whether Triton inserts a barrier between the two."""
        if not (self.write or other.write) or self.what.whole is not other.what.whole:
            return False
        return not (self.what.cut and other.what.cut) or self.what.overlaps(other.what)


class Product:
    """A product that was issued. parted: a barrier came, or may have, before its end."""

    def __init__(self, operands: list[Shared]) -> None:
        self.operands, self.done, self.parted, self.place = operands, False, False, _place()


class Written:
    """Shared memory that registers were stored to: seen by products behind a fence, and behind a
    barrier after it."""

    def __init__(self, what: Shared) -> None:
        self.what, self.fenced, self.parted, self.place = what, False, False, _place()


class Accumulator:
    """The result of a product that is under way."""

    def __init__(self, data: Tensor, made: Product) -> None:
        self.data, self.made = data, made


class Unfinished(Value):
    """A result that was handed out although its product may be under way."""

    def __init__(self, data: Tensor, made: Product) -> None:
        self.late, self.made, self.base = data, made, None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        if not self.made.done:
            raise HazardError(f"used before it is there: the product of {self.made.place}")
        return self.late


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_name}, line {frame.f_lineno}"


class Program:
    """One program of a launch: what it has under way."""

    def __init__(self, index: tuple, grid: tuple, serial: int, warps: int) -> None:
        self.index, self.grid, self.serial, self.warps = index, grid, serial, warps
        self.copies: list[tuple[Shared, Tensor, str]] = []
        self.groups: list[list[tuple[Shared, Tensor, str]]] = []
        self.products: list[Product] = []
        self.finished: list[Product] = []
        self.accesses: list[Access] = []
        self.written: list[Written] = []

    def barrier(self) -> None:
        """All threads meet."""
        self.accesses.clear()
        self.finished.clear()
        self.perhaps_barrier()
        self.written = [w for w in self.written if not w.fenced]

    def perhaps_barrier(self) -> None:
        """What takes shared memory of the compiler's own has a barrier in it, or not."""
        for x in self.accesses:
            x.sure = False
        for x in self.products:
            x.parted = True
        for w in self.written:
            w.parted = w.parted or not w.fenced

    def _access(self, what: Shared, write: bool) -> None:
        new = Access(what, write)
        met = [x for x in self.accesses if x.meets(new)]
        if any(x.sure for x in met):
            self.barrier()
        elif met:
            self.perhaps_barrier()
        self.accesses.append(new)
        for group in (self.copies, *self.groups):
            for copy, _, place in group:
                if copy.overlaps(what):
                    raise HazardError(f"a copy to it is under way: {place}")

    def read(self, what: Shared, product: bool = False) -> None:
        self._access(what, False)
        if not product:
            return
        for w in self.written:
            if w.what.overlaps(what):
                if not w.fenced:
                    raise HazardError(f"no fence_async_shared since it was stored: {w.place}")
                if w.parted:
                    raise HazardError(f"no barrier behind the fence since it was stored: {w.place}")

    def write(self, what: Shared, by_registers: bool) -> None:
        for x in self.products:
            if any(o.overlaps(what) for o in x.operands):
                raise HazardError(f"a product that reads it is under way: {x.place}")
        self._access(what, True)
        for x in self.finished:
            if x.parted and self.warps > 4 and any(o.overlaps(what) for o in x.operands):
                raise HazardError(
                    f"other warp groups may be at the product that reads it: {x.place}; a barrier "
                    "is missing behind the wait for it"
                )
        if by_registers:
            self.written = [w for w in self.written if not w.fenced or not w.what.overlaps(what)]
            self.written.append(Written(what))


@means(gl.allocate_shared_memory)
def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> Shared:
    shape, kind = [plain(n) for n in shape], TORCH[plain(element_ty)]
    size = math.prod(shape) * kind.itemsize
    poison = torch.full((size,), 255, dtype=torch.uint8)
    more = (torch.zeros(shape, dtype=BITS[kind.itemsize]) for _ in range(2))
    layout = plain(layout)
    new = Shared((poison.view(kind).view(shape), *more), layout, _form(layout, shape), None, False)
    if value is not None:
        new.store(value)
    return new


@means(async_copy.async_copy_global_to_shared)
def copy_async(smem: Shared, pointer: Value, mask: Any = None, *_: Any, **__: Any) -> None:
    if pointer.shape != smem.shape:
        raise TypeError(f"pointers {pointer.shape} for {smem.shape}")
    now.program.write(smem, by_registers=False)
    now.program.written = [w for w in now.program.written if not w.what.overlaps(smem)]
    now.program.copies.append((smem, load(pointer, mask, 0).data, _place()))


@means(async_copy.commit_group)
def commit_group() -> None:
    now.program.groups.append(now.program.copies)
    now.program.copies = []


@means(async_copy.wait_group)
def wait_group(num_outstanding: int = 0) -> None:
    while len(now.program.groups) > plain(num_outstanding):
        for smem, data, _ in now.program.groups.pop(0):
            smem.put(data)
    now.program.barrier()


@means(gl.thread_barrier)
def thread_barrier() -> None:
    now.program.barrier()


@means(hopper.fence_async_shared)
def fence_async_shared(cluster: bool = False) -> None:
    for w in now.program.written:
        w.fenced = True


@means(hopper.warpgroup_mma_init)
def warpgroup_mma_init(value: Value) -> Accumulator:
    done = Product([])
    done.done = True
    return Accumulator(value.data, done)


@means(hopper.warpgroup_mma)
def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: Any = True, precision: Any = None,
                  max_num_imprecise_acc: Any = None, is_async: bool = False) -> Any:  # fmt: skip
    operands = [x for x in (a, b) if isinstance(x, Shared)]
    if not isinstance(b, Shared):
        raise TypeError("the second operand must be in shared memory")
    before = acc.late if isinstance(acc, Unfinished) else acc.data
    x, y = (_narrow(z.read(product=True) if isinstance(z, Shared) else z.data) for z in (a, b))
    if list(before.shape) != [x.shape[0], y.shape[1]] or before.dtype != torch.float32:
        raise TypeError(f"{list(x.shape)} times {list(y.shape)} into {list(before.shape)}")
    data = x @ y
    if bool(plain(use_acc)):
        data = before + data
    made = Product(operands)
    now.program.products.append(made)
    if plain(is_async):
        return Accumulator(data, made)
    _finish(0)
    return Value(data)


def _narrow(x: Tensor) -> Tensor:
    """What tensor cores take of an operand: of float32 the first 19 bits."""
    if x.dtype == torch.float32:
        return (x.view(torch.int32) & -8192).view(torch.float32)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"products of {x.dtype}")
    return x.float()


def _finish(outstanding: int) -> None:
    while len(now.program.products) > outstanding:
        made = now.program.products.pop(0)
        made.done = True
        now.program.finished.append(made)


@means(hopper.warpgroup_mma_wait)
def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    _finish(plain(num_outstanding))
    out = []
    for x in deps:
        if isinstance(x, Accumulator):
            x = Value(x.data) if x.made.done else Unfinished(x.data, x.made)
        out.append(x)
    return out[0] if len(out) == 1 else tuple(out)
