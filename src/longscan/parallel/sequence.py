"""Sequence parallelism: the ranks of a group share the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longscan.algebra import Affine, SegmentMap
from longscan.parallel import cost
from longscan.parallel import scan as scans
from longscan.parallel.links import measure
from longscan.parallel.shards import Shards
from longscan.parallel.wire import Pending, Traffic, Wire


class SequenceParallel:
    """The ranks that share sequences, and how states cross between them.

        sequence = SequenceParallel(group)
        shards = sequence.shards(ids.shape[1])
        loss, _ = model.loss(shards.shard(ids), shards.shard(targets), shards=shards)

    Every rank must run the model forward, and backward where one does, in the same order; a rank
    without a target of its own multiplies its loss by 0. Gradients are of first order.
    group: a process group, a DeviceMesh of one axis, or None for all ranks. It should be used for
    nothing else while a model runs: messages are sent from a queue of its own.
    method: how segment maps cross: allgather | allscan | doubling | hierarchical, or auto (see
    `longscan.parallel.scan`; auto takes what the model of `longscan.parallel.cost` finds fastest
    for the size of a state, with latency and bandwidth measured once).
    blocks: pieces of a state in allscan; None: as the cost model finds best.
    per_host: ranks of a host, neighbours in the group; None: those that torchrun started on one.
    micro_batches: parts of a batch in mixers that are relayed; None: one for each rank.
    Raises: RuntimeError without a process group; ValueError for unknown methods or sizes.
    Source: LASP-2 (arXiv 2502.07563), ZeCO (arXiv 2507.01004).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        method: str = "auto",
        blocks: int | None = None,
        per_host: int | None = None,
        micro_batches: int | None = None,
    ) -> None:
        if method not in (*scans.METHODS, "auto"):
            raise ValueError(
                f"unknown method {method!r}; choose from {', '.join(scans.METHODS)}, auto"
            )
        for name, n in (
            ("blocks", blocks),
            ("per_host", per_host),
            ("micro_batches", micro_batches),
        ):
            if n is not None and n < 1:
                raise ValueError(f"{name} must be at least 1, not {n}")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"sequences are spread over one axis of a mesh, not {group.ndim}: pass "
                    'mesh["sp"], say'
                )
            group = group.get_group()
        self.wire, self.method, self.micro_batches = Wire(group), method, micro_batches
        self.blocks = blocks
        self.per_host = min(per_host or _local_ranks(self.wire), self.wire.size)
        self._sent: list[Pending] = []
        self._links: tuple[cost.Link, cost.Link] | None = None
        self._chosen: dict[cost.Element, str] = {}

    def __repr__(self) -> str:
        return f"SequenceParallel(rank {self.wire.rank} of {self.wire.size}, {self.method})"

    @property
    def rank(self) -> int:
        """This process among those that share sequences."""
        return self.wire.rank

    @property
    def size(self) -> int:
        """How many processes share a sequence."""
        return self.wire.size

    @property
    def traffic(self) -> Traffic:
        """What this rank has received."""
        return self.wire.traffic

    def shards(
        self,
        length: int,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        final_states: bool = True,
        device: torch.device | str | None = None,
    ) -> Shards:
        """Cut rows of `length` tokens into one shard for each rank.

        cu_seqlens [n + 1] for a packed row, of the whole row and the same on all ranks. lengths:
        tokens of each rank's shard; None: as equal as can be.
        final_states: whether a model returns the states behind the last tokens, on all ranks;
        without them (training) it returns an empty state and sends less.
        device: where the tokens lie; None: that of cu_seqlens, or the group's.
        Raises: ValueError where a rank would have no token or lengths do not add up.
        """
        size = self.wire.size
        if lengths is None:
            lengths = [(r + 1) * length // size - r * length // size for r in range(size)]
        if len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} ranks: give one for each")
        if min(lengths) < 1:
            raise ValueError(
                f"{length} tokens as {list(lengths)}: every rank needs one; use fewer ranks"
            )
        if sum(lengths) != length:
            raise ValueError(f"lengths {list(lengths)} add up to {sum(lengths)}, not {length}")
        if device is None:
            device = self.wire.device if cu_seqlens is None else cu_seqlens.device
        if torch.device(device).type != self.wire.device.type:
            raise ValueError(
                f"the group sends tensors of {self.wire.device.type}, not of {device}: put "
                "cu_seqlens and the tokens there, or use another backend"
            )
        return Shards(
            self, lengths, cu_seqlens, device=torch.device(device), final_states=final_states
        )

    def scan(self, of: SegmentMap, row: scans.Row, kind: str) -> Pending[Affine | None]:
        """Begin the exchange of maps [N, K, V]; what enters this rank, None if nothing does."""
        run = self._scan_of(of)
        if of.m is not None:
            given = [of.u, of.m, of.a]
        else:
            given = [of.u] if of.a is None else [of.u, of.a]

        def work(u: Tensor, *rest: Tensor) -> Affine | None:
            m, a = rest if of.m is not None else (None, *(rest or (None,)))
            return run(SegmentMap(of.kind, a, u, m), row, self.wire, kind)

        return self.wire.start(work, *(x.detach() for x in given if x is not None))

    def _scan_of(self, of: SegmentMap) -> scans.Scan:
        size = sum(x.nbytes for x in (of.u, of.m) if x is not None)
        element = cost.Element(size, 0 if of.a is None else of.a.nbytes)
        method = self.method_for(element)
        if method == "allscan":
            n = self.blocks or cost.blocks(self.size, size, self.links[-1])
            return scans.allscan(n)
        return {
            "allgather": scans.allgather,
            "doubling": scans.doubling,
            "hierarchical": scans.hierarchical,
        }[method]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of parameters over the ranks, where nothing else does (DDP, FSDP).

        A parameter without a gradient counts as zero. All ranks must pass the same parameters.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for grads in by_dtype.values():
            flat = torch.cat([g.flatten() for g in grads])
            flat = self.wire.run(lambda x: self.wire.total(x, "parameters"), flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def method_for(self, element: cost.Element) -> str:
        """The method by which maps of these sizes cross: the one asked for, or of `auto` the one
        that the cost model finds fastest. The first call of `auto` measures the links."""
        if self.method != "auto":
            return self.method
        if element not in self._chosen:
            inner, outer = self.links[0], self.links[-1]
            many = self.per_host < self.size
            self._chosen[element] = cost.choose(
                self.size, element, inner, per_host=self.per_host if many else None,
                outer=outer if many else None,
            )  # fmt: skip
        return self._chosen[element]

    @property
    def links(self) -> tuple[cost.Link, cost.Link]:
        """Latency and bandwidth between ranks of a host and between hosts, the slowest of each,
        measured on first use, which is a call to all ranks; the same numbers on every rank."""
        if self._links is None:
            self._links = measure(self.wire, self.per_host)
        return self._links

    def later(self, pending: Pending) -> None:
        """Keep work that nobody waits for, and raise its error with the next of them."""
        self._sent.append(pending)
        while len(self._sent) > 64:
            self._sent.pop(0).wait()

    def finish(self) -> None:
        """Wait for all messages that were sent."""
        while self._sent:
            self._sent.pop(0).wait()


def _local_ranks(wire: Wire) -> int:
    """Ranks of the group on this host, as torchrun tells; all of them where nobody tells."""
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", wire.size))


__all__ = ["SequenceParallel"]
