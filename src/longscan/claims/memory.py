"""Recall across the family: a matrix memory, a vector, a window, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from longscan.claims.recall import RECALL, recall
from longscan.claims.results import Row, mean
from longscan.claims.training import Job
from longscan.synthetic.mqar import mqar

SHIFT = "rwkv_channel_mix"
_SIZE = {
    "quick": {"length": 16, "pairs": 4, "vocab": 16, "d_model": 32, "batch": 4, "steps": 3,
              "tests": 1, "lr": 3e-3},
    "cpu": {"length": 32, "pairs": 8, "vocab": 64, "d_model": 64, "batch": 64, "steps": 600,
            "tests": 8, "lr": 3e-3},
}  # fmt: skip
# mixer, its settings, what is published of it; those that should recall first
_ABLE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("attention", {"n_heads": 2}, "1.00 at every width"),
    ("kda", {"n_heads": 2}, "solves longer ones (Kimi Linear)"),
    ("rwkv7", {"d_head": 32}, "solves longer ones (RWKV-7)"),
    ("rwkv5", {"d_head": 32}, ""),
    ("mlstm_large", {"n_heads": 2}, ""),
)
_UNABLE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("rwkv4", {}, "needs a width that grows with the length"),
    ("sliding_attention", {"n_heads": 2, "window": 4}, ""),
    (SHIFT, {}, ""),
)


_BARE = ("attention", "mlstm_large", "sliding_attention")


def memories(job: Job) -> Iterator[Row]:
    """Multi-query recall by two layers, the first of which is a token shift for some."""
    size = job.choose(**_SIZE)
    for mixer, options, said in (*_ABLE, *_UNABLE):
        model = {
            "vocab_size": size["vocab"],
            "d_model": size["d_model"],
            "n_layers": 2,
            # Something must bind a value to the key before it: where a layer has neither a
            # convolution nor a token shift of its own, the first layer is one.
            "pattern": f"{SHIFT},{mixer}" if mixer in _BARE else mixer,
            "mixers": {mixer: options},
            "mlp": "none",
        }
        training = {"steps": size["steps"], "lr": size["lr"], "warmup": 20, "until": 0.01}
        task = partial(
            mqar, size["batch"], size["length"], pairs=size["pairs"], vocab=size["vocab"],
            random_non_queries=False,
        )  # fmt: skip
        for seed in job.seeds:
            run = partial(recall, job, seed, task, size["tests"], model, **training)
            settings = {**size, "model": model, **training}
            yield from job.measure(mixer, mixer, seed, settings, run, {RECALL: said})


def memories_hold(rows: list[Row]) -> tuple[bool, str]:
    """Every matrix memory recalls 90 %, and neither a vector, a window nor a token shift 60 %."""
    able, unable = (
        {mixer: mean(rows, mixer, RECALL) for mixer, *_ in cases} for cases in (_ABLE, _UNABLE)
    )
    said = ", ".join(f"{m} {x:.1%}" for m, x in {**able, **unable}.items())
    return min(able.values()) >= 0.9 and max(unable.values()) < 0.6, f"Recalled: {said}."
