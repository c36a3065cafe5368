"""Cases of the sLSTM cell, whose tokens follow one another through R."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from longscan.ops.slstm import slstm_step
from longscan.proof.case import LENGTHS, PACKED, Arguments, Case, normal, uniform


def slstm_arguments(
    g: torch.Generator,
    *,
    length: int = 150,
    batch: int = 3,
    heads: int = 2,
    d: int = 64,
    gate: str = "usual",
    mixing: float = 1.0,
    cu: tuple[int, ...] | None = None,
    state: bool = True,
) -> Arguments:
    """gate: of the input and forget gates, see below; mixing: the size of R's singular values."""
    rows = batch if cu is None else len(cu) - 1
    shape = (batch, length, heads, d)
    gates = normal(g, batch, length, heads, 4, d)
    i, f = gates[..., 0, :], gates[..., 1, :]
    f += 2
    pick, other = uniform(g, *shape), uniform(g, *shape)
    if gate == "mixed":
        for below, value in ((0.2, 9.2), (0.12, 50.0), (0.08, -30.0), (0.04, -1e4)):
            f[pick < below] = value
        i[other < 0.04] -= 30
        i[other < 0.02] += 60
    elif gate == "closed":  # most of what is remembered is forgotten at once
        f[pick < 0.5] = -1e4
    elif gate == "erased":
        f.fill_(-1e4)
    elif gate == "open":
        f.fill_(50.0)
    elif gate == "near":
        f.fill_(9.2)  # a forget gate of 1 - 1e-4
    elif gate == "strong":
        i += 30
    elif gate == "weak":
        i -= 30
    elif gate == "rising":
        i += torch.linspace(-40, 40, length, dtype=torch.float64).view(1, -1, 1, 1)
    elif gate == "powerlaw":  # as the mixer begins
        f += 3 - 12 * torch.linspace(0, 1, d, dtype=torch.float64) ** 0.3
    x: Arguments = {
        "gates": gates,
        "r": normal(g, heads, d, 4, d) * (0.5 * mixing * d**-0.5),
        "bias": 0.3 * normal(g, heads, 4, d),
        "state": None,
        "cu_seqlens": None if cu is None else torch.tensor(cu),
    }
    if state:
        s = normal(g, rows, 4, heads, d)
        s[:, 0] *= 0.3
        s[:, 2] = s[:, 2].abs() + 0.5
        s[::3] = 0  # these begin
        x["state"] = s
    return _off_the_kink(x)


def _off_the_kink(x: Arguments) -> Arguments:
    """Raise input gates that are near what m would be without them.

    The gradient of m goes to one or to the other, and rounding would decide to which.
    """
    gates, r, bias, cu = x["gates"], x["r"], x["bias"], x["cu_seqlens"]
    lengths = [gates.shape[1]] * len(gates) if cu is None else cu.diff().tolist()
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    flat = gates.flatten(0, 1)
    s = flat.new_zeros(len(lengths), 4, *r.shape[:2]) if x["state"] is None else x["state"]
    for t in range(max(lengths)):
        on = torch.tensor([t < n for n in lengths])
        now, before = flat[first[on] + t], s[on]
        mixed = bias + torch.einsum("bnd,ndgc->bngc", before[:, 0], r)
        kept = F.logsigmoid(now[:, :, 1] + mixed[:, :, 1]) + before[:, 3]
        near = (now[:, :, 0] + mixed[:, :, 0] - kept).abs() < 0.1
        now[:, :, 0] += torch.where(near & (before[:, 2] != 0), 0.3, 0.0)
        flat[first[on] + t] = now
        s = s.clone()
        s[on] = slstm_step(now, r, bias, before)[1]
    return x


def slstm_cases() -> Iterator[Case]:
    def case(name: str, **options: Any) -> Case:
        known = ("quick", "dtypes", "low", "final", "strided", "copies", "floor", "optional")
        more = {k: options.pop(k) for k in list(options) if k in known}
        d = options.get("d", 64)
        return Case(name, partial(slstm_arguments, **options), group=f"D{d}", **more)

    yield case("small", length=9, d=16, gate="mixed", quick=True)
    yield case("small packed", length=21, batch=1, heads=1, d=20, cu=(0, 1, 2, 12, 21), quick=True)
    yield case("small plain", length=7, batch=2, d=16, state=False, final=False, quick=True)
    yield case("small wide", length=4, batch=1, heads=1, d=136, cu=(0, 1, 4), quick=True)
    for length in (2, 3, *LENGTHS):
        yield case(f"T={length}", length=length, gate="mixed", optional=length == 1)
    for name, cu in PACKED.items():
        long = name == "long"
        yield case(f"packed {name}", batch=1, length=cu[-1], cu=tuple(cu), d=32 if long else 64)
    for d in (1, 7, 16, 20, 32, 40, 64, 100, 128, 192, 256):
        yield case(f"D={d}", d=d, length=70, gate="mixed")
    yield case("D=512", d=512, length=70, gate="mixed", optional=True)  # float32: left to torch
    # Programs that share a head's channels wait for one another.
    wide = {"d": 256, "heads": 1}
    yield case("D=256, T=1000", length=1000, **wide)
    yield case("D=256, N=5, B=40", length=20, d=256, heads=5, batch=40)
    yield case("D=256, packed", batch=1, length=150, cu=(0, 63, 64, 65, 129, 150), **wide)
    yield case("D=256, neither", length=40, state=False, final=False, **wide)
    yield case("D=136, views", length=40, d=136, strided=True)
    for heads in (1, 3, 4):
        yield case(f"N={heads}", heads=heads, length=70)
    for batch in (1, 16, 17, 20):
        yield case(f"B={batch}", batch=batch, length=70, d=32)
    for kind in ("closed", "erased", "open", "near", "strong", "weak", "rising", "powerlaw"):
        # Where all is erased, gradients of the gates are zero but for rounding.
        yield case(f"gate {kind}", gate=kind, floor=1.0 if kind == "erased" else 0.0)
    yield case("no mixing", mixing=0.0)
    yield case("strong mixing", mixing=2.0, length=30)
    yield case("no state", state=False)
    yield case("no gradient of the final state", final=False)
    yield case("neither", state=False, final=False, length=130)
    yield case("views", strided=True)
    yield case("many rows", batch=70, length=40)
    yield case("T=4096", length=4096, batch=1)
    yield case("T=4096 near", length=4096, batch=1, gate="near", heads=1)
    yield case("T=4096 open", length=4096, batch=1, gate="open", d=16)
