"""longscan bench scaling: sequence parallelism simulated, up to 1024 ranks and 16M tokens.

Steps (`scaling_step`) and exchanges (`scaling_exchange`) run event by event, beside the closed
formulas (`longscan.parallel.cost`), the numbers that papers publish (`scaling_published`), and
exchanges measured here with gloo (`scaling_gloo`).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from longscan.bench import scaling_published, scaling_report
from longscan.bench.scaling_cases import GLA, H100, NAMED, sweeps
from longscan.bench.scaling_exchange import load, save
from longscan.bench.scaling_gloo import calibrate
from longscan.io import save_text

PAGE = """\
# Scaling: one sequence on many devices

What the shards of a sequence exchange, how long it takes, and what a training step loses by it.
Predictions come from a simulation; what was measured says so.

<!-- simulation -->
<!-- /simulation -->

<!-- gloo -->
<!-- /gloo -->
"""


def with_section(page: str, name: str, text: str) -> str:
    """A page with `text` between <!-- name --> and <!-- /name -->; all else stays as it is.

    Raises: ValueError if the page does not have both markers, once and in order.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise ValueError(f"the page needs one {first} and, behind it, one {last}")
    before, rest = page.split(first)
    return f"{before}{first}\n\n{text}\n\n{last}{rest.split(last)[1]}"


def parser() -> argparse.ArgumentParser:
    """The options of `longscan bench scaling`."""
    p = argparse.ArgumentParser(
        prog="longscan bench scaling",
        description="Simulate training steps of models whose sequence is shared by up to 1024 "
        "ranks, message by message, from measured or assumed latencies and bandwidths.",
    )
    p.add_argument("--calibrate", choices=["gloo"], help="measure links and exchanges here")
    p.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], metavar="P",
        help="numbers of processes to measure with (default: 2 4)",
    )  # fmt: skip
    p.add_argument(
        "--save", type=Path, metavar="FILE",
        help="keep the calibration (the last that was measured, else the one used) as JSON",
    )  # fmt: skip
    p.add_argument(
        "--calibration", default=H100.name, metavar="FILE",
        help=f"a JSON file, or one of {', '.join(NAMED)} (default: {H100.name})",
    )  # fmt: skip
    p.add_argument("--write", action="store_true", help="write scaling.md and its pictures")
    p.add_argument("--out", type=Path, default=Path("docs"), help="where to (default: docs)")
    return p


def main(argv: list[str]) -> int:
    """longscan bench scaling."""
    args = parser().parse_args(argv)
    c = NAMED.get(args.calibration) or load(Path(args.calibration))
    path = args.out / "scaling.md"
    page = path.read_text(encoding="utf-8") if path.exists() else PAGE
    for name in ("simulation", "gloo"):
        with_section(page, name, "")  # a page without a place for them is better found out now
    measured = [calibrate(p) for p in args.ranks] if args.calibrate else []
    if args.save:
        save_text(save(measured[-1][0] if measured else c), args.save)
    if c.compute is None:
        c = replace(c, compute=H100.compute, source=f"{c.source}; compute of `{H100.name}`")
    done = sweeps(GLA, c)
    sections = {"simulation": scaling_report.simulation(c, done, scaling_published.section())}
    if measured:
        sections["gloo"] = scaling_report.gloo(measured)
    for name, text in sections.items():
        page = with_section(page, name, text)
        print(text, end="\n\n")
    if args.write:
        from longscan.bench.scaling_plot import draw

        draw(GLA, c, done, args.out)
        save_text(page, path)
        print(f"wrote {path} and its pictures")
    return 0
