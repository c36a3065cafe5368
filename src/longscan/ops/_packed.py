"""Where sequences lie for kernels: every batch is a packed one, tokens flattened to [N, ...]."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops._layout import check_cu_seqlens, remembered


def starts(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """[rows + 1] int64: where each sequence begins among the flattened tokens, and the end."""
    if cu_seqlens is None:
        return _table(batch, length, length, device)[1]
    bounds = check_cu_seqlens(cu_seqlens, batch, length)
    return remembered(cu_seqlens, "starts", lambda: torch.tensor(bounds, device=device))


def pieces(
    batch: int, length: int, size: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sequences cut into pieces of `size` tokens (the last of a sequence may be shorter).

    Returns: table [m, 3] int64, for each piece its sequence, its first token and its end among the
    flattened tokens, the pieces of a sequence one after the other; first [rows + 1] int64, the
    first piece of each sequence, and m.
    """
    if cu_seqlens is None:
        table, _, first = _table(batch, length, size, device)
        return table, first
    bounds = check_cu_seqlens(cu_seqlens, batch, length)
    return remembered(cu_seqlens, f"pieces {size}", lambda: _cut(bounds, size, device))


def segments(
    batch: int,
    length: int,
    size: int,
    unit: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pieces of `size` tokens taken for sequences; nothing is kept of it.

    Returns, int64: [m + 1] where each piece begins, and the end; [m] its first piece of `unit`
    tokens, of which size is a multiple; [rows] the first and [rows] the last piece of a sequence.
    """
    bounds = [i * length for i in range(batch + 1)]
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(cu_seqlens, batch, length)
    begins, units, first, last, before = [], [], [], [], 0
    for a, b in pairwise(bounds):
        first.append(len(begins))
        begins += range(a, b, size)
        units += range(before, before + -(-(b - a) // unit), size // unit)
        before += -(-(b - a) // unit)
        last.append(len(begins) - 1)
    tables = [*begins, bounds[-1]], units, first, last
    return tuple(torch.tensor(x, device=device) for x in tables)  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _table(
    batch: int, length: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = [i * length for i in range(batch + 1)]
    table, first = _cut(bounds, size, device)
    return table, torch.tensor(bounds, device=device), first


def _cut(bounds: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, first = [], [0]
    for i, (a, b) in enumerate(pairwise(bounds)):
        rows += [(i, t, min(t + size, b)) for t in range(a, b, size)]
        first.append(len(rows))
    return torch.tensor(rows, device=device), torch.tensor(first, device=device)
