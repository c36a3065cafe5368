"""Latency and bandwidth between ranks, measured."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from longscan.parallel import cost
from longscan.parallel.wire import Wire

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
"""Bytes of the messages that are timed."""
REPEATS = 5


def measure(wire: Wire, per_host: int) -> tuple[cost.Link, cost.Link]:
    """Links inside hosts of per_host ranks, and between hosts (the same where there is one).

    All ranks pass messages to their neighbour at once; of several times the least counts, of
    several ranks the slowest. All ranks must call, and get the same numbers.
    """
    if wire.size == 1:
        link = cost.Link(0.0, float("inf"))
        return link, link
    i, low = wire.rank, wire.rank // per_host * per_host
    n = min(per_host, wire.size - low)
    near = low + (i - low + 1) % n, low + (i - low - 1) % n
    inside = _link(wire, *near) if per_host > 1 else None
    if per_host >= wire.size:
        assert inside is not None
        return inside, inside
    # Between hosts: the ranks at the same place, around the hosts.
    whole = wire.size // per_host * per_host
    far = ((i + per_host) % whole, (i - per_host) % whole) if i < whole else (i, i)
    outer = _link(wire, *far)
    return inside or outer, outer


def _link(wire: Wire, to: int, source: int) -> cost.Link:
    samples = []
    for size in SIZES:
        x = torch.zeros(size // 4, device=wire.device)
        least = float("inf")
        for _ in range(REPEATS):
            seconds = wire.run(lambda x: _once(wire, x, to, source), x)
            least = min(least, seconds)
        slowest = torch.tensor([least], dtype=torch.float64, device=wire.device)
        slowest = wire.run(lambda t: wire.slowest(t), slowest)
        samples.append((float(size), slowest.item()))
    try:
        return cost.fit(samples)
    except ValueError:  # too noisy to tell the two apart: a start, and the largest message
        (_, start), (size, longest) = samples[0], samples[-1]
        return cost.Link(start, size / longest)


def _once(wire: Wire, x: Tensor, to: int, source: int) -> float:
    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    wait()
    began = time.perf_counter()
    if to != wire.rank:
        wire.trade({to: x}, {source: torch.empty_like(x)}, "measuring")
    wait()
    return time.perf_counter() - began
