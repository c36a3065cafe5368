"""A case of a proof: a call of an op, its arguments made from a seed in float64 on the CPU."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Arguments = dict[str, Any]
Make = Callable[[torch.Generator], Arguments]

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 150)
PACKED = {
    "ones": [0, 1, 2, 3, 20, 21],
    "borders": [0, 63, 64, 65, 129, 150],
    "grid": [0, 16, 80, 144, 272],
    "long": [0, 5, 1005, 1006, 3000],
}


@dataclass(frozen=True)
class Case:
    """One call of an op.

    make: its arguments from a generator, float64 on the CPU.
    quick: small enough for Triton's interpreter.
    dtypes: of the values; low: the gates come in that dtype too, and not in float32.
    final: whether a gradient reaches the final state.
    strided: the arguments are views of wider tensors.
    copies: how often the batch is repeated, to go beyond 2^31 numbers; the last copy is compared.
    floor: errors are relative to at least this, for gradients that are zero but for rounding.
    optional: what an op may compute without its kernel, as one token by its step.
    group: cases of a group share compiled kernels.
    """

    name: str
    make: Make
    quick: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    low: bool = False
    final: bool = True
    strided: bool = False
    copies: int = 1
    floor: float = 0.0
    optional: bool = False
    group: str = ""

    def arguments(self) -> Arguments:
        """The same every time."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(self.name.encode())))


@dataclass(frozen=True)
class Size:
    """Sizes of a call with heads. cu: where packed sequences begin; the batch is then one row."""

    length: int = 150
    batch: int = 2
    heads: int = 2
    groups: int = 0
    key: int = 64
    value: int = 64
    cu: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        return self.batch if self.cu is None else len(self.cu) - 1

    def packed(self, cu: list[int]) -> Size:
        return replace(self, cu=tuple(cu), batch=1, length=cu[-1])


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def bounds(size: Size) -> Tensor | None:
    return None if size.cu is None else torch.tensor(size.cu)


def gates(kind: str, g: torch.Generator, *shape: int) -> Tensor | None:
    """Log decays by the name of their kind."""
    if kind == "none":
        return None
    usual = -F.softplus(normal(g, *shape) - 2)
    constant = {"open": 0.0, "near": -1e-4, "sharp": -30.0, "erased": -1e4}
    if kind in constant:
        return torch.full_like(usual, constant[kind])
    if kind == "usual":
        return usual
    pick = uniform(g, *shape)
    if kind == "closed":
        return torch.where(pick < 0.3, -1e4, torch.where(pick < 0.6, -30.0, usual))
    # Mixed: most as usual, some of every extreme.
    for below, value in ((0.12, -1e-4), (0.08, 0.0), (0.04, -30.0), (0.02, -1e4)):
        usual = torch.where(pick < below, value, usual)
    return usual
