"""Decayed scores inside a chunk, exact for any gate: exponentials only of non-positive numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cumulative(log_a: Tensor, dim: int) -> Tensor:
    """Cumulative sums of log decays, to the base 2: on a CPU exp2 takes a third of exp's time.

    Each is first raised to the logarithm of the smallest number. A gate below that is zero in
    this precision anyway; the floor admits log_a = -inf and keeps the sums small, so that weak
    gates after a closed one do not drown in rounding.
    """
    floor = math.log(torch.finfo(log_a.dtype).tiny)
    return (log_a.clamp(min=floor) * math.log2(math.e)).cumsum(dim)


def decay_factors(b: Tensor) -> Tensor:
    """2^(b_i - b_j) for j <= i, zero above the diagonal.

    Shapes: b [..., C] from `cumulative`; result [..., C, C].
    """
    c = b.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=b.device).triu(1)
    return (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(later, float("-inf")).exp2()


def vector_scores(rows: Sequence[Tensor], k: Tensor, b: Tensor) -> list[Tensor]:
    """For each x of `rows`: sum_d x_id k_jd 2^(b_id - b_jd), causal, with a gate per channel d.

    2^(b_i - b_j) does not factor into 2^b_i 2^-b_j without overflow. Between two neighbouring
    halves it does factor through their border z: 2^(b_i - z) 2^(z - b_j), both <= 1. So the
    scores are built from pairs of halves of 1, 2, 4, ... tokens.

    Shapes: x [..., C, R, D], R row vectors per token; k [..., C, N, D], N keys per token;
    b [..., C, D] from `cumulative`; C a power of two; result [..., C * R, C * N], zero where
    the key's token is later. Within one token nothing decays and all R x N scores are given.
    """
    c = b.shape[-2]
    if c & (c - 1):
        raise ValueError(f"the chunk must hold a power of two of tokens, not {c}")
    out = [x @ k.mT for x in rows]
    m = 1
    while m < c:
        ends = b.unflatten(-2, (c // (2 * m), 2 * m))
        border = ends[..., m - 1 : m, :]
        late = (ends[..., m:, :] - border).exp2().unsqueeze(-2)
        early = (border - ends[..., :m, :]).exp2().unsqueeze(-2)
        kk = k.unflatten(-3, (c // (2 * m), 2 * m))[..., :m, :, :] * early
        kk = kk.flatten(-3, -2).mT
        for i, x in enumerate(rows):
            xx = x.unflatten(-3, (c // (2 * m), 2 * m))[..., m:, :, :] * late
            cross = xx.flatten(-3, -2) @ kk
            pair = out[i].unflatten(-3, (-1, 2))
            top = F.pad(pair[..., 0, :, :], (0, cross.shape[-1]))
            out[i] = torch.cat([top, torch.cat([cross, pair[..., 1, :, :]], -1)], -2)
        m *= 2
    return [x.squeeze(-3) for x in out]


def sums(x: Tensor) -> Tensor:
    """x [B, T, ...] summed along T, in two steps: devices are slow at sums of thousands."""
    t, size = x.shape[1], 128
    if t <= size:
        return x.cumsum(1)
    inside = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -t % size)).unflatten(1, (-1, size)).cumsum(2)
    before = F.pad(inside[:, :-1, -1], (0, 0) * (x.ndim - 2) + (1, 0)).cumsum(1)
    return (inside + before.unsqueeze(2)).flatten(1, 2)[:, :t]
