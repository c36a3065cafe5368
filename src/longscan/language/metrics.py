"""What a training run records and shows: metrics.csv, loss.png and a line of progress."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from longscan.io import save_text, write_atomically

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "lr",
    "tokens_per_s",
    "valid_loss",
    "valid_bits_per_byte",
)


class MetricsFile:
    """metrics.csv of a run: one row per optimiser step.

    Losses stay on their device until rows are written, so a GPU never waits for the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[tuple[dict[str, Any], Tensor]] = []

    def start(self, step: int) -> None:
        """Begin at `step`: keep the rows up to it, drop what a killed run wrote beyond."""
        rows = [r for r in read_metrics(self.path) if r["step"] <= step] if step else []
        lines = [",".join(COLUMNS)]
        lines += [",".join(_cell(r.get(c)) for c in COLUMNS) for r in rows]
        save_text("\n".join(lines) + "\n", self.path)

    def add(self, row: dict[str, Any], loss: Tensor) -> None:
        self._pending.append((row, loss))

    def flush(self) -> float | None:
        """Write what is pending; returns the latest loss, or None if nothing was pending.

        Raises: ValueError, once all is written, if a loss is not a finite number.
        """
        if not self._pending:
            return None
        losses = torch.stack([loss for _, loss in self._pending]).tolist()
        with open(self.path, "a", encoding="utf-8", newline="") as f:
            for (row, _), loss in zip(self._pending, losses, strict=True):
                row["loss"] = loss
                f.write(",".join(_cell(row.get(c)) for c in COLUMNS) + "\n")
        steps = [row["step"] for row, _ in self._pending]
        self._pending.clear()
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {step}; the last checkpoint is from before that. "
                    "Lower --optim.lr, or lengthen --optim.warmup"
                )
        return losses[-1]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv; a cell left empty is None, a last line cut short is dropped."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = []
    for raw in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        row: dict[str, Any] = {k: float(v) if v else None for k, v in raw.items() if k}
        row["step"], row["tokens"] = int(raw["step"]), int(raw["tokens"])
        rows.append(row)
    return rows


def plot_losses(run: str | Path) -> Path:
    """Draw loss.png of a run folder from its metrics.csv."""
    run = Path(run)
    rows = read_metrics(run / "metrics.csv")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window or any global state
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    axes.plot(steps, losses, color="#9db8d6", linewidth=0.8, label="training, each step")
    if len(rows) >= 40:
        width = max(5, len(rows) // 50)
        sums = [0.0]
        for loss in losses:
            sums.append(sums[-1] + loss)
        means = [(b - a) / width for a, b in zip(sums, sums[width:], strict=False)]
        label = f"training, mean of {width} steps"
        axes.plot(steps[width - 1 :], means, color="#1f4e8c", linewidth=1.5, label=label)
    valid = [(r["step"], r["valid_loss"]) for r in rows if r["valid_loss"] is not None]
    if valid:
        axes.plot(
            *zip(*valid, strict=True), "o-", color="#c8501e", markersize=4, label="validation"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    path = run / "loss.png"
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png"))
    return path
