"""States behind the last tokens of sequences, from the ranks that hold these to all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.ops._across import first_order_only
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel.shards import Shards


def final_state(shards: Shards, state: State) -> State:
    """The states of all rows on every rank; state: those of the local sequences.

    Their gradients go back to the ranks that hold the last tokens, as sums over all ranks, so a
    loss that reads them must be formed on every rank.
    """
    wire = shards.wire
    if wire.size == 1 or not len(state):
        return state
    parts = []
    for rank, rows in _owners(shards):
        mine = state.select(rows) if rank == wire.rank else None
        parts.append(_shared(shards, rank, mine, state))
    return parts[0] if len(parts) == 1 else State.cat(parts)


def _owners(shards: Shards) -> list[tuple[int, slice]]:
    """(rank, which of its local sequences end there), in the order of sequences."""
    if not shards.packed:
        return [(shards.wire.size - 1, slice(None))]
    out = []
    for rank, (low, high) in enumerate(zip(shards.bounds, shards.bounds[1:], strict=False)):
        ends = [x for x in shards.sequences[1:] if low < x <= high]
        if ends:
            out.append((rank, slice(0, len(ends))))
    return out


def _shared(shards: Shards, source: int, state: State | None, local: State) -> State:
    flat = {} if state is None else state.flatten()
    device = shards.device
    named = [(name, tuple(t.shape), t.dtype) for name, t in flat.items()]
    on = torch.empty(0, device=device)
    names = shards.wire.run(lambda _: shards.wire.told(named, source, device), on)
    # Something of the graph, so that autograd comes by here on all ranks.
    graph = [t for t in local.flatten().values() if t.requires_grad]
    anchor = graph[0] if graph else torch.empty(0, device=device)
    tensors = _Shared.apply(shards, source, names, anchor, *flat.values())
    return State.unflatten({name: t for (name, *_), t in zip(names, tensors, strict=True)})


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards: Shards, source: int, names: list, anchor: Tensor, *tensors: Tensor):
        ctx.shards, ctx.source, ctx.given = shards, source, len(tensors)
        wire = shards.wire

        def work(*own: Tensor) -> list[Tensor]:
            if wire.rank == source:
                out = [t.clone(memory_format=torch.contiguous_format) for t in own]
            else:
                out = [torch.empty(s, dtype=t, device=shards.device) for _, s, t in names]
            return [wire.broadcast(t, source, "final state") for t in out]

        out = tuple(wire.run(work, *tensors))
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        ctx.floating = [t.is_floating_point() for t in out]
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        first_order_only()
        wire = ctx.shards.wire

        def work(*grads: Tensor) -> list[Tensor]:
            return [wire.total(g, "gradient of final state") for g in grads]

        floating = [g.contiguous() for g, f in zip(grads, ctx.floating, strict=True) if f]
        summed = iter(wire.run(work, *floating))
        out = [next(summed) if f else None for f in ctx.floating]
        return None, None, None, None, *(out if ctx.given else ())
