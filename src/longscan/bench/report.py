"""Results as a table for people and as rows of bench/history.csv."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from longscan import __version__
from longscan.bench.measure import Timing, digits, method
from longscan.doctor import cpu_name
from longscan.io import save_text

DECODE_TARGET = 1.5
# Beside the code that papers come with, ours must be no slower.
_AUTHORS = (
    "mlstm-xlstm", "mlstm-xlstm_chunked", "slstm-xlstm", "mlstm_large-transformers",
    "s4d-authors", "s4-authors", "rwkv4-transformers", "gam-authors", "mega-authors",
    "mega-authors_chunk",
)  # fmt: skip
# How many times faster than the peer each call should be, by row and mode; DECODE_TARGET for
# decoding where nothing is said.
TARGETS: dict[tuple[str, str], float] = {
    ("mamba-transformers", "train"): 50,
    ("mamba-mambapy", "train"): 3,
    ("mamba2-transformers", "train"): 2,
    ("delta-op-transformers", "train"): 2,
    ("gated_deltanet-transformers", "train"): 2,
    **{(row, mode): 1 for row in _AUTHORS for mode in ("train", "decode")},
}
MEMORY_TARGET = 1.0
"""Our peak over the peer's, in every row."""
# The targets are for these shapes; elsewhere nothing is judged.
TARGET_SHAPES = {(2, 512, 256), (2, 4096, 256)}


@dataclass(frozen=True)
class Result:
    """One call of one layer, ours and the peer's; None where it was not measured, `why` says why.

    mib: growth of the process at its peak. error: largest relative difference of the two sides.
    same: False if the peer is another architecture (see Row), so that nothing is judged.
    """

    row: str
    layer: str
    package: str
    mode: str
    batch: int
    length: int
    d_model: int
    ours: Timing
    peer: Timing | None
    ours_mib: float | None
    peer_mib: float | None
    error: float | None = None
    why: str = ""
    same: bool = True

    @property
    def ratio(self) -> float | None:
        """Times faster than the peer."""
        return None if self.peer is None else self.peer.median / self.ours.median

    @property
    def judged(self) -> bool:
        """Whether targets are set for this shape."""
        return self.same and (self.batch, self.length, self.d_model) in TARGET_SHAPES

    @property
    def target(self) -> float | None:
        if not self.judged:
            return None
        default = DECODE_TARGET if self.mode == "decode" else None
        return TARGETS.get((self.row, self.mode), default)

    @property
    def memory_ratio(self) -> float | None:
        """Our memory over the peer's."""
        if self.ours_mib is None or not self.peer_mib:
            return None
        return self.ours_mib / self.peer_mib

    def verdicts(self) -> dict[str, bool]:
        """Which targets of this result are met; only those that could be judged."""
        out = {}
        if self.target is not None and self.ratio is not None:
            out["time"] = self.ratio >= self.target
        if self.judged and self.memory_ratio is not None:
            out["memory"] = self.memory_ratio < MEMORY_TARGET
        return out


def _verdict(result: Result, key: str) -> str:
    met = result.verdicts().get(key)
    return "" if met is None else ("met" if met else "NOT met")


def table(results: Sequence[Result]) -> str:
    """A markdown table, one line per result."""
    head = [
        "layer", "peer", "call", "T", "ours ms", "peer ms", "peer / ours", "target", "",
        "ours MiB", "peer MiB", "ours / peer", "below 1",
    ]  # fmt: skip
    lines = []
    for r in results:
        # Without a time of the peer the reason stands in its place.
        lines.append([
            r.layer, r.package, r.mode, str(r.length), str(r.ours), str(r.peer or r.why),
            _number(r.ratio), _number(r.target), _verdict(r, "time"),
            _number(r.ours_mib), _number(r.peer_mib), _number(r.memory_ratio),
            _verdict(r, "memory"),
        ])  # fmt: skip
    return markdown(head, lines)


def _number(x: float | None) -> str:
    return "" if x is None else digits(x)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up in a terminal."""
    widths = [max(3, *(len(line[i]) for line in (head, *lines))) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([row(head), row(["-" * w for w in widths]), *(row(x) for x in lines)])


def summary(results: Sequence[Result]) -> str:
    """How many targets are met, and which are not."""
    judged = met = 0
    missed = []
    for r in results:
        for key, good in r.verdicts().items():
            judged, met = judged + 1, met + good
            if not good:
                got = (
                    f"{_number(r.ratio)}x, target {_number(r.target)}x"
                    if key == "time"
                    else f"{_number(r.memory_ratio)} of the peer's memory"
                )
                missed.append(f"  NOT met: {r.layer} / {r.package}, {r.mode}, T={r.length}: {got}")
    skipped = sum(r.peer is None for r in results)
    first = f"{met} of {judged} targets met" if judged else "no targets are set for these shapes"
    if skipped:
        first += f"; {skipped} comparison(s) left out because the peer takes too long"
    return "\n".join([first + ".", *missed])


# ---------------------------------------------------------------------------------------------


def version(package: str) -> str:
    """The installed version, or "" if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The short git commit of this code, with a plus if tracked files differ; "" without git."""
    import longscan

    source = Path(longscan.__file__)

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=source.parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie in somebody else's repository: ask whether git knows this file.
    head = git("rev-parse", "--short", "HEAD")
    if not head or git("ls-files", "--error-unmatch", source.name) is None:
        return ""
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def environment() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "bench cpu",
        "device": "cpu",
        "cpu": cpu_name(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": load,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "mambapy": version("mambapy"),
        "xlstm": version("xlstm"),
        "longscan": __version__,
        "commit": commit(),
        "memory_by": method(),
    }


def history_rows(results: Sequence[Result], about: Mapping[str, str]) -> list[dict[str, str]]:
    """One flat record per result."""

    def times(prefix: str, timing: Timing | None) -> dict[str, str]:
        if timing is None:
            return {f"{prefix}_ms": "", f"{prefix}_reps": "0"}
        return {
            f"{prefix}_ms": f"{timing.median:.5g}",
            f"{prefix}_ms_min": f"{min(timing.ms):.5g}",
            f"{prefix}_ms_max": f"{max(timing.ms):.5g}",
            f"{prefix}_reps": str(len(timing.ms)),
        }

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.5g}"

    return [
        {
            **about,
            "row": r.row,
            "mode": r.mode,
            "shape": f"B={r.batch} T={r.length} d_model={r.d_model}",
            **times("ours", r.ours),
            **times("peer", r.peer),
            "ratio": number(r.ratio),
            "target": number(r.target),
            "ours_mib": number(r.ours_mib),
            "peer_mib": number(r.peer_mib),
            "memory_ratio": number(r.memory_ratio),
            "error": number(r.error),
            "note": r.why,
        }
        for r in results
    ]


def history_path(folder: Path | None = None) -> Path:
    """bench/history.csv of the project that `folder` (here) lies in, else of the folder itself."""
    folder = (folder or Path.cwd()).resolve()
    root = next((f for f in (folder, *folder.parents) if (f / "pyproject.toml").is_file()), folder)
    return root / "bench" / "history.csv"


def append_history(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Add rows to a CSV file; columns it does not have yet are added at the right.

    The file is replaced whole or not at all.
    """
    columns: list[str] = []
    known: list[dict[str, str]] = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            known, columns = list(reader), list(reader.fieldnames or [])
    for row in rows:
        columns += [c for c in row if c not in columns]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*known, *rows])
    save_text(text.getvalue(), path)
