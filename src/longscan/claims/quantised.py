"""LongVQ: attention over quantised keys code by code is the dense softmax, at a linear cost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longscan.claims.cost import layer_cost, ms_at
from longscan.claims.results import Row, mean
from longscan.claims.training import Job
from longscan.ops.vq import codewords, quantise, vq_attention

WRONG = "largest difference to the dense softmax"
_SIZE = {
    "quick": {"d_model": 32, "lengths": [64, 128], "exact": 50, "block": 8, "codes": 8},
    "cpu": {"d_model": 128, "lengths": [1024, 2048, 4096, 8192, 16384], "exact": 700,
            "block": 64, "codes": 128},
    "gpu": {"d_model": 256, "lengths": [4096, 8192, 16384, 32768, 65536], "exact": 2000,
            "block": 128, "codes": 512},
}  # fmt: skip
_COSTS = ("longvq", "attention")


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Softmax attention to all tokens, or to all up to the query. Shapes: [B, T, H, .]."""
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v)


def difference(job: Job, size: dict[str, Any], causal: bool, seed: int) -> dict[str, float]:
    """Linear form against dense softmax over the same quantised keys, relative, in float64."""
    g, t = job.generator("test", seed), size["exact"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=g.device, dtype=torch.float64)

    q, k, v, book = normal(2, t, 1, 16), normal(2, t, 1, 16), normal(2, t, 1, 32), normal(1, 40, 16)
    codes = quantise(k, book)
    k_hat = codewords(codes, book)
    o, _ = vq_attention(q, k_hat, codes, v, book, block=size["block"], causal=causal)
    want = dense(q, k_hat, v, causal)
    return {WRONG: ((o - want).abs().max() / want.abs().max()).item()}


def longvq_cost(job: Job) -> Iterator[Row]:
    """Equality of the forms, then forward and backward of a layer at growing lengths."""
    size = job.choose(**_SIZE)
    for causal in (True, False):
        for seed in job.seeds:
            run = partial(difference, job, size, causal, seed)
            case = "causal" if causal else "both directions"
            yield from job.measure(case, "longvq", seed, size, run)
    for mixer in _COSTS:
        options = {"block": size["block"], "n_codes": size["codes"]} if mixer == "longvq" else {}
        for seed in job.seeds:
            run = partial(
                layer_cost, job, mixer, options, d_model=size["d_model"],
                lengths=size["lengths"], seed=seed,
            )  # fmt: skip
            yield from job.measure(f"{mixer}, cost", mixer, seed, size, run)


def longvq_cost_holds(rows: list[Row]) -> tuple[bool, str]:
    """Equal to 1e-9; four times the tokens cost at most six times the time; cheaper at the end."""
    wrong = max(r.value for r in rows if r.metric == WRONG)
    lengths = sorted({int(r.metric.rpartition("=")[2]) for r in rows if "ms at" in r.metric})
    ms = {m: [mean(rows, f"{m}, cost", ms_at(t)) for t in lengths] for m in _COSTS}
    growth = ms["longvq"][-1] / ms["longvq"][-3] if len(lengths) > 2 else 0.0
    said = "; ".join(f"{m} {', '.join(f'{x:.1f}' for x in xs)}" for m, xs in ms.items())
    good = wrong < 1e-9 and growth < 6 and ms["longvq"][-1] < ms["attention"][-1]
    return good, (
        f"The linear form differs from the dense softmax by {wrong:.1e}. Milliseconds at T = "
        f"{', '.join(map(str, lengths))}: {said}."
    )
