"""Queries and keys turned by their positions, one kernel each way, with what stands around it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longscan.ops._kernel_op import DTYPES, device_of, kernel_op

TILE, GROUP, WIDEST = 2048, 4, 1024
"""Numbers of a head that a program of 4 warps has at once; heads it goes through; largest head."""


def rotary_fits(x: Tensor, d_head: int, cos: Tensor | None, sin: Tensor | None) -> bool:
    """Whether the kernel computes this case: x [B, T, ..] with cos and sin, side by side, for
    [T] or [B, T] positions, that need no gradient."""
    if cos is None or sin is None:
        turns = cos is sin
    else:
        shape = tuple(cos.shape)
        turns = (
            cos.dtype is torch.float32
            and sin.dtype is torch.float32
            and sin.shape == shape
            and shape[:-1] in ((x.shape[1], 1), (*x.shape[:2], 1))
            and 2 <= shape[-1] <= d_head
            and cos.is_contiguous()
            and sin.is_contiguous()
            and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        )
    few = x.shape[0] * x.shape[1] < 2**31 - TILE  # tokens are counted in 32 bits
    return turns and few and x.dtype in DTYPES and d_head <= WIDEST and x.numel() > 0


@cache
def _kernel() -> Any:
    return import_module("longscan.kernels.rotary").turn


@cache
def _constants(
    heads: tuple[int, int, int], d: int, dim: int, per_row: bool, norm: bool, back: bool,
    align: int,
) -> dict[str, Any]:  # fmt: skip
    wide, (q, k, v) = 1 << (d - 1).bit_length(), heads
    return {
        "QH": q, "KH": k, "VH": v, "D": d, "DIM": dim, "BLOCK_T": max(1, TILE // wide),
        "BLOCK_H": 1 << max(0, dim // 2 - 1).bit_length(),
        "BLOCK_E": 1 << max(0, d - dim - 1).bit_length(), "BLOCK_D": wide,
        "ALIGN": align, "GROUP": GROUP, "ONCE": 1 if norm and back else GROUP,
        "PER_ROW": per_row, "NORM": norm, "BACK": back,
        "num_warps": 4,
    }  # fmt: skip


def _launch(
    x: tuple[Tensor, Tensor, Tensor],
    y: tuple[Tensor, Tensor, Tensor],
    strides: list[int],
    tokens: tuple[int, int],
    heads: tuple[int, int, int],
    d: int,
    factors: tuple[Tensor | None, Tensor | None],
    norm: tuple[Tensor | None, Tensor | None, float],
    raw: Tensor | None = None,
) -> Tensor | None:
    """The kernel from x to y, backwards where there is `raw`; -> its parts of the gradients of
    the norms' weights. strides: of x and then of y, for each of q, k, v those of row, token, head;
    tokens: all, and those of a row."""
    cos, sin = factors
    align = 1 if d % 8 or any(s % 8 for s in strides) else 8
    dim, per_row = (0, False) if cos is None else (cos.shape[-1], cos.ndim == 4)
    back, (q_weight, k_weight, eps) = raw is not None, norm
    constants = _constants(heads, d, dim, per_row, q_weight is not None, back, align)
    tiles = -(-tokens[0] // constants["BLOCK_T"])
    q_groups, k_groups, v_groups = (-(-n // GROUP) for n in heads)
    first, partial = x[0], None
    if back and q_weight is not None:
        partial = first.new_empty(tiles, q_groups + k_groups, d, dtype=torch.float32)
    none = first if cos is None else cos
    with device_of(first):
        _kernel()[(tiles, q_groups + k_groups + v_groups)](
            *x, *y, first if raw is None else raw, none if q_weight is None else q_weight,
            none if k_weight is None else k_weight, none if partial is None else partial,
            none, none if sin is None else sin, eps, *tokens, *(s // align for s in strides),
            **constants,
        )  # fmt: skip
    return partial


def _lying(x: Tensor) -> Tensor:
    """x [B, T, H, D] with numbers of a head side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


