"""The attention sink: how much attention falls on the first token, with and without a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from longscan.claims.results import Row, mean
from longscan.claims.texts import BOS, windows
from longscan.claims.training import Batch, Job, examples, labelled_loss
from longscan.mixers.attention import Attention
from longscan.models import LanguageModel, LanguageModelConfig

LOSS, BIGGEST = "validation loss", "largest activation"
SINK, EVEN = "attention on the first token", "the same, if spread evenly"

_SIZES: dict[str, dict[str, Any]] = {
    "quick": {"length": 16, "batch": 2, "steps": 3, "d_model": 24, "n_layers": 2, "n_heads": 2,
              "d_ff": 40, "megabytes": 0.05, "tests": 1, "lr": 2e-3},
    "cpu": {"length": 128, "batch": 8, "steps": 500, "d_model": 72, "n_layers": 3, "n_heads": 4,
            "d_ff": 192, "megabytes": 8, "tests": 16, "lr": 4e-3},
    "gpu": {"length": 512, "batch": 32, "steps": 6000, "d_model": 384, "n_layers": 6, "n_heads": 6,
            "d_ff": 1024, "megabytes": 24, "tests": 8, "lr": 2e-3},
}  # fmt: skip
_CASES = {
    "attention": ("attention", {}, {SINK: "0.467", LOSS: "perplexity 6.026"}),
    "gate on the output": (
        "gated_attention", {"gate": "sdpa"}, {SINK: "0.048", LOSS: "perplexity 5.761"},
    ),
}  # fmt: skip


@torch.no_grad()
def look(model: LanguageModel, batches: Iterator[Batch]) -> dict[str, float]:
    """The loss, and of every layer the attention on the first token and the largest activation.

    The attention is the mean over heads and queries; the query of the first token itself, which
    has nowhere else to look, is left out. The activation is that of the residual stream.
    """
    model.eval()
    blocks = list(model.blocks)
    sinks, peaks = torch.zeros(len(blocks)), torch.zeros(len(blocks))
    loss, count, even = 0.0, 0, 0.0

    def watch(i: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def attended(mixer: Attention, args: tuple[Any, ...]) -> None:
            sinks[i] += mixer.weights(args[0])[:, :, 1:, 0].mean().cpu()

        def left(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            peaks[i] = max(peaks[i], out[0].abs().max().cpu())

        return attended, left

    hooks = []
    for i, block in enumerate(blocks):
        attended, left = watch(i)
        hooks.append(block.mixer.register_forward_pre_hook(attended))  # type: ignore[union-attr]
        hooks.append(block.register_forward_hook(left))
    try:
        for inputs, labels in batches:
            loss += model.loss(inputs, labels)[0].item()
            count += 1
            even = (1 / torch.arange(2, inputs.shape[1] + 1)).mean().item()
    finally:
        for hook in hooks:
            hook.remove()
    sinks /= count
    by_layer = {f"{SINK}, layer {i}": x for i, x in enumerate(sinks.tolist())}
    return {
        LOSS: loss / count,
        SINK: sinks.mean().item(),
        EVEN: even,
        BIGGEST: peaks.mean().item(),
        **by_layer,
    }


def train_and_look(
    job: Job, seed: int, size: dict[str, Any], model: dict[str, Any], training: dict[str, Any]
) -> dict[str, float]:
    """Train on the text, then measure on its validation part."""
    lm = job.model(LanguageModelConfig(**model), seed)
    loss = labelled_loss(lm, partial(windows, job.data, "train", size))
    job.train(lm, loss, seed=seed, **training)
    return look(lm, examples(job, partial(windows, job.data, "valid", size), seed, size["tests"]))


def attention_sink(job: Job) -> Iterator[Row]:
    """Bytes of Python's standard library, or of --data; the gated model has a narrower MLP, so
    that both have as many parameters."""
    size = job.choose(**_SIZES)
    for case, (mixer, options, said) in _CASES.items():
        # The gate has d_model^2 parameters a layer, an MLP 3 d_model d_ff.
        d_ff = size["d_ff"] - (size["d_model"] // 3 if mixer == "gated_attention" else 0)
        model = {
            "vocab_size": BOS + 1,
            "d_model": size["d_model"],
            "n_layers": size["n_layers"],
            "pattern": mixer,
            "mixers": {mixer: {"n_heads": size["n_heads"], "qk_norm": True, **options}},
            "d_ff": d_ff,
        }
        training = {
            "steps": size["steps"], "lr": size["lr"], "warmup": size["steps"] // 20, "decay": True,
            "weight_decay": 0.1, "autocast": True,
        }  # fmt: skip
        settings = {**size, "model": model, **training, "data": str(job.data)}
        for seed in job.seeds:
            run = partial(train_and_look, job, seed, size, model, training)
            yield from job.measure(case, mixer, seed, settings, run, said)


def attention_sink_holds(rows: list[Row]) -> tuple[bool, str]:
    """A sink forms without the gate, the gate takes away half of it, and the loss is not higher."""
    plain, gated = _CASES
    sink, gate, even = mean(rows, plain, SINK), mean(rows, gated, SINK), mean(rows, plain, EVEN)
    loss, loss_gate = mean(rows, plain, LOSS), mean(rows, gated, LOSS)
    said = (
        f"Attention on the first token {sink:.3f} without and {gate:.3f} with the gate (spread "
        f"evenly: {even:.3f}); validation loss {loss:.4f} and {loss_gate:.4f} nats a byte."
    )
    if sink < 2 * even:
        return False, said + " No sink forms in so short a training, so there is none to reduce."
    return gate <= sink / 2 and loss_gate <= loss, said
