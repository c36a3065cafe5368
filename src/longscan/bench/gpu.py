"""longscan bench gpu: our kernels, and models of them, beside others on a GPU, in bfloat16.

Every (op, side) is measured in a process of its own, which is given up when a row takes too long,
and every result is written down at once, that of a row without one too: a peer that fails, dies or
hangs costs its own rows only, and a second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch

from longscan.bench import gpu_models, gpu_report, report
from longscan.bench.gpu_measure import AGAIN, COLD, COMMAND, Measured, Row, child, prepare, write
from longscan.bench.gpu_rows import OPS, OURS, small_ops
from longscan.bench.gpu_targets import SOFTMAX_FROM
from longscan.io import save_text

REFUSED = {("decay", "fla"), ("gated_deltanet", "fla")}
"""Rows left out unless they are asked for: without TileLang fla 0.6 refuses them on Hopper, but
only in the backward, after it has tuned the forward for minutes."""
PARTS = {"fla": 9, "mamba_ssm": 7}
"""Processes that share the compiling of an op of these peers, which tune at run time."""
NO_KERNELS = {("attention", OURS), ("mamba", "mamba_ssm")}
"""Rows with nothing to compile."""
WORTH = ("", "mamba_ssm", "flash_qla", "fla", "mlstm_kernels")
"""The order of sides; "" is ours. Decoding, more lengths and LATE come behind them."""
LATE = Row("gated_deltanet", "flash_qla", 1, 32768)
"""Compiles for minutes, for one row without a number in the targets: by itself, if time is left."""


def plan(args: argparse.Namespace) -> list[Row]:
    """The rows asked for, those worth most first: a run may be cut off.

    Raises: ValueError if a part matches nothing.
    """
    if args.models is not None:
        sizes = args.models or ["340m", "1.3b"]
        rows = [Row(s, m, b, t) for s in sizes for m, b, t in gpu_models.rows_of(s, args.compile)]
    elif args.cold:
        names = [o.name for o in OPS.values() if not o.step and o.name != "attention"]
        names = [n for n in (*names, *small_ops()) if n != "mlstm 7B"]  # its kernels are mlstm's
        rows = [Row(n, side, 2, 2048) for side in (COLD, AGAIN) for n in names]
    else:
        rows = []
        for op in OPS.values():
            for side in (OURS, *op.peers):
                sweep = op.sweep if side == OURS else ()
                sweep = [s for s in sweep if args.sweep or s[1] == SOFTMAX_FROM]
                if args.rows or (op.name, side) not in REFUSED:
                    rows += [Row(op.name, side, b, t) for b, t in (*op.shapes, *sweep)]
        order = list(OPS)
        rows.sort(key=lambda r: (_rank(r), order.index(r.op), r.length))
    for part in args.rows or ():
        if not any(part in r.name for r in rows):
            raise ValueError(
                f"no row of this bench contains {part!r}; rows are named as {rows[0].name}, with "
                f"the ops {', '.join(dict.fromkeys(r.op for r in rows))}"
            )
    return [r for r in rows if not args.rows or any(part in r.name for part in args.rows)]


def _rank(row: Row) -> int:
    late = [OPS[row.op].step, row.side == OURS and row.length != SOFTMAX_FROM
            and (row.batch, row.length) not in OPS[row.op].shapes, row == LATE]  # fmt: skip
    return len(WORTH) + late.index(True) if any(late) else WORTH.index(row.side.replace(OURS, ""))


# --- results in a file ----------------------------------------------------------------------


def read(*paths: Path) -> list[Measured]:
    """The results in files, run after run; of a row that a run measured twice the last one, but
    a failure hides no result, of whichever run."""
    found: dict[tuple, Measured] = {}
    for line in (line for path in paths for line in read_lines(path)):
        with suppress(json.JSONDecodeError):  # cut off by a kill
            m = Measured(**json.loads(line))
            if m.done or (m.key, m.run) not in found or not found[m.key, m.run].done:
                found[m.key, m.run] = m
    has = {m.key for m in found.values() if m.done}
    kept = [m for m in found.values() if m.done or m.key not in has]
    return sorted(kept, key=lambda m: m.run)


def read_lines(path: Path) -> list[str]:
    """Whole lines only: the last one may be half written."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


