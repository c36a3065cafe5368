"""Small language models of bytes at equal parameters: test-time memories beside the gated ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import log
from typing import Any

import torch

from longscan.claims.results import Row, mean
from longscan.claims.texts import BOS, windows
from longscan.claims.training import Batch, Job, examples, labelled_loss
from longscan.models import LanguageModel, LanguageModelConfig

BITS = "validation bits per byte"
PARAMETERS = "parameters"

_SIZES: dict[str, dict[str, Any]] = {
    "quick": {"length": 16, "batch": 2, "steps": 3, "d_model": 32, "d_ff": 256, "megabytes": 0.05,
              "tests": 1, "lr": 2e-3},
    "cpu": {"length": 256, "batch": 8, "steps": 150, "d_model": 64, "d_ff": 320, "megabytes": 8,
            "tests": 16, "lr": 4e-3},
    "gpu": {"length": 256, "batch": 32, "steps": 600, "d_model": 128, "d_ff": 512,
            "megabytes": 24, "tests": 16, "lr": 3e-3},
}  # fmt: skip
RIVALS = ("gated_deltanet", "gla")
# mixer: what is published of it (perplexity on Wikitext, 340M parameters, 15B tokens)
_MEMORIES = {
    "titans": "26.18 (Titans)", "moneta": "26.19", "yaad": "26.61", "memora": "27.16", "ttt": "",
    "titans_mac": "25.43 (Titans)", "titans_mag": "25.07 (Titans)", "titans_mal": "24.69 (Titans)",
}  # fmt: skip
_JUDGED = ("titans", "moneta", "yaad", "memora")
_OTHERS = ("gam", "gam_written", "wersa", "mega", "transformer_vq", "longvq")
_SAID = {"gated_deltanet": "27.01", **_MEMORIES}
_SETTINGS: dict[str, dict[str, Any]] = {"gla": {"d_conv": 4}}


def matched(model: dict[str, Any], parameters: int) -> dict[str, Any]:
    """The same model with the width of its MLPs such that it has about so many parameters.

    Raises: ValueError if it has more without any MLP.
    """

    def size(d_ff: int) -> int:
        return LanguageModel(LanguageModelConfig(**{**model, "d_ff": d_ff})).num_parameters()

    least, slope = size(1), size(2) - size(1)
    d_ff = 1 + round((parameters - least) / slope)
    if d_ff < 1:
        raise ValueError(f"{model['pattern']} has {least} parameters, more than {parameters}")
    return {**model, "d_ff": d_ff}


def configuration(size: dict[str, Any], mixer: str) -> dict[str, Any]:
    """Two layers, an MLP behind each mixer, as many parameters as the first rival has."""
    model = {
        "vocab_size": BOS + 1, "d_model": size["d_model"], "n_layers": 2, "pattern": mixer,
        "mixers": {mixer: _SETTINGS[mixer]} if mixer in _SETTINGS else {}, "mlp": "gated",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        rival = {**model, "pattern": RIVALS[0], "mixers": {}, "d_ff": size["d_ff"]}
        parameters = LanguageModel(LanguageModelConfig(**rival)).num_parameters()
        return matched(model, parameters)


@torch.no_grad()
def bits(model: LanguageModel, batches: Iterator[Batch]) -> float:
    """The loss in bits per byte."""
    model.eval()
    losses = [model.loss(inputs, labels)[0].double() for inputs, labels in batches]
    return torch.stack(losses).mean().item() / log(2)


def trained(
    job: Job, seed: int, size: dict[str, Any], model: dict[str, Any], training: dict[str, Any]
) -> LanguageModel:
    """A language model trained on stretches of the text."""
    lm = job.model(LanguageModelConfig(**model), seed)
    loss = labelled_loss(lm, partial(windows, job.data, "train", size))
    job.train(lm, loss, seed=seed, **training)
    return lm


def validation(job: Job, size: dict[str, Any], seed: int) -> Iterator[Batch]:
    """Stretches of the text's validation part, the same for every model."""
    return examples(job, partial(windows, job.data, "valid", size), seed, size["tests"])


