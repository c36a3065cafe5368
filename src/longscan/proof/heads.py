"""Cases of the ops with heads: linear attention with decay, the delta rule, mLSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from longscan.proof.case import (
    LENGTHS,
    PACKED,
    Arguments,
    Case,
    Size,
    bounds,
    gates,
    normal,
    uniform,
)

STANDARD = Size()
SMALL = Size(length=37, batch=1, heads=2, key=16, value=16)


# --- linear attention and the delta rule ----------------------------------------------------


def _heads(g: torch.Generator, size: Size, gate: str, per_key: bool, state: bool) -> Arguments:
    tokens, groups = (size.batch, size.length), size.groups or size.heads
    shape = (*tokens, size.heads, size.key)[: 4 if per_key else 3]
    return {
        "q": normal(g, *tokens, groups, size.key) * size.key**-0.5,
        "k": F.normalize(normal(g, *tokens, groups, size.key), dim=-1),
        "v": normal(g, *tokens, size.heads, size.value),
        "log_a": gates(gate, g, *shape),
        "state": normal(g, size.rows, size.heads, size.key, size.value) if state else None,
        "cu_seqlens": bounds(size),
    }


def decay_arguments(
    g: torch.Generator,
    size: Size,
    gate: str,
    *,
    per_key: bool = False,
    state: bool = True,
    scale: bool = False,
    skip: bool = False,
) -> Arguments:
    """scale: of any sign, some of it 0."""
    x = _heads(g, size, gate, per_key, state)
    if scale:
        s = normal(g, size.batch, size.length, size.heads)
        x["scale"] = torch.where(s.abs() < 0.2, 0.0, s)
    if skip:
        x["skip"] = normal(g, size.heads)
    return x


def delta_arguments(
    g: torch.Generator,
    size: Size,
    gate: str,
    *,
    per_key: bool = False,
    state: bool = True,
    beta: str = "usual",
    repeated: bool = False,
) -> Arguments:
    """beta: "usual" (0 to 1), "two" (0 to 2) or a number; repeated: one key for all tokens."""
    x = _heads(g, size, gate, per_key, state)
    shape = (size.batch, size.length, size.heads)
    usual = uniform(g, *shape)
    if beta in ("usual", "two"):
        x["beta"] = usual * (2 if beta == "two" else 1)
    else:
        x["beta"] = torch.full_like(usual, float(beta))
    if repeated:
        x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    return x


def head_cases(make: Callable[..., Arguments], gate_kinds: tuple[str, ...]) -> Iterator[Case]:
    """The cases of an op with heads; `make(generator, size, gate, ...)` gives its arguments."""

    def case(name: str, size: Size = STANDARD, gate: str = "mixed", **more: Any) -> Case:
        own = {k: more.pop(k) for k in list(more) if k in ("state", "beta", "repeated")}
        group = f"{size.key}x{size.value}"
        return Case(name, partial(make, size=size, gate=gate, **own), group=group, **more)

    small = SMALL
    yield case("small", replace(small, batch=2), quick=True)
    packed = small.packed([0, 1, 20, 37])
    yield case("small packed", replace(packed, key=24, value=40, heads=1), quick=True)
    yield case("small grouped", replace(small, groups=1, length=70), "usual", quick=True)
    yield case("small plain", replace(small, length=33), gate_kinds[0], state=False, final=False,
               quick=True)  # fmt: skip
    for length in LENGTHS:
        yield case(f"T={length}", Size(length), optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", Size(heads=2).packed(cu))
        yield case(f"packed {name}, grouped", Size(heads=4, groups=2).packed(cu), "usual")
    for kind in gate_kinds:
        # Where all is erased, gradients of the gates are zero but for rounding.
        floor = 1.0 if kind in ("erased", "sharp") else 0.0
        yield case(f"gate {kind}", gate=kind, floor=floor)
    for key, value in SIZES:
        yield case(f"K={key} V={value}", Size(key=key, value=value, length=70))
    yield case("4 heads, 1 key", Size(heads=4, groups=1))
    yield case("8 heads, 1 key, V=64", Size(heads=8, groups=1, key=128))
    yield case("8 heads, 1 key, K=256", Size(heads=8, groups=1, key=256))
    yield case("6 heads, 2 keys", Size(heads=6, groups=2, key=128, value=64), "usual")
    yield case("no state", state=False)
    yield case("no gradient of the final state", final=False)
    yield case("neither", state=False, final=False, size=Size(130))
    yield case("views", strided=True)
    yield case("gates as the values", low=True, gate="usual")
    yield case("many rows", Size(40, batch=70))
    for kind in ("usual", "near"):
        yield case(f"T=4096 {kind}", Size(4096, batch=1), kind)
        yield case(f"T=4096 {kind}, K=V=128", Size(4096, 1, 2, key=128, value=128), kind)
    yield case("T=16384", Size(16384, 1, 1), "near")
    yield case("T=16384 usual", Size(16384, 1, 1, key=128, value=128), "usual")
    far = Size(4096, 1, 4, key=128, value=128)
    yield case("beyond 2^31", far, "usual", copies=1040, dtypes=("bf16",))


SIZES = (
    (16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (16, 64), (64, 16), (32, 64), (64, 32),
    (64, 128), (128, 64), (128, 256), (256, 128), (64, 256), (256, 64), (24, 40), (80, 48),
    (100, 200), (192, 96), (72, 136), (256, 16), (16, 256), (32, 128), (128, 32), (17, 33),
)  # fmt: skip
SCALAR_GATES = ("none", "usual", "open", "near", "closed", "sharp", "erased")
KEY_GATES = SCALAR_GATES[1:]


def decay_cases() -> Iterator[Case]:
    """With one gate per head or none; with Mamba-2's factors of writes and its way around."""
    yield from head_cases(decay_arguments, SCALAR_GATES)

    def case(name: str, size: Size = STANDARD, gate: str = "mixed", **more: Any) -> Case:
        own = {"scale": True, "skip": True} | {
            k: more.pop(k) for k in list(more) if k in ("scale", "skip", "state")
        }
        make = partial(decay_arguments, size=size, gate=gate, **own)
        return Case(f"scaled, {name}", make, group=f"{size.key}x{size.value} scaled", **more)

    ssd = Size(heads=8, groups=1, key=128)
    yield case("small", replace(SMALL, batch=2), quick=True)
    packed = replace(SMALL, groups=1).packed([0, 1, 20, 37])
    yield case("small packed", replace(packed, key=24, value=40), "usual", quick=True)
    yield case("small, alone", replace(SMALL, length=70), "usual", skip=False, state=False,
               final=False, quick=True)  # fmt: skip
    yield case("skip alone", scale=False)
    for length in (1, 63, 65, 129):
        yield case(f"T={length}", Size(length), optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", Size(heads=4, groups=2).packed(cu))
    for kind in SCALAR_GATES[1:]:
        yield case(f"gate {kind}", ssd, kind, floor=1.0 if kind in ("erased", "sharp") else 0.0)
    for key, value in ((64, 64), (128, 128), (256, 64), (256, 256), (24, 40), (128, 16), (17, 33)):
        yield case(f"K={key} V={value}", Size(key=key, value=value, length=70))
        yield case(f"K={key} V={value}, 4 heads, 1 key",
                   Size(heads=4, groups=1, key=key, value=value, length=70))  # fmt: skip
    yield case("no state", ssd, state=False)
    yield case("views", strided=True)
    yield case("gates as the values", low=True, gate="usual")
    for kind in ("usual", "near"):
        yield case(f"T=4096 {kind}", replace(ssd, length=4096, batch=1, heads=4), kind)
    yield case("T=16384", Size(16384, 1, 2, 1, key=128), "usual")
    many = Size(2048, 2, 64, 1, key=128)
    yield case("many heads", many, "usual", dtypes=("bf16",))


def delta_cases(make: Callable[..., Arguments], kinds: tuple[str, ...]) -> Iterator[Case]:
    yield from head_cases(make, kinds)
    for beta in ("0", "1", "2", "two"):
        for repeated in (False, True):
            name = f"beta {beta}" + (", one key" if repeated else "")
            how = {"beta": beta, "repeated": repeated}
            # Nothing is written: gradients of keys and gates pass through the state alone.
            # A reflection of one key at every token: what bfloat16 rounds off never dies out.
            dtypes = ("fp16", "fp32") if name == "beta 2, one key" else ("bf16", "fp16", "fp32")
            yield Case(name, partial(make, size=Size(), gate="usual", **how), dtypes=dtypes,
                       group="64x64")  # fmt: skip
    open_ = {"beta": "2", "repeated": True}
    yield Case("beta 2, one key, open", partial(make, size=Size(), gate=kinds[0], **open_),
               dtypes=("fp32",), group="64x64")  # fmt: skip
    small = Size(length=37, batch=1, heads=1, key=16, value=16)
    yield Case("small beta 2", partial(make, size=small, gate="usual", beta="2"), quick=True)


def wide_delta_cases() -> Iterator[Case]:
    """Enough wide heads for the backward that is one kernel: in bfloat16, more than 66 of them."""

    def case(name: str, size: Size, gate: str = "mixed", floor: float = 0.0, **more: Any) -> Case:
        own = {k: more.pop(k) for k in list(more) if k in ("state", "beta", "repeated")}
        make = partial(delta_arguments, size=size, gate=gate, **own)
        return Case(f"{name}, wide", make, dtypes=("bf16",), group=f"{size.key}x{size.value} wide",
                    floor=floor, **more)  # fmt: skip

    wide = Size(batch=17, heads=4, key=128, value=128)
    for length in (1, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129):
        yield case(f"T={length}", replace(wide, length=length), optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", replace(wide, heads=18).packed(cu))
    for kind in SCALAR_GATES:
        yield case(f"gate {kind}", wide, kind, 1.0 if kind in ("erased", "sharp") else 0.0)
    for key, value in ((40, 72), (64, 128), (96, 80), (128, 104), (72, 120)):
        yield case(f"K={key} V={value}", replace(wide, length=70, key=key, value=value))
    yield case("no state", wide, state=False)
    yield case("no gradient of the final state", wide, final=False)
    yield case("neither", wide, state=False, final=False)
    yield case("views", wide, strided=True)
    for beta in ("0", "2", "two"):
        yield case(f"beta {beta}", wide, "usual", beta=beta)
    yield case("one key", wide, "usual", repeated=True)
    for kind in ("usual", "near"):
        yield case(f"T=2048 {kind}", replace(wide, length=2048, batch=5, heads=16), kind)
        yield case(f"T=4096 {kind}", replace(wide, length=4096, batch=1, heads=16), kind)
    yield case("packed, split", replace(wide, heads=8).packed([0, 7, 4103, 4200]), "near")


# --- mLSTM ----------------------------------------------------------------------------------


def mlstm_arguments(
    g: torch.Generator, size: Size, gate: str = "usual", *, state: bool = True
) -> Arguments:
    """gate: of the input and forget gates together, see below."""
    tokens, heads = (size.batch, size.length), size.heads
    i, f = normal(g, *tokens, heads), normal(g, *tokens, heads) + 3
    pick, other = uniform(g, *tokens, heads), uniform(g, *tokens, heads)
    if gate == "mixed":
        for below, value in ((0.12, 9.2), (0.08, 50.0), (0.04, -30.0), (0.02, -1e4)):
            f = torch.where(pick < below, value, f)
        i = torch.where(other < 0.04, -20.0, torch.where(other < 0.06, 20.0, i))
    elif gate == "closed":
        f = torch.where(pick < 0.5, -1e4, f)
    elif gate == "open":
        f = torch.full_like(f, 50.0)
    elif gate == "near":
        f = torch.full_like(f, 9.2)  # a forget gate of 1 - 1e-4
    elif gate == "weak":
        i = i - 20
    elif gate == "strong":
        i = i + 20
    elif gate == "rising":
        i = i + torch.linspace(-40, 40, size.length, dtype=torch.float64).view(1, -1, 1)
    # All keys share a direction, which queries are along or against: where a normaliser is near
    # zero, outputs are as large as rounding makes them.
    sign = uniform(g, *tokens, heads, 1).sub(0.5).sign()
    x: Arguments = {
        "q": (normal(g, *tokens, heads, size.key) + 1) * size.key**-0.5 * sign,
        "k": normal(g, *tokens, heads, size.key) + 1,
        "v": normal(g, *tokens, heads, size.value),
        "i": i,
        "f": f,
        "state": None,
        "cu_seqlens": bounds(size),
    }
    if state:
        s = normal(g, size.rows, heads, size.key, size.value + 1)
        s[..., -1] = 1 + 0.3 * s[..., -1]
        x["state"] = (s, normal(g, size.rows, heads, 1))
    return _off_the_kink(x)


def _off_the_kink(x: Arguments) -> Arguments:
    """Double the queries whose denominator lies where max(|qn|, exp(-m)) has its kink.

    There the gradient jumps, and rounding decides on which side a kernel sees the token.
    """
    from longscan.ops.mlstm import mlstm

    state = x["state"]
    if state is not None:
        state = (state[0][..., -1:].expand(*state[0].shape[:-1], 2).contiguous(), state[1])
    # With values of one and a tiny query, h is |qn| exp(m) times that factor.
    tiny = 1e-6
    ones = torch.ones_like(x["v"][..., :1])
    more = {"state": state, "cu_seqlens": x["cu_seqlens"], "backend": "torch", "eps": 0.0}
    h, _ = mlstm(tiny * x["q"], x["k"], ones, x["i"], x["f"], **more)
    ratio = h.abs() / tiny
    near = (ratio > 0.7) & (ratio < 1.4)
    x["q"] = torch.where(near, 2.5 * x["q"], x["q"])
    return x


def mlstm_cases() -> Iterator[Case]:
    def case(name: str, size: Size = STANDARD, gate: str = "mixed", **more: Any) -> Case:
        own = {k: more.pop(k) for k in list(more) if k == "state"}
        make = partial(mlstm_arguments, size=size, gate=gate, **own)
        return Case(name, make, group=f"{size.key}x{size.value}", **more)

    small = Size(length=37, batch=1, heads=2, key=16, value=16)
    yield case("small", replace(small, batch=2), quick=True)
    yield case("small packed", replace(small.packed([0, 1, 20, 37]), key=24, value=40, heads=1),
               quick=True)  # fmt: skip
    yield case("small plain", replace(small, length=70, heads=1), "usual", state=False,
               final=False, quick=True)  # fmt: skip
    for length in LENGTHS:
        yield case(f"T={length}", Size(length), optional=length == 1)
    for name, cu in PACKED.items():
        yield case(f"packed {name}", Size().packed(cu))
    for kind in ("usual", "closed", "open", "near", "weak", "strong", "rising"):
        yield case(f"gate {kind}", gate=kind)
    for key, value in (*SIZES, (256, 512), (128, 512), (64, 512), (40, 500)):
        yield case(f"K={key} V={value}", Size(key=key, value=value, length=70))
    yield case("no state", state=False)
    yield case("no gradient of the final state", final=False)
    yield case("neither", state=False, final=False, size=Size(130))
    yield case("views", strided=True)
    yield case("gates as the values", low=True, gate="usual")
    yield case("many rows", Size(40, batch=70))
    for kind in ("usual", "near"):
        yield case(f"T=4096 {kind}", Size(4096, batch=1), kind)
        yield case(f"T=4096 {kind}, K=V=128", Size(4096, 1, 2, key=128, value=128), kind)
    yield case("T=16384", Size(16384, 1, 1), "near")
    yield case("T=16384 usual", Size(16384, 1, 1, key=128, value=128), "usual")
    far = Size(4096, 1, 4, key=128, value=128)
    yield case("beyond 2^31", far, "usual", copies=1040, dtypes=("bf16",))
