"""The keys and values attention remembers: how they are kept, extended and read.

A cache is State(k, v [B, L, Hkv, D], length [B]): right-aligned, so that rows of different ages
are extended by one plain append. Row b has seen length[b] tokens and its last min(length[b], L)
slots are valid; slots before them are zero and never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longscan.state import Leaf, State


class Later(State):
    """A state computed when it is first read.

    In training most states are dropped unread, and that of many packed sequences can be far
    larger than the sequences: n rows, each as wide as the longest.
    """

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], State]) -> None:
        self._make: Callable[[], State] | None = make
        self._made: State | None = None

    @property
    def _items(self) -> dict[str, Leaf]:  # type: ignore[override]
        if self._made is None:
            assert self._make is not None
            with torch.enable_grad():
                self._made = self._make()
            self._make = None
        return self._made._items


pytree.register_pytree_node(
    Later,
    lambda s: (list(s.values()), list(s)),
    lambda values, keys: State(dict(zip(keys, values, strict=True))),
    serialized_type_name="longscan.ops._cache.Later",
)


def give(make: Callable[[], State]) -> State:
    """The state `make` builds: at once while nothing is recorded, else when it is read."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Later(make)
    return make()


def width(window: int | None, total: int) -> int:
    """Entries worth keeping of `total`: the next token sees window - 1 before itself."""
    return total if window is None else min(total, window - 1)


def with_counts(length: Tensor, counts: list[int]) -> Tensor:
    """`length` with its values noted as numbers, which saves reading them from the device."""
    if not torch.compiler.is_compiling():
        length._longscan_counts = counts  # type: ignore[attr-defined]
    return length


def counts(state: State) -> list[int]:
    """Tokens each row has seen, as numbers."""
    length = state.tensor("length")
    if torch.compiler.is_compiling():
        return length.tolist()
    known = getattr(length, "_longscan_counts", None)
    if known is None:
        known = length.tolist()
        with_counts(length, known)
    return known


class Past(NamedTuple):
    """A cache without its useless slots.

    k, v [R, P, Hkv, D]; first [R]: the first valid slot of each row, None if all slots of all
    rows are valid; counts: tokens each row has seen; length: the same as a tensor.
    """

    k: Tensor
    v: Tensor
    first: Tensor | None
    counts: list[int]
    length: Tensor


def read(state: State | None, window: int | None, dtype: torch.dtype) -> Past | None:
    """What a state remembers, None if that is nothing at all."""
    if state is None:
        return None
    k, v, length = state.tensor("k"), state.tensor("v"), state.tensor("length")
    seen = counts(state)
    used = width(window, min(max(seen), k.shape[1]))
    if used < k.shape[1]:
        k, v = k[:, k.shape[1] - used :], v[:, v.shape[1] - used :]
    first = None if min(seen) >= used else used - length.clamp(max=used)
    return Past(k.to(dtype), v.to(dtype), first, seen, length)


class _Room:
    """Memory in which a cache grows: entries are written behind those that can be seen.

    A cache that ends where the room has been filled to may claim the space behind itself, once:
    states stay values although appending one entry does not copy the others. Whoever comes
    second (a branch from the same state) finds the place taken and moves to a room of its own.
    """

    __slots__ = ("ends", "memory")

    def __init__(self, past: Tensor | None, new: Tensor) -> None:
        """All entries at the start, and a quarter of their number free behind them."""
        batch, n, heads, dim = new.shape
        before = 0 if past is None else past.shape[1]
        total = before + n
        # Heads outermost, as the kernels read; the axes are [B, capacity, Hkv, D].
        memory = new.new_empty(batch, heads, total + max(64, total // 4), dim).transpose(1, 2)
        if past is not None:
            memory[:, :before] = past
        memory[:, before:total] = new
        self.memory, self.ends = memory, {total}

    def claim(self, end: int, n: int) -> bool:
        memory = self.memory
        if end + n > memory.shape[1] or memory.is_inference() != torch.is_inference_mode_enabled():
            return False
        try:
            self.ends.remove(end)  # one operation, so that two threads cannot both succeed
        except KeyError:
            return False
        self.ends.add(end + n)
        return True

    def view(self, start: int, end: int) -> Tensor:
        x = self.memory[:, start:end]
        x._longscan_room = (self, start, end)  # type: ignore[attr-defined]
        return x


def append(past: Tensor | None, new: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(all entries, the last `keep` of them) of a cache [B, P, Hkv, D] and new ones [B, T, ...].

    Without autograd the kept entries lie in memory with room behind them, and appending to them
    costs O(T), not O(P).
    """
    n = new.shape[1]
    total = n if past is None else past.shape[1] + n
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        both = new if past is None else torch.cat([past, new], 1)
        return both, both[:, total - keep :]
    if keep < n:  # only new entries survive: nothing to gain from joining them to the old
        both = new if past is None else torch.cat([past, new], 1)
        return both, _Room(None, new[:, n - keep :]).view(0, keep)
    room, start, end = getattr(past, "_longscan_room", (None, 0, 0))
    if room is not None and room.claim(end, n):
        room.memory[:, end : end + n] = new
        end += n
    else:
        room, start, end = _Room(past, new), 0, total
    both = room.view(start, end)
    return both, both if keep == total else room.view(end - keep, end)
