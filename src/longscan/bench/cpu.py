"""longscan bench cpu: our layers beside transformers, mambapy and the authors' own code.

Equal weights, float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from longscan.bench import compare, report
from longscan.bench.measure import CLOCKS, Children, Timing, digits, elapsed_ms, interleave
from longscan.bench.peers import ROWS
from longscan.bench.report import Result
from longscan.bench.row import EXTRA, MODES, Row, Side


def parser() -> argparse.ArgumentParser:
    """The options of `longscan bench cpu`."""
    p = argparse.ArgumentParser(
        prog="longscan bench cpu",
        description="Time our layers and their peers side by side on the CPU: one process, equal "
        "weights, float32, both checked to compute the same outputs and gradients first. Peak "
        "memory is measured in child processes.",
    )
    p.add_argument("--rows", nargs="+", metavar="PART", help="rows whose name contains a PART")
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--lengths", nargs="+", type=int, metavar="T", help="default: 512 4096")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--d-model", type=int, help="a multiple of 64; default: 256")
    p.add_argument("--threads", type=int, help="default: torch's own choice")
    p.add_argument("--seconds", type=float, help="repeat each pair for this long (default: 1.5)")
    p.add_argument(
        "--limit",
        type=float,
        default=60.0,
        help="leave out a call of the peer expected to take longer than this many seconds",
    )
    p.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: count processor time, which other programs disturb less (with --threads 1)",
    )
    p.add_argument("--no-memory", action="store_true", help="measure time only")
    p.add_argument("--quick", action="store_true", help="small shapes: does it run at all?")
    p.add_argument(
        "--record", action="store_true", help="append to the project's bench/history.csv"
    )
    return p


def chosen(parts: Sequence[str] | None) -> list[Row]:
    """The rows whose name contains one of the parts; all rows without parts.

    Raises: ValueError if nothing matches a part.
    """
    for part in parts or ():
        if not any(part in row.name for row in ROWS):
            names = ", ".join(row.name for row in ROWS)
            raise ValueError(f"no row of this bench contains {part!r}; rows: {names}")
    return [row for row in ROWS if not parts or any(part in row.name for part in parts)]


ONCE = 4.0
"""Seconds after which a call of a peer is not repeated: its first call is the measurement."""
DECODE_TOKENS = 64
LOOPS = ("mamba-transformers", "slstm-xlstm", "rwkv4-transformers")
"""Rows whose peer trains by a loop over time that autograd walks back."""


class Bench:
    """The settings of a run, and what earlier lengths tell about later ones."""

    def __init__(self, args: argparse.Namespace) -> None:
        quick = args.quick
        self.rows = chosen(args.rows)
        self.modes = [m for m in MODES if m in args.modes]
        self.lengths = sorted(args.lengths or ([64, 128] if quick else [512, 4096]))
        self.batch, self.d_model = args.batch, args.d_model or (64 if quick else 256)
        self.seconds = args.seconds if args.seconds is not None else (0.05 if quick else 1.5)
        self.limit, self.clock = args.limit, CLOCKS[args.clock]
        if min(self.lengths) < 4 or self.batch < 1:
            raise ValueError("--lengths must be at least 4 and --batch at least 1")
        if self.d_model % 64 or self.d_model <= 0:
            raise ValueError(f"--d-model must be a multiple of 64, not {self.d_model}")
        if args.threads:
            torch.set_num_threads(args.threads)
        for row in list(self.rows):
            error = row.missing()
            if error and (args.rows or row.install == EXTRA):
                raise error
            if error:
                self.rows.remove(row)
                print(f"{row.name} is left out: {error}", file=sys.stderr)
        self.children = None
        if not args.no_memory:
            modules = sorted({m for row in self.rows for m in row.modules})
            self.children = Children(["longscan.bench.peers", *modules])

    def plan(self) -> list[float]:
        """The weight of each measurement, in order."""
        return [
            weight(row, mode, length)
            for row in self.rows
            for length in self.lengths
            for mode in self.modes
            if mode in row.modes
        ]

    def run(self) -> Iterator[Result]:
        """Measure everything, row by row, short sequences first."""
        for row in self.rows:
            torch.manual_seed(0)
            ours, peer = row.ours(self.d_model), row.peer(self.d_model)
            if row.same:
                compare.equal_weights(row, ours, peer)
            earlier: dict[str, Result] = {}
            for length in self.lengths:
                for mode in (m for m in self.modes if m in row.modes):
                    result = self.measure(row, ours, peer, mode, length, earlier.get(mode))
                    earlier[mode] = result
                    yield result

    def measure(
        self, row: Row, ours: Side, peer: Side, mode: str, length: int, earlier: Result | None
    ) -> Result:
        """One result; `earlier` is that of a shorter sequence."""
        inputs = row.inputs(self.batch, length, self.d_model)
        more = row.inputs(self.batch, DECODE_TOKENS, self.d_model)
        cotangent = torch.randn_like(compare.prefill(ours, inputs))
        # A whole sequence gets longer with T, a single token does not.
        why = self.too_long(earlier, length) if mode != "decode" and earlier else ""

        mine = compare.calls(mode, ours, inputs, more, cotangent)
        y = mine()
        error = None
        if why:
            (time_ours,), time_peer = self.times(mine), None
        else:
            theirs = compare.calls(mode, peer, inputs, more, cotangent)
            out: list[torch.Tensor] = []
            first = elapsed_ms(lambda: out.append(theirs()), self.clock)
            if row.same:
                error = compare.check(row, (mine, y), (theirs, out[0]), f"{mode}, T={length}")
            if first > 1e3 * ONCE:
                (time_ours,) = self.times(mine)
                time_peer = Timing((first,))
            else:
                time_ours, time_peer = self.times(mine, theirs)
        if mode == "decode":
            time_ours, time_peer = (
                t and Timing(tuple(ms / DECODE_TOKENS for ms in t.ms))
                for t in (time_ours, time_peer)
            )
        assert time_ours is not None
        mib = self.memory(row, mode, length, time_peer is not None, earlier)
        return Result(
            row.name, row.layer, row.package, mode, self.batch, length, self.d_model,
            time_ours, time_peer, *mib, error, why, row.same,
        )  # fmt: skip

    def times(self, *calls: compare.Call) -> list[Timing]:
        return interleave(calls, seconds=self.seconds * len(calls) / 2, clock=self.clock)

    def too_long(self, earlier: Result, length: int) -> str:
        """Why the peer is not asked for `length`, or ""."""
        if earlier.peer is None:
            return earlier.why
        expected = earlier.peer.median / 1e3 * length / earlier.length
        if expected <= self.limit:
            return ""
        return f"left out: at least {expected:.0f} s expected, limit {self.limit:.0f} s"

    def memory(
        self, row: Row, mode: str, length: int, with_peer: bool, earlier: Result | None
    ) -> tuple[float | None, float | None]:
        """Ours and the peer's, in MiB; a decode step needs the same at any position."""
        if self.children is None:
            return None, None
        if mode == "decode" and earlier is not None:
            return earlier.ours_mib, earlier.peer_mib
        common = (mode, self.batch, length, self.d_model, torch.get_num_threads())
        found = [
            self.children.peak_growth(compare.memory_job, row.name, mine, *common)
            for mine in ([True, False] if with_peer else [True])
        ]
        return found[0], found[1] if with_peer else None


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def weight(row: Row, mode: str, length: int) -> float:
    """About how long a measurement takes, in seconds; only the estimate of the end uses it."""
    if mode == "train" and row.name in LOOPS:
        return 40.0
    return 4.0 + length / 500