# --- the driver -----------------------------------------------------------------------------


def lots(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that one process measures: those of a peer's op, all of ours, if worth the same."""
    out: dict[tuple, list[Row]] = {}
    for row in rows:
        alone = row.side not in (OURS, COLD, AGAIN)
        rank = _rank(row) if row.side == OURS or (alone and row.op in OPS) else 0
        out.setdefault((row.side, row.op if alone else "", rank), []).append(row)
    return list(out.values())


def start(
    command: Sequence[str],
    rows: Sequence[Row],
    more: Sequence[str],
    paths: dict[str, str],
    extra: dict[str, str],
) -> tuple[subprocess.Popen, IO[str]]:
    """A process that measures or compiles rows of one side, and what it says."""
    # What peers tune is kept beside what they compile, as fla does by itself.
    env = os.environ | {"TRITON_CACHE_AUTOTUNING": "1"} | extra
    first = [paths[rows[0].side]] if rows[0].side in paths else []
    env["PYTHONPATH"] = os.pathsep.join([*first, env.get("PYTHONPATH", "")]).strip(":")
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    process = subprocess.Popen(
        [*command, "--child", json.dumps([asdict(r) for r in rows]), *more],
        env=env, stdout=subprocess.DEVNULL, stderr=log,
    )  # fmt: skip
    return process, log


def last_words(log: IO[str]) -> str:
    """The last line that a process wrote."""
    log.seek(0)
    return (log.read().strip().splitlines() or ["no message"])[-1]


def drive(
    rows: Sequence[Row],
    path: Path,
    budget: float,
    paths: dict[str, str],
    command: Sequence[str],
    more: Sequence[str] = (),
    env: dict[str, str] | None = None,
    seconds: float = math.inf,
) -> Iterator[Measured]:
    """Results as they come. A process that takes longer than `budget` seconds for a row, or ends
    on the first row that it is given, loses that row, and another goes on behind it; a peer that
    ends so loses its other rows too. What `seconds` do not suffice for has no result."""
    end = time.perf_counter() + seconds
    for lot in lots(rows):
        left = list(lot)
        while left:
            if time.perf_counter() > end:
                yield from _lose(left, path, "no time was left")
                break
            seen = len(read_lines(path))
            process, log = start(command, left, ["--out", str(path), *more], paths, env or {})
            since, done = time.perf_counter(), 0
            while left:
                ended = process.poll() is not None  # asked before the file is read
                lines = read_lines(path)[seen:]
                for line in lines[done:]:
                    yield Measured(**json.loads(line))
                    since = time.perf_counter()
                    left.pop(0)
                now = time.perf_counter()
                late = now - since > budget or now > end
                done = len(lines)
                if left and (late or (ended and not done)):
                    process.kill()
                    process.wait()
                    why = f"no result within {min(budget, end - since):.0f} s"
                    if ended and not done:
                        why = f"it ended with {process.returncode}: {last_words(log)}"
                    peer = left[0].side in WORTH
                    lost = left[: None if ended and peer else 1]
                    yield from _lose(lost, path, why)
                    del left[: len(lost)]
                    break
                if left and ended:
                    break  # it did some, and dies on the next: that one gets another try
                if left:
                    time.sleep(0.2)
            process.kill()
            process.wait()
            log.close()


def _lose(rows: Sequence[Row], path: Path, why: str) -> Iterator[Measured]:
    for row in rows:
        lost = Measured(**asdict(row), why=why[:300])
        write(path, lost)
        yield lost


def warm(
    rows: Sequence[Row],
    jobs: int,
    seconds: float,
    paths: dict[str, str],
    command: Sequence[str],
    cores: str = "",
) -> Iterator[tuple[str, list[Row]]]:
    """Compile what rows need, `jobs` processes at a time, before the device must be quiet.

    Triton keeps compiled kernels in a folder, so that the process which measures finds them.
    cores: of the processor, "0-7,16": where they run. What is not done after `seconds` is given up.
    Yields what happened, a line for each process, and the rows of a peer that died of it.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row.op, row.side) not in NO_KERNELS and not OPS[row.op].step and row != LATE:
            groups.setdefault((row.op, row.side), []).append(row)
    tasks = []
    for (op, side), lot in groups.items():
        parts = PARTS.get(side, 1)
        if side == "flash_qla":  # compiles for minutes, and for every length anew
            tasks += [([row], 0, 1) for row in lot]
            continue
        # What is tuned does not depend on the length; the rest compiles what its sizes need.
        few = [Row(op, side, 2, 2048)] if parts > 1 else lot
        tasks += [(few, part, parts) for part in range(parts)]
    # What takes longest, then what is worth most.
    tasks.sort(key=lambda t: (t[0][0].side != "flash_qla", _rank(t[0][0])))
    extra = {"OMP_NUM_THREADS": "1"}
    running: list[tuple[list[Row], int, str, float, subprocess.Popen, IO[str]]] = []
    end = time.perf_counter() + seconds
    while running or (tasks and time.perf_counter() < end):
        while tasks and len(running) < jobs:
            lot, part, parts = tasks.pop(0)
            name = lot[0].name if len(lot) == 1 else f"{lot[0].op}/{lot[0].side}"
            name += f" {part + 1}/{parts}" if parts > 1 else ""
            more = ["--share", str(part), str(parts), "--cores", cores]
            process, log = start(command, lot, more, paths, extra)
            running.append((lot, parts, name, time.perf_counter(), process, log))
        time.sleep(0.2)
        for task in list(running):
            lot, parts, name, began, process, log = task
            now = time.perf_counter()
            late = process.poll() is None
            if late and now <= end:
                continue
            process.kill()
            code = process.wait()
            words = "not done in time" if late else last_words(log)
            running.remove(task)
            log.close()
            # By a signal, as assertions end it: the process that measures would die as well.
            dead = not late and code < 0 and lot[0].side != OURS and parts == 1
            if dead:
                words = f"it ended with {code}: {words}"
            text = f"compiled {name} in {now - began:.0f} s"
            yield text + ("" if words == "no message" else f": {words[:200]}"), lot if dead else []
    if tasks:
        names = Counter(f"{lot[0].op}/{lot[0].side}" for lot, _, _ in tasks)
        yield "not compiled in time: " + ", ".join(f"{n} x {name}" for name, n in names.items()), []


# --- the command ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options of `longscan bench gpu`."""
    p = argparse.ArgumentParser(
        prog="longscan bench gpu",
        description="Time our kernels, those of installed peers and softmax attention by cuDNN on "
        "a CUDA device: medians of forward, and of forward with backward to all inputs, by calls "
        "and replayed as CUDA graphs; peak memory beyond the inputs; and the floors under them, "
        "the fewest bytes over the bandwidth of a copy measured beside; then what of the targets "
        "is met. Rows measured before (in --out) are kept.",
    )
    p.add_argument("--models", nargs="*", choices=list(gpu_models.SIZES), metavar="SIZE",
                   help="time training steps of whole models instead (340m 1.3b; tiny for a try), "
                   "also without a GPU")  # fmt: skip
    p.add_argument("--compile", action="store_true", help="with --models: by torch.compile, block "
                   "for block")  # fmt: skip
    p.add_argument("--cold", action="store_true", help="time the first call of every op instead, "
                   "with an empty folder of compiled kernels, then with a full one")  # fmt: skip
    p.add_argument("--rows", nargs="+", metavar="PART", help="rows whose name (op/side/B8 T2048) "
                   "contains a PART")  # fmt: skip
    p.add_argument("--sweep", action="store_true", help="ours and attention at more lengths")
    p.add_argument("--jobs", type=int, default=0, metavar="N", help="before the clock runs, "
                   "compile in N processes at once, sharing what peers would tune for minutes; "
                   "first calls are then not told")  # fmt: skip
    p.add_argument("--cores", default="", metavar="LIST", help="with --jobs: the cores of the "
                   "processor that compile, such as 0-7,16 (measuring keeps to those of this "
                   "command, see taskset)")  # fmt: skip
    p.add_argument("--ahead", type=float, default=240.0, metavar="SECONDS", help="with --jobs: "
                   "no longer than this (default: 240)")  # fmt: skip
    p.add_argument("--seconds", type=float, default=math.inf, help="for the whole command; rows "
                   "that are not reached in time are told")  # fmt: skip
    p.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    p.add_argument("--out", type=Path, default=Path("runs/bench_gpu.jsonl"), metavar="FILE",
                   help="where results are kept (default: runs/bench_gpu.jsonl)")  # fmt: skip
    p.add_argument("--budget", type=float, default=240.0, help="seconds for a row, with all "
                   "compiling and tuning (default: 240)")  # fmt: skip
    p.add_argument("--again", action="store_true", help="measure rows that have a result too")
    p.add_argument("--path", nargs="+", default=[], metavar="SIDE=FOLDER",
                   help="where to import a side from, and only that side")  # fmt: skip
    p.add_argument("--beside", type=Path, nargs="+", default=[], metavar="FILE",
                   help="results of other runs to report with those of --out; sides are compared "
                   "within a run where there is one with both")  # fmt: skip
    p.add_argument("--no-run", action="store_true", help="only report what --out holds")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw time against length")
    p.add_argument("--targets", type=Path, metavar="MD", help="write the table of targets")
    p.add_argument("--record", action="store_true", help="append to bench/history.csv")
    # What the command tells its processes:
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    p.add_argument("--ready", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--run", default="", help=argparse.SUPPRESS)
    p.add_argument("--skip-graph", nargs="+", default=[], help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str]) -> int:
    """Run the bench; the exit status is 0 whether or not rows are missing."""
    args = parser().parse_args(argv)
    if args.child:
        rows = [Row(**r) for r in json.loads(args.child)]
        if args.share:
            part, parts = args.share
            prepare(rows, part, parts, numbers(args.cores))
        else:
            child(rows, args)
        return 0
    rows = plan(args)
    if not args.no_run:
        if not torch.cuda.is_available() and args.models is None:
            raise ValueError("torch finds no CUDA device here; --no-run reports earlier results")
        _run(args, rows)
    wanted = {(r.op, r.side, r.batch, r.length) for r in rows}
    found = read(*args.beside, args.out)
    results = [m for m in found if m.key in wanted]
    if args.models is None and not args.cold and not args.rows:
        results = found  # models and first calls of the same file belong to the report
    if not results:
        raise ValueError(f"{args.out} holds no result of these rows")
    print(gpu_report.tables(results))
    if args.plot:
        gpu_report.plot(results, args.plot)
    if args.targets:
        save_text(gpu_report.target_page(results), args.targets)
    if args.record:
        path = report.history_path()
        lines = gpu_report.history_rows(results)
        report.append_history(path, lines)
        print(f"\n{len(lines)} rows added to {path}")
    return 0


def numbers(text: str) -> set[int]:
    """Those in "0-3,8".

    Raises: ValueError if it is not written so.
    """
    found: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _run(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    numbers(args.cores)
    known = {m.key for m in read(args.out) if m.done}
    left = [r for r in rows if args.again or (r.op, r.side, r.batch, r.length) not in known]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    paths = dict(item.split("=", 1) for item in args.path)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    more = ["--run", now]
    more += ["--no-graphs"] if args.no_graphs else []
    began = time.perf_counter()
    if args.jobs and args.models is None and not args.cold:
        for text, dead in warm(left, args.jobs, args.ahead, paths, COMMAND, args.cores):
            print(f"{text}  ({time.perf_counter() - began:.0f} s)", flush=True)
            lost = list(_lose(dead, args.out, text))
            left = [r for r in left if r not in dead]
            print(*(f"lost: {gpu_report.line(m)}\n" for m in lost), sep="", end="", flush=True)
        more.append("--ready")
    with tempfile.TemporaryDirectory() as empty:
        env = {"TRITON_CACHE_DIR": empty} if args.cold else {}
        seconds = args.seconds - (time.perf_counter() - began)
        results = drive(left, args.out, args.budget, paths, COMMAND, more, env, seconds)
        for n, done in enumerate(results, 1):
            spent = time.perf_counter() - began
            print(f"[{n}/{len(left)}] {gpu_report.line(done)}  ({spent:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
