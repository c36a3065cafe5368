"""Time and memory of one layer at growing lengths, for claims about cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longscan.claims.training import Job
from longscan.models.block import build_mixer


def ms_at(length: int) -> str:
    return f"training ms at T={length}"


def mib_at(length: int) -> str:
    return f"training MiB at T={length}"


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one that is not counted."""
    took = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def layer_cost(
    job: Job,
    mixer: str,
    settings: dict[str, Any],
    *,
    d_model: int,
    lengths: Sequence[int],
    seed: int = 0,
    repeats: int = 3,
) -> dict[str, float]:
    """Forward and backward of one layer on one sequence: time, and on a GPU peak memory.

    In float32 on a CPU, under bfloat16 autocast on a GPU.
    """
    layer = job.build(lambda: build_mixer(mixer, d_model, settings), seed)
    device, cuda, out = job.device, job.device.type == "cuda", {}
    for length in lengths:
        x = torch.randn(1, length, d_model, generator=job.generator("test", seed), device=device)
        x.requires_grad_()

        def step(x: torch.Tensor = x) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                y, _ = layer(x)
            y.sum().backward()
            layer.zero_grad(set_to_none=True)
            x.grad = None

        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        out[ms_at(length)] = 1e3 * seconds(step, device, repeats)
        if cuda:
            out[mib_at(length)] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return out
