"""What an experiment measured: rows, the file that keeps them, tables, records and curves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from longscan import __version__
from longscan.bench.report import commit, environment, markdown
from longscan.io import save_text, write_atomically

POINTS = 200  # a learning curve is kept as means over at most this many stretches


@dataclass(frozen=True)
class Row:
    """One measured number. published: what the paper says of it, in words, "" if nothing."""

    case: str
    mixer: str
    metric: str
    value: float
    published: str
    seed: int


@dataclass(frozen=True)
class Measurement:
    """The rows of one case and seed, how they came about, and the learning curve (step, loss)."""

    key: str
    rows: tuple[Row, ...]
    steps: int = 0
    seconds: float = 0.0
    commit: str = ""
    date: str = ""
    curve: tuple[tuple[float, float], ...] = field(default=(), repr=False)


@cache
def code() -> str:
    """The version of this code: its git commit, or its number where there is no git."""
    return commit() or __version__


def key_of(case: str, seed: int, settings: dict[str, Any], device: str) -> str:
    """A hash of everything that a measurement depends on, the code's version included.

    Raises: TypeError if settings are not plain JSON data.
    """
    facts = [case, seed, settings, device, torch.__version__, code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


class Store:
    """Finished measurements of a claim in FOLDER/rows.jsonl, one a line, as they are finished.

    A line cut short by a kill is as if it had never been written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        self._known: dict[str, Measurement] = {}
        if self.path.is_file():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                write_atomically(self.path, lambda tmp: tmp.write_bytes(whole))
            for line in whole.decode().splitlines():
                self._remember(_measurement(json.loads(line)))

    def _remember(self, measurement: Measurement) -> None:
        self._known[measurement.key] = measurement

    def get(self, key: str) -> Measurement | None:
        """What was measured under this key."""
        return self._known.get(key)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(asdict(measurement)) + "\n")
        self._remember(measurement)


def _measurement(data: dict[str, Any]) -> Measurement:
    rows = tuple(Row(**row) for row in data.pop("rows"))
    curve = tuple((step, loss) for step, loss in data.pop("curve"))
    return Measurement(rows=rows, curve=curve, **data)


def thinned(losses: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(last step, mean loss) of at most POINTS equal stretches of the losses of each step."""
    width = max(1, -(-len(losses) // POINTS))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return tuple((min((i + 1) * width, len(losses)), sum(p) / len(p)) for i, p in enumerate(parts))


# ---------------------------------------------------------------------------------------------


def values(rows: Iterable[Row], case: str, metric: str) -> list[float]:
    """The values of a case and metric over the seeds.

    Raises: ValueError if there is none.
    """
    found = [r.value for r in rows if r.case == case and r.metric == metric]
    if not found:
        raise ValueError(f"nothing was measured for {case!r}, {metric!r}")
    return found


def mean(rows: Iterable[Row], case: str, metric: str) -> float:
    """The mean of a case and metric over the seeds."""
    return statistics.fmean(values(rows, case, metric))


def _lines(rows: Sequence[Row]) -> list[tuple[Row, list[float]]]:
    """A row for each (case, metric) in the order measured, and its values over the seeds."""
    groups: dict[tuple[str, str], tuple[Row, list[float]]] = {}
    for row in rows:
        groups.setdefault((row.case, row.metric), (row, []))[1].append(row.value)
    return list(groups.values())


def table(rows: Sequence[Row]) -> str:
    """Measured beside published, a line for each case and metric."""
    lines = []
    for row, found in _lines(rows):
        spread = f"{min(found):.4g} to {max(found):.4g}, {len(found)} seeds"
        lines.append(
            [
                row.case,
                row.mixer,
                row.metric,
                f"{statistics.fmean(found):.4g}",
                spread if len(found) > 1 else "1 seed",
                row.published,
            ]
        )
    return markdown(["case", "mixer", "metric", "measured", "range", "published"], lines)


def record_rows(
    name: str, measurements: Sequence[Measurement], holds: bool, device: str
) -> list[dict[str, str]]:
    """One flat record for each case and metric, for bench/claims.csv."""
    about = environment()
    pairs = [(m, row) for m in measurements for row in m.rows]
    out = []
    for first, found in _lines([row for _, row in pairs]):
        same = (first.case, first.metric)
        used = [m for m, row in pairs if (row.case, row.metric) == same]
        out.append(
            {
                "claim": name,
                "case": first.case,
                "mixer": first.mixer,
                "metric": first.metric,
                "mean": f"{statistics.fmean(found):.5g}",
                "min": f"{min(found):.5g}",
                "max": f"{max(found):.5g}",
                "seeds": str(len(found)),
                "published": first.published,
                "holds": "yes" if holds else "no",
                "steps": str(max(m.steps for m in used)),
                "minutes": f"{sum(m.seconds for m in used) / 60:.3g}",
                "device": device,
                "threads": about["threads"],
                "torch": about["torch"],
                "commit": " ".join(sorted({m.commit for m in used})),
                "date": max(m.date for m in used),
            }
        )
    return out


# ---------------------------------------------------------------------------------------------


def save_curves(folder: Path, measurements: Sequence[Measurement]) -> list[Path]:
    """Write curves.csv, and curves.png if matplotlib is installed; returns what was written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "seed", "step", "loss"])
    for m in measurements:
        first = m.rows[0]
        writer.writerows([first.case, first.seed, int(s), f"{loss:.6g}"] for s, loss in m.curve)
    path = folder / "curves.csv"
    save_text(text.getvalue(), path)
    drawn = draw(folder, measurements)
    return [path] if drawn is None else [path, drawn]


def draw(folder: Path, measurements: Sequence[Measurement]) -> Path | None:
    """curves.png, every seed a line in the colour of its case; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window or any global state
    axes = figure.add_subplot()
    cases = list(dict.fromkeys(m.rows[0].case for m in measurements))
    for m in measurements:
        case = m.rows[0].case
        earlier = any(line.get_label() == case for line in axes.get_lines())
        axes.plot(
            *zip(*m.curve, strict=True),
            color=f"C{cases.index(case) % 10}",
            linewidth=1.0,
            label=None if earlier else case,
        )
    axes.set(xlabel="step", ylabel="training loss", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path = folder / "curves.png"
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png"))
    return path