def schedule(size: dict[str, Any]) -> dict[str, Any]:
    """How all of them are trained."""
    return {
        "steps": size["steps"], "lr": size["lr"], "warmup": size["steps"] // 20, "decay": True,
        "weight_decay": 0.1, "autocast": True,
    }  # fmt: skip


def modelled(job: Job, seed: int, size: dict[str, Any], model: dict[str, Any]) -> dict[str, float]:
    """Train, then measure on unseen text."""
    lm = trained(job, seed, size, model, schedule(size))
    return {BITS: bits(lm, validation(job, size, seed)), PARAMETERS: lm.num_parameters()}


def language(job: Job) -> Iterator[Row]:
    """Bytes of Python's standard library, or of --data."""
    size = job.choose(**_SIZES)
    for mixer in (*RIVALS, *_MEMORIES, *_OTHERS):
        model = configuration(size, mixer)
        settings = {**size, "model": model, "data": str(job.data)}
        for seed in job.seeds:
            run = partial(modelled, job, seed, size, model)
            said = {BITS: f"perplexity {_SAID[mixer]}"} if _SAID.get(mixer) else {}
            yield from job.measure(mixer, mixer, seed, settings, run, said)


def language_holds(rows: list[Row]) -> tuple[bool, str]:
    """Titans, Moneta, Yaad and Memora each need fewer bits than both rivals; the rest is said."""
    got = {m: mean(rows, m, BITS) for m in (*RIVALS, *_MEMORIES, *_OTHERS)}
    ranked = ", ".join(f"{m} {x:.3f}" for m, x in sorted(got.items(), key=lambda item: item[1]))
    best = min(got[m] for m in RIVALS)
    return max(got[m] for m in _JUDGED) < best, f"Bits per byte: {ranked}."


# -- chunks of another size than in training ----------------------------------------------------

TRAINED = 16
CHUNKS = (1, 16, 64)
_STALE = ("titans", "moneta", "yaad", "memora", "ttt")
_STALE_SIZES = {
    "quick": _SIZES["quick"],
    "cpu": {**_SIZES["cpu"], "tests": 2},
    "gpu": {**_SIZES["gpu"], "steps": 400, "tests": 4},
}


def at_chunk(chunk: int) -> str:
    return f"{BITS}, chunk {chunk}"


def stale(job: Job, seed: int, size: dict[str, Any], model: dict[str, Any]) -> dict[str, float]:
    """Train with chunks of 16 tokens, evaluate with others."""
    lm = trained(job, seed, size, model, schedule(size))
    out = {}
    for chunk in CHUNKS:
        for block in lm.blocks:
            block.mixer.chunk = chunk  # type: ignore[union-attr,assignment]
        out[at_chunk(chunk)] = bits(lm, validation(job, size, seed))
    return out


def staleness(job: Job) -> Iterator[Row]:
    """The same weights, their inner gradients taken at the last token, or 15 or 63 tokens ago."""
    size = job.choose(**_STALE_SIZES)
    for mixer in _STALE:
        model = configuration(size, mixer)
        model["mixers"] = {mixer: {"chunk": TRAINED}}
        settings = {**size, "model": model, "data": str(job.data)}
        for seed in job.seeds:
            run = partial(stale, job, seed, size, model)
            yield from job.measure(mixer, mixer, seed, settings, run)


def staleness_holds(rows: list[Row]) -> tuple[bool, str]:
    """The exact recurrence, token by token, costs at most 0.02 bits against trained chunks."""
    got = {m: [mean(rows, m, at_chunk(c)) for c in CHUNKS] for m in _STALE}
    said = "; ".join(
        f"{m} {same:.3f}, exact {exact - same:+.3f}, chunks of {CHUNKS[2]} {longer - same:+.3f}"
        for m, (exact, same, longer) in got.items()
    )
    good = all(exact - same <= 0.02 for exact, same, _ in got.values())
    return good, f"Bits per byte with the chunks of training: {said}."
