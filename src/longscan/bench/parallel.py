"""longscan bench parallel: sequence parallelism measured on the GPUs or processes of one host.

    correctness   losses and gradients of sharded models against whole ones, every method
    exchange      what states take to cross, beside the cost model with links measured here
    training      steps of 340M models: each method beside data parallel, ring attention, Ulysses
    longest       the longest sequence that fits
    fsdp          FSDP2 and shared sequences on the same ranks
    bytes         what ranks receive, counted (processes of the CPU)
    timeline      when exchanges run, and who waits (processes of the CPU)

Every row is written down as it comes; a second run measures what is missing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from longscan.bench import parallel_report, report
from longscan.bench import parallel_train as train
from longscan.bench.gpu_measure import about_gpu
from longscan.bench.gpu_models import SOFT
from longscan.bench.parallel_bytes import draw
from longscan.bench.parallel_group import Job, Row, Settings, append, measure, read, trained
from longscan.bench.parallel_models import CASES, LINEAR
from longscan.bench.parallel_predict import calibration
from longscan.io import save_text

PARTS = ("correctness", "exchange", "training", "fsdp", "longest", "bytes", "timeline")
ON_CPU = ("bytes", "timeline")
"""Parts that always run as processes of the CPU."""
SECONDS, BUDGET = 420.0, 100.0


def steps(part: str, size: str, ranks: int, cases: Sequence[str] | None) -> list[tuple[str, str]]:
    """A part as steps of a group: ("module:function", what of it)."""
    here = "longscan.bench.parallel_"

    def asked(names: Sequence[str]) -> list[str]:
        return [n for n in names if not cases or n in cases]

    if part == "correctness":
        return [(here + "exact:correctness", c) for c in asked(CASES)]
    if part == "warm":
        return [(here + "train:warm", m) for m in asked(LINEAR)]
    if part == "longest":
        return [(here + "train:longest", m) for m in asked(train.MIXERS)]
    if part in ("training", "late"):
        every = train.lengths(size, ranks)
        rows = [(m, t) for t in every for m in asked(train.MIXERS)]
        late = [r for r in rows if r == (SOFT, every[-1])]
        chosen = late if part == "late" else [r for r in rows if r not in late]
        return [(here + "train:training", f"{m} {t}") for m, t in chosen]
    if part == "fsdp":
        return [(here + "train:fsdp", "gated_deltanet")]
    if part == "exchange":
        return [(here + "exchange:exchange", "")]
    return [(here + f"bytes:{'received' if part == 'bytes' else part}", "")]


def parser() -> argparse.ArgumentParser:
    """The options of `longscan bench parallel`."""
    p = argparse.ArgumentParser(
        prog="longscan bench parallel",
        description="Measure sequence parallelism on all GPUs of this host (NCCL, without "
        "multicast over NVLink), or without GPUs on processes (gloo, tiny models). Starts its own "
        "processes.",
    )
    p.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                   help=f"of {', '.join(PARTS)}; by default the first four and longest on GPUs, "
                   "all but training, longest and fsdp on a CPU")  # fmt: skip
    p.add_argument("--cases", nargs="+", metavar="NAME",
                   help="models, as gla, gated_deltanet, mamba2, attention")  # fmt: skip
    p.add_argument("--ranks", type=int, metavar="N",
                   help="GPUs (default: all), or processes (default: 2)")  # fmt: skip
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument("--size", choices=["tiny", "340m"], help="default: 340m on GPUs, tiny on a CPU")
    p.add_argument("--seconds", type=float, default=SECONDS,
                   help=f"for all; what is not begun by then is told ({SECONDS:g})")  # fmt: skip
    p.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                   help=f"for a row, with all compiling (default: {BUDGET:g})")  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("runs/bench_parallel.jsonl"), metavar="FILE",
                   help="where results are kept (default: runs/bench_parallel.jsonl)")  # fmt: skip
    p.add_argument("--beside", type=Path, nargs="+", default=[], metavar="FILE",
                   help="results of other runs to report with those of --out")  # fmt: skip
    p.add_argument("--again", action="store_true", help="measure rows that have a result too")
    p.add_argument("--no-run", action="store_true", help="only report what --out holds")
    p.add_argument("--calibration", type=Path, metavar="FILE",
                   help="write links for `longscan bench scaling --calibration FILE`")  # fmt: skip
    p.add_argument("--record", action="store_true", help="append to bench/history.csv")
    p.add_argument("--write", type=Path, metavar="FOLDER",
                   help="write a section of scaling.md, and pictures, there")  # fmt: skip
    return p


def main(argv: Sequence[str]) -> int:
    """Run the bench; the exit status is 1 if something that was measured is not as it must be."""
    args = parser().parse_args(argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = args.device == "cuda" or (args.device is None and gpus > 0)
    ranks = args.ranks or (gpus if gpu else 2)
    if gpu and not 0 < ranks <= gpus:
        raise ValueError(f"{ranks} ranks need as many GPUs; torch finds {gpus}: try --device cpu")
    if not args.no_run:
        if ranks < 2:
            raise ValueError(f"sequences are shared by at least 2 ranks, not {ranks}")
        _run(args, gpu, ranks)
    rows = [row for path in (*args.beside, args.out) for row in read(path).values()]
    if not rows:
        raise ValueError(f"{args.out} holds no results")
    print(parallel_report.tables(rows), flush=True)
    if args.calibration:
        save_text(calibration(rows), args.calibration)
        print(f"wrote {args.calibration}")
    if args.record:
        path = report.history_path()
        lines = parallel_report.history_rows(rows)
        report.append_history(path, lines)
        print(f"{len(lines)} rows added to {path}")
    if args.write:
        _write(rows, args.write)
    failed = [r for r in rows if parallel_report.failed(r)]
    for r in failed:
        print(f"NOT met: {r['name']}: {r.get('why') or parallel_report.numbers(r)}")
    return 1 if failed else 0


def _run(args: argparse.Namespace, gpu: bool, ranks: int) -> None:
    parts = args.only or (PARTS[:5] if gpu else ("correctness", "exchange", *ON_CPU))
    size = args.size or ("340m" if gpu else "tiny")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    run = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = about_gpu() | {"command": "bench parallel"}
    append(args.out, {"name": f"about/{run}", "part": "about", "about": about})
    end = began + args.seconds
    # Everything that compiles runs at once, before the clocked parts need the devices alone.
    before = ["warm"] if gpu and {"training", "longest", "fsdp"} & {*parts} else []
    before += ["correctness"] if "correctness" in parts else []
    each = [s for part in before for s in steps(part, size, ranks, args.cases)]
    stages = [([Job((s,), f"{s[0].split(':')[1]} {s[1]}") for s in each], ranks, gpu)]
    clocked = [p for p in ("exchange", "training", "fsdp", "longest") if p in parts]
    clocked += ["late"] if "training" in parts else []  # takes minutes: behind all else
    if clocked:
        one = [s for part in clocked for s in steps(part, size, ranks, args.cases)]
        stages.append(([Job(tuple(one), ", ".join(clocked))], ranks, gpu))
    for part in ON_CPU:
        for p in [args.ranks] if args.ranks else [2, 4][part == "timeline" :]:
            if part in parts:
                job = Job(tuple(steps(part, size, p, args.cases)), f"{part} of {p}")
                stages.append(([job], p, False))
    for todo, p, on_gpu in stages:
        shown = size if on_gpu or not gpu else "tiny"
        settings = Settings(args.out, p, on_gpu, shown, run, end, args.budget)
        for words in measure(todo, settings, len(todo) if on_gpu else 1, args.again):
            print(f"{words}  ({time.time() - began:.0f} s)", flush=True)


def _write(rows: Sequence[Row], folder: Path) -> None:
    from longscan.bench.scaling import PAGE, with_section

    path = folder / "scaling.md"
    page = path.read_text(encoding="utf-8") if path.exists() else PAGE
    if "<!-- measured -->" not in page:
        page = page.rstrip("\n") + "\n\n<!-- measured -->\n<!-- /measured -->\n"
    page = with_section(page, "measured", parallel_report.section(rows))
    lines = [r for r in rows if r["part"] == "timeline" and not r.get("why")]
    if lines:
        draw(lines, folder / "scaling_timeline.png")
    if trained(rows):
        parallel_report.draw(rows, folder / "scaling_gpus.png")
    save_text(page, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    sys.exit(main(sys.argv[1:]))
