"""longscan bench gpu: our kernels beside others on a GPU, bfloat16.

Every (op, side) is measured in a process of its own, which is given up when a row takes too long,
and every result is written down at once: a peer that fails or hangs costs its own row only, and a
second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longscan.bench import gpu_report, report
from longscan.bench.gpu_rows import OPS, OURS, inputs

REPEAT = {"warmup": 25, "rep": 100}
PACKAGES = {
    "fla": "fla-core", "flash_qla": "flash-qla", "mamba_ssm": "mamba-ssm",
    "mlstm_kernels": "mlstm-kernels",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is measured: an op, whose implementation, and at which shape."""

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

    ms: forward, and forward with backward, repeated. mib: peak beyond the inputs, outputs and
    gradients included; first: seconds of the first forward and backward, with all compiling;
    error: of the output, relative to our torch form (Euclidean); bytes: the fewest to move.
    """

    op: str
    side: str
    batch: int
    length: int
    forward: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    mib: float = 0.0
    first: float = 0.0
    error: float | None = None
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    why: str = ""
    about: dict[str, str] = field(default_factory=dict)


def plan(args: argparse.Namespace) -> list[Row]:
    """The rows asked for: ours, then attention, then the peers, op by op.

    Raises: ValueError if a part matches nothing.
    """
    rows = []
    for op in OPS.values():
        sides = [OURS, *op.peers]
        for side in sides:
            sweep = op.sweep if args.sweep and side == OURS else ()
            rows += [Row(op.name, side, b, t) for b, t in sorted((*op.shapes, *sweep))[::-1]]
    rows.sort(key=lambda r: (r.side != OURS, list(OPS).index(r.op), r.side, r.length))
    for part in args.rows or ():
        if not any(part in r.name for r in rows):
            raise ValueError(
                f"no row of this bench contains {part!r}; rows are named as {rows[0].name}, with "
                f"the ops {', '.join(OPS)}"
            )
    return [r for r in rows if not args.rows or any(part in r.name for part in args.rows)]


# --- measuring, in a process of its own -----------------------------------------------------


def bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written."""
    from triton.testing import do_bench

    x = torch.randint(2**30, (2**28,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    times: Any = do_bench(lambda: y.copy_(x), return_mode="median")
    return 2 * x.nbytes / (times / 1e3)


def measure(row: Row) -> Measured:
    """Time and memory of a row, here and now."""
    from triton.testing import do_bench

    op = OPS[row.op]
    call: Callable = op.ours if row.side == OURS else op.peers[row.side]
    x = inputs(row.op, row.side, row.batch, row.length)
    leaves = list(x.values())
    began = time.perf_counter()
    o = call(x)
    weight = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, weight)
    torch.cuda.synchronize()
    out = Measured(**asdict(row), first=time.perf_counter() - began)
    read, written = sum(t.nbytes for t in leaves), sum(g.nbytes for g in grads)
    out.bytes = [read + o.nbytes, 2 * read + 2 * o.nbytes + written]
    if row.op != "attention" and row.length <= 2048:
        with torch.no_grad():
            want = op.plain(inputs(row.op, OURS, row.batch, row.length)).double()
        out.error = ((o.detach().double() - want).norm() / want.norm()).item()
        del want
    del o, grads

    def train() -> None:
        torch.autograd.grad(call(x), leaves, weight)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    torch.cuda.synchronize()
    out.mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    bench: Any = do_bench
    out.forward = bench(lambda: call(x), **REPEAT, return_mode="all")
    out.train = bench(train, **REPEAT, return_mode="all")
    return out


def child(rows: Sequence[Row], path: Path) -> None:
    """Measure rows one after the other; a line for each."""
    about = about_gpu()
    for row in rows:
        try:
            done = measure(row)
        except Exception as problem:
            text = " ".join(f"{type(problem).__name__}: {problem}".split())
            done = Measured(**asdict(row), why=text[:300])
        done.about = {**about, "peer": report.version(PACKAGES.get(row.side, ""))}
        write(path, done)
        torch.cuda.empty_cache()


def about_gpu() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    about = report.environment()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return about | {
        "command": "bench gpu",
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "",
        "triton": report.version("triton"),
        "memory_by": "cuda peak",
        "clock": "cuda events",
        "bandwidth": f"{bandwidth():.4g}",
    }


def write(path: Path, done: Measured) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(asdict(done)) + "\n")


def read(path: Path) -> list[Measured]:
    """The results in a file; of a row measured twice the last one."""
    found = {}
    for line in read_lines(path):
        with suppress(json.JSONDecodeError):  # cut off by a kill
            done = Measured(**json.loads(line))
            found[done.op, done.side, done.batch, done.length] = done
    return list(found.values())


# --- the driver -----------------------------------------------------------------------------


