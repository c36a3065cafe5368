"""Results of `longscan bench parallel` as tables, a page, pictures, and rows of the history."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from longscan.bench.gpu_models import SOFT
from longscan.bench.measure import digits
from longscan.bench.parallel_group import Row, of, trained
from longscan.bench.parallel_models import LINEAR
from longscan.bench.parallel_predict import simulated
from longscan.bench.parallel_train import DATA, EACH, GOALS
from longscan.bench.report import commit, markdown
from longscan.parallel.cost import Element, Tokens
from longscan.parallel.cost import received as formula
from longscan.parallel.scan import METHODS


def goal(r: Row) -> float | None:
    """The least SP / DP that this row should have."""
    here = r["size"] == "340m" and r["tokens"] == EACH["340m"] * r["ranks"]
    return GOALS.get(r["case"]) if here and r["method"] != DATA else None


def failed(r: Row) -> bool:
    """Whether a row shows something wrong: a goal of speed that is missed is not."""
    ended = r["part"] != "longest" and bool(r.get("why"))
    return r.get("met") is False or ended


def numbers(r: Row) -> str:
    """Those that decide, in words."""
    words = [f"error {r['error']:.2g}, limit {r['limit']:g}"] if "error" in r else []
    words += [f"loss off by {r['loss']:.2g}"] if isinstance(r.get("loss"), float) else []
    words += [f"worst in {r['worst']}"] if r.get("worst") else []
    if r.get("control"):
        words.append(f"{r['control']:.2g} without any exchange")
    return "; ".join(words)


def tables(rows: Sequence[Row]) -> str:
    """All that there is to say, in markdown."""
    parts = [
        correctness(rows), exchanges(rows), training(rows), longest(rows), fsdp(rows),
        counted(rows), waited(rows), losses(rows),
    ]  # fmt: skip
    return "\n\n".join(p for p in parts if p)


def losses(rows: Sequence[Row]) -> str:
    """Rows without a number."""
    return "\n".join(f"- {r['name']}: {r['why']}" for r in rows if r.get("why"))


def correctness(rows: Sequence[Row]) -> str:
    """The error of every method; beside it bfloat16's own, and what no exchange would give."""
    found = of(rows, "correctness")
    if not found:
        return ""
    groups: dict[tuple, dict[str, Row]] = {}
    for r in found:
        groups.setdefault((r["case"], r["dtype"], r["mode"], r["ranks"]), {})[r["method"]] = r
    lines = []
    for (case, dtype, mode, ranks), by in groups.items():
        one = next(iter(by.values()))
        errors = [f"{max(by[m]['error'], by[m]['loss']):.1e}" if m in by else "" for m in METHODS]
        lines.append([
            case, dtype, mode, str(ranks), *errors, f"{one['limit']:g}",
            "met" if all(r["met"] for r in by.values()) else "NOT met",
            f"{one['own']:.1e}" if one["own"] else "",
            f"{one['control']:.1e}" if one["control"] else "",
        ])  # fmt: skip
    head = ["model", "dtype", "rows", "P", *METHODS, "limit", "", "bf16 itself", "no exchange"]
    return markdown(head, lines)


def exchanges(rows: Sequence[Row]) -> str:
    """Measured beside the cost model."""
    found = [r for r in of(rows, "exchange") if "case" in r]
    lines = []
    for r in found:
        told = r.get("predicted")
        lines.append([
            r["case"], r["method"], str(r["blocks"]), str(r["ranks"]),
            f"{r['state'] / 2**20:.3g}", f"{r['transition'] / 2**20:.3g}",
            f"{1e3 * r['seconds']:.3g} ({1e3 * r['least']:.3g}-{1e3 * r['most']:.3g})",
            f"{1e3 * told:.3g}" if told else "", digits(r["seconds"] / told) if told else "",
        ])  # fmt: skip
    if not found:
        return ""
    head = ["layer of", "method", "blocks", "P", "state MiB", "A MiB", "measured ms", "model ms",
            "ratio"]  # fmt: skip
    links = [r for r in of(rows, "exchange") if "link" in r]
    words = [f"P = {r['ranks']}, {r['about']}: a message {_link(r['link'])}, a hop of a gather "
             f"{_link(r['gather'])}." for r in links]  # fmt: skip
    return "\n\n".join([markdown(head, lines), *words])


