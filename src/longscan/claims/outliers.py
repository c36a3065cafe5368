"""What one bad value does to a memory: the loss that a memory minimises, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longscan.claims.results import Row, mean
from longscan.claims.training import Job
from longscan.ops.memory import Rule, memory

CLEAN, DIRTY = "error, all values clean", "error, a tenth of the values with outliers"
_SIZE = {
    "quick": {"d": 8, "pairs": 12, "sequences": 4},
    "cpu": {"d": 32, "pairs": 64, "sequences": 64},
}
_STEPS = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# case: its bias, and whether it is one of Yaad's
_BIASES = {
    "l2": ("l2", False),
    "Huber of the norm": ("huber_norm", True),
    "Huber of coordinates": ("huber_coord", True),
    "Yaad as printed": ("huber_mix", True),
    "l3 (Moneta's)": ("lp", False),
}


def pairs(size: dict[str, Any], dirty: bool, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys, values of length sqrt(d) / 2 as they are and as the memory sees them, and which
    of them are clean.

    Shapes: keys, values, seen values, [B, T, d]; clean [B, T].
    """
    shape = (size["sequences"], size["pairs"], size["d"])

    def normal() -> Tensor:
        return torch.randn(shape, generator=g, device=g.device, dtype=torch.float64)

    k, v, noise = normal(), normal(), normal()
    k = k / k.norm(dim=-1, keepdim=True)
    v = v / v.norm(dim=-1, keepdim=True) * (size["d"] ** 0.5 / 2)
    clean = torch.ones(shape[:2], dtype=torch.bool, device=g.device)
    if dirty:
        chance = torch.rand(shape[:2], generator=g, device=g.device)
        clean = chance.argsort(1).argsort(1) >= max(1, shape[1] // 10)
    return k, torch.stack([v, v + 20 * noise * ~clean[..., None]]), clean


def recall_error(bias: str, size: dict[str, Any], dirty: bool, g: torch.Generator) -> float:
    """The relative squared error of the clean values after one pass, with the best step size."""
    k, (v, seen), clean = pairs(size, dirty, g)
    d, best = size["d"], float("inf")
    rule = Rule(bias=bias, retention="none", chunk=1)
    weights = [k.new_zeros(1, d, d)]
    ones = k.new_ones(*k.shape[:2], 1)
    for eta in _STEPS:
        delta = ones if bias.startswith("huber") else None
        k1, v1 = k.unsqueeze(2), seen.unsqueeze(2)
        _, state = memory(k1, k1, v1, eta * ones, delta=delta, weights=weights, rule=rule)
        got = torch.einsum("bvk,btk->btv", state.tensor("a0")[:, 0], k)
        wrong = (got - v).square().sum(-1) / v.square().sum(-1)
        error = wrong[clean].mean().item()
        best = min(best, error if error == error else float("inf"))
    return best


def robustness(bias: str, size: dict[str, Any], job: Job, seed: int) -> dict[str, float]:
    """Both errors of a bias."""
    return {
        name: recall_error(bias, size, dirty, job.generator("test", seed))
        for name, dirty in ((CLEAN, False), (DIRTY, True))
    }


def outliers(job: Job) -> Iterator[Row]:
    """A linear memory writes pairs once; a tenth of the values gets noise of 20 standard
    deviations."""
    size = job.choose(**_SIZE)
    for case, (bias, yaads) in _BIASES.items():
        mixer = "yaad" if yaads else "moneta" if bias == "lp" else "ttt"
        for seed in job.seeds:
            run = partial(robustness, bias, size, job, seed)
            yield from job.measure(case, mixer, seed, {**size, "steps": _STEPS}, run)


def outliers_hold(rows: list[Row]) -> tuple[bool, str]:
    """With outliers the Huber losses of Yaad still recall (below 0.8), l2 learns nothing (0.9)."""
    got = {c: (mean(rows, c, CLEAN), mean(rows, c, DIRTY)) for c in _BIASES}
    said = "; ".join(f"{c} {a:.2f}, with outliers {b:.2f}" for c, (a, b) in got.items())
    yaad = max(got[c][1] for c, (_, yaads) in _BIASES.items() if yaads)
    return yaad < 0.8 and got["l2"][1] > 0.9, f"Relative error of the clean values: {said}."
