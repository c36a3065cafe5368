"""Rows of `longscan bench gpu`, measured one after the other in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.bench import report
from longscan.bench.gpu_rows import OPS, OURS, inputs, small_ops

COMMAND = [sys.executable, "-m", "longscan.bench.gpu"]
"""What is started again for the parts of a run."""
REPEAT = {"warmup": 25, "rep": 100}
PACKAGES = {
    "fla": "fla-core", "flash_qla": "flash-qla", "mamba_ssm": "mamba-ssm",
    "mlstm_kernels": "mlstm-kernels",
}  # fmt: skip
COLD, AGAIN = "cold", "again"
"""Sides of rows that take the seconds of a first call, without and with compiled kernels."""


@dataclass(frozen=True)
class Row:
    """What is measured: an op (or the size of a model), whose implementation, at which shape."""

    op: str
    side: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.op}/{self.side}/B{self.batch} T{self.length}"


@dataclass
class Measured:
    """The result of a row; `why` says why there is none.

    ms: forward, and forward with backward, repeated; of a model whole steps, in `train`. graph:
    medians of the same two replayed as CUDA graphs, 0 where they cannot be. mib: peak beyond the
    inputs, outputs and gradients included (of a model everything); first: seconds of the first
    forward and backward, with all compiling; 0 if that was done before. error: of the output,
    relative to our torch form (Euclidean); bytes: the fewest to move. more: what else is known.
    """

    op: str
    side: str
    batch: int
    length: int
    forward: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=lambda: [0.0, 0.0])
    mib: float = 0.0
    first: float = 0.0
    error: float | None = None
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    why: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.op, self.side, self.batch, self.length

    @property
    def done(self) -> bool:
        """Whether there is a number."""
        return bool(self.forward or self.train or self.first)

    @property
    def run(self) -> str:
        """When the command began that measured it."""
        return self.about.get("run", "")


def write(path: Path, done: Measured) -> None:
    """Append a result to a file."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(asdict(done)) + "\n")


# --- one row --------------------------------------------------------------------------------


def measure(row: Row, graph: bool = True) -> Measured:
    """Times and memory of a row, here and now."""
    op = OPS[row.op]
    call: Callable = op.ours if row.side == OURS else op.peers[row.side]
    x = inputs(row.op, row.side, row.batch, row.length)
    leaves = [t for t in x.values() if t.requires_grad]
    began = time.perf_counter()
    outs, grads = run(call, x, leaves)
    torch.cuda.synchronize()
    out = Measured(**asdict(row), first=time.perf_counter() - began)
    o = outs[0].detach()
    read, given = (sum(t.nbytes for t in ts) for ts in (x.values(), outs))
    out.bytes = [read + given, 2 * read + 2 * o.nbytes + sum(g.nbytes for g in grads)]
    del outs, grads
    if row.op != "attention" and row.length <= 2048:
        try:
            out.error = difference(row, o)
        except Exception as problem:
            out.more["error"] = said(problem)
    weight = torch.randn_like(o) if leaves else None
    del o

    def forward() -> Any:
        with torch.set_grad_enabled(bool(leaves)):
            return call(x)

    def train() -> Any:
        return torch.autograd.grad(call(x), leaves, weight)

    calls = [forward, train] if leaves else [forward]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls[-1]()
    torch.cuda.synchronize()
    out.mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = [timed(f) for f in calls]
    out.forward, out.train = times[0], times[1] if leaves else []
    if graph:
        try:
            for i, f in enumerate(calls):
                out.graph[i] = replayed(f)
        except Exception as problem:
            out.more["graph"] = said(problem)
        if not all(out.graph[: len(calls)]) and "graph" not in out.more:
            out.more["replay"] = "a graph of it computes something else: not all was captured"
    return out


def run(call: Callable, x: dict[str, Tensor], leaves: list[Tensor]) -> tuple[list, Sequence]:
    """One call: its outputs, and the gradients of all leaves, if there are any."""
    with torch.set_grad_enabled(bool(leaves)):
        outs = flat(call(x))
    if not leaves:
        return outs, ()
    return outs, torch.autograd.grad(outs[0], leaves, torch.randn_like(outs[0]))