def _link(x: dict[str, float]) -> str:
    return f"{1e6 * x['latency']:.3g} us and {x['bandwidth'] / 1e9:.3g} GB/s"


def rates(rows: Sequence[Row]) -> dict[tuple, float]:
    """Tokens a second of data parallel rows."""
    return {
        (r["case"], r["tokens"], r["ranks"], r["device"]): r["tokens_s"]
        for r in trained(rows)
        if r["method"] == DATA
    }


def ratio(r: Row, data: dict[tuple, float]) -> float | None:
    """Tokens a second relative to data parallel."""
    other = data.get((r["case"], r["tokens"], r["ranks"], r["device"]))
    return r["tokens_s"] / other if other else None


def training(rows: Sequence[Row]) -> str:
    """Each method beside data parallel."""
    found = trained(rows)
    if not found:
        return ""
    data, told = rates(rows), simulated(rows)
    order = {m: i for i, m in enumerate((*LINEAR, SOFT))}
    found = sorted(found, key=lambda r: (r["ranks"], order[r["case"]], r["tokens"]))
    lines = []
    for r in found:
        x, want, guess = ratio(r, data), goal(r), told.get(r["name"])
        lines.append([
            r["case"], str(r["ranks"]), str(r["tokens"]), r["method"],
            f"{1e3 * statistics.median(r['seconds']):.4g}", f"{r['tokens_s']:,.0f}",
            f"{x:.3f}" if x else "", f">= {want:g}" if want else "",
            ("met" if x >= want else "NOT met") if want and x else "",
            f"{guess:.3f}" if guess else "", f"{r['mib']:.0f}",
            "yes" if r["computed_again"] else "no",
        ])  # fmt: skip
    head = ["model", "P", "tokens", "method", "ms", "tokens/s", "/ data", "goal", "", "simulated",
            "MiB", "checkpointed"]  # fmt: skip
    return markdown(head, lines)


def longest(rows: Sequence[Row]) -> str:
    """The longest that ran, and what stopped the next."""
    found = [r for r in rows if r["part"] == "longest"]
    lines = []
    for case in dict.fromkeys(r["name"].split("/")[1] for r in found):
        mine = [r for r in found if r["name"].split("/")[1] == case]
        ran = [r for r in mine if not r.get("why")]
        ended = [r["why"] for r in mine if r.get("why")]
        if not ran:
            lines.append([case, "", "", "", "", "", *(ended or [""])])
            continue
        r = max(ran, key=lambda r: r["tokens"])
        lines.append([
            case, r["method"], str(r["ranks"]), str(r["tokens"]), f"{r['tokens_s']:,.0f}",
            f"{r['mib']:.0f}", "; ".join(ended),
        ])  # fmt: skip
    head = ["model", "method", "P", "longest", "tokens/s", "MiB", "twice as many"]
    return markdown(head, lines) if lines else ""


def fsdp(rows: Sequence[Row]) -> str:
    """FSDP2 with shared sequences, beside data parallel."""
    data = rates(rows)
    lines = []
    for r in of(rows, "fsdp"):
        x = ratio(r, data)
        pairs = "; ".join(f"{a:.4f} {b:.4f}" for a, b in zip(*r["losses"], strict=True))
        lines.append([
            r["case"], str(r["ranks"]), str(r["tokens"]), r["method"], f"{r['tokens_s']:,.0f}",
            f"{x:.3f}" if x else "", f"{r['mib']:.0f}", pairs, f"{r['error']:.1e}",
            "met" if r["met"] else "NOT met",
        ])  # fmt: skip
    head = ["model", "P", "tokens", "method", "tokens/s", "/ data", "MiB",
            "losses: data, this", "difference", f"<= {2e-3:g}"]  # fmt: skip
    return markdown(head, lines) if lines else ""


