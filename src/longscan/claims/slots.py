"""What a bank of slots that no token writes can and cannot keep, beside one that is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from longscan.claims.recall import RECALL
from longscan.claims.results import Row, mean
from longscan.claims.training import Job, accuracy, examples, fit
from longscan.models import Stack, StackConfig
from longscan.synthetic.copying import copying, lagged
from longscan.synthetic.mqar import mqar

REACH, EXPECTED = "outputs that one input changes", "1 + L (k - 1)"
_SIZE = {
    "quick": {"d_model": 16, "alphabet": 8, "length": 24, "batch": 4, "steps": 3,
              "steps_of_pairs": 3, "tests": 1, "lr": 3e-3},
    "cpu": {"d_model": 64, "alphabet": 10, "length": 32, "batch": 32, "steps": 400,
            "steps_of_pairs": 1000, "tests": 8, "lr": 3e-3},
}  # fmt: skip
_STACKS = ((2, 3), (3, 4), (6, 3))  # layers, taps; the last is the paper's
NEAR, FAR, KEPT, PAIRS = "lag 2", "lag 16", "one token kept", "4 pairs"
_TASKS = (
    ("gam", NEAR), ("gam", FAR),
    *((mixer, task) for task in (KEPT, PAIRS) for mixer in ("gam", "gam_written", "gla")),
)  # fmt: skip


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


def tasks(size: dict[str, Any]) -> dict[str, tuple[Callable, int]]:
    """What to remember, and the places at the front whose labels need no memory.

    Say what was said two or sixteen tokens ago; say a token that stood among blanks; answer with
    the partners of four keys.
    """
    batch, length, alphabet = size["batch"], size["length"], size["alphabet"]
    return {
        NEAR: (partial(lagged, batch, length, lag=2, alphabet=alphabet), 2),
        FAR: (partial(lagged, batch, length, lag=16, alphabet=alphabet), 16),
        KEPT: (partial(copying, batch, length, tokens=1, alphabet=alphabet, selective=True), 0),
        PAIRS: (partial(mqar, batch, length, pairs=4, vocab=16, random_non_queries=False), 0),
    }


def remember(
    job: Job, seed: int, size: dict[str, Any], what: str, model: dict[str, Any], **training: Any
) -> dict[str, float]:
    """How often the trained model is right."""
    task, front = tasks(size)[what]
    lm = fit(job, model, lambda g: task(generator=g), seed=seed, **training)
    batches = examples(job, lambda g: task(generator=g), seed, size["tests"])
    late = ((x, y.masked_fill(torch.arange(y.shape[1], device=y.device) < front, -100))
            for x, y in batches)  # fmt: skip
    return {RECALL: accuracy(lm, late).token}


def case_of(mixer: str, what: str) -> str:
    return f"{mixer}, {what}"


def gam_reach(job: Job) -> Iterator[Row]:
    """The receptive field of stacks, and what can be remembered within and beyond it."""
    size = job.choose(**_SIZE)
    for layers, taps in _STACKS:
        for seed in job.seeds:
            run = partial(reach, job, layers, taps, seed)
            case = f"{layers} layers, {taps} taps"
            yield from job.measure(case, "gam", seed, {"layers": layers, "taps": taps}, run)
    for mixer, what in _TASKS:
        model = {
            "vocab_size": 16, "d_model": size["d_model"], "n_layers": 2,
            "pattern": mixer, "mixers": {"gla": {"d_conv": 4}} if mixer == "gla" else {},
        }  # fmt: skip
        steps = size["steps_of_pairs" if what == PAIRS else "steps"]
        training = {"steps": steps, "lr": size["lr"], "warmup": 20, "until": 0.01}
        for seed in job.seeds:
            run = partial(remember, job, seed, size, what, model, **training)
            settings = {**size, "what": what, "model": model, **training}
            yield from job.measure(case_of(mixer, what), mixer, seed, settings, run)


def gam_reach_holds(rows: list[Row]) -> tuple[bool, str]:
    """Fields as computed; the bank copies within its field only; a written one keeps a token."""
    fields = [(r.case, r.value) for r in rows if r.metric == REACH]
    exact = all(x == mean(rows, case, EXPECTED) for case, x in fields)
    got = {task: mean(rows, case_of(*task), RECALL) for task in _TASKS}
    reached = "; ".join(f"{case} {x:.0f} outputs" for case, x in dict(fields).items())
    said = "; ".join(f"{case_of(*task)} {x:.1%}" for task, x in got.items())
    chance = 0.3
    good = (
        got["gam", NEAR] >= 0.95
        and max(got["gam", FAR], got["gam", KEPT]) <= chance
        and min(got["gam_written", KEPT], got["gla", KEPT]) >= 0.9
    )
    return exact and good, f"One input reaches {reached}. Right: {said}."
