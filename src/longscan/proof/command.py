"""longscan verify --op X, --ops: every case of a kernel on this machine, and a table of errors."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from longscan.proof.case import Case
from longscan.proof.cases import CASES, cases
from longscan.proof.compare import DTYPES, LIMITS, limit, prove, run_once, worst
from longscan.proof.kernels import UnfitError, direct
from longscan.proof.launches import Launches, unused


@dataclass(frozen=True)
class Task:
    """A kernel on a case in a dtype."""

    kernel: str
    case: str
    dtype: str
    device: str
    direct: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a task found: the worst error and of what, or why there is none.

    status: "ok", "FAIL" or "skip"; used: entries of launch tables, by table.
    """

    task: Task
    status: str
    what: str
    error: float
    seconds: float
    errors: dict[str, float] = field(default_factory=dict)
    used: dict[str, set] = field(default_factory=dict)


def perform(task: Task) -> Outcome:
    """Prove one case; an exception is a failure too."""
    case = _case(task)
    began, seen = time.perf_counter(), Launches()
    try:
        run = direct(task.kernel)  # imports the launcher, whose tables are watched
        run = run if task.direct else None
        with seen.watched():
            errors = prove(task.kernel, case, task.dtype, task.device, run)
    except torch.cuda.OutOfMemoryError as problem:
        torch.cuda.empty_cache()
        # Only the largest cases may be too large for a device.
        status = "skip" if case.copies > 1 else "FAIL"
        text = str(problem).splitlines()[0]
        return Outcome(task, status, text, float("inf"), time.perf_counter() - began)
    except UnfitError as problem:
        status = "skip" if case.optional else "FAIL"
        return Outcome(task, status, str(problem), float("inf"), time.perf_counter() - began)
    except Exception as problem:
        text = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
        return Outcome(task, "FAIL", text, float("inf"), time.perf_counter() - began)
    if case.copies > 1 and task.device.startswith("cuda"):
        torch.cuda.empty_cache()
    what, size = worst(errors)
    passed = size <= limit(task.kernel, case, task.dtype, task.device, size)
    seconds = time.perf_counter() - began
    return Outcome(task, "ok" if passed else "FAIL", what, size, seconds, errors, seen.used)


def perform_all(tasks: Sequence[Task], jobs: int = 1, limit: float = 240.0) -> Iterator[Outcome]:
    """All tasks, spread over processes; those that share compiled kernels go to one of them, in
    order. The largest come last, one after the other: they fill a device.

    limit: seconds after which a task is given up, with its process.
    """
    large = {t for t in tasks if _case(t).copies > 1}
    lots: dict[int, list[Task]] = {}
    for task in tasks:
        if task not in large:
            lots.setdefault(_lot(task) % jobs, []).append(task)
    yield from _spread(list(lots.values()), limit)
    yield from _spread([[t] for t in tasks if t in large], limit, at_once=1)


def _spread(lots: list[list[Task]], limit: float, at_once: int | None = None) -> Iterator[Outcome]:
    """Every lot in a process of its own, `at_once` lots at a time."""
    context = multiprocessing.get_context("spawn")
    left, waiting = [list(lot) for lot in lots], {}

    def submit(lot: list[Task], pool: ProcessPoolExecutor | None = None) -> None:
        pool = pool or ProcessPoolExecutor(1, mp_context=context)
        task = lot.pop(0)
        waiting[pool.submit(perform, task)] = (task, lot, pool, time.perf_counter())

    try:
        while left or waiting:
            while left and (at_once is None or len(waiting) < at_once):
                submit(left.pop(0))
            done, _ = wait(waiting, timeout=5, return_when=FIRST_COMPLETED)
            for future in done:
                task, lot, pool, began = waiting.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    seconds = time.perf_counter() - began
                    why = "no result in time" if seconds > limit else "the process died"
                    outcome = Outcome(task, "FAIL", why, float("inf"), seconds)
                yield outcome
                # Behind an illegal access a process cannot use its device any more.
                if outcome.errors or outcome.status == "skip":
                    keep = pool if lot else None
                else:
                    keep = None
                if keep is None:
                    pool.shutdown(wait=False)
                if lot:
                    submit(lot, keep)
            for _, _, pool, began in waiting.values():
                if time.perf_counter() - began > limit:
                    for process in list((pool._processes or {}).values()):
                        process.kill()
    finally:
        for _, _, pool, _ in waiting.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _case(task: Task) -> Case:
    return next(c for c in cases(task.kernel) if c.name == task.case)


