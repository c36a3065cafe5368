"""Which implementation of an op runs, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longscan.ops._layout import check_cu_seqlens

OPS = (
    "decay", "delta", "selective", "trapezoid", "lti", "mlstm", "slstm", "dplr", "wkv",
    "memory", "slots", "vq", "attention", "conv", "norm", "glu", "rotary", "loss",
    "step",
)  # fmt: skip
BACKENDS = ("reference", "torch", "triton")
KERNELS = (
    "memory", "decay", "delta", "selective", "mlstm", "slstm", "conv", "norm", "glu", "rotary",
    "loss", "step",
)  # fmt: skip
"""Ops with a Triton form, which runs by default on GPUs like those where every check passed."""
SHARED = 227 * 1024
"""Bytes of shared memory that the kernels' launches count on, as an H100 and its successors for
data centres have; GPUs with less run a kernel only where it is asked for."""

# Asked for once: torch.compile cannot trace the question. Not tried on AMD.
TRITON = find_spec("triton") is not None and torch.version.hip is None


@dataclass(frozen=True)
class Backend:
    """The implementation that runs (`name`) and the reason it was chosen."""

    name: str
    reason: str


def backend_of(op: str, x: Tensor, backend: str | None = None) -> Backend:
    """The implementation of `op` that runs on inputs like `x`.

    An explicit `backend` wins over the environment variable LONGSCAN_BACKEND, which wins over the
    default. All implementations compute the same function; they differ in speed only.

    Raises: ValueError for an unknown op or backend, or one that cannot run here.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    asked, where = backend, "asked for by the call"
    if asked is None:
        asked, where = os.environ.get("LONGSCAN_BACKEND"), "set by LONGSCAN_BACKEND"
    if asked:
        if asked not in BACKENDS:
            raise ValueError(f"unknown backend {asked!r}; choose from {', '.join(BACKENDS)}")
        if asked == "triton" and not fused(op, x):
            why = "has no Triton form" if op not in KERNELS else "needs Triton and a CUDA device"
            if backend is not None:
                raise ValueError(f"backend 'triton': the op {op} {why}")
            return Backend("torch", f"{where} is triton, but the op {why}")
        return Backend(asked, where)
    if fused(op, x):
        if not x.is_cuda or _has_room(x.device.index):
            return Backend("triton", f"the kernel for {x.device.type}, where it fits the sizes")
        return Backend(
            "torch", "the kernels count on the shared memory of an H100, which this GPU lacks; "
            "LONGSCAN_BACKEND=triton tries them",
        )  # fmt: skip
    return Backend("torch", f"the chunked PyTorch form, the only fast one for {x.device.type} yet")


def fused(op: str, x: Tensor) -> bool:
    """Whether the op has a Triton form that runs on inputs like x (or in Triton's interpreter)."""
    if op not in KERNELS or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    if op == "memory" and torch.compiler.is_compiling():  # not a custom op, unlike the others
        return False
    return TRITON


@torch.compiler.assume_constant_result
def _has_room(device: int) -> bool:
    """Whether a GPU has the shared memory that launches count on."""
    return _room(device)


@cache
def _room(device: int) -> bool:
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", SHARED) >= SHARED


def choose(
    op: str,
    x: Tensor,
    backend: str | None,
    forms: dict[str, Callable],
    fits: Callable[[], bool] | None = None,
) -> Callable:
    """The function among `forms` that `backend_of` names; "torch" where the kernel does not fit.

    Raises: ValueError where the call itself asks for a kernel that does not fit.
    """
    if backend is not None or "LONGSCAN_BACKEND" in os.environ:
        name = backend_of(op, x, backend).name
    else:  # what backend_of answers, without its words
        usual = fused(op, x) and (not x.is_cuda or _has_room(x.device.index))
        name = "triton" if usual else "torch"
    if name == "triton" and fits is not None and not fits():
        if backend is not None:
            raise ValueError(
                f"backend 'triton': the kernel of {op} does not compute these dtypes or sizes"
            )
        name = "torch"
    return forms[name]


def by_kernel(op: str, x: Tensor, fits: Callable[[], bool]) -> bool:
    """Whether a kernel runs, for callers that can hand it more than the op; see `choose`."""
    if not fused(op, x):
        return False
    if "LONGSCAN_BACKEND" in os.environ:
        usual = backend_of(op, x).name == "triton"
    else:
        usual = not x.is_cuda or _has_room(x.device.index)
    return usual and fits()


def by_sequence(
    fn: Callable[..., tuple[Tensor, Tensor]],
    tokens: Sequence[Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Run `fn(*tokens, state=...)` on each packed sequence by itself, as a definition would."""
    first = next(t for t in tokens if t is not None)
    bounds = check_cu_seqlens(cu_seqlens, first.shape[0], first.shape[1])
    outs, states = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        part = [None if t is None else t[:, a:b] for t in tokens]
        o, s = fn(*part, state=None if state is None else state[i : i + 1], **more)
        outs.append(o)
        states.append(s)
    return torch.cat(outs, 1), torch.cat(states)
