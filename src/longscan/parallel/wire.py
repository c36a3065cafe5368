"""Messages between the ranks of a group: counted, in one order everywhere, beside other work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The old name warns where there is the new one.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass
class Traffic:
    """What a rank has received, and how: numbers of collectives and messages, and bytes.

    Counted where tensors are handed to the backend, bytes of other ranks' tensors only.
    """

    bytes: int = 0
    gathers: int = 0
    reductions: int = 0
    messages: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, what: str, count: int, nbytes: int) -> None:
        setattr(self, what, getattr(self, what) + count)
        self.bytes += nbytes
        self.by_kind[kind] = self.by_kind.get(kind, 0) + nbytes

    def reset(self) -> None:
        """All to zero."""
        fresh = Traffic()
        for f in fields(self):
            setattr(self, f.name, getattr(fresh, f.name))


class Pending(Generic[T]):
    """The result of work under way."""

    def __init__(self, result: Callable[[], T]) -> None:
        self._result: Callable[[], T] | None = result
        self._value: T

    def wait(self) -> T:
        """The result; an error of the work is raised here. May be asked for again."""
        if self._result is not None:
            self._value, self._result = self._result(), None
        return self._value


class Wire:
    """The ranks of a process group as 0 .. size - 1, and messages among them.

    All work goes through one queue (a thread where the host must wait for messages, a stream of
    its own on a GPU), so its order is that of the program, the same on every rank, and it runs
    beside what the caller computes meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "no process group: call torch.distributed.init_process_group first, or start the "
                "program with torchrun"
            )
        self.group = dist.group.WORLD if group is None else group
        if dist.get_rank(self.group) < 0:
            raise ValueError("this process is not a member of the group")
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.traffic = Traffic()
        on_gpu = "nccl" in str(dist.get_backend(self.group))
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        self._global = dist.get_process_group_ranks(self.group)
        self._queue: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, work: Callable[..., T], *inputs: Tensor) -> Pending[T]:
        """Begin work(*inputs) that sends and receives; it must not use autograd.

        Raises from `wait`: RuntimeError where a rank has died or did not answer in the group's
        timeout.
        """
        if inputs and inputs[0].is_cuda:
            return self._on_stream(work, inputs)
        if self._queue is None:
            self._queue = ThreadPoolExecutor(1, thread_name_prefix="longscan.parallel")
        future: Future[T] = self._queue.submit(_quietly, work, inputs)
        return Pending(lambda: self._told(future))

    def run(self, work: Callable[..., T], *inputs: Tensor) -> T:
        """`start` and `wait`."""
        return self.start(work, *inputs).wait()

    def _on_stream(self, work: Callable[..., T], inputs: tuple[Tensor, ...]) -> Pending[T]:
        device = inputs[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)
        side, main = self._stream, torch.cuda.current_stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            try:
                result = _quietly(work, inputs)
            except RuntimeError as problem:
                raise self._lost(problem) from problem
        for x in inputs:
            x.record_stream(side)

        def wait() -> T:
            now = torch.cuda.current_stream(device)
            now.wait_stream(side)
            for x in _tensors(result):
                x.record_stream(now)
            return result

        return Pending(wait)

    def _told(self, future: Future[T]) -> T:
        try:
            return future.result()
        except RuntimeError as problem:
            raise self._lost(problem) from problem

    def _lost(self, problem: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank} of {self.size}: an exchange with other ranks of the sequence "
            f"failed; one of them has stopped, or all do not run the same program ({problem})"
        )

    # What follows runs inside `start`.

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """x of every rank, all of one shape and dtype: [size, *x.shape]."""
        if self.size == 1:
            return x.unsqueeze(0)
        out = x.new_empty(self.size, *x.shape)
        _gather(out.flatten(), x.contiguous().flatten(), self.group)
        self.traffic.add(kind, "gathers", 1, (self.size - 1) * _bytes(x))
        return out

    def reduce(self, x: Tensor, kind: str) -> Tensor:
        """The sum over ranks of x[rank], where x is [size, ...]: a reduce-scatter."""
        if self.size == 1:
            return x[0]
        out = x.new_empty(x.shape[1:])
        if x.is_cuda:
            _reduce_scatter(out, x.contiguous(), group=self.group)
        else:  # summed in the order of ranks, so that two runs are equal
            parts = x.new_empty(x.shape)
            dist.all_to_all_single(parts, x.contiguous(), group=self.group)
            torch.sum(parts, 0, out=out)
        self.traffic.add(kind, "reductions", 1, (self.size - 1) * _bytes(out))
        return out

    def total(self, x: Tensor, kind: str) -> Tensor:
        """The sum of x over ranks."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.group)
        part = 2 * (self.size - 1) / self.size
        self.traffic.add(kind, "reductions", 1, math.ceil(part * _bytes(x)))
        return out

    def slowest(self, x: Tensor) -> Tensor:
        """The largest x of all ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def trade(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], kind: str
    ) -> Mapping[int, Tensor]:
        """Send tensors to ranks and fill those received from others, all at once; returns these."""
        ops = [
            dist.P2POp(dist.isend, x.contiguous(), self._global[to], self.group)
            for to, x in sorted(sends.items())
        ]
        ops += [
            dist.P2POp(dist.irecv, x, self._global[source], self.group)
            for source, x in sorted(receives.items())
        ]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        size = sum(_bytes(x) for x in receives.values())
        self.traffic.add(kind, "messages", len(receives), size)
        return receives

    def send(self, x: Tensor, to: int) -> Any:
        """Begin to send x (contiguous, to be left alone until the returned work is waited for)."""
        return dist.isend(x, self._global[to], self.group)

    def receive(self, into: Tensor, source: int, kind: str) -> Any:
        """Begin to receive."""
        work = dist.irecv(into, self._global[source], self.group)
        self.traffic.add(kind, "messages", 1, _bytes(into))
        return work

    def tell(self, value: Any, to: int, device: torch.device) -> None:
        """A Python object to one rank."""
        dist.send_object_list([value], self._global[to], self.group, device)

    def hear(self, source: int, device: torch.device) -> Any:
        """A Python object from one rank."""
        box = [None]
        dist.recv_object_list(box, self._global[source], self.group, device)
        return box[0]

    def told(self, value: Any, source: int, device: torch.device) -> Any:
        """A Python object of one rank on all. Waits; for sizes, not for data."""
        box = [value]
        dist.broadcast_object_list(box, self._global[source], self.group, device)
        return box[0]

    def broadcast(self, x: Tensor, source: int, kind: str) -> Tensor:
        """x of one rank on all, in place."""
        if self.size > 1:
            dist.broadcast(x, self._global[source], self.group)
            self.traffic.add(kind, "messages", 1, 0 if self.rank == source else _bytes(x))
        return x


def _quietly(work: Callable[..., T], inputs: tuple[Tensor, ...]) -> T:
    kind = inputs[0].device.type if inputs else "cpu"
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        return work(*inputs)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        x = list(x.values())
    return [t for part in x for t in _tensors(part)] if isinstance(x, tuple | list) else []
