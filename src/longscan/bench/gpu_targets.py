"""What `longscan bench gpu` is judged by: targets as data, and what peers took elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longscan.bench.gpu_models import COMPILED, SIZES, SOFT
from longscan.bench.gpu_rows import OPS, OURS

if TYPE_CHECKING:
    from longscan.bench.gpu_measure import Measured


@dataclass(frozen=True)
class Target:
    """forward, train: how many times faster than the peer at least; memory: ours over the peer's,
    at most (None: not asked)."""

    forward: float
    train: float
    memory: float | None = None


# From the issue "GPU kernels".
TARGETS: dict[tuple[str, str], Target] = {
    **{(op, "fla"): Target(2, 2, 0.5) for op in ("gla", "deltanet", "kda")},
    **{(op, "mamba_ssm"): Target(2, 2) for op in ("mamba", "mamba2")},
    **{(op, "mlstm_kernels"): Target(2, 2) for op in ("mlstm", "mlstm 7B")},
    ("gated_deltanet", "flash_qla"): Target(1, 1.3),
}
FLOORS = {
    **dict.fromkeys(("decay", "deltanet", "gated_deltanet"), (2, 4)),
    **dict.fromkeys(("gla", "kda"), (3, 6)),
}
"""Forward, and forward with backward, over the time of moving their bytes once, at FLOORS_AT; at
most. More for a gate per key."""
FLOORS_AT = (8, 2048)
SOFTMAX = Target(1, 1)
"""Beside cuDNN attention at as many heads of the same size, from SOFTMAX_FROM tokens on."""
SOFTMAX_FROM = 1024
STEP = 1.5
"""A decoding step over the time that moving its bytes once takes; at most."""
COLD = 15.0
"""Seconds of the first calls of all ops together; at most."""
MODELS = {8192: 1.3, 2048: 1.0}
"""Tokens per second of a linear model over the one with attention, by length; at least."""

# (forward ms, forward and backward ms, peak GiB) on an H100, from kernel_targets.md: another run,
# used where a peer is not measured beside.
EARLIER: dict[tuple[str, str, int, int], tuple[float, float, float]] = {
    ("gla", "fla", 8, 2048): (0.822, 3.475, 1.50),
    ("deltanet", "fla", 8, 2048): (0.625, 1.953, 0.91),
    ("gated_deltanet", "flash_qla", 8, 2048): (0.193, 1.12, 0.42),
    ("gated_deltanet", "flash_qla", 2, 8192): (0.315, 1.916, 0.41),
    ("mamba2", "mamba_ssm", 8, 2048): (0.605, 3.412, 0.56),
    ("mamba2", "mamba_ssm", 2, 8192): (0.606, 3.196, 0.55),
    ("mamba2", "mamba_ssm", 1, 32768): (1.329, 5.542, 1.09),
    ("mamba", "mamba_ssm", 8, 2048): (1.167, 5.968, 0.63),
    ("mamba", "mamba_ssm", 2, 8192): (1.474, 6.453, 0.63),
    ("mamba", "mamba_ssm", 1, 32768): (3.002, 13.237, 1.26),
    ("mlstm 7B", "mlstm_kernels", 8, 2048): (1.317, 4.639, 1.44),
    ("mlstm 7B", "mlstm_kernels", 1, 16384): (1.342, 4.634, 1.39),
    ("mlstm", "mlstm_kernels", 8, 2048): (0.493, 2.725, 0.52),
    ("mlstm", "mlstm_kernels", 2, 8192): (0.755, 2.460, 0.51),
    ("attention", OURS, 8, 2048): (0.274, 1.189, 0.38),
    ("attention", OURS, 2, 8192): (0.967, 3.812, 0.38),
    ("attention", OURS, 1, 32768): (7.131, 26.915, 0.75),
}


@dataclass(frozen=True)
class Verdict:
    """One target: `got` against `asked`; at most that, or at least.

    by: how times were taken, "called" from Python or "graph", replayed as CUDA graphs; "" for what
    is no such time. ours, beside: the numbers behind it, in `unit`.
    """

    what: str
    quantity: str
    by: str
    ours: float
    beside: float
    unit: str
    got: float
    asked: float
    most: bool = False
    source: str = "same run"

    @property
    def met(self) -> bool:
        return self.got <= self.asked if self.most else self.got >= self.asked


def middle(ms: Sequence[float]) -> float:
    return statistics.median(ms) if ms else math.nan


def times(m: Measured) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward, and with backward, by how they were taken; 0 or nan if not."""
    return {"called": (middle(m.forward), middle(m.train)), "graph": (m.graph[0], m.graph[1])}


def floors(m: Measured) -> tuple[float, float]:
    """Milliseconds in which a copy would move the bytes that forward, and both, must move."""
    speed = float(m.about.get("bandwidth") or "nan")
    return m.bytes[0] / speed * 1e3, m.bytes[1] / speed * 1e3


