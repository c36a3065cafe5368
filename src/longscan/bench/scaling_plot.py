"""The pictures of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.bench.scaling_cases import (
    CARDS,
    GDN,
    RANKS,
    SHARD,
    SOFT,
    STEPS,
    SWEEP,
    SWEEP_TOKENS,
    Sweeps,
    intra,
)
from longscan.bench.scaling_exchange import Calibration
from longscan.bench.scaling_step import Model
from longscan.parallel.cost import CHOICE, Tokens, received

NAMES = {
    "data": "no exchange",
    "allgather": "all-gather (LASP-2)",
    CARDS: "all-gather, all cards of a host",
    "allscan": "all-scan (ZeCO)",
    "relay": "all-scan, one block",
    "doubling": "doubling",
    "hierarchical": "hierarchical",
    "lasp": "LASP",
    "ring_attention": "softmax, ring attention",
    "ulysses": "softmax, Ulysses",
}
COLOURS = {m: "black" if m == "data" else f"C{i}" for i, m in enumerate(NAMES)}
MARKS = dict(zip(NAMES, "..Posv D^x*".replace(" ", ""), strict=True))


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * panels, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _line(axis: Any, x: Any, y: Any, method: str, **style: Any) -> None:
    settings = {"label": NAMES[method], "marker": MARKS[method], "markersize": 5, **style}
    axis.plot(x, y, color=COLOURS[method], linewidth=1.4, **settings)


def _ranks(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(RANKS, [str(p) for p in RANKS])
    axis.set_xlabel("ranks")
    axis.grid(alpha=0.3)


def _amount(x: float, _: object = None) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if x < 1024 or unit == "GiB":
            return f"{x:g} {unit}"
        x /= 1024
    raise AssertionError


def draw(model: Model, c: Calibration, s: Sweeps, folder: Path) -> None:
    """Write scaling_bytes, scaling_exchange, scaling_ranks and scaling_tokens (.png)."""
    pictures = {
        "bytes": _bytes(model),
        "exchange": _exchange(model, c, s),
        "ranks": _steps(model, s),
        "tokens": _tokens(model, s),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"scaling_{name}.png", dpi=110)


def _bytes(model: Model) -> Any:
    figure, axes = _figure(2)
    for axis, of in zip(axes, (model, GDN), strict=True):
        for m in CHOICE:
            _line(axis, RANKS, [received(m, p, of.element, per_host=8) for p in RANKS], m)
        for m, name in (("ring_attention", ", or LASP-2H"), ("ulysses", "")):
            y = [received(m, p, Tokens(SHARD * p, of.d_model)) for p in RANKS]
            _line(axis, RANKS, y, m, linestyle="--", label=NAMES[m] + name)
        _ranks(axis)
        axis.set_yscale("log", base=2)
        axis.set_ylim(2**20, 2**38)
        axis.set_yticks([2**k for k in range(20, 39, 2)])
        axis.yaxis.set_major_formatter(_amount)
        each = {"key": "a vector", "matrix": "a matrix"}[of.transition]
        axis.set_title(f"{of.name}: the transition of a head is {each}")
    axes[0].set_ylabel("received by a rank, a layer, forward")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"By formula; softmax layers of equal width with {SHARD} tokens a rank")
    return figure


def _exchange(model: Model, c: Calibration, s: Sweeps) -> Any:
    figure, axes = _figure(2)
    for m, y in s.formula.items():
        _line(axes[0], RANKS, [1e3 * t for t in y], m, marker="", label=None)
    for m, y in s.flat.items():
        _line(axes[0], RANKS, [1e3 * t for t in y], m, linestyle="")
    for m, y in s.hosts.items():
        _line(axes[1], RANKS, [1e3 * t for t in y], m)
    hidden = 1e3 * intra(model, c)
    drawn = [1e3 * t for rows in (s.flat, s.hosts) for y in rows.values() for t in y]
    low, high = min(hidden, *drawn) / 2, 3 * max(drawn)
    for axis in axes:
        axis.axhline(hidden, color="black", linestyle=":", linewidth=1)
        _ranks(axis)
        axis.set_yscale("log")
        axis.set_ylim(low, high)
    note = f"work without the entering state,\n{SHARD} tokens a rank, forward"
    axes[1].text(1020, hidden / 1.15, note, fontsize=8, ha="right", va="top")
    axes[0].set_ylabel("ms of an exchange")
    axes[0].set_title("the outer link everywhere; lines: formulas, marks: simulated")
    axes[1].set_title(f"hosts of {c.per_host}, simulated")
    axes[1].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{model.name}, {c.name}")
    return figure


def _steps(model: Model, s: Sweeps) -> Any:
    figure, axes = _figure(2)
    for axis, rows, title in (
        (axes[0], s.free, "only the exchange ties ranks"),
        (axes[1], s.together, "ranks wait for each other at each layer"),
    ):
        for m in STEPS:
            _line(axis, RANKS, rows[m], m)
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        _ranks(axis)
        axis.set_ylim(0, 1.05)
        axis.set_title(title)
    axes[0].set_ylabel("tokens/s of a rank, relative to no exchange")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"{model.name}, {SHARD} tokens a rank, a training step, simulated")
    return figure


def _tokens(model: Model, s: Sweeps) -> Any:
    figure, axes = _figure(2)
    for m, y in s.tokens.items():
        rate = [t / SWEEP / seconds for t, seconds in zip(SWEEP_TOKENS, y, strict=True)]
        relative = [a / b for a, b in zip(s.tokens["data"], y, strict=True)]
        style = {"linestyle": "--" if m in SOFT else "-", "zorder": 1 if m == "data" else 2}
        if m not in (*SOFT, "data"):
            _line(axes[0], SWEEP_TOKENS, relative, m)
        if m in ("data", "allgather", "allscan", *SOFT):
            _line(axes[1], SWEEP_TOKENS, rate, m, **style)
    labels = [f"{t >> 10}K" if t < 2**20 else f"{t >> 20}M" for t in SWEEP_TOKENS]
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(SWEEP_TOKENS, labels)
        axis.set_xlabel(f"tokens of the sequence, over {SWEEP} ranks")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.05)
    axes[0].axhline(1, color="black", linestyle=":", linewidth=1)
    axes[0].set_ylabel("tokens/s of a rank, relative to no exchange")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("tokens/s of a rank")
    for axis in axes:
        axis.legend(fontsize=8, loc="lower right" if axis is axes[0] else "lower left")
    figure.suptitle(f"{model.name} and softmax attention of its width, a training step, simulated")
    return figure
