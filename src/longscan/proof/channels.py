"""Cases of the ops with channels: the selective scan, the convolution, the norms, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from longscan.proof.case import LENGTHS, PACKED, Arguments, Case, normal, uniform

# --- the selective scan ---------------------------------------------------------------------


def selective_arguments(
    g: torch.Generator,
    *,
    length: int = 150,
    batch: int = 2,
    channels: int = 64,
    n: int = 16,
    groups: int | None = None,
    constant: bool = False,
    step: str = "usual",
    rate: str = "usual",
    cu: tuple[int, ...] | None = None,
    state: bool = True,
    around: bool = False,
) -> Arguments:
    """around: with what Mamba does beside the scan, dt then before its softplus.

    groups: B and C [B, T, G, N], None: [B, T, N]; constant: B and C [E, N].
    """
    rows = batch if cu is None else len(cu) - 1
    dt = F.softplus(normal(g, batch, length, channels) - 3)
    pick = uniform(g, batch, length, channels)
    if step == "mixed":  # gates of 0 and of 1 among the others
        dt = torch.where(pick < 0.05, 0.0, torch.where(pick < 0.1, 30.0, dt))
    elif step != "usual":
        dt = torch.full_like(dt, float(step))
    A = -torch.arange(1, n + 1, dtype=torch.float64).expand(channels, n) * (
        0.5 + uniform(g, channels, n)
    )
    if rate != "usual":
        A = torch.full_like(A, float(rate))
    shape = (batch, length, n) if groups is None else (batch, length, groups, n)
    if constant:
        shape = (channels, n)
    mamba = {}
    if around:
        dt = 2 * normal(g, batch, length, channels)
        mamba = {
            "D": normal(g, channels),
            "z": normal(g, batch, length, channels),
            "dt_bias": normal(g, channels) - 3,
        }
    return mamba | {
        "u": normal(g, batch, length, channels),
        "dt": dt,
        "A": A,
        "B": normal(g, *shape) * n**-0.5,
        "C": normal(g, *shape) * n**-0.5,
        "state": normal(g, rows, channels, n) if state else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu),
    }


def selective_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "dtypes", "low", "final", "strided", "copies", "floor", "optional")
        more = {k: options.pop(k) for k in list(options) if k in known}
        n = options.get("n", 16)
        return Case(name, partial(selective_arguments, **options), group=f"N{n}", **more)

    yield case("small", length=37, channels=20, n=4, quick=True)
    yield case("small packed", length=37, batch=1, channels=9, cu=(0, 1, 20, 37), quick=True)
    yield case("small grouped", length=20, channels=64, groups=2, state=False, final=False,
               quick=True, optional=True)  # fmt: skip
    for length in LENGTHS:
        yield case(f"T={length}", length=length, step="mixed", optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu))
    for n in (1, 2, 3, 4, 8, 16, 32, 64):
        yield case(f"N={n}", n=n, length=70)
    for n in (100, 128, 256):
        yield case(f"N={n}", n=n, length=70, optional=True)
    for channels in (1, 7, 100, 1000):
        yield case(f"E={channels}", channels=channels, length=70)
    yield case("one group", groups=1)
    yield case("4 groups", groups=4, optional=True)
    yield case("constant B and C", constant=True, optional=True)
    yield case("odd groups", groups=3, channels=15, optional=True)
    yield case("dt mixed", step="mixed")
    yield case("dt 0", step="0")
    yield case("dt 1e-4", step="1e-4")
    yield case("dt 30", step="30", floor=1.0)
    yield case("A 0", rate="0")
    yield case("A -1e4", rate="-1e4", floor=1.0)
    yield case("no state", state=False)
    yield case("no gradient of the final state", final=False)
    yield case("neither", state=False, final=False, length=130)
    yield case("views", strided=True)
    yield case("steps as the values", low=True)
    yield case("many rows", batch=70, length=40)
    yield case("T=4096", length=4096, batch=1)
    yield case("T=4096 near", length=4096, batch=1, step="1e-4")
    yield case("T=16384", length=16384, batch=1, channels=32)
    yield case("T=16384 near", length=16384, batch=1, channels=32, step="1e-4")
    yield case("beyond 2^31", length=2048, batch=1, channels=1024, copies=1040, dtypes=("bf16",))


def mamba_cases() -> Iterator[Case]:
    """With skip, gate, bias and softplus in the kernel."""

    def case(name: str, **options: Any) -> Case:
        known = ("quick", "low", "final", "strided", "optional")
        more = {k: options.pop(k) for k in list(options) if k in known}
        n = options.get("n", 16)
        make = partial(selective_arguments, around=True, **options)
        return Case(name, make, group=f"N{n}", **more)

    yield case("small", length=37, channels=20, n=4, quick=True)
    for length in (1, 16, 65, 150):
        yield case(f"T={length}", length=length)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu))
    for n in (8, 16, 32, 64):
        yield case(f"N={n}", n=n, length=70)
    for channels in (7, 100, 1000):
        yield case(f"E={channels}", channels=channels, length=70)
    yield case("4 groups", groups=4, optional=True)
    yield case("no state", state=False)
    yield case("neither", state=False, final=False, length=130)
    yield case("views", strided=True)
    yield case("steps as the values", low=True)
    yield case("many rows", batch=70, length=40)
    yield case("T=4096", length=4096, batch=1)


# --- the convolution ------------------------------------------------------------------------


def conv_arguments(
    g: torch.Generator,
    *,
    length: int = 150,
    batch: int = 2,
    channels: int = 64,
    width: int = 4,
    bias: bool = True,
    state: bool = True,
    cu: tuple[int, ...] | None = None,
) -> Arguments:
    rows = batch if cu is None else len(cu) - 1
    return {
        "x": normal(g, batch, length, channels),
        "weight": normal(g, channels, width),
        "bias": normal(g, channels) if bias else None,
        "state": normal(g, rows, width - 1, channels) if state else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu),
    }


def conv_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "dtypes", "low", "final", "strided", "copies", "optional")
        more = {k: options.pop(k) for k in list(options) if k in known}
        group = f"W{options.get('width', 4)}"
        return Case(name, partial(conv_arguments, **options), group=group, **more)

    yield case("small", length=37, channels=20, quick=True)
    yield case("small packed", length=37, batch=1, channels=9, cu=(0, 1, 3, 20, 37), quick=True)
    yield case("small plain", length=9, channels=8, bias=False, state=False, final=False,
               quick=True)  # fmt: skip
    for length in (2, 3, *LENGTHS):
        yield case(f"T={length}", length=length, optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu))
    for width in (2, 3, 4, 5, 8, 16, 33):
        yield case(f"W={width}", width=width, length=70, optional=width > 8)
    for channels in (1, 7, 100, 1000, 4096):
        yield case(f"E={channels}", channels=channels, length=70)
    yield case("no state", state=False)
    yield case("no bias", bias=False)
    yield case("no gradient of the final state", final=False)
    yield case("neither", state=False, final=False)
    yield case("views", strided=True)
    yield case("weights as the values", low=True)
    yield case("many rows", batch=70, length=40)
    yield case("T=4096", length=4096, batch=1)
    yield case("T=16384", length=16384, batch=1)
    yield case("beyond 2^31", length=2048, batch=1, channels=1024, copies=1040, dtypes=("bf16",))


def parts_arguments(
    g: torch.Generator, *, sizes: tuple[int, ...] = (24, 24, 16), unit: int = 0, **options: Any
) -> Arguments:
    """sizes: channels of the parts behind the convolution; unit: channels of a head of unit
    length in the first two."""
    more = {"sizes": list(sizes), "unit": unit}
    return {**conv_arguments(g, channels=sum(sizes), **options), **more}


def parts_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "low", "final", "strided", "optional")
        more = {k: options.pop(k) for k in list(options) if k in known}
        group = f"W{options.get('width', 4)}"
        return Case(name, partial(parts_arguments, **options), group=group, **more)

    yield case("small", length=37, sizes=(9, 3, 8), quick=True)
    yield case("small packed", length=37, batch=1, sizes=(4, 5), cu=(0, 1, 3, 20, 37), quick=True)
    for length in (1, 16, 65, 150):
        yield case(f"T={length}", length=length, optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu))
    for sizes in ((256, 256, 512), (300, 7, 1000), (768, 768, 1536), (1, 1, 1), (2048, 128, 128)):
        yield case(f"parts {' '.join(map(str, sizes))}", length=70, sizes=sizes)
    yield case("W=8", width=8, length=70)
    yield case("neither", state=False, final=False)
    yield case("views", strided=True)
    yield case("weights as the values", low=True)
    yield case("T=4096", length=4096, batch=1)
    unit = {"sizes": (768, 768, 1536), "unit": 128}
    yield case("unit small", length=37, sizes=(8, 16, 5), unit=8, quick=True)
    yield case("unit small packed", length=37, batch=1, sizes=(4, 8, 3), unit=4,
               cu=(0, 1, 3, 20, 37), quick=True)  # fmt: skip
    for k in (2, 16, 32, 64, 128):
        yield case(f"unit K={k}", sizes=(3 * k, 5 * k, 100), unit=k)
    yield case("unit", length=300, **unit)
    yield case("unit, bare", length=300, bias=False, state=False, final=False, **unit)
    yield case("unit, two parts", sizes=(64, 128), unit=64)
    yield case("unit, W=8", width=8, length=70, **unit)
    yield case("unit, views", strided=True, **unit)
    yield case("unit, weights as the values", low=True, **unit)
    yield case("unit, T=4096", length=4096, batch=1, **unit)


def projection_arguments(
    g: torch.Generator,
    *,
    sizes: tuple[int, ...] = (64, 32, 3),
    at: int = 0,
    inner: tuple[int, ...] = (24, 24, 16),
    width: int = 4,
    depth: int = 48,
    length: int = 150,
    batch: int = 2,
    unit: int = 0,
    **options: Any,
) -> Arguments:
    """sizes: of the projection's parts, `at` the convolved one, inner: of its own parts."""
    conv = conv_arguments(
        g, length=length, batch=batch, channels=sizes[at], width=width, **options
    )  # fmt: skip
    return {
        **conv,
        "x": normal(g, batch, length, depth),
        "taps": conv["weight"],
        "weight": normal(g, sum(sizes), depth) * depth**-0.5,
        "sizes": list(sizes),
        "at": at,
        "inner": list(inner),
        "unit": unit,
    }


