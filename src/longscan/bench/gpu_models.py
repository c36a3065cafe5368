"""Training speed of whole models: ours beside one with softmax attention, of equal widths.

Models of a size have the same width, the same MLP and as many blocks as give the same number of
parameters: a Llama-shaped one L blocks of attention, Gated DeltaNet 7/8 L, Mamba-2, whose blocks
have no MLP, 2 L. A step is what `longscan train` does on a GPU by default: weights in float32,
bfloat16 autocast, fused AdamW, no block computed twice; TOKENS tokens a step, in as few pieces as
fit into memory. As in training, a step is launched while the one before still runs: the device is
waited for once in RUN steps, and a time is a RUNth of that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.models import LanguageModel, LanguageModelConfig

if TYPE_CHECKING:
    from longscan.bench.gpu_measure import Measured, Row

SIZES = {
    "tiny": {"d_model": 64, "blocks": 8, "head": 16, "vocab": 97, "tokens": 128},
    "340m": {"d_model": 1024, "blocks": 24, "head": 128, "vocab": 32000, "tokens": 32768},
    "1.3b": {"d_model": 2048, "blocks": 24, "head": 128, "vocab": 32000, "tokens": 32768},
}
PIECES = {"1.3b": 2}
"""Of a step, where one is known not to fit into 80 GB."""
SHAPES = {"tiny": (32, 64), "340m": (2048, 8192), "1.3b": (2048, 8192)}
SOFT = "attention"
MIXERS = (SOFT, "gated_deltanet", "mamba2")
COMPILED = "+compile"
"""Behind the mixer, in the side of a row: its blocks went through torch.compile."""
# Steps before the clock runs, and runs of RUN steps under it; more of them where a step is short.
WARM, RUNS, RUN, SECONDS = 3, 4, 4, 3.0


def rows_of(size: str, compiled: bool = False) -> list[tuple[str, int, int]]:
    """(side, batch, length) of a size's rows, attention first."""
    tokens = SIZES[size]["tokens"]
    how = COMPILED if compiled else ""
    return [(m + how, tokens // t, t) for m in MIXERS for t in SHAPES[size]]


def config(size: str, mixer: str) -> LanguageModelConfig:
    """The model of a size with this mixer."""
    s = SIZES[size]
    d, blocks, head = s["d_model"], s["blocks"], s["head"]
    settings = {
        SOFT: {"n_heads": d // head},
        # q, k 3/4 d and v 3/2 d wide, as the layer has it by default.
        "gated_deltanet": {"n_heads": 3 * d // (4 * head), "d_key": head, "d_value": 2 * head},
        "mamba2": {"d_state": head, "d_head": head // 2},
    }
    return LanguageModelConfig(
        s["vocab"],
        d_model=d,
        n_layers={SOFT: blocks, "gated_deltanet": blocks * 7 // 8, "mamba2": 2 * blocks}[mixer],
        pattern=mixer,
        mixers={mixer: settings[mixer]},
        mlp="none" if mixer == "mamba2" else "gated",
        d_ff=-(-(d * 8 // 3) // (2 * head)) * 2 * head,
        tie_embeddings=False,
    )


def flops(model: LanguageModel, length: int) -> float:
    """Of a token in training: 6 for each weight that it meets, and the scores of attention.

    The scans of the linear mixers are not counted: they are what differs.
    """
    c = model.config
    weights = model.num_parameters() - model.embedding.weight.numel()
    return 6 * weights + 6 * length * c.d_model * c.layers.count(SOFT)


class _Names(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def cudnn(on: bool) -> Iterator[None]:
    """Softmax attention by cuDNN alone: where it cannot run, torch raises an error."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on else nullcontext():
        yield


def attention_by(model: LanguageModel, length: int) -> str:
    """The operator behind softmax attention, seen in one forward pass; "" if there is none."""
    device = model.embedding.weight.device.type
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    names = _Names()
    with names, torch.autocast(device, dtype=torch.bfloat16):
        model.hidden(ids)
    found = [n for n in names.seen if "scaled_dot_product" in n or "flash_attention" in n]
    return ", ".join(sorted(n.removeprefix("aten.").removesuffix(".default") for n in found))


def measure(row: Row) -> Measured:
    """Milliseconds of training steps; see the head of this file."""
    from longscan.bench.gpu_measure import Measured

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    mixer, compiled = row.side.removesuffix(COMPILED), row.side.endswith(COMPILED)
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(config(row.op, mixer))
    groups = model.parameter_groups(weight_decay=0.1, lr=1e-4)
    optimiser = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)
    out = Measured(**asdict(row))
    tokens = row.batch * row.length
    out.more = {
        "tokens": tokens, "parameters": model.num_parameters(), "compiled": compiled,
        "flops": flops(model, row.length) * tokens, "peak_flops": rate(device),
        "blocks": len(model.blocks),
    }  # fmt: skip
    ids = torch.randint(model.config.vocab_size, (row.batch, row.length + 1), device=device)
    with cudnn(gpu and mixer == SOFT):
        if mixer == SOFT:
            by = attention_by(model, row.length)
            out.more["attention"] = by
            if gpu and "cudnn" not in by:
                raise RuntimeError(f"attention ran by {by or 'unknown operators'}, not by cuDNN")
        if compiled:
            torch._dynamo.reset()  # another shape before would make this one's sizes variable
            for block in model.blocks:
                block.compile(dynamic=False)
        began = time.perf_counter()
        pieces = min(PIECES.get(row.op, 1), row.batch)
        while True:
            try:
                times = steps(model, optimiser, ids, pieces, out)
                break
            except torch.OutOfMemoryError:
                if pieces == row.batch:
                    raise
            optimiser.zero_grad()  # out of the handler, which would keep the failed pass alive
            pieces *= 2
            torch.cuda.empty_cache()
    out.train, out.more["pieces"] = times, pieces
    out.more["seconds"] = time.perf_counter() - began
    return out


def steps(
    model: LanguageModel,
    optimiser: torch.optim.Optimizer,
    ids: torch.Tensor,
    pieces: int,
    out: Measured,
) -> list[float]:
    """Milliseconds a step of runs of steps, those after the first few.

    Raises: torch.OutOfMemoryError also where the allocator had to make room, which is slow.
    """
    device = ids.device.type
    gpu = device == "cuda"

    def step() -> None:
        for part in ids.chunk(pieces):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss, _ = model.loss(part[:, :-1], part[:, 1:])
            (loss / pieces).backward()
        optimiser.step()
        optimiser.zero_grad()

    began = time.perf_counter()
    step()
    synchronise(gpu)
    out.first = time.perf_counter() - began
    for _ in range(WARM - 1):
        step()
    synchronise(gpu)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    tries = room_made(gpu)
    times: list[float] = []
    began = time.perf_counter()
    run = RUN if gpu else 1
    while len(times) < RUNS or time.perf_counter() - began < SECONDS * gpu:
        times.append(clocked(lambda: [step() for _ in range(run)], gpu) / run)
    if gpu:
        out.mib = torch.cuda.max_memory_allocated() / 2**20
    if room_made(gpu) > tries:
        raise torch.OutOfMemoryError("the allocator had to make room within steps")
    return [float(f"{t:.5g}") for t in times]


def room_made(gpu: bool) -> int:
    return torch.cuda.memory_stats()["num_alloc_retries"] if gpu else 0


def synchronise(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def clocked(call: Callable[[], Any], gpu: bool) -> float:
    """Milliseconds of a call, by the wall clock with the device waited for."""
    synchronise(gpu)
    began = time.perf_counter()
    call()
    synchronise(gpu)
    return 1e3 * (time.perf_counter() - began)


def rate(device: str) -> float:
    """Operations per second of a large product in bfloat16, the most that this device gives."""
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    clocked(lambda: a @ b, device == "cuda")
    ms = [clocked(lambda: a @ b, device == "cuda") for _ in range(5)]
    return 2 * n**3 / (statistics.median(ms) / 1e3)
