"""Recall of memories that learn at test time, beside Gated DeltaNet, at equal parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longscan.claims.language import matched
from longscan.claims.recall import RECALL, recall
from longscan.claims.results import Row, mean
from longscan.claims.training import Job, accuracy, examples, fit
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.synthetic.mqar import mqar
from longscan.synthetic.needle import VOCAB, needle

RIVAL = "gated_deltanet"
MIXERS = (RIVAL, "titans", "moneta", "yaad", "memora")
_PAIRS = {
    "quick": {"length": 16, "pairs": 4, "vocab": 16, "d_model": 32, "d_ff": 400, "batch": 4,
              "steps": 3, "tests": 1, "lr": [3e-3], "heads": 2},
    "cpu": {"length": 32, "pairs": 8, "vocab": 64, "d_model": 64, "d_ff": 400, "batch": 64,
            "steps": 1500, "tests": 8, "lr": [1e-3, 3e-3], "heads": 2},
    "gpu": {"length": 256, "pairs": 32, "vocab": 8192, "d_model": 128, "d_ff": 512, "batch": 64,
            "steps": 1500, "tests": 8, "lr": [1e-3, 3e-3], "heads": 2},
}  # fmt: skip


def configuration(size: dict[str, Any], mixer: str, vocab: int) -> dict[str, Any]:
    """Two layers with as many parameters as the rival."""
    model = {
        "vocab_size": vocab, "d_model": size["d_model"], "n_layers": 2, "pattern": mixer,
        "mixers": {mixer: {"n_heads": size["heads"]}}, "mlp": "gated",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        rival = {**model, "pattern": RIVAL, "mixers": {RIVAL: {"n_heads": size["heads"]}}}
        parameters = LanguageModel(LanguageModelConfig(**rival, d_ff=size["d_ff"]))  # type: ignore[arg-type]
        return matched(model, parameters.num_parameters())


def test_time_recall(job: Job) -> Iterator[Row]:
    """Multi-query associative recall."""
    size = job.choose(**_PAIRS)
    task = partial(
        mqar, size["batch"], size["length"], pairs=size["pairs"], vocab=size["vocab"],
        random_non_queries=False,
    )  # fmt: skip
    for mixer in MIXERS:
        model = configuration(size, mixer, size["vocab"])
        for seed in job.seeds:
            for lr in size["lr"]:
                training = {"steps": size["steps"], "lr": lr, "warmup": 50, "until": 0.01}
                run = partial(recall, job, seed, task, size["tests"], model, **training)
                settings = {**size, "model": model, **training}
                case = f"{mixer}, lr {lr:g}"
                yield from job.measure(case, mixer, seed, settings, run)


def best(rows: list[Row], mixer: str, metric: str) -> float:
    """The mean over seeds at the learning rate that suits the mixer best."""
    cases = dict.fromkeys(r.case for r in rows if r.mixer == mixer)
    return max(mean(rows, case, metric) for case in cases)


def test_time_recall_holds(rows: list[Row]) -> tuple[bool, str]:
    """Each of the memories recalls 95 %, at the better of the learning rates."""
    got = {m: best(rows, m, RECALL) for m in MIXERS}
    said = ", ".join(f"{m} {x:.1%}" for m, x in got.items())
    good = min(got[m] for m in MIXERS[1:]) >= 0.95
    return good, f"Recalled, at the better of the learning rates: {said}."


# -- a needle in noise --------------------------------------------------------------------------

_NEEDLES = {
    "quick": {"length": 16, "most": 2, "alphabet": 4, "d_model": 32, "d_ff": 400, "batch": 4,
              "steps": 3, "lengths": [16, 32], "examples": 4, "lr": 3e-3, "heads": 2},
    "cpu": {"length": 48, "most": 6, "alphabet": 16, "d_model": 64, "d_ff": 400, "batch": 64,
            "steps": 1500, "lengths": [48, 192, 768], "examples": 256, "lr": 1e-3, "heads": 2},
    "gpu": {"length": 256, "most": 8, "alphabet": 64, "d_model": 128, "d_ff": 512, "batch": 64,
            "steps": 6000, "lengths": [256, 1024, 4096], "examples": 128, "lr": 1e-3, "heads": 2},
}  # fmt: skip


def at(length: int) -> str:
    return f"accuracy at T={length}"


def find(job: Job, seed: int, size: dict[str, Any], model: dict[str, Any], **training: Any):
    """Train with every needle asked for at one length, test with one question at several."""
    count = {"needles": size["most"], "queries": size["most"], "alphabet": size["alphabet"]}
    train = partial(needle, size["batch"], size["length"], **count)
    lm = fit(job, model, lambda g: train(generator=g), seed=seed, **training)
    out = {}
    for length in size["lengths"]:
        at_once = max(1, min(size["examples"], 2**16 // length))
        task = partial(needle, at_once, length, needles=size["most"], alphabet=size["alphabet"])
        count = size["examples"] // at_once
        batches = examples(job, lambda g, task=task: task(generator=g), seed, count)
        out[at(length)] = accuracy(lm, batches, 2048).token
    return out


def needles(job: Job) -> Iterator[Row]:
    """A key and its value in noise; trained at the first length, tested to 16 times that."""
    size = job.choose(**_NEEDLES)
    for mixer in MIXERS:
        model = configuration(size, mixer, VOCAB)
        training = {"steps": size["steps"], "lr": size["lr"], "warmup": 50, "until": 0.01}
        for seed in job.seeds:
            run = partial(find, job, seed, size, model, **training)
            yield from job.measure(mixer, mixer, seed, {**size, "model": model, **training}, run)


def needles_hold(rows: list[Row]) -> tuple[bool, str]:
    """Every memory finds 90 % at the trained length, and more than the rival at the longest."""
    lengths = list(dict.fromkeys(int(r.metric.rpartition("=")[2]) for r in rows))
    got = {m: [mean(rows, m, at(t)) for t in lengths] for m in MIXERS}
    said = "; ".join(f"{m} {', '.join(f'{x:.1%}' for x in xs)}" for m, xs in got.items())
    good = all(got[m][0] >= 0.9 and got[m][-1] > got[RIVAL][-1] for m in MIXERS[1:])
    return good, f"Found at T = {', '.join(map(str, lengths))}: {said}."