def projection_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "low", "final", "strided")
        more = {k: options.pop(k) for k in list(options) if k in known}
        group = f"W{options.get('width', 4)}"
        return Case(name, partial(projection_arguments, **options), group=group, **more)

    yield case("small", length=37, sizes=(20, 7, 3), inner=(9, 3, 8), depth=12, quick=True)
    yield case("small packed", length=37, batch=1, sizes=(8, 9), at=1, inner=(9,),
               depth=12, cu=(0, 1, 3, 20, 37), quick=True)  # fmt: skip
    for length in (16, 65, 150):
        yield case(f"T={length}", length=length)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu))
    yield case("nothing padded", sizes=(64, 24, 8))
    yield case("the last part", sizes=(8, 3, 64), at=2)
    yield case("empty parts", sizes=(0, 0, 40, 64, 5), at=3)
    yield case("one part", sizes=(64, 64), inner=(64,))
    wide = {"sizes": (3072, 1536, 6, 6), "inner": (768, 768, 1536), "depth": 1024}
    yield case("wide", length=300, **wide)
    yield case("wide unit", length=300, unit=128, bias=False, **wide)
    yield case("unit", sizes=(64, 32, 3), inner=(24, 24, 16), unit=8)
    yield case("W=8", width=8)
    yield case("neither", state=False, final=False)
    yield case("views", strided=True)
    yield case("weights as the values", low=True)
    yield case("T=4096", length=4096, batch=1)


