"""Haar filter banks along time whose gains depend on the token, and sums over packed sequences.

An orthonormal Haar transform of J levels with the gains g_0 .. g_{J-1} on the details, finest
first, and g_J on the approximation, followed by its inverse, is a weighted sum of means over
dyadic stretches of tokens, because detail j is the difference of two of them:

    y = sum_{j=1..J} g_{j-1} (a_{j-1} - a_j) + g_J a_J = sum_{j=0..J} c_j a_j
    c_0 = g_0,   c_j = g_j - g_{j-1}

The decimated transform has a_j[t] = the mean of the block of 2^j tokens that holds t; the
undecimated one the mean of the last 2^j tokens, which makes it causal. With all gains equal to 1
either gives y = x.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import check_state
from longscan.ops._layout import check_cu_seqlens, layout, remembered


def _weights(gains: Tensor) -> Tensor:
    """c_j / 2^j, the weights of sums over 2^j tokens, of gains [..., J + 1]."""
    c = torch.cat([gains[..., :1], gains.diff(dim=-1)], -1)
    return c * 0.5 ** torch.arange(c.shape[-1], device=c.device, dtype=c.dtype)


# --- the causal bank --------------------------------------------------------------------------


def taps_of(levels: int) -> Tensor:
    """The undecimated transform as weights of the last 2^J tokens, oldest first, that the gains
    have: [J + 1, 2^J], powers of two."""
    age = torch.arange(2**levels - 1, -1, -1)
    means = torch.stack([(age < 2**j) * 0.5**j for j in range(levels + 1)])
    return torch.cat([means[:-1] - means[1:], means[-1:]])


def trailing_haar(
    x: Tensor,
    gains: Tensor,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    taps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The undecimated transform: y_t = sum_j c_j,t mean(x_{t - 2^j + 1} .. x_t).

    Shapes: x [B, T, E]; gains [B, T, J + 1]; past [rows, 2^J - 1, E], the tokens before, oldest
    first (None: zeros); y [B, T, E]. Precision: y in the dtype of gains, past in that of x.
    Returns: y, and the last 2^J - 1 tokens of every sequence.
    """
    before = 2 ** (gains.shape[-1] - 1) - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("shift", past, (rows, before, x.shape[2]), "[rows, 2^J - 1, E]")
    past = x.new_zeros(rows, before, x.shape[2]) if past is None else past.to(x.dtype)
    if cu_seqlens is None:
        row = torch.cat([past, x], 1)
        last, wide = row[:, x.shape[1] :], row.to(gains.dtype)
        if x.shape[1] == 1 and taps is not None:
            return gains @ taps.to(gains.dtype) @ wide, last
        return _trailing(wide, _weights(gains)), last
    # Every sequence behind its own past on one long row; outputs on the past are thrown away.
    bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    index, token, own, ends = remembered(
        cu_seqlens, f"behind {before}", lambda: _behind(bounds, before, x.device)
    )
    row = torch.cat([past.flatten(0, 1), x[0]]).index_select(0, index)
    c = _weights(gains).index_select(1, token)
    y = _trailing(row.unsqueeze(0).to(c.dtype), c)
    return y.index_select(1, own), row[ends]


def _trailing(row: Tensor, c: Tensor) -> Tensor:
    """The weighted sums of a row whose first tokens have no output. c has the others' weights."""
    length = c.shape[1]
    y, a = row[:, -length:] * c[..., :1], row
    for j in range(1, c.shape[-1]):
        a = a[:, 2 ** (j - 1) :] + a[:, : -(2 ** (j - 1))]
        y = torch.addcmul(y, a[:, -length:], c[..., j : j + 1])
    return y