def counted(rows: Sequence[Row]) -> str:
    """Bytes that a rank receives in a layer, counted, and by the sheets' formulas."""
    found = of(rows, "received")
    if not found:
        return ""
    ranks = sorted({r["ranks"] for r in found})
    lines = []
    for case in dict.fromkeys(r["case"] for r in found):
        for method in dict.fromkeys(r["method"] for r in found if r["case"] == case):
            by = {r["ranks"]: r for r in found if (r["case"], r["method"]) == (case, method)}
            for way in ("forward", "backward"):
                cells = [f"{by[p][way]:,.0f}" if p in by else "" for p in ranks]
                lines.append([case, method, way, "counted", *cells])
        one = {r["ranks"]: r for r in found if r["case"] == case}
        for name, method in FORMULAS[case == SOFT]:
            for way in ("forward", "backward")[: 1 + (case == SOFT)]:
                cells = [f"{_formula(method, one[p], way):,.0f}" if p in one else "" for p in ranks]
                lines.append([case, name, way, "formula", *cells])
    return markdown(["layer", "method", "", "", *(f"P = {p}" for p in ranks)], lines)


FORMULAS = {
    False: (
        ("LASP-1", "lasp"), ("LASP-2", "allgather"), ("ZeCO", "allscan"),
        ("doubling", "doubling"), ("hierarchical", "hierarchical"),
    ),
    True: (("Ring Attention", "ring_attention"), ("Ulysses", "ulysses"), ("LASP-2H", "lasp2h")),
}  # fmt: skip
"""Of linear layers, and of softmax layers."""


def _formula(method: str, r: Row, way: str) -> float:
    if r["case"] == SOFT:
        tokens = Tokens(r["tokens"], r["d_model"], itemsize=r["itemsize"])
        return formula(method, r["ranks"], tokens, backward=way == "backward")
    more = {"per_host": r["per_host"]} if method == "hierarchical" else {}
    return formula(method, r["ranks"], Element(r["state"], r["transition"]), **more)


def waited(rows: Sequence[Row]) -> str:
    """How much of the exchanges ran beside other work."""
    words = [
        f"{r['method']}, {r['ranks']} processes: of the time of exchanges ranks worked on in "
        + ", ".join(f"{100 * x:.0f} %" for x in r["hidden"]) + "."
        for r in of(rows, "timeline")
    ]  # fmt: skip
    return "\n".join(words)


# --- the page -------------------------------------------------------------------------------


