"""Mixers whose tokens meet in more than affine maps: the state is handed from rank to rank.

Rank r computes its tokens when rank r - 1 has computed the tokens before them. With several rows in
a batch that is a wavefront: rank r works on one part of the rows while rank r + 1 works on the part
before. Exact for every mixer, as forward(whole) is forward(part 1), forward(part 2, state 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.ops._across import first_order_only
from longscan.parallel.halo import tied
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel.shards import Shards

Call = Callable[[Tensor, State | None, Tensor | None], tuple[Tensor, State]]
"""A mixer: (x, state, cu_seqlens) -> (y, state)."""


def relay(shards: Shards, call: Call, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """call(x, state) with the state that the rank before left."""
    parts = 1 if shards.packed else min(len(x), shards.over.micro_batches or shards.wire.size)
    sizes = [len(p) for p in torch.arange(len(x)).tensor_split(parts)]
    done, at = [], 0
    for size in sizes:
        rows = slice(at, at + size)
        given = state if state is None or shards.packed else state.select(rows)
        done.append(_part(shards, call, x[rows], given))
        at += size
    if len(done) == 1:
        return done[0]
    return torch.cat([y for y, _ in done]), State.cat(s for _, s in done)


def _part(shards: Shards, call: Call, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    if shards.continues:
        if state is not None:  # given to whoever begins; autograd must come by here too
            x = tied(x, *(t for t in state.flatten().values() if t.requires_grad))
        entered = _receive(shards, x)
        rest = len(shards.local) - 2 if shards.packed else 0
        if rest:
            assert state is not None
            entered = State.cat([entered, state.select(slice(1, None))])
        state = entered
    y, state = call(x, state, shards.cu_seqlens)
    if shards.onward:
        leaving = state.select(slice(-1, None)) if shards.packed else state
        y = _send(shards, y, leaving)
    return y, state


def _receive(shards: Shards, x: Tensor) -> State:
    """The state that the rank before sends."""
    source, wire = shards.wire.rank - 1, shards.wire

    def work(x: Tensor) -> tuple[list, list[Tensor]]:
        names = wire.hear(source, x.device)
        into = [torch.empty(shape, dtype=t, device=x.device) for _, shape, t, _ in names]
        for t in into:
            wire.receive(t, source, "relay").wait()
        return names, into

    names, tensors = shards.tape.through(lambda: wire.run(work, x))
    differs = [d and torch.is_grad_enabled() for *_, d in names]
    anchor = x if x.requires_grad else x.new_empty(0, requires_grad=any(differs))
    out = _Received.apply(shards, differs, anchor, *tensors)
    return State.unflatten({name: t for (name, *_), t in zip(names, out, strict=True)})


def _send(shards: Shards, y: Tensor, state: State) -> Tensor:
    """Send a state to the rank behind; y is returned, so that its backward comes by here."""
    flat = {k: v.contiguous() for k, v in state.flatten().items()}
    to, wire = shards.wire.rank + 1, shards.wire
    if not shards.tape.replaying:
        names = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in flat.items()]

        def work(*tensors: Tensor) -> None:
            wire.tell(names, to, tensors[0].device)
            for t in tensors:
                wire.send(t, to).wait()

        # Not waited for: the next part of the rows can begin.
        shards.over.later(wire.start(work, *(t.detach() for t in flat.values())))
    return _Sent.apply(shards, y, *flat.values())


class _Received(torch.autograd.Function):
    """Backward sends the gradients of a received state back."""

    @staticmethod
    def forward(ctx, shards: Shards, differs: list[bool], anchor: Tensor, *tensors: Tensor):
        ctx.shards, ctx.differs = shards, differs
        ctx.save_for_backward(*tensors)
        out = tuple(t.view_as(t) for t in tensors)
        ctx.mark_non_differentiable(*(t for t, d in zip(out, differs, strict=True) if not d))
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        first_order_only()
        shards = ctx.shards
        sends = [
            (torch.zeros_like(t) if g is None else g).contiguous()
            for t, g, d in zip(ctx.saved_tensors, grads, ctx.differs, strict=True)
            if d
        ]

        def work(*sends: Tensor) -> None:
            for g in sends:
                shards.wire.send(g, shards.wire.rank - 1).wait()

        if sends:
            shards.over.later(shards.wire.start(work, *sends))
        return None, None, None, *(None for _ in grads)


class _Sent(torch.autograd.Function):
    """Backward receives the gradients of a state that was sent."""

    @staticmethod
    def forward(ctx, shards: Shards, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shards = shards
        ctx.likes = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        first_order_only()
        shards = ctx.shards
        likes = [x for x in ctx.likes if x[2]]

        def work(dy: Tensor) -> list[Tensor]:
            into = [torch.empty(s, dtype=t, device=dy.device) for s, t, _ in likes]
            for g in into:
                shards.wire.receive(g, shards.wire.rank + 1, "relay gradient").wait()
            return into

        found = iter(shards.wire.run(work, dy)) if likes else iter(())
        return None, dy, *(next(found) if d else None for _, _, d in ctx.likes)