def _behind(bounds: list[int], before: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices for sequences each behind `before` tokens of its past: where each token of that row
    lies in past | x, whose weights its outputs have, where the outputs of x are, and the last
    `before` tokens of each sequence [n, before]."""
    b = torch.tensor(bounds)
    n, length = len(b) - 1, bounds[-1]
    sequence = torch.arange(n).repeat_interleave(b.diff())
    place = torch.arange(length) + (sequence + 1) * before
    index = torch.empty(length + n * before, dtype=torch.long)
    index[place] = torch.arange(length) + n * before
    starts = b[:-1] + torch.arange(n) * before
    index[(starts.unsqueeze(1) + torch.arange(before)).flatten()] = torch.arange(n * before)
    token = (index - n * before).clamp(min=0)[before:]
    ends = b[1:] + torch.arange(n) * before
    last = ends.unsqueeze(1) + torch.arange(before)
    return tuple(i.to(device) for i in (index, token, place - before, last))


# --- the decimated transform ------------------------------------------------------------------


def block_haar(x: Tensor, gains: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The decimated transform of each sequence, zeros behind its end.

    The gain of a coefficient is that of the first token it covers. A sequence of at most 2^l
    tokens, l < J, has l levels; gain l is then that of its approximation.

    Shapes: x, y [B, T, E]; gains [B, T, J + 1]. Precision: y in the dtype of gains.
    """
    levels = gains.shape[-1] - 1
    plan = layout(x.shape[0], x.shape[1], 2**levels, cu_seqlens)
    # One number for all further levels and the approximation is what leaving them out amounts to.
    j = torch.arange(levels + 1, device=x.device)
    if cu_seqlens is None:
        gains = gains[..., j.clamp(max=(x.shape[1] - 1).bit_length())]
    else:
        bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
        if min(e - s for s, e in pairwise(bounds)) <= 2 ** (levels - 1):
            done = torch.tensor([(e - s - 1).bit_length() for s, e in pairwise(bounds)])
            per_token = done.repeat_interleave(torch.tensor(bounds).diff()).to(x.device)
            gains = gains.gather(-1, torch.minimum(j, per_token.unsqueeze(-1)).unsqueeze(0))
    gains, x = plan.split(gains), plan.split(x.to(gains.dtype))
    t = torch.arange(x.shape[1], device=x.device)
    size = (j + 1).clamp(max=levels)  # of the block that the gain is for, as a power of two
    first = t.unsqueeze(-1) >> size << size
    c = _weights(gains.gather(1, first.expand(len(gains), -1, -1)))
    block = t >> j.unsqueeze(-1)
    same = (block.unsqueeze(-1) == block.unsqueeze(-2)).to(c.dtype)
    return plan.join(torch.einsum("gtj,jts->gts", c, same) @ x)


# --- packed sequences, each as a whole ---------------------------------------------------------


def of_each(fn: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """fn: [B, T, ...] -> [B, ...] of every sequence. Shapes: x [B, T, ...]; -> [rows, ...]."""
    if cu_seqlens is None:
        return fn(x)
    lengths = torch.tensor(check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])).diff().tolist()
    return torch.cat([fn(part) for part in x.split(lengths, 1)])


def to_each(rows: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """What belongs to a sequence, for each of its tokens: [rows, ...] -> [B, T, ...]."""
    if cu_seqlens is None:
        return rows.unsqueeze(1).expand(-1, length, *rows.shape[1:])
    bounds = torch.tensor(check_cu_seqlens(cu_seqlens, 1, length))
    sequence = remembered(
        cu_seqlens,
        "sequence",
        lambda: torch.arange(len(rows)).repeat_interleave(bounds.diff()).to(rows.device),
    )
    return rows[sequence].unsqueeze(0)


def running_max(
    x: Tensor, first: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value so far, itself included, of every sequence from `first` on.

    Shapes: x [B, T, H]; first [rows, H]. Returns: it [B, T, H]; the one before less it, <= 0; the
    last of every sequence [rows, H].
    """
    parts, firsts = [x], [first]
    if cu_seqlens is not None:
        lengths = torch.tensor(check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])).diff()
        parts, firsts = x.split(lengths.tolist(), 1), first.split(1)
    m = [
        torch.cat([f.unsqueeze(1), p], 1).cummax(1).values
        for f, p in zip(firsts, parts, strict=True)
    ]
    return (
        torch.cat([p[:, 1:] for p in m], 1),
        torch.cat([p[:, :-1] - p[:, 1:] for p in m], 1),
        torch.cat([p[:, -1] for p in m]),
    )


def ahead(x: Tensor, by: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sequences with `by` zeros behind each.

    Returns: x so; its cu_seqlens; and for every token of x where the one `by` later lies.
    """
    if cu_seqlens is None:
        later = torch.arange(by, by + x.shape[1], device=x.device)
        return F.pad(x, (0, 0, 0, by)), None, later
    bounds = check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])

    def make() -> tuple[Tensor, Tensor, Tensor]:
        b = torch.tensor(bounds)
        sequence = torch.arange(len(b) - 1).repeat_interleave(b.diff())
        place = torch.arange(bounds[-1]) + sequence * by
        wider = b + torch.arange(len(b)) * by
        index = torch.full((int(wider[-1]),), bounds[-1])
        index[place] = torch.arange(bounds[-1])
        return index.to(x.device), wider.to(x.device), (place + by).to(x.device)

    index, wider, later = remembered(cu_seqlens, f"ahead {by}", make)
    return F.pad(x, (0, 0, 0, 1)).index_select(1, index), wider, later
