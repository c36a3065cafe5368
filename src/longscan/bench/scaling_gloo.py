"""What messages between processes of this machine cost over gloo, and how long exchanges take."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from longscan.bench.scaling_exchange import Calibration
from longscan.doctor import cpu_name
from longscan.parallel.cost import Link, blocks, fit

SIZES = tuple(4**k for k in range(5, 12))  # bytes: 1 KiB to 4 MiB
STATES = tuple(3 * 2**k for k in (15, 18, 20))  # of exchanges: other sizes than those fitted
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Timed:
    """Seconds of an exchange until its last rank is done. n: blocks of a chain.

    Links are fitted to the least of several times: the others hold what else the machine did.
    """

    method: str
    ranks: int
    nbytes: int
    n: int
    least: float
    median: float
    most: float


def calibrate(ranks: int, repetitions: int = 30) -> tuple[Calibration, list[Timed]]:
    """Spawn `ranks` processes; messages to and fro between neighbours, all at once, give the link
    of a chain, all-gathers that of a hop of a gather.

    Raises: ValueError for fewer than 2 ranks, or times too noisy to tell latency and bandwidth.
    """
    if ranks < 2:
        raise ValueError(f"an exchange needs at least 2 ranks, not {ranks}")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (ranks, repetitions, folder), nprocs=ranks)
        raw = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    link = Link(**raw["link"])
    cores = os.cpu_count() or 1
    source = (
        f"measured with gloo, {ranks} processes on {cores} cores ({cpu_name()}), torch "
        f"{torch.__version__}"
    )
    gather = Link(**raw["gather"])
    c = Calibration("gloo", source, link, link, ranks, gather, combine=raw["combine"])
    return c, [Timed(**row) for row in raw["rows"]]


def _worker(rank: int, ranks: int, repetitions: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    samples = [(size, _one_way(rank, size, repetitions)) for size in SIZES]
    gathers = [
        (size, min(_timed(_gather(rank, ranks, size, 1), repetitions)) / (ranks - 1))
        for size in SIZES
    ]
    found: list[list[tuple[float, float]]] = [samples, gathers]
    dist.broadcast_object_list(found)
    link, gather = (fit(f) for f in found)
    combine = _fold(repetitions) / STATES[-1]
    rows = []
    for nbytes in STATES:
        best = blocks(ranks, nbytes, link)
        for method, n in (("ring", 1), ("allscan", best), ("relay", 1), ("doubling", 1)):
            if method == "allscan" and best == 1:
                continue
            times = _timed(CALLS[method](rank, ranks, nbytes, n), repetitions)
            rows.append(
                Timed(method, ranks, nbytes, n, min(times), statistics.median(times), max(times))
            )
    if rank == 0:
        out = {"link": asdict(link), "gather": asdict(gather), "combine": combine,
               "rows": [asdict(r) for r in rows]}  # fmt: skip
        (Path(folder) / "result.json").write_text(json.dumps(out), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _one_way(rank: int, nbytes: int, repetitions: int) -> float:
    """Half of the least round trip between two neighbours, while others do the same."""
    x, times, peer = torch.zeros(nbytes, dtype=torch.uint8), [], rank ^ 1
    dist.barrier()
    for i in range(repetitions + 3 if peer < dist.get_world_size() else 0):
        began = time.perf_counter()
        if rank < peer:
            dist.send(x, peer)
            dist.recv(x, peer)
        else:
            dist.recv(x, peer)
            dist.send(x, peer)
        if i >= 3:
            times.append((time.perf_counter() - began) / 2)
    dist.barrier()
    return min(times) if times else 0.0


def _fold(repetitions: int) -> float:
    """Least seconds to add two states of the largest size."""
    x, y, times = torch.ones(STATES[-1] // 4), torch.ones(STATES[-1] // 4), []
    for _ in range(repetitions):
        began = time.perf_counter()
        _ = x + y
        times.append(time.perf_counter() - began)
    return min(times)


def _timed(call: Callable[[], None], repetitions: int) -> list[float]:
    """Seconds of each call, of the rank that took longest."""
    times = []
    for _ in range(repetitions + 2):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    worst = torch.tensor(times[2:], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def _gather(rank: int, ranks: int, nbytes: int, n: int) -> Callable[[], None]:
    mine = torch.ones(nbytes // 4)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks)]

    def run() -> None:
        dist.all_gather(all_of_them, mine)

    return run


def _chain(rank: int, ranks: int, nbytes: int, n: int) -> Callable[[], None]:
    mine = torch.ones(nbytes // 4).tensor_split(n)

    def run() -> None:
        entering = [torch.empty_like(x) for x in mine]
        coming = [dist.irecv(x, rank - 1, tag=i) for i, x in enumerate(entering) if rank]
        sent = []
        for i, x in enumerate(mine):
            if rank:
                _wait(coming[i])
                x = x + entering[i]
            if rank + 1 < ranks:
                sent.append((x, dist.isend(x, rank + 1, tag=i)))
        for _, work in sent:
            _wait(work)

    return run


def _doubling(rank: int, ranks: int, nbytes: int, n: int) -> Callable[[], None]:
    mine = torch.ones(nbytes // 4)

    def run() -> None:
        now, far = mine, 1
        while far < ranks:
            got = torch.empty_like(now)
            work = [dist.isend(now, rank + far)] if rank + far < ranks else []
            if rank >= far:
                _wait(dist.irecv(got, rank - far))
            for sent in work:
                _wait(sent)
            now = now + got if rank >= far else now
            far *= 2

    return run


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


CALLS = {"ring": _gather, "allscan": _chain, "relay": _chain, "doubling": _doubling}
