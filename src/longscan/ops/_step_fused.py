"""`step` and the short convolution of one token, a kernel each."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of

DECAYS = ("given", "softplus", "logsigmoid", "bounded")


class Conv(NamedTuple):
    """A short convolution over channels that hold q, k and v.

    window [B, W - 1, C]: its last inputs; weight [C, 1, W]; bias [C] or None; at: the channels at
    which q, k and v begin, each its heads side by side.
    """

    window: Tensor
    weight: Tensor
    bias: Tensor | None
    at: tuple[int, int, int]


class Decay(NamedTuple):
    """How the log decay of a state is made from what was projected for it.

    kind: "given" raw itself | "softplus" -exp(a_log) dt, dt = clamp(softplus(raw + bias), low,
    high) | "logsigmoid" max(factor logsigmoid(raw), low) | "bounded" factor sigmoid(exp(a_log)
    (raw + bias)). Shapes: raw [B, Hg] or, a gate per key, [B, Hg, K]; a_log [Hg]; bias as raw
    without B, or flat; gate heads Hg divide the value heads.
    """

    kind: str
    raw: Tensor
    a_log: Tensor | None = None
    bias: Tensor | None = None
    factor: float = 1.0
    low: float = -float("inf")
    high: float = float("inf")


class Delta(NamedTuple):
    """The delta rule, with strength beta_max sigmoid(raw), or raw for None; raw [B, H]."""

    raw: Tensor
    beta_max: float | None = None


class Exponential(NamedTuple):
    """mLSTM's input gate exp(i) beside a decay of logsigmoid(f). i [B, H]; m [B, H, 1]."""

    i: Tensor
    m: Tensor


class Rotary(NamedTuple):
    """Rotation of q and k: positions [B] integers times `turns` [K / 2], the angles per token."""

    positions: Tensor
    turns: Tensor


class Launch(NamedTuple):
    """Numbers of a tile of the state, warps."""

    tile: int
    warps: int


# With many programs, and with few: small tiles then keep more multiprocessors busy.
LAUNCHES = {"many": Launch(8192, 4), "few": Launch(2048, 4)}
MANY = 264
SCAN = Launch(2048, 4)
WIDEST = 8
LONGEST_KEY = 1024
BLOCK = 256


@cache
def _kernels() -> Any:
    return import_module("longscan.kernels.step")


def step_fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    conv: Conv | None,
    decay: Decay | None,
    rule: Delta | Exponential | None,
    skip: Tensor | None,
    **more: Any,
) -> bool:
    """Whether the kernel computes this case; it has no gradients."""
    given = [q, k, v, s, skip, *(decay or ()), *(rule or ()), *(conv or ())]
    floats = [x for x in given if isinstance(x, Tensor)]
    return (
        s.dtype is torch.float32
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in floats))
        and all(x.dtype in DTYPES for x in floats)
        and 0 < s.shape[2] <= LONGEST_KEY
        and 0 < s.shape[0] * s.shape[1] * s.shape[3] < 2**31
        and (conv is None or 2 <= conv.weight.shape[-1] <= WIDEST)
        and (conv is None or q.dtype is k.dtype is v.dtype)
        and not torch.compiler.is_compiling()
    )


def _new(x: Tensor) -> Tensor:
    """Where the state after x goes."""
    twin = getattr(x, "_longscan_twin", None)
    return torch.empty_like(x) if twin is None else twin


