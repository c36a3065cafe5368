"""What was simulated, and measured with gloo, in words and tables."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np

from longscan.bench.measure import digits
from longscan.bench.report import markdown
from longscan.bench.scaling_cases import (
    BLOCKS,
    BLOCKS_RANKS,
    CARDS,
    GDN,
    GLA,
    RANKS,
    SHARD,
    Sweeps,
    intra,
)
from longscan.bench.scaling_exchange import Calibration, exchange, wires
from longscan.bench.scaling_gloo import SIZES, Timed
from longscan.bench.scaling_step import Model
from longscan.parallel.cost import CHOICE, Element, Tokens, blocks, choose, received

SHOWN = (8, 64, 256, 1024)
"""Ranks in the tables."""


def paragraph(text: str) -> str:
    """In lines of 100."""
    return textwrap.fill(
        " ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False
    )


def size(nbytes: float) -> str:
    """Bytes, in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1000:
            return f"{digits(nbytes)} {unit}"
        nbytes /= 1024
    return f"{digits(nbytes)} GiB"


def links(c: Calibration) -> str:
    """A calibration's links, in words."""
    if c.inner == c.outer:
        parts = [("a message", c.inner)]
    else:
        parts = [("in a host", c.inner), ("between hosts", c.outer)]
    parts += [("a hop of a gather", c.gather)] if c.gather else []
    return "; ".join(
        f"{what} {digits(1e6 * x.latency)} us and {digits(x.bandwidth / 1e9)} GB/s"
        for what, x in parts
    )


def bytes_table(models: Sequence[Model]) -> str:
    """Bytes that a rank receives, in the forward of a layer."""
    ranks = (2, *SHOWN)
    lines = [
        [model.name, m, *(size(received(m, p, model.element, per_host=8)) for p in ranks)]
        for model in models
        for m in CHOICE
    ]
    for m in ("ring_attention", "lasp2h", "ulysses"):
        sizes = (size(received(m, p, Tokens(SHARD * p, models[0].d_model))) for p in ranks)
        lines.append([f"softmax, {SHARD} tokens a rank", m, *sizes])
    return markdown(["layer", "method", *(f"P = {p}" for p in ranks)], lines)


def _shown(head: str, groups: Sequence[tuple[str, dict[str, list[float]]]], form: str = "") -> str:
    lines = [
        [what, m, *(format(y, form) if form else digits(1e3 * y)
                    for y in (row[RANKS.index(p)] for p in SHOWN))]
        for what, rows in groups
        for m, row in rows.items()
    ]  # fmt: skip
    return markdown([head, "method", *(f"P = {p}" for p in SHOWN)], lines)


def exchange_table(s: Sweeps) -> str:
    """Milliseconds of an exchange."""
    names = ("one link, formula", "one link, simulated", "hosts, simulated")
    return _shown("ms", list(zip(names, (s.formula, s.flat, s.hosts), strict=True)))


def step_table(s: Sweeps) -> str:
    """Tokens/s relative to no exchange."""
    return _shown("ranks", [("free", s.free), ("wait at each layer", s.together)], ".3f")


def chosen(model: Model, c: Calibration) -> str:
    """What the formulas choose, by number of ranks."""
    names: dict[str, list[str]] = {}
    for p in RANKS:
        m = choose(p, model.element, c.inner, per_host=c.per_host, outer=c.outer)
        names.setdefault(m, []).append(str(p))
    return "; ".join(f"{m} for {', '.join(ps)}" for m, ps in names.items())


def pieces(model: Model, c: Calibration, s: Sweeps) -> str:
    """How many blocks are best in a step."""
    best = {k: BLOCKS[int(np.argmax(y))] for k, y in s.pieces.items()}
    n = blocks(BLOCKS_RANKS, model.element.state, c.outer)
    told = {k: ", ".join(f"{x:.3f}" for x in y) for k, y in s.pieces.items()}
    return (
        f"With {', '.join(map(str, BLOCKS))} blocks all-scan keeps {told[False]} of the tokens "
        f"a second on {BLOCKS_RANKS} free ranks, and {told[True]} where they wait: best are "
        f"{best[False]} and {best[True]}; the formula, for one exchange, says {n}."
    )


