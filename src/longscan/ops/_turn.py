"""Pairs of entries turned by angles: the rotating frame of `ops.trapezoid`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAIRS = ("neighbours", "halves")


def pairs_of(x: Tensor, n: int, pairs: str) -> tuple[Tensor, Tensor]:
    """Views of the first and the second members of n pairs of the last axis."""
    if pairs == "neighbours":
        return x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]
    half = x.shape[-1] // 2
    return x[..., :n], x[..., half : half + n]


def rotate(x: Tensor, angle: Tensor, pairs: str) -> Tensor:
    """Turn S pairs of the last axis by S angles: (2i, 2i + 1) or (i, N / 2 + i), i < S.

    Shapes: x [..., N]; angle [..., S], S <= N / 2, broadcasts over the axes before.
    """
    y, cos, sin = x.clone(), angle.cos(), angle.sin()
    x1, x2 = pairs_of(x, angle.shape[-1], pairs)
    y1, y2 = pairs_of(y, angle.shape[-1], pairs)
    y1.copy_(x1 * cos - x2 * sin)
    y2.copy_(x1 * sin + x2 * cos)
    return y


def wrap(angle: Tensor) -> Tensor:
    """The angle in [-pi, pi] that differs by whole turns.

    In float64: subtracting a float32 turn leaves its rounding, the same one every time.
    """
    exact = angle.double()
    turns = (exact.detach() * (0.5 / math.pi)).round_()
    return (exact - turns * (2 * math.pi)).to(angle.dtype)


def to_heads(x: Tensor, bias: Tensor) -> Tensor:
    """Vectors of groups + biases of heads: [G, Hk, C, R, N] and [H, R, N] -> [G, H, C, R, N]."""
    bias = bias.unflatten(0, (x.shape[1], -1)).unsqueeze(2)
    return (x.unsqueeze(2) + bias).flatten(1, 2)


def turn_(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> None:
    """`rotate`, in place."""
    x1, x2 = pairs_of(x, cos.shape[-1], pairs)
    across = x1 * sin
    x1.mul_(cos).addcmul_(x2, sin, value=-1)
    x2.mul_(cos).add_(across)


class Turned(torch.autograd.Function):
    """rotate(to_heads(x, bias), theta) of q and k, without the copies that autograd would make.

    These are the largest tensors of the layer: on a CPU it gains a sixth of the whole time.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, q_bias: Tensor, k_bias: Tensor, theta: Tensor, pairs: str
    ):
        ctx.groups, ctx.pairs = q.shape[1], pairs
        q, k = to_heads(q, q_bias), to_heads(k, k_bias)
        cos, sin = theta.cos(), theta.sin()
        for y in (q, k):
            turn_(y, cos, sin, pairs)
        ctx.save_for_backward(q, k, theta, cos, sin)
        return q, k

    @staticmethod
    def backward(ctx, *grads: Tensor):
        *turned, theta, cos, sin = ctx.saved_tensors
        n, d_theta, d_x, d_bias = theta.shape[-1], [], [], []
        for y, g in zip(turned, grads, strict=True):
            (y1, y2), (g1, g2) = pairs_of(y, n, ctx.pairs), pairs_of(g, n, ctx.pairs)
            d_theta.append(torch.addcmul(y1 * g2, y2, g1, value=-1))
            if torch.is_grad_enabled():  # a second derivative is wanted
                g = rotate(g, -theta, ctx.pairs)
            else:
                g = g.clone()
                turn_(g, cos, -sin, ctx.pairs)
            g = g.unflatten(1, (ctx.groups, -1))
            d_x.append(g.sum(2))
            d_bias.append(g.sum((0, 3)).flatten(0, 1))
        return *d_x, *d_bias, (d_theta[0] + d_theta[1]).sum(-2, keepdim=True), None
