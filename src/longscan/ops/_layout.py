"""From tokens to chunks and back, for plain batches and packed sequences alike.

A layout cuts every sequence into chunks of its own (the last one padded), so that no chunk holds
tokens of two sequences and the maths of a chunk never needs to know about packing. Chunks are
ordered step-major (see `algebra.scan`): all first chunks, then all second ones, longest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")


def remembered(x: Tensor, name: str, make: Callable[[], T]) -> T:
    """What `make` derives from the values of x, kept with x until these change.

    Reading values from a device makes it wait, and every layer of a model asks for the same.
    """
    if x.is_inference():  # such tensors do not count their changes
        return make()
    kept: dict = getattr(x, "_longscan", None) or {}
    x._longscan = kept  # type: ignore[attr-defined]
    if name not in kept or kept[name][0] != x._version:
        kept[name] = (x._version, make())
    return kept[name][1]


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """Validate cumulative sequence lengths; returns them as a list.

    Raises: TypeError, ValueError with what is wrong and what to pass.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point():
        raise TypeError("cu_seqlens must be an integer tensor such as torch.tensor([0, 5, 12])")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [n + 1], not {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(
            f"packed sequences lie on one row: with cu_seqlens the batch must be 1, not {batch}"
        )
    bounds = remembered(cu_seqlens, "bounds", lambda: _bounds(cu_seqlens))
    if bounds[-1] != length:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but there are {length} tokens")
    return bounds


def _bounds(cu_seqlens: Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, not {bounds[0]}")
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b <= a:
            raise ValueError(
                f"cu_seqlens must rise strictly: entry {i + 1} is {b} after {a} "
                "(sort the boundaries; leave empty sequences out)"
            )
    return bounds


@dataclass(frozen=True)
class Layout:
    """How [B, T, ...] tokens lie in [G, C, ...] chunks.

    rows: sequences (B, or the number of packed ones); counts[i]: rows that have an i-th chunk.
    index, back, order, inverse: for packed sequences only. index [G * C] is the token of each
    slot (T for padding), back [T] the slot of each token, order [rows] sorts sequences by falling
    number of chunks, inverse undoes it.
    """

    batch: int
    length: int
    chunk: int
    rows: int
    counts: list[int]
    index: Tensor | None = None
    back: Tensor | None = None
    order: Tensor | None = None
    inverse: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [G, C, ...]; padding is zero."""
        steps = len(self.counts)
        if self.index is not None:
            x = F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1))
            return x[self.index].unflatten(0, (-1, self.chunk))
        pad = steps * self.chunk - self.length
        if pad:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        return x.unflatten(1, (steps, self.chunk)).transpose(0, 1).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """[G, C, ...] -> [B, T, ...], the inverse of `split`."""
        if self.back is not None:
            return x.flatten(0, 1)[self.back].unsqueeze(0)
        x = x.unflatten(0, (len(self.counts), self.batch)).transpose(0, 1).flatten(1, 2)
        return x[:, : self.length] if x.shape[1] != self.length else x

    def rows_in(self, state: Tensor) -> Tensor:
        """States in the caller's order -> the layout's."""
        return state if self.order is None else state[self.order]

    def rows_out(self, state: Tensor) -> Tensor:
        """States in the layout's order -> the caller's."""
        return state if self.inverse is None else state[self.inverse]


def layout(batch: int, length: int, chunk: int, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a batch of equal rows, or of one row of packed sequences.

    Raises: ValueError, TypeError for a malformed cu_seqlens (see `check_cu_seqlens`).
    """
    if cu_seqlens is None:
        chunk = min(chunk, 1 << (length - 1).bit_length())
        return Layout(batch, length, chunk, batch, [batch] * (-(-length // chunk)))
    bounds = check_cu_seqlens(cu_seqlens, batch, length)
    return remembered(
        cu_seqlens, f"layout {chunk}", lambda: _packed(bounds, chunk, cu_seqlens.device)
    )


def _packed(bounds: list[int], chunk: int, device: torch.device) -> Layout:
    length = bounds[-1]
    starts = torch.tensor(bounds[:-1])
    lengths = torch.tensor(bounds[1:]) - starts
    chunks = (lengths + chunk - 1) // chunk
    order = torch.argsort(chunks, descending=True, stable=True)
    steps = int(chunks.max())
    counts = [int((chunks > i).sum()) for i in range(steps)]
    step = torch.repeat_interleave(torch.arange(steps), torch.tensor(counts))
    row = order[torch.cat([torch.arange(n) for n in counts])]
    offset = step[:, None] * chunk + torch.arange(chunk)
    index = torch.where(offset < lengths[row, None], starts[row, None] + offset, length).flatten()
    back = torch.empty(length + 1, dtype=torch.long)
    back[index] = torch.arange(index.numel())
    return Layout(
        1, length, chunk, len(lengths), counts,
        index.to(device), back[:-1].to(device), order.to(device), torch.argsort(order).to(device),
    )  # fmt: skip