def flat(value: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def difference(row: Row, o: Tensor) -> float:
    """Of o to our torch form, relative."""
    with torch.no_grad():
        want = flat(OPS[row.op].plain(inputs(row.op, OURS, row.batch, row.length)))[0].double()
        return ((o.double() - want).norm() / want.norm()).item()


def timed(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of repeated calls, by events on the device; caches are emptied between."""
    from triton.testing import do_bench

    bench: Any = do_bench
    return [float(f"{t:.4g}") for t in bench(call, **REPEAT, return_mode="all")]


def replayed(call: Callable[[], Any]) -> float:
    """Milliseconds of the call replayed as a CUDA graph: no launches by the host.

    0 if the replay computes something else than the call, as kernels on a stream of their own are
    not captured.
    """
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [t.detach() for t in flat(call())]
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The engine's own thread launches the backward, so only this thread is watched.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        kept = [t.detach() for t in flat(call())]
    for t in kept:
        t.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    if not alike(kept, want):
        return 0.0
    del want
    bench: Any = do_bench
    ms = bench(graph.replay, **REPEAT, return_mode="median")
    del kept
    return float(f"{ms:.4g}")


def alike(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether all are the same but for the order of sums."""
    off = [(a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)
           for a, b in zip(got, want, strict=True)]  # fmt: skip
    return all(x.item() < 0.05 for x in off)


def first_call(row: Row) -> Measured:
    """Seconds until the first forward and backward of an op are there."""
    torch.cuda.init()
    torch.mm(*(torch.ones(64, 64, device="cuda"),) * 2).sum().item()  # cuBLAS is not ours
    call, make = small_ops()[row.op] if row.op in small_ops() else (OPS[row.op].ours, None)
    x = inputs(row.op, OURS, row.batch, row.length) if make is None else make()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run(call, x, [t for t in x.values() if t.requires_grad])
    torch.cuda.synchronize()
    return Measured(**asdict(row), first=time.perf_counter() - began)


# --- the process ----------------------------------------------------------------------------


def said(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


@cache
def bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written."""
    from triton.testing import do_bench

    x = torch.randint(2**30, (2**28,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    times: Any = do_bench(lambda: y.copy_(x), return_mode="median")
    return 2 * x.nbytes / (times / 1e3)


def about_gpu() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    about = report.environment() | {"command": "bench gpu"}
    about["backend"] = os.environ.get("LONGSCAN_BACKEND", "")
    if not torch.cuda.is_available():
        return about
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return about | {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "",
        "triton": report.version("triton"),
        "memory_by": "cuda peak",
        "clock": "cuda events",
    }


def version_of(row: Row) -> str:
    """Of the peer that a row measures; attention's is cuDNN's."""
    if row.op == "attention":
        return str(torch.backends.cudnn.version() or "")
    return report.version(PACKAGES[row.side]) if row.side in PACKAGES else ""


def assembler() -> str:
    """The release of CUDA whose ptxas Triton uses in this process: ours chooses another."""
    try:
        from triton import knobs

        return knobs.nvidia.ptxas.version
    except Exception:  # other releases of Triton, and machines without
        return ""


def child(rows: Sequence[Row], args: Any) -> None:
    """Measure rows one after the other; a line for each in args.out.

    args: options of the command; of them `ready` says that kernels were compiled before, so that
    first calls mean nothing, and `skip_graph` which ops are not to be tried as graphs.
    """
    from longscan.bench import gpu_models

    about = about_gpu() | {"run": args.run}
    for i, row in enumerate(rows):
        graph = not (args.no_graphs or row.op in args.skip_graph)
        try:
            if row.op in gpu_models.SIZES:
                done = gpu_models.measure(row)
            elif row.side in (COLD, AGAIN):
                done = first_call(row)
            else:
                done = measure(row, graph)
                done.first *= not args.ready
        except Exception as problem:
            done = Measured(**asdict(row), why=said(problem))
        done.about = {**about, "peer": version_of(row), "ptxas": assembler()}
        if torch.cuda.is_available() and row.side not in (COLD, AGAIN):
            try:
                done.about["bandwidth"] = f"{bandwidth():.4g}"
            except Exception:  # a kernel has broken the context; the row says so itself
                done.why = done.why or "the device was lost behind it"
        write(args.out, done)
        # What a kernel or a broken capture has left of this process is not to be trusted.
        broken = "graph" in done.more
        if (broken or "CUDA error" in done.why) and i + 1 < len(rows):
            renew(rows[i + 1 :], args, [row.op] if broken else [])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def renew(rows: Sequence[Row], args: Any, skip: Sequence[str]) -> None:
    """Go on with rows in a fresh process in place of this one."""
    flags = {"--ready": args.ready, "--no-graphs": args.no_graphs}
    skip = [*args.skip_graph, *skip]
    sys.stderr.flush()
    os.execv(
        COMMAND[0],
        [*COMMAND, "--child", json.dumps([asdict(r) for r in rows]), "--out", str(args.out),
         "--run", args.run, *(f for f, on in flags.items() if on),
         *(["--skip-graph", *skip] if skip else [])],
    )  # fmt: skip


def compile_share(part: int, parts: int) -> None:
    """From here on Triton's tuner compiles every parts-th configuration first, and times none.

    Processes with all the parts fill the cache of compiled kernels together; the one that measures
    then finds them there, and tunes in seconds. Nothing that is found here is kept.
    """
    from triton.runtime.autotuner import Autotuner

    begin, go, bench = Autotuner.__init__, Autotuner.run, Autotuner._bench

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *more: Any, **options: Any) -> None:
        configs = list(configs or [])
        at = part % max(1, min(parts, len(configs)))
        mine = configs[at::parts]
        begin(self, fn, arg_names, mine + [c for c in configs if c not in mine], *more, **options)
        self.mine, self.works, self.cache_results = mine, False, False
        self._do_bench = lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1]

    def one(self: Any, *args: Any, **more: Any) -> Any:
        self.works = False
        return go(self, *args, **more)

    def compiled(self: Any, *args: Any, config: Any, **more: Any) -> Any:
        # Others are only tried for something that runs, so that the next kernel has its inputs.
        if self.works and config not in self.mine:
            return [float("inf")] * 3
        times = bench(self, *args, config=config, **more)
        self.works = self.works or times[0] < float("inf")
        return times

    Autotuner.__init__, Autotuner.run, Autotuner._bench = init, one, compiled


def prepare(rows: Sequence[Row], part: int, parts: int, cores: Collection[int] = ()) -> None:
    """Compile what rows need, or a share of it; cores: of the processor, where it may run."""
    if cores:
        os.sched_setaffinity(0, cores)
    if parts > 1:
        compile_share(part, parts)
    for row in rows:
        op = OPS[row.op]
        x = inputs(row.op, row.side, row.batch, row.length)
        call: Callable = op.ours if row.side == OURS else op.peers[row.side]
        try:
            run(call, x, [t for t in x.values() if t.requires_grad])
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"{row.name}: {said(problem)}", file=sys.stderr)