def gates_arguments(
    g: torch.Generator, *, heads: int = 6, steps: int = 1, length: int = 150, batch: int = 2,
    far: float = 1.0, scale: float = 1.0,
) -> Arguments:  # fmt: skip
    """far: how far from zero the gates are; steps: of b for a token, 0 for those of Mamba-2."""
    return {
        "b": normal(g, batch, length, steps * heads) * far if steps else None,
        "a": normal(g, batch, length, heads) * far,
        "a_log": normal(g, heads),
        "dt_bias": normal(g, heads) - 3,
        "scale": scale,
    }


def gates_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "strided")
        more = {k: options.pop(k) for k in list(options) if k in known}
        return Case(
            name, partial(gates_arguments, **options), group=str(options.get("heads", 6)), **more
        )

    yield case("small", length=37, heads=3, quick=True)
    yield case("small, steps", length=9, heads=2, steps=3, scale=2.0, quick=True)
    for length in (1, 17, 150, 5000):
        yield case(f"T={length}", length=length)
    for heads in (1, 2, 16, 24, 128, 512):
        yield case(f"H={heads}", heads=heads)
    yield case("steps", steps=2, scale=2.0)
    yield case("far", far=8.0)
    yield case("small, Mamba-2", length=9, heads=3, steps=0, quick=True)
    yield case("Mamba-2", heads=32, steps=0)
    yield case("far, Mamba-2", far=8.0, steps=0, batch=7, length=1000, strided=True)
    yield case("views", strided=True)
    yield case("many rows", batch=70, length=1000)


# --- the norms ------------------------------------------------------------------------------


def norm_arguments(
    g: torch.Generator,
    shape: tuple[int, ...],
    *,
    weight: tuple[int, ...] | None = None,
    gated: bool = False,
    **options: Any,
) -> Arguments:
    """options: of the launcher, n_groups, activation, gate_first, eps, scale."""
    return {
        "x": normal(g, *shape) * (1 + 5 * uniform(g, *shape[:-1], 1)),
        "weight": None if weight is None else 1 + 0.3 * normal(g, *weight),
        "gate": normal(g, *shape) if gated else None,
        **options,
    }


