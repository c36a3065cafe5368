"""What an exchange of states takes by itself, and the links that explain it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from longscan.algebra import SegmentMap
from longscan.bench.parallel_group import Here, read
from longscan.bench.parallel_models import LINEAR, Shape, shape
from longscan.parallel import SequenceParallel
from longscan.parallel.cost import Element, Link, fit, seconds
from longscan.parallel.scan import METHODS

SIZES = tuple(4**k for k in range(5, 13))
"""Bytes of messages: 1 KiB to 16 MiB."""
BLOCKS = (1, 2, 4, 8)
REPEAT, RUN = 9, 8
"""Times, and calls behind each other in one of them, without the host waiting in between."""


def exchange(here: Here, what: str) -> None:
    """Rows `exchange/link` and exchange/MODEL/METHOD[/BLOCKS]."""
    if here.todo("exchange/link"):
        sizes = SIZES[:5] if here.size == "tiny" else SIZES
        hops = [(n, one_way(here, n)) for n in sizes]
        gathers = [(n, median(here, gathering(here, n)) / (here.ranks - 1)) for n in sizes]
        about = f"torch {torch.__version__}, {dist.get_backend()}"
        if here.gpu:
            about += f" {'.'.join(map(str, nccl.version()))}"
        found: dict[str, Any] = {"hops": hops, "gathers": gathers, "about": about}
        try:
            found |= {"link": vars(fit(hops)), "gather": vars(fit(gathers))}
        except ValueError as problem:
            found["why"] = str(problem)
        here.write("exchange", **found)
    here.wait()
    known = read(here.settings.path).get("exchange/link", {})
    links = tuple(Link(**known[x]) for x in ("link", "gather")) if "link" in known else None
    for mixer in LINEAR:
        of = shape(here.size, mixer)
        for method in METHODS:
            for n in BLOCKS if method == "allscan" else (1,):
                name = f"exchange/{mixer}/{method}" + (f"/{n}" if method == "allscan" else "")
                if not here.todo(name):
                    continue
                call, received = scanning(here, of, method, n)
                times = repeated(here, call)
                told = links and predicted(method, here.ranks, of, links, n)
                here.write(
                    "exchange", case=mixer, method=method, blocks=n, state=of.state,
                    transition=of.heads * of.transition * 4, seconds=statistics.median(times),
                    least=min(times), most=max(times), predicted=told, bytes=received,
                )  # fmt: skip


def predicted(method: str, ranks: int, of: Shape, links: tuple[Link, ...], n: int) -> float:
    """By the cost model; an all-gather by the link of gathers, a host holding all ranks."""
    element, (link, gather) = Element(of.state, 4 * of.heads * of.transition), links
    if method == "hierarchical":
        return seconds("allgather", ranks, element, link)
    if method == "allgather":
        return (ranks - 1) * gather.seconds(element.pair)
    return seconds(method, ranks, element, link, blocks=n)


def scanning(here: Here, of: Shape, method: str, n: int) -> tuple[Callable[[], None], int]:
    """A call that exchanges maps of a layer, and the bytes that a call receives."""
    sequence = SequenceParallel(here.group, method=method, blocks=n)
    row = sequence.shards(2 * here.ranks).forward
    torch.manual_seed(here.rank)
    u = torch.randn(of.heads, of.d_key, of.d_value, device=here.device)
    tail = (of.d_key,) * 2 if of.kind == "matrix" else (of.transition,)
    a = torch.randn(of.heads, *tail, device=here.device).abs().neg() / of.d_key
    maps = SegmentMap(of.kind, a, u)

    def call() -> None:
        sequence.scan(maps, row, "state").wait()

    call()
    received = here.worst(float(sequence.traffic.bytes))[0]
    return call, int(received)


def repeated(here: Here, call: Callable[[], None]) -> list[float]:
    """Seconds of a call, of the rank that took longest."""
    run = RUN if here.gpu else 1
    times = []
    for i in range(REPEAT + 2):
        here.wait()
        began = time.perf_counter()
        for _ in range(run):
            call()
        if here.gpu:
            torch.cuda.synchronize()
        if i > 1:
            times.append((time.perf_counter() - began) / run)
    return here.worst(*times)


def median(here: Here, call: Callable[[], None]) -> float:
    return statistics.median(repeated(here, call))


def one_way(here: Here, nbytes: int) -> float:
    """Seconds of a message: half a round trip between neighbours, while other pairs do the same."""
    peer = here.rank ^ 1
    x = torch.zeros(nbytes, dtype=torch.uint8, device=here.device)

    def call() -> None:
        if peer >= here.ranks:
            return
        for way in (dist.send, dist.recv) if here.rank < peer else (dist.recv, dist.send):
            way(x, peer)

    return median(here, call) / 2


def gathering(here: Here, nbytes: int) -> Callable[[], None]:
    # The old name warns where there is the new one.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    mine = torch.zeros(nbytes, dtype=torch.uint8, device=here.device)
    into: Tensor = mine.new_empty(here.ranks * nbytes)

    def call() -> None:
        gather(into, mine)

    return call
