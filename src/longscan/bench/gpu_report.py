"""Results of `longscan bench gpu` as tables, a picture, and rows of bench/history.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.bench.gpu_models import SIZES, SOFT
from longscan.bench.gpu_rows import OPS, OURS
from longscan.bench.gpu_targets import (
    TARGETS,
    beside,
    find,
    floors,
    middle,
    newest,
    times,
    tokens_per_second,
    verdicts,
)  # fmt: skip
from longscan.bench.measure import digits
from longscan.bench.report import commit, markdown

if TYPE_CHECKING:
    from longscan.bench.gpu_measure import Measured

SETTINGS = (
    "Weights and gradients in float32, products and activations in bfloat16 by autocast, all "
    "activations kept, fused AdamW, random tokens. Attention is Llama's block: heads of 128 (keys "
    "and values not grouped), rotary positions, RMSNorm, SwiGLU 8/3 as wide, untied tables."
)
"""Of the models."""


def line(m: Measured) -> str:
    """One result in a line."""
    where = f"{m.op} / {m.side} B{m.batch} T{m.length}"
    if m.why:
        return f"{where}: {m.why}"
    if m.op in SIZES:
        return (
            f"{where}: {digits(middle(m.train))} ms a step, {tokens_per_second(m):,.0f} tokens/s, "
            f"{m.mib:.0f} MiB, in {m.more['pieces']} piece(s)"
        )
    if not m.forward:
        return f"{where}: {m.first:.2f} s"
    parts = [f"forward {digits(middle(m.forward))} ms"]
    if m.train:
        parts.append(f"with backward {digits(middle(m.train))} ms")
    if m.graph[0]:
        parts.append("as graphs " + " / ".join(digits(t) for t in m.graph if t))
    why = m.more.get("graph") or m.more.get("replay")
    if why:
        parts.append(f"no graph ({why[:80]})")
    parts.append(f"{m.mib:.0f} MiB")
    if m.first:
        parts.append(f"first {m.first:.1f} s")
    if m.error is not None:
        parts.append(f"error {m.error:.1e}")
    return f"{where}: {', '.join(parts)}"


def tables(results: Sequence[Measured]) -> str:
    """All that there is to say, in markdown."""
    ops = [m for m in results if m.op in OPS and m.side not in ("cold", "again")]
    models = [m for m in results if m.op in SIZES]
    colds = [m for m in newest(results) if m.side in ("cold", "again")]
    parts = [table(ops) if ops else "", model_table(models) if models else ""]
    parts += [cold_table(colds) if colds else "", target_table(results)]
    return "\n\n".join(p for p in parts if p)


def table(results: Sequence[Measured]) -> str:
    """Each row in floors, beside ours, and beside attention of equal tokens."""
    head = [
        "op", "side", "sizes", "B", "T", "fwd ms", "fwd+bwd ms", "graph fwd", "graph both",
        "floors", "", "/ ours", "", "attention /", "", "MiB", "MiB / ours", "first s", "error",
    ]  # fmt: skip
    lines = []
    order = list(OPS)
    rows = sorted(newest(results), key=lambda m: (order.index(m.op), m.length, m.side != OURS))
    for m in rows:
        start = [m.op, m.side if m.op != "attention" else "cuDNN", OPS[m.op].sizes]
        start += [str(m.batch), str(m.length)]
        if not m.forward:
            lines.append([*start, m.why[:60], *[""] * (len(head) - 6)])
            continue
        called, graph = times(m).values()
        ours = find(results, m.op, OURS, m.batch, m.length, m.run)
        soft = None
        if not OPS[m.op].step:
            soft = find(results, "attention", OURS, m.batch, m.length, m.run)
        cells = [number(t) for t in (*called, *graph)]
        cells += [number(t / f) if f else "" for t, f in zip(called, floors(m), strict=True)]
        for other, upside in ((ours, False), (soft, True)):
            if other is None or other is m:
                cells += ["", ""]
                continue
            pairs = zip(called, times(other)["called"], strict=True)
            cells += [number(b / a if upside else a / b) for a, b in pairs]
        cells.append(f"{m.mib:.0f}")
        cells.append(number(m.mib / ours.mib) if ours and ours is not m and ours.mib else "")
        cells += [number(m.first), "" if m.error is None else f"{m.error:.1e}"]
        lines.append([*start, *cells])
    return markdown(head, lines)


def number(x: float) -> str:
    """Three digits; nothing for 0 and what is not a number."""
    return digits(x) if x > 0 else ""


def model_table(results: Sequence[Measured]) -> str:
    """Training of models; utilisation: the operations that a step needs, over those that a large
    product would do in its time."""
    head = [
        "size", "mixer", "blocks", "parameters", "B", "T", "pieces", "compiled", "ms", "tokens/s",
        "/ attention", "utilisation", "MiB", "attention by",
    ]  # fmt: skip
    lines = []
    order = list(SIZES)
    for m in sorted(
        newest(results), key=lambda m: (order.index(m.op), m.length, SOFT not in m.side, m.side)
    ):
        if not m.train:
            blank = [""] * 8
            lines.append(
                [m.op, m.side, "", "", str(m.batch), str(m.length), *blank[1:], m.why[:90]]
            )
            continue
        soft = beside(m, results)
        ratio = middle(soft.train) / middle(m.train) if soft else 0.0
        used = m.more["flops"] / (middle(m.train) / 1e3) / m.more["peak_flops"]
        lines.append([
            m.op, m.side, str(m.more["blocks"]), f"{m.more['parameters'] / 1e6:.0f} M",
            str(m.batch), str(m.length), str(m.more["pieces"]),
            "blocks" if m.more["compiled"] else "no", digits(middle(m.train)),
            f"{tokens_per_second(m):,.0f}", number(ratio), number(used), f"{m.mib:.0f}",
            m.more.get("attention", ""),
        ])  # fmt: skip
    return f"{markdown(head, lines)}\n\n{SETTINGS}"


def cold_table(results: Sequence[Measured]) -> str:
    """Seconds of first calls, with nothing compiled and with all."""
    names = list(dict.fromkeys(m.op for m in results))
    by = {(m.op, m.side): m for m in results}
    lines = []
    for name in names:
        cells = [by.get((name, side)) for side in ("cold", "again")]
        lines.append([name, *("" if m is None else m.why or f"{m.first:.2f}" for m in cells)])
    totals = [sum(m.first for m in results if m.side == side) for side in ("cold", "again")]
    lines.append(["all", *(f"{t:.2f}" for t in totals)])
    return markdown(["first call of", "nothing compiled, s", "in a new process, s"], lines)


def target_table(results: Sequence[Measured]) -> str:
    """Targets, and whether they are met."""
    found = verdicts(results)
    if not found:
        return ""
    lines = [
        [v.what, v.quantity, v.by, digits(v.ours), digits(v.beside), v.unit, digits(v.got),
         ("<= " if v.most else ">= ") + f"{v.asked:g}", "met" if v.met else "NOT met", v.source]
        for v in found
    ]  # fmt: skip
    head = ["ours / beside", "of", "by", "ours", "beside", "", "ratio", "target", "",
            "beside measured in"]  # fmt: skip
    met = []
    for by, words in (("called", "called from Python"), ("graph", "as CUDA graphs"), ("", "other")):
        some = [v.met for v in found if v.by == by]
        met += [f"{sum(some)} of {len(some)} ({words})"] if some else []
    return f"{markdown(head, lines)}\n\nTargets met: {', '.join(met)}."


def target_page(results: Sequence[Measured]) -> str:
    """The table of targets as a page, with where and when they were measured."""
    where = sorted({f"{m.about['device']}, {m.run}" for m in results if m.about})
    return (
        "<!-- Written by `longscan bench gpu --targets`. -->\n\n# Targets of the GPU kernels\n\n"
        "Time of ours beside that of a peer, of softmax attention by cuDNN or of the floor (the "
        "fewest bytes over the bandwidth of a copy), forward, or forward with backward to all "
        "inputs, called from Python and replayed as a CUDA graph; bfloat16. The ratio is beside / "
        "ours, or ours / beside where the target is an upper bound. What stands behind those not "
        f"met is in [the log](LOG.md).\n\nMeasured on: {'; '.join(where)}.\n\n"
        f"{target_table(results)}\n"
    )


# --- bench/history.csv ----------------------------------------------------------------------


def history_rows(results: Sequence[Measured]) -> list[dict[str, str]]:
    """One flat record a result: times of forward with backward in the columns that all commands
    have, those of forward beside; records of a peer hold ours as well. First calls are summed."""
    rows = newest(results)
    cold = [m for m in rows if m.side in ("cold", "again")]
    totals = [
        replace(ms[0], op="all", first=sum(m.first for m in ms))
        for side in ("cold", "again")
        if (ms := [m for m in cold if m.side == side])
    ]
    return [_record(m, results) for m in (*(m for m in rows if m not in cold), *totals)]


def _record(m: Measured, results: Sequence[Measured]) -> dict[str, str]:
    soft = (m.op in SIZES and m.side.startswith(SOFT)) or m.op == "attention"
    if m.op in SIZES:
        ours: Measured | None = None if soft else m
        peer = beside(m, results)
        name, mode = f"{m.op}-{m.side}", "train"
        sizes = f"{m.more['parameters'] / 1e6:.0f}M" if m.train else ""
    else:
        single = m.side in (OURS, "cold", "again")
        ours = m if single else find(results, m.op, OURS, m.batch, m.length, m.run)
        peer = None if single else m
        if soft:
            ours, peer = None, m
        name = m.op if single and not soft else f"{m.op}-{'cudnn' if soft else m.side}"
        mode = m.side if m.side in ("cold", "again") else "train"
        mode = "decode" if m.op in OPS and OPS[m.op].step else mode
        sizes = OPS[m.op].sizes if m.op in OPS else ""
    about = {k: v for k, v in m.about.items() if k not in ("bandwidth", "peer", "run")}
    if about and not about.get("commit"):
        about["commit"] = commit()
    mine, theirs = _times("ours", ours), _times("peer", peer)
    target = TARGETS.get((m.op, m.side))
    ratio, forward = _ratio(mine, theirs, "ms"), _ratio(mine, theirs, "forward_ms")
    mib = [f"{x.mib:.5g}" if x is not None and x.mib else "" for x in (ours, peer)]
    floor = floors(m)
    return {
        **about,
        "row": name,
        "mode": mode,
        "shape": f"B={m.batch} T={m.length} {sizes}".strip(),
        **mine,
        **theirs,
        "ratio": ratio or forward,
        "target": f"{target.train:g}" if target and m.train else "",
        "ours_mib": mib[0],
        "peer_mib": mib[1],
        "memory_ratio": f"{float(mib[0]) / float(mib[1]):.5g}" if all(mib) else "",
        "error": "" if m.error is None else f"{m.error:.5g}",
        "note": m.why,
        "forward_ratio": forward,
        "floor_ms": f"{floor[bool(m.train)]:.5g}" if m.forward else "",
        "graph_ms": f"{m.graph[bool(m.train)]:.5g}" if m.graph[bool(m.train)] else "",
        "first_s": f"{m.first:.4g}" if m.first else "",
        "tokens_s": f"{tokens_per_second(m):.6g}" if m.op in SIZES and m.train else "",
        "peer_version": m.about.get("peer", ""),
    }


def _times(side: str, m: Measured | None) -> dict[str, str]:
    ms = (m.train or m.forward) if m is not None else []
    if m is None or not ms:
        return {f"{side}_ms": "", f"{side}_reps": "0", f"{side}_forward_ms": ""}
    return {
        f"{side}_ms": f"{statistics.median(ms):.5g}",
        f"{side}_ms_min": f"{min(ms):.5g}",
        f"{side}_ms_max": f"{max(ms):.5g}",
        f"{side}_reps": str(len(ms)),
        f"{side}_forward_ms": f"{statistics.median(m.forward):.5g}" if m.forward else "",
    }


def _ratio(mine: dict[str, str], theirs: dict[str, str], what: str) -> str:
    a, b = mine[f"ours_{what}"], theirs[f"peer_{what}"]
    return f"{float(b) / float(a):.5g}" if a and b else ""


# --- a picture ------------------------------------------------------------------------------


FAMILIES = {
    "decays": ("decay", "gla"),
    "delta rule": ("deltanet", "gated_deltanet", "kda"),
    "Mamba": ("mamba2", "mamba"),
    "mLSTM": ("mlstm", "mlstm 7B"),
}
"""Of the picture: a column each, with attention in all."""


def plot(results: Sequence[Measured], path: Path) -> None:
    """Time against length, forward and with backward, by calls and as CUDA graphs (thin);
    attention is drawn dashed, peers dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(FAMILIES), sharex=True, sharey="row")
    lengths = sorted({m.length for m in results if m.op in OPS and m.forward and m.length > 1})
    for column, (family, ops) in enumerate(FAMILIES.items()):
        for i, op in enumerate((*ops, "attention")):
            drawn = [m for m in newest(results) if m.op == op and m.forward]
            for side in dict.fromkeys(m.side for m in drawn):
                rows = sorted((m for m in drawn if m.side == side), key=lambda m: m.length)
                for row in (0, 1):
                    _draw(axes[row, column], row, rows, "black" if op == "attention" else f"C{i}")
        axes[0, column].set_title(family)
        axes[0, column].legend(fontsize=7)
        axes[1, column].set_xlabel("tokens of a sequence")
    for row, words in enumerate(("forward", "forward and backward")):
        axes[row, 0].set_ylabel(f"{words}, ns a token")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log", xticks=lengths)
        axis.set_xticklabels([str(t) for t in lengths], fontsize=7, rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    device = next((m.about["device"] for m in results if m.about.get("device")), "")
    figure.suptitle(f"{device}, bfloat16; thin: replayed as CUDA graphs", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw(axis: Any, at: int, rows: Sequence[Measured], colour: str) -> None:
    """The lines of a side of an op; at: 0 forward, 1 with backward."""
    if not rows:
        return
    op, side = rows[0].op, rows[0].side
    soft = op == "attention"
    style = "--" if soft else ("-o" if side == OURS else ":x")
    label = "softmax attention (cuDNN)" if soft else f"{op}, {side}"
    for by, width in (("called", 1.6), ("graph", 0.7)):
        # Per token, as a row of 32768 tokens holds twice as many as the others.
        points = [(m.length, 1e6 * times(m)[by][at] / (m.batch * m.length)) for m in rows]
        points = [p for p in points if p[1] > 0]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4,
                      linewidth=width, alpha=0.6 if by == "graph" else 1.0,
                      label=label if by == "called" else None)  # fmt: skip
