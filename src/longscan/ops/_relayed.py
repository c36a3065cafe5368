"""What a layer does once for all rows and ranks, though it runs part after part, rank after rank.

A layer whose tokens meet in more than affine maps is handed from rank to rank, a part of the rows
at a time (`longscan.parallel`). Inside such a layer no rank may wait for the others, as these wait
for it: what needs them all is left for the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Learn = Callable[..., None]


class _Left(threading.local):
    """Of the layer that is under way: tensors of each part by what shall be done with them, and
    sums over parts with their weights."""

    work: dict[Learn, list[tuple[Tensor, ...]]] | None = None
    sums: dict[object, tuple[Tensor, int]]


_left = _Left()


@contextmanager
def relayed() -> Iterator[None]:
    """The layer called inside, once for each part of the rows, is handed from rank to rank.

    What it left is done behind it, where all ranks come by.
    """
    _left.work, _left.sums = {}, {}
    try:
        yield
        work = _left.work
    finally:
        _left.work, _left.sums = None, {}
    for learn, parts in work.items():
        learn(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def relaying() -> bool:
    """Whether the layer that is under way must not wait for other ranks."""
    return _left.work is not None


def later(learn: Learn, *tensors: Tensor) -> None:
    """learn(*tensors) when all parts have run, on all ranks at once, with the parts joined along
    the first axis; at once if the layer is not relayed."""
    if _left.work is None:
        learn(*tensors)
    else:
        _left.work.setdefault(learn, []).append(tensors)


def mean(of: object, x: Tensor, weight: int) -> Tensor:
    """The mean of x over the parts that have run, so behind the last over all: of one quantity `of`
    a layer, x being its mean in this part over `weight` tokens."""
    if _left.work is None:
        return x
    total, n = _left.sums.get(of, (torch.zeros_like(x), 0))
    total, n = total + x * weight, n + weight
    _left.sums[of] = total, n
    return total / n
