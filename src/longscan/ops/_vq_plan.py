"""How the tokens of `longscan.ops.vq` lie in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Plan:
    """How tokens lie in blocks: R lead blocks, then G blocks of queries, step-major.

    Each sequence is cut where its absolute positions are multiples of the block. First come the
    lead blocks, the one before the first of each sequence, then the first block of each, then the
    second of those that have one, and so on; sequences with more blocks come first. The keys of a
    block are its own, those of the block before and, in both directions, of the block behind.

    counts[i]: sequences with an i-th block; first [G]: blocks whose neighbour before holds nothing;
    filled [R + G, L]: slots that hold a token; last [R]: each sequence's last block; whole [R]:
    whether it is complete. last and whole are in the order of the caller.
    For sequences that differ: order [R]: how they are sorted; index [R + G, L]: each slot's token
    among the new tokens, the past ones and one of zeros; queries [G, L]: the same among the new
    and one of zeros; back [N]: each new token's slot; before, behind [G]: where the neighbours
    lie. None where all are alike: there tokens are padded, `offset` new ones' place in a block.
    """

    block: int
    counts: list[int]
    offset: int
    first: Tensor
    filled: Tensor
    last: Tensor
    whole: Tensor
    order: Tensor | None = None
    index: Tensor | None = None
    queries: Tensor | None = None
    back: Tensor | None = None
    before: Tensor | None = None
    behind: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        """Queries [B, T, H, D] -> [G, H, L, D]."""
        if self.queries is not None:
            x = F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, 1))
            return x[self.queries].transpose(1, 2)
        return self._cut(x, self.offset, len(self.counts))

    def keys(self, new: Tensor, past: Tensor) -> Tensor:
        """Keys [B, T, H, ...], past ones [R, P, H, ...] -> [R + G, H, L, ...], zeros to fill up."""
        if self.index is not None:
            pool = [new.flatten(0, 1), past.flatten(0, 1), new.new_zeros(1, *new.shape[2:])]
            return torch.cat(pool)[self.index].transpose(1, 2)
        front = self.block + self.offset - past.shape[1]
        both = torch.cat([past, new], 1) if past.shape[1] else new
        return self._cut(both, front, 1 + len(self.counts))

    def _cut(self, x: Tensor, front: int, blocks: int) -> Tensor:
        pad = (0, 0) * (x.ndim - 2) + (front, blocks * self.block - front - x.shape[1])
        x = F.pad(x, pad).unflatten(1, (blocks, self.block))
        return x.permute(1, 0, 3, 2, *range(4, x.ndim)).flatten(0, 1).contiguous()

    def window(self, x: Tensor, causal: bool) -> list[Tensor]:
        """Blocks [R + G, ...] -> those before each [G, ...], its own, and those behind it."""
        rows = self.counts[0]
        own = x[rows:]
        if self.before is not None:
            parts = [x[self.before], own]
            return parts if causal else [*parts, x[self.behind]]
        parts = [x[: x.shape[0] - rows], own]
        return parts if causal else [*parts, torch.cat([own[rows:], torch.zeros_like(own[:rows])])]

    def join(self, o: Tensor, shape: torch.Size) -> Tensor:
        """[G, H, L, V] -> [B, T, H, V], the inverse of `split`."""
        o = o.transpose(1, 2)
        if self.back is not None:
            return o.flatten(0, 1)[self.back].view(shape)
        o = o.unflatten(0, (len(self.counts), shape[0])).transpose(0, 1).flatten(1, 2)
        return o[:, self.offset : self.offset + shape[1]]


def even_plan(rows: int, length: int, block: int, at: list[int], device: torch.device) -> Plan:
    """The plan of rows of equal length that begin at the same place of a block."""
    offset = at[0] % block
    steps = -(-(offset + length) // block)
    step = torch.arange(steps * rows, device=device) // rows
    first = step == 0
    if max(at) >= block:
        new = torch.tensor([a < block for a in at], device=device)
        first = torch.cat([new, new.new_zeros((steps - 1) * rows)])
    place = torch.arange(-block, steps * block, device=device).view(-1, 1, block)
    filled = ((place >= 0) & (place < offset + length)).expand(-1, rows, -1).flatten(0, 1)
    last = torch.arange((steps - 1) * rows, steps * rows, device=device)
    whole = torch.full_like(last, (offset + length) % block == 0, dtype=torch.bool)
    return Plan(block, [rows] * steps, offset, first, filled, last, whole)


def ragged_plan(
    sizes: list[int], at: list[int], past: int, block: int, device: torch.device
) -> Plan:
    """The plan of sequences that differ in length or position, with `past` slots before each."""
    size, pos = torch.tensor(sizes), torch.tensor(at)
    rows, total = len(sizes), sum(sizes)
    start, offset = size.cumsum(0) - size, pos % block
    blocks = (offset + size + block - 1) // block
    order = torch.argsort(blocks, descending=True, stable=True)
    steps = int(blocks.max())
    counts = [int((blocks > i).sum()) for i in range(steps)]
    base = rows + torch.tensor([0, *counts]).cumsum(0)[:-1]  # where each step begins
    step = torch.repeat_interleave(torch.arange(steps), torch.tensor(counts))
    place = torch.cat([torch.arange(n) for n in counts])
    row = order[place]
    slot = torch.cat([torch.full((rows,), -1), step])[:, None] * block + torch.arange(block)
    of = torch.cat([order, row])[:, None]
    t = slot - offset[of]
    new = (t >= 0) & (t < size[of])
    old = (t < 0) & (t >= -pos.clamp(max=past)[of])
    index = torch.where(old, total + (of + 1) * past + t, total + rows * past)
    index = torch.where(new, start[of] + t, index)
    queries = torch.where(new, index, total)[rows:]
    back = torch.empty(total + 1, dtype=torch.long)
    back[queries.flatten()] = torch.arange(queries.numel())
    final = step == blocks[row] - 1
    before = torch.where(step == 0, place, base[(step - 1).clamp(min=0)] + place)
    # a lead block stands in for the one that is not there; it holds nothing without a past
    behind = torch.where(final, 0, base[(step + 1).clamp(max=steps - 1)] + place)
    last = torch.empty(rows, dtype=torch.long)
    last[row[final]] = torch.arange(len(row))[final]
    tensors = (
        (step == 0) & (pos[row] < block), new | old, last, (offset + size) % block == 0,
        order, index, queries, back[:-1], before, behind,
    )  # fmt: skip
    return Plan(block, counts, 0, *(x.to(device) for x in tensors))