def find(
    results: Sequence[Measured], op: str, side: str, batch: int, length: int, run: str = ""
) -> Measured | None:
    """The newest result of a row, if it has times; that of a `run` if there is one."""
    found = [m for m in results if m.key == (op, side, batch, length) and (m.forward or m.train)]
    return next((m for m in reversed(found) if m.run == run), found[-1] if found else None)


def newest(results: Sequence[Measured]) -> list[Measured]:
    """One result of each row."""
    return list({m.key: m for m in results}.values())


def beside(m: Measured, results: Sequence[Measured]) -> Measured | None:
    """The model with attention that another is compared with."""
    side = SOFT + COMPILED * m.side.endswith(COMPILED)
    return find(results, m.op, side, m.batch, m.length, m.run)


def comparable(op: str) -> bool:
    """Whether an op has the heads of the attention rows."""
    return op != "attention" and not OPS[op].step and OPS[op].sizes == "H16 K128 V128"


def verdicts(results: Sequence[Measured]) -> list[Verdict]:
    """All targets that these results can be judged by."""
    out: list[Verdict] = []
    rows = newest(results)
    for m in rows:
        if m.op in SIZES:
            out += _model(m, results)
        elif m.side == OURS and m.op != "attention" and m.forward:
            out += _step(m) if OPS[m.op].step else _op(m, results)
    colds = [m for m in rows if m.side == "cold"]
    if colds and all(m.first for m in colds):
        ops, total = f"first calls of {len(colds)} ops", sum(m.first for m in colds)
        out.append(Verdict(ops, "all together", "", total, COLD, "s", total, COLD, True))
    return out


def _op(m: Measured, results: Sequence[Measured]) -> list[Verdict]:
    where = f"{m.op} B{m.batch} T{m.length}"
    out = []
    if m.op in FLOORS and (m.batch, m.length) == FLOORS_AT:
        out += _floors(m, f"{where} / floor", FLOORS[m.op])
    pairs = [(side, TARGETS.get((m.op, side)), side, m.op) for side in OPS[m.op].peers]
    if comparable(m.op) and m.length >= SOFTMAX_FROM:
        pairs.append(("cuDNN attention", SOFTMAX, OURS, "attention"))
    for name, target, side, op in pairs:
        if target is None:
            continue
        peer = find(results, op, side, m.batch, m.length, m.run)
        ours, source = m, "kernel_targets.md"
        if peer is not None:
            ours = find(results, m.op, OURS, m.batch, m.length, peer.run) or m
            source = "same run" if peer.run == ours.run else "other run"
            theirs, mib = times(peer), peer.mib
        elif (key := (op, side, m.batch, m.length)) in EARLIER:
            *called, gib = EARLIER[key]
            theirs, mib = {"called": (called[0], called[1])}, 1024 * gib
        else:
            continue
        what = f"{where} / {name}"
        for i, asked in enumerate((target.forward, target.train)):
            for by, ms in theirs.items():
                mine = times(ours)[by][i]
                if mine > 0 and ms[i] > 0:  # no numbers are not
                    out.append(Verdict(what, QUANTITIES[i], by, mine, ms[i], "ms", ms[i] / mine,
                                       asked, source=source))  # fmt: skip
        if target.memory and mib:
            out.append(Verdict(what, "memory", "", ours.mib, mib, "MiB", ours.mib / mib,
                               target.memory, True, source))  # fmt: skip
    return out


QUANTITIES = ("forward", "forward+backward")


def _floors(m: Measured, what: str, asked: Sequence[float]) -> list[Verdict]:
    return [
        Verdict(what, QUANTITIES[i], by, ms[i], floor, "ms", ms[i] / floor, most, True)
        for i, (most, floor) in enumerate(zip(asked, floors(m), strict=False))
        for by, ms in times(m).items()
        if ms[i] > 0 and floor > 0
    ]


def _step(m: Measured) -> list[Verdict]:
    return _floors(m, f"{m.op} B{m.batch} / floor", (STEP,))


def _model(m: Measured, results: Sequence[Measured]) -> list[Verdict]:
    soft = beside(m, results)
    if m.side.startswith(SOFT) or soft is None or not m.train or m.length not in MODELS:
        return []
    what = f"{m.op} {m.side} B{m.batch} T{m.length} / {SOFT}"
    mine, theirs = tokens_per_second(m), tokens_per_second(soft)
    source = "same run" if soft.run == m.run else "other run"
    return [Verdict(what, "training", "", mine, theirs, "tokens/s", mine / theirs,
                    MODELS[m.length], source=source)]  # fmt: skip


def tokens_per_second(m: Measured) -> float:
    """Of a model's training."""
    return m.more["tokens"] / (middle(m.train) / 1e3)