def simulation(c: Calibration, s: Sweeps, published: str) -> str:
    """The section between the markers."""
    at = RANKS.index(256)
    kept = {m: (s.free[m][at], s.together[m][at]) for m in ("allgather", "allscan", "lasp")}
    parts = [
        "## Simulation",
        paragraph(
            f"""Written by `longscan bench scaling --write`; nothing in this section was measured on
            several GPUs. The model is {GLA.name} ({GLA.source}; {GLA.layers} layers), states travel
            in float32. The all-reduce of gradients, equal for all methods, is left out.
            Calibration `{c.name}`, {links(c)}: {c.source}. Others are JSON files: `--save` writes
            one, `--calibration` takes it."""
        ),
        "### Bytes received",
        paragraph(
            """By the rank that receives most, in the forward of one layer, by formula. Those of
            linear layers do not depend on the number of tokens; those of softmax layers grow with
            it (keys and values in bfloat16)."""
        ),
        bytes_table((GLA, GDN)),
        "![Bytes that a rank receives against the number of ranks](scaling_bytes.png)",
        "### Time of an exchange",
        paragraph(
            f"""All ranks start together, folding is free. On one kind of link the simulation gives
            the formulas; hosts of {c.per_host} with faster links inside help the methods that use
            them. `relay` is all-scan in one block. What needs no entering state takes
            {digits(1e3 * intra(GLA, c))} ms of a forward at {SHARD} tokens a rank: an exchange
            that is shorter is hidden whatever happens. "All cards": a gather enters a host by
            {c.per_host} network cards, not one."""
        ),
        exchange_table(s),
        paragraph(f"The formulas choose, by number of ranks: {chosen(GLA, c)}."),
        "![Milliseconds of an exchange against the number of ranks](scaling_exchange.png)",
        "### A training step",
        paragraph(
            f"""Tokens a second, relative to the same work without any exchange (data parallel), at
            {SHARD} tokens a rank. LASP runs the mixing of each layer rank after rank. Keys and
            values of ring attention cross from host to host by one network card."""
        ),
        step_table(s),
        "![Relative tokens a second against ranks](scaling_ranks.png)",
        "![Tokens a second against tokens](scaling_tokens.png)",
        paragraph(
            f"""**A chain pays its latency once a direction, not once a layer.** Where nothing but
            the exchange ties ranks together, a rank that had to wait in the first layer starts the
            second as much later, and finds its state there. At 256 ranks all-scan keeps
            {kept["allscan"][0]:.3f} of the tokens a second, against {kept["allscan"][1]:.3f} where
            something else brings ranks together at each layer, as gathers of sharded parameters do
            unless they are prefetched far ahead; LASP {kept["lasp"][0]:.3f} against
            {kept["lasp"][1]:.3f}. An all-gather waits for everybody anyway:
            {kept["allgather"][0]:.3f} and {kept["allgather"][1]:.3f}. The formulas are for one
            exchange and see nothing of this. {pieces(GLA, c, s)}"""
        ),
        paragraph(
            """**What decides between an all-gather and a chain is how an all-gather enters a
            host.** Through one network card it costs the formula's (P - 1) states, and a chain is
            faster; through all cards of a host at once, as rings of NCCL may run, it is limited by
            links inside the host, and a chain of launched messages is not faster alone. It is
            still faster in a step whose ranks run freely."""
            if s.hosts["allscan"][at] > s.hosts[CARDS][at]
            and s.free["allscan"][at] > s.free[CARDS][at]
            else ""
        ),
        "### Beside published numbers",
        published,
    ]
    return "\n\n".join(p for p in parts if p)


Measured = Sequence[tuple[Calibration, Sequence[Timed]]]
"""Calibrations, and exchanges that were measured where each of them was."""


def beside(measured: Measured) -> str:
    """A table of measured exchanges beside their simulation."""
    lines = []
    for c, rows in measured:
        for t in rows:
            folds = 0.0 if t.method == "ring" else c.combine  # gathers were timed without
            on, ready = wires(c, t.ranks), np.zeros(t.ranks)
            told = exchange(t.method, ready, Element(t.nbytes), on, n=t.n, combine=folds).max()
            ms = [digits(1e3 * x) for x in (told, t.least, t.median, t.most)]
            lines.append([
                t.method, str(t.ranks), size(t.nbytes), str(t.n), ms[0],
                *ms[1:], digits(t.least / told),
            ])  # fmt: skip
    head = ["exchange", "P", "state", "blocks", "simulated ms", "least ms", "median", "most",
            "least / simulated"]  # fmt: skip
    return markdown(head, lines)


def gloo(measured: Measured) -> str:
    """The section of exchanges measured with gloo, for each number of processes."""
    sources = "; ".join(f"{c.source}: {links(c)}" for c, _ in measured)
    words = paragraph(
        f"""Written by `longscan bench scaling --calibrate gloo --write`. Links, {sources}. They are
        fitted, by least squares of relative errors, to messages between pairs of neighbours, all at
        once, and to all-gathers, of {SIZES[0]} to {SIZES[-1]} bytes; the sizes below are others.
        Times are of the slowest rank, fitted were the least of several; the first tenths of a
        millisecond are those in which ranks leave the barrier before. A ring is gloo's own
        all-gather, without folding; the others add what comes to what they have, as fast as each
        process adds while all do. What no link knows of: more processes than cores take turns, and
        so does the other work of the machine (load {os.getloadavg()[0]:.1f} over the last minute,
        ours included)."""
    )
    return f"## Simulated and measured with gloo\n\n{words}\n\n{beside(measured)}"
