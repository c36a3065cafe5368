"""What a bank of slots that no token writes can and cannot remember, beside one that is written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longscan.claims.recall import RECALL
from longscan.claims.results import Row, mean
from longscan.claims.training import Job, accuracy, examples, fit
from longscan.models import Stack, StackConfig
from longscan.synthetic.copying import lagged

REACH, EXPECTED = "outputs that one input changes", "1 + L (k - 1)"
_SIZE = {
    "quick": {"d_model": 16, "vocab": 8, "length": 24, "lags": [2, 16], "batch": 4, "steps": 3,
              "tests": 1, "lr": 3e-3},
    "cpu": {"d_model": 64, "vocab": 10, "length": 64, "lags": [2, 16], "batch": 32, "steps": 400,
            "tests": 8, "lr": 3e-3},
}  # fmt: skip
_STACKS = ((2, 3), (3, 4), (6, 3))  # layers, taps; the last is the paper's
_TASKS = ("gam", "gam_written", "gla")


def reach(job: Job, layers: int, taps: int, seed: int) -> dict[str, float]:
    """How many outputs of a stack change with one input in the middle."""
    config = StackConfig(
        d_model=16, n_layers=layers, pattern="gam", mixers={"gam": {"d_conv": taps, "n_slots": 8}}
    )
    stack = job.build(lambda: Stack(config), seed).double()
    length = 8 + 2 * layers * taps
    x = torch.randn(
        1, length, 16, generator=job.generator("test", seed), device=job.device,
        dtype=torch.float64,
    )  # fmt: skip
    moved = x.clone()
    moved[:, 4] += 1
    with torch.no_grad():
        changed = (stack(x)[0] != stack(moved)[0]).any(-1).sum().item()
    return {REACH: changed, EXPECTED: 1 + layers * (taps - 1)}


def copy(
    job: Job, seed: int, size: dict[str, Any], lag: int, model: dict[str, Any], **training: Any
) -> dict[str, float]:
    """Say again what was said `lag` tokens ago."""
    task = partial(lagged, size["batch"], size["length"], lag=lag, alphabet=size["vocab"])
    lm = fit(job, model, lambda g: task(generator=g), seed=seed, **training)
    batches = examples(job, lambda g: task(generator=g), seed, size["tests"])
    # The first `lag` labels are blanks, which need no memory.
    late = ((x, y.masked_fill(torch.arange(y.shape[1], device=y.device) < lag, -100))
            for x, y in batches)  # fmt: skip
    return {RECALL: accuracy(lm, late).token}


def case_of(mixer: str, lag: int) -> str:
    return f"{mixer}, lag {lag}"


def gam_reach(job: Job) -> Iterator[Row]:
    """The receptive field of stacks, and copying within and beyond it."""
    size = job.choose(**_SIZE)
    for layers, taps in _STACKS:
        for seed in job.seeds:
            run = partial(reach, job, layers, taps, seed)
            case = f"{layers} layers, {taps} taps"
            yield from job.measure(case, "gam", seed, {"layers": layers, "taps": taps}, run)
    for lag in size["lags"]:
        for mixer in _TASKS:
            model = {
                "vocab_size": size["vocab"], "d_model": size["d_model"], "n_layers": 2,
                "pattern": mixer, "mixers": {"gla": {"d_conv": 4}} if mixer == "gla" else {},
            }  # fmt: skip
            training = {"steps": size["steps"], "lr": size["lr"], "warmup": 20, "until": 0.01}
            for seed in job.seeds:
                run = partial(copy, job, seed, size, lag, model, **training)
                settings = {**size, "lag": lag, "model": model, **training}
                yield from job.measure(case_of(mixer, lag), mixer, seed, settings, run)


def gam_reach_holds(rows: list[Row]) -> tuple[bool, str]:
    """Fields as computed; the bank copies within its field, not beyond; a written one does both."""
    fields = [(r.case, r.value) for r in rows if r.metric == REACH]
    exact = all(x == mean(rows, case, EXPECTED) for case, x in fields)
    near, far = sorted({int(r.case.rpartition(" ")[2]) for r in rows if r.metric == RECALL})
    got = {(m, lag): mean(rows, case_of(m, lag), RECALL) for m in _TASKS for lag in (near, far)}
    reached = "; ".join(f"{case} {x:.0f} outputs" for case, x in dict(fields).items())
    said = "; ".join(f"{m} {got[m, near]:.1%}, {got[m, far]:.1%}" for m in _TASKS)
    chance = 0.3
    good = got["gam", near] >= 0.95 and got["gam", far] <= chance and got["gam_written", far] >= 0.9
    return exact and good, (
        f"One input reaches {reached}. Copied at lags {near} and {far}: {said}."
    )