def section(rows: Sequence[Row]) -> str:
    """What stands between the markers of docs/scaling.md."""
    devices = ", ".join(sorted({f"{r['ranks']} x {r['device']}" for r in trained(rows)}))
    parts = ["## Measured", "Written by `longscan bench parallel --write docs`."]
    named = (
        ("### Equal to one device", correctness(rows),
         "Largest error of a loss or a gradient, relative to its largest entry, with unequal "
         "shards. `bf16 itself`: the unsharded model in bfloat16 against itself in float32; `no "
         "exchange`: shards treated as sequences of their own."),
        ("### An exchange", exchanges(rows),
         "Of the states of one layer of a 340M model; the model's latency and bandwidth are fitted "
         "to messages of 1 KiB to 16 MiB."),
        (f"### Training: {devices}" if devices else "", training(rows),
         "340M models, bfloat16 autocast, fused AdamW, one all-reduce of gradients. `data`: each "
         "rank has a sequence of its own, P times shorter, of as many tokens, which makes softmax "
         "attention cheaper. `simulated`: by `longscan bench scaling` with these links."),
        ("### The longest sequence", longest(rows), "Blocks are computed again in the backward."),
        ("### With FSDP2", fsdp(rows),
         "Parameters and sequences are spread over the same ranks."),
        ("### Bytes received", counted(rows),
         "Of a layer of tiny models, by the rank that receives most; over gloo, in float32."),
        ("### When exchanges run", waited(rows),
         "A training step of a GLA model on processes of one CPU: the exchange has a lane below "
         "that of the rank's own work.\n\n![Time line of four ranks](scaling_timeline.png)"),
    )  # fmt: skip
    for head, table, words in named:
        if table:
            *first, picture = words.split("\n\n") if "\n\n" in words else (words, "")
            parts += [head, textwrap.fill(first[0], 100), *([picture] if picture else []), table]
        if table and head.startswith("### Training"):
            parts.append("![SP / DP against tokens](scaling_gpus.png)")
    why = losses(rows)
    return "\n\n".join([*parts, *(["### Without a result", why] if why else [])])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second relative to data parallel against tokens, a panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, data = trained(rows), rates(rows)
    cases = [c for c in (*LINEAR, SOFT) if any(r["case"] == c for r in found)]
    figure = Figure(figsize=(3.6 * len(cases), 3.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for axis, case in zip(axes, cases, strict=True):
        mine = [r for r in found if r["case"] == case and r["method"] != DATA]
        for method in dict.fromkeys(r["method"] for r in mine):
            points = sorted(
                (r["tokens"], x) for r in mine if r["method"] == method and (x := ratio(r, data))
            )
            if points:
                axis.plot(*zip(*points, strict=True), "-o", markersize=4, label=method)
        axis.axhline(1, color="black", linewidth=0.7)
        if case in GOALS:
            axis.axhline(GOALS[case], color="grey", linewidth=0.7, linestyle="--")
        axis.set(xscale="log", title=case, xlabel="tokens", ylabel="tokens/s, SP / DP")
        at = sorted({r["tokens"] for r in mine})
        axis.set_xticks(at, [f"{t // 1024}k" for t in at])
        axis.minorticks_off()
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- bench/history.csv ----------------------------------------------------------------------


def history_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One flat record a result. Of training `ours` is the method and `peer` data parallel; of an
    exchange `peer` is the cost model."""
    about = {r["name"].removeprefix("about/"): r["about"] for r in rows if r["part"] == "about"}
    data = rates(rows)
    out = []
    for r in rows:
        if r["part"] in ("about", "timeline", "received") or "link" in r:
            continue
        seconds = r.get("seconds", [])
        seconds = seconds if isinstance(seconds, list) else [seconds]
        base = {k: v for k, v in about.get(r.get("run", ""), {}).items() if k != "run"}
        base["commit"] = base.get("commit") or commit()
        base["device"] = r.get("device", base.get("device", ""))
        x = ratio(r, data) if r["part"] in ("training", "fsdp") and not r.get("why") else None
        mode, target = r["part"], ""
        other = r["tokens"] / r["tokens_s"] * x if x else r.get("predicted")
        if x and (want := goal(r)):
            target = f"{want:g}"
        elif "limit" in r:
            target = f"{r['limit']:g}"
        shape = [f"P={r['ranks']}", f"T={r['tokens']}" if "tokens" in r else ""]
        shape += [r.get("dtype", ""), r.get("mode", ""), r["size"]]
        shape += [f"blocks={r['blocks']}"] if "blocks" in r else []
        times = {
            "ours_ms": f"{1e3 * statistics.median(seconds):.5g}",
            "ours_ms_min": f"{1e3 * r.get('least', min(seconds)):.5g}",
            "ours_ms_max": f"{1e3 * r.get('most', max(seconds)):.5g}",
        } if seconds else {}  # fmt: skip
        if r["part"] == "exchange" and other and seconds:
            x = other / seconds[0]
        named = r["name"].split("/")[1:3]
        if r["part"] == "correctness":
            named = [named[0], r.get("method", "")]
        out.append({
            **base, "row": "-".join(["parallel", *named]),
            "mode": mode, "shape": " ".join(p for p in shape if p), **times,
            "ours_reps": str(len(seconds)),
            "peer_ms": f"{1e3 * other:.5g}" if other else "",
            "ratio": f"{x:.5g}" if x else "", "target": target,
            "ours_mib": f"{r['mib']:.5g}" if r.get("mib") else "",
            "error": f"{r['error']:.5g}" if "error" in r else "", "note": r.get("why", ""),
            "first_s": f"{r['first']:.4g}" if "first" in r else "",
            "tokens_s": f"{r['tokens_s']:.6g}" if "tokens_s" in r else "",
        })  # fmt: skip
    return out
