"""WERSA: what its random features see of an angle, and long documents read byte by byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from longscan.claims import datasets
from longscan.claims.cost import layer_cost, ms_at
from longscan.claims.datasets import Split
from longscan.claims.images import ACCURACY, fit_classifier, share_right
from longscan.claims.results import Row, mean
from longscan.claims.training import Job
from longscan.mixers.wersa import WERSA
from longscan.models import Classifier, ClassifierConfig

# -- the kernel of the features -----------------------------------------------------------------

COSINES = (1.0, 0.5, 0.0, -0.5, -1.0)
_FEATURES = {"quick": {"d": 32, "features": 4096}, "cpu": {"d": 32, "features": 65536}}


def product_at(cosine: float) -> str:
    return f"product at cosine {cosine:g}"


def arc_cosine(cosine: float) -> float:
    """The kernel of order 1 (Cho and Saul 2009) for unit vectors: E[relu(w q) relu(w k)]."""
    angle = math.acos(cosine)
    return (math.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)


def kernel_shape(job: Job, size: dict[str, Any], shared: bool, seed: int) -> dict[str, float]:
    """Products of the features of unit vectors at several angles."""
    d, m = size["d"], size["features"]
    layer = job.build(lambda: WERSA(d, n_heads=1, n_features=m, split=not shared), seed)
    first, second = layer.random_matrix[0].double(), layer.random_matrix[-1].double()
    g = job.generator("test", seed)
    frame = torch.linalg.qr(torch.randn(d, 2, generator=g, device=g.device, dtype=torch.float64))
    # R has the variance 1 / d, so that vectors of this length stand for unit ones.
    a, b = frame.Q.T * d**0.5
    out = {}
    for cosine in COSINES:
        other = cosine * a + math.sqrt(1 - cosine**2) * b
        out[product_at(cosine)] = ((a @ first).relu() @ (other @ second).relu() / m).item()
    return out


def wersa_kernel(job: Job) -> Iterator[Row]:
    """One random matrix for queries and keys, or one for each, as published."""
    size = job.choose(**_FEATURES)
    for case in ("shared", "split"):
        for seed in job.seeds:
            run = partial(kernel_shape, job, size, case == "shared", seed)
            yield from job.measure(case, "wersa", seed, size, run)


def wersa_kernel_holds(rows: list[Row]) -> tuple[bool, str]:
    """With one matrix the products fall with the angle; with two they do not see it."""
    got = {c: [mean(rows, c, product_at(x)) for x in COSINES] for c in ("shared", "split")}
    want = [arc_cosine(x) for x in COSINES]
    close = max(abs(a - b) for a, b in zip(got["shared"], want, strict=True)) / want[0]
    spread = max(got["split"]) / min(got["split"]) - 1
    said = "; ".join(f"{c}: {', '.join(f'{x:.3f}' for x in xs)}" for c, xs in got.items())
    return spread > 0.5, (
        f"Products at cosines {', '.join(f'{x:g}' for x in COSINES)}: {said}. With one matrix this "
        f"is the arc-cosine kernel (within {close:.1%} of its largest value), not the softmax; "
        f"with two, as published, products vary by {spread:.1%} over all angles."
    )


# -- movie reviews ------------------------------------------------------------------------------

_REVIEWS = {
    "quick": {"longest": 64, "d_model": 32, "n_layers": 1, "steps": 3, "batch": 4, "tests": 20,
              "lengths": [64, 128], "lr": 2e-3, "d_ff": 64},
    "cpu": {"longest": 1024, "d_model": 64, "n_layers": 2, "steps": 200, "batch": 8, "tests": 200,
            "lengths": [1024, 4096, 8192], "lr": 2e-3, "d_ff": 192},
    "gpu": {"longest": 2048, "d_model": 128, "n_layers": 2, "steps": 1500, "batch": 16,
            "tests": 200, "lengths": [1024, 4096, 16384, 32768], "lr": 5e-4, "d_ff": 384},
}  # fmt: skip
_ENCODER = {"causal": False, "filters": "global"}
# case: mixer, its settings, whether the classifier reads in both directions, what is published
_READERS: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "wersa": ("wersa", _ENCODER, False, "86.2 % (ArXiv papers)"),
    "wersa, causal": ("wersa", {}, False, ""),
    "attention": ("attention", {}, True, "85.0 % (ArXiv papers)"),
}


def byte_ids(split: Split, device: torch.device) -> Split:
    """Bytes as token ids on the device."""
    return Split(split.x.long().to(device), split.label.to(device), split.lengths)


def reviews(job: Job) -> Iterator[Row]:
    """Positive or negative, from the bytes; and what one layer costs at growing lengths."""
    size = job.choose(**_REVIEWS)
    if not job.plan:
        parts = datasets.movie_reviews(job.data, size["longest"])
        train, test = (byte_ids(s, job.device) for s in parts)
        assert test.lengths is not None
        test = Split(*(x[: size["tests"]] for x in (test.x, test.label, test.lengths)))
    for case, (mixer, options, both, said) in _READERS.items():
        config = {
            "d_model": size["d_model"], "n_layers": size["n_layers"], "pattern": mixer,
            "mixers": {mixer: options} if options else {}, "n_classes": 2, "vocab_size": 256,
            "bidirectional": both, "dropout": 0.1,
        }  # fmt: skip
        training = {
            "batch": size["batch"], "steps": size["steps"], "lr": size["lr"], "decay": True,
            "warmup": size["steps"] // 10, "autocast": True,
        }  # fmt: skip

        def run(
            config=config, training=training, mixer=mixer, options=options, seed=0
        ) -> dict[str, float]:
            even = equal(config, size)
            model = fit_classifier(job, even, train, seed, **training)
            cost = layer_cost(job, mixer, options, d_model=size["d_model"], lengths=size["lengths"])
            right = share_right(model, test, piece=20)
            return {ACCURACY: right, "parameters": model.num_parameters(), **cost}

        for seed in job.seeds:
            yield from job.measure(
                case, mixer, seed, {**size, **config, **training}, partial(run, seed=seed),
                {ACCURACY: said},
            )  # fmt: skip


def equal(config: dict[str, Any], size: dict[str, Any]) -> dict[str, Any]:
    """The width of the MLPs that gives about the parameters of the bidirectional attention."""

    def count(**changes: Any) -> int:
        with torch.random.fork_rng(devices=[]):
            return Classifier(ClassifierConfig(**{**config, **changes})).num_parameters()

    rival = count(pattern="attention", mixers={}, bidirectional=True, d_ff=size["d_ff"])
    least, slope = count(d_ff=1), count(d_ff=2) - count(d_ff=1)
    return {**config, "d_ff": 1 + round((rival - least) / slope)}


def reviews_hold(rows: list[Row]) -> tuple[bool, str]:
    """As accurate as attention, within the 3 points that 200 reviews can tell, and cheaper; and
    better than chance by more than that, as two that have learnt nothing are equal too."""
    got = {c: mean(rows, c, ACCURACY) for c in _READERS}
    lengths = [int(r.metric.rpartition("=")[2]) for r in rows if r.metric.startswith("training ms")]
    longest = max(lengths)
    ms = {c: mean(rows, c, ms_at(longest)) for c in _READERS}
    said = "; ".join(f"{c} {got[c]:.1%}, {ms[c]:.1f} ms" for c in _READERS)
    learnt = got["wersa"] >= 0.6
    good = got["wersa"] >= got["attention"] - 0.03 and ms["wersa"] < ms["attention"]
    return learnt and good, f"Accuracy, and the time of a layer at T={longest}: {said}."
