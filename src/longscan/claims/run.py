"""longscan claims: run the small experiments behind the papers' claims."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from longscan.claims import CLAIMS, Claim, claim
from longscan.claims.report import RECORDS
from longscan.cli import load
from longscan.doctor import cpu_name


def parser() -> argparse.ArgumentParser:
    """The options of `longscan claims`."""
    p = argparse.ArgumentParser(
        prog="longscan claims",
        description="Train the small experiment behind a paper's claim, print measured beside "
        "published, and say whether the claim holds in our hands. Without a name, list them.",
    )
    add = p.add_argument
    add("names", nargs="*", metavar="NAME", help="claims to run; all: every one that needs no data")
    add("--seeds", type=int, help="seeds 0 to SEEDS - 1 of every case (default: the claim's)")
    add("--device", default="cpu", help="cpu | cuda | cuda:1 (default: cpu)")
    add("--quick", action="store_true", help="tiny sizes: does it run at all? Nothing is judged")
    add("--record", action="store_true", help=f"append to the project's bench/{RECORDS}")
    add("--out", type=Path, default=Path("runs/claims"), help="results go to OUT/NAME")
    add("--data", type=Path, help="the folder with the data of a claim that needs some")
    add("--fresh", action="store_true", help="measure again what OUT already holds")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return p


def listing() -> str:
    """All claims in words."""
    parts = []
    for c in CLAIMS.values():
        needs = f", needs --data: {c.data}" if c.data else ""
        parts.append(
            f"{c.name}\n    {c.title}\n    {c.source}\n"
            f"    about {c.minutes:g} minutes on 2 CPU cores{needs}"
            + (f"; --device cuda: {c.gpu}" if c.gpu else "")
        )
    return "\n".join([*parts, "", "longscan claims NAME runs one; --help says more."])


def device_of(name: str) -> torch.device:
    """The device called `name`.

    Raises: ValueError if torch does not know it, or cannot use it here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu or cuda, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"torch finds {torch.cuda.device_count()} CUDA devices here, so not {name}; "
            "longscan doctor says what it finds"
        )
    return device


def chosen(names: list[str]) -> list[Claim]:
    """The claims asked for, each once.

    Raises: ValueError for an unknown name.
    """
    if names == ["all"]:
        return [c for c in CLAIMS.values() if not c.data]
    return [claim(name) for name in dict.fromkeys(names)]


def run(c: Claim, args: argparse.Namespace, device: torch.device) -> bool:
    """Run one claim and print what came out; returns whether it holds (True in a quick run)."""
    from longscan.claims.results import record_rows, save_curves, table
    from longscan.claims.training import Job
    from longscan.progress import ProgressLine

    folder: Path = args.out / (c.name + ("-quick" if args.quick else ""))
    if args.fresh:
        (folder / "rows.jsonl").unlink(missing_ok=True)
    experiment = load(c.target)
    seeds = tuple(range(args.seeds or (1 if args.quick else c.seeds)))
    plan = Job(device, seeds, args.quick, args.data, plan=True)
    list(experiment(plan))  # type: ignore[arg-type,call-overload]
    job = Job(
        device, seeds, args.quick, args.data, folder,
        progress=ProgressLine(), total=len(plan.planned),
    )  # fmt: skip
    known = sum(job.known(key) for key in plan.planned)
    print(f"{c.name}: {c.title}\n{c.source}")
    print(
        f"{len(plan.planned)} trainings on {where(device)}"
        + (f", {known} of them finished in {folder}" if known else "")
        + "; interrupted, the same command goes on"
    )
    rows = list(experiment(job))  # type: ignore[arg-type,call-overload]
    paths = save_curves(folder, job.measurements)
    print(f"\n{table(rows)}")
    print("learning curves: " + ", ".join(map(str, paths)))
    if args.quick:
        print(f"{c.name}: a quick run; nothing is judged.")
        return True
    holds, sentence = load(c.check)(rows)  # type: ignore[arg-type,misc]
    print(f"{c.name}: {'HOLDS' if holds else 'DOES NOT HOLD'} in our hands. {sentence}")
    if args.record:
        from longscan.bench.report import append_history, history_path

        path = history_path().with_name(RECORDS)
        append_history(path, record_rows(c.name, job.measurements, holds, where(device)))
        print(f"recorded in {path}")
    return holds


def where(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def main(argv: list[str]) -> int:
    """longscan claims [NAME ...]; a claim that does not hold is a result, not a failure."""
    args = parser().parse_args(argv)
    if not args.names:
        print(listing())
        return 0
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {args.seeds}")
    if args.quick and args.record:
        raise ValueError("a --quick run measures nothing worth recording: leave out --record")
    if args.data is not None and not args.data.exists():
        raise ValueError(f"there is no file or folder {args.data}; check --data")
    claims, device = chosen(args.names), device_of(args.device)
    for c in claims:
        if c.data and args.data is None:
            raise ValueError(f"{c.name} needs --data FOLDER with {c.data}")
    if args.threads:
        torch.set_num_threads(args.threads)
    for i, c in enumerate(claims):
        if i:
            print()
        run(c, args, device)
    return 0