def _lying(x: Tensor) -> Tensor:
    """x [B, H, D] or [B, H] with rows side by side: itself if it is a slice of a projection."""
    inner = x.stride()[1:] == (x.shape[2], 1) if x.ndim == 3 else x.stride(1) == 1
    return x if inner else x.contiguous()


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def step_fused(
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
    """`ops.step.step`."""
    q, k, v = _lying(q), _lying(k), _lying(v)
    s = s if s.is_contiguous() else s.contiguous()
    rows, heads, d_key, width = s.shape
    d_value = v.shape[2]
    after, o = _new(s), v.new_empty(rows, heads, d_value)
    window = new_window = weight = bias = None
    at, taps, channels = (0, 0, 0), 0, 0
    if conv is not None:
        window, weight, bias, at = conv
        window = window.to(v.dtype).contiguous()
        new_window, weight = _new(window), weight.contiguous()
        taps, channels = weight.shape[-1], weight.shape[0]
    m = new_m = strength = None
    beta_max, number = 1.0, 0
    if rule is not None:
        strength = _lying(rule[0])
        if isinstance(rule, Exponential):
            m, number = rule.m.contiguous(), 3
            new_m = _new(m)
        else:
            number = 4 if rule.beta_max is None else 1
            beta_max = rule.beta_max or 1.0
    elif scale_by_dt:
        number = 2
    gate, per_key, gate_heads = 0, False, heads
    raw = a_log = gate_bias = None
    factor, low, high = 1.0, 0.0, 0.0
    if decay is not None:
        kind, raw, a_log, gate_bias, factor, low, high = decay
        raw, gate, per_key = _lying(raw), 1 + DECAYS.index(kind), raw.ndim == 3
        gate_heads = raw.shape[1]
    block_k = max(16, _power(d_key))
    launch = LAUNCHES["many"]
    if rows * heads * -(-d_value * block_k // launch.tile) < MANY:
        launch = LAUNCHES["few"]
    block_v = min(max(16, launch.tile // block_k), max(16, _power(d_value)))
    with device_of(v):
        _kernels().step[(rows * heads * -(-d_value // block_v),)](
            q, k, v, window, weight, bias, new_window, s, after, raw, a_log, gate_bias,
            strength, m, new_m, skip, None if rotary is None else rotary[1],
            None if rotary is None else rotary[0], o,
            q.stride(0), k.stride(0), v.stride(0), 0 if raw is None else raw.stride(0),
            0 if strength is None else strength.stride(0), channels, *at,
            float(q_scale), float(k_scale), float(factor), float(low), float(high),
            float(beta_max), float(eps), 1e-6,
            H=heads, RQ=heads // q.shape[1], RK=heads // k.shape[1], RV=heads // v.shape[1],
            RG=heads // gate_heads, K=d_key, V=d_value, BK=block_k, BV=block_v, W=taps,
            BIAS=bias is not None, SILU=int(silu), FEATURE=feature, UNIT=unit,
            TURN=rotary is not None, GATE=gate, PER_KEY=per_key, RULE=number,
            SUM=width - d_value,
            SKIP=0 if skip is None else 1 if skip.numel() == heads else 2,
            num_warps=min(16, launch.warps * max(1, block_k // 128)),
        )  # fmt: skip
    return o, after, new_window, new_m


def window_fits(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> bool:
    """Whether the kernel computes this convolution of a token."""
    floats = [x, weight, window, *([] if bias is None else [bias])]
    return all(t.dtype in DTYPES for t in floats) and 2 <= weight.shape[1] <= WIDEST


def window_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """`ops.step.window_step` where `window_fits`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, window = weight.contiguous(), window.to(x.dtype).contiguous()
    y, new = x.new_empty(x.shape), _new(window)
    with device_of(x):
        _kernels().convolve[(x.shape[0], -(-x.shape[1] // BLOCK))](
            x, window, weight, bias, new, y, x.stride(0), x.shape[1],
            W=weight.shape[1], BIAS=bias is not None, SILU=int(silu), BLOCK=BLOCK, num_warps=2,
        )  # fmt: skip
    return y, new


def scan_fits(*tensors: Tensor, state: Tensor) -> bool:
    """Whether the kernel computes this step of Mamba; tensors: the others."""
    return (
        state.dtype is torch.float32
        and state.shape[2] <= 256
        and all(t.dtype in DTYPES for t in tensors)
    )


def scan_fused(
    u: Tensor, raw: Tensor, dt_bias: Tensor, a_log: Tensor, b: Tensor, c: Tensor, skip: Tensor,
    z: Tensor, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of Mamba behind its projections, where `scan_fits`: y and the new state.

    dt = softplus(raw + dt_bias);   h' = exp(-dt exp(a_log)) h + dt u b^T
    y = (h' c + skip u) silu(z)

    Shapes: u, raw, z, y [B, E]; dt_bias, skip [E]; a_log [E, N]; b, c [B, N]; state [B, E, N].
    """
    u, raw, b, c, z = (_lying(x) for x in (u, raw, b, c, z))
    state = state if state.is_contiguous() else state.contiguous()
    rows, channels, n = state.shape
    y, after, block_n = u.new_empty(rows, channels), _new(state), _power(n)
    block = max(16, SCAN.tile // block_n)
    with device_of(u):
        _kernels().scan[(rows, -(-channels // block))](
            u, raw, dt_bias, a_log, b, c, skip, z, state, after, y,
            u.stride(0), raw.stride(0), b.stride(0), c.stride(0), z.stride(0), channels,
            N=n, BN=block_n, BLOCK=block, num_warps=SCAN.warps,
        )  # fmt: skip
    return y, after