def _lot(task: Task) -> int:
    case = _case(task)
    return zlib.crc32(f"{task.kernel} {case.group} {task.dtype}".encode())


def plan(args: argparse.Namespace) -> list[Task]:
    """The tasks that the options ask for.

    Raises: ValueError for unknown kernels, or if nothing is left.
    """
    tasks = []
    for dtype in args.dtypes:
        for kernel in args.op or CASES:
            for case in cases(kernel):
                if args.case and not any(part in case.name for part in args.case):
                    continue
                if (args.quick and not case.quick) or (_on_cpu(args.device) and case.copies > 1):
                    continue
                if dtype in case.dtypes:
                    tasks.append(Task(kernel, case.name, dtype, args.device, args.direct))
    if not tasks:
        raise ValueError("no case matches these options")
    return tasks


def _on_cpu(device: str) -> bool:
    return device.split(":")[0] == "cpu"


def parser() -> argparse.ArgumentParser:
    """The options of `longscan verify --op`."""
    p = argparse.ArgumentParser(
        prog="longscan verify --ops",
        description="Check the kernels on this machine: outputs, states and all gradients of every "
        "case against float64, run twice in poisoned memory. Errors are the largest difference "
        "over the largest entry; limits: "
        + ", ".join(f"{name} {limit:.0e}" for name, limit in LIMITS.items()),
    )
    p.add_argument("--op", nargs="+", metavar="KERNEL", help=f"of {', '.join(CASES)}")
    p.add_argument("--ops", action="store_true", help="all kernels")
    p.add_argument("--case", nargs="+", metavar="PART", help="cases whose name contains a PART")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--device", help="default: cuda, where there is one")
    p.add_argument("--quick", action="store_true", help="the small cases only")
    p.add_argument("--jobs", type=int, default=1, help="processes; compiling takes most time")
    p.add_argument("--limit", type=float, default=240.0, help="seconds for a case (default: 240)")
    p.add_argument("--direct", action="store_true", help="call the launchers, not the ops")
    p.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each case")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints a line for each case; the exit status is 1 if any failed."""
    args = parser().parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not _on_cpu(args.device) and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; longscan doctor says more")
    if find_spec("triton") is None:
        raise ValueError("the kernels need Triton: pip install triton")
    if _on_cpu(args.device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("on a CPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    tasks = plan(args)
    widths = [max(len(getattr(t, n)) for t in tasks) for n in ("kernel", "case")]
    counts = {"ok": 0, "FAIL": 0, "skip": 0}
    used: dict[str, set] = {}
    alone = _on_cpu(args.device) and args.jobs == 1
    for done in map(perform, tasks) if alone else perform_all(tasks, args.jobs, args.limit):
        counts[done.status] += 1
        for table, keys in done.used.items():
            used.setdefault(table, set()).update(keys)
        task = done.task
        print(
            f"{task.kernel:{widths[0]}}  {task.case:{widths[1]}}  {task.dtype}  "
            f"{done.error:8.1e}  {done.status:4}  {done.what}  ({done.seconds:.1f} s)",
            flush=True,
        )
        if args.out:
            with open(args.out, "a", encoding="utf-8") as f:
                line = {**asdict(task), "status": done.status, "what": done.what,
                        "errors": done.errors, "seconds": round(done.seconds, 2)}  # fmt: skip
                f.write(json.dumps(line) + "\n")
    if not (args.case or args.quick) and set(args.dtypes) == set(DTYPES):
        for kernel in dict.fromkeys(t.kernel for t in tasks):
            for table, keys in unused(kernel, used).items():
                counts["FAIL"] += 1
                print(f"no case reaches these launches of {table}: {keys}")
    print(f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['skip']} left out")
    return 1 if counts["FAIL"] else 0


def reached(kernel: str, chosen: Sequence[Case], device: str = "cpu") -> dict[str, set]:
    """The launches that cases would use, found without running a kernel."""
    seen, run = Launches(dry=True), direct(kernel)
    with seen.watched():
        for case in chosen:
            for dtype in case.dtypes:
                with suppress(UnfitError):
                    run_once(kernel, case, dtype, device, run)
    return seen.used
