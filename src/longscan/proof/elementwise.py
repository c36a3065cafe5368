"""What surrounds the recurrences: gated units, sums with their norms, rotary positions. Their
cases, what they must compute, and how the kernels are called."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import widen
from longscan.ops._glu_fused import glu_fused
from longscan.ops._rotary_fused import rotary_fused, rotary_heads_fused
from longscan.ops.rotary import rotary_at
from longscan.proof.case import LENGTHS, Arguments, Case, normal, uniform


def _group(options: dict[str, Any]) -> str:
    """Cases that differ in lengths only share compiled kernels."""
    return str({k: x for k, x in options.items() if k not in ("length", "batch", "first")})


# --- gated linear units ---------------------------------------------------------------------


def plain_glu(x: Tensor, *, activation: str = "silu") -> tuple:
    gate, up = widen(x).chunk(2, -1)
    return ({"silu": F.silu, "gelu": F.gelu}[activation](gate) * up).to(x.dtype), None


def launch_glu(x: Tensor, **more: Any) -> tuple:
    return glu_fused(x, **more), None


def glu_arguments(
    g: torch.Generator, *, length: int = 150, batch: int = 2, width: int = 64, large: float = 1.0,
    **options: Any,
) -> Arguments:  # fmt: skip
    return {"x": normal(g, batch, length, 2 * width) * large, **options}


def glu_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        more = {k: options.pop(k) for k in ("quick", "dtypes", "strided", "copies") if k in options}
        return Case(name, partial(glu_arguments, **options), group=_group(options), **more)

    yield case("small", length=7, width=24, quick=True)
    yield case("small gelu", length=5, width=40, activation="gelu", quick=True)
    yield case("T=150")
    for width in (1, 16, 63, 100, 512, 1000, 1024, 1025, 2816, 5632):
        yield case(f"F={width}", length=50, width=width)
    yield case("gelu", width=2816, activation="gelu")
    for activation in ("silu", "gelu"):
        yield case(f"large {activation}", large=60.0, activation=activation)
    yield case("views", width=128, strided=True)
    yield case("many rows", batch=7, length=3001)
    yield case("beyond 2^31", batch=1, length=2048, width=512, copies=1040, dtypes=("bf16",))


# --- a sum and its norm ---------------------------------------------------------------------


def plain_add_norm(x: Tensor, branch: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple:
    total = x + branch
    v = widen(total)
    y = v * (v.square().mean(-1, True) + eps).rsqrt() * weight
    return y.to(branch.dtype), total


def add_norm_arguments(
    g: torch.Generator, *, length: int = 150, batch: int = 2, width: int = 64, **options: Any
) -> Arguments:
    shape = batch, length, width
    return {
        "x": normal(g, *shape) * (1 + 5 * uniform(g, batch, length, 1)),
        "branch": normal(g, *shape),
        "weight": 1 + 0.3 * normal(g, width),
        **options,
    }


def add_norm_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "dtypes", "strided", "copies", "low", "final")
        more = {k: options.pop(k) for k in known if k in options}
        return Case(name, partial(add_norm_arguments, **options), group=_group(options), **more)

    yield case("small", length=7, width=24, quick=True)
    yield case("small, last", length=5, width=40, final=False, quick=True)
    yield case("T=150")
    for width in (1, 16, 63, 100, 500, 1000, 1024, 2048, 3000, 4096, 8192):
        yield case(f"D={width}", length=50, width=width)
    yield case("large eps", width=1024, eps=0.1)
    yield case("one dtype", width=1024, low=True)
    yield case("the last one", width=1024, final=False)
    yield case("views", width=128, strided=True)
    yield case("many rows", batch=7, length=3001)
    yield case("beyond 2^31", batch=1, length=2048, width=1024, copies=1040, dtypes=("bf16",))


# --- rotary positions -----------------------------------------------------------------------


def _factors(positions: Tensor | None, dim: int) -> tuple[Tensor | None, Tensor | None]:
    if positions is None:
        return None, None
    cos, sin = rotary_at(positions, dim)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def plain_rotary(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, positions: Tensor | None,
    dim: int, heads: int, groups: int, d_head: int, eps: float = 1e-6,
) -> tuple:  # fmt: skip
    y, both = widen(x), heads + groups
    rest = y[..., (both + groups) * d_head :]
    y = y[..., : (both + groups) * d_head].unflatten(-1, (-1, d_head))
    qk, v = y[..., :both, :], y[..., both:, :]
    if q_weight is not None and k_weight is not None:
        weight = torch.cat([q_weight.expand(heads, -1), k_weight.expand(groups, -1)])
        qk = qk * (qk.square().mean(-1, True) + eps).rsqrt() * weight
    cos, sin = _factors(positions, dim)
    if cos is not None and sin is not None:
        part, half = qk[..., :dim], dim // 2
        swapped = torch.cat([part[..., half:], part[..., :half]], -1)
        qk = torch.cat([part * cos.to(y) + swapped * sin.to(y), qk[..., dim:]], -1)
    y = torch.cat([qk, v], -2).flatten(-2).to(x.dtype)
    return y, rest.to(x.dtype) if rest.shape[-1] else None


def launch_rotary(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, positions: Tensor | None,
    dim: int, heads: int, groups: int, d_head: int, eps: float = 1e-6,
) -> tuple:  # fmt: skip
    cos, sin = _factors(positions, dim)
    if groups == 0 and cos is not None and sin is not None:  # x is one tensor of heads
        return rotary_fused(x.unflatten(-1, (heads, d_head)), cos, sin).flatten(-2), None
    q, k, v, rest = rotary_heads_fused(
        x, cos, sin, q_weight, k_weight, heads=heads, groups=groups, d_head=d_head, eps=eps
    )
    return torch.cat([q, k, v], -2).flatten(-2), rest if rest.shape[-1] else None


def rotary_arguments(
    g: torch.Generator, *, length: int = 150, batch: int = 2, heads: int = 2, groups: int = 2,
    d_head: int = 64, dim: int | None = None, rest: int = 0, norm: bool = False,
    first: int | None = 0, rows: bool = False,
) -> Arguments:  # fmt: skip
    """first: position of the first token, None: none are turned; rows: each has its own."""
    positions = None if first is None else torch.arange(length) + first
    if positions is not None and rows:
        positions = positions + 7 * torch.arange(batch)[:, None]
    return {
        "x": normal(g, batch, length, (heads + 2 * groups) * d_head + rest),
        "q_weight": 1 + 0.3 * normal(g, d_head) if norm else None,
        "k_weight": 1 + 0.3 * normal(g, d_head) if norm else None,
        "positions": positions,
        "dim": d_head if dim is None else dim,
        "heads": heads, "groups": groups, "d_head": d_head,
    }  # fmt: skip


def rotary_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        more = {k: options.pop(k) for k in ("quick", "dtypes", "strided", "copies") if k in options}
        return Case(name, partial(rotary_arguments, **options), group=_group(options), **more)

    yield case("small", length=7, d_head=16, rest=3, quick=True)
    yield case("small, norm", length=9, d_head=24, dim=10, heads=6, groups=3, norm=True, rows=True,
               quick=True)  # fmt: skip
    yield case("small, heads", length=9, d_head=16, heads=5, groups=0, rows=True, quick=True)
    yield case("T=150", norm=True)
    for length in LENGTHS[:-1]:
        yield case(f"T={length}", length=length)
    for d in (2, 16, 63, 64, 80, 96, 100, 128, 256, 512):
        yield case(f"D={d}", d_head=d, dim=d // 2 * 2, first=1000)
    for dim in (2, 32, 58, 64, 98):
        yield case(f"{dim} of 100", d_head=100, dim=dim, norm=True)
    for heads, groups in ((1, 1), (8, 8), (16, 1), (8, 2), (12, 4), (5, 5)):
        yield case(f"{heads} heads, {groups} keys", heads=heads, groups=groups, d_head=128)
        yield case(f"{heads} heads, {groups} keys, norm", heads=heads, groups=groups, d_head=128,
                   norm=True)  # fmt: skip
    yield case("only heads", heads=8, groups=0, d_head=128, rows=True)
    yield case("only heads, a part", heads=6, groups=0, d_head=64, dim=32)
    for norm in (False, True):
        yield case("not turned" + ", norm" * norm, d_head=128, first=None, norm=norm, rest=128)
    yield case("own rows", batch=3, heads=8, d_head=128, rows=True, rest=8)
    yield case("far", first=60000, d_head=128)
    yield case("views", heads=4, strided=True, norm=True)
    yield case("many rows", batch=7, length=3001, rows=True)
    yield case("beyond 2^31", batch=1, length=2048, heads=4, groups=2, d_head=128, copies=1040,
               dtypes=("bf16",))  # fmt: skip
