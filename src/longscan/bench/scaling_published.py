"""Ratios that papers publish beside what the simulation gives, and what decides them.

Nothing here is fitted: where a ratio comes out otherwise, the value of the assumption that would
give it is solved for and told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from longscan.bench.measure import digits
from longscan.bench.report import markdown
from longscan.bench.scaling_cases import A100, GLA, H100, all_cards, alone
from longscan.bench.scaling_exchange import Calibration
from longscan.bench.scaling_report import paragraph
from longscan.bench.scaling_step import Model, step
from longscan.parallel.cost import Link

LLAMA = Model(
    "Linear-Llama3 1B", 1.0e9, 16, 2048, 16, 128, 128, "none",
    "16 layers, 1B parameters; heads of 128 assumed: a state of 1 MiB",
)  # fmt: skip
LASP2, ZECO = "LASP-2 (arXiv 2502.07563)", "ZeCO (arXiv 2507.01004)"


@dataclass(frozen=True)
class Row:
    """One published number. simulated: by variant; needed: what would give the number."""

    source: str
    what: str
    published: float
    simulated: dict[str, float]
    needed: str
    unit: str = "%"

    @property
    def verdict(self) -> str:
        """Whether a variant gives the number within a tenth of it, or two enclose it."""
        values = self.simulated.values()
        if any(abs(v - self.published) <= 0.1 * self.published for v in values):
            return "yes"
        return "in between" if min(values) < self.published < max(values) else "no"


def solve(f: Callable[[float], float], goal: float, low: float, high: float) -> float | None:
    """Where f, which rises or falls all the way from low to high, is the goal, to 1 %; None if it
    is not between."""
    a, b = f(low) - goal, f(high) - goal
    if a * b > 0:
        return None
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        c = f(middle) - goal
        low, high = (middle, high) if a * c > 0 else (low, middle)
    return math.sqrt(low * high)


def gain(model: Model, c: Calibration, fast: str, slow: str, ranks: int, tokens: int,
         together: bool = False) -> float:  # fmt: skip
    """How many percent more tokens a second `fast` gives than `slow`."""
    times = [step(model, c, m, ranks, tokens, together=together).seconds for m in (slow, fast)]
    return 100 * (times[0] / times[1] - 1)


def _serial(c: Calibration, share: float) -> Calibration:
    assert c.compute is not None
    return replace(c, compute=replace(c.compute, parts=(share / 3,) * 3))


def _gather(c: Calibration, bandwidth: float) -> Calibration:
    return replace(c, gather=Link(c.outer.latency, bandwidth))


def _latency(c: Calibration, latency: float) -> Calibration:
    return replace(
        c, inner=replace(c.inner, latency=latency), outer=replace(c.outer, latency=latency)
    )


def _no_scores(c: Calibration, bandwidth: float | None = None) -> Calibration:
    assert c.compute is not None
    c = replace(c, compute=replace(c.compute, scores=math.inf))
    if bandwidth is None:
        return c
    link = Link(c.outer.latency, bandwidth)
    return replace(c, inner=link, outer=link)


def over_lasp(tokens: int, published: float, note: str = "") -> Row:
    """LASP-2 over LASP-1 on 64 ranks."""
    at = (64, tokens)
    share = solve(
        lambda x: gain(LLAMA, _serial(A100, x), "allgather", "lasp", *at), published, 1e-3, 0.5
    )
    needed = "" if share is None else f"; {digits(100 * share)} % gives the number"
    return Row(
        LASP2, f"over LASP, {tokens >> 10}K tokens, 64 GPUs{note}", published,
        {
            "all mixing in series": gain(LLAMA, A100, "allgather", "lasp", *at),
            "without what needs no state": gain(LLAMA, A100, "allgather", "lasp_early", *at),
            "messages alone": gain(LLAMA, A100, "allgather", "relay", *at),
        },
        f"how much of a layer LASP runs rank after rank (assumed: 9 %{needed})",
    )  # fmt: skip


def over_ring(tokens: int, published: float, note: str = "") -> Row:
    """LASP-2 over Ring Attention on 64 ranks."""
    base = step(LLAMA, A100, "allgather", 64, tokens).seconds

    def more(c: Calibration) -> float:
        return 100 * (step(LLAMA, c, "ring_attention", 64, tokens).seconds / base - 1)

    link = solve(lambda x: more(_no_scores(A100, x)), published, 1e9, 1e14)
    needed = (
        "" if link is None else f", nor one of K and V unless {digits(link / 1e9)} GB/s join ranks"
    )
    states = 100 * (step(LLAMA, A100, "ring", 64, tokens).seconds / base - 1)
    return Row(
        LASP2, f"over Ring Attention, {tokens >> 10}K tokens, 64 GPUs{note}", published,
        {
            "softmax scores": more(A100),
            "a ring of K and V, scores free": more(_no_scores(A100)),
        },
        "what the baseline is: with scores of all pairs of tokens it cannot be a ring of exact "
        f"attention{needed}; a ring that carries states gives {_number(states, '%')}",
    )  # fmt: skip


def over_lasp2() -> Row:
    """ZeCO over LASP-2 on 256 ranks."""
    at = (256, 2**23)
    cards = all_cards(H100)
    needed = solve(
        lambda x: gain(GLA, _gather(H100, x), "allscan", "allgather", *at), 60, 40e9, 1e12
    )
    return Row(
        ZECO, "over LASP-2, 8M tokens, 256 GPUs (published: more than)", 60,
        {
            "one card for a gather": gain(GLA, H100, "allscan", "allgather", *at),
            "the same, ranks wait at each layer":
                gain(GLA, H100, "allscan", "allgather", *at, together=True),
            "eight cards": gain(GLA, cards, "allscan", "allgather", *at),
            "eight cards, ranks wait": gain(GLA, cards, "allscan", "allgather", *at, together=True),
        },
        "the bandwidth at which an all-gather reaches a rank (40 GB/s with one card; 300, those of "
        "NVLink, where eight share the work): "
        + ("" if needed is None else f"{digits(needed / 1e9)} GB/s gives the number"),
    )  # fmt: skip


def collectives() -> Row:
    """All-scan beside an all-gather, alone."""

    def times(c: Calibration) -> float:
        return max(
            alone("allgather", GLA, c, p) / alone("allscan", GLA, c, p)
            for p in (8, 16, 32, 64, 128, 256)
        )

    needed = solve(lambda x: times(_latency(H100, x)), 3.9, 1e-7, 1e-3)
    return Row(
        ZECO, "All-Scan over the next collective, 8 to 256 GPUs (up to)", 3.9,
        {
            "20 us a message": times(H100),
            "3 us (one-sided writes)": times(_latency(H100, 3e-6)),
            "20 us, eight cards for a gather": times(all_cards(H100)),
        },
        "latency of a message, as a chain has P + n - 2 of them in series, and the gather's "
        "bandwidth" + ("" if needed is None else f": {digits(1e6 * needed)} us gives the number"),
        "x",
    )  # fmt: skip


def operators() -> Row:
    """Layers of nothing but mixing."""
    assert H100.compute is not None
    share = sum(H100.compute.parts)
    only = replace(GLA, weights=GLA.weights * share / GLA.layers, layers=1)
    c = replace(H100, compute=replace(H100.compute, parts=(1 / 3,) * 3))

    def most(slow: str) -> float:
        at = [(p, 32768 * p) for p in (8, 64, 256)]
        fast = [step(only, c, "allscan", *x).seconds for x in at]
        return max(step(only, c, slow, *x).seconds / t for x, t in zip(at, fast, strict=True))

    return Row(
        ZECO, "the operator over other SP operators, 8 to 256 GPUs (up to)", 9.3,
        {"LASP-2": most("allgather"), "LASP, all in series": most("lasp"),
         "LASP, messages alone": most("relay")},
        "the other operator: against one that works rank after rank there is no limit but the "
        "number of ranks",
        "x",
    )  # fmt: skip


def near_one() -> Row:
    """1M tokens on 64 ranks beside 16k on one."""

    def times(c: Calibration, together: bool = False) -> float:
        one = step(GLA, c, "data", 1, 2**14).seconds
        return step(GLA, c, "allscan", 64, 2**20, together=together).seconds / one

    return Row(
        ZECO, "time of 1M tokens on 64 GPUs over 16k on one (about)", 1.0,
        {
            "20 us a message": times(H100),
            "20 us, ranks wait at each layer": times(H100, True),
            "3 us, ranks wait at each layer": times(_latency(H100, 3e-6), True),
        },
        "whether anything but the chain ties ranks at each layer; if so, latency of a message",
        "x",
    )  # fmt: skip


def rows() -> list[Row]:
    """All of them; about half a minute."""
    recalled = " (from memory)"
    return [
        over_lasp(2**21, 15.2), over_lasp(2**19, 7.3, recalled),
        over_ring(2**21, 36.6), over_ring(2**19, 17.8, recalled),
        over_lasp2(), collectives(), operators(), near_one(),
    ]  # fmt: skip


def section() -> str:
    """A table, and what it is made with."""
    lines = []
    for r in rows():
        told = "; ".join(f"{name}: {_number(v, r.unit)}" for name, v in r.simulated.items())
        lines.append([
            r.source, r.what, _number(r.published, r.unit), told, r.verdict, r.needed,
        ])  # fmt: skip
    head = ["paper", "what", "published", "simulated", "reproduced", "what decides"]
    words = paragraph(
        f"""LASP-2's are with {LLAMA.name} ({LLAMA.source}) on `{A100.name}` ({A100.source}), ZeCO's
        with {GLA.name} on `{H100.name}`, both with free ranks unless a column says that they wait
        at each layer. Nothing is fitted to the published numbers. Reproduced: "yes" where a variant
        comes within a tenth, "in between" where two enclose the number, so that it tells which
        assumptions were met rather than confirms any."""
    )
    return f"{words}\n\n{markdown(head, lines)}"


def _number(x: float, unit: str) -> str:
    if unit == "x":
        return f"{x:.3g}x"
    return f"{x:+,.3g} %" if abs(x) < 1000 else f"{1 + x / 100:,.0f}x"