def norm_cases() -> Iterator[Case]:
    def case(name: str, *shape: int, **options: Any) -> Case:
        known = ("quick", "dtypes", "low", "strided", "copies")
        more = {k: options.pop(k) for k in list(options) if k in known}
        make = partial(norm_arguments, shape=shape, **options)
        return Case(name, make, group=str(shape[-1]), **more)

    yield case("small", 2, 7, 24, weight=(24,), quick=True)
    yield case(
        "small gated", 3, 5, 2, 16, weight=(2, 16), gated=True, activation="silu", quick=True
    )
    for d in (1, 16, 63, 64, 100, 128, 500, 1000, 1024, 2048, 3000, 4096, 8192):
        yield case(f"D={d}", 3, 50, d, weight=(d,))
    yield case("no weight", 2, 50, 128)
    yield case("length", 2, 50, 4, 64, eps=1e-6 / 64, scale=64**-0.5)
    yield case("groups", 2, 50, 256, weight=(256,), n_groups=4)
    yield case("heads", 2, 50, 4, 64, weight=(4, 64))
    for activation in (None, "sigmoid", "silu"):
        for first in (False, True):
            name = f"gate {activation}" + (", before" if first else "")
            how = {"activation": activation, "gate_first": first, "gated": True}
            yield case(name, 2, 50, 128, weight=(128,), **how)
    for d in (256, 1024, 2048, 4096):
        yield case(f"gate, D={d}", 2, 50, d, weight=(d,), gated=True, activation="silu")
    yield case("gate before, views, D=2048", 2, 50, 2048, weight=(2048,), gated=True,
               activation="silu", gate_first=True, strided=True)  # fmt: skip
    yield case("gate of groups", 2, 50, 256, weight=(256,), n_groups=4, gated=True,
               activation="silu", gate_first=True)  # fmt: skip
    yield case("views", 2, 50, 128, weight=(128,), gated=True, activation="silu", strided=True)
    yield case("weights as the values", 2, 50, 128, weight=(128,), low=True)
    yield case("many rows", 7, 3001, 64, weight=(64,), gated=True, activation="sigmoid")
    yield case("beyond 2^31", 1, 2048, 1024, weight=(1024,), copies=1040, dtypes=("bf16",))


# --- the loss -------------------------------------------------------------------------------


def loss_arguments(
    g: torch.Generator, n: int, classes: int, *, width: int = 64, ignored: float = 0.2,
    large: float = 1.0, **options: Any,
) -> Arguments:  # fmt: skip
    """ignored: the share of tokens without a target; large: the scale of logits."""
    targets = (uniform(g, n) * options.get("n_classes", classes)).long()
    return {
        "h": normal(g, n, width) * large,
        "weight": normal(g, classes, width) * width**-0.5,
        "targets": torch.where(uniform(g, n) < ignored, -100, targets),
        **options,
    }


def loss_cases() -> Iterator[Case]:
    def case(name: str, n: int, classes: int, **options: Any) -> Case:
        known = ("quick", "strided", "floor")
        more = {k: options.pop(k) for k in list(options) if k in known}
        make = partial(loss_arguments, n=n, classes=classes, **options)
        return Case(name, make, group=str(classes), **more)

    yield case("small", 5, 20, width=16, quick=True)
    yield case("small tokens", 9, 33, width=16, reduction="none", quick=True)
    for n in (1, 2, 17, 150, 3000):
        yield case(f"N={n}", n, 1000, ignored=0.0)
    for classes in (2, 50, 4096, 8191, 8192, 8193, 16385, 32000, 50257):
        yield case(f"V={classes}", 130, classes)
    for width in (1, 24, 500, 1024):
        yield case(f"D={width}", 130, 1000, width=width)
    for reduction in ("none", "sum"):
        yield case(reduction, 150, 1000, reduction=reduction)
        yield case(f"{reduction} in pieces", 700, 1000, reduction=reduction, chunk=64)
    yield case("mean in pieces", 700, 1000, chunk=64)
    yield case("padded classes", 150, 1024, n_classes=1000)
    yield case("padded classes, capped", 150, 1024, n_classes=1000, logit_cap=15.0)
    yield case("capped", 150, 1000, logit_cap=2.0)
    yield case("large logits", 150, 1000, large=20.0)
    yield case("no token left out", 150, 1000, ignored=0.0, reduction="none")
    yield case("nearly all left out", 150, 1000, ignored=0.99, reduction="sum")
    yield case("views", 150, 1000, strided=True)