def main(argv: Sequence[str]) -> int:
    """Run the bench; the exit status is 0 whether or not targets are met."""
    args = parser().parse_args(argv)
    about = report.environment()  # before we load the machine ourselves
    bench = Bench(args)
    about.update(threads=str(torch.get_num_threads()), clock=args.clock)
    peers = (f"{p} {about[p] or 'absent'}" for p in ("transformers", "mambapy", "xlstm"))
    print(
        f"{about['cpu']}, {about['cpus']} CPUs, {about['threads']} threads, {about['vector']}; "
        f"torch {about['torch']}, {', '.join(peers)}, longscan {about['longscan']} "
        f"{about['commit']}"
    )
    if about["load"] and float(about["load"]) > 0.5 * float(about["cpus"]):
        print(f"The machine is busy (load {about['load']}): take the times as provisional.")
    results: list[Result] = []
    plan, began = bench.plan(), time.perf_counter()
    try:
        for result in bench.run():
            results.append(result)
            done, spent = len(results), time.perf_counter() - began
            left = spent * sum(plan[done:]) / sum(plan[:done])
            ratio = result.why if result.ratio is None else f"{digits(result.ratio)}x"
            print(
                f"[{done:{len(str(len(plan)))}}/{len(plan)}] {result.layer} / {result.package} "
                f"{result.mode} T={result.length}: {ratio}  ({clock(spent)} gone, about "
                f"{clock(left)} left)",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:
        print(report.table(results))
        raise
    error = max((r.error for r in results if r.error is not None), default=0)
    print(
        f"\nB={bench.batch}, d_model={bench.d_model}, float32. Median (min-max) xcalls, in ms of "
        f"the {args.clock} clock:\na whole call; for decode one token. MiB: rise of resident "
        f"memory at its peak ({about['memory_by']});\nfor decode that of "
        f"{compare.MEMORY_BATCH} sequences, states included. Before timing both sides of the same "
        f"layer agreed\n(relative error of outputs and gradients at most {error:.1e}).\n"
    )
    print(report.table(results))
    print()
    print(report.summary(results))
    if args.record:
        path = report.history_path()
        report.append_history(path, report.history_rows(results, about))
        print(f"\n{len(results)} rows added to {path}")
    return 0