# --- one tensor of heads --------------------------------------------------------------------


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [B, T, H, D] turned, or turned back."""
    x = _lying(x)
    y = x.new_empty(x.shape)
    b, t, h, d = x.shape
    ours, own = [*x.stride()[:3]], [t * h * d, h * d, d]
    _launch((x, x, x), (y, y, y), [*ours * 3, *own * 3], (b * t, t), (h, 0, 0), d, (cos, sin),
            (None, None, 0.0), y if back else None)  # fmt: skip
    return y


def _forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x, cos, sin, False)


def _fake(x, cos, sin):
    return x.new_empty(x.shape)


def _backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(dy, cos, sin, True)


def _keep(ctx: Any, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, run, dy: Tensor):
    return run(dy, *ctx.saved_tensors), None, None


rotary_fused = kernel_op("rotary", _forward, _fake, _keep, _backward, _fake, _differentiate)
"""`ops.rotary.rotary` of x [B, T, H, D]; cos and sin [T, 1, dim] or [B, T, 1, dim]."""


# --- q | k | v ------------------------------------------------------------------------------


def _split(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    heads: int,
    groups: int,
    d: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q, k, v, and a copy of what is behind them."""
    x = x.contiguous()
    q, k, v, rest = _fake_split(x, cos, sin, q_weight, k_weight, eps, heads, groups, d)
    b, t, n = x.shape
    ours, many, few = [t * n, n, d], [t * heads * d, heads * d, d], [t * groups * d, groups * d, d]
    _launch((x, x, x), (q, k, v), [*ours * 3, *many, *few * 2], (b * t, t),
            (heads, groups, groups), d, (cos, sin), (q_weight, k_weight, eps))  # fmt: skip
    if rest.shape[-1]:
        rest.copy_(x[..., n - rest.shape[-1] :])
    return q, k, v, rest


def _fake_split(x, cos, sin, q_weight, k_weight, eps, heads, groups, d):
    b, t, n = x.shape
    return (
        x.new_empty(b, t, heads, d),
        x.new_empty(b, t, groups, d),
        x.new_empty(b, t, groups, d),
        x.new_empty(b, t, n - (heads + 2 * groups) * d),
    )


def _join(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    drest: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x and of the norms' weights; these are empty where there are none."""
    dx, dq_weight, dk_weight = _fake_join(dq, dk, dv, drest, x, cos, sin, q_weight, k_weight, eps)
    dq, dk, dv = _lying(dq), _lying(dk), _lying(dv)
    (b, t, heads, d), groups, n = dq.shape, dk.shape[2], dx.shape[-1]
    strides = [*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *[t * n, n, d] * 3]
    partial = _launch(
        (dq, dk, dv), (dx, dx, dx), strides, (b * t, t), (heads, groups, groups), d, (cos, sin),
        (q_weight, k_weight, eps), dx if x is None else x.contiguous(),
    )  # fmt: skip
    if drest.shape[-1]:
        dx[..., n - drest.shape[-1] :].copy_(drest)
    if partial is not None and q_weight is not None and k_weight is not None:
        of_q = -(-heads // GROUP)
        dq_weight = partial[:, :of_q].sum((0, 1)).to(q_weight.dtype)
        dk_weight = partial[:, of_q:].sum((0, 1)).to(k_weight.dtype)
    return dx, dq_weight, dk_weight


def _fake_join(dq, dk, dv, drest, x, cos, sin, q_weight, k_weight, eps):
    b, t, heads, d = dq.shape
    n = (heads + 2 * dk.shape[2]) * d + drest.shape[-1]
    weights = (dq.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return dq.new_empty(b, t, n), *weights


def _keep_split(ctx: Any, inputs, output) -> None:
    x, *rest, ctx.eps, _, _, _ = inputs
    # What the norm read; without one a row is not needed again.
    ctx.save_for_backward(None if rest[2] is None else x, *rest)


def _differentiate_split(ctx: Any, run, *grads: Tensor):
    saved = ctx.saved_tensors  # asked for once: blocks that are computed anew allow no more
    dx, dq_weight, dk_weight = run(*grads, *saved, ctx.eps)
    if saved[3] is None:
        dq_weight = dk_weight = None
    return dx, None, None, dq_weight, dk_weight, None, None, None, None


_heads_op = kernel_op(
    "rotary_heads", _split, _fake_split, _keep_split, _join, _fake_join, _differentiate_split
)


def rotary_heads_fused(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    heads: int,
    groups: int,
    d_head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.rotary.rotary_heads` by the kernel."""
    return _heads_op(x, cos, sin, q_weight, k_weight, eps, heads, groups, d_head)
