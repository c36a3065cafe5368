"""Memory that shows what a kernel did not write, and what it wrote where it should not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BAND = 256
"""Numbers before and behind a guarded tensor: whole cache lines, so that it stays aligned."""


class Guard:
    """Tensors whose neighbourhood is watched.

    value: what fresh memory holds, NaN or a number; bands: whether neighbourhoods are watched.
    """

    def __init__(self, value: float = math.nan, *, bands: bool = True) -> None:
        self.value, self.bands = value, bands
        self._buffers: list[tuple[Tensor, int]] = []

    def like(self, x: Tensor) -> Tensor:
        """A contiguous tensor as x, its contents `value` (those of integers undefined)."""
        if not self.bands:
            fresh = _EMPTY(x.shape, dtype=x.dtype, device=x.device)
            return _filled(fresh, self.value)
        n = x.numel()
        buffer = _filled(_EMPTY((n + 2 * BAND,), dtype=x.dtype, device=x.device), self.value)
        for edge in (buffer[:BAND], buffer[BAND + n :]):
            _filled(edge, self.value, integers=True)
        self._buffers.append((buffer, n))
        return buffer[BAND : BAND + n].view(x.shape)

    def hold(self, x: Tensor) -> Tensor:
        """A copy of x, watched."""
        return self.like(x).copy_(x)

    def intact(self) -> bool:
        """Whether nothing was written beside the tensors."""
        return all(
            bool(_untouched(edge, self.value).all())
            for buffer, n in self._buffers
            for edge in (buffer[:BAND], buffer[BAND + n :])
        )

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """In here what torch.empty and its relatives return in Python is guarded."""

        def guarded(make: Callable) -> Callable:
            def fresh(*args: Any, **kwargs: Any) -> Tensor:
                x = make(*args, **kwargs)
                plain = x.layout == torch.strided and x.is_contiguous() and not x.is_meta
                if not plain or type(x) is not Tensor or x.requires_grad or x.is_pinned():
                    return x
                return self.like(x)

            return fresh

        try:
            for home, name in _MAKERS:
                setattr(home, name, guarded(getattr(home, name)))
            yield
        finally:
            for (home, name), make in _MAKERS.items():
                setattr(home, name, make)


_MAKERS: dict[tuple[Any, str], Callable] = {
    (home, name): getattr(home, name)
    for home, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
    )
}  # fmt: skip
_EMPTY = torch.empty
_MARK = 77


def _filled(x: Tensor, value: float, integers: bool = False) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return x.fill_(value)
    return x.fill_(_MARK % 2 if x.dtype == torch.bool else _MARK) if integers else x


def _untouched(x: Tensor, value: float) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x == (_MARK % 2 if x.dtype == torch.bool else _MARK)
    return x.isnan() if math.isnan(value) else x == torch.full_like(x, value)