def lots(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that one process measures: those of an implementation of an op, all of ours."""
    out: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        out.setdefault((row.side, "" if row.side == OURS else row.op), []).append(row)
    return list(out.values())


def drive(
    rows: Sequence[Row], path: Path, budget: float, paths: dict[str, str], command: Sequence[str]
) -> Iterator[Measured]:
    """Results as they come; a process that takes longer than `budget` seconds for a row, or ends
    without a result for one, loses that row, and another goes on behind it."""
    for lot in lots(rows):
        left = list(lot)
        while left:
            seen = len(read_lines(path))
            env = dict(os.environ)
            more = [paths[left[0].side]] if left[0].side in paths else []
            env["PYTHONPATH"] = os.pathsep.join([*more, env.get("PYTHONPATH", "")]).strip(":")
            log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            process = subprocess.Popen(
                [*command, "--child", json.dumps([asdict(r) for r in left]), "--out", str(path)],
                env=env, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
            since, done = time.perf_counter(), 0
            while left:
                ended = process.poll() is not None  # asked before the file is read
                lines = read_lines(path)[seen:]
                for line in lines[done:]:
                    yield Measured(**json.loads(line))
                    since = time.perf_counter()
                    left.pop(0)
                done = len(lines)
                late = time.perf_counter() - since > budget
                if left and (ended or late):
                    process.kill()
                    process.wait()
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["no message"])[-1]
                    why = f"no result within {budget:.0f} s" if late else f"it ended: {last}"
                    lost = Measured(**asdict(left.pop(0)), why=why[:300])
                    write(path, lost)
                    yield lost
                    break
                if left:
                    time.sleep(0.2)
            process.kill()
            process.wait()
            log.close()


def read_lines(path: Path) -> list[str]:
    """Whole lines only: the last one may be half written."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def parser() -> argparse.ArgumentParser:
    """The options of `longscan bench gpu`."""
    p = argparse.ArgumentParser(
        prog="longscan bench gpu",
        description="Time our kernels, those of installed peers and softmax attention by cuDNN on "
        "a CUDA device: medians of forward, and of forward with backward to all inputs; peak "
        "memory beyond the inputs; and the floors under them, the fewest bytes over the bandwidth "
        "of a copy measured beside. Rows measured before (in --out) are kept.",
    )
    p.add_argument("--rows", nargs="+", metavar="PART", help="rows whose name (op/side/B8 T2048) "
                   "contains a PART")  # fmt: skip
    p.add_argument("--sweep", action="store_true", help="ours and attention at more lengths")
    p.add_argument("--out", type=Path, default=Path("runs/bench_gpu.jsonl"), metavar="FILE",
                   help="where results are kept (default: runs/bench_gpu.jsonl)")  # fmt: skip
    p.add_argument("--budget", type=float, default=240.0, help="seconds for a row, with all "
                   "compiling and tuning (default: 240)")  # fmt: skip
    p.add_argument("--again", action="store_true", help="measure rows that have a result too")
    p.add_argument("--path", nargs="+", default=[], metavar="SIDE=FOLDER",
                   help="where to import a side from, and only that side")  # fmt: skip
    p.add_argument("--no-run", action="store_true", help="only report what --out holds")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw time against length")
    p.add_argument("--record", action="store_true", help="append to bench/history.csv")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str]) -> int:
    """Run the bench; the exit status is 0 whether or not rows are missing."""
    args = parser().parse_args(argv)
    if args.child:
        child([Row(**r) for r in json.loads(args.child)], args.out)
        return 0
    rows = plan(args)
    known = {(m.op, m.side, m.batch, m.length) for m in read(args.out) if m.forward}
    if not args.no_run:
        if not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device here; --no-run reports earlier results")
        left = [r for r in rows if args.again or (r.op, r.side, r.batch, r.length) not in known]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        paths = dict(item.split("=", 1) for item in args.path)
        command = [sys.executable, "-m", "longscan.bench.gpu"]
        began = time.perf_counter()
        for n, done in enumerate(drive(left, args.out, args.budget, paths, command), 1):
            spent = time.perf_counter() - began
            print(f"[{n}/{len(left)}] {gpu_report.line(done)}  ({spent:.0f} s)", flush=True)
    wanted = {(r.op, r.side, r.batch, r.length) for r in rows}
    results = [m for m in read(args.out) if (m.op, m.side, m.batch, m.length) in wanted]
    if not results:
        raise ValueError(f"{args.out} holds no result of these rows")
    print(gpu_report.table(results))
    if args.plot:
        gpu_report.plot(results, args.plot)
    if args.record:
        path = report.history_path()
        lines = gpu_report.history_rows(results)
        report.append_history(path, lines)
        print(f"\n{len(lines)} rows added to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
