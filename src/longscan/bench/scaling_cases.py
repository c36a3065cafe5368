"""Models, calibrations, and what is simulated of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from longscan.bench.scaling_exchange import Calibration, Compute, exchange, wires
from longscan.bench.scaling_step import Model, step
from longscan.parallel.cost import CHOICE, Link, seconds

GLA = Model(
    "GLA 1.3B", 1.30e9, 24, 2048, 4, 256, 512, "key",
    "the preset gla-1.3b: a state of 2 MiB",
)  # fmt: skip
GDN = Model(
    "Gated DeltaNet 1.3B", 1.30e9, 21, 2048, 6, 256, 512, "matrix",
    "the preset gated_deltanet-1.3b: a state of 3 MiB, transitions of 1.5 MiB",
)  # fmt: skip
H100 = Calibration(
    "h100-nvlink-ib",
    "links are assumed, as ZeCO's cost model has them: 20 us a message, launched by the host; a "
    "gather between hosts has one network card. Compute is measured on one H100 "
    "(bench/history.csv, rows 340m-*, T=8192: Gated DeltaNet 182 ms for 32768 tokens, attention "
    "235 ms); larger models are assumed to be as efficient. An op takes 9 % of a layer (1.28 ms "
    "measured for GLA with 16 heads of 128 and 16384 tokens, 14.2 ms computed for the layer), in "
    "three equal parts (assumed); folding a byte of state takes 1 ps (assumed)",
    Link(20e-6, 300e9),
    Link(20e-6, 40e9),
    compute=Compute(flops=3.74e14, scores=5.5e14, parts=(0.03, 0.03, 0.03)),
    combine=1e-12,
)
A100 = Calibration(
    "a100-nvlink-ib",
    "all assumed: 20 us a message, 200 GB/s inside a host, 25 GB/s between hosts of 8, 140 TFLOP/s "
    "in products and in scores, 2 ps to fold a byte, parts of a layer as on the H100",
    Link(20e-6, 200e9),
    Link(20e-6, 25e9),
    compute=Compute(flops=1.4e14, scores=1.4e14, parts=(0.03, 0.03, 0.03)),
    combine=2e-12,
)
NAMED = {c.name: c for c in (H100, A100)}
RANKS = tuple(2**k for k in range(1, 11))
SHARD = 16384
"""Tokens of a rank in the sweep over ranks: 16M at 1024."""
SWEEP, SWEEP_TOKENS = 64, tuple(2**k for k in range(16, 25))
"""Ranks, and tokens, of the sweep over tokens."""
CARDS = "allgather, all cards"
STEPS = ("allgather", CARDS, *CHOICE[1:], "lasp")
SOFT = ("ring_attention", "ulysses")
BLOCKS, BLOCKS_RANKS = (1, 2, 4, 8, 16, 32, 64), 256
"""Of a chain, in the sweep over its blocks, and of how many ranks."""


@dataclass(frozen=True)
class Sweeps:
    """Everything that is drawn. [method] -> one number for each of RANKS (or SWEEP_TOKENS).

    flat: an exchange alone over links that are all like the outer one, simulated; formula: the
    same in closed form; hosts: with links of both kinds. free, together: tokens/s of a step
    relative to the same without exchange, where ranks run freely, and where they wait for each
    other at each layer; tokens: seconds of a step of SWEEP ranks. pieces: relative tokens/s of
    chains of BLOCKS blocks, free and together.
    """

    flat: dict[str, list[float]]
    formula: dict[str, list[float]]
    hosts: dict[str, list[float]]
    free: dict[str, list[float]]
    together: dict[str, list[float]]
    tokens: dict[str, list[float]]
    pieces: dict[bool, list[float]]


def flat(c: Calibration) -> Calibration:
    """With the link between hosts everywhere, as the closed formulas have it."""
    return replace(c, inner=c.outer, gather=None)


def all_cards(c: Calibration) -> Calibration:
    """A gather uses a network card for each rank of a host, as far as links inside it carry on; as
    it is where gathers were measured."""
    if c.gather is not None:
        return c
    bandwidth = min(c.inner.bandwidth, c.per_host * c.outer.bandwidth)
    return replace(c, gather=Link(c.outer.latency, bandwidth))


def variant(method: str, c: Calibration) -> tuple[str, Calibration]:
    """The method and calibration behind a name of STEPS."""
    return ("allgather", all_cards(c)) if method == CARDS else (method, c)


def alone(method: str, model: Model, c: Calibration, ranks: int) -> float:
    """Seconds of one exchange when all ranks start together and folding is free."""
    method, c = variant(method, c)
    return float(exchange(method, np.zeros(ranks), model.element, wires(c, ranks)).max())


def intra(model: Model, c: Calibration) -> float:
    """Seconds of a layer's forward that need no entering state, with SHARD tokens."""
    assert c.compute is not None
    return c.compute.parts[1] * 6 * model.weights / model.layers * SHARD / c.compute.flops / 3


def sweeps(model: Model, c: Calibration) -> Sweeps:
    """Run them all; half a minute."""

    def formula(method: str, ranks: int) -> float:
        method = "lasp" if method == "relay" else method
        hosts = {"per_host": c.per_host, "outer": c.outer}
        return seconds(method, ranks, model.element, c.outer, **hosts)

    def steps(together: bool) -> dict[str, list[float]]:
        return {
            m: [step(model, at, how, p, SHARD * p, together=together).relative for p in RANKS]
            for m in STEPS
            for how, at in [variant(m, c)]
        }

    def tokens(method: str) -> list[float]:
        how, at = variant(method, c)
        return [step(model, at, how, SWEEP, t).seconds for t in SWEEP_TOKENS]

    def pieces(together: bool) -> list[float]:
        at = (BLOCKS_RANKS, SHARD * BLOCKS_RANKS)
        return [step(model, c, "allscan", *at, together=together, n=n).relative for n in BLOCKS]

    drawn = (*CHOICE, "relay")
    return Sweeps(
        {m: [alone(m, model, flat(c), p) for p in RANKS] for m in drawn},
        {m: [formula(m, p) for p in RANKS] for m in drawn},
        {m: [alone(m, model, c, p) for p in RANKS] for m in (*drawn, CARDS)},
        steps(False),
        steps(True),
        {m: tokens(m) for m in ("data", *STEPS, *SOFT)},
        {together: pieces(together) for together in (False, True)},
    )
