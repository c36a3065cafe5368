"""Results of `longscan bench gpu` as a table, a picture, and rows of bench/history.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longscan.bench.gpu_rows import OPS, OURS
from longscan.bench.measure import digits
from longscan.bench.report import commit, markdown

if TYPE_CHECKING:
    from longscan.bench.gpu import Measured


def line(m: Measured) -> str:
    """One result in a line."""
    where = f"{m.op} / {m.side} B{m.batch} T{m.length}"
    if m.why:
        return f"{where}: {m.why}"
    error = "" if m.error is None else f", error {m.error:.1e}"
    return (
        f"{where}: forward {digits(statistics.median(m.forward))} ms, with backward "
        f"{digits(statistics.median(m.train))} ms, {m.mib:.0f} MiB, first {m.first:.1f} s{error}"
    )


def floors(m: Measured) -> tuple[float, float]:
    """Milliseconds in which a copy would move the bytes that forward, and both, must move."""
    speed = float(m.about.get("bandwidth") or "nan")
    return m.bytes[0] / speed * 1e3, m.bytes[1] / speed * 1e3


def find(results: Sequence[Measured], op: str, side: str, batch: int, length: int):
    """The result of a row, if it has times."""
    key = (op, side, batch, length)
    found = [m for m in results if (m.op, m.side, m.batch, m.length) == key and m.forward]
    return found[-1] if found else None


def table(results: Sequence[Measured]) -> str:
    """A markdown table: each row in floors, beside ours, and beside attention of equal tokens."""
    head = [
        "op", "side", "sizes", "B", "T", "fwd ms", "fwd+bwd ms", "floors", "", "/ ours", "",
        "attention /", "", "MiB", "first s", "error",
    ]  # fmt: skip
    lines = []
    order = list(OPS)
    for m in sorted(results, key=lambda m: (order.index(m.op), m.length, m.side != OURS)):
        start = [m.op, m.side if m.op != "attention" else "cuDNN", OPS[m.op].sizes]
        start += [str(m.batch), str(m.length)]
        if not m.forward:
            lines.append([*start, m.why, *[""] * (len(head) - 6)])
            continue
        times = [statistics.median(m.forward), statistics.median(m.train)]
        ours = find(results, m.op, OURS, m.batch, m.length)
        soft = find(results, "attention", OURS, m.batch, m.length)
        cells = [digits(t) for t in times]
        cells += [digits(t / f) for t, f in zip(times, floors(m), strict=True)]
        for other, upside in ((ours, False), (soft, True)):
            if other is None or other is m:
                cells += ["", ""]
                continue
            beside = [statistics.median(other.forward), statistics.median(other.train)]
            pairs = zip(times, beside, strict=True)
            cells += [digits(b / a if upside else a / b) for a, b in pairs]
        cells += [f"{m.mib:.0f}", digits(m.first), "" if m.error is None else f"{m.error:.1e}"]
        lines.append([*start, *cells])
    return markdown(head, lines)


def history_rows(results: Sequence[Measured]) -> list[dict[str, str]]:
    """Two flat records a result, forward and train; those of a peer hold ours beside it."""
    rows = []
    for m in results:
        ours = None if m.op == "attention" else find(results, m.op, OURS, m.batch, m.length)
        peer = None if m.side == OURS and m.op != "attention" else m
        rows += [_record(m, ours, peer, mode, at) for at, mode in enumerate(("forward", "train"))]
    return rows


def _record(
    m: Measured, ours: Measured | None, peer: Measured | None, mode: str, at: int
) -> dict[str, str]:
    def times(prefix: str, x: Measured | None) -> dict[str, str]:
        ms = (x.forward, x.train)[at] if x is not None else []
        if not ms:
            return {f"{prefix}_ms": "", f"{prefix}_reps": "0"}
        return {
            f"{prefix}_ms": f"{statistics.median(ms):.5g}",
            f"{prefix}_ms_min": f"{min(ms):.5g}",
            f"{prefix}_ms_max": f"{max(ms):.5g}",
            f"{prefix}_reps": str(len(ms)),
        }

    def mib(x: Measured | None) -> float:
        return x.mib if x is not None and x.forward else 0.0

    mine, theirs = times("ours", ours), times("peer", peer)
    ratio = ""
    if mine["ours_ms"] and theirs["peer_ms"]:
        ratio = f"{float(theirs['peer_ms']) / float(mine['ours_ms']):.5g}"
    name = "cudnn" if m.op == "attention" else m.side
    about = {k: v for k, v in m.about.items() if k not in ("bandwidth", "peer")}
    if about and not about.get("commit"):
        about["commit"] = commit()
    return {
        **about,
        "row": f"{m.op}-{name}" if peer is not None else m.op,
        "mode": mode,
        "shape": f"B={m.batch} T={m.length} {OPS[m.op].sizes}",
        **mine,
        **theirs,
        "ratio": ratio,
        "ours_mib": f"{mib(ours):.5g}" if mib(ours) else "",
        "peer_mib": f"{mib(peer):.5g}" if mib(peer) else "",
        "memory_ratio": f"{mib(ours) / mib(peer):.5g}" if mib(ours) and mib(peer) else "",
        "error": "" if m.error is None else f"{m.error:.5g}",
        "note": m.why,
        "floor_ms": f"{floors(m)[at]:.5g}" if m.forward else "",
        "first_s": f"{m.first:.4g}" if m.forward else "",
        "peer_version": m.about.get("peer", "") if peer is not None else "",
    }


def plot(results: Sequence[Measured], path: Path) -> None:
    """Time against length, forward and with backward; attention is drawn dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, what in zip(axes, ("forward", "train"), strict=True):
        for op in OPS:
            for side in [OURS, *OPS[op].peers]:
                rows = [m for m in results if m.op == op and m.side == side and m.forward]
                rows.sort(key=lambda m: m.length)
                if len(rows) < 2:
                    continue
                # Per token, as a row of 32768 tokens holds twice as many as the others.
                each = [
                    1e6 * statistics.median(getattr(m, what)) / (m.batch * m.length) for m in rows
                ]
                style = "k--" if op == "attention" else ("-o" if side == OURS else ":x")
                label = "softmax attention (cuDNN)" if op == "attention" else f"{op}, {side}"
                axis.plot([m.length for m in rows], each, style, label=label, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="ns a token")
        axis.set_title("forward" if what == "forward" else "forward and backward")
        axis.set_xticks(sorted({m.length for m in results}))
        axis.set_xticklabels([str(t) for t in sorted({m.length for m in results})], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
