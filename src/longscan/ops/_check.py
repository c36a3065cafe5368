"""Checks shared by the ops: say what was wrong and what to do, before any work is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: the precision of states, gates and accumulation."""
    for x in tensors:
        if x is not None and (x.dtype is torch.float64 or x.dtype is torch.complex128):
            return torch.float64
    return torch.float32


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    """The tensors in `dtype`, None where there is none."""
    return [x if x is None or x.dtype is dtype else x.to(dtype) for x in tensors]


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast does not lower the precision of what is done with x."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def widen(x: Tensor) -> Tensor:
    """x in the precision that gates and norms are computed in."""
    return x.to(compute_dtype(x))


def check_shape(name: str, x: Tensor, expected: tuple[int | None, ...], axes: str) -> None:
    """Raise ValueError unless x has the expected sizes (None: any). `axes` names them."""
    if x.shape == expected:  # the common case, cheap enough for every decoding step
        return
    if x.ndim != len(expected) or any(
        e is not None and s != e for s, e in zip(x.shape, expected, strict=False)
    ):
        want = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape {axes} = [{want}], got {list(x.shape)}")


def check_floating(**tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor is floating point."""
    for name, x in tensors.items():
        if x is not None and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_log_decay(log_a: Tensor) -> None:
    """Raise ValueError if a log decay is positive or NaN.

    Looked at only where that is free: on a CPU, for more than the one token of a decoding step.
    """
    if log_a.device.type == "cpu" and log_a.shape[1] > 1 and not torch.compiler.is_compiling():
        largest = log_a.detach().amax().item()
        if not largest <= 0:
            raise ValueError(
                f"log_a must be log decays <= 0 (natural logarithm of a gate in [0, 1]); "
                f"found {largest:.3g}. Pass logsigmoid(x) or -softplus(x), not the gate itself"
            )


def check_state(name: str, state: Tensor | None, expected: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless a given state has the expected shape."""
    if state is not None and tuple(state.shape) != expected:
        raise ValueError(
            f"{name} must have shape {axes} = {list(expected)}, got {list(state.shape)}. "
            "A state belongs to one configuration and one batch (use State.select or State.cat)"
        )


def check_values(v: Tensor) -> tuple[int, int, int, int]:
    """The sizes B, T, H, V of the values; raises ValueError unless v is [B, T >= 1, H, V]."""
    if v.ndim != 4 or v.shape[1] == 0:
        raise ValueError(f"v must have shape [B, T >= 1, H, V], got {list(v.shape)}")
    batch, length, heads, d_value = v.shape
    return batch, length, heads, d_value


def check_keys(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The key size K; raises ValueError unless q and k are [B, T, Hk, K] with Hk dividing H."""
    if q.ndim != 4 or q.shape[:2] != v.shape[:2]:
        check_shape("q", q, (v.shape[0], v.shape[1], None, None), "[B, T, Hk, K]")
    if k.shape != q.shape:
        check_shape("k", k, tuple(q.shape), "[B, T, Hk, K], as q")
    if v.shape[2] % k.shape[2]:
        raise ValueError(
            f"{k.shape[2]} query/key heads cannot serve {v.shape[2]} value heads: "
            "the second number must be a multiple of the first"
        )
    return k.shape[3]
