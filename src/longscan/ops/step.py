"""One token of the mixers with a matrix state, from its projections to what the heads read.

`step` is the sum of what a mixer does between its first projection and its norm: convolution,
nonlinearity, norms of queries and keys, gates, the recurrence. On CUDA it is one kernel, which
reads and writes the state once; the mixers' own forms for any number of tokens define it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import compute_dtype
from longscan.ops._step_fused import (
    Conv,
    Decay,
    Delta,
    Exponential,
    Rotary,
    step_fits,
    step_fused,
    window_fits,
    window_fused,
)
from longscan.ops.conv import conv_step
from longscan.ops.decay import decay_step
from longscan.ops.delta import delta_step
from longscan.ops.dispatch import by_kernel
from longscan.ops.mlstm import mlstm_step
from longscan.ops.norm import l2_norm


class Stepped(NamedTuple):
    """What a step leaves: o [B, H, V] in v's dtype, the states; None where there is none."""

    o: Tensor
    s: Tensor
    window: Tensor | None
    m: Tensor | None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    conv: Conv | None = None,
    silu: bool = False,
    rotary: Rotary | None = None,
    feature: bool = False,
    unit: bool = False,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    decay: Decay | None = None,
    rule: Delta | Exponential | None = None,
    scale_by_dt: bool = False,
    divide: bool = False,
    skip: Tensor | None = None,
    eps: float = 1e-6,
) -> Stepped:
    """One token for each row of a batch, as the kernel computes it where `step_fits`.

        q, k, v = silu(conv(q | k | v)), turned, mapped by elu + 1, made of unit length, scaled
        S <- diag(exp(log_a)) S;   S' = S + k u^T;   o = S'^T q
        u = v, or beta (v - S^T k) with Delta, or dt v with scale_by_dt

    divide: S has a last column for v = 1, by whose read o is divided (+ eps). With Exponential
    the same under the gates of mLSTM, see `ops.mlstm`. skip [H] or [H V]: times v, added to o.

    Shapes: q [B, Hq, K]; k [B, Hk, K]; v [B, Hv, V], each with last axes side by side; Hq, Hk, Hv
    divide H; s [B, H, K, V (+ 1)]. Precision: float32 (float64 for float64 states).
    """
    given = {
        "conv": conv, "silu": silu, "rotary": rotary, "feature": feature, "unit": unit,
        "q_scale": q_scale, "k_scale": k_scale, "decay": decay, "rule": rule,
        "scale_by_dt": scale_by_dt, "divide": divide, "skip": skip, "eps": eps,
    }  # fmt: skip
    run = step_fused if by_kernel("step", v, lambda: step_fits(q, k, v, s, **given)) else None
    return Stepped(*(run or step_torch)(q, k, v, s, **given))


def step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    conv: Conv | None,
    silu: bool,
    rotary: Rotary | None,
    feature: bool,
    unit: bool,
    q_scale: float,
    k_scale: float,
    decay: Decay | None,
    rule: Delta | Exponential | None,
    scale_by_dt: bool,
    divide: bool,
    skip: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The definition of `step`."""
    wide, out, heads = compute_dtype(s), v.dtype, s.shape[1]
    window = None
    if conv is not None:
        tokens, parts = torch.empty_like(conv.window[:, 0], dtype=v.dtype), []
        for x, at in zip((q, k, v), conv.at, strict=True):
            tokens[:, at : at + x[0].numel()] = x.flatten(1)
        tokens, window = conv_step(tokens.to(wide), conv.weight.squeeze(1).to(wide),
                                   _to(conv.bias, wide), conv.window.to(wide))  # fmt: skip
        window = window.to(v.dtype)
        for x, at in zip((q, k, v), conv.at, strict=True):
            parts.append(tokens[:, at : at + x[0].numel()].view(x.shape))
        q, k, v = parts
    q, k, v = (x.to(wide) for x in (q, k, v))
    if silu:
        q, k, v = (F.silu(x) for x in (q, k, v))
    if rotary is not None:
        angle = (rotary.positions.to(wide).unsqueeze(-1) * rotary.turns.to(wide)).unsqueeze(1)
        q, k = (_turned(x, angle) for x in (q, k))
    if feature:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    if unit:
        q, k = l2_norm(q), l2_norm(k)
    q, k = q * q_scale, k * k_scale
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    log_a, dt = _log_decay(decay, wide, heads)
    u = v * dt.unsqueeze(-1) if scale_by_dt and dt is not None else v
    m = None
    if isinstance(rule, Exponential):
        assert decay is not None
        o, (s, m) = mlstm_step(q, k, u, rule.i.to(wide), decay.raw.to(wide), (s, rule.m), eps=eps)
    elif isinstance(rule, Delta):
        beta = rule.raw.to(wide)
        beta = beta if rule.beta_max is None else rule.beta_max * beta.sigmoid()
        o, s = delta_step(q, k.unsqueeze(1), u.unsqueeze(1), beta.unsqueeze(1), log_a, s)
    else:
        o, s = decay_step(q, k, F.pad(u, (0, 1), value=1.0) if divide else u, log_a, s)
        if divide:
            o = o[..., :-1] / (o[..., -1:] + eps)
    if skip is not None:
        o = torch.addcmul(o, v, skip.to(wide).view(heads, -1))
    return o.to(out), s, window, m


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _log_decay(
    decay: Decay | None, wide: torch.dtype, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """The log decay and the step size dt, [B, H] or [B, H, K]."""
    if decay is None:
        return None, None
    x, dt = decay.raw.to(wide), None
    if decay.kind in ("softplus", "bounded"):
        assert decay.a_log is not None
        assert decay.bias is not None
        rate = decay.a_log.to(wide).exp().view(-1, *[1] * (x.ndim - 2))
        x = x + decay.bias.to(wide).view(x.shape[1:])
        if decay.kind == "softplus":
            dt = F.softplus(x).clamp(decay.low, decay.high)
            x = -rate * dt
        else:
            x = decay.factor * torch.sigmoid(rate * x)
    elif decay.kind == "logsigmoid":
        x = (decay.factor * F.logsigmoid(x)).clamp(min=decay.low)
    repeat = heads // x.shape[1]
    return x.repeat_interleave(repeat, 1), None if dt is None else dt.repeat_interleave(repeat, 1)


def is_token(x: Tensor, state: object, cu_seqlens: Tensor | None) -> bool:
    """Whether a mixer's input [B, T, d] is a token that `step` may take, without gradients."""
    return (
        x.shape[1] == 1
        and state is not None
        and cu_seqlens is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and by_kernel("step", x, lambda: True)
    )


def window_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, silu: bool
) -> tuple[Tensor, Tensor] | None:
    """One token of `conv` with SiLU if asked for, by a kernel: y, the new window; else None.

    Shapes: x, y [B, E]; weight [E, W]; window [B, W - 1, E].
    """
    if window_fits(x, weight, bias, window):
        return window_fused(x, weight, bias, window, silu)
    return None


@contextmanager
def twins(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, what `step` makes of the first state of a pair lies in the memory of the second."""
    pairs = list(pairs)
    try:
        for a, b in pairs:
            a._longscan_twin = b  # type: ignore[attr-defined]
        yield
    finally:
        for a, _ in pairs:
            del a._longscan_twin  # type: ignore[attr-defined]


__all__ = [
    "Conv",
    "Decay",
    "Delta",
    "Exponential",
    "Rotary",
    "Stepped",
    "is_token",
    "step",
    "step_torch",
    "twins",
    "window_step",
]
